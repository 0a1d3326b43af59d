"""Kimi Delta Attention as a mixer: its formula, transformers' kimi_linear, and its decode state."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.model.block.prenorm import PreNorm
from moebius.model.context import Context
from moebius.model.ffn.dense import Dense
from moebius.model.lm import ModelConfig
from moebius.model.mixers.kda import KDA, REACH
from moebius.model.mixers.mla import MLA
from moebius.model.part import Site
from moebius.model.weight import initialise, named_weights

from .formulas import rms, silu
from .inputs import context, noise, tokens

WIDTH = 12
SITE = Site(WIDTH, num_writes=2, layer=0, eps=1e-5)


def built(config: KDA) -> Any:
    """The mixer in fp64, its norm and biases of noise."""
    mixer = config.build(SITE)
    initialise(mixer, 0)
    with torch.no_grad():
        for i, weight in enumerate(mixer.parameters()):
            if weight.ndim == 1:
                weight += 0.3 * noise(*weight.shape, seed=i, dtype=weight.dtype)
    return mixer.double()


def mixed(mixer: Any, x_BTD: Tensor, ctx: Context) -> Tensor:
    return mixer(x_BTD, ctx, None, {})[0]


def formula(mixer: Any, x_TD: Tensor) -> Tensor:
    """One document, token by token, from the paper's equations 1 and 9 to 11."""
    config, width = mixer.config, mixer.config.head_width
    heads: list[Tensor] = []
    for head in range(config.heads):
        rows = slice(head * width, (head + 1) * width)
        short: list[Tensor] = []
        for i, w in enumerate((mixer.w_q, mixer.w_k, mixer.w_v)):
            conv_KW = mixer.conv_XW.unflatten(0, (3, -1))[i, rows]
            past_TK = torch.cat([torch.zeros(config.conv_width - 1, width), x_TD @ w[rows].T])
            window_TKW = past_TK.unfold(0, config.conv_width, 1)
            short.append(silu((window_TKW * conv_KW).sum(-1)))
        q_TK, k_TK = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in short[:2])
        decay_TK = x_TD @ mixer.w_decay_down.T @ mixer.w_decay_up[rows].T + mixer.dt_bias[rows]
        rate = mixer.a_log_H[head].exp()
        if config.lower_bound is None:
            alpha_TK = (1 + decay_TK.exp()) ** -rate
        else:
            alpha_TK = (config.lower_bound / (1 + (-rate * decay_TK).exp())).exp()
        beta_T = 1 / (1 + (-x_TD @ mixer.w_beta[head]).exp())
        beta_T = 2 * beta_T if config.negative_eigenvalues else beta_T
        state, out = torch.zeros(width, width, dtype=torch.float64), []
        for q, k, v, alpha, beta in zip(q_TK, k_TK, short[2], alpha_TK, beta_T, strict=True):
            state = alpha[:, None] * state
            state = state - beta * torch.outer(k, k @ state) + beta * torch.outer(k, v)
            out.append(q @ state / math.sqrt(width))
        gate_TK = x_TD @ mixer.w_gate_down.T @ mixer.w_gate_up[rows].T
        normed_TK = rms(torch.stack(out), mixer.out_norm.w_D, SITE.eps)
        heads.append(normed_TK / (1 + (-gate_TK).exp()))
    return torch.cat(heads, dim=-1) @ mixer.w_o.T


@pytest.mark.parametrize(
    "config",
    [
        KDA(2, 5),
        KDA(3, 4, conv_width=3, negative_eigenvalues=True),
        KDA(1, 6, conv_width=1, lower_bound=-5.0),
    ],
    ids=str,
)
def test_kda_is_its_formula(config: KDA) -> None:
    """Values and every gradient, with documents packed into one sequence."""
    mixer, x_BTD = built(config), noise(1, 23, WIDTH, seed=3).requires_grad_()
    leaves = [x_BTD, *mixer.parameters()]
    got_TD = mixed(mixer, x_BTD, context((2, 17, 4)))[0]
    want_TD = torch.cat([formula(mixer, x_TD) for x_TD in x_BTD[0].split([2, 17, 4])])
    torch.testing.assert_close(got_TD, want_TD, rtol=1e-10, atol=1e-12)
    direction_TD = noise(*got_TD.shape, seed=4)
    got = torch.autograd.grad((got_TD * direction_TD).sum(), leaves)
    want = torch.autograd.grad((want_TD * direction_TD).sum(), leaves)
    for ours, reference in zip(got, want, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-11)


