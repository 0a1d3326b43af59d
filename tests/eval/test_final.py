"""The figures of a finished run: whole, the same in every batching, and kept beside the corpus."""

import json
import math
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moebius
from moebius.data.prepare import prepare
from moebius.data.prepared import Prepared
from moebius.eval.bits_per_byte import Heldout, bits_per_byte
from moebius.eval.final import baselines, evaluate, expert_use
from moebius.model.context import Context
from moebius.model.ffn.moe import MoELayer
from moebius.model.lm import LM
from moebius.train.folder import RunFolder
from moebius.train.session import read_run
from moebius.train.state import new_state
from moebius.train.twin import dense_twin

from ..running import Place

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def prepared(reference: Path) -> Prepared:
    run, _ = read_run(RunFolder.open(reference))
    return prepare(run.data, run.vocab)


@pytest.fixture(scope="module")
def lm(reference: Path, one_thread: None) -> LM:
    return moebius.load(reference)[0].lm


def test_batches_change_rounding_only(lm: LM, prepared: Prepared) -> None:
    found = [bits_per_byte(lm, Heldout(prepared, 32, batch, FP32, CPU)) for batch in (1, 3, 64)]
    assert len({(one.num_tokens, one.num_bytes) for one in found}) == 1
    for one in found:
        assert one.bits_per_byte == pytest.approx(found[0].bits_per_byte, rel=1e-6)
        bits = one.loss / math.log(2) * one.num_tokens
        assert one.bits_per_byte == pytest.approx(bits / one.num_bytes, rel=1e-9)


def test_every_length_scores_every_token(lm: LM, prepared: Prepared) -> None:
    found = [bits_per_byte(lm, Heldout(prepared, length, 4, FP32, CPU)) for length in (7, 32, 500)]
    assert len({one.num_tokens for one in found}) == 1
    assert len({one.bits_per_byte for one in found}) == 3


def test_a_uniform_model_costs_the_logarithm(lm: LM, prepared: Prepared) -> None:
    held = Heldout(prepared, 32, 4, torch.float64, CPU)
    flat = lm.config.build(lm.vocab).double()
    flat.load_state_dict(lm.state_dict())
    with torch.no_grad():
        flat.head.w_VD.zero_()
    assert bits_per_byte(flat.eval(), held).loss == pytest.approx(math.log(lm.vocab), rel=1e-12)


def budgets(lm: LM, tokens_BT: Tensor, ctx: Context) -> list[int]:
    """The FFN experts that the one router of a model gives each token."""
    moe = next(module for module in lm.modules() if isinstance(module, MoELayer))
    found: list[int] = []

    def keep(_: object, inputs: object, route: Any) -> None:
        found.extend((route.index_NS < moe.layout.num_ffn).sum(-1).tolist())

    handle = moe.router.register_forward_hook(keep)
    lm(tokens_BT, ctx)
    handle.remove()
    return found


def test_expert_use_is_that_of_the_router(lm: LM, prepared: Prepared) -> None:
    held = Heldout(prepared, 32, 4, FP32, CPU)
    use = expert_use(lm, held, num_batches=10_000)
    assert use is not None and use["layers"] == 1
    tokens: list[tuple[str, int]] = []
    for tokens_BT, _, ctx in held.batches():
        pairs = zip(tokens_BT.flatten().tolist(), budgets(lm, tokens_BT, ctx), strict=True)
        valid = ctx.valid_BT.flatten().tolist()
        text = prepared.tokenizer.token_text
        tokens += [(text(t), n) for (t, n), ok in zip(pairs, valid, strict=True) if ok]
    assert len(tokens) == sum(source.num_tokens for source in prepared.heldout)
    numbers: dict[str, list[int]] = defaultdict(list)
    for text_of, number in tokens:
        numbers[text_of].append(number)
    found = {text_of: (count, mean) for text_of, count, mean in use["by_token"]}
    assert found.keys() == numbers.keys()
    for text_of, (count, mean) in found.items():
        assert count == len(numbers[text_of])
        assert mean == pytest.approx(sum(numbers[text_of]) / count)
    assert 1 < len({number for _, number in tokens}) <= 4
    assert use["passage"] == tokens[: 4 * 32]


def test_a_model_without_router_has_no_expert_use(prepared: Prepared, reference: Path) -> None:
    run, _ = read_run(RunFolder.open(reference))
    dense = new_state(dense_twin(run), CPU).model
    assert expert_use(dense, Heldout(prepared, 32, 4, FP32, CPU)) is None


def test_evaluate_says_all_figures(lm: LM, prepared: Prepared, reference: Path) -> None:
    written: dict[str, Any] = {}
    figures = evaluate(
        lm,
        prepared,
        sequence_length=32,
        batch=4,
        dtype=FP32,
        device=CPU,
        seed=0,
        write=lambda name, data: written.update({name: data}),
    )
    summary = json.loads((reference / "summary.json").read_text())
    assert figures == {name: summary[name] for name in figures}
    assert written.keys() == {"tokens.json"}


# --- baselines, measured once a corpus ------------------------------------------------------------


@pytest.fixture
def own(corpus: Path, tmp_path: Path) -> Prepared:
    """The corpus prepared in a cache of its own."""
    place = Place(tmp_path, corpus, tmp_path / "cache")
    run = place.train("run", "stop_at=1")
    config, _ = read_run(RunFolder.open(run))
    return prepare(config.data, config.vocab)


def test_baselines_are_kept(own: Prepared) -> None:
    path = own.folder / "baselines.json"
    assert not path.exists()
    first = baselines(own)
    kept = json.loads(path.read_text())
    assert kept == {**first, "digest": own.digest}
    path.write_text(json.dumps({**kept, "xz_all_bits_per_byte": 1.25}))
    assert baselines(own) == {**first, "xz_all_bits_per_byte": 1.25}


@pytest.mark.parametrize("text", ["", '{"xz_all', "[]", "{}", '{"digest": "other", "xz_all": 1}'])
def test_a_torn_or_foreign_record_is_measured_again(text: str, own: Prepared) -> None:
    first = baselines(own)
    path = own.folder / "baselines.json"
    path.write_text(text)
    assert baselines(own) == first
    assert json.loads(path.read_text())["digest"] == own.digest


def test_a_cache_that_cannot_be_written_does_not_matter(own: Prepared) -> None:
    first = baselines(own)
    path = own.folder / "baselines.json"
    path.unlink()
    path.mkdir()
    assert baselines(own) == first
    shutil.rmtree(path)
