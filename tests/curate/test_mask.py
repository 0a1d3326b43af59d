"""Private data: what is found, what is not, and the step that masks it."""

import ipaddress
import itertools
import random
from pathlib import Path

import pytest

from moebius.curate.document import Document
from moebius.curate.private import PRIVATE_KINDS, PrivateKind, find, mask
from moebius.curate.steps.mask import Mask

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

FOUND: list[tuple[PrivateKind, str, str]] = [
    ("email", "Write to {}.", "jane.doe+list@mail.example.co.uk"),
    ("email", "({})", "o'brien@example.org"),
    ("email", "请联系{}。谢谢", "info@example.cn"),
    ("email", "<{}>", "rené@example.org"),
    ("email", "a, {}, b", "X_Y-9@a-b.example"),
    ("iban", "to {} please", "GB82 WEST 1234 5698 7654 32"),
    ("iban", "IBAN:{}.", "DE89370400440532013000"),
    ("iban", "{} BIC COBADEFF", "DE89 3704 0044 0532 0130 00"),
    ("card", "card {}, valid", "4111 1111 1111 1111"),
    ("card", "card {}.", "5500-0000-0000-0004"),
    ("card", "{}", "378282246310005"),
    ("card", "{} x", "3782 822463 10005"),
    ("ssn", "SSN {}.", "078-05-1120"),
    ("ip", "from {} at noon", "93.184.216.34"),
    ("ip", "http://{}/index", "93.184.216.34"),
    ("ip", "from {}.", "2606:2800:220:1:248:1893:25c8:1946"),
    ("ip", "from {}: no", "2606:2800::1946"),
    ("phone", "Tel.: {}", "030 1234567"),
    ("phone", "ring {}!", "+49 (0)30 1234-567"),
    ("phone", "ring {}", "+442079460958"),
    ("phone", "{} or so", "(415) 555-2671"),
    ("phone", "{}, ext", "415-555-2671"),
    ("phone", "12 {}", "1-800-555-2671"),
    ("phone", "call us at {}.", "555 26 71"),
    ("phone", "teléfono {}", "91 123 45 67"),
    ("phone", "电话\uff1a{}。", "010-12345678"),
]


@pytest.mark.parametrize(("kind", "frame", "data"), FOUND)
def test_found(kind: PrivateKind, frame: str, data: str) -> None:
    text = frame.format(data)
    assert [(text[f.start : f.end], f.kind) for f in find(text)] == [(data, kind)]
    assert mask(text)[0] == frame.format(f"<{kind.upper()}>")
    assert find(text, tuple(other for other in PRIVATE_KINDS if other != kind)) == []


@pytest.mark.parametrize(
    "text",
    [
        "He was born in 1815-04-01 and died 1882, on page 1234567.",
        "@media, @property.setter, user@localhost, a @ b.org, react@16.8.0, logo@2x.png",
        "Version 1.2.3.4 of the section 4.2.1.3, and 10.0.0.1, 192.168.1.1, 127.0.0.1, 300.1.2.3",
        "pkg-93.184.216.34-1 and /usr/lib/93.184.216.34/x and 93.184.216.34.5",
        "At 12:30:45 in std::vector, fe80::1, ::1, 2024:01:02, 3ffe",
        "4111 1111 1111 1112 and 1234567812345678 and 4111111111111111.5",
        "GB82 WEST 1234 5698 7654 33, DE89370400440532013000X, ZZ89370400440532013000",
        "000-12-3456, 666-12-3456, 912-12-3456, 078-00-1120, 078-05-0000, 1078-05-1120",
        "ISBN 978-3-16-148410-0, $1,234,567.89, 3.14159265358979, 252.227-7013",
        "1815-1882 1900-1950, 1 2 3 4 5 6 7 8 9 10 11, Decimal('+35236450.6')",
        "Tel 2024-05-06, telephone, call me 12",
        "0x1234567890, abc1234567890, 1+12345678901",
    ],
)
def test_not_found(text: str) -> None:
    assert find(text) == []


def test_cards_against_the_rule() -> None:
    """The Luhn sum written out, on random numbers of all lengths."""
    chance = random.Random(0)
    hits = 0
    for _ in range(3000):
        number = "4" + "".join(chance.choices("0123456789", k=15))
        total = 0
        for place, digit in enumerate(reversed(number)):
            value = int(digit) * (2 if place % 2 else 1)
            total += value - 9 if value > 9 else value
        hits += total % 10 == 0
        assert bool(find(f"a {number} b", ("card",))) == (total % 10 == 0)
    assert hits > 200


def test_public_addresses_against_ipaddress() -> None:
    chance = random.Random(1)
    for _ in range(2000):
        numbers = [chance.randrange(256) for _ in range(4)]
        text = ".".join(map(str, numbers))
        wanted = ipaddress.ip_address(text).is_global and max(numbers) >= 20
        assert bool(find(text, ("ip",))) == wanted


def test_several_in_one_text() -> None:
    text = "a@b.org, c@d.org; 415-555-2671 415-555-2672 / 078-05-1120 4111 1111 1111 1111"
    masked, found = mask(text)
    assert masked == "<EMAIL>, <EMAIL>; <PHONE> <PHONE> / <SSN> <CARD>"
    assert [text[f.start : f.end].strip("<>") for f in found] == [
        "a@b.org",
        "c@d.org",
        "415-555-2671",
        "415-555-2672",
        "078-05-1120",
        "4111 1111 1111 1111",
    ]
    assert find(masked) == []


@pytest.mark.parametrize(
    "unit", ["1", "1.", "1 ", "a@", "@a.", "2001:", "AB12", "+1 ", "1-", "(", "é@b.org ", "\x00"]
)
def test_long_hostile_texts_pass(unit: str) -> None:
    """What a search that is not linear would never finish."""
    text = (unit * (1 << 18))[: 1 << 18]
    found = find(text)
    assert all(a.end <= b.start for a, b in itertools.pairwise(found))


@pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not here")
def test_novels_and_poems_hold_none() -> None:
    paths = sorted((DATA / "text").rglob("*.txt"))
    assert len(paths) == 28
    found = [(p.name, f) for p in paths for f in find(p.read_text(encoding="utf-8"))]
    assert found == []


def test_the_step() -> None:
    decide = Mask(what=("email",)).build()
    document = decide(Document("k", "a@b.org 415-555-2671"))
    assert isinstance(document, Document)
    assert document.text == "<EMAIL> 415-555-2671"
    assert document.scores == {"pii": 1.0} and document.lineage == ("mask",)
    clean = decide(Document("k", "nothing"))
    assert isinstance(clean, Document)
    assert clean.lineage == () and clean.scores == {"pii": 0.0}
    assert not Mask().takes(Document("k", "", kind="code"))
    with pytest.raises(ValueError, match="nothing to mask"):
        Mask(what=())
