"""Layouts with tensor parallelism against one process; what became of each, for `test_tensor.py`.

Arguments: where to write, a folder for checkpoints, then JSON of cases `[recipe, steps, [layouts]]`
with recipes of this file. Rank 0 writes what it found by kind.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moebius import checkpoint
from moebius.config import from_json
from moebius.model.block.prenorm import PreNorm
from moebius.model.context import Context
from moebius.model.ends.hidden_z import HiddenZ
from moebius.model.ends.mtp import MTP
from moebius.model.ffn import RouteStats
from moebius.model.ffn.balance.group import GroupLoss
from moebius.model.ffn.balance.router_z import RouterZ
from moebius.model.ffn.balance.sign import Sign
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE, routers_of
from moebius.model.ffn.routers.sigmoid import Sigmoid
from moebius.model.lm import ModelConfig
from moebius.model.mixers import DecodeState, Mixer, MixerConfig
from moebius.model.mixers.cla import shared
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.kda import KDA
from moebius.model.mixers.mla import MLA
from moebius.model.mixers.nsa import NSA
from moebius.model.mixers.swa import SWA
from moebius.model.part import Site
from moebius.model.weight import initialise
from moebius.ops.loss import head_cross_entropy_naive
from moebius.ops.loss.spread import head_cross_entropy_spread
from moebius.ops.ranks import all_rows, own_rows
from moebius.parallel.config import Parallel
from moebius.parallel.world import ALONE, World, laid_out
from moebius.train.layout import check_plans
from moebius.train.run import Run
from moebius.train.state import new_state
from moebius.train.step import over_ranks, train_step
from tests import tiny
from tests.parallel.data_worker import Found, batch_of, compare, distance, trained, whole


def llama() -> Run:
    """Two layers of grouped queries and a dense SwiGLU; head and embedding apart."""
    layer = PreNorm(GQA(heads=8, kv_heads=4, head_width=8), Dense(48))
    return of_model(ModelConfig(width=32, layers=(layer, layer)))


def mixed() -> Run:
    """Everything that has a tensor-parallel plan, and what must not notice."""
    full = GQA(heads=8, kv_heads=4, head_width=4, bias=True, sinks=True)
    latent = MLA(4, q_rank=12, kv_rank=12, nope_width=6, rope_width=4, v_width=6, bias=True)
    local = SWA(heads=4, kv_heads=4, head_width=8, window=8, qk_norm="head")
    lender, borrower = shared(local, 2)
    moe = MoE(
        experts=4,
        top_k=2,
        expert_width=16,
        shared_experts=1,
        router=Sigmoid(),
        balance=(Sign(), GroupLoss(), RouterZ()),
    )
    layers = (
        PreNorm(full, Dense(40, bias=True)),
        PreNorm(lender, moe),
        PreNorm(borrower, moe),
        PreNorm(latent, Dense(40)),
    )
    ends = (MTP(full, Dense(24)), HiddenZ(0.01))
    return of_model(ModelConfig(width=32, layers=layers, ends=ends, tied=True))


def tiny_scmoe() -> Run:
    """The ScMoE of the other tests: latent attention, zero-computation experts, a budget."""
    return dataclasses.replace(tiny.tiny(), precision="fp64")


def of_model(model: ModelConfig) -> Run:
    return dataclasses.replace(tiny_scmoe(), model=model)


def sparse() -> Run:
    """NSA that must choose, each branch with keys of its own or all with the same; a norm of all
    heads at once."""
    nsa = NSA(
        heads=8,
        kv_heads=4,
        head_width=8,
        block=4,
        stride=2,
        selected_block=4,
        num_selected=3,
        window=6,
    )
    shared = dataclasses.replace(nsa, separate_kv=False, compression="mean")
    full = GQA(heads=8, kv_heads=4, head_width=8, qk_norm="full")
    layers = tuple(PreNorm(mixer, Dense(40)) for mixer in (nsa, shared, full))
    return of_model(ModelConfig(width=32, layers=layers))


RECIPES = {"llama": llama, "mixed": mixed, "tiny": tiny_scmoe, "sparse": sparse}


def layouts(cases: list[Any]) -> list[Found]:
    """Rank 0 alone trains on one process as well, and compares."""
    found: list[Found] = []
    for recipe, steps, wanted in cases:
        run = RECIPES[recipe]()
        alone = trained(run, ALONE, steps) if dist.get_rank() == 0 else None
        for layout in wanted:
            parallel = from_json(Parallel, layout)
            world = laid_out(parallel.on(dist.get_world_size()), "cpu")
            spread = trained(dataclasses.replace(run, parallel=parallel), world, steps)
            if alone is not None:
                result = compare(alone, spread)
                found.append({"recipe": recipe, "layout": layout, **result})
    return found


def resumed(folder: Path, world: World) -> Found:
    """Two steps on ranks, a checkpoint, and a third step on one process and on them."""
    run, dtype = mixed(), torch.float64
    state = new_state(run, torch.device("cpu"), world)
    for step in range(2):
        train_step(run, state, batch_of(run, step), dtype, None, False)
    state.save(folder, 1, {})
    dist.barrier()
    third = train_step(run, state, batch_of(run, 2), dtype, None, False)
    tensors, counters = checkpoint.load(checkpoint.complete(folder)[-1])
    # The other way: what one process saved is taken over by ranks, and saved again.
    back = new_state(run, torch.device("cpu"), world)
    back.restore(tensors, counters)
    again = whole(back)
    same = [torch.equal(x, again[name]) for name, x in tensors.items()]
    alone = new_state(run, torch.device("cpu"))
    alone.restore(tensors, counters)
    moved = train_step(run, alone, batch_of(run, 2), dtype, None, False)
    return {"step": counters["step"], "losses": [moved.loss, third.loss], "again": same}


def loss_op(world: World) -> Found:
    """The head's loss over ranks against all logits at once: value and both gradients."""
    group, parts = world.ranks.tensor, world.degrees.tp
    assert group is not None
    draw = torch.Generator().manual_seed(0)
    h_ND = torch.randn(21, 8, generator=draw, dtype=torch.float64) * 30
    w_VD = torch.randn(24, 8, generator=draw, dtype=torch.float64)
    target_N = torch.randint(0, 24, (21,), generator=draw)
    valid_N = torch.rand(21, generator=draw) < 0.8
    whole_h, whole_w = h_ND.clone().requires_grad_(), w_VD.clone().requires_grad_()
    want = head_cross_entropy_naive(whole_h, whole_w, target_N, valid_N)
    (want * 0.7).backward()
    own_h = h_ND.clone().requires_grad_()
    own_w = w_VD.chunk(parts)[group.rank()].clone().requires_grad_()
    got = head_cross_entropy_spread(own_h, own_w, target_N, valid_N, group, chunk=8)
    (got * 0.7 / parts).backward()
    assert whole_h.grad is not None and whole_w.grad is not None
    assert own_h.grad is not None and own_w.grad is not None
    dist.all_reduce(own_h.grad, group=group)
    return {
        "value": distance(want.detach(), got.detach()),
        "hidden": distance(whole_h.grad, own_h.grad),
        "words": distance(whole_w.grad.chunk(parts)[group.rank()], own_w.grad),
    }


