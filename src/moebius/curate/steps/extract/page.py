"""One page: bytes -> text and date, with nothing but the bytes to go by.

Tags that are never closed nest deeper than parsers go; such a page is read a second time without
the tags that only wrap.
"""

import email.utils
from dataclasses import dataclass

import lxml.html
import regex
from lxml.etree import ErrorTypes, ParserError, XMLSyntaxError
from lxml.html import HtmlElement

from moebius.curate.steps.extract.blocks import blocks_of
from moebius.curate.steps.extract.charset import decode
from moebius.curate.steps.extract.choose import main_text
from moebius.curate.steps.extract.render import text_of

_WRAPPERS = regex.compile(
    r"(?:</?(?:a|b|big|blockquote|center|dd|div|dl|dt|em|font|form|i|li|ol|section|small|span|"
    r"strong|table|tbody|td|tr|u|ul)\b[^<>]*+>\s*+)++",
    regex.IGNORECASE,
)
_MATH_LOADER = regex.compile(r"mathjax|katex", regex.IGNORECASE)
_DATES = (
    "//meta[@property='article:published_time' or @itemprop='datePublished' or "
    "@property='og:published_time' or @name='date' or @name='pubdate' or @name='dc.date' or "
    "@name='DC.date.issued' or @name='dcterms.created' or @name='parsely-pub-date' or "
    "@name='citation_publication_date' or @name='publish-date' or @name='article:published_time']"
    "/@content",
    "//*[@itemprop='datePublished']/@datetime",
    "//time[@pubdate]/@datetime",
)
_IN_JSON = regex.compile(r'"datePublished"\s*:\s*"([^"]{8,40})"')
_DAY = regex.compile(r"\s*((?:19|20)\d\d)[-/](\d\d?)[-/](\d\d?)(?!\d)")


@dataclass(frozen=True, slots=True)
class Page:
    """What a page gave: its main text, and the day it was published (ISO 8601, or empty)."""

    text: str
    date: str


def read_page(raw: bytes, charset: str = "", markdown: bool = False) -> Page:
    """The main text of an HTML page and its date; an empty text where it has none."""
    source = decode(raw, charset).replace("\0", "")
    tree = _tree(source)
    if tree is None:
        return Page("", "")
    blocks = blocks_of(tree, bool(_MATH_LOADER.search(source)))
    return Page(text_of(main_text(tree, blocks), markdown), _date(tree, source))


def _tree(source: str) -> HtmlElement | None:
    tree, is_whole = _parsed(source)
    # unclosed tags: read it again without what only wraps, a paragraph at each
    return tree if is_whole else _parsed(_WRAPPERS.sub("<p>", source))[0]


def _parsed(source: str) -> tuple[HtmlElement | None, bool]:
    """The tree, and whether it is whole: libxml2 stops reading 2,048 levels down."""
    data = source.encode("utf-8", "replace")
    if not data.strip():
        return None, True
    parser = lxml.html.HTMLParser(
        encoding="utf-8", remove_comments=True, remove_pis=True, collect_ids=False, huge_tree=True
    )
    try:
        tree = lxml.html.document_fromstring(data, parser=parser, ensure_head_body=True)
    except ParserError:
        return None, True
    except XMLSyntaxError:
        # a parser that recovers from everything gives no tree only where it gets no memory
        raise MemoryError from None
    last = parser.error_log.last_error
    return tree, last is None or last.type != ErrorTypes.ERR_RESOURCE_LIMIT


def _date(tree: HtmlElement, source: str) -> str:
    found = [str(value) for path in _DATES for value in tree.xpath(path)]
    in_json = _IN_JSON.search(source)
    for value in [*found, in_json[1] if in_json else ""]:
        day = _day(value)
        if day:
            return day
    return ""


def _day(text: str) -> str:
    """`2019-11-18` of an ISO 8601 or RFC 2822 date; "" of anything else."""
    iso = _DAY.match(text)
    if iso:
        year, month, day = (int(part) for part in iso.groups())
        return f"{year}-{month:02}-{day:02}" if 1 <= month <= 12 and 1 <= day <= 31 else ""
    try:
        return email.utils.parsedate_to_datetime(text).date().isoformat()
    except (TypeError, ValueError, IndexError):
        return ""
