"""A page as a flat list of blocks in reading order: paragraphs, headings, items, rows, code.

One pass over the tree, without recursion. What never is text (scripts, forms) is left out; what
stands beside the main text by its markup (navigation, footer, comments) is marked. Mathematics,
code and images with alternative text are blocks, or stand in their paragraph.
"""

import functools
from dataclasses import dataclass, field
from typing import Literal

import regex
from lxml.etree import iterwalk
from lxml.html import HtmlElement

from moebius.curate.steps.extract import code, mathematics
from moebius.curate.steps.extract.markup import BLANKS, names

BlockKind = Literal["text", "heading", "item", "row", "code", "formula", "image", "caption"]

_LEFT_OUT = names(
    "applet area audio base button canvas datalist dialog embed head iframe input map menu meta "
    "noscript object optgroup option param script select source style svg template textarea track "
    "video"
)
BREAKS = names(
    "address article aside blockquote body caption center dd details dir div dl dt fieldset "
    "figcaption figure footer form h1 h2 h3 h4 h5 h6 header hgroup hr legend li main nav ol p "
    "section summary table tbody tfoot thead tr ul"
)
_KINDS: dict[str, BlockKind] = {"tr": "row", "figcaption": "caption"}
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_BESIDE = {"nav", "aside", "footer"}
_BESIDE_ROLES = {"navigation", "banner", "contentinfo", "complementary", "search", "menu"}
_BESIDE_NAMES = regex.compile(
    r"(?:^|[\s_-])(?:breadcrumbs?|comments?|cookies?|footer|masthead|menu|nav|navbar|navigation|"
    r"newsletter|pagination|promo|recommended|related|respond|share|sharing|sidebar|skip|social|"
    r"sphinxsidebar|sponsor|subscribe|tags|toc|widget)(?:$|[\s_-])",
    regex.IGNORECASE,
)
_LONGEST_NAME = 200
_CONTAINERS = {"div", "section", "ul", "ol", "table", "td", "header", "form", "span"}
_FILE_NAME = regex.compile(r"\S*\.(?:jpe?g|png|gif|svg|webp|bmp|tiff?)", regex.IGNORECASE)
_ANCHORS = {"#", "¶", "§", "\U0001f517", "\uf0c1"}
_CELL = "\x1f"


@dataclass(slots=True)
class Block:
    """One block. `links` is the share of its letters in links, `level` that of a heading."""

    kind: BlockKind
    text: str
    element: HtmlElement
    beside: bool = False
    links: float = 0.0
    level: int = 0
    formulas: int = 0
    images: int = 0


def blocks_of(tree: HtmlElement, tex: bool) -> list[Block]:
    r"""The blocks of a page; with `tex`, `\(...\)` in its text is mathematics."""
    page = _Page(tex)
    walk = iterwalk(tree, events=("start", "end"))
    for event, element in walk:
        if event == "end":
            page.end(element)
        elif page.start(element):
            page.skipped = element
            walk.skip_subtree()
    page.flush()
    return page.blocks


def alternative(image: HtmlElement) -> str:
    """The text that stands for an image: its alt where that has words of its own."""
    alt = BLANKS.sub(" ", image.get("alt") or "").strip()
    is_text = " " in alt and not _FILE_NAME.fullmatch(alt) and "://" not in alt
    return alt if is_text else ""


@functools.lru_cache(4096)
def _is_beside_name(name: str) -> bool:
    return any(
        token.count("-") + token.count("_") < 4 and _BESIDE_NAMES.search(token)
        for token in name.split()
    )


def _is_beside(element: HtmlElement) -> bool:
    tag = element.tag
    if tag in _BESIDE or element.get("role") in _BESIDE_ROLES:
        return True
    if tag not in _CONTAINERS:
        return False
    classes = (element.get("class") or "")[:_LONGEST_NAME]
    if classes and _is_beside_name(classes):
        return True
    # the names of sections are made from their headings: "how-to-share-a-menu"
    name = (element.get("id") or "")[:_LONGEST_NAME]
    return bool(name) and tag != "section" and "section" not in classes and _is_beside_name(name)


