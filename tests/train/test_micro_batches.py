"""One global batch in 1 x 8, 2 x 4 and 8 x 1 micro-batches: same gradients, same router biases.

A small ScMoE with zero experts, budget controller, sequence-scope balance loss, z-losses and MTP,
on the source files of the package itself. Also here: what the global scope's delayed loads cost on
a real trajectory, and that recompute and accumulation count loads once.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moebius
from moebius.data.config import DataConfig
from moebius.data.loader import Batch, Loader
from moebius.data.prepare import prepare
from moebius.model.block.scmoe import ScMoE
from moebius.model.ends import EndConfig
from moebius.model.ends.hidden_z import HiddenZ
from moebius.model.ends.mtp import MTP
from moebius.model.ffn.balance import BalanceConfig
from moebius.model.ffn.balance.budget import Budget
from moebius.model.ffn.balance.group import GroupLoss
from moebius.model.ffn.balance.load import LoadLoss
from moebius.model.ffn.balance.router_z import RouterZ
from moebius.model.ffn.balance.sign import Sign
from moebius.model.ffn.balance.switch import SwitchLoss
from moebius.model.ffn.capacity import Capacity
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE, MoELayer, routers_of
from moebius.model.lm import LM, ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.mla import MLA
from moebius.model.weight import initialise, named_weights
from moebius.optim.optimizer import OptimConfig
from moebius.optim.roles import default_roles
from moebius.optim.rules.adamw import AdamW
from moebius.optim.schedules.constant import Constant
from moebius.train.passes import forward_backward
from moebius.train.run import Run
from moebius.train.state import TrainState, new_state
from moebius.train.step import StepResult, after_step, train_step

VOCAB, LENGTH, BATCH = 300, 32, 8
MIXER = MLA(2, 16, 16, 8, 8, 8, rope_base=10_000.0, scale_correction=True)
ENDS = (MTP(GQA(2, 1, 8), Dense(32), depth=2, weight=0.3), HiddenZ(1e-3))
BALANCE = (Budget(mu=0.5), GroupLoss(0.1, scope="sequence"), RouterZ(0.01))
MOE = MoE(
    experts=8,
    expert_width=16,
    top_k=3,
    zero_experts=4,
    ffn_per_token=2.0,
    shared_experts=1,
    split=2.0,
    balance=BALANCE,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """Global batches of eight sequences of the package's own source."""
    source = Path(moebius.__file__).parent / "model"
    cache = tmp_path_factory.mktemp("cache")
    prepared = prepare(DataConfig(path=str(source), cache=str(cache)), VOCAB)
    return Loader(prepared, LENGTH, BATCH, seed=0)


def ragged(batch: Batch) -> Batch:
    """The batch with the ends of some sequences not valid."""
    lengths_B = torch.tensor([32, 7, 32, 20, 1, 32, 32, 11])
    valid_BT = torch.arange(LENGTH) < lengths_B[:, None]
    return dataclasses.replace(batch, valid_BT=valid_BT, num_targets=int(valid_BT.sum()))


def model_of(moe: MoE = MOE, ends: tuple[EndConfig, ...] = ENDS) -> ModelConfig:
    return ModelConfig(width=32, layers=2 * (ScMoE(MIXER, Dense(48), moe),), ends=ends)


def build(moe: MoE = MOE, ends: tuple[EndConfig, ...] = ENDS) -> LM:
    model = model_of(moe, ends).build(VOCAB)
    initialise(model, 0)
    return model


def run_of(moe: MoE, micro_batch: int | None = None, ends: tuple[EndConfig, ...] = ENDS) -> Run:
    roles = default_roles(AdamW(), AdamW())
    return Run(
        name="small",
        model=model_of(moe, ends),
        data=DataConfig(path="."),
        optim=OptimConfig(lr=0.002, schedule=Constant(), roles=roles),
        steps=100,
        batch=BATCH,
        sequence_length=LENGTH,
        vocab=VOCAB,
        micro_batch=micro_batch,
    )


