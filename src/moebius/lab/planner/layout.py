"""Legal layouts: the degrees of parallelism that divide the cluster, the batch and the model.

World = pp x dp_replicate x dp_shard x cp x tp, the last innermost; experts lie over the ranks of
dp_shard x cp. A tensor-parallel group stays inside a node.
"""

import dataclasses
import math
from collections.abc import Iterator

from moebius.lab.planner.hardware import Cluster
from moebius.lab.planner.shape import Shape


@dataclasses.dataclass(frozen=True)
class Layout:
    """The degrees of a layout."""

    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1

    @property
    def data(self) -> int:
        """Ranks that see different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def sharded(self) -> int:
        """Ranks that share one copy of the weights' masters."""
        return self.dp_shard * self.cp

    @property
    def world(self) -> int:
        """Devices."""
        return self.data * self.cp * self.tp * self.pp

    def __str__(self) -> str:
        named = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        return " ".join(f"{name}={degree}" for name, degree in named if degree > 1) or "one device"


def legal_layouts(shape: Shape, cluster: Cluster, batch: int) -> list[Layout]:
    """Every layout of a cluster that the model and a batch of so many sequences allow."""
    found = list(_layouts(shape, cluster, batch))
    if not found:
        raise ValueError(
            f"no layout of {shape.name} fits {cluster.size} devices: a batch of {batch} sequences, "
            f"{shape.units} units of layers and tensor degrees up to {cluster.per_node} do not "
            f"multiply to it; change --batch-tokens or the cluster"
        )
    return found


def _layouts(shape: Shape, cluster: Cluster, batch: int) -> Iterator[Layout]:
    for tp in _divisors(cluster.size):
        if tp > cluster.per_node or cluster.per_node % tp or any(n % tp for _, n in shape.heads):
            continue
        for pp in _divisors(cluster.size // tp):
            if pp > shape.units:
                continue
            for cp in _divisors(cluster.size // (tp * pp)):
                data = cluster.size // (tp * pp * cp)
                if batch % data or (cp > 1 and shape.context % (2 * cp)):
                    continue
                for dp_shard in _divisors(data):
                    for ep in _experts(shape, dp_shard * cp):
                        yield Layout(data // dp_shard, dp_shard, ep, tp, pp, cp)


def _experts(shape: Shape, ranks: int) -> list[int]:
    if not shape.experts:
        return [1]
    return [ep for ep in _divisors(ranks) if all(count % ep == 0 for count in shape.experts)]


def _divisors(number: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d < number]


def spread(cluster: Cluster, stride: int, size: int) -> float:
    """Bytes/s of a ring over ranks `stride` apart: the cards of all its members in a node count."""
    device = cluster.device
    if stride * size <= cluster.per_node:
        return device.nvlink
    return min(device.nvlink, device.network * max(1, cluster.per_node // stride))
