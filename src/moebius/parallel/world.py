"""The ranks of a run: which this process is, and the groups and meshes it belongs to.

A launcher such as torchrun says each process its place; without one a process is alone, and every
group is None. Ranks are ordered replica, share of the batch, share of a sequence, share of a
token's computation, so that those which tell each other most are neighbours.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from moebius.ops.ranks import Exchange, Group, Ranks, rank_in, size_of, summed
from moebius.parallel.config import Degrees, Parallel
from moebius.parallel.meet import meet

# A rank that is waited for longer than this is taken for lost.
PATIENCE = timedelta(minutes=10)


@final
@dataclass(frozen=True)
class World:
    """This process among `size`. Groups and meshes are None where the process is alone."""

    rank: int = 0
    size: int = 1
    degrees: Degrees = Degrees(1, 1, 1)
    ranks: Ranks = Ranks()
    everyone: Group = None
    # Over replicas, and over the ranks of one that hold the same part of a weight: of those that
    # are not cut otherwise, of experts, and of what a tensor group shares.
    dense: DeviceMesh | None = None
    sparse: DeviceMesh | None = None
    sliced: DeviceMesh | None = None

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and shows."""
        return self.rank == 0

    @property
    def reader(self) -> tuple[int, int]:
        """Which sequences of a global batch this rank reads, of how many parts."""
        shared = size_of(self.ranks.context)
        return rank_in(self.ranks.data) // shared, size_of(self.ranks.data) // shared

    def summed(self, x: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each."""
        return summed(x, self.everyone)

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        if self.everyone is None:
            return flag
        return bool(summed(torch.tensor(int(flag), device=self._device()), self.everyone))

    def told(self, text: str) -> str:
        """What the main process says, on every rank."""
        said = [text]
        if self.everyone is not None:
            dist.broadcast_object_list(said, group_src=0, group=self.everyone)
        return said[0]

    def wait(self) -> None:
        """Until every rank is here."""
        self.any(False)

    def describe(self) -> str:
        """The layout in words."""
        if self.size == 1:
            return "one process"
        d = self.degrees
        names = ("dp_replicate", "dp_shard", "ep", "tp", "cp")
        return f"{self.size} ranks: " + ", ".join(f"{name} {getattr(d, name)}" for name in names)

    def seats(self, group: Group) -> list[tuple[int, int]]:
        """Of each rank of a replica: its part of what is cut over a group (which a part of the
        model named), and its place among the ranks that hold the same part."""
        d = self.degrees
        ranks = range(d.readers * d.tp)
        if group is None:
            return [(0, rank) for rank in ranks]
        if group is self.ranks.tensor:
            return [(rank % d.tp, rank // d.tp) for rank in ranks]
        inner = [divmod(rank, d.tp) for rank in ranks]
        return [(reader % d.ep, reader // d.ep * d.tp + twin) for reader, twin in inner]

    def holders(self, group: Group) -> DeviceMesh | None:
        """The mesh over replicas and those places."""
        if group is None:
            return self.dense
        return self.sliced if group is self.ranks.tensor else self.sparse

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
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, size = next(rendezvous("env://"))
        dist.init_process_group(
            backend, store=meet(store, rank, size, PATIENCE), rank=rank, world_size=size
        )
    return laid_out(degrees, device.type, parallel.exchange)


def laid_out(degrees: Degrees, device: str, exchange: Exchange = "all_to_all") -> World:
    """The world of all processes of the default group."""
    replicas, ep, tp = degrees.dp_replicate, degrees.ep, degrees.tp
    everyone, place = dist.group.WORLD, (dist.get_rank(), dist.get_world_size())
    grid = torch.arange(place[1]).view(replicas, -1, ep, tp)
    dense = _mesh(device, grid.flatten(1))
    sparse = sliced = dense
    data, tensor, experts, context = everyone, None, None, None
    if ep > 1:
        fine = DeviceMesh(device, grid.transpose(2, 3).flatten(1, 2), mesh_dim_names=_EXPERTS)
        sparse, experts = fine["replica", "holder"], fine["expert"].get_group()
    if tp > 1:
        fine = DeviceMesh(device, grid.flatten(1, 2), mesh_dim_names=_TENSOR)
        sliced, tensor = fine["replica", "holder"], fine["tensor"].get_group()
        readers = DeviceMesh(device, grid.view(-1, tp).T.contiguous(), mesh_dim_names=_DATA)
        data = readers["reader"].get_group() if place[1] > tp else None
    if degrees.cp > 1:
        rows = grid.view(-1, degrees.cp, tp).transpose(1, 2).reshape(-1, degrees.cp)
        context = DeviceMesh(device, rows, mesh_dim_names=_CONTEXT)["sharer"].get_group()
    weights = dense["holder"].get_group()
    ranks = Ranks(data, context, tensor, weights, experts, exchange)
    return World(*place, degrees, ranks, everyone, dense, sparse, sliced)


_EXPERTS = ("replica", "holder", "expert")
_TENSOR = ("replica", "holder", "tensor")
_DATA = ("twin", "reader")
_CONTEXT = ("sequences", "sharer")


def _mesh(device: str, grid: Tensor) -> DeviceMesh:
    return DeviceMesh(device, grid, mesh_dim_names=("replica", "holder"))


def leave() -> None:
    """Part from the other processes, once all of them are done."""
    if dist.is_initialized():
        dist.destroy_process_group()