def gradients(model: LM) -> dict[str, Tensor]:
    grads = {name: w.grad.clone() for name, w in named_weights(model) if w.grad is not None}
    for weight in model.parameters():
        weight.grad = None
    return grads


def backward(
    model: LM, batch: Batch, size: int, dtype: torch.dtype = torch.float32, recompute: bool = False
) -> tuple[float, dict[str, float], list[dict[str, list[int]]], dict[str, Tensor]]:
    """Cross-entropy sum, the ends' sums, the counts of each router, gradients."""
    total, sums, stats = forward_backward(model, batch.split(size), 0, dtype, recompute)
    counts = [
        {
            field.name: getattr(routed, field.name).flatten().tolist()
            for field in dataclasses.fields(routed)
            if getattr(routed, field.name).dtype == torch.int64
        }
        for layer in stats
        for routed in layer
    ]
    return float(total), {k: float(v) for k, v in sums.items()}, counts, gradients(model)


def biases(model: LM) -> list[Tensor]:
    return [moe.bias_E().clone() for moe in moes(model)]


def moes(model: LM) -> list[MoELayer]:
    return [moe for block in model.blocks() for moe in routers_of(block)]


def distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm())


# --- item 5 of what must be shown -----------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["all valid", "ragged"])
@pytest.mark.parametrize(
    ("balance", "capacity"),
    [
        (BALANCE, None),
        ((Sign(0.01), SwitchLoss(0.1, "sequence"), RouterZ(0.01)), Capacity(0.75, "recycle")),
        ((Budget(mu=0.5), GroupLoss(0.1, scope="global")), Capacity(0.75, "drop")),
    ],
    ids=["budget", "sign, recycle", "global, drop"],
)
def test_gradients_do_not_depend_on_the_split(
    loader: Loader, balance: tuple[BalanceConfig, ...], capacity: Capacity | None, whole: bool
) -> None:
    model = build(dataclasses.replace(MOE, balance=balance, capacity=capacity))
    after_step(model, forward_backward(model, [loader.batch(5)], 0, torch.float32, False)[2], 0)
    batch = loader.batch(0) if whole else ragged(loader.batch(0))
    gradients(model)
    total, sums, counts, grads = backward(model, batch, 8)
    assert all(norm.norm() > 0 for norm in grads.values())
    assert len(grads) == len(list(named_weights(model)))
    for size in (4, 1):
        other_total, other_sums, other_counts, others = backward(model, batch, size)
        assert other_total == pytest.approx(total, rel=1e-6)
        assert other_sums == pytest.approx(sums, rel=1e-6)
        assert other_counts == counts
        assert others.keys() == grads.keys()
        far = {name: distance(others[name], grads[name]) for name in grads}
        assert max(far.values()) < 1e-5, max(far, key=far.__getitem__)


@pytest.mark.parametrize("rule", [Budget(mu=0.5), Sign(0.01)], ids=["budget", "sign"])
def test_biases_after_a_step_are_exactly_equal(loader: Loader, rule: BalanceConfig) -> None:
    moe = dataclasses.replace(MOE, balance=(rule, *BALANCE[1:]))
    found = []
    for size in (8, 4, 1):
        state = new_state(run_of(moe, size), torch.device("cpu"))
        result = step(state, run_of(moe, size), loader.batch(0))
        assert result.applied
        found.append((biases(state.model), result.loss))
    (first, loss), *others = found
    assert all(bias_E[:8].abs().max() > 0 and not bias_E[8:].any() for bias_E in first)
    for other, other_loss in others:
        assert all(torch.equal(a, b) for a, b in zip(other, first, strict=True))
        assert other_loss == pytest.approx(loss, rel=1e-6)


def step(state: TrainState, run: Run, batch: Batch) -> StepResult:
    return train_step(run, state, batch, torch.float32, None, False)


