"""Dirty words: what a match is, thresholds, languages, and what users are told."""

import re
from pathlib import Path

import pytest

from moebius.config import from_json, override, to_json
from moebius.curate.document import Document, Dropped
from moebius.curate.step import Filter
from moebius.curate.steps.dirty_words import DirtyWords

from .peers import DATA, articles, book_parts, needs_data, reason

LISTS = {"eng": "en", "spa": "es", "ita": "it", "zho": "zh"}
ANY = {"max_count": 0, "max_share": 0.0}


@pytest.fixture
def listed(tmp_path: Path) -> dict[str, str]:
    english = "bad\nBad Wolf\n\n  wolf's bane \ng-spot\ns&m\n13.\n\U0001f595\n"
    (tmp_path / "en.txt").write_text(english, "utf-8")
    (tmp_path / "zh.txt").write_text("坏话\n坏\n卖B\n", "utf-8")
    return {"eng": str(tmp_path / "en.txt"), "zho": str(tmp_path / "zh.txt")}


@pytest.mark.parametrize(
    ("text", "language", "matches"),
    [
        ("bad", "eng", 1),
        ("A BAD, bad day", "eng", 2),
        ("badly done, not_bad, unbad", "eng", 0),
        ("the bad wolf", "eng", 1),
        ("a bad\nwolf; the bad", "eng", 2),
        ("wolf's bane and wolf bane", "eng", 1),
        ("G spot, g-spot, gspot", "eng", 2),
        ("S&M and s & m and yes&mine", "eng", 1),
        ("In 2013. 13. 13", "eng", 1),
        ("so\U0001f595what", "eng", 1),
        ("他说坏话的人坏", "zho", 2),
        ("卖b的人卖B", "zho", 2),
        ("", "eng", 0),
        ("坏话", "eng", 0),
    ],
)
def test_matches(listed: dict[str, str], text: str, language: str, matches: int) -> None:
    for least in (matches - 1, matches):
        step = DirtyWords(lists=listed, max_count=least, max_share=0.0)
        expected = "dirty words" if 0 <= least < matches else ""
        if least >= 0:
            assert reason(step, text, language) == expected


def test_both_thresholds_must_be_exceeded(listed: dict[str, str]) -> None:
    step = DirtyWords(lists=listed, max_count=2, max_share=0.1)
    assert reason(step, "bad bad x y", "eng") == ""
    assert reason(step, "bad bad bad x y", "eng") == "dirty words"
    assert reason(step, "bad bad bad" + " x" * 27, "eng") == ""
    assert reason(step, "bad bad bad" + " x" * 26, "eng") == "dirty words"


def test_languages(listed: dict[str, str]) -> None:
    step = DirtyWords(lists=listed, **ANY)
    assert reason(step, "bad 坏话", "fra") == ""
    assert reason(step, "bad", "zho") == ""
    assert reason(step, "坏话", "cmn") == "dirty words"
    assert reason(DirtyWords(lists={"zh": listed["zho"]}, **ANY), "坏话", "zho") == "dirty words"
    assert reason(step, "bad") == reason(step, "坏话") == "dirty words"
    # Lists are not added up where the language is unknown.
    assert reason(DirtyWords(lists=listed, max_count=1, max_share=0.0), "bad 坏话") == ""


def test_entries_can_be_left_out(listed: dict[str, str]) -> None:
    assert reason(DirtyWords(lists=listed, **ANY, ignored=("BAD",)), "bad", "eng") == ""
    assert reason(DirtyWords(lists=listed, **ANY, ignored=("BAD",)), "bad wolf", "eng") != ""


def test_config_goes_through_json_and_overrides(listed: dict[str, str]) -> None:
    step = DirtyWords(lists=listed)
    assert from_json(Filter, to_json(step)) == step
    changed = override(step, ["max_count=7", "lists.eng=other.txt"])
    assert (changed.max_count, changed.lists["eng"]) == (7, "other.txt")


def test_users_are_told_what_to_do(listed: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs lists"):
        DirtyWords().build()
    with pytest.raises(ValueError, match="'english' is no language"):
        DirtyWords(lists={"english": listed["eng"]}).build()
    with pytest.raises(ValueError, match=r"cannot read its list .*absent\.txt"):
        DirtyWords(lists={"eng": str(tmp_path / "absent.txt")}).build()
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty\.txt of dirty_words is empty"):
        DirtyWords(lists={"eng": str(tmp_path / "empty.txt")}).build()
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot read its list"):
        DirtyWords(lists={"eng": str(tmp_path / "latin.txt")}).build()


@needs_data
@pytest.mark.parametrize(("language", "name"), [("eng", "en"), ("spa", "es"), ("ita", "it")])
def test_real_lists_equal_a_plain_search(language: str, name: str) -> None:
    """Of single words; phrases and overlaps are the matter of the cases above."""
    path = DATA / f"lists/ldnoobw/{name}.txt"
    entries = path.read_text("utf-8").casefold().split("\n")
    single = [entry for entry in entries if re.fullmatch(r"\w+", entry)]
    decide = DirtyWords(lists={language: str(path)}, **ANY).build()

    def drops(text: str) -> bool:
        return isinstance(decide(Document("a", text, language=language)), Dropped)

    for entry in single:
        assert drops(f"... ({entry.upper()})") and not drops(f"x{entry}x")
    pattern = re.compile(
        "|".join(rf"(?<!\w){re.escape(entry)}(?!\w)" for entry in entries if entry)
    )
    for text in articles()[:5] if language == "eng" else book_parts("es", 300, 2):
        assert drops(text) == bool(pattern.search(text.casefold()))


@needs_data
def test_clean_texts_stay() -> None:
    lists = {code: str(DATA / f"lists/ldnoobw/{name}.txt") for code, name in LISTS.items()}
    step = DirtyWords(lists=lists)
    for language, name in (("eng", "en"), ("spa", "es"), ("zho", "zh")):
        for text in book_parts(name, 4000, 2):
            assert reason(step, text, language) == ""
    assert [reason(step, text, "eng") for text in articles()] == [""] * len(articles())
