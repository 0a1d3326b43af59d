"""Decontamination: documents that have benchmark items in them are dropped.

One shared 13-gram is enough for web and code (LongCat-Flash); Llama 3 (section 5.1.4) judges by the
share of an item's 8-grams; exact asks for whole items. Parts of items shorter than the n-gram must
be there whole; those under `shortest` words cannot be told from chance, and `checkable` lists them.
"""

import dataclasses
from collections.abc import Callable
from typing import final

from moebius.curate.benchmarks import Benchmark, items
from moebius.curate.contamination import (
    AnyGram,
    Index,
    Reading,
    ShareOfGrams,
    WholePart,
    first_hit,
    num_words,
    readings,
)
from moebius.curate.document import Document, Dropped
from moebius.curate.step import Decide, Decision, Filter

_SHOWN = 200


@final
@dataclasses.dataclass(frozen=True)
class Decontaminate(Filter):
    """Drop documents that share with a benchmark what its rule forbids.

    `any` takes runs of `length` words, `ratio` runs of `shortest` words, which is also the length
    of the shortest part that is checked at all.
    """

    benchmarks: tuple[Benchmark, ...] = ()
    length: int = 13
    shortest: int = 8

    def __post_init__(self) -> None:
        if not self.benchmarks:
            raise ValueError("decontaminate: name the files of at least one benchmark")
        if not 1 <= self.shortest <= self.length:
            raise ValueError("decontaminate: shortest must lie between 1 and length")

    def build(self) -> Decide:
        """The decision, with all benchmarks read."""
        names: list[str] = []
        by_gram: list[Reading] = []
        whole: list[Reading] = []
        shares: list[Reading] = []
        ratios: list[float] = []
        for benchmark in self.benchmarks:
            for item in items(benchmark):
                owner = len(names)
                names.append(item.name)
                for one in (one for part in item.parts for one in readings(owner, part)):
                    if len(one.words) < self.shortest:
                        continue
                    if benchmark.rule == "ratio":
                        shares.append(one)
                        ratios.append(benchmark.ratio)
                    elif benchmark.rule == "any" and len(one.words) >= self.length:
                        by_gram.append(one)
                    else:
                        whole.append(one)
        indices: list[Index] = []
        if by_gram:
            indices.append(AnyGram(self.length, by_gram))
        if whole:
            indices.append(WholePart(self.shortest, whole))
        if shares:
            indices.append(ShareOfGrams(self.shortest, shares, ratios))
        return _decision(names, indices)


def _decision(names: list[str], indices: list[Index]) -> Callable[[Document], Decision]:
    def decide(document: Document) -> Decision:
        hit = first_hit(indices, document.text)
        if hit is None:
            return document
        words = hit.words()
        shown = words if len(words) <= _SHOWN else words[:_SHOWN] + " ..."
        return Dropped("benchmark item", f"{names[hit.owner]}: {shown}")

    return decide


@dataclasses.dataclass(frozen=True)
class Checkable:
    """What a benchmark's items can be checked by; an item counts by its longest part."""

    benchmark: str
    by_grams: int
    only_whole: int
    uncheckable: tuple[str, ...]


def checkable(step: Decontaminate) -> list[Checkable]:
    """For each benchmark how many items can be found, and the names and texts of the others."""
    report: list[Checkable] = []
    for benchmark in step.benchmarks:
        by_grams = only_whole = 0
        not_at_all: list[str] = []
        for item in items(benchmark):
            longest = max(map(num_words, item.parts), default=0)
            grams = {"any": step.length, "ratio": step.shortest}.get(benchmark.rule)
            if grams is not None and longest >= grams:
                by_grams += 1
            elif longest >= step.shortest:
                only_whole += 1
            else:
                texts = " ".join(max(item.parts, key=len, default="").split())
                not_at_all.append(f"{item.name}: {texts[:_SHOWN]}")
        report.append(Checkable(benchmark.title, by_grams, only_whole, tuple(not_at_all)))
    return report
