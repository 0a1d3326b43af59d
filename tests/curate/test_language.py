"""Language identification on the Universal Declaration of Human Rights, and its rules."""

from pathlib import Path

import pytest

from moebius.curate.document import Document, Dropped
from moebius.curate.languages import CODES, code_of, letters_by_script, macro_of
from moebius.curate.steps.language import Identifier, Language, stretches

pytest.importorskip("py3langid", reason="the curate extra is not installed")

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
UDHR = DATA / "lang" / "udhr"
GERMAN = (
    "Am Abend gingen die Kinder noch einmal hinunter zum Fluss, um den Booten zuzusehen, die "
    "langsam an den hellen Fenstern der Stadt vorbeizogen. "
)
ENGLISH = (
    "In the evening the children walked down to the river once more, to watch the boats that "
    "slowly passed the bright windows of the town. "
)


@pytest.fixture(scope="module")
def identifier() -> Identifier:
    return Identifier()


@pytest.mark.skipif(not UDHR.is_dir(), reason="shared/data is not here")
def test_lines_of_the_declaration(identifier: Identifier) -> None:
    """At least 97% of lines above 60 characters; every language but Indonesian above 94%."""
    right: dict[str, list[bool]] = {}
    for path in sorted(UDHR.glob("*.txt")):
        code = macro_of(path.stem.partition("_")[0])
        for line in path.read_text(encoding="utf-8").splitlines():
            if len(line.strip()) > 60:
                found, _ = identifier.identify(line.strip())
                right.setdefault(code, []).append(macro_of(found) == code)
    assert len(right) == 40
    flat = [hit for hits in right.values() for hit in hits]
    assert sum(flat) / len(flat) >= 0.99
    weak = {code for code, hits in right.items() if sum(hits) / len(hits) < 0.94}
    assert weak <= {"ind"}
    assert sum(right["ind"]) / len(right["ind"]) > 0.7


@pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not here")
@pytest.mark.parametrize(("folder", "code"), [("en", "eng"), ("es", "spa"), ("zh", "zho")])
def test_books(identifier: Identifier, folder: str, code: str) -> None:
    for path in sorted((DATA / "text" / folder).glob("*.txt")):
        assert identifier.identify(path.read_text(encoding="utf-8"))[0] == code


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Ο ήλιος ανατέλλει κάθε πρωί πάνω από τη θάλασσα.", "ell"),  # noqa: RUF001
        ("저는 내일 아침에 친구와 함께 산에 올라갈 것입니다.", "kor"),
        ("明日の朝、友達と一緒に山に登ります。", "jpn"),
        ("我们明天早上和朋友一起去爬山。", "zho"),
        ("მზე ყოველ დილით ამოდის ზღვაზე.", "kat"),
        ("เราจะไปภูเขากับเพื่อนพรุ่งนี้เช้า", "tha"),
        ("Завтра утром мы пойдём в горы и вернёмся только вечером.", "rus"),
        ("Завтра вранці ми з друзями підемо в гори й повернемося лише ввечері.", "ukr"),
        ("Saya tidak bisa datang karena mobil saya rusak dan uang saya habis.", "ind"),
        ("Saya tidak boleh datang kerana kereta saya rosak dan wang saya habis.", "msa"),
        ("MORGEN FRÜH GEHEN WIR MIT UNSEREN FREUNDEN IN DIE BERGE.", "deu"),
        ("12 345 + 67 = 12 412", "zxx"),
        ("", "zxx"),
        ("\ud800\x00", "zxx"),
    ],
)
def test_single_sentences(identifier: Identifier, text: str, code: str) -> None:
    assert identifier.identify(text)[0] == code


def test_most_of_the_text_wins_and_the_score_says_how_much(identifier: Identifier) -> None:
    mixed = ENGLISH * 4 + GERMAN * 10
    language, score = identifier.identify(mixed)
    assert language == "deu"
    assert 0.6 < score < 0.8
    assert identifier.identify(GERMAN * 10)[1] > 0.95
    assert identifier.identify(ENGLISH + "\n" + GERMAN * 200)[0] == "deu"


def test_addresses_do_not_count(identifier: Identifier) -> None:
    address = "https://www.example.com/the-quick-brown-fox-jumps-over-the-lazy-dog "
    assert identifier.identify(address * 3 + GERMAN)[0] == "deu"


def test_stretches_cover_short_texts_and_sample_long_ones() -> None:
    for length in (0, 1, 299, 300, 301, 1234, 2100):
        text = "".join(chr(0x4E00 + i) for i in range(length))
        assert "".join(stretches(text)) == text
    long = "".join(chr(0x4E00 + i % 20000) for i in range(50_000))
    parts = stretches(long)
    assert len(parts) == 7 and {len(part) for part in parts} == {300}
    assert parts[0] == long[:300] and parts[2] == long[-300:]


def test_the_step_keeps_and_drops() -> None:
    decide = Language(keep=("de", "cmn"), min_score=0.5).build()
    german = decide(Document("a", GERMAN))
    assert isinstance(german, Document)
    assert german.language == "deu" and german.scores["language"] > 0.9
    chinese = decide(Document("b", "我们明天早上和朋友一起去爬山。"))
    assert isinstance(chinese, Document) and chinese.language == "zho"
    english = decide(Document("c", ENGLISH))
    assert isinstance(english, Dropped) and english.reason == "other language"
    mixed = decide(Document("d", ENGLISH * 4 + GERMAN * 4 + "Завтра мы пойдём в лес. " * 15))
    assert isinstance(mixed, Dropped) and mixed.reason == "uncertain language"
    assert not Language().takes(Document("e", "x = 1", kind="code"))


def test_mistakes_of_the_user() -> None:
    with pytest.raises(ValueError, match="ISO 639-3"):
        Language(keep=("german",))
    with pytest.raises(ValueError, match="share"):
        Language(min_score=80.0)
    with pytest.raises(ValueError, match="'qqq'"):
        Language(keep=("qqq",)).build()


def test_codes() -> None:
    assert len(CODES) == 184
    assert [code_of(name) for name in ("en", "eng", "eng_Latn", "zh-TW")] == [
        "eng",
        "eng",
        "eng",
        "zho",
    ]
    members = {"arb": "ara", "pes": "fas", "cmn": "zho", "swh": "swa", "deu": "deu", "ind": "ind"}
    assert {code: macro_of(code) for code in members} == members


def test_letters_by_script() -> None:
    assert letters_by_script("a1-é ж ~日本ご") == {"Latin": 2, "Cyrillic": 1, "Han": 2, "Kana": 1}
    assert letters_by_script("1 2 ३ 。") == {}
