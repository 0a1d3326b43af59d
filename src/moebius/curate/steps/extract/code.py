"""Code blocks in HTML as they were written: every line, its indentation, and nothing else.

A block is a `pre` (or the obsolete `xmp`, `listing`), or a table whose rows are lines of code, as
GitHub and many highlighters build them. Line numbers, prompts to copy and the like are left out.
"""

from lxml.etree import iterwalk
from lxml.html import HtmlElement

from moebius.curate.steps.extract.markup import classes_of, names

_NUMBERS = names(
    "blob-num crayon-nums gutter hljs-ln-numbers line-number line-numbers line-numbers-rows lineno "
    "linenodiv linenos linenumber ln lnt rouge-gutter src-line-numbers"
)
_TABLES = names(
    "blob-wrapper code-wrapper codehilitetable crayon-table diff-table highlight highlighttable "
    "hljs-ln js-file-line-container lntable rouge-table"
)
_CELLS = names("blob-code code crayon-code hljs-ln-code js-file-line rouge-code")
_LINES = names("div li p tr")
# Between their parts blanks mean nothing.
_LAYOUT = names("table thead tbody tfoot tr")
_AFTER = _LAYOUT | names("td th colgroup caption")
_LEFT_OUT = names("button rp script select style svg template")


def is_code(element: HtmlElement) -> bool:
    """Whether an element is a block of code."""
    tag = element.tag
    if tag in ("pre", "xmp", "listing"):
        return not _is_numbers(element)
    if tag == "table":
        return bool(_TABLES & classes_of(element)) and any(
            cell.tag == "pre" or _CELLS & classes_of(cell) for cell in element.iter("td", "pre")
        )
    return tag == "code" and _stands_alone(element)


def _stands_alone(element: HtmlElement) -> bool:
    """Whether a `code` of several lines fills the block that it is in."""
    if next(element.iter("br"), None) is None:
        return False
    parent = element.getparent()
    return (
        parent is not None
        and parent.tag in ("div", "p", "td", "figure")
        and len(parent) == 1
        and not (parent.text or "").strip()
        and not (element.tail or "").strip()
    )


def verbatim(element: HtmlElement) -> str:
    """The lines of a block of code, trailing blanks and empty lines around them left out."""
    parts: list[str] = []
    walk = iterwalk(element, events=("start", "end"))
    for event, node in walk:
        inner = node is not element
        if event == "start":
            if inner and (node.tag in _LEFT_OUT or _is_numbers(node)):
                walk.skip_subtree()
                continue
            if inner and node.tag in _LINES:
                _end_line(parts)
            if node.tag == "br":
                parts.append("\n")
            elif node.text and not (node.tag in _LAYOUT and node.text.isspace()):
                parts.append(node.text)
        elif inner:
            if node.tag in _LINES:
                _end_line(parts)
            if node.tail and not (node.tag in _AFTER and node.tail.isspace()):
                parts.append(node.tail)
    text = "".join(parts).replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")


def _end_line(parts: list[str]) -> None:
    if parts and not parts[-1].endswith("\n"):
        parts.append("\n")


def _is_numbers(element: HtmlElement) -> bool:
    return bool(_NUMBERS & classes_of(element))
