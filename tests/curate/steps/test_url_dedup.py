"""URL deduplication against picking winners one by one."""

from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.curate.document import Document, Dropped
from moebius.curate.steps.url_dedup import UrlDedup, microseconds, normalised_url

from ..driver import run_step

SAME = [
    "http://example.com/a?x=1&y=2",
    "https://example.com/a?x=1&y=2",
    "https://www.example.com/a/?y=2&x=1",
    "HTTPS://WWW.Example.COM:443/a?x=1&y=2#part",
    "http://example.com:80/a?x=1&utm_source=n&y=2&gclid=z&UTM_medium=m",
    "example.com/a?x=1&&y=2",
    " http://example.com./a?x=1&y=2\n",
]
OTHERS = [
    "http://example.com/A?x=1&y=2",
    "http://example.com/a?x=1",
    "http://example.com/a?x=1&y=2&y=2",
    "http://example.com:8080/a?x=1&y=2",
    "https://example.com:80/a?x=1&y=2",
    "ftp://example.com/a?x=1&y=2",
    "http://sub.example.com/a?x=1&y=2",
    "http://example.com/a/b?x=1&y=2",
]


def test_addresses_of_one_page_are_one() -> None:
    assert {normalised_url(url) for url in SAME} == {"//example.com/a?x=1&y=2"}


def test_addresses_of_other_pages_are_others() -> None:
    assert len({normalised_url(url) for url in [SAME[0], *OTHERS]}) == 1 + len(OTHERS)


@pytest.mark.parametrize("url", ["http://[::1", "http://a:port/", "://", "", "?", "http://\ud800"])
def test_broken_addresses_bear_it(url: str) -> None:
    assert isinstance(normalised_url(url), str)
    (kept,) = run_step(UrlDedup(), [Document("k", "text", url=url)])
    assert isinstance(kept, Document)


@settings(deadline=None, max_examples=40)
@given(st.text(max_size=8), st.lists(st.sampled_from("abc"), max_size=4))
def test_normalising_twice_changes_nothing(path: str, parameters: list[str]) -> None:
    url = f"http://www.a.org/{quote(path)}/?{'&'.join(parameters)}"
    once = normalised_url(url)
    assert normalised_url("http:" + once) == once


def test_dates_in_order_of_time() -> None:
    dates = ["", "1999", "1999-02", "1999-02-03", "1999-02-03T01:00:00+02:00"]
    dates += ["1999-02-03T00:00:00Z", "1999-02-03T00:30", "19990203T010000", "2024-W01-1"]
    moments = [microseconds(date) for date in dates]
    expected = ["", "1999", "1999-02", "1999-02-03T01:00:00+02:00", "1999-02-03"]
    expected += ["1999-02-03T00:00:00Z", "1999-02-03T00:30", "19990203T010000", "2024-W01-1"]
    assert [dates[i] for i in sorted(range(9), key=moments.__getitem__)] == expected
    assert microseconds("yesterday") == microseconds("0000-00-00") == microseconds("") == 0
    assert 0 < microseconds("0001-01-01T00:00:00+23:59") < microseconds("9999-12-31T23:59-23:59")


def survivors(pages: list[tuple[str, str]]) -> list[bool]:
    """The newest of each address, the first of equally new ones."""
    best: dict[str, int] = {}
    for index, (url, date) in enumerate(pages):
        name = normalised_url(url)
        if name not in best or microseconds(pages[best[name]][1]) < microseconds(date):
            best[name] = index
    return [not url or best[normalised_url(url)] == i for i, (url, _) in enumerate(pages)]


PAGES = st.lists(
    st.tuples(
        st.sampled_from(["", *SAME[:3], *OTHERS[:3]]),
        st.sampled_from(["", "2020", "2020-01-01", "2021-05-06", "2021-05-06T00:00:01Z", "never"]),
    ),
    max_size=20,
)


@settings(deadline=None, max_examples=40)
@given(pages=PAGES, shards=st.integers(1, 4), ranges=st.integers(1, 4))
def test_the_newest_of_each_address_stays(
    pages: list[tuple[str, str]], shards: int, ranges: int
) -> None:
    documents = [Document(str(i), "t", url=u, date=d) for i, (u, d) in enumerate(pages)]
    decisions = run_step(UrlDedup(), documents, shards, ranges)
    assert [isinstance(decision, Document) for decision in decisions] == survivors(pages)
    reasons = {d.reason for d in decisions if isinstance(d, Dropped)}
    assert reasons <= {"another page of the same URL kept"}
