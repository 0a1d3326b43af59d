"""QK-Clip: the largest logits against their formulas, what clipping does to them, whole runs."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.model.mixers import Mixer, MixerConfig
from moebius.model.mixers.cla import shared
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.kda import KDA
from moebius.model.mixers.logits import BLOCK, max_logits
from moebius.model.mixers.mla import MLA
from moebius.model.mixers.nsa import NSA
from moebius.model.mixers.swa import SWA
from moebius.model.part import Site
from moebius.model.weight import initialise
from moebius.optim.roles import default_roles
from moebius.optim.rules.schedule_free import ScheduleFree
from moebius.train.passes import context_of
from moebius.train.qk_clip import QKClip, clippable, logits_by_mixer
from moebius.train.run import Run
from moebius.train.session import check, open_data
from moebius.train.state import TrainState, new_state
from moebius.train.step import train_step

from .. import tiny
from ..contract.cases import Case, cases
from ..lab.runs import placed
from ..model import formulas
from ..model.inputs import context, noise
from ..running import UNJUDGED, Place, lines, losses

WIDTH = 32
SITE = Site(WIDTH, num_writes=2, layer=0, eps=1e-5)
LATENT = MLA(heads=3, q_rank=10, kv_rank=6, nope_width=5, rope_width=4, v_width=7)
CTX = context((7, 5), (12,))


def built(config: MixerConfig) -> Mixer:
    """A mixer in fp64, its biases and sinks of noise."""
    mixer = config.build(SITE)
    initialise(mixer, 0)
    with torch.no_grad():
        for i, weight in enumerate(mixer.parameters()):
            if weight.ndim == 1:
                weight += 0.3 * noise(*weight.shape, seed=i, dtype=weight.dtype)
    return mixer.double()


def borrowed_by(mixer: Mixer, config: Any, x_BTD: Tensor) -> dict[str, Tensor]:
    """What a borrower is lent by its lender, fed the same tokens."""
    if not mixer.borrows:
        return {}
    lender = built(dataclasses.replace(config, borrows=False))
    return lender(x_BTD, CTX, None, {})[2]


# --- the largest logit ----------------------------------------------------------------------------


def logits(mixer: Any, config: Any, x_TD: Tensor) -> list[Tensor]:
    """scale * q.k of each head over one document, written from the equations."""
    if isinstance(config, MLA):
        return mla_logits(mixer, config, x_TD)
    own, kv, width = mixer.heads, mixer.kv, config.head_width
    found: list[Tensor] = []
    for head in range(config.heads):
        key_head = head // (config.heads // config.kv_heads)
        rows, key_rows = (slice(i * width, (i + 1) * width) for i in (head, key_head))
        q_TK, k_TK = x_TD @ own.w_q[rows].T, x_TD @ kv.w_k[key_rows].T
        if config.bias:
            q_TK, k_TK = q_TK + own.b_q[rows], k_TK + kv.b_k[key_rows]
        turned = (formulas.turn(x, config.rope_base) for x in (q_TK, k_TK))
        found.append(next(turned) @ next(turned).T / math.sqrt(width))
    return found


def mla_logits(mixer: Any, config: MLA, x_TD: Tensor) -> list[Tensor]:
    nope, rope, value = config.nope_width, config.rope_width, config.v_width
    eps = config.latent_eps
    latent = formulas.rms(x_TD @ mixer.queries.w_qa.T, mixer.queries.q_norm.w_D, eps)
    down = x_TD @ mixer.latents.w_kva.T
    c_TC = formulas.rms(down[:, : config.kv_rank], mixer.latents.kv_norm.w_D, eps)
    stretch = [1.0, 1.0]
    if config.scale_correction:
        stretch = [math.sqrt(WIDTH / rank) for rank in (latent.shape[1], config.kv_rank)]
    q_THX = (latent @ mixer.queries.w_qb.T * stretch[0]).unflatten(1, (config.heads, -1))
    k_THX = (c_TC * stretch[1] @ mixer.heads.w_kvb.T).unflatten(1, (config.heads, nope + value))
    k_TR = formulas.turn(down[:, config.kv_rank :], config.rope_base)
    found: list[Tensor] = []
    for head in range(config.heads):
        near = q_THX[:, head, :nope] @ k_THX[:, head, :nope].T
        far = formulas.turn(q_THX[:, head, nope:], config.rope_base) @ k_TR.T
        found.append((near + far) / math.sqrt(nope + rope))
    return found


FORMULAS = [
    GQA(4, 2, 8),
    GQA(4, 4, 8, bias=True),
    GQA(2, 1, 6, rope_base=None, sinks=True),
    SWA(4, 2, 8, window=3),
    SWA(2, 2, 8, window=1),
    LATENT,
    dataclasses.replace(LATENT, scale_correction=True),
]


@torch.no_grad()
@pytest.mark.parametrize("config", FORMULAS, ids=str)
def test_the_largest_logit_is_that_of_the_formula(config: Any) -> None:
    """Over all pairs that may see each other: packed documents, both sequences, the window."""
    mixer, x_BTD = built(config), noise(2, 12, WIDTH, seed=3)
    documents = (x_BTD[0, :7], x_BTD[0, 7:], x_BTD[1])
    window = config.window if isinstance(config, SWA) else 12
    want = [-math.inf] * config.heads
    for x_TD in documents:
        for head, score_TT in enumerate(logits(mixer, config, x_TD)):
            for t in range(len(x_TD)):
                seen = score_TT[t, max(0, t - window + 1) : t + 1]
                want[head] = max(want[head], float(seen.max()))
    got_H = mixer.max_logits(x_BTD, CTX, {})
    assert got_H.tolist() == pytest.approx(want, rel=1e-12)


def test_the_largest_logit_in_blocks_and_in_bf16() -> None:
    """Sequences longer than a block; products of bf16 queries and keys are taken in fp32."""
    q, k = noise(2, BLOCK + 9, 4, 8, seed=1), noise(2, BLOCK + 9, 2, 8, seed=2)
    mask = context((40, BLOCK - 31), (BLOCK + 9,)).attend_BTT
    for dtype in (torch.float64, torch.bfloat16):
        q_BTHK, k_BSGK = q.to(dtype), k.to(dtype)
        k_BSHK = k_BSGK.double().repeat_interleave(2, dim=2)
        score_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK.double(), k_BSHK) * 0.3
        want_H = score_BHTS.masked_fill(~mask[:, None], -math.inf).amax((0, 2, 3))
        got_H = max_logits(q_BTHK, k_BSGK, mask, 0.3)
        assert got_H.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got_H.double(), want_H, rtol=1e-6, atol=0)
    nothing_H = max_logits(q, k[:, :0], mask[:, :, :0], 1.0)
    assert nothing_H.tolist() == [-math.inf] * 4


# --- clipping -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("case", cases(MixerConfig))
def test_logits_shrink_by_gamma(case: Case) -> None:
    """In every mixer of the table that can be clipped, and each head by its own gamma."""
    config = case.make()
    mixer, x_BTD = built(config), noise(2, 12, WIDTH, seed=3)
    norm = getattr(getattr(config, "of", config), "qk_norm", "none")
    assert mixer.clippable == (not isinstance(config, KDA) and norm == "none")
    if isinstance(config, KDA):
        for call in (lambda: mixer.clip_logits(x_BTD), lambda: mixer.max_logits(x_BTD, CTX, {})):
            with pytest.raises(NotImplementedError, match="no logits to clip"):
                call()
    if not mixer.clippable:
        return
    borrowed = borrowed_by(mixer, config, x_BTD)
    before_H = mixer.max_logits(x_BTD, CTX, borrowed)
    gamma_H = torch.tensor([1.0, 0.25, 0.7, 1e-3], dtype=torch.float64)[: len(before_H)]
    lent = mixer(x_BTD, CTX, None, borrowed)[2]
    mixer.clip_logits(gamma_H)
    after_H = mixer.max_logits(x_BTD, CTX, borrowed)
    assert before_H.abs().min() > 0
    torch.testing.assert_close(after_H, before_H * gamma_H, rtol=1e-12, atol=0)
    for name, tensor in mixer(x_BTD, CTX, None, borrowed)[2].items():
        assert torch.equal(tensor, lent[name]), f"{name} is shared with other layers"


@torch.no_grad()
@pytest.mark.parametrize("config", [GQA(4, 2, 8, bias=True), GQA(4, 4, 8), LATENT], ids=str)
def test_every_logit_shrinks_not_only_the_largest(config: Any) -> None:
    mixer, x_TD = built(config), noise(9, WIDTH, seed=3)
    before = logits(mixer, config, x_TD)
    gammas = [0.5, 1.0, 0.3, 0.9][: config.heads]
    mixer.clip_logits(torch.tensor(gammas, dtype=torch.float64))
    for old, new, gamma in zip(before, logits(mixer, config, x_TD), gammas, strict=True):
        torch.testing.assert_close(new, old * gamma, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_which_weights_take_how_much() -> None:
    """Kimi K2's rule: roots to queries and keys of a head; a shared key is left to the others."""
    gamma_H = torch.tensor([0.25, 1.0, 0.04], dtype=torch.float64)
    root_H = gamma_H.sqrt()
    mixer: Any = built(LATENT)
    old = {name: weight.clone() for name, weight in mixer.named_parameters()}
    mixer.clip_logits(gamma_H)
    new = dict(mixer.named_parameters())
    q_ratio = (new["queries.w_qb"] / old["queries.w_qb"]).unflatten(0, (3, 9)).mean(-1)
    assert torch.allclose(q_ratio[:, :5], root_H[:, None]) and torch.allclose(
        q_ratio[:, 5:], gamma_H[:, None]
    )
    kv_ratio = (new["heads.w_kvb"] / old["heads.w_kvb"]).unflatten(0, (3, 12)).mean(-1)
    assert torch.allclose(kv_ratio[:, :5], root_H[:, None]) and torch.equal(
        kv_ratio[:, 5:], torch.ones(3, 7, dtype=torch.float64)
    )
    moved = {name for name in new if not torch.equal(new[name], old[name])}
    assert moved == {"queries.w_qb", "heads.w_kvb"}
    own, grouped = built(GQA(3, 3, 4)), built(GQA(3, 1, 4))
    for attention, factor_H, moved_names in (
        (own, root_H, {"heads.w_q", "kv.w_k"}),
        (grouped, gamma_H, {"heads.w_q"}),
    ):
        old = {name: weight.clone() for name, weight in attention.named_parameters()}
        attention.clip_logits(gamma_H)
        new = dict(attention.named_parameters())
        assert {name for name in new if not torch.equal(new[name], old[name])} == moved_names
        for name in moved_names:
            ratio = (new[name] / old[name]).unflatten(0, (3, 4)).mean(-1)
            assert torch.allclose(ratio, factor_H[:, None])


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(place: Place) -> Run:
    """Mixers of every kind, latents in the MTP end too."""
    run = placed(tiny.pattern(), place)
    layer = run.model.layers[0]
    nsa = NSA(4, 2, 8, block=4, stride=2, selected_block=4, num_selected=4, window=3)
    mixers = (SWA(4, 2, 8, window=8), *shared(GQA(4, 2, 8), 2), nsa, GQA(4, 2, 8, qk_norm="head"))
    layers = tuple(dataclasses.replace(layer, mixer=mixer) for mixer in mixers)
    mtp = tiny.MTP(LATENT, tiny.Dense(32))
    model = dataclasses.replace(run.model, layers=layers, ends=(mtp,))
    return dataclasses.replace(run, model=model, qk_clip=QKClip(threshold=30.0))


