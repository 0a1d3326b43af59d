"""The ranks of a run: which this process is, and the groups and meshes it belongs to.

A launcher such as torchrun says each process its place; without one a process is alone, and every
group is None. Ranks are ordered stage of the pipeline, replica, share of the batch, share of
a sequence, share of a token's computation, so that those which tell each other most are neighbours.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, final

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
# How long ranks that save wait for the slowest disk.
TO_SAVE, SAVERS = timedelta(hours=2), "savers"


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
    # The ranks of a pipeline that hold other layers, and otherwise the same parts.
    line: Group = None
    # Everyone once more, for threads that save: through the host, and not in turn with the others.
    savers: Group = None

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and shows."""
        return self.rank == 0

    @property
    def first_replica(self) -> bool:
        """Whether no other rank that holds the same comes before this one."""
        return self.dense is None or self.dense.get_local_rank("replica") == 0

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

    def heard(self, text: str) -> str:
        """On every rank what the first one says that says anything; nothing if none does."""
        said: list[Any] = [text] * self.size
        if self.everyone is not None:
            dist.all_gather_object(said, text, group=self.everyone)
        return next((one for one in said if one), "")

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
        words = [f"{name} {getattr(d, name)}" for name in names]
        if d.pipe.ranks > 1:
            words.append(f"pp {d.pipe.ranks} ({d.pipe.num_stages} stages, {d.pipe.schedule})")
        return f"{self.size} ranks: " + ", ".join(words)

    def seats(self, group: Group) -> list[tuple[int, int]]:
        """Of each rank of a replica's stage: its part of what is cut over a group (which a part of
        the model named), and its place among the ranks that hold the same part."""
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
    stages, replicas, ep, tp = degrees.pipe.ranks, degrees.dp_replicate, degrees.ep, degrees.tp
    everyone, place = dist.group.WORLD, (dist.get_rank(), dist.get_world_size())
    grid = torch.arange(place[1]).view(stages, replicas, -1, ep, tp)

    def mesh(of: Tensor, *names: str) -> DeviceMesh:
        return DeviceMesh(device, of.contiguous(), mesh_dim_names=names)

    dense = mesh(grid.flatten(2), "stage", "replica", "holder")["replica", "holder"]
    sparse = sliced = dense
    weights, tensor, experts, context, line = dense.get_group("holder"), None, None, None, None
    if ep > 1:
        by_expert = grid.transpose(3, 4).flatten(2, 3)
        fine = mesh(by_expert, "stage", "replica", "holder", "expert")
        sparse, experts = fine["replica", "holder"], fine.get_group("expert")
    if tp > 1:
        fine = mesh(grid.flatten(2, 3), "stage", "replica", "holder", "tensor")
        sliced, tensor = fine["replica", "holder"], fine.get_group("tensor")
    readers = mesh(grid.view(stages, -1, tp).transpose(1, 2), "stage", "twin", "reader")
    data = readers.get_group("reader") if readers.size(2) > 1 else None
    if degrees.cp > 1:
        rows = grid.view(-1, degrees.cp, tp).transpose(1, 2).reshape(-1, degrees.cp)
        context = mesh(rows, "sequences", "sharer").get_group("sharer")
    if stages > 1:
        line = mesh(grid.view(stages, -1).T, "seat", "stage").get_group("stage")
        by_replica = grid.flatten(2).transpose(0, 1).flatten(1)
        weights = mesh(by_replica, "replica", "element").get_group("element")
    savers = dist.new_group(backend="gloo", timeout=TO_SAVE, group_desc=SAVERS)
    assert isinstance(savers, dist.ProcessGroup)
    ranks = Ranks(data, context, tensor, weights, experts, exchange)
    return World(*place, degrees, ranks, everyone, dense, sparse, sliced, line, savers)


def leave() -> None:
    """Part from the other processes, once all of them are done."""
    if dist.is_initialized():
        dist.destroy_process_group()
