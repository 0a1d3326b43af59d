"""Groups take documents in order; shares are checked; what comes out is what a run trains on."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.config import from_json, to_json
from moebius.curate.document import Document
from moebius.curate.mix import Group, Mix, MixStage, four_stages, group_of
from moebius.curate.mixed import check, data_config, plan, share_out, train_fields
from moebius.data.mixture import Mixture

from ..running import RECIPES, UNJUDGED, Place, lines


def test_the_first_group_that_takes_a_document_has_it() -> None:
    mix = Mix(
        (
            Group("long", kinds=("prose",), min_bytes=100),
            Group("code", labels=(("content", "code"), ("content", "math"), ("form", "page"))),
            Group("best", sources=("a", "b"), min_scores=(("quality", 0.5),)),
            Group("foreign", languages=("deu", "fra")),
        )
    )
    page = {"content": "code", "form": "page"}
    expected = [
        (Document("1", "é" * 50, kind="prose", labels=page), "long"),
        (Document("2", "é" * 49, kind="prose", labels=page), "code"),
        (Document("3", "é" * 50, kind="web", labels={**page, "content": "math"}), "code"),
        (Document("4", "x", labels={"content": "code"}, language="fra"), "foreign"),
        (Document("5", "x", source="b", scores={"quality": 0.5}, language="fra"), "best"),
        (Document("6", "x", source="c", scores={"quality": 0.9}), "unmatched"),
        (Document("7", "x", source="a", scores={"other": 0.9}, language="deu"), "foreign"),
        (Document("8", "x", source="a", scores={"quality": 0.4}), "unmatched"),
    ]
    assert [group_of(mix, document) for document, _ in expected] == [name for _, name in expected]
    rest = Mix((*mix.groups, Group("other")))
    assert group_of(rest, expected[5][0]) == "other"
    assert group_of(Mix(), expected[0][0]) == "other"


def test_the_four_stages() -> None:
    mix = four_stages()
    shares = {stage.name: dict(stage.weights) for stage in mix.stages}
    assert shares["mid-train"]["stem"] + shares["mid-train"]["code"] == pytest.approx(0.7)
    assert shares["long"]["long"] == 0.25
    rest = {name: share / 0.75 for name, share in shares["long"].items() if name != "long"}
    known = {n: s / 0.95 for n, s in shares["pretrain"].items() if n != "long"}
    assert rest == pytest.approx(known, abs=0.01)
    book = Document("b", "word " * 30_000, kind="prose", language="eng")
    assert group_of(mix, book) == "long"
    assert group_of(mix, dataclasses.replace(book, text="word")) == "general"
    assert group_of(mix, dataclasses.replace(book, text="mot", language="fra")) == "multilingual"
    assert group_of(mix, Document("w", "x", labels={"content": "reasoning"})) == "stem"
    assert from_json(Mix, json.loads(json.dumps(to_json(mix)))) == mix


HALVES = (("a", 0.5), ("b", 0.5))


def two(*stages: MixStage) -> Mix:
    return Mix((Group("a", sources=("x",), max_epochs=2.0), Group("b", weight=3.0)), stages)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MixStage("s", (("a", 0.5), ("b", 0.4))), "stage s sum to 0.9, not 1: a 0.5, b 0"),
        (lambda: MixStage("s", (("a", 0.5), ("a", 0.5))), "names group 'a' twice"),
        (lambda: MixStage("s", (("a", 1.5), ("b", -0.5))), "share of a in stage s must be in 0..1"),
        (lambda: MixStage("s", HALVES, 0.0), "share_of_tokens of stage s must be above 0"),
        (lambda: two(MixStage("s", HALVES, 0.5)), "share_of_tokens of the stages sums to 0.5"),
        (lambda: two(MixStage("s", (("aa", 1.0),))), "a share to 'aa', which is no group; did you"),
        (lambda: two(*[MixStage("s", HALVES, 0.5)] * 2), "two stages 's'"),
        (lambda: Mix((Group("a"), Group("b"))), "group a asks for nothing and takes every"),
        (lambda: Mix((Group("a", kinds=("web",)), Group("a"))), "two groups 'a'"),
        (lambda: Mix(()), "a mix needs a group"),
        (lambda: Group("unmatched"), "names a folder"),
        (lambda: Group("../up"), "names a folder"),
        (lambda: Group("a", weight=0.0), "weight of group a must be above 0"),
        (lambda: Group("a", max_epochs=0.0), "max_epochs of group a must be above 0"),
    ],
)
def test_what_is_no_mix_is_refused(make, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def write_groups(folder: Path, *names: str) -> Path:
    """A curation's folder with documents of these groups."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet needs the curate extra")
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs the curate extra")
    for name in names:
        place = folder / "documents" / name
        place.mkdir(parents=True)
        texts = [f"{name} document {i}\n" + f"{name} {i} {i * 7}\n" * (9 + i) for i in range(30)]
        keys = [f"{name}-{i}" for i in range(30)]
        parquet.write_table(pyarrow.table({"key": keys, "text": texts}), place / "0.parquet")
    return folder


