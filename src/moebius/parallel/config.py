"""The parallel degrees of a run: how its ranks divide the batch, the weights and the experts.

All ranks read other parts of the global batch. Within a replica the weights are cut over `dp_shard`
ranks (FSDP2, arXiv 2304.11277), the experts over `ep` of these (GShard, arXiv 2006.16668) and then
over the others.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Degrees:
    """The degrees on so many ranks: replicas, ranks of one, and those that share its experts."""

    dp_replicate: int
    dp_shard: int
    ep: int


@dataclass(frozen=True)
class Parallel:
    """`dp_shard` none: what the other degrees leave of the ranks."""

    dp_replicate: int = 1
    dp_shard: int | None = None
    ep: int = 1
    # Give gathered weights back after the forward, and gather them again in the backward.
    reshard: bool = True

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard", "ep"):
            if (degree := getattr(self, name)) is not None and degree < 1:
                raise ValueError(f"parallel.{name} must be at least 1, not {degree}")

    def on(self, ranks: int) -> Degrees:
        """The degrees on so many ranks; ValueError where they do not make them up."""
        shard, rest = self.dp_shard, ranks % self.dp_replicate
        if shard is None and not rest:
            shard = ranks // self.dp_replicate
        if shard is None or shard * self.dp_replicate != ranks:
            asked = " x ".join(str(d) for d in (self.dp_replicate, shard or "any"))
            raise ValueError(
                f"parallel.dp_replicate x dp_shard is {asked}, but there are {ranks} processes; "
                f"start that many (torchrun --nproc-per-node N -m moebius ...) or change the "
                "degrees"
            )
        if shard % self.ep:
            raise ValueError(
                f"parallel.ep={self.ep} must divide dp_shard, the {shard} ranks of one replica"
            )
        return Degrees(self.dp_replicate, shard, self.ep)