@dataclass(slots=True)
class _Page:
    """The state of the walk: the blocks so far, and the parts of the one being read."""

    tex: bool
    blocks: list[Block] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    skipped: HtmlElement | None = None
    first: HtmlElement | None = None
    kind: BlockKind = "text"
    level: int = 0
    beside: list[HtmlElement] = field(default_factory=list)
    new_item: bool = False
    in_link: int = 0
    link_letters: int = 0
    letters: int = 0
    formulas: int = 0
    images: int = 0

    def start(self, element: HtmlElement) -> bool:
        """Take what begins here; True if all of it is taken."""
        tag = element.tag
        if tag == "br":
            self.parts.append("\n")
            return True
        formula = mathematics.formula(element)
        if formula is not None:
            self.put_formula(formula, element)
            return True
        if tag in _LEFT_OUT or element.get("hidden") is not None:
            return True
        if tag == "img":
            self.put_image(element)
            return True
        if code.is_code(element):
            self.put_block("code", code.verbatim(element), element)
            return True
        if tag in BREAKS:
            self.flush()
            self.level = _HEADINGS.get(tag, 0)
            self.kind = "heading" if self.level else _KINDS.get(tag, "text")
            self.new_item = tag == "li" or (self.new_item and tag != "ul" and tag != "ol")
        if _is_beside(element):
            self.flush()
            self.beside.append(element)
        if tag == "a":
            if len(element) == 0 and (element.text or "").strip() in _ANCHORS:
                return True
            self.in_link += 1
        self.put(element.text, element)
        return False

    def end(self, element: HtmlElement) -> None:
        """Close an element and take the text after it."""
        if self.skipped is element:
            self.skipped = None
            self.put(element.tail, element)
            return
        tag = element.tag
        if tag in BREAKS:
            self.flush()
            self.kind, self.level = "text", 0
            self.new_item = self.new_item and tag != "li"
        elif tag in ("td", "th") and self.parts:
            self.parts.append(_CELL)
        elif tag == "a" and self.in_link:
            self.in_link -= 1
        if self.beside and self.beside[-1] is element:
            self.flush()
            self.beside.pop()
        self.put(element.tail, element)

    def put(self, text: str | None, element: HtmlElement) -> None:
        if not text:
            return
        if self.tex and ("\\" in text or "$$" in text):
            written = mathematics.in_text(text)
            self.formulas += written != text
            text = written
        if self.first is None:
            self.first = element
        text = BLANKS.sub(" ", text)
        self.letters += text != " "
        if self.in_link:
            self.link_letters += len(text)
        self.parts.append(text)

    def put_formula(self, formula: str, element: HtmlElement) -> None:
        if not formula:
            return
        if formula.startswith("$$"):
            self.put_block("formula", formula, element)
            return
        self.formulas += 1
        if self.first is None:
            self.first = element
        self.parts.append(formula)

    def put_image(self, element: HtmlElement) -> None:
        text = alternative(element)
        if text:
            self.images += 1
            if self.first is None:
                self.first = element
            self.parts.append(f" {text} ")

    def put_block(self, kind: BlockKind, text: str, element: HtmlElement) -> None:
        self.flush()
        if text:
            block = Block(kind, text, element, beside=bool(self.beside))
            block.formulas = int(kind == "formula")
            self.blocks.append(block)

    def flush(self) -> None:
        """End the block being read."""
        if self.parts:
            lines = [BLANKS.sub(" ", line).strip() for line in "".join(self.parts).split("\n")]
            text = "\n".join(line for line in lines if line.strip(_CELL + " "))
            if text and self.first is not None:
                self.blocks.append(self.block(text, self.first))
                self.new_item = False
            self.parts.clear()
        self.first = None
        self.link_letters = self.letters = self.formulas = self.images = 0

    def block(self, text: str, first: HtmlElement) -> Block:
        kind = "item" if self.new_item and self.kind == "text" else self.kind
        if self.images and not self.letters and not self.formulas:
            kind = "image"
        cells = [cell.strip() for cell in text.strip(_CELL + " ").split(_CELL)]
        return Block(
            kind,
            "\t".join(cells),
            first,
            bool(self.beside),
            min(1.0, self.link_letters / len(text)),
            self.level,
            self.formulas,
            self.images,
        )
