"""Which source each sequence comes from, exact at any length.

Tijdeman's chairman assignment (Discrete Mathematics 32, 1980): of the sources whose turn may have
come, the one with the earliest deadline. After n sequences no source is a whole sequence away from
its share. With integer weights of sum W the order repeats after W sequences, so any place in it is
found at once. A source that is spent leaves, and a new phase starts with the shares of the rest;
one of weight 0 is never there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

BLOCK = 1024


class Pattern:
    """The endless order for integer weights, worked out as far as it was asked for. Final."""

    def __init__(self, weights: Sequence[int]) -> None:
        divisor = math.gcd(*weights)
        self.weights = tuple(weight // divisor for weight in weights)
        self.period = sum(self.weights)
        common = math.lcm(*self.weights)
        k = len(self.weights)
        # Deadlines and thresholds, scaled to integers: ties break the same way everywhere.
        self._step = [(2 * k - 2) * (common // weight) for weight in self.weights]
        self._deadline = [(2 * k - 3) * (common // weight) for weight in self.weights]
        self._counts = [0] * k
        self._order = np.zeros(0, np.int16)
        self._blocks = np.zeros((1, k), np.int64)

    def _extend(self, length: int) -> None:
        """Work the order out to `length` places, rounded up to whole blocks."""
        k, period, counts = len(self.weights), self.period, self._counts
        new, blocks = [], [self._blocks]
        while len(self._order) + len(new) < length:
            for _ in range(BLOCK):
                n = len(self._order) + len(new) + 1
                chosen = 0
                if k > 1:
                    ready = [
                        i
                        for i, weight in enumerate(self.weights)
                        if (2 * k - 2) * (weight * n - counts[i] * period) >= period
                    ]
                    chosen = min(ready, key=self._deadline.__getitem__)
                counts[chosen] += 1
                self._deadline[chosen] += self._step[chosen]
                new.append(chosen)
            blocks.append(np.array([counts], np.int64))
        self._order = np.concatenate([self._order, np.array(new, np.int16)])
        self._blocks = np.concatenate(blocks)

    def source(self, n: int) -> int:
        """The source of place n."""
        n %= self.period
        if n >= len(self._order):
            self._extend(n + 1)
        return int(self._order[n])

    def counts(self, n: int) -> np.ndarray:
        """How often each source occurs in the first n places."""
        rounds, rest = divmod(n, self.period)
        if rest > len(self._order):
            self._extend(rest)
        block = rest // BLOCK
        tail = np.bincount(self._order[block * BLOCK : rest], minlength=len(self.weights))
        return rounds * np.array(self.weights, np.int64) + self._blocks[block] + tail

    def place(self, source: int, occurrence: int) -> int:
        """The place of a source's occurrence number `occurrence` (from 0)."""
        weight = self.weights[source]
        rounds, rest = divmod(occurrence, weight)
        # Never a whole sequence away from its share, which bounds where to look.
        low = max(0, rest * self.period // weight - 1)
        high = min(self.period - 1, (rest + 2) * self.period // weight)
        while low < high:
            middle = (low + high) // 2
            if self.counts(middle + 1)[source] > rest:
                high = middle
            else:
                low = middle + 1
        return rounds * self.period + low


@dataclass(frozen=True)
class Phase:
    """A stretch of the run with the same sources: its start and what each had given before."""

    start: int
    active: tuple[int, ...]
    pattern: Pattern
    before: tuple[int, ...]


class Mixture:
    """The source of every sequence. A capacity is how many a source can give, or None. Final."""

    def __init__(self, weights: Sequence[float], capacities: Sequence[int | None]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * scale) for weight in exact]
        self._capacities = list(capacities)
        self._phases: list[Phase] = []
        self.total: int | None = None
        self._plan()

    def _plan(self) -> None:
        """Lay out the phases; `total` is the length of the whole, or None where it is endless."""
        start, before = 0, [0] * len(self._weights)
        while True:
            active = [
                i
                for i, cap in enumerate(self._capacities)
                if self._weights[i] and (cap is None or before[i] < cap)
            ]
            if not active:
                self.total = start
                return
            pattern = Pattern([self._weights[i] for i in active])
            self._phases.append(Phase(start, tuple(active), pattern, tuple(before)))
            lasts = [
                pattern.place(j, cap - before[i] - 1) + 1
                for j, i in enumerate(active)
                if (cap := self._capacities[i]) is not None
            ]
            if not lasts:
                return
            given = pattern.counts(min(lasts))
            for j, i in enumerate(active):
                before[i] += int(given[j])
            start += min(lasts)

    def _phase(self, n: int) -> Phase:
        if n < 0 or (self.total is not None and n >= self.total):
            raise ValueError(
                f"the sources give {self.total} sequences and number {n} was asked for; raise "
                "max_epochs or train for fewer steps"
            )
        return next(phase for phase in reversed(self._phases) if phase.start <= n)

    def draw(self, n: int) -> tuple[int, int]:
        """The source of sequence n, and which of that source's own sequences it is."""
        phase = self._phase(n)
        inside = n - phase.start
        j = phase.pattern.source(inside)
        source = phase.active[j]
        return source, phase.before[source] + int(phase.pattern.counts(inside)[j])

    def counts(self, n: int) -> list[int]:
        """How many of the first n sequences come from each source."""
        if n == 0:
            return [0] * len(self._weights)
        phase = self._phase(n - 1)
        counts = list(phase.before)
        for i, given in zip(phase.active, phase.pattern.counts(n - phase.start), strict=True):
            counts[i] += int(given)
        return counts