def transformers_layer(config: KDA, eps: float) -> Any:
    pytest.importorskip("transformers", reason="the reference is transformers' kimi_linear")
    from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    theirs = KimiLinearConfig(
        hidden_size=WIDTH,
        linear_head_dim=config.head_width,
        linear_num_heads=config.heads,
        linear_conv_kernel_dim=config.conv_width,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        rms_norm_eps=eps,
    )
    return KimiLinearDeltaAttention(theirs, layer_idx=0)


# Our weights by the names in transformers' kimi_linear; shapes differ by dims of 1 alone.
NAMES = {
    "q_proj.weight": "w_q",
    "k_proj.weight": "w_k",
    "v_proj.weight": "w_v",
    "conv1d.weight": "conv_XW",
    "forget_gate.f_a_proj.weight": "w_decay_down",
    "forget_gate.f_b_proj.weight": "w_decay_up",
    "forget_gate.dt_bias": "dt_bias",
    "forget_gate.A_log": "a_log_H",
    "b_proj.weight": "w_beta",
    "g_a_proj.weight": "w_gate_down",
    "g_b_proj.weight": "w_gate_up",
    "o_norm.weight": "out_norm.w_D",
    "o_proj.weight": "w_o",
}


@pytest.mark.parametrize("length", [9, 150])
def test_kda_equals_transformers(length: int) -> None:
    config = KDA(3, 8)
    mixer, layer = built(config).float(), transformers_layer(config, SITE.eps)
    twins = {name: mixer.get_parameter(ours) for name, ours in NAMES.items()}
    parameters = dict(layer.named_parameters())
    assert parameters.keys() == twins.keys() and len(twins) == len(list(mixer.parameters()))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(twins[name].view(parameter.shape))
    x_BTD = noise(2, length, WIDTH, seed=3, dtype=torch.float32).requires_grad_()
    got_BTD = mixed(mixer, x_BTD, context((length,), (length,)))
    want_BTD = layer(x_BTD)
    torch.testing.assert_close(got_BTD, want_BTD, rtol=2e-5, atol=2e-6)
    direction_BTD = noise(*got_BTD.shape, seed=4, dtype=torch.float32)
    mine, its = [x_BTD, *(twins[name] for name in parameters)], [x_BTD, *parameters.values()]
    got = torch.autograd.grad((got_BTD * direction_BTD).sum(), mine)
    want = torch.autograd.grad((want_BTD * direction_BTD).sum(), its)
    for name, ours, reference in zip(["x", *parameters], got, want, strict=True):
        error = (ours.view(reference.shape) - reference).norm() / reference.norm()
        assert error < 2e-5, f"{name}: off by {error:.2g}"


def states_after(config: KDA, pieces: list[int], dtype: torch.dtype) -> list[Any]:
    """The states of two sequences after pieces of these lengths."""
    mixer = config.build(SITE)
    initialise(mixer, 0)
    state = mixer.init_state(2, dtype, torch.device("cpu"))
    states: list[Any] = []
    for length in pieces:
        x_BTD = noise(2, length, WIDTH, dtype=dtype)
        with torch.no_grad():
            _, state, _ = mixer(x_BTD, Context.continuing(x_BTD[..., 0], state.length), state, {})
        states.append(state)
    return states


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_bytes_of_the_state_do_not_depend_on_the_pieces(dtype: torch.dtype) -> None:
    config = KDA(2, 5, conv_width=3)
    mixer = config.build(SITE)
    for pieces in ([1] * 70, [33, 1, 20], [1000, 5]):
        for state in states_after(config, pieces, dtype):
            assert state.bytes == 2 * mixer.state_bytes(state.length, dtype), state.length


