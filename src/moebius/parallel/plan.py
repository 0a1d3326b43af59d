"""Spreading a model over ranks: what parts say is cut first, then everything is sharded by FSDP2.

Parts say themselves what they do with other ranks (`ops.ranks.Spread`); gradients are summed over
ranks and never averaged, because every loss is divided by the count of the global batch. Ranks that
hold the same part of a weight shard it among them, so that in a replica each element lies on one
rank alone: nothing can drift, and nothing counts twice in a norm.
"""

from collections.abc import Callable, Collection, Mapping, Sequence, Set

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp._fully_shard._fsdp_common import (
    FSDPMeshInfo,
    HSDPMeshInfo,
    ShardPlacementResult,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Placed

from moebius.ops.linear import Operand
from moebius.ops.ranks import Cut, Group, Spread, rank_in, size_of
from moebius.ops.shard import Shard, Span
from moebius.parallel.world import World

# How weights are gathered: as they are, or, where they are multiplied in bf16, in that; their
# gradients are summed in fp32.
WHOLE = MixedPrecisionPolicy(cast_forward_inputs=False)
BF16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)


def shares_of(
    model: nn.Module, world: World, home_of: Callable[[str], int]
) -> tuple[dict[str, Cut], dict[str, Shard]]:
    """How each weight of a whole model that is cut is to be, and the shard of every weight once the
    roots of the model are `sharded`. `home_of` a name is its rank of the pipeline."""
    cuts = cuts_of(model, world)
    shards = {
        name: _shard(tuple(weight.shape), cuts.get(name, Cut(None)), world, home_of(name))
        for name, weight in model.named_parameters()
    }
    return cuts, shards


def sharded(
    root: nn.Module,
    units: Sequence[nn.Module],
    cuts: Mapping[Tensor, Cut],
    world: World,
    *,
    fill: Callable[[Set[Tensor]], None],
    keep: bool,
    entries: Sequence[str] = (),
    lent: Collection[nn.Parameter] = (),
    half: Collection[nn.Parameter] = (),
) -> None:
    """Shard the weights of a root by FSDP2, all but those that are lent to it.

    `fill` gives weights memory, and what this rank computes with, just before they are sharded; so
    no more than the root's own and those of a unit are ever there. `units` are gathered one at a
    time; `entries` are methods by which the root is entered beside its forward. With `keep`,
    gathered weights stay until the backward. Those of units in `half` are gathered in bf16, and
    their gradients are of bf16 until they are summed; all others of these units, which are few and
    small, are gathered with the root.
    """
    infos = {cut.group: _mesh_info(world, cut.group) for cut in cuts.values()}

    def place(weight: nn.Parameter) -> ShardPlacementResult | None:
        cut = cuts.get(weight)
        return None if cut is None else ShardPlacementResult(Placed(0), infos[cut.group])

    def shard(module: nn.Module, ignored: set[nn.Parameter], policy: MixedPrecisionPolicy) -> None:
        taken = set(module.parameters()) - ignored
        fill(taken)
        fully_shard(
            module,
            mesh=world.dense,
            reshard_after_forward=not keep,
            shard_placement_fn=place,
            mp_policy=policy,
            ignored_params=ignored,
        )
        # The module has its shards instead; whoever still knows the weight keeps no memory alive.
        for weight in taken:
            weight.data = weight.data.new_empty(0)

    operands = _operands(root)
    own = set(half) or {weight for unit in units for weight in unit.parameters()}
    # A root takes what is not ignored, but nothing below a module that has taken something.
    shard(root, own.union(lent), WHOLE)
    for unit in units:
        shard(unit, set(unit.parameters()) - own, BF16 if half else WHOLE)
    for entry in entries:
        register_fsdp_forward_method(root, entry)
    for module in _sharded_modules(root):
        module.set_gradient_divide_factor(1.0)
        # Gloo has no scaled sum, the other way to a factor of 1.
        module.set_force_sum_reduction_for_comms(True)
    _mark(root, operands)