def queries_of(state: TrainState) -> list[Tensor]:
    names = ("w_q", "w_qb")
    return [w for name, w in state.model.named_parameters() if name.split(".")[-1] in names]


def test_huge_logits_are_pulled_below_the_threshold(mixed: Run) -> None:
    """Queries a thousand times too large, in every layer; the run goes on with sane ones."""
    state, loader = new_state(mixed, torch.device("cpu")), open_data(mixed, None)[1]
    assert len(clippable(state.model)) == 5 and len(queries_of(state)) == 6
    with torch.no_grad():
        for weight in queries_of(state):
            weight.mul_(1000)
    seen: list[float] = []
    for step in range(6):
        result = train_step(mixed, state, loader.batch(step), torch.float32, None, False)
        assert result.applied and result.clipped is not None
        seen.append(result.clipped.logit_max)
    assert seen[0] > 1000 and max(seen[3:]) < 60
    # The one layer whose input clipping cannot change is at the threshold, to rounding.
    batch = loader.batch(5).rows(0, 1)
    maxima = logits_by_mixer(state.model, batch, context_of(batch, 5), torch.float32)
    first = state.model.blocks()[0].mixers()[0]
    (first_H,) = (max_H for mixer, max_H in maxima if mixer is first)
    assert float(first_H.max()) <= 30 * (1 + 1e-5)
    assert state.clipped_heads >= 19 and state.counters()["clipped_heads"] == state.clipped_heads


