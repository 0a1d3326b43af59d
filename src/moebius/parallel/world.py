"""The ranks of a run: which this process is, and the groups and meshes it belongs to.

A launcher such as torchrun says each process its place; without one a process is alone, and every
group is None. Ranks are ordered replica, then expert-sharding, then expert group, so that ranks
which exchange tokens are neighbours.
"""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moebius.ops.ranks import Ranks, summed
from moebius.parallel.config import Degrees, Parallel

# A rank that is waited for longer than this is taken for lost.
PATIENCE = timedelta(minutes=10)


@final
@dataclass(frozen=True)
class World:
    """This process among `size`. Meshes are None where the process is alone."""

    rank: int = 0
    size: int = 1
    degrees: Degrees = Degrees(1, 1, 1)
    ranks: Ranks = Ranks()
    # Over replicas and ranks of a replica; and over those that hold the same experts.
    dense: DeviceMesh | None = None
    sparse: DeviceMesh | None = field(default=None)

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and shows."""
        return self.rank == 0

    def summed(self, x: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each."""
        return summed(x, self.ranks.data)

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        if self.ranks.data is None:
            return flag
        return bool(summed(torch.tensor(int(flag), device=self._device()), self.ranks.data))

    def told(self, text: str) -> str:
        """What the main process says, on every rank."""
        said = [text]
        if self.ranks.data is not None:
            dist.broadcast_object_list(said, group_src=0, group=self.ranks.data)
        return said[0]

    def wait(self) -> None:
        """Until every rank is here."""
        self.any(False)

    def describe(self) -> str:
        """The layout in words."""
        if self.size == 1:
            return "one process"
        d = self.degrees
        return f"{self.size} ranks: dp_replicate {d.dp_replicate}, dp_shard {d.dp_shard}, ep {d.ep}"

    def _device(self) -> str:
        return "cpu" if self.dense is None else self.dense.device_type


ALONE = World()


def launched() -> int:
    """How many processes a launcher started, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def enter(parallel: Parallel, device: torch.device) -> World:
    """Join the other processes of a launch; ValueError where the degrees do not fit them."""
    degrees = parallel.on(launched())
    if launched() == 1:
        return ALONE
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return laid_out(degrees, device.type)


def laid_out(degrees: Degrees, device: str) -> World:
    """The world of all processes of the default group."""
    replicas, shards, ep = degrees.dp_replicate, degrees.dp_shard, degrees.ep
    dense = init_device_mesh(device, (replicas, shards), mesh_dim_names=("replica", "shard"))
    names = ("replica", "outer", "expert")
    fine = init_device_mesh(device, (replicas, shards // ep, ep), mesh_dim_names=names)
    experts = None if ep == 1 else fine["expert"].get_group()
    ranks = Ranks(dist.group.WORLD, dense["shard"].get_group(), experts)
    place = (dist.get_rank(), dist.get_world_size())
    return World(*place, degrees, ranks, dense, fine["replica", "outer"])


def leave() -> None:
    """Part from the other processes, once all of them are done."""
    if dist.is_initialized():
        dist.destroy_process_group()
