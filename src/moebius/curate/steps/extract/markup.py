"""Small things that reading HTML needs everywhere: classes of an element, sets of names, blanks."""

import regex
from lxml.html import HtmlElement

BLANKS = regex.compile(r"\s+")


def names(text: str) -> frozenset[str]:
    """The words of a text as a set."""
    return frozenset(text.split())


def classes_of(element: HtmlElement) -> frozenset[str]:
    """The classes of an element."""
    return names(element.get("class") or "")
