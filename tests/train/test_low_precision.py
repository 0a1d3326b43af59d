"""Runs in low-precision formats: they learn, resume exactly, and say in run.json what they are."""

import json

import pytest
import torch

import moebius
from moebius.config import fingerprint, from_json, override, to_json
from moebius.model.weight import named_weights
from moebius.ops.formats import Format, Product
from moebius.ops.formats.fp8 import FP8
from moebius.ops.formats.mx import MXFP8
from moebius.ops.formats.nvfp4 import NVFP4
from moebius.train.precision import DTYPES, products_of
from moebius.train.run import Run
from moebius.train.state import new_state

from ..running import RECIPES, UNJUDGED, Place, lines, losses
from ..tiny import pattern, tiny

STOCHASTIC = '{"format": "nvfp4", "stochastic": true}'


@pytest.fixture(scope="module")
def plain(place: Place) -> dict[int, str]:
    return losses(place.train("plain", "precision=bf16", "stop_at=8", UNJUDGED))


@pytest.mark.parametrize("name", Format.TABLE)
def test_a_run_learns_in_each_format(name: str, plain: dict[int, str], place: Place) -> None:
    run = place.train(name, f"precision={name}", "stop_at=8", UNJUDGED)
    found = [line["loss"] for line in lines(run)]
    assert found[-1] < found[0] - 1.0
    record = json.loads((run / "run.json").read_text())
    assert record["precision"] == record["run"]["precision"] == name
    # It is another run than bf16's from the first step on, and near it.
    theirs = [float.fromhex(text) for text in plain.values()]
    assert found[0] != theirs[0] and found[0] == pytest.approx(theirs[0], rel=0.02)
    assert found[-1] == pytest.approx(theirs[-1], rel=0.1)
    # What is loaded is multiplied as any other model.
    model, _ = moebius.load(run)
    assert all(weight.product is None for _, weight in named_weights(model.lm))
    assert {weight.dtype for _, weight in named_weights(model.lm)} == {torch.float32}


def test_stochastic_rounding_resumes_exactly(place: Place) -> None:
    fields = ("precision=nvfp4", f'products={{"expert": {STOCHASTIC}, "matrix": {STOCHASTIC}}}')
    whole = place.train("stochastic", *fields, "stop_at=5", UNJUDGED)
    stopped = place.train("stochastic-stopped", *fields, "stop_at=3", UNJUDGED)
    done = place.cli("train", "--resume", stopped, "stop_at=5")
    assert done.code == 0, done.err
    assert losses(stopped) == losses(whole)
    nearest = place.train("nearest", "precision=nvfp4", "stop_at=2", UNJUDGED)
    # The first loss has seen no gradient yet.
    assert [losses(whole)[step] == losses(nearest)[step] for step in (1, 2)] == [True, False]


def test_the_measurement_of_auto_draws_nothing(place: Place) -> None:
    products = f'products={{"expert": {STOCHASTIC}}}'
    run = place.train("auto", "precision=auto", products, "stop_at=2", UNJUDGED)
    name = json.loads((run / "run.json").read_text())["precision"]
    same = place.train("named", f"precision={name}", products, "stop_at=2", UNJUDGED)
    assert losses(run) == losses(same)


def test_precision_is_short_for_products() -> None:
    run = override(tiny(), ["precision=mxfp8"])
    assert products_of(run) == dict.fromkeys(("matrix", "expert"), Product(MXFP8()))
    assert DTYPES[run.precision] == torch.bfloat16
    assert products_of(tiny()) == {}


def test_products_override_role_by_role() -> None:
    assignments = [
        "precision=nvfp4",
        'products={"expert": {"format": {"use": "fp8", "gradient": "e5m2"}, "backward": "input"}}',
    ]
    run = override(tiny(), assignments)
    detailed = Product(FP8("e5m2"), "input")
    assert products_of(run) == {"matrix": Product(NVFP4()), "expert": detailed}
    run = override(run, ["products.expert.backward=none", "products.expert.format=mxfp8"])
    assert run.products == {"expert": Product(MXFP8(), "none")}
    run = override(run, ['products={"matrix": null}'])
    assert products_of(run) == {"matrix": None, "expert": Product(NVFP4())}
    assert from_json(Run, json.loads(json.dumps(to_json(run)))) == run


def test_products_identify_a_run() -> None:
    overrides = [
        [],
        ["precision=fp8"],
        ["precision=nvfp4"],
        ['products={"expert": {"format": "fp8"}}'],
        ['products={"expert": {"format": "fp8", "stochastic": true}}'],
    ]
    assert len({fingerprint(override(tiny(), some)) for some in overrides}) == len(overrides)


def test_weights_carry_the_products_of_their_role() -> None:
    run = override(pattern(), ["precision=fp8", 'products={"expert": {"format": "nvfp4"}}'])
    found: dict[str, set[str]] = {}
    for _, weight in named_weights(new_state(run, torch.device("cpu")).model):
        format = "-" if weight.product is None else type(weight.product.format).__name__
        found.setdefault(weight.role, set()).add(format)
    assert found.pop("matrix") == {"FP8"} and found.pop("expert") == {"NVFP4"}
    assert "router" in found and set.union(*found.values()) == {"-"}


@pytest.mark.parametrize(
    ("recipe", "field", "says"),
    [
        ("tiny", "precision=nvfp8", "did you mean 'nvfp4'"),
        ("tiny", 'products={"router": {"format": "fp8"}}', "the router stays in fp32"),
        ("tiny", 'products={"experts": {"format": "fp8"}}', "did you mean 'expert'"),
        ("tiny", 'products={"expert": {"format": "fp9"}}', "unknown number format 'fp9'"),
        ("tiny", 'products={"expert": {}}', "Product needs format"),
        ("dense", 'products={"expert": {"format": "fp8"}}', "no weight of this model has that"),
    ],
)
def test_what_cannot_be_is_said(recipe: str, field: str, says: str, place: Place) -> None:
    dense = [
        'model.layers=[{"use": "prenorm", "mixer": {"use": "gqa", "heads": 2, "kv_heads": 1, '
        '"head_width": 8}, "ffn": {"use": "dense", "hidden": 16}}]',
        "model.ends=[]",
    ]
    more = dense if recipe == "dense" else []
    done = place.cli("train", f"{RECIPES}:tiny", *place.fields(*more, field), "--out", "refused")
    assert says in done.error
    assert not (place.folder / "refused").exists()


def test_a_run_cannot_change_its_products(place: Place) -> None:
    run = place.train("fixed", "precision=fp8", "stop_at=1", UNJUDGED)
    done = place.cli("train", "--resume", run, 'products={"expert": {"format": "nvfp4"}}')
    assert "this run cannot change products" in done.error
