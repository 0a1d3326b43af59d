"""A linear n-gram classifier, trained here in seconds; one safetensors file, its facts in JSON.

Multinomial logistic regression over hashed words, word pairs and character n-grams, as fastText
(Joulin et al. 2016) and the quality classifiers of GPT-3, Llama 3 and DCLM made with it. `train`
beside this file makes the models. Letters: V places of the table, C classes.
"""

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from moebius.curate.scorers import Scorer, Scores
from moebius.curate.scorers.features import excerpt, features

FORMAT = "moebius linear scorer 1"


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a linear scorer sees: places (2^bits), lengths of character n-grams, characters."""

    bits: int = 19
    grams: tuple[int, ...] = (2, 3, 4)
    max_chars: int = 4096

    def __post_init__(self) -> None:
        if not 8 <= self.bits <= 28:
            raise ValueError(f"bits must be from 8 to 28, not {self.bits}")
        if list(self.grams) != sorted(set(self.grams)) or not all(1 <= n <= 8 for n in self.grams):
            raise ValueError(f"grams must rise within 1 to 8, not {list(self.grams)}")
        if self.max_chars < 1:
            raise ValueError(f"max_chars must be at least 1, not {self.max_chars}")

    def features(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Places (int32, rising; the last, of the bias, is `2 ** bits`) and values (float32)."""
        places, values = features(excerpt(text, self.max_chars), self.bits, self.grams)
        bias = np.int32(1 << self.bits)
        return np.append(places, bias), np.append(values, np.float32(1))


@dataclasses.dataclass(frozen=True, eq=False)
class LinearModel(Scores):
    """Weights with what they mean. `facts` says how they were trained, and on what."""

    classes: tuple[str, ...]
    weights_VC: np.ndarray
    temperature: float = 1.0
    shape: Shape = Shape()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def score(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """The probability of each class for each text."""
        return [dict(zip(self.classes, self._probabilities(text), strict=True)) for text in texts]

    def _probabilities(self, text: str) -> list[float]:
        places, values = self.shape.features(text)
        logits_C = values @ self.weights_VC[places] / np.float32(self.temperature)
        p_C = np.exp((logits_C - logits_C.max()).astype(np.float64))
        return (p_C / p_C.sum()).tolist()

    def save(self, path: Path | str) -> None:
        """Write the model to one file, whole or not at all."""
        record = {
            "format": FORMAT,
            "classes": list(self.classes),
            "temperature": self.temperature,
            "shape": dataclasses.asdict(self.shape),
            "facts": dict(self.facts),
            "sha256": _digest(self.weights_VC),
        }
        data = safetensors.numpy.save(
            {"weights": np.ascontiguousarray(self.weights_VC, np.float32)},
            metadata={"linear": json.dumps(record, sort_keys=True)},
        )
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_bytes(data)
        os.replace(aside, path)

    @classmethod
    def load(cls, path: Path | str) -> "LinearModel":
        """Read a model. Raises ValueError where there is none, or it is not as it was written."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(
                f"cannot read the linear scorer {path} ({error.strerror}); train one with "
                "moebius.curate.scorers.train"
            ) from error
        try:
            weights_VC = safetensors.numpy.load(data)["weights"]
            record = json.loads(_header(data)["linear"])
            if record["format"] != FORMAT or record["sha256"] != _digest(weights_VC):
                raise KeyError("sha256")
            shape = Shape(**{**record["shape"], "grams": tuple(record["shape"]["grams"])})
            model = cls(
                tuple(record["classes"]), weights_VC, record["temperature"], shape, record["facts"]
            )
            if weights_VC.shape != ((1 << shape.bits) + 1, len(model.classes)):
                raise KeyError("shape")
        except (SafetensorError, KeyError, TypeError, ValueError, struct.error) as error:
            raise ValueError(
                f"{path} is not an intact linear scorer ({error}); train it again"
            ) from error
        return model


def _header(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: eight bytes say how long its JSON is."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])["__metadata__"]


def _digest(weights_VC: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(weights_VC, "<f4").tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Linear(Scorer):
    """A linear n-gram classifier from a file; its scores are probabilities by class."""

    path: str = ""

    def build(self) -> LinearModel:
        if not self.path:
            raise ValueError("a linear scorer needs path, the file that training it wrote")
        return LinearModel.load(self.path)