def test_the_state_stays_small_however_long_the_sequence() -> None:
    """As Kimi Linear's heads: S in fp32, and less than 1.3 of it for what may be taken back."""
    mixer, matrix = KDA(4, 128).build(SITE), 4 * 128 * 128 * 4
    sizes = [mixer.state_bytes(context, torch.bfloat16) for context in range(REACH, 500)]
    assert matrix < min(sizes) and max(sizes) < 2.3 * matrix
    assert sizes[REACH:-REACH] == sizes[2 * REACH :]


def test_the_last_tokens_can_always_be_taken_back() -> None:
    for state in states_after(KDA(2, 5), [7, 8, 1, 1, 30, 1, 100, 1], torch.float32):
        reach = state.kept
        assert min(REACH, state.length) <= reach < 2 * REACH
        assert state.rollback(reach).length == state.length - reach
        with pytest.raises(ValueError, match=f"cannot roll back {reach + 1} tokens; at most"):
            state.rollback(reach + 1)


def test_log_decays_keep_to_their_lower_bound() -> None:
    mixer: Any = KDA(4, 8, lower_bound=-5.0).build(SITE)
    initialise(mixer, 0)
    g_BTHK = mixer._log_decay(30 * noise(2, 40, WIDTH, dtype=torch.float32)).detach()
    assert -5 <= float(g_BTHK.min()) < -4.9 and -0.1 < float(g_BTHK.max()) <= 0


def test_gradients_are_finite_where_everything_decays_at_once() -> None:
    mixer = built(KDA(2, 8)).float()
    with torch.no_grad():
        mixer.dt_bias.fill_(5.0)
    x_BTD = noise(2, 80, WIDTH, seed=3, dtype=torch.float32).requires_grad_()
    leaves = [x_BTD, *mixer.parameters()]
    loss = mixed(mixer, x_BTD, context((80,), (40, 40))).square().sum()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, leaves))


def test_decays_begin_as_published() -> None:
    """Rates uniform in 1..16, time steps log-uniform in 1e-3..1e-1; from the seed alone."""
    mixer: Any = KDA(200, 8).build(SITE)
    twin = copy.deepcopy(mixer)
    initialise(mixer, 0)
    rate_H = mixer.a_log_H.detach().exp()
    step_X = mixer.dt_bias.detach().exp().log1p()
    assert 1 <= rate_H.min() < 1.5 and 15.5 < rate_H.max() <= 16.01
    assert abs(float(rate_H.mean()) - 8.5) < 1
    assert 0.99e-3 < step_X.min() < 1.1e-3 and 0.9e-1 < step_X.max() < 1.01e-1
    assert abs(float(step_X.log10().mean()) + 2) < 0.1
    initialise(twin, 0)
    for (name, weight), other in zip(named_weights(mixer), twin.parameters(), strict=True):
        assert torch.equal(weight, other), f"{name} of a deep copy begins otherwise"


def test_a_hybrid_with_mla_learns() -> None:
    """Kimi Linear's pattern, 3 KDA and 1 MLA without positions: the loss falls."""
    mla = MLA(2, None, 6, 8, 4, 8, rope_base=None)
    blocks = 3 * (PreNorm(KDA(2, 8), Dense(24)),) + (PreNorm(mla, Dense(24)),)
    lm = ModelConfig(16, blocks).build(20)
    initialise(lm, 0)
    tokens_BT, targets_BT = tokens(2, 24, 20)
    ctx = context((24,), (10, 14))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    losses: list[float] = []
    for recompute in (False, True, False, True):
        loss = lm.loss(tokens_BT, targets_BT, ctx, recompute=recompute).total / ctx.num_targets
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (KDA(0, 8), "every width must be at least 1"),
        (KDA(2, 0), "every width must be at least 1"),
        (KDA(2, 8, conv_width=0), "every width must be at least 1"),
        (dataclasses.replace(KDA(2, 8), lower_bound=0.5), r"lower_bound \(0.5\) must be below 0"),
    ],
    ids=str,
)
def test_dims_that_do_not_fit_are_refused(config: KDA, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.build(SITE)
