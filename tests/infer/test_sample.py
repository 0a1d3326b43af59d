"""Sampling: what is drawn, from which tokens, and that decode states change nothing."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moebius.config import override
from moebius.infer.sample import draw, generate
from moebius.model.context import Context
from moebius.model.lm import LM
from moebius.recipes import recipe
from moebius.train.session import device_of
from moebius.train.state import new_state

from ..running import RECIPES

PROMPT_BT = torch.tensor([[0, 40, 41, 42], [0, 77, 5, 9]])


@pytest.fixture(scope="module", params=["tiny", "pattern"])
def lm(request: pytest.FixtureRequest, one_thread: None) -> LM:
    """A model with a head large enough that its choices are not all alike."""
    # Untied: a tied head that large would only ever repeat the token before.
    run = override(recipe(f"{RECIPES}:{request.param}"), ["model.tied=false"])
    model = new_state(run, device_of(run)).model.eval().requires_grad_(False)
    model.head.w_VD.mul_(20)
    return model


def whole(lm: LM, tokens_BT: Tensor) -> Tensor:
    """The logits after the last token, by one pass over all of them."""
    return lm.logits(lm(tokens_BT, Context.continuing(tokens_BT, 0)).hidden_BTD)[:, -1]


def test_greedy_equals_passes_over_the_whole(lm: LM) -> None:
    new_BT = generate(lm, PROMPT_BT, 20, temperature=0)
    tokens_BT = PROMPT_BT
    for _ in range(20):
        tokens_BT = torch.cat([tokens_BT, whole(lm, tokens_BT).argmax(-1)[:, None]], 1)
    assert torch.equal(new_BT, tokens_BT[:, 4:])
    assert len(set(new_BT.flatten().tolist())) > 2


def test_draws_equal_those_from_passes_over_the_whole(lm: LM) -> None:
    new_BT = generate(lm, PROMPT_BT, 12, temperature=0.7, top_p=0.9, seed=5)
    tokens_BT, generator = PROMPT_BT, torch.Generator().manual_seed(5)
    for _ in range(12):
        drawn_B = draw(whole(lm, tokens_BT), 0.7, 0.9, generator)
        tokens_BT = torch.cat([tokens_BT, drawn_B[:, None]], 1)
    assert torch.equal(new_BT, tokens_BT[:, 4:])


def test_a_seed_is_a_sample(lm: LM) -> None:
    one, again, other = (generate(lm, PROMPT_BT, 12, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_stop_tokens_end_rows(lm: LM) -> None:
    free_BT = generate(lm, PROMPT_BT, 12, temperature=0)
    stops = (int(free_BT[0, 3]), int(free_BT[1, 5]))
    new_BT = generate(lm, PROMPT_BT, 12, temperature=0, stops=stops)
    for row_T, free_T in zip(new_BT.tolist(), free_BT.tolist(), strict=True):
        end = next(i for i, token in enumerate(free_T) if token in stops)
        assert row_T == [*free_T[:end], *[free_T[end]] * (len(row_T) - end)]
    alone_BT = generate(lm, PROMPT_BT[:1], 12, temperature=0, stops=stops[:1])
    assert alone_BT.tolist() == [free_BT[0, : free_BT[0].tolist().index(stops[0]) + 1].tolist()]


def test_only_known_tokens_are_drawn(lm: LM) -> None:
    free_BT = generate(lm, PROMPT_BT, 40, temperature=10.0)
    assert int(free_BT.max()) >= 60
    new_BT = generate(lm, PROMPT_BT, 40, temperature=10.0, vocab=60)
    assert int(new_BT.max()) < 60


def test_nothing_is_asked_for(lm: LM) -> None:
    assert generate(lm, PROMPT_BT, 0).shape == (2, 0)


@pytest.mark.parametrize(
    ("temperature", "top_p", "said"),
    [(-1.0, 1.0, "temperature"), (float("nan"), 1.0, "temperature"), (1.0, 0.0, "top_p")],
)
def test_options_out_of_range(temperature: float, top_p: float, said: str, lm: LM) -> None:
    with pytest.raises(ValueError, match=said):
        generate(lm, PROMPT_BT, 1, temperature=temperature, top_p=top_p)
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(lm, PROMPT_BT[:, :0], 1)


# --- one draw -------------------------------------------------------------------------------------


def frequencies(p: Sequence[float], temperature: float, top_p: float) -> list[float]:
    """How often each token is drawn from 20,000 rows of the same probabilities."""
    logits_BV = torch.tensor(p).log().expand(20_000, len(p))
    drawn_B = draw(logits_BV, temperature, top_p, torch.Generator().manual_seed(0))
    return (torch.bincount(drawn_B, minlength=len(p)) / len(drawn_B)).tolist()


P = (0.1, 0.5, 0.05, 0.3, 0.05)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1.0, P),
        (0.89, (1 / 9, 5 / 9, 0, 3 / 9, 0)),
        (0.79, (0, 5 / 8, 0, 3 / 8, 0)),
        (0.51, (0, 5 / 8, 0, 3 / 8, 0)),
        (0.49, (0, 1, 0, 0, 0)),
        (1e-9, (0, 1, 0, 0, 0)),
    ],
)
def test_top_p_keeps_the_smallest_set(top_p: float, expected: Sequence[float]) -> None:
    found = frequencies(P, 1.0, top_p)
    assert found == pytest.approx(list(expected), abs=0.02)
    assert [f > 0 for f in found] == [e > 0 for e in expected]


def test_temperature_is_a_power() -> None:
    for temperature in (0.5, 2.0):
        powers = [p ** (1 / temperature) for p in P]
        expected = [power / sum(powers) for power in powers]
        assert frequencies(P, temperature, 1.0) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-6])
def test_no_temperature_is_too_low(temperature: float) -> None:
    assert frequencies(P, temperature, 1.0) == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_numbers_are_refused(temperature: float) -> None:
    run = override(recipe(f"{RECIPES}:tiny"), [])
    lm = new_state(run, device_of(run)).model.eval()
    with torch.no_grad():
        lm.head.w_VD[3].fill_(torch.nan)
    with pytest.raises(ValueError, match="the weights hold NaN or overflow"):
        generate(lm, PROMPT_BT, 2, temperature=temperature)
