"""The optimizer over roles: coverage, multipliers, exact continuation, clipping, ratios."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moebius.config import from_json, override, to_json
from moebius.optim.optimizer import ROLES, OptimConfig, Optimizer, Role, clip_, global_norm
from moebius.optim.roles import default_roles
from moebius.optim.rules import Rule, Slot
from moebius.optim.rules.adamw import AdamW
from moebius.optim.rules.muon import Muon
from moebius.optim.rules.soap import SOAP
from moebius.optim.schedules.constant import Constant
from moebius.optim.schedules.wsd import WSD

TOTAL, TOKENS = 10, 64


def config(lr: float = 0.01, roles: dict[str, Role] | None = None) -> OptimConfig:
    rich = default_roles(Muon(normalise="normuon", cautious=True))
    return OptimConfig(lr, WSD("2", "50%"), roles or rich)


def weights(seed: int = 0) -> list[tuple[Slot, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (Slot("embed.weight", "embedding"), (11, 8)),
        (Slot("blocks.0.ffn.w_gate_up", "expert", 2), (3, 12, 8)),
        (Slot("blocks.0.attn.w_o", "matrix"), (8, 8)),
        (Slot("blocks.0.norm.weight", "norm"), (8,)),
    ]
    return [(slot, torch.randn(shape, generator=generator)) for slot, shape in shapes]


def gradients(named: list[tuple[Slot, Tensor]], step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {slot.name: torch.randn(param.shape, generator=generator) for slot, param in named}


def advance(optimizer: Optimizer, named: list[tuple[Slot, Tensor]], steps: range) -> None:
    for step in steps:
        optimizer.step(gradients(named, step), step=step, total_steps=TOTAL, tokens_per_step=TOKENS)


def test_continuing_from_saved_states_is_bitwise_exact() -> None:
    whole = weights()
    advance(Optimizer(config(), whole), whole, range(10))

    first = weights()
    optimizer = Optimizer(config(), first)
    advance(optimizer, first, range(4))
    saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    second = [(slot, param.clone()) for slot, param in first]
    resumed = Optimizer(config(), second)
    resumed.load_state_tensors(saved)
    advance(resumed, second, range(4, 10))
    for (slot, want), (_, got) in zip(whole, second, strict=True):
        assert torch.equal(want, got), slot.name


def test_states_have_stable_names_and_load_strictly() -> None:
    optimizer = Optimizer(config(), weights())
    states = optimizer.state_tensors()
    assert set(states) == {
        "embed.weight.first_moment",
        "embed.weight.second_moment",
        "blocks.0.ffn.w_gate_up.momentum",
        "blocks.0.ffn.w_gate_up.row_moment",
        "blocks.0.attn.w_o.momentum",
        "blocks.0.attn.w_o.row_moment",
        "blocks.0.norm.weight.first_moment",
        "blocks.0.norm.weight.second_moment",
    }
    saved = {name: torch.ones_like(tensor) for name, tensor in states.items()}
    renamed = {name.replace("w_o.m", "w_q.m"): tensor for name, tensor in saved.items()}
    with pytest.raises(
        ValueError, match=r"missing: \S*w_o\.momentum; unexpected: \S*w_q\.momentum"
    ):
        optimizer.load_state_tensors(renamed)
    wrong = {**saved, "embed.weight.first_moment": torch.ones(11, 8).double()}
    with pytest.raises(ValueError, match=r"embed\.weight\.first_moment is .*float64"):
        optimizer.load_state_tensors(wrong)
    assert not any(tensor.any() for tensor in states.values())
    optimizer.load_state_tensors(saved)
    assert all(bool((tensor == 1).all()) for tensor in optimizer.state_tensors().values())


def test_every_role_must_have_a_rule() -> None:
    roles = {name: role for name, role in default_roles().items() if name != "expert"}
    with pytest.raises(ValueError, match=r"'expert' of blocks\.0\.ffn\.w_gate_up"):
        Optimizer(config(roles=roles), weights())
    assert set(default_roles()) == set(ROLES)


def test_unfit_weights_and_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match=r"w is torch\.bfloat16"):
        Optimizer(config(), [(Slot("w", "norm"), torch.ones(2).bfloat16())])
    with pytest.raises(ValueError, match="w is not contiguous"):
        Optimizer(config(), [(Slot("w", "head"), torch.ones(2, 3).t())])
    with pytest.raises(ValueError, match="two weights are called w"):
        Optimizer(
            config(), [(Slot("w", "norm"), torch.ones(2)), (Slot("w", "norm"), torch.ones(2))]
        )
    optimizer = Optimizer(config(), [(Slot("w", "norm"), torch.ones(2))])
    with pytest.raises(ValueError, match=r"gradients .* \(missing: w; unexpected: v\)"):
        optimizer.step({"v": torch.ones(2)}, step=0, total_steps=TOTAL, tokens_per_step=TOKENS)


def test_decay_alone_shrinks_by_exactly_lr_times_decay() -> None:
    """1 - lr * wd = 0.99998 is 1 in bf16: weights stay in fp32 though gradients do not."""
    roles = {"matrix": Role(Muon(), weight_decay=2.0), "head": Role(AdamW(), lr=0.5)}
    settings = OptimConfig(1e-4, Constant(), roles, weight_decay=0.1)
    torch.manual_seed(0)
    matrix, head = torch.randn(16, 16), torch.randn(16, 16)
    starts = matrix.double(), head.double()
    optimizer = Optimizer(settings, [(Slot("a", "matrix"), matrix), (Slot("b", "head"), head)])
    zeros = {"a": torch.zeros(16, 16).bfloat16(), "b": torch.zeros(16, 16).bfloat16()}
    for step in range(100):
        optimizer.step(zeros, step=step, total_steps=100, tokens_per_step=1)
    for now, start, factor in ((matrix, starts[0], 1 - 2e-5), (head, starts[1], 1 - 0.5e-5)):
        ratio = now.double() / start
        torch.testing.assert_close(ratio, torch.full_like(ratio, factor**100), rtol=0, atol=1e-5)


def test_role_multipliers_and_the_schedule_scale_the_update() -> None:
    def change(lr: float, multiplier: float, step: int) -> Tensor:
        weight = torch.zeros(6)
        settings = OptimConfig(lr, WSD("2", "0"), {"norm": Role(AdamW(), multiplier)})
        optimizer = Optimizer(settings, [(Slot("w", "norm"), weight)])
        optimizer.step(
            {"w": torch.arange(1.0, 7.0)}, step=step, total_steps=TOTAL, tokens_per_step=TOKENS
        )
        return weight

    torch.testing.assert_close(change(0.1, 0.3, 5), 0.3 * change(0.1, 1.0, 5))
    optimizer = Optimizer(OptimConfig(0.1, WSD("2", "0"), {}), [])
    assert optimizer.lr(0, TOTAL, TOKENS) == pytest.approx(0.05)
    assert optimizer.lr(5, TOTAL, TOKENS) == pytest.approx(0.1)
    # The bias correction at step 0 makes the first update lr * sign(g); the warm-up halves it.
    torch.testing.assert_close(change(0.1, 1.0, 0), torch.full((6,), -0.05))


def test_update_ratios_are_per_role_and_do_not_change_the_update() -> None:
    measured, plain = weights(), weights()
    before = {slot.role: param.clone() for slot, param in measured}
    ratios = Optimizer(config(), measured).step(
        gradients(measured, 0), step=0, total_steps=TOTAL, tokens_per_step=TOKENS, measure=True
    )
    assert (
        Optimizer(config(), plain).step(
            gradients(plain, 0), step=0, total_steps=TOTAL, tokens_per_step=TOKENS
        )
        == {}
    )
    assert set(ratios) == set(before)
    for (slot, param), (_, other) in zip(measured, plain, strict=True):
        assert torch.equal(param, other)
        want = (param - before[slot.role]).norm() / before[slot.role].norm()
        torch.testing.assert_close(ratios[slot.role], want)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.floats(1e-3, 1e3),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 1000),
)
def test_clip_equals_torch(sizes: list[int], limit: float, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    want = torch.nn.utils.clip_grad_norm_(params, limit, foreach=False)
    torch.testing.assert_close(clip_(grads, limit), want)
    for param, grad in zip(params, grads, strict=True):
        torch.testing.assert_close(grad, param.grad)


def test_norms_of_bf16_gradients_accumulate_in_fp32() -> None:
    """4096 ones: in bf16 a running sum would stop at 256, and the norm at 16."""
    grads = [torch.ones(4096, dtype=torch.bfloat16), torch.ones(4096)]
    assert global_norm(grads).item() == pytest.approx(math.sqrt(8192))
    assert clip_(grads, None).dtype == torch.float32
    assert bool((grads[1] == 1).all())
    assert clip_([torch.tensor([float("nan")])], 1.0).isnan()
    assert clip_([], 1.0).item() == 0.0


def test_config_goes_through_json_and_takes_overrides() -> None:
    settings = config()
    text = json.dumps(to_json(settings))
    assert from_json(OptimConfig, json.loads(text)) == settings
    changed = override(
        settings,
        [
            "roles.expert.lr=0.3",
            "roles.matrix.rule.momentum=0.9",
            "roles.head.rule=muon",
            "schedule.decay=3e2 tokens",
            "clip=none",
        ],
    )
    assert changed.roles["expert"] == dataclasses.replace(settings.roles["expert"], lr=0.3)
    assert changed.roles["matrix"].rule == Muon(momentum=0.9, normalise="normuon", cautious=True)
    assert changed.roles["head"].rule == Muon()
    assert changed.schedule == WSD("2", "3e2 tokens")
    assert changed.clip is None
    with pytest.raises(ValueError, match="did you mean 'expert'"):
        override(settings, ["roles.experts.lr=0.3"])


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'expert'"):
        config(roles={"experts": Role(AdamW())})
    with pytest.raises(ValueError, match="clip=0"):
        OptimConfig(0.1, Constant(), {}, clip=0.0)
    with pytest.raises(ValueError, match="must not be negative"):
        OptimConfig(-0.1, Constant(), {})
    with pytest.raises(ValueError, match="must not be negative"):
        Role(AdamW(), lr=-1.0)


@pytest.mark.parametrize("name", sorted(Rule.TABLE))
def test_every_rule_of_the_table(name: str) -> None:
    """By its table alone: JSON, fp32 and fp64 states, and a step against the gradient."""
    rule = from_json(Rule, name)
    assert from_json(Rule, to_json(rule)) == rule
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        weight, slots = torch.zeros(2, 6, 8, dtype=dtype), [Slot("w", "expert", 2)]
        grad = torch.randn_like(weight)
        states = rule.init(slots, [weight])
        assert {tensor.dtype for tensor in states[0].values()} == {dtype}
        for step in (1, 2):  # SOAP only measures at its first.
            rule.update(
                slots,
                [weight],
                [grad],
                states,
                lr=0.1,
                weight_decay=0.1,
                step=step,
                total_steps=100,
            )
        assert (weight * grad).sum() < 0


@pytest.mark.parametrize(
    "rule",
    [
        *[from_json(Rule, name) for name in sorted(Rule.TABLE)],
        SOAP(frequency=2, max_precondition_dim=8),
        *[AdamW(state_dtype="bf16", rounding=way) for way in ("nearest", "stochastic", "kahan")],
    ],
)
def test_every_rule_goes_on_bit_for_bit(rule: Rule) -> None:
    """Saved as a checkpoint is: within `evaluation_weights`, by name; then loaded into new ones."""
    roles = default_roles(rule, AdamW() if isinstance(rule, Muon | SOAP) else rule)
    settings, whole, first = config(roles=roles), weights(), weights()
    advance(Optimizer(settings, whole), whole, range(10))
    optimizer = Optimizer(settings, first)
    advance(optimizer, first, range(4))
    training = [param.clone() for _, param in first]
    with optimizer.evaluation_weights():
        second = [(slot, param.clone()) for slot, param in first]
        saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    for (_, param), before in zip(first, training, strict=True):
        assert torch.equal(param, before)
    resumed = Optimizer(settings, second)
    resumed.load_state_tensors(saved)
    for named in (first, second):
        advance(optimizer if named is first else resumed, named, range(4, 10))
        for (slot, want), (_, got) in zip(whole, named, strict=True):
            assert torch.equal(want, got), slot.name
