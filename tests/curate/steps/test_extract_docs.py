"""Code, mathematics and image texts of documentation pages that happen to be on this machine.

What has to be found is read straight from the source of each page by a few lines of lxml: every
line of every `pre` with its indentation, every formula in TeX, every alternative text of words.
"""

import random
import re
from collections import Counter
from pathlib import Path

import pytest

lxml_html = pytest.importorskip("lxml.html", reason="needs the curate extra")
page = pytest.importorskip("moebius.curate.steps.extract.page", reason="needs the curate extra")

PAGES = 25
RUST = "share/doc/rust/html"
FOLDERS = [
    *Path("/usr/share/doc").glob("python3*/html"),
    Path("/usr/share/doc/nodejs/api"),
    Path("/usr/share/doc/valgrind/html"),
    Path("/usr/share/doc/rust-doc/html"),
    *(Path.home() / ".rustup/toolchains").glob(f"*/{RUST}"),
    Path("/usr/lib/node_modules/npm/docs/output"),
]
BOOKS = ["book", "nomicon", "reference", "embedded-book", "rust-by-example", "std"]
IMAGE = re.compile(rb'<img[^>]*\balt="[^"]{3,} [^"]{3,}"')
BESIDE = ("nav", "footer", "aside", "header")


def pages() -> list[bytes]:
    """Some pages of each set, some of them chosen for their images."""
    chosen: list[Path] = []
    folders = [path for path in FOLDERS if path.is_dir()][:3]
    for folder in folders:
        parts = [folder / name for name in BOOKS if (folder / name).is_dir()] or [folder]
        found = [path for part in parts for path in sorted(part.glob("*.html"))]
        found = [path for path in found if 4000 < path.stat().st_size < 120_000]
        images = [path for path in found[:600] if IMAGE.search(path.read_bytes())]
        rest = sorted(set(found) - set(images))
        some = [*random.Random(7).sample(images, min(4, len(images)))]
        some += random.Random(7).sample(rest, min(PAGES, len(rest)))
        chosen += some[: PAGES // len(folders) + 1]
    return [path.read_bytes() for path in chosen]


def beside(element) -> bool:
    above = [element, *element.iterancestors()]
    return any(e.tag in BESIDE or "nav" in (e.get("class") or "") for e in above)


def truth(raw: bytes) -> dict[str, list[str]]:
    tree = lxml_html.document_fromstring(raw.decode("utf-8", "replace").encode())
    for line_break in tree.iter("br"):
        line_break.text = "\n"
    for button in [*tree.iter("button")]:
        button.drop_tree()
    for block in tree.xpath("//pre//div"):
        block.text = "\n" + (block.text or "")
    codes = [element.text_content().replace("\u00a0", " ") for element in tree.iter("pre")]
    lines = [line.rstrip() for code in codes for line in code.split("\n") if line.strip()]
    formulas = [
        match[1]
        for element in tree.iter("span", "div")
        if "math" in (element.get("class") or "").split()
        and (match := re.fullmatch(r"\s*\\[(\[](.*)\\[)\]]\s*", element.text_content(), re.DOTALL))
    ]
    # icons are no content
    images = [
        image.get("alt")
        for image in tree.iter("img")
        if " " in (image.get("alt") or "").strip()
        and int(re.sub(r"\D", "", image.get("width") or "") or 99) > 40
        and not beside(image)
    ]
    return {
        "code": lines,
        "mathematics": [" ".join(formula.split()) for formula in formulas],
        "images": [" ".join(alt.split()) for alt in images],
    }


def test_code_mathematics_and_image_texts_of_documentation() -> None:
    raws = pages()
    if not raws:
        pytest.skip("no documentation in HTML on this machine")
    wanted: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for raw in raws:
        text = page.read_page(raw).text
        flat, lines = " ".join(text.split()), Counter(text.split("\n"))
        for kind, parts in truth(raw).items():
            wanted[kind] += len(parts)
            if kind == "code":
                found[kind] += (Counter(parts) & lines).total()
            else:
                found[kind] += sum(part in flat for part in parts)
    assert wanted["code"] > 100
    for kind, number in wanted.items():
        assert found[kind] >= 0.95 * number, f"{kind}: {found[kind]} of {number}"