def rows_op(world: World) -> Found:
    """Portions of 5 rows, doubled and put together; the gradients of ranks are shares of one."""
    group, parts = world.ranks.tensor, world.degrees.tp
    assert group is not None
    x_ND = torch.arange(15, dtype=torch.float64).view(5, 3).requires_grad_()
    own_ND = own_rows(x_ND, group)
    y_ND = all_rows(2 * own_ND, 5, group)
    # Rank r weighs every row by its number and by r + 1.
    (y_ND.sum(1) * torch.arange(5) * (group.rank() + 1)).sum().backward()
    assert x_ND.grad is not None
    dist.all_reduce(x_ND.grad, group=group)
    total = sum(range(1, parts + 1))
    model = mixed().model.build(300)
    moe = routers_of(model.blocks()[1])[0]
    initialise(model, 0)
    moe.spread(dataclasses.replace(world.ranks, experts=None))
    batch = batch_of(mixed(), 0)
    ctx = Context.packed(
        batch.position_BT, batch.document_BT, batch.valid_BT, batch.sequence_B, 1, 0
    )
    sent = moe.begin(torch.randn(*batch.tokens_BT.shape, 32), ctx).sent
    assert sent is not None
    computed = torch.tensor(len(sent.arrived().x_MD))
    dist.all_reduce(computed, group=group)
    return {
        "own": len(own_ND),
        "values": torch.equal(y_ND, 2 * x_ND),
        "gradients": x_ND.grad.tolist() == [[2.0 * total * n] * 3 for n in range(5)],
        "computed": int(computed),
        "tokens": batch.tokens_BT.numel(),
    }


def loads(world: World) -> list[list[int]]:
    """What each rank takes for the loads of all, where those of a tensor group disagree."""
    one = torch.tensor(1 + dist.get_rank())
    routed = RouteStats(one.repeat(3), one.repeat(3).double(), one.repeat(3), one, one, one)
    count_E = over_ranks(((routed,),), world)[0][0].count_E
    told = [torch.empty_like(count_E) for _ in range(dist.get_world_size())]
    dist.all_gather(told, count_E)
    return [count.tolist() for count in told]


@dataclasses.dataclass(frozen=True)
class Alone(MixerConfig):
    """A mixer that says nothing of other ranks: every token to itself."""

    def build(self, site: Site) -> Mixer:
        return _Alone()


class _Alone(Mixer):
    def forward(
        self,
        x_BTD: torch.Tensor,
        ctx: Context,
        state: DecodeState | None,
        borrowed: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, DecodeState | None, dict[str, torch.Tensor]]:
        return x_BTD, state, {}

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> DecodeState:
        raise NotImplementedError

    def state_bytes(self, context: int, dtype: torch.dtype) -> int:
        return 0

    def flops(self, context: int) -> float:
        return 0.0


def refusals(world: World) -> list[str]:
    """What is said of models that cannot be shared so."""
    odd: list[tuple[MixerConfig, int, int]] = [
        (Alone(), 48, 300),
        (KDA(heads=3, head_width=8), 48, 300),
        (GQA(heads=4, kv_heads=1, head_width=8), 48, 300),
        (GQA(heads=4, kv_heads=4, head_width=8), 47, 300),
        (GQA(heads=4, kv_heads=4, head_width=8), 48, 301),
    ]
    said: list[str] = []
    for mixer, hidden, vocab in odd:
        layers = (llama().model.layers[0], PreNorm(mixer, Dense(hidden)))
        run = dataclasses.replace(of_model(ModelConfig(width=32, layers=layers)), vocab=vocab)
        try:
            check_plans(run.model.build(run.vocab), world.degrees)
            new_state(run, torch.device("cpu"), world)
        except ValueError as error:
            said.append(str(error))
    return said


def main() -> None:
    out, folder, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    dist.init_process_group("gloo")
    found: Found = {"layouts": layouts(cases)}
    world = laid_out(Parallel(tp=2).on(dist.get_world_size()), "cpu")
    found |= {"loss": loss_op(world), "refused": refusals(world)}
    found |= {"resumed": resumed(folder, world), "loads": loads(world), "rows": rows_op(world)}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