def gathered_no_more(root: nn.Module) -> None:
    """Leave a root's modules with their shards: the next forward gathers them as they are then."""
    for module in _sharded_modules(root):
        module.reshard()


def _sharded_modules(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def _operands(root: nn.Module) -> list[tuple[nn.Module, str, Operand]]:
    """The weights with products of their own, and where they stand."""
    return [
        (module, name, weight)
        for module in root.modules()
        for name, weight in module.named_parameters(recurse=False)
        if isinstance(weight, Operand) and weight.product is not None
    ]


def _mark(root: nn.Module, operands: list[tuple[nn.Module, str, Operand]]) -> None:
    """FSDP gathers them into plain parameters, the same ones at every step: let these be theirs."""
    if not operands:
        return
    for module in _sharded_modules(root):
        module.unshard()
    for module, name, weight in operands:
        weight.mark(module.get_parameter(name))
    gathered_no_more(root)


def part_of(whole: Tensor, cut: Cut) -> Tensor:
    """What a rank computes with of a weight: a copy of its part where it is cut."""
    if cut.group is None:
        return whole
    return _span(tuple(whole.shape), cut, rank_in(cut.group)).of(whole)


def put(part: Tensor, whole: Tensor, cut: Cut) -> None:
    """Write it to its place in the whole."""
    _span(tuple(whole.shape), cut, rank_in(cut.group)).put(part, whole)


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor; the tensor itself where it is not cut."""
    return x.to_local() if isinstance(x, DTensor) else x


def cuts_of(model: nn.Module, world: World) -> dict[str, Cut]:
    """Let every part take its groups; how each weight that is cut is to be, by its name.

    ValueError where a part, or the shape of a weight, does not fit the groups.
    """
    names = {id(weight): name for name, weight in model.named_parameters()}
    found: dict[str, Cut] = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, Spread):
            continue
        for name, cut in module.spread(world.ranks).items():
            weight = model.get_parameter(f"{prefix}.{name}" if prefix else name)
            path = names[id(weight)]
            # A tied weight is named by each of its parts.
            if cut.group is None or found.get(path) == cut:
                continue
            assert path not in found, f"{path} is cut in two ways"
            _check(path, weight, cut)
            found[path] = cut
    return found


def _check(path: str, weight: Tensor, cut: Cut) -> None:
    size, parts = weight.shape[cut.dim], cut.blocks * size_of(cut.group)
    if size % parts:
        raise ValueError(
            f"{path} of shape {list(weight.shape)} cannot be cut into {parts} equal parts along "
            f"dim {cut.dim}; choose degrees of parallel that divide it"
        )


def _span(shape: tuple[int, ...], cut: Cut, part: int) -> Span:
    """The rows or columns of a part."""
    parts = size_of(cut.group)
    if cut.dim == 1:
        assert cut.blocks == 1
        width = shape[1] // parts
        return Span(((0, shape[0]),), (part * width, (part + 1) * width))
    height = shape[0] // (cut.blocks * parts)
    starts = [(block * parts + part) * height for block in range(cut.blocks)]
    return Span(tuple((start, start + height) for start in starts))


def _mesh_info(world: World, group: Group) -> FSDPMeshInfo:
    mesh = world.holders(group)
    assert mesh is not None
    return HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)


def _shard(shape: tuple[int, ...], cut: Cut, world: World, home: int) -> Shard:
    """What each rank of a replica holds of a weight of this shape, whose stages are at `home`."""
    assert world.dense is not None
    group = world.dense.get_group("holder")
    seats = world.seats(cut.group)
    holders = 1 + max(place for _, place in seats)
    spans: list[Span] = []
    for part, place in seats:
        span = _span(shape, cut, part)
        spans.append(span.within(*_chunk(span.num_rows, holders, place)))
    return Shard(shape, tuple(spans), group.rank(), group, world.line, home)


def _chunk(rows: int, parts: int, i: int) -> tuple[int, int]:
    """As torch.chunk cuts: equal pieces, the last ones smaller or empty."""
    size = -(-rows // parts)
    return min(rows, i * size), min(rows, (i + 1) * size)
