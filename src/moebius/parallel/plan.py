"""Spreading a model over ranks: experts are cut first, then everything is sharded by FSDP2.

Parts say themselves what they do with other ranks (`ops.ranks.Spread`); gradients are summed over
ranks and never averaged, because every loss is divided by the count of the global batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_common import (
    FSDPMeshInfo,
    HSDPMeshInfo,
    ShardPlacementResult,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Cut

from moebius.ops.ranks import Group, Spread
from moebius.ops.shard import Shard
from moebius.parallel.world import World


def spread(
    model: nn.Module, units: Sequence[nn.Module], entries: Sequence[str], world: World, keep: bool
) -> dict[str, Shard]:
    """Cut a whole model, the same on every rank, into this rank's part; the shard of each weight.

    `units` are gathered one at a time; `entries` are the model's methods by which it is entered.
    With `keep`, gathered weights stay until the backward. On one process nothing happens.
    """
    if world.dense is None or world.sparse is None:
        return {}
    groups = _cut_experts(model, world)
    whole = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    own = {weight for name, weight in model.named_parameters() if name in groups}
    sparse = _mesh_info(world.sparse)

    def place(weight: nn.Parameter) -> ShardPlacementResult | None:
        return ShardPlacementResult(Cut(0), sparse) if weight in own else None

    options = {"mesh": world.dense, "reshard_after_forward": not keep, "shard_placement_fn": place}
    for unit in units:
        fully_shard(unit, **options)
    fully_shard(model, **options)
    for entry in entries:
        register_fsdp_forward_method(model, entry)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Gloo has no scaled sum, the other way to a factor of 1.
            module.set_force_sum_reduction_for_comms(True)
    return {name: _shard(shape, name in groups, world) for name, shape in whole.items()}


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor; the tensor itself where it is not cut."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """All of a tensor, on every rank; the tensor itself where it is not cut."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _cut_experts(model: nn.Module, world: World) -> dict[str, Group]:
    """Let every part take its groups, and cut the weights it names; their names."""
    found: dict[str, Group] = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, Spread):
            continue
        for name, group in module.spread(world.ranks).items():
            weight = model.get_parameter(path := f"{prefix}.{name}" if prefix else name)
            assert group is not None
            rows = weight.shape[0] // group.size()
            start = group.rank() * rows
            with torch.no_grad():
                weight.data = weight.data[start : start + rows].clone()
            found[path] = group
    return found


def _mesh_info(mesh: DeviceMesh) -> FSDPMeshInfo:
    return HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)


def _shard(shape: tuple[int, ...], of_experts: bool, world: World) -> Shard:
    """The rows of every rank of a replica; `shape` is that of what FSDP cut."""
    assert world.ranks.weights is not None
    degrees, group = world.degrees, world.ranks.weights
    parts = degrees.ep if of_experts else 1
    pieces = _chunks(shape[0], degrees.dp_shard // parts)
    spans: list[tuple[int, int]] = []
    for rank in range(degrees.dp_shard):
        outer, expert = divmod(rank, parts)
        start, stop = pieces[outer]
        spans.append((expert * shape[0] + start, expert * shape[0] + stop))
    return Shard((parts * shape[0], *shape[1:]), tuple(spans), group.rank(), group)


def _chunks(rows: int, parts: int) -> list[tuple[int, int]]:
    """As torch.chunk cuts: equal pieces, the last ones smaller or empty."""
    size = -(-rows // parts)
    return [(min(rows, i * size), min(rows, (i + 1) * size)) for i in range(parts)]
