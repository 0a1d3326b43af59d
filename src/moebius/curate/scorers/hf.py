"""Any Hugging Face sequence classifier from a local folder, such as a distilled quality model.

One output is a regression and named `score` (as FineWeb-Edu's), several are classes: a softmax, or
sigmoids where the model says that labels may hold together. Nothing is downloaded, no code of the
folder is run, and weights are read from safetensors only.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from moebius.config import runtime
from moebius.curate.scorers import Scorer, Scores

# No tokenizer here spends more characters than this on the mean token of real text.
_CHARS_PER_TOKEN = 32


@dataclasses.dataclass(frozen=True)
class Classifier(Scorer):
    """A folder as `save_pretrained` writes it: model and tokenizer."""

    path: str = ""
    # What comes after so many tokens is not seen.
    max_tokens: int = 512
    # Names of the outputs, where the model's own (`LABEL_0`, ...) say nothing.
    classes: tuple[str, ...] = ()
    batch: int = runtime(16)
    device: Literal["cpu", "cuda"] = runtime("cpu")

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.batch < 1:
            raise ValueError("max_tokens and batch must be at least 1")

    def build(self) -> "ClassifierScores":
        try:
            import transformers
        except ImportError as error:
            raise ValueError(
                "the classifier scorer needs the hf extra: pip install 'moebius[hf]'"
            ) from error
        if not (Path(self.path) / "config.json").is_file():
            raise ValueError(
                f"there is no classifier in {self.path or 'path'!r} (no config.json); download the "
                "model into a folder first"
            )
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.path, local_files_only=True)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                self.path, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{self.path} is not a classifier that can be read: {first}"
            ) from error
        model.eval().requires_grad_(False).to(self.device)
        return ClassifierScores(self, model, tokenizer)


class ClassifierScores(Scores):
    """The loaded model and tokenizer."""

    def __init__(self, config: Classifier, model: Any, tokenizer: Any) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        count = int(model.config.num_labels)
        own = ("score",) if count == 1 else tuple(model.config.id2label[i] for i in range(count))
        self.classes = config.classes or own
        if len(self.classes) != count:
            raise ValueError(
                f"{config.path} has {count} outputs; classes names {len(self.classes)}"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        # One text at a time needs no padding.
        self.batch = config.batch if tokenizer.pad_token is not None else 1

    def score(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Each text's classes; texts of like length are put together, so little is padded."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: list[dict[str, float]] = [{} for _ in texts]
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            for i, row in zip(chosen, self._rows([texts[i] for i in chosen]), strict=True):
                found[i] = dict(zip(self.classes, row, strict=True))
        return found

    def _rows(self, texts: list[str]) -> list[list[float]]:
        limit = self.config.max_tokens
        cut = [text[: limit * _CHARS_PER_TOKEN] for text in texts]
        valid = [text.encode("utf-8", "replace").decode() for text in cut]
        tokens = self.tokenizer(
            valid,
            truncation=True,
            max_length=limit,
            padding=len(texts) > 1,
            return_tensors="pt",
        )
        logits_NC = self.model(**tokens.to(self.config.device)).logits.double()
        if len(self.classes) == 1:
            return logits_NC.tolist()
        if self.model.config.problem_type == "multi_label_classification":
            return logits_NC.sigmoid().tolist()
        return logits_NC.softmax(-1).tolist()