# --- counts and the reported loss -----------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [8, 2])
def test_loads_are_counted_once(loader: Loader, recompute: bool, size: int) -> None:
    """With recompute and accumulation on, and tokens that are not valid left out."""
    model, batch = build(), ragged(loader.batch(1))
    *_, counts, _ = backward(model, batch, size, recompute=recompute)
    assert batch.num_targets == 167 and len(counts) == 2
    for routed in counts:
        assert routed["num_tokens"] == [167]
        assert sum(routed["count_E"]) == 3 * 167
        assert sum(routed["hist_S"]) == 167
        picks = sum(n * many for n, many in enumerate(routed["hist_S"]))
        assert picks == sum(routed["count_E"][:8])


def test_recompute_gives_the_same_gradients(loader: Loader) -> None:
    model, batch = build(), loader.batch(1)
    *_, counts, grads = backward(model, batch, 4)
    *_, recounts, regrads = backward(model, batch, 4, recompute=True)
    assert recounts == counts
    assert all(distance(regrads[name], grads[name]) < 1e-6 for name in grads)


def test_the_reported_loss_is_pure_cross_entropy(loader: Loader) -> None:
    """Losses are added by autograd only: same number to the last bit, other gradients."""
    batch = loader.batch(2)
    bare = build(dataclasses.replace(MOE, balance=()), ends=())
    full = build()
    shared = dict(named_weights(bare))
    with torch.no_grad():
        for name, weight in named_weights(full):
            if name in shared:
                weight.copy_(shared[name])
    pure, no_sums, _, grads = backward(bare, batch, 4)
    total, sums, _, others = backward(full, batch, 4)
    assert total == pure and not no_sums and sums["hidden_z"] > 0
    assert pure == pytest.approx(BATCH * LENGTH * math.log(VOCAB), rel=0.1)
    changed = [name for name in grads if distance(others[name], grads[name]) > 1e-4]
    assert "layers.0.moe.router.w_ED" in changed and "layers.1.moe.router.w_ED" in changed


# --- the global scope -----------------------------------------------------------------------------


def loads(model: LM) -> list[Tensor]:
    """The load buffers of the global-scope losses."""
    rules = [rule for moe in moes(model) for rule in moe.balance_rules()]
    return [rule.load for rule in rules if isinstance(rule, LoadLoss)]


def deviation(model: LM, batch: Batch, step: int) -> float:
    """||used - true|| / ||true|| of the balance loss's gradient at the routers.

    Used are the loads of the previous global batch, true those of this one. Uniform loads give no
    gradient at all, so a pass with loads of 1 is one without the loss.
    """
    used, grads = [load.clone() for load in loads(model)], []
    stats = forward_backward(model, [batch], step, torch.float64, False)[2]
    gradients(model)
    after_step(model, stats, step)
    true = [load.clone() for load in loads(model)]
    for values in ([torch.ones_like(load) for load in used], true, used):
        for load, value in zip(loads(model), values, strict=True):
            load.copy_(value)
        every = backward(model, batch, BATCH, torch.float64)[-1]
        grads.append(
            torch.cat([grad.flatten() for name, grad in every.items() if "router" in name])
        )
    none, with_true, with_used = grads
    return distance(with_used - none, with_true - none)


def test_delayed_loads_stay_near_the_closed_form(loader: Loader) -> None:
    """On a real trajectory of batches of 256 tokens; 1 is the deviation of no loss at all."""
    moe = dataclasses.replace(MOE, balance=(GroupLoss(0.05, scope="global"),))
    run = dataclasses.replace(run_of(moe, ends=()), precision="fp64")
    state, found = new_state(run, torch.device("cpu")), []
    for i in range(12):
        found.append(deviation(state.model, loader.batch(i), i))
        before = [load.clone() for load in loads(state.model)]
        result = train_step(run, state, loader.batch(i), torch.float64, None, False)
        assert result.applied
        pairs = zip(loads(state.model), before, strict=True)
        assert not any(torch.equal(load, old) for load, old in pairs)
    assert found[0] == pytest.approx(1.0), "nothing is known before the first global batch"
    assert statistics.median(found[4:]) < 0.8
