"""Documents laid end to end, epoch after epoch, and cut into windows, which are shuffled as well.

Each epoch is a permutation of its own. Window k of length T covers stream positions k*T to k*T+T,
one token more than it trains on: inputs and targets overlap by one. After the last token of a
document the next `<|document|>` is the target, so it marks the end as well, and a document of n
tokens gives n+1 predictions. Windows are drawn in a shuffled order, or a batch would be a piece of
one long document. Letters: T sequence, D documents.
"""

from dataclasses import dataclass

import numpy as np

from moebius.data.shards import Shards

_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Keeps the seeds of window orders apart from those of document orders.
_WINDOWS = 1 << 40


@dataclass(frozen=True)
class Window:
    """T+1 tokens; `documents` counts the documents within the window, `positions` within each."""

    tokens: np.ndarray
    documents: np.ndarray
    positions: np.ndarray
    touched: tuple[int, ...]


def permutation(length: int, *seeds: int) -> np.ndarray:
    """A permutation by sorting hashes (splitmix64), the same with any version of any library."""
    with np.errstate(over="ignore"):
        state = np.uint64(0)
        for seed in seeds:
            state = _mix(state + _GOLDEN + np.array(seed % (1 << 64), np.uint64))
        hashes = _mix(state + _GOLDEN * (np.arange(length, dtype=np.uint64) + np.uint64(1)))
    return np.argsort(hashes, kind="stable")


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    x = np.asarray(x)
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return x ^ (x >> np.uint64(31))


def number(tokens: np.ndarray, document: int) -> tuple[np.ndarray, np.ndarray]:
    """Document numbers from 0 and positions within each, both counted from the window's start."""
    opens = tokens == document
    opens[:1] = True
    documents = np.cumsum(opens) - 1
    starts = np.flatnonzero(opens)
    return documents, np.arange(len(tokens)) - starts[documents]


class TokenSource:
    """The endless shuffled stream of one source's documents, in windows by number. Final."""

    def __init__(self, shards: Shards, document: int, *seeds: int) -> None:
        self.shards = shards
        self.document = document
        self._seeds = seeds
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._order: tuple[tuple[int, int], np.ndarray] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens in one epoch, `<|document|>` tokens counted."""
        return self.shards.num_tokens

    def reseed(self, *seeds: int) -> "TokenSource":
        """The same documents in another order."""
        return TokenSource(self.shards, self.document, *seeds)

    def num_windows(self, length: int, epochs: float) -> int:
        """How many windows so many epochs give, no token of them seen more often."""
        if self.num_tokens < length:
            return int(self.num_tokens * epochs) // length
        return int(self.num_tokens // length * epochs)

    def draw(self, n: int, length: int) -> Window:
        """The n-th window in shuffled order: each epoch's worth of windows is a permutation."""
        size = max(1, self.num_tokens // length)
        group, place = divmod(n, size)
        if self._order is None or self._order[0] != (group, length):
            self._order = (group, length), permutation(size, *self._seeds, group, _WINDOWS)
        return self.window(group * size + int(self._order[1][place]), length)

    def epoch(self, e: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the documents in an epoch, and where each of them ends."""
        if e not in self._epochs:
            order = permutation(self.shards.num_documents, *self._seeds, e)
            ends = np.cumsum(self.shards.lengths_D[order])
            for old in sorted(self._epochs, key=lambda known: abs(known - e))[2:]:
                self._epochs.pop(old, None)
            self._epochs[e] = order, ends
            return order, ends
        return self._epochs[e]

    def window(self, k: int, length: int) -> Window:
        """Window k of `length` inputs, with the token after them."""
        epoch, offset = divmod(k * length, self.num_tokens)
        pieces: list[np.ndarray] = []
        touched: list[int] = []
        missing = length + 1
        while missing:
            order, ends = self.epoch(epoch)
            first = int(np.searchsorted(ends, offset, "right"))
            for place in range(first, len(order)):
                document = int(order[place])
                start = offset - (int(ends[place - 1]) if place else 0)
                piece = self.shards.tokens(document, start, start + missing)
                pieces.append(piece)
                touched.append(document)
                missing -= len(piece)
                offset += len(piece)
                if not missing:
                    break
            else:
                epoch, offset = epoch + 1, 0
        tokens = np.concatenate(pieces).astype(np.int64)
        documents, positions = number(tokens, self.document)
        return Window(tokens, documents, positions, tuple(touched))