def test_below_the_threshold_nothing_changes(mixed: Run) -> None:
    """Not a bit of the weights, however often it looks; and it looks only when due."""
    loader = open_data(mixed, None)[1]
    after: list[dict[str, Tensor]] = []
    looked: list[list[bool]] = []
    for clip in (None, QKClip(1e6), QKClip(1e6, every=2)):
        run = dataclasses.replace(mixed, qk_clip=clip)
        state = new_state(run, torch.device("cpu"))
        results = [
            train_step(run, state, loader.batch(step), torch.float32, None, False)
            for step in range(3)
        ]
        looked.append([result.clipped is not None for result in results])
        assert state.clipped_heads == 0
        after.append(state.tensors())
    assert looked == [[False] * 3, [True] * 3, [False, True, False]]
    for other in after[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in after[0].items())


def test_logits_that_are_not_finite_are_not_clipped(mixed: Run) -> None:
    state, loader = new_state(mixed, torch.device("cpu")), open_data(mixed, None)[1]
    weight = queries_of(state)[0]
    with torch.no_grad():
        weight[0] = math.nan
    batch = loader.batch(0).rows(0, 1)
    found = logits_by_mixer(state.model, batch, context_of(batch, 0), torch.float32)
    clipped = QKClip(1e6).clip(found)
    assert math.isnan(clipped.logit_max) and clipped.heads == 0
    assert not weight[1:].isnan().any()


