"""Block lists for addresses, against plain reading of the rule."""

import gzip
import random
from pathlib import Path

import pytest

from moebius.curate.document import Document, Dropped
from moebius.curate.steps.url_list import UrlList


def verdict(step: UrlList, url: str) -> str:
    """Why the address is dropped, with what was found; empty where it is not."""
    document = Document("key", "text", url=url)
    found = step.build()(document)
    if isinstance(found, Dropped):
        return f"{found.reason}: {found.detail}"
    assert found is document
    return ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "domains").write_text("# bad ones\nbad.org  # so it is\nwww.worse.com\n\n*.co.xx\n")
    (tmp_path / "hosts").write_text("0.0.0.0 tracker.net\n127.0.0.1 ads.example.net\n")
    (tmp_path / "addresses").write_text("https://www.mixed.org/shop/\nmixed.org/list?id=7\n")
    with gzip.open(tmp_path / "parts.gz", "wb") as file:
        file.write("xxxx\nbücher-sünde\n".encode())
    (tmp_path / "words").write_text("casino\n")
    (tmp_path / "soft").write_text("hot\nfree\nwild\n")
    return tmp_path


@pytest.fixture
def step(folder: Path) -> UrlList:
    return UrlList(
        domains=(str(folder / "domains"), str(folder / "hosts")),
        addresses=(str(folder / "addresses"),),
        parts=(str(folder / "parts.gz"),),
        words=(str(folder / "words"),),
        soft_words=(str(folder / "soft"),),
    )


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("http://bad.org/", "listed domain: bad.org"),
        ("https://a.b.BAD.org:8080/x?y", "listed domain: bad.org"),
        ("http://user@bad.org", "listed domain: bad.org"),
        ("http://worse.com/x", "listed domain: worse.com"),
        ("http://deep.co.xx/x", "listed domain: co.xx"),
        ("http://tracker.net/", "listed domain: tracker.net"),
        ("http://notbad.org/", ""),
        ("http://bad.org.example.com/", ""),
        ("http://example.net/", ""),
        ("http://mixed.org/shop", "listed address: mixed.org/shop"),
        ("http://www.mixed.org/shop/a/b?c", "listed address: mixed.org/shop"),
        ("http://mixed.org/shopping", ""),
        ("http://mixed.org/list?id=7", "listed address: mixed.org/list?id=7"),
        ("http://mixed.org/list?id=77", ""),
        ("http://example.org/aXXXXb", "listed word in address: xxxx"),
        ("http://example.org/casino-royale", "listed word in address: casino"),
        ("http://example.org/casinos", ""),
        ("http://example.org/hot-tea", ""),
        ("http://example.org/hot/hot/hot", ""),
        (
            "http://hot.example.org/the_wild",
            "several suspect words in address: hot wild",
        ),
        ("", ""),
        ("nothing", ""),
    ],
)
def test_rules(step: UrlList, url: str, wanted: str) -> None:
    assert verdict(step, url) == wanted


def test_soft_limit_is_the_number_of_different_words(folder: Path) -> None:
    three = UrlList(soft_words=(str(folder / "soft"),), soft_limit=3)
    assert verdict(three, "http://a.org/hot-free") == ""
    assert verdict(three, "http://a.org/hot-free-wild")


def test_many_domains_against_suffix_search(tmp_path: Path) -> None:
    chance = random.Random(0)
    names = ["".join(chance.choices("abc", k=2)) for _ in range(9)]
    listed = {".".join(chance.choices(names, k=chance.choice([2, 3]))) for _ in range(40)}
    (tmp_path / "list").write_text("\n".join(sorted(listed)))
    decide = UrlList(domains=(str(tmp_path / "list"),)).build()
    hits = 0
    for _ in range(400):
        host = ".".join(chance.choices(names, k=chance.choice([2, 3, 4])))
        wanted = any(host == name or host.endswith("." + name) for name in listed)
        found = decide(Document("key", "", url=f"http://{host}/x"))
        assert isinstance(found, Dropped) == wanted
        hits += wanted
    assert 40 < hits < 360


def test_mistakes_of_the_user(tmp_path: Path) -> None:
    empty, packed, wide = (tmp_path / name for name in ("empty", "packed.gz", "wide"))
    empty.write_text("# nothing\n")
    packed.write_bytes(gzip.compress(b"bad.org\n" * 100)[:-12])
    wide.write_text("a" * 600_000)
    with pytest.raises(ValueError, match="names no list"):
        UrlList().build()
    with pytest.raises(ValueError, match="there is no list"):
        UrlList(domains=(str(tmp_path / "absent"),)).build()
    with pytest.raises(ValueError, match="no entry"):
        UrlList(words=(str(empty),)).build()
    with pytest.raises(ValueError, match="cannot be read"):
        UrlList(domains=(str(packed),)).build()
    with pytest.raises(ValueError, match="too long"):
        UrlList(domains=(str(wide),)).build()
    with pytest.raises(ValueError, match="soft_limit"):
        UrlList(soft_limit=0)
