"""The parallel degrees of a run: how its ranks divide the batch, the weights and the experts.

Within a replica the weights are cut over `dp_shard` ranks (FSDP2, arXiv 2304.11277), the experts
over `ep` of these (GShard, arXiv 2006.16668) and then over the others; all of them read other parts
of the global batch, or, in groups of `cp`, other tokens of the same sequences (Llama 3, 3.3.2).
Each of these is `tp` ranks that read the same tokens and share heads, hidden units and vocabulary
(Megatron-LM, arXiv 1909.08053).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Degrees:
    """The degrees on so many ranks: replicas, shares of the batch in one, ranks that share experts,
    that are one reader, and readers that share sequences."""

    dp_replicate: int
    dp_shard: int
    ep: int
    tp: int = 1
    cp: int = 1

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
    # Give gathered weights back after the forward, and gather them again in the backward.
    reshard: bool = True

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard", "ep", "tp", "cp"):
            if (degree := getattr(self, name)) is not None and degree < 1:
                raise ValueError(f"parallel.{name} must be at least 1, not {degree}")

    def on(self, ranks: int) -> Degrees:
        """The degrees on so many ranks; ValueError where they do not make them up."""
        shard, others = self.dp_shard, self.dp_replicate * self.tp * self.cp
        if shard is None and not ranks % others:
            shard = ranks // others
        if shard is None or shard * others != ranks:
            asked = (self.dp_replicate, shard or "any", self.cp, self.tp)
            asked = " x ".join(str(degree) for degree in asked)
            raise ValueError(
                f"parallel.dp_replicate x dp_shard x cp x tp is {asked}, but there are {ranks} "
                "processes; start that many (torchrun --nproc-per-node N -m moebius ...) or "
                "change the degrees"
            )
        if shard * self.cp % self.ep:
            raise ValueError(
                f"parallel.ep={self.ep} must divide dp_shard x cp, the {shard * self.cp} readers "
                "of one replica"
            )
        return Degrees(self.dp_replicate, shard, self.ep, self.tp, self.cp)