def test_a_resumed_run_clips_as_one_that_never_stopped(place: Place) -> None:
    fields = (UNJUDGED, 'qk_clip={"threshold": 0.5, "every": 2}')
    whole = place.train("clipped-whole", *fields)
    stopped = place.train("clipped-stopped", *fields, "stop_at=5")
    done = place.cli("train", "--resume", stopped, "stop_at=none")
    assert done.code == 0, done.err
    assert losses(stopped) == losses(whole)
    shown = [{k: v for k, v in line.items() if k.startswith("qk_")} for line in lines(whole)]
    assert shown == [
        {k: v for k, v in line.items() if k.startswith("qk_")} for line in lines(stopped)
    ]
    assert [bool(line) for line in shown] == [False, True] * 6
    counts = [line["qk_clipped"] for line in shown if line]
    assert 0 < counts[0] < counts[-1] and counts == sorted(counts)
    newest = "checkpoints/step-00000012"
    assert state_bytes(whole / newest) == state_bytes(stopped / newest)
    plain = place.train("unclipped", UNJUDGED)
    assert losses(plain) != losses(whole)


def state_bytes(folder: Path) -> dict[str, bytes]:
    """The tensors of a checkpoint, by file."""
    found = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert found
    return found


def test_what_cannot_be_clipped_is_refused(mixed: Run, place: Place) -> None:
    layer = dataclasses.replace(mixed.model.layers[0], mixer=GQA(4, 2, 8, qk_norm="head"))
    model = dataclasses.replace(mixed.model, layers=(layer,), ends=())
    with pytest.raises(ValueError, match="qk_clip has nothing to clip"):
        check(dataclasses.replace(mixed, model=model))
    roles = default_roles(ScheduleFree())
    optim = dataclasses.replace(mixed.optim, roles=roles)
    with pytest.raises(ValueError, match=r"schedule_free \(matrix\) makes anew"):
        check(dataclasses.replace(mixed, optim=optim))
    with pytest.raises(ValueError, match="threshold must be above 0"):
        QKClip(threshold=0.0)
    with pytest.raises(ValueError, match="every must be at least 1"):
        QKClip(every=0)
