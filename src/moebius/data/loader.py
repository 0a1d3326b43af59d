"""Batches as a pure function of (data configuration, seed, step).

The global batch of a step is the same however many workers, ranks or micro-batches share it:
`split` and `shard` only cut it, and every part knows the number of targets of the whole, which is
what a summed loss is divided by. A run whose sequences change their length has a loader for each
stage, which draws the corpus anew in an order of its own: the stage's number is one more seed.
Letters: B sequences, T positions.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from moebius.data.mixture import Mixture
from moebius.data.packing import number
from moebius.data.prepared import Prepared
from moebius.data.shards import Shards


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed sequences; `num_targets` counts the valid targets of the whole global batch."""

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    document_BT: torch.Tensor
    position_BT: torch.Tensor
    valid_BT: torch.Tensor
    sequence_B: torch.Tensor
    num_targets: int
    touched: tuple[tuple[tuple[Shards, int], ...], ...]

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def keys(self) -> list[str]:
        """The keys of the documents that the sequences touch, each once, in order."""
        keys = (shards.key(document) for row in self.touched for shards, document in row)
        return list(dict.fromkeys(keys))

    def rows(self, start: int, stop: int) -> "Batch":
        """Sequences start to stop, as a part of the same global batch."""
        return Batch(
            self.tokens_BT[start:stop],
            self.targets_BT[start:stop],
            self.document_BT[start:stop],
            self.position_BT[start:stop],
            self.valid_BT[start:stop],
            self.sequence_B[start:stop],
            self.num_targets,
            self.touched[start:stop],
        )

    def split(self, micro: int) -> list["Batch"]:
        """Micro-batches of at most `micro` sequences."""
        if micro < 1:
            raise ValueError(f"a micro-batch needs at least one sequence, not {micro}")
        return [self.rows(i, i + micro) for i in range(0, len(self), micro)]

    def shard(self, rank: int, world: int) -> "Batch":
        """The sequences of one rank of `world`, in a row."""
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in 0..{world - 1}, not {rank}")
        if len(self) < world:
            raise ValueError(f"{len(self)} sequences cannot be shared by {world} ranks")
        return self.rows(len(self) * rank // world, len(self) * (rank + 1) // world)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return replace(
            self,
            tokens_BT=self.tokens_BT.to(device, non_blocking=True),
            targets_BT=self.targets_BT.to(device, non_blocking=True),
            document_BT=self.document_BT.to(device, non_blocking=True),
            position_BT=self.position_BT.to(device, non_blocking=True),
            valid_BT=self.valid_BT.to(device, non_blocking=True),
            sequence_B=self.sequence_B.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class _Row:
    """One sequence of a batch: T+1 tokens, the documents in it, and how many targets count."""

    tokens: np.ndarray
    documents: np.ndarray
    positions: np.ndarray
    touched: tuple[tuple[Shards, int], ...]
    num_targets: int


def _batch(rows: list[_Row], first: int) -> Batch:
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    documents = torch.from_numpy(np.stack([row.documents for row in rows]))
    positions = torch.from_numpy(np.stack([row.positions for row in rows]))
    counts_B = torch.tensor([row.num_targets for row in rows])
    return Batch(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        documents[:, :-1].contiguous(),
        positions[:, :-1].contiguous(),
        torch.arange(tokens.shape[1] - 1) < counts_B[:, None],
        torch.arange(first, first + len(rows)),
        int(counts_B.sum()),
        tuple(row.touched for row in rows),
    )


class Sizes:
    """How many sequences the steps have. `ramp` lists (from_step, sequences) changes. Final."""

    def __init__(self, batch: int, ramp: tuple[tuple[int, int], ...] = (), first: int = 0) -> None:
        starts = [start for start, _ in ramp]
        if batch < 1 or any(size < 1 for _, size in ramp):
            raise ValueError("batch sizes must be at least 1")
        if starts != sorted(set(starts)) or any(start <= first for start in starts):
            raise ValueError(f"the steps of a batch ramp must rise from {first + 1} on: {starts}")
        self._steps = [first, *starts]
        self._sizes = [batch, *(size for _, size in ramp)]
        self._before = [0]
        for i in range(1, len(self._steps)):
            stretch = (self._steps[i] - self._steps[i - 1]) * self._sizes[i - 1]
            self._before.append(self._before[-1] + stretch)

    def until(self, step: int) -> int:
        """How many sequences the steps from the first one to `step` (not included) have."""
        i = bisect.bisect_right(self._steps, step) - 1
        return self._before[i] + (step - self._steps[i]) * self._sizes[i]


@dataclass(frozen=True)
class Start:
    """Where a loader of a later stage begins in its run: what the stages before it did."""

    stage: int
    step: int
    sequences: int
    # Targets that each source gave.
    taken: tuple[int, ...]
    # The order in force, by the stage that began it; its windows' length, and how many were drawn.
    order: int = 0
    length: int = 0
    drawn: tuple[int, ...] = ()


class Loader:
    """The global batch of any step. `ramp` lists (from_step, sequences) changes of `batch`. Final.

    With `steps`, a run longer than what capped sources give is refused at once (ValueError). A
    later stage's loader has a `start`; what the stages before took counts towards `max_epochs`.
    `weights` are the shares of the sources, 0 for none, instead of those of the configuration.
    """

    def __init__(
        self,
        prepared: Prepared,
        sequence_length: int,
        batch: int,
        seed: int,
        ramp: tuple[tuple[int, int], ...] = (),
        steps: int | None = None,
        start: Start | None = None,
        weights: tuple[float, ...] = (),
    ) -> None:
        if sequence_length < 1:
            raise ValueError("the sequence length must be at least 1")
        self.sequence_length = sequence_length
        self._start = start or Start(0, 0, 0, (0,) * len(prepared.train))
        self._sizes = Sizes(batch, ramp, self._start.step)
        goes_on = bool(weights) and self._start.length == sequence_length
        self._order = self._start.order if goes_on else self._start.stage
        self._drawn = self._start.drawn if goes_on else (0,) * len(prepared.train)
        # One order a stage; without stages it is the order that runs have always had.
        own_order = (self._order,) if self._order else ()
        self._sources = [
            source.reseed(prepared.config.seed, seed, i, *own_order)
            for i, source in enumerate(prepared.train)
        ]
        mixture = prepared.config.mixture()
        shares = weights or tuple(source.weight for source in mixture)
        for entry, own, share in zip(mixture, self._sources, shares, strict=True):
            capped = share and entry.max_epochs
            if capped and not own.num_windows(sequence_length, capped):
                raise ValueError(
                    f"{entry.path!r} gives no whole sequence of {sequence_length} tokens within "
                    f"max_epochs={entry.max_epochs}; raise max_epochs or leave the source out"
                )
        self.mixture = Mixture(
            shares,
            [
                None
                if entry.max_epochs is None
                else max(0, own.num_windows(sequence_length, entry.max_epochs) - given)
                for entry, own, given in zip(mixture, self._sources, self._given(), strict=True)
            ],
        )
        if steps is not None:
            self.check(steps)

    def _given(self) -> list[int]:
        """The windows of this length that each source gave in the stages before, rounded up."""
        return [-(-taken // self.sequence_length) for taken in self._start.taken]

    def check(self, steps: int) -> None:
        """Raise ValueError where a run of so many steps needs more than the capped sources give."""
        needed, total = self._sizes.until(steps), self.mixture.total
        if total is not None and needed > total:
            stage = f" from step {self._start.step} on" if self._start.stage else ""
            raise ValueError(
                f"{steps} steps need {needed} sequences{stage} and the sources give {total} within "
                "their max_epochs; raise max_epochs or train for fewer steps"
            )

    def sequences_until(self, step: int) -> int:
        """How many sequences of the run come before a step."""
        return self._start.sequences + self._sizes.until(step)

    def tokens_until(self, step: int) -> int:
        """How many targets of the run come before a step."""
        return sum(self._start.taken) + self._sizes.until(step) * self.sequence_length

    def after(self, step: int) -> Start:
        """Where the loader of the next stage begins, if it does so at a step of this one."""
        counts = self.mixture.counts(self._sizes.until(step))
        taken = zip(self._start.taken, counts, strict=True)
        return Start(
            self._start.stage + 1,
            step,
            self.sequences_until(step),
            tuple(before + count * self.sequence_length for before, count in taken),
            self._order,
            self.sequence_length,
            tuple(before + count for before, count in zip(self._drawn, counts, strict=True)),
        )

    def batch(self, step: int) -> Batch:
        """The global batch of a step (from 0)."""
        first, end = self.sequences_until(step), self.sequences_until(step + 1)
        return _batch([self._row(n) for n in range(first, end)], first)

    def _row(self, n: int) -> _Row:
        i, k = self.mixture.draw(n - self._start.sequences)
        source = self._sources[i]
        window = source.draw(self._drawn[i] + k, self.sequence_length)
        touched = tuple((source.shards, document) for document in window.touched)
        return _Row(
            window.tokens, window.documents, window.positions, touched, self.sequence_length
        )


def heldout_batches(prepared: Prepared, sequence_length: int, batch: int) -> Iterator[Batch]:
    """Every held-out token once as a target, documents in order, a `<|document|>` after the last.

    The first token has nothing before it, so there are as many targets as stored tokens: those of
    each text and one end of document each. What fills the last sequence up is not valid.
    """
    rows: list[_Row] = []
    first = 0
    for row in _heldout_rows(prepared, sequence_length):
        rows.append(row)
        if len(rows) == batch:
            yield _batch(rows, first)
            first += batch
            rows = []
    if rows:
        yield _batch(rows, first)


def _heldout_rows(prepared: Prepared, length: int) -> Iterator[_Row]:
    document = prepared.tokenizer.document
    tokens = np.zeros(0, np.int64)
    touched: list[tuple[Shards, int]] = []
    for shards, i in _heldout_order(prepared):
        tokens = np.concatenate([tokens, shards.tokens(i).astype(np.int64)])
        touched.append((shards, i))
        start = 0
        for start in range(length, len(tokens), length):
            window = tokens[start - length : start + 1]
            yield _Row(window, *number(window, document), tuple(touched), length)
            touched = [(shards, i)]
        tokens = tokens[start:]
    tokens = np.append(tokens, document)
    count = len(tokens) - 1
    # Filled up with empty documents, which nothing attends to and no target counts.
    window = np.concatenate([tokens, np.full(length - count, document)])
    yield _Row(window, *number(window, document), tuple(touched), count)


def _heldout_order(prepared: Prepared) -> Iterator[tuple[Shards, int]]:
    return ((source.shards, i) for source in prepared.heldout for i in source.shards)
