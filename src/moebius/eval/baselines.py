"""Compression baselines, in bits per byte of the original documents.

`xz -9e` of each document alone and of all together, and an interpolated Witten-Bell byte n-gram
(Witten and Bell 1991; Chen and Goodman 1998, equation 14), in numpy. A document is its bytes and
one end symbol, whose bits are counted; before its first byte stand padding symbols, so that no
context crosses documents. An n-gram is one integer of 9 bits a symbol, the oldest symbol highest.
"""

import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

END = 256
PAD = 257
NUM_SYMBOLS = 257
BITS = 9
BATCH_BYTES = 1 << 24

Keys = NDArray[np.uint64]
Counts = NDArray[np.int64]


# --- xz -------------------------------------------------------------------------------------------


def xz_each(documents: Iterable[bytes]) -> float:
    """Bits per byte of `xz -9e` of each document alone, the container of each counted."""
    original = compressed = 0
    for document in documents:
        original += len(document)
        packer = _xz()
        compressed += len(packer.compress(document)) + len(packer.flush())
    return 8 * compressed / _some(original)


def xz_all(documents: Iterable[bytes]) -> float:
    """Bits per byte of `xz -9e` of all documents as one stream, in the order given."""
    original = compressed = 0
    packer = _xz()
    for document in documents:
        original += len(document)
        compressed += len(packer.compress(document))
    return 8 * (compressed + len(packer.flush())) / _some(original)


def _xz() -> lzma.LZMACompressor:
    preset = 9 | lzma.PRESET_EXTREME
    return lzma.LZMACompressor(lzma.FORMAT_XZ, lzma.CHECK_CRC64, preset)


def _some(num_bytes: int) -> int:
    if num_bytes == 0:
        raise ValueError("there are no held-out bytes to measure; hold out at least one document")
    return num_bytes


# --- byte n-gram ----------------------------------------------------------------------------------


def ngram(train: Iterable[bytes], heldout: Iterable[bytes], order: int = 5) -> float:
    """Bits per byte of the held-out documents under a Witten-Bell n-gram of the training ones."""
    model = Ngram.fit(train, order)
    seen, counts, num_bytes = count(heldout, order)
    bits = -np.log2(model.probabilities(seen)) @ counts
    return float(bits) / _some(num_bytes)


@final
@dataclass(frozen=True)
class _Level:
    """Counts of one context length, sorted: n-grams c(h, w), and contexts c(h) and T(h)."""

    grams: Keys
    gram_counts: Counts
    contexts: Keys
    context_counts: Counts
    successors: Counts


@final
@dataclass(frozen=True)
class Ngram:
    """An interpolated Witten-Bell model; `levels[k]` holds the contexts of k symbols."""

    levels: tuple[_Level, ...]

    @classmethod
    def fit(cls, documents: Iterable[bytes], order: int) -> "Ngram":
        """Count the n-grams of up to `order` symbols (1 to 7) of the documents."""
        grams, counts, _ = count(documents, order)
        levels = []
        for length in range(order):
            shorter, totals = _merge(grams & _mask(length + 1), counts)
            levels.append(_level(shorter, totals))
        return cls(tuple(levels))

    def probabilities(self, grams: Keys) -> NDArray[np.float64]:
        """P(w | h) of n-grams of this model's order, each the integer of its symbols h, w.

        P(w|h) = (c(h, w) + T(h) P(w|h')) / (c(h) + T(h)), h' being h without its oldest symbol;
        a context never seen leaves P(w|h'). Below no context at all lies 1 / 257.
        """
        p = np.full(len(grams), 1 / NUM_SYMBOLS)
        for length, level in enumerate(self.levels):
            gram = grams & _mask(length + 1)
            place, known = _find(level.contexts, gram >> np.uint64(BITS))
            context_counts = np.where(known, level.context_counts[place], 0)
            successors = np.where(known, level.successors[place], 1)
            place, known = _find(level.grams, gram)
            gram_counts = np.where(known, level.gram_counts[place], 0)
            p = (gram_counts + successors * p) / (context_counts + successors)
        return p


def count(documents: Iterable[bytes], order: int) -> tuple[Keys, Counts, int]:
    """The distinct n-grams of the documents, sorted, their counts, and the number of bytes."""
    if not 1 <= order <= 7:
        raise ValueError(f"an n-gram's order must be 1 to 7, not {order}")
    grams, counts, num_bytes = np.empty(0, np.uint64), np.empty(0, np.int64), 0
    for symbols, batch_bytes in _batches(documents, order - 1):
        new = _grams(symbols, order)
        new_grams, new_counts = _merge(new, None)
        both = np.concatenate([grams, new_grams]), np.concatenate([counts, new_counts])
        grams, counts = _merge(*both)
        num_bytes += batch_bytes
    return grams, counts, num_bytes


def _batches(documents: Iterable[bytes], num_pads: int) -> Iterator[tuple[NDArray[np.uint16], int]]:
    """The symbols of about `BATCH_BYTES` of documents at a time, which bounds the memory."""
    pads = np.full(num_pads, PAD, np.uint16)
    end = np.array([END], np.uint16)
    parts: list[NDArray[np.uint16]] = []
    size = 0
    for document in documents:
        parts += [pads, np.frombuffer(document, np.uint8).astype(np.uint16), end]
        size += len(document)
        if size >= BATCH_BYTES:
            yield np.concatenate(parts), size
            parts, size = [], 0
    if parts:
        yield np.concatenate(parts), size


def _grams(symbols: NDArray[np.uint16], order: int) -> Keys:
    """The n-gram that ends at each symbol that is no padding."""
    size = len(symbols) - order + 1
    keys = np.zeros(size, np.uint64)
    for i in range(order):
        keys <<= np.uint64(BITS)
        keys |= symbols[i : i + size]
    return keys[symbols[order - 1 :] != PAD]


def _merge(keys: Keys, counts: Counts | None) -> tuple[Keys, Counts]:
    """Sorted distinct keys with the sums of their counts (each one if None)."""
    if len(keys) == 0:
        return keys, np.empty(0, np.int64)
    if counts is None:
        keys = np.sort(keys)
        starts = _starts(keys)
        return keys[starts], np.diff(starts, append=len(keys))
    permutation = np.argsort(keys)
    keys = keys[permutation]
    starts = _starts(keys)
    return keys[starts], np.add.reduceat(counts[permutation], starts)


def _level(grams: Keys, counts: Counts) -> _Level:
    contexts = grams >> np.uint64(BITS)
    starts = _starts(contexts)
    totals = np.add.reduceat(counts, starts) if len(starts) else counts
    return _Level(grams, counts, contexts[starts], totals, np.diff(starts, append=len(grams)))


def _starts(ordered: Keys) -> NDArray[np.int64]:
    """Where each run of equal keys begins."""
    new = np.ones(len(ordered), np.bool_)
    new[1:] = ordered[1:] != ordered[:-1]
    return np.flatnonzero(new)


def _find(ordered: Keys, wanted: Keys) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For each wanted key a valid index into `ordered`, and whether it is there."""
    if len(ordered) == 0:
        raise ValueError("there are no training documents to count; give at least one")
    place = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return place, ordered[place] == wanted


def _mask(num_symbols: int) -> np.uint64:
    return np.uint64((1 << (BITS * num_symbols)) - 1)