def test_sources_of_a_stage_and_of_a_whole_run(tmp_path: Path) -> None:
    folder = write_groups(tmp_path, "a", "b")
    stages = (MixStage("one", HALVES, 0.75), MixStage("two", (("b", 1.0),), 0.25))
    config = data_config(two(*stages), folder)
    found = [(Path(s.path).name, s.weight, s.max_epochs) for s in config.sources]
    assert found == [("a", 0.375, 2.0), ("b", 0.625, None)]
    one = data_config(two(*stages), folder, "one").sources
    assert [source.weight for source in one] == [0.5, 0.5]
    (only,) = data_config(two(*stages), folder, "two").sources
    assert only.path == str(folder / "documents" / "b") and only.weight == 1
    assert [source.weight for source in data_config(two(), folder).sources] == [0.25, 0.75]
    with pytest.raises(ValueError, match="no stage 'thre'"):
        data_config(two(*stages), folder, "thre")
    unused = Mix((*two().groups[:1], Group("c", languages=("fra",)), Group("b")), stages)
    assert data_config(unused, folder) == config
    with pytest.raises(ValueError, match="group c has a share in the mix and no documents"):
        data_config(dataclasses.replace(unused, stages=()), folder)


def test_stages_begin_after_whole_steps() -> None:
    stages = [(0.8, "x"), (0.13, "y"), (0.07, "z")]
    mix = two(*(MixStage(name, HALVES, share) for share, name in stages))
    found = plan(mix, 100_999, 1000)
    assert [item.at_tokens for item in found] == [0, 80_000, 93_000]
    assert [item.tokens for item in found] == [80_000, 13_000, 7000]
    with pytest.raises(ValueError, match=r"stage z has 0\.07 of 3 steps, which is none"):
        plan(mix, 3000, 1000)


def test_a_run_trains_on_the_mix_stage_by_stage(place: Place, tmp_path: Path) -> None:
    folder = write_groups(tmp_path, "a", "b")
    mix = two(
        MixStage("one", (("b", 1.0),), 0.5),
        MixStage("two", HALVES, 0.25),
        MixStage("long", (("a", 0.25), ("b", 0.75)), 0.25, 64, 1e6),
    )
    fields = train_fields(mix, folder, tokens=8 * 128, batch=4, sequence_length=32)
    out = ["--out", tmp_path / "run"]
    more = [f"data.cache={place.cache}", UNJUDGED, "threads=1"]
    done = place.cli("train", f"{RECIPES}:tiny", *fields, *more, *out)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "run/run.json").read_text())["run"]
    assert record["weights"] == [0, 1] and record["steps"] == 8
    given = [(stage["at_tokens"], stage["weights"]) for stage in record["stages"]]
    assert given == [(512, [0.5, 0.5]), (768, [0.25, 0.75])]
    assert [line["sequence_length"] for line in lines(tmp_path / "run")] == [32] * 6 + [64] * 2
    first = two(MixStage("one", (("b", 1.0),), 1.0, 64))
    with pytest.raises(ValueError, match="stage one comes first"):
        train_fields(first, folder, tokens=1024, batch=4, sequence_length=32)


# --- epochs ---------------------------------------------------------------------------------------


def test_epochs_and_the_caps_that_bind() -> None:
    # 1000 and 4000 tokens to train on; `a` may be read twice.
    sizes = {"a": 4445, "b": 17_778}
    mix = two(MixStage("one", (("a", 0.25), ("b", 0.75)), 0.8), MixStage("two", HALVES, 0.2))
    needs = check(mix, sizes, 5000)
    found = [(n.stage, n.group, round(n.epochs, 2), round(n.epochs_so_far, 2)) for n in needs]
    assert found == [
        ("one", "a", 1.0, 1.0),
        ("one", "b", 0.75, 0.75),
        ("two", "a", 0.5, 1.5),
        ("two", "b", 0.12, 0.87),
    ]
    assert not any(need.binds for need in needs)
    last = check(mix, sizes, 9000)[2:]
    assert [need.binds for need in last] == [True, False]
    assert last[0].epochs_so_far == pytest.approx(2.0)
    assert last[1].given - last[1].asked == pytest.approx(last[0].asked - last[0].given)
    assert last[0].describe() == (
        "stage two asks 50.0% of a and gets 11.1%: max_epochs=2 is reached"
    )
    with pytest.raises(ValueError, match="group b has a share in the mix and no documents"):
        check(mix, {"a": 4445}, 100)
    only = two(MixStage("one", (("a", 1.0),)))
    with pytest.raises(ValueError, match=r"needs 2,001 tokens and its groups give 2,000 within"):
        check(only, sizes, 2001)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_what_groups_give_is_what_the_trainer_draws(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    weights = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    caps = data.draw(
        st.lists(st.none() | st.integers(0, 60), min_size=count, max_size=count).filter(any)
    )
    mixture = Mixture([float(weight) for weight in weights], caps)
    total = data.draw(st.integers(1, 100 if mixture.total is None else max(1, mixture.total)))
    if mixture.total is not None and mixture.total < total:
        return
    names = [str(i) for i in range(count)]
    left = {n: float("inf") if cap is None else cap for n, cap in zip(names, caps, strict=True)}
    found = share_out(total, dict(zip(names, weights, strict=True)), left)
    assert sum(found.values()) == pytest.approx(total)
    for name, drawn in zip(names, mixture.counts(total), strict=True):
        # Every source that left has left up to a sequence early or late.
        assert abs(found[name] - drawn) < 1 + count
