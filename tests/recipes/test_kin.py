"""The small kin: of the size they promise, of their parent's structure, and they train."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.config import Variant, fields, override
from moebius.model.block import BlockConfig
from moebius.model.count import count_config
from moebius.recipes import TABLE, listing, recipe
from moebius.train.fit import fit
from moebius.train.session import check

from ..running import UNJUDGED, lines

PARENT = {
    "longcat": "longcat-flash",
    "hunyuan": "hunyuan-large",
    "llama3": "llama3-8b",
    "deepseek": "deepseek-v3",
    "qwen3": "qwen3-30b-a3b",
    "olmoe": "olmoe-1b-7b",
    "kimi-linear": "kimi-linear-48b-a3b",
}
KIN = [name for name in TABLE if name.endswith(("-nano", "-small"))]
NANO = [name for name in KIN if name.endswith("-nano")]
# What a kin may set otherwise: the stretch of a finished model's positions, devices to balance.
MAY_DIFFER = {"rope_scaling", "groups"}


def skeleton(value: Any) -> Any:
    """A config without its numbers: kinds of parts, what is on or off, what is there at all."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(type(value)) if field.name not in MAY_DIFFER]
        kind = type(value).__name__ if isinstance(value, Variant) else ""
        return (kind, *(skeleton(getattr(value, name)) for name in names))
    if isinstance(value, tuple):
        return tuple(skeleton(item) for item in value)
    return value if isinstance(value, bool | str | None) else "number"


def kinds(layers: tuple[BlockConfig, ...]) -> list[Any]:
    """The kinds of layers in the order in which they first come."""
    return list(dict.fromkeys(skeleton(layer) for layer in layers))


def test_every_recipe_says_what_it_is_and_has_the_name_it_is_called_by() -> None:
    for row in listing():
        assert len(row["what"]) > 20 and row["what"].endswith(".")
    assert all(recipe(name).name == name for name in TABLE)


def test_every_architecture_has_both_kin() -> None:
    families = {name.rsplit("-", 1)[0] for name in KIN}
    assert families == {*PARENT, "nsa"}
    assert {f"{family}-{size}" for family in families for size in ("nano", "small")} == set(KIN)


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_can_be_trained(name: str) -> None:
    """All but the data and the memory: optimizer, schedule and stages fit."""
    assert check(recipe(name)).total > 0


@pytest.mark.parametrize("name", KIN)
def test_kin_are_of_their_size(name: str) -> None:
    run = recipe(name)
    counts = count_config(run.model, run.vocab, run.sequence_length)
    if name in NANO:
        assert 5e6 <= counts.total <= 30e6 and 2.5e6 <= counts.active_mean <= 6e6
    else:
        assert 0.15e9 <= counts.active_mean <= 0.3e9


@pytest.mark.parametrize("name", [name for name in KIN if not name.startswith("nsa")])
def test_kin_have_the_structure_of_their_parent(name: str) -> None:
    family = name.rsplit("-", 1)[0]
    own, parent = recipe(name), recipe(PARENT[family])
    assert kinds(own.model.layers) == kinds(parent.model.layers)
    rest = [dataclasses.replace(run.model, layers=()) for run in (own, parent)]
    assert skeleton(rest[0]) == skeleton(rest[1])
    experts = [role.lr for role in (own.optim.roles["expert"], parent.optim.roles["expert"])]
    assert experts[0] == experts[1]


def test_the_hybrid_has_its_full_layers_where_the_paper_has_them() -> None:
    layers = recipe("kimi-linear-48b-a3b").model.layers
    names = [type(layer.mixer).__name__ for layer in layers]  # pyright: ignore
    assert [i for i, name in enumerate(names, 1) if name == "MLA"] == [4, 8, 12, 16, 20, 24, 27]
    assert names.count("KDA") == 20


@pytest.fixture
def emptied(tmp_path: Path) -> Iterator[Path]:
    """A place for a run whose checkpoint of 100 MB nobody needs afterwards."""
    yield tmp_path / "run"
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize("name", NANO)
def test_a_nano_trains(name: str, emptied: Path, cache: Path, one_thread: None) -> None:
    source = Path(__file__).resolve().parents[2] / "src" / "moebius" / "optim"
    small = ["steps=2", "batch=2", "sequence_length=64", "vocab=300", "threads=1"]
    place = [f"data.path={source}", f"data.cache={cache}", UNJUDGED, "matmul_flops=1e11"]
    run = override(recipe(name), [*small, *place, "precision=fp32", "device=cpu"])
    fit(run, emptied)
    losses = [line["loss"] for line in lines(emptied)]
    # A tied head starts by expecting the token it has just read, which costs a few nats.
    start = math.log(300) + (3.0 if recipe(name).model.tied else 1.0)
    assert len(losses) == 2 and losses[1] < losses[0] < start
    assert torch.get_num_threads() == 1
