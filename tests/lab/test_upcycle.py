"""Sparse upcycling: experts that are the dense feed-forward, with its moments, and its outputs."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import moebius
from moebius import checkpoint
from moebius.checkpoint import complete
from moebius.lab.grow import grow
from moebius.lab.upcycle import upcycled, upcycled_from
from moebius.model.ffn.balance.group import GroupLoss
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.softmax import Softmax
from moebius.monitor.report import write_report
from moebius.optim.optimizer import Role
from moebius.optim.rules.adamw import AdamW
from moebius.optim.rules.muon import Muon
from moebius.train.fit import continue_run, fit
from moebius.train.run import Run

from .. import tiny
from ..running import Place, lines, losses, tree
from .runs import dense, placed

E = 4
RUNS = {
    "muon": dense(),
    "normuon": dense(Muon(normalise="normuon"), bias=True),
    "adamw": dense(AdamW(), bias=True),
}


def stopped(run: Run, place: Place, name: str) -> Path:
    return fit(placed(dataclasses.replace(run, stop_at=4), place), place.folder / name)


@pytest.fixture(scope="module", params=sorted(RUNS))
def parent(request: pytest.FixtureRequest, place: Place) -> Path:
    return stopped(RUNS[request.param], place, request.param)


@pytest.fixture(scope="module")
def sparse(parent: Path) -> Path:
    return grow(parent, parent.with_name(f"{parent.name}-sparse"), experts=E, top_k=2)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(complete(run / "checkpoints")[-1])[0]


def test_experts_are_the_feed_forward_with_its_moments(parent: Path, sparse: Path) -> None:
    old, new = tensors(parent), tensors(sparse)
    renamed = {
        "w_gate_up": "w_gate_up_E2FD",
        "w_down": "w_down_EDF",
        "b_gate_up": "b_gate_up_E2F",
        "b_down": "b_down_ED",
    }
    found: set[str] = set()
    for name, tensor in old.items():
        parts = name.split(".")
        leaf = next((part for part in parts if part in renamed), None)
        if leaf is None:
            assert torch.equal(new[name], tensor)
            found.add(name)
            continue
        expert_name = ".".join(renamed.get(part, part) for part in parts)
        assert new[expert_name].shape == (E, *tensor.shape)
        assert all(torch.equal(expert, tensor) for expert in new[expert_name])
        found.add(expert_name)
    left = new.keys() - found
    routers = {name for name in left if ".router.w_ED" in name}
    assert len(routers) == 2 * 3  # of each layer, the weight and its two moments
    assert all(name.endswith("rules.0.load") for name in left - routers)
    moments = [x for name, x in new.items() if name in routers and name.startswith("optim.")]
    assert len(moments) == 4 and not any(x.any() for x in moments)
    weights = [x for name, x in new.items() if name in routers and name.startswith("model.")]
    assert all(0.5 < float(x.std() * x.shape[1] ** 0.5) < 1.5 for x in weights)
    assert not torch.equal(*weights)


@torch.no_grad()
def test_the_first_output_is_the_parents(parent: Path, sparse: Path) -> None:
    old, new = moebius.load(parent)[0], moebius.load(sparse)[0]
    tokens_BT = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(5))
    expected = old(tokens_BT)
    assert (new(tokens_BT) - expected).abs().max() < 1e-5 * expected.abs().max()
    moe = new.lm.get_submodule("layers.0.ffn")
    route = moe.get_submodule("router")(torch.randn(64, 32), torch.zeros(E))
    assert route.index_NS.unique().tolist() == list(range(E))


def test_it_says_the_parents_loss_and_trains_on(parent: Path, sparse: Path, tmp_path: Path) -> None:
    grown = json.loads((sparse / "run.json").read_text())["grown"]
    assert grown.keys() == {"from", "step", "experts", "top_k", "parent_loss", "first_loss"}
    assert grown["first_loss"] == pytest.approx(grown["parent_loss"], rel=1e-5)
    whole, halted = (shutil.copytree(sparse, tmp_path / name) for name in ("whole", "halted"))
    continue_run(whole, ["stop_at=7"])
    continue_run(halted, ["stop_at=6"])
    continue_run(halted, ["stop_at=7"])
    assert losses(halted) == losses(whole) and len(losses(whole)) == 7
    assert lines(whole)[4]["loss"] == pytest.approx(grown["first_loss"], rel=1e-6)
    assert lines(whole)[6]["layers"].keys() == {"0", "1"} and lines(whole)[3]["layers"] == {}
    # The copies part at once: each sees tokens of its own.
    w_E2FD = tensors(whole)["model.layers.1.ffn.w_gate_up_E2FD"]
    assert all(not torch.equal(w_E2FD[0], other) for other in w_E2FD[1:])
    assert write_report(whole).is_file()


def test_routers_come_from_the_seed(place: Place, tmp_path: Path) -> None:
    found = []
    for i, seed in enumerate((0, 0, 1)):
        run = dataclasses.replace(dense(), seed=seed)
        path = stopped(run, place, f"seed-{i}")
        found.append(tensors(grow(path, tmp_path / f"{i}", experts=3)))
    name = "model.layers.0.ffn.router.w_ED"
    assert torch.equal(found[0][name], found[1][name])
    assert not torch.equal(found[0][name], found[2][name])


def test_another_rule_for_experts_begins_anew_and_says_so(place: Place, tmp_path: Path) -> None:
    run = dense()
    roles = {**run.optim.roles, "expert": Role(AdamW())}
    run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, roles=roles))
    said: list[str] = []
    out = grow(stopped(run, place, "mixed"), tmp_path / "out", experts=2, say=said.append)
    # Two weights of two layers: a momentum each before, two moments each now.
    assert "8 moments begin at zero and 4 are left out" in said[0]
    new = tensors(out)
    assert not new["optim.layers.0.ffn.w_down_EDF.second_moment"].any()
    assert continue_run(out, ["stop_at=5"]) == out


def test_a_recipe_without_a_rule_for_experts_is_refused(place: Place, tmp_path: Path) -> None:
    run = dense()
    roles = {role: rule for role, rule in run.optim.roles.items() if role != "expert"}
    run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, roles=roles))
    with pytest.raises(ValueError, match="no optimizer rule for role 'expert'"):
        grow(stopped(run, place, "ruleless"), tmp_path / "out", experts=2)
    assert tree(tmp_path) == []


def test_the_config_of_an_upcycled_run() -> None:
    config = upcycled(tiny.pattern().model, experts=8, top_k=3)
    first, second = config.layers
    expected = MoE(8, 64, 3, router=Softmax(renormalise=True), balance=(GroupLoss(),))
    assert vars(first)["ffn"] == expected
    # What is sparse already stays as it is.
    assert second == tiny.pattern().model.layers[1]
    assert vars(upcycled(RUNS["adamw"].model, 2, 2).layers[1])["ffn"].bias


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (tiny.tiny().model.layers, "layers.0 (ScMoE) has dense feed-forwards beside a MoE"),
        (tiny.wild().model.layers, "layers.2 (ScMoE) has dense feed-forwards beside a MoE"),
        (tiny.pattern().model.layers[1:], "no layer of this run has a dense feed-forward"),
    ],
)
def test_what_is_not_dense_is_refused(layers: tuple, said: str) -> None:
    config = dataclasses.replace(tiny.tiny().model, layers=layers)
    with pytest.raises(ValueError) as error:
        upcycled(config, experts=4, top_k=2)
    assert said in str(error.value)


def test_names_of_experts() -> None:
    parent = {"model.layers.0.ffn.w_down", "optim.layers.0.ffn.w_down.momentum", "model.a.w_ED"}
    assert upcycled_from("model.layers.0.ffn.w_down_EDF", parent) == "model.layers.0.ffn.w_down"
    assert (
        upcycled_from("optim.layers.0.ffn.w_down_EDF.momentum", parent)
        == "optim.layers.0.ffn.w_down.momentum"
    )
    assert upcycled_from("model.a.w_ED", parent) == "model.a.w_ED"
    assert upcycled_from("model.layers.0.ffn.router.w_ED", parent) is None
