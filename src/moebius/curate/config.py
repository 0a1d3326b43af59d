"""A curation as data: the sources, the list of steps, and how their documents are mixed.

What identifies it (everything but the run-time fields) is fingerprinted: an unfinished curation
goes on only under the recipe and over the files it began with.
"""

import dataclasses
from typing import Literal

from moebius.config import runtime
from moebius.curate.mix import Mix
from moebius.curate.read import Reader
from moebius.curate.step import Step

EngineName = Literal["local", "pool", "ray"]


@dataclasses.dataclass(frozen=True)
class Curation:
    """Raw sources -> steps, in this order -> clean documents, grouped by the mix if there is one.

    `task_bytes` of input make a shard, the unit of work and of resuming; shards decide no verdict.
    """

    name: str
    sources: tuple[Reader, ...]
    steps: tuple[Step, ...]
    mix: Mix | None = None
    task_bytes: int = 32 << 20
    # How it is run; none of these changes a byte of the output.
    engine: EngineName = runtime("pool")
    # Worker processes; 0 takes one per core.
    workers: int = runtime(0)
    # Where a Ray cluster listens; empty starts one here.
    address: str = runtime("")

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"name {self.name!r} must be letters, digits, - and _")
        if not self.sources:
            raise ValueError(f"curation {self.name} has no source")
        names = [source.name for source in self.sources]
        for name in names:
            if not name or "/" in name or names.count(name) > 1:
                raise ValueError(f"each source needs a name of its own, without /; not {names}")
        if self.task_bytes < 1 << 16 or self.workers < 0:
            raise ValueError("task_bytes must be at least 65536, and workers not negative")
        known = set(names)
        for step in self.steps:
            if unknown := set(step.sources) - known:
                raise ValueError(
                    f"{type(step).__name__} names sources {sorted(unknown)}; there are {names}"
                )
