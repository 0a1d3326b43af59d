"""Semantic deduplication over the whole corpus: SemDeDup (Abbas et al. 2023).

Documents are embedded by an encoder that the user names, embeddings of a sample are clustered
(k-means on the sphere), and within a cluster a document goes if its cosine to an earlier kept one
is above a threshold. Llama 3 does so with RoBERTa for post-training data.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import numpy as np

from moebius.config import resolve
from moebius.curate.document import Document, Dropped
from moebius.curate.groups import REPEATS, by_place
from moebius.curate.step import CorpusStep, Decision, Round, Whole, look_up
from moebius.curate.text import hash_of

Encode = Callable[[str], np.ndarray]
_ITERATIONS = 20
# Vectors that are compared with all kept ones of a cluster at once.
_ROWS = 1024


def _encoder(config: "SemanticDedup") -> Encode:
    if not Path(config.encoder).is_dir():
        return resolve(config.encoder)
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError("semantic_dedup needs the hf extra: pip install 'moebius[hf]'") from error
    auto: Any = transformers
    tokenizer = auto.AutoTokenizer.from_pretrained(config.encoder, local_files_only=True)
    model = auto.AutoModel.from_pretrained(config.encoder, local_files_only=True).eval()

    def encode(text: str) -> np.ndarray:
        # A long page is not tokenised whole for its first tokens.
        text = text[: 32 * config.max_tokens]
        tokens = tokenizer(text, truncation=True, max_length=config.max_tokens, return_tensors="pt")
        with torch.inference_mode():
            states_BTD = model(**tokens).last_hidden_state
        return states_BTD[0].float().mean(0).numpy()

    return encode


def _unit(vector: np.ndarray) -> np.ndarray:
    """Length 1, float16, in whole 64-bit words (as records sort); zeros fill the last."""
    vector = np.asarray(vector, np.float64).ravel()
    length = np.linalg.norm(vector)
    vector = vector / length if 0 < length < np.inf else np.zeros_like(vector)
    return np.pad(vector, (0, -len(vector) % 4)).astype("<f2").view("<u8")


def _record(name: int, place: int, words: np.ndarray) -> np.ndarray:
    columns = [("hash", "<u8"), ("place", "<u8"), *((f"v{i}", "<u8") for i in range(len(words)))]
    return np.array([(name, place, *words.tolist())], np.dtype(columns))


def _vectors(records: np.ndarray) -> np.ndarray:
    """The vectors of records, float32 (count, dims)."""
    rows = np.ascontiguousarray(records).view("<u8").reshape(-1, len(records.dtype.names or ()))
    return np.ascontiguousarray(rows[:, 2:]).view("<f2").astype(np.float32)


@final
class _Sample(Round):
    """Embeddings of a share of the documents; united into centroids."""

    def __init__(self, config: "SemanticDedup", encode: Encode) -> None:
        self._config, self._encode = config, encode
        # It says how long vectors are.
        self._nothing = _record(0, 0, _unit(encode("nothing")))[:0]

    def records(self, document: Document, place: int, known: np.ndarray | None) -> np.ndarray:
        name = hash_of(f"{document.source}\0{document.key}", self._config.seed)
        if name < self._config.sample * 2.0**64:
            return _record(name, place, _unit(self._encode(document.text)))
        return self._nothing

    def settle(self, records: np.ndarray) -> np.ndarray:
        return records

    def unite(self, findings: np.ndarray) -> np.ndarray:
        """As many centroids as there are clusters, from those of the smallest hashes on."""
        findings = np.sort(findings, order=["hash", "place"])
        vectors = _vectors(findings)
        centroids = vectors[: self._config.clusters].copy()
        for _ in range(_ITERATIONS if len(vectors) > len(centroids) else 0):
            nearest = _nearest(vectors, centroids)
            sums = np.zeros(centroids.shape, np.float64)
            np.add.at(sums, nearest, vectors)
            lengths = np.linalg.norm(sums, axis=1, keepdims=True)
            moved = np.where(lengths > 0, sums / np.maximum(lengths, 1e-30), centroids)
            if np.array_equal(moved.astype(np.float32), centroids):
                break
            centroids = moved.astype(np.float32)
        found = findings[: len(centroids)].copy()
        for index, centroid in enumerate(centroids):
            found[index] = _record(index, index, _unit(centroid))[0]
        return found


def _nearest(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    parts = [vectors[start : start + _ROWS] for start in range(0, len(vectors), _ROWS)]
    return np.concatenate([(part @ centroids.T).argmax(axis=1) for part in parts])


@final
class _Clusters(Round):
    def __init__(self, config: "SemanticDedup", encode: Encode) -> None:
        self._config, self._encode = config, encode

    def records(self, document: Document, place: int, known: np.ndarray | None) -> np.ndarray:
        """The cluster and the embedding."""
        words = _unit(self._encode(document.text))
        vector = words.view("<f2").astype(np.float32)[None]
        cluster = 0 if known is None or not len(known) else _nearest(vector, _vectors(known))[0]
        return _record(hash_of(str(cluster)), place, words)

    def settle(self, records: np.ndarray) -> np.ndarray:
        """In each cluster, in order of place, who is too near to whom."""
        starts = np.flatnonzero(records["hash"][1:] != records["hash"][:-1]) + 1
        pairs = [
            (part["place"][dropped], part["place"][kept])
            for part in np.split(records, starts)
            for dropped, kept in too_near(_vectors(part), self._config.threshold)
        ]
        return np.array(pairs, REPEATS)

    def unite(self, findings: np.ndarray) -> np.ndarray:
        return by_place(findings)


def too_near(vectors: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """Rows whose cosine to an earlier kept row exceeds the threshold, with the nearest such row."""
    kept: list[int] = []
    found: list[tuple[int, int]] = []
    for start in range(0, len(vectors), _ROWS):
        block = vectors[start : start + _ROWS]
        before = block @ vectors[kept].T if kept else np.zeros((len(block), 0), np.float32)
        inside = block @ block.T
        old, new = list(kept), []
        for row in range(len(block)):
            cosines = np.concatenate([before[row], inside[row, new]])
            best = int(cosines.argmax()) if len(cosines) else -1
            if best >= 0 and cosines[best] > threshold:
                found.append((start + row, [*old, *(start + one for one in new)][best]))
            else:
                new.append(row)
        kept += [start + row for row in new]
    return found


@final
class _FirstOfMeaning(Whole):
    def __init__(self, config: "SemanticDedup") -> None:
        encode = _encoder(config)
        self.rounds = (_Sample(config, encode), _Clusters(config, encode))

    def apply(self, document: Document, place: int, verdicts: np.ndarray) -> Decision:
        found = look_up(verdicts, place)
        if found is None:
            return document
        return Dropped("same meaning as another", f"as place {found['kept']}")


@final
@dataclasses.dataclass(frozen=True)
class SemanticDedup(CorpusStep):
    """Keep the first of documents whose embeddings have a cosine above `threshold`.

    `encoder` is a folder with a Hugging Face model (mean of its last states over `max_tokens`) or
    `module:function`, text -> vector. Centroids come from the share `sample` of the documents: take
    as many `clusters` as make a cluster fit in memory (2 bytes a dimension and document).
    """

    encoder: str = ""
    threshold: float = 0.95
    clusters: int = 100
    sample: float = 0.1
    max_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.encoder:
            raise ValueError("semantic_dedup: name an encoder, a model's folder or module:function")
        if self.clusters < 1 or not 0 < self.sample <= 1:
            raise ValueError("semantic_dedup: needs clusters >= 1 and sample in (0, 1]")

    def build(self) -> Whole:
        """Both rounds and the decision, with the encoder loaded."""
        return _FirstOfMeaning(self)
