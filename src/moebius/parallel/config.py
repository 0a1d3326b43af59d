"""The parallel degrees of a run: how its ranks divide the batch, the weights and the experts.

Within a replica the weights are cut over `dp_shard` ranks (FSDP2, arXiv 2304.11277), the experts
over `ep` of these (GShard, arXiv 2006.16668) and then over the others; all of them read other parts
of the global batch, or, in groups of `cp`, other tokens of the same sequences (Llama 3, 3.3.2).
Each of these is `tp` ranks that read the same tokens and share heads, hidden units and vocabulary
(Megatron-LM, arXiv 1909.08053). All of it stands `pp` times, each with other layers (GPipe, arXiv
1811.06965).
"""

from dataclasses import dataclass, field
from typing import Literal

from moebius.ops.ranks import Exchange

# Micro-batches in a row (PipeDream, arXiv 1806.03377); with several stages a rank, in a ring
# (Megatron-LM, arXiv 2104.04473), or there and back with the gradients of weights in the gaps
# (arXiv 2401.10241, 6).
Schedule = Literal["1f1b", "interleaved", "zbv"]


@dataclass(frozen=True)
class Pipe:
    """How many ranks a pipeline has, and which of its stages each holds."""

    ranks: int = 1
    schedule: Schedule = "1f1b"
    stages_per_rank: int = 1

    @property
    def num_stages(self) -> int:
        """How many stages the ranks hold together."""
        return self.ranks * self.stages_per_rank

    def rank_of(self, stage: int) -> int:
        """Which of the ranks holds a stage: in a ring, or (zbv) there and back."""
        turn, place = divmod(stage, self.ranks)
        return self.ranks - 1 - place if self.schedule == "zbv" and turn % 2 else place

    def held_by(self, rank: int) -> list[int]:
        """The stages of a rank."""
        return [stage for stage in range(self.num_stages) if self.rank_of(stage) == rank]


@dataclass(frozen=True)
class Degrees:
    """The degrees on so many ranks: replicas, shares of the batch in one, ranks that share experts,
    that are one reader, readers that share sequences, and ranks that hold other layers."""

    dp_replicate: int
    dp_shard: int
    ep: int
    tp: int = 1
    cp: int = 1
    pipe: Pipe = Pipe()

    @property
    def readers(self) -> int:
        """How many ranks of a replica have other tokens."""
        return self.dp_shard * self.cp


@dataclass(frozen=True)
class Parallel:
    """`dp_shard` none: what the other degrees leave of the ranks."""

    dp_replicate: int = 1
    dp_shard: int | None = None
    ep: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1
    # The order in which micro-batches pass through the stages of a pipeline.
    schedule: Schedule = "1f1b"
    # With schedule=interleaved; a rank has one stage with 1f1b, and two with zbv.
    stages_per_rank: int = 2
    # The collective by which tokens reach their experts: all_gather moves more and waits less often
    # where ranks are few.
    exchange: Exchange = "all_to_all"
    # Give gathered weights back after the forward, and gather them again in the backward; stages
    # of a pipeline keep them for all micro-batches of a step.
    reshard: bool = True
    # Seconds after which a run that ends no step is taken to hang; none: no rank is watched.
    # Like the next it changes no bit of a run, so that configs which differ in it are equal.
    patience: float | None = field(default=600.0, compare=False)
    # Compare the weights of replicas every so many steps; none: never.
    compare_every: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard", "ep", "tp", "cp", "pp"):
            if (degree := getattr(self, name)) is not None and degree < 1:
                raise ValueError(f"parallel.{name} must be at least 1, not {degree}")
        if self.patience is not None and self.patience <= 0:
            raise ValueError(f"parallel.patience must be above 0 (or none), not {self.patience}")
        if self.compare_every is not None and self.compare_every < 1:
            raise ValueError("parallel.compare_every must be at least 1 (or none)")
        if self.compare_every is not None and self.dp_replicate == 1:
            raise ValueError("parallel.compare_every compares replicas; set dp_replicate above 1")
        if self.stages_per_rank < 2:
            raise ValueError(
                "parallel.stages_per_rank must be at least 2; for one stage a rank, use "
                "parallel.schedule=1f1b"
            )

    @property
    def pipe(self) -> Pipe:
        """The stages of the pipeline; one rank alone has all layers whatever the schedule."""
        if self.pp == 1:
            return Pipe()
        each = {"1f1b": 1, "interleaved": self.stages_per_rank, "zbv": 2}
        return Pipe(self.pp, self.schedule, each[self.schedule])

    def on(self, ranks: int) -> Degrees:
        """The degrees on so many ranks; ValueError where they do not make them up."""
        shard, others = self.dp_shard, self.dp_replicate * self.tp * self.cp * self.pp
        if shard is None and not ranks % others:
            shard = ranks // others
        if shard is None or shard * others != ranks:
            degrees = {"dp_replicate": self.dp_replicate, "dp_shard": shard or "any"}
            further = (("cp", self.cp), ("tp", self.tp), ("pp", self.pp))
            degrees |= {name: n for name, n in further if n > 1}
            raise ValueError(
                f"parallel.{' x '.join(degrees)} is {' x '.join(map(str, degrees.values()))}, but "
                f"there are {ranks} processes; start that many (torchrun --nproc-per-node N -m "
                "moebius ...) or change the degrees"
            )
        if shard * self.cp % self.ep:
            raise ValueError(
                f"parallel.ep={self.ep} must divide dp_shard x cp, the {shard * self.cp} readers "
                "of one replica"
            )
        return Degrees(self.dp_replicate, shard, self.ep, self.tp, self.cp, self.pipe)
