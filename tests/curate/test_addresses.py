"""Parts of addresses, and the sites they belong to."""

from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebius.curate.addresses import registered_domain, site_of, split_address


@pytest.mark.parametrize(
    "url",
    [
        "https://Example.ORG/a/b?c=d&e#f",
        "http://user:secret@news.example.co.uk:8080/x",
        "http://[2001:db8::1]/x",
        "ftp://example.org",
        "//example.org/x?y",
        "https://example.org:443/?q=a/b?c",
    ],
)
def test_parts_as_the_standard_library_sees_them(url: str) -> None:
    """`urllib` is the reference, with its host and port taken apart."""
    found, wanted = split_address(url), urlsplit(url)
    host = found.host.strip("[]")
    assert (found.scheme, host) == (wanted.scheme, wanted.hostname)
    assert found.port == ("" if wanted.port is None else str(wanted.port))
    assert (found.path, found.query) == (wanted.path, wanted.query)


@pytest.mark.parametrize("url", ["", "  ", "mailto:a@b.org", "javascript:void(0)", "no address"])
def test_what_is_no_address_has_no_host(url: str) -> None:
    assert split_address(url).host == ""
    assert site_of(url) == ""


def test_letters_that_stand_for_others_make_no_other_address() -> None:
    for host in ("0.\N{DIAERESIS}", "a.\N{ACCOUNT OF}", "a.b\N{FULLWIDTH SOLIDUS}c"):
        assert split_address(f"http://{host}/x").host == host
    assert (
        split_address("http://b\N{LATIN SMALL LETTER U WITH DIAERESIS}.de").host == "xn--b-eha.de"
    )


@given(st.text(max_size=60))
def test_nothing_raises(text: str) -> None:
    for url in (text, "http://" + text):
        assert split_address(url).host == split_address(url).host.lower()
        # Bare, a single label would be no address.
        again = site_of("http://" + site_of(url))
        assert site_of(url) == again or ":" in url or "@" in url or "%" in url


@pytest.mark.parametrize(
    ("host", "site"),
    [
        ("example.org", "example.org"),
        ("a.b.example.org", "example.org"),
        ("a..example.org", "example.org"),
        ("www.bbc.co.uk", "bbc.co.uk"),
        ("blog.uol.com.br", "uol.com.br"),
        ("www.u-tokyo.ac.jp", "u-tokyo.ac.jp"),
        ("www.com.de", "com.de"),
        ("a.com.de", "com.de"),
        ("me.github.io", "me.github.io"),
        ("docs.me.github.io", "me.github.io"),
        ("x.my.blogspot.com", "my.blogspot.com"),
        ("x.my.blogspot.de", "my.blogspot.de"),
        ("x.my.blogspot.co.uk", "my.blogspot.co.uk"),
        ("localhost", "localhost"),
        ("192.168.1.10", "192.168.1.10"),
        ("[2001:db8::1]", "[2001:db8::1]"),
    ],
)
def test_sites(host: str, site: str) -> None:
    assert registered_domain(host) == site


def test_international_hosts() -> None:
    assert site_of("http://www.bücher.de/x") == "xn--bcher-kva.de"
