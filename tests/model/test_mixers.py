"""Mixers against their formulas, document by document; and what their decode states hold."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.model.context import Context
from moebius.model.mixers import MixerConfig
from moebius.model.mixers.cache import SLACK, TokenCache
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.mla import MLA
from moebius.model.mixers.swa import SWA
from moebius.model.part import Site
from moebius.model.weight import initialise
from moebius.ops.attention.sdpa import BLOCK

from . import formulas
from .inputs import context, noise

WIDTH = 24
SITE = Site(WIDTH, num_writes=2, layer=0, eps=1e-5)
LATENT = MLA(heads=3, q_rank=10, kv_rank=6, nope_width=5, rope_width=4, v_width=7)


def built(config: MixerConfig) -> Any:
    """The mixer with weights, norms and sinks of noise."""
    mixer = config.build(SITE)
    initialise(mixer, 0)
    with torch.no_grad():
        for i, weight in enumerate(mixer.parameters()):
            if weight.ndim == 1:
                weight += 0.3 * noise(*weight.shape, seed=i, dtype=weight.dtype)
    return mixer.double()


def mixed(mixer: Any, x_BTD: Tensor, ctx: Context) -> Tensor:
    return mixer(x_BTD, ctx, None, {})[0]


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        GQA(4, 2, 6),
        GQA(3, 3, 4, rope_base=100.0, qk_norm="head"),
        GQA(4, 1, 5, rope_base=None),
        SWA(4, 2, 6, window=3),
        SWA(4, 4, 6, window=1, sinks=True),
        SWA(2, 1, 8, window=4, sinks=True, qk_norm="head", rope_base=None),
        LATENT,
        dataclasses.replace(LATENT, q_rank=None),
        dataclasses.replace(LATENT, rope_base=None),
        dataclasses.replace(LATENT, scale_correction=True),
    ],
    ids=str,
)
def test_a_mixer_is_its_formula(config: MixerConfig) -> None:
    mixer, x_BTD = built(config), noise(1, 9, WIDTH, seed=3)
    y_TD = mixed(mixer, x_BTD, context((5, 4)))[0]
    for document in (slice(0, 5), slice(5, 9)):
        x_TD = x_BTD[0, document]
        if isinstance(config, MLA):
            want_TD = formulas.mla(mixer, x_TD)
        else:
            window = config.window if isinstance(config, SWA) else None
            want_TD = formulas.gqa(mixer, x_TD, window)
        torch.testing.assert_close(y_TD[document], want_TD, rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("config", [SWA(2, 1, 4, window=7, sinks=True), GQA(2, 1, 4)], ids=str)
def test_a_long_sequence_is_its_formula(config: SWA | GQA) -> None:
    """Long enough that attention on a CPU goes in blocks."""
    mixer, x_BTD = built(config), noise(1, BLOCK + 20, WIDTH, seed=3)
    window = config.window if isinstance(config, SWA) else None
    want_TD = formulas.gqa(mixer, x_BTD[0], window)
    got_BTD = mixed(mixer, x_BTD, context((BLOCK + 20,)))
    torch.testing.assert_close(got_BTD[0], want_TD, rtol=1e-9, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("scaled", [False, True])
def test_absorbed_mla_equals_naive(scaled: bool) -> None:
    """With an empty state MLA decodes by latents; without one it expands them."""
    mixer = built(dataclasses.replace(LATENT, scale_correction=scaled))
    x_BTD, ctx = noise(2, 9, WIDTH, seed=3), context((9,), (9,))
    state = mixer.init_state(2, torch.float64, torch.device("cpu"))
    absorbed_BTD, _, _ = mixer(x_BTD, ctx, state, {})
    torch.testing.assert_close(absorbed_BTD, mixed(mixer, x_BTD, ctx), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_scale_factors_fold_into_the_latent_norms() -> None:
    """As inference engines load LongCat: unscaled weights, sqrt(D / rank) in the norms."""
    scaled = built(dataclasses.replace(LATENT, scale_correction=True))
    plain = built(LATENT)
    plain.load_state_dict(scaled.state_dict())
    plain.queries.q_norm.w_D *= (WIDTH / 10) ** 0.5
    plain.latents.kv_norm.w_D *= (WIDTH / 6) ** 0.5
    x_BTD, ctx = noise(2, 9, WIDTH, seed=3), context((9,), (4, 5))
    want_BTD = mixed(scaled, x_BTD, ctx)
    torch.testing.assert_close(mixed(plain, x_BTD, ctx), want_BTD, rtol=1e-10, atol=1e-12)
    plain.queries.q_norm.w_D /= 2
    assert not torch.allclose(mixed(plain, x_BTD, ctx), want_BTD, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("scaled", [False, True])
def test_latents_begin_with_unit_variance(scaled: bool) -> None:
    """Queries, and keys and values from latents, have variance 1 whatever the ranks."""
    config = MLA(8, 16, 8, 64, 4, 64, scale_correction=scaled)
    mixer: Any = config.build(Site(256, 2, 0, 1e-5))
    initialise(mixer, 0)
    x_BTD, ctx = noise(1, 400, 256, seed=3), context((400,))
    # The correction of queries stands in the factor of the scores.
    q_BTHX = mixer.queries(x_BTD, ctx) * mixer.heads.score_scale * (64 + 4) ** 0.5
    latent_BTC, _ = mixer.latents(x_BTD, ctx)
    expanded_BTX = latent_BTC @ mixer.heads.w_kvb.double().T
    assert abs(float(q_BTHX.var()) - 1) < 0.15
    assert abs(float(expanded_BTX.var()) - 1) < 0.15


def decoded(config: MixerConfig, lengths: list[int], dtype: torch.dtype) -> list[int]:
    """Bytes of the state of two sequences after chunks of these lengths."""
    mixer = config.build(SITE)
    initialise(mixer, 0)
    state = mixer.init_state(2, dtype, torch.device("cpu"))
    sizes: list[int] = []
    for length in lengths:
        x_BTD = noise(2, length, WIDTH, dtype=dtype)
        with torch.no_grad():
            _, state, _ = mixer(x_BTD, Context.continuing(x_BTD[..., 0], state.length), state, {})
        assert state is not None
        sizes.append(state.bytes)
    return sizes


def test_gqa_keeps_keys_and_values_of_every_token() -> None:
    sizes = decoded(GQA(4, 2, 6), [5, 1, 30], torch.float32)
    assert sizes == [2 * 2 * tokens * 2 * 6 * 4 for tokens in (5, 6, 36)]


def test_mla_keeps_the_latent_and_one_rotated_key() -> None:
    sizes = decoded(LATENT, [5, 1, 30], torch.bfloat16)
    assert sizes == [2 * tokens * (6 + 4) * 2 for tokens in (5, 6, 36)]


def test_swa_keeps_its_window_and_the_slack_of_rollbacks() -> None:
    sizes = decoded(SWA(4, 2, 6, window=3), [2, 50, 1, 1], torch.float32)
    most = 2 * 2 * (3 + SLACK) * 2 * 6 * 4
    assert sizes == [2 * 2 * 2 * 2 * 6 * 4, most, most, most]


def test_a_ring_refuses_to_lose_its_window_by_rollbacks() -> None:
    """Each rollback alone would be within the slack; together they are not."""
    state = TokenCache((torch.zeros(1, 0, 2),), window=4).extend(torch.zeros(1, 60, 2)).trim()
    state = state.rollback(SLACK - 2)
    assert state.rollback(2).kept == 4
    with pytest.raises(ValueError, match="cannot roll back 3 tokens; at most 2 here"):
        state.rollback(3)


def test_a_ring_that_has_not_turned_can_go_back_to_its_start() -> None:
    state = TokenCache((torch.zeros(1, 0, 2),), window=4).extend(torch.zeros(1, 20, 2)).trim()
    assert state.rollback(20).length == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GQA(4, 3, 8), r"heads \(4\) must be a multiple of kv_heads \(3\)"),
        (GQA(4, 0, 8), r"heads \(4\) must be a multiple of kv_heads \(0\)"),
        (GQA(0, 1, 8), r"every width must be at least 1"),
        (GQA(4, 2, 7), r"head_width \(7\) must be even"),
        (SWA(4, 2, 8, window=0), r"window \(0\) must be at least 1"),
        (dataclasses.replace(LATENT, rope_width=3), r"rope_width \(3\) must be even"),
        (dataclasses.replace(LATENT, q_rank=0), r"every width must be at least 1"),
        (dataclasses.replace(LATENT, q_rank=None, scale_correction=True), "needs q_rank"),
    ],
    ids=str,
)
def test_dims_that_do_not_fit_are_refused(config: MixerConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.build(SITE)
