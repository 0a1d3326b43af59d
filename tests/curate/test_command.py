"""`moebius curate` as a user runs it: a recipe of his own, its table, its mix, its mistakes."""

import json
import shlex
from pathlib import Path

import pytest

from ..running import Place, write_corpus

pytest.importorskip("pyarrow", reason="the curate extra is not installed")

RECIPE = '''
"""Two folders of texts, mixed."""

from moebius.curate.config import Curation
from moebius.curate.mix import Group, Mix
from moebius.curate.read.texts import Texts
from moebius.curate.steps.exact_dedup import ExactDedup


def books():
    """Books and the same books."""
    sources = (Texts(path="FOLDER/a", name="a"), Texts(path="FOLDER/b", name="b"))
    groups = (Group("first", sources=("a",), weight=3.0), Group("rest"))
    mix = Mix(groups=groups)
    return Curation("books", sources, (ExactDedup(),), mix, engine="local")


def wrong():
    """No curation."""
    return 3
'''


@pytest.fixture(scope="module")
def made(place: Place) -> tuple[Place, Path, str]:
    """A corpus curated through the command line."""
    home = place.folder / "curated"
    home.mkdir()
    for name in ("a", "b"):
        write_corpus(home / name)
    (home / "b" / "own.txt").write_text(
        "a text that stands in one folder alone, and only there\n" * 40
    )
    recipe = home / "mine.py"
    recipe.write_text(RECIPE.replace("FOLDER", str(home)))
    done = place.cli("curate", f"{recipe}:books", "--out", home / "out")
    assert done.code == 0, done.err
    return place, home, done.out


def test_the_table_says_what_was_dropped(made: tuple[Place, Path, str]) -> None:
    _, home, out = made
    counts = json.loads((home / "out" / "counts.json").read_text())
    dropped = counts["steps"][0]["dropped"]["exact duplicate"][0]
    assert dropped > 0 and f"exact duplicate {dropped}" in " ".join(out.split())
    assert counts["kept"]["by_group"]["rest"][0] == 1
    assert (home / "out" / "report.html").stat().st_size > 10_000


def test_a_mix_trains_as_it_says(made: tuple[Place, Path, str]) -> None:
    place, home, _ = made
    said = place.cli("curate", "mix", home / "out", "--tokens", "16384")
    assert said.code == 0, said.err
    assert "75% of first" in said.err and "25% of rest" in said.err
    command = shlex.split(said.out)
    assert command[:3] == ["moebius", "train", "quickstart"]
    fields = dict(text.split("=", 1) for text in command[3:])
    sources = json.loads(fields["data"])["sources"]
    assert [source["weight"] for source in sources] == [0.75, 0.25]
    assert int(fields["steps"]) == 4
    assert all(Path(source["path"]).is_dir() for source in sources)


def test_the_report_can_be_written_again(made: tuple[Place, Path, str]) -> None:
    place, home, _ = made
    page = home / "out" / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert place.cli("curate", "report", home / "out").out.strip() == str(page)
    assert page.read_bytes() == before


def test_mistakes_are_one_line(made: tuple[Place, Path, str], tmp_path: Path) -> None:
    place, home, _ = made
    mine = home / "mine.py"
    cases = {
        ("webb",): "unknown recipe 'webb'; did you mean 'web'",
        (f"{mine}:wrong",): "returned int, not a moebius.curate.config.Curation",
        ("web", f"sources.0.path={tmp_path / 'no'}"): "no",
        ("web", "steps.0.second=3"): "Extract has no field 'second'; did you mean 'seconds'",
        ("mix", str(tmp_path)): "holds no finished curation",
        ("report",): "say which: moebius curate report FOLDER",
    }
    for arguments, said in cases.items():
        assert said in place.cli("curate", *arguments, "--out", tmp_path / "out").error
    assert not (tmp_path / "out").exists()


def test_curations_are_listed(made: tuple[Place, Path, str]) -> None:
    rows = made[0].cli("recipes", "--json").data()
    assert {row["name"] for row in rows if row["verb"] == "curate"} >= {"web", "crawl", "library"}
