"""Mathematics in HTML as TeX: MathML, MathJax (source scripts, rendered containers), KaTeX, images.

An element that shows a formula is found once, at the outermost element that belongs to it, and
gives `$...$` or `$$...$$`. The author's own TeX comes first (annotation, alttext, script, alt);
MathML without any is written out as TeX, by the presentation elements of MathML Core.
"""

from itertools import islice

import regex
from lxml.html import HtmlElement

from moebius.curate.steps.extract.markup import BLANKS, classes_of, names

_DELIMITED = regex.compile(
    r"\\\(((?:[^\\]|\\[^()])*+)\\\)|\\\[((?:[^\\]|\\[^\[\]])*+)\\\]|\$\$([^$]++)\$\$"
)
_STYLE = regex.compile(r"^\{\s*\\(display|text)style\s(.*)\}$", regex.DOTALL)
# Elements that hold one formula, by a class of theirs.
_HOLDERS = names("katex katex-display mwe-math-element math MathJax_Display MathJax")
_HINT = regex.compile("katex|[mM]ath|mjx|mwe")
_RENDERED = names("MathJax_Preview MathJax MathJax_Display MathJax_SVG mjx-chtml")
_DISPLAY = names("katex-display MathJax_Display mwe-math-element-block")
_IMAGES = names("math tex latex formula equation mwe-math-fallback-image-inline")
_DEEPEST = 60
# How many children each takes, and the TeX around them.
_TEMPLATES = {
    "mfrac": (2, r"\frac{{{0}}}{{{1}}}"),
    "msup": (2, r"{{{0}}}^{{{1}}}"),
    "msub": (2, r"{{{0}}}_{{{1}}}"),
    "msubsup": (3, r"{{{0}}}_{{{1}}}^{{{2}}}"),
    "munder": (2, r"\underset{{{1}}}{{{0}}}"),
    "mover": (2, r"\overset{{{1}}}{{{0}}}"),
    "munderover": (3, r"{{{0}}}_{{{1}}}^{{{2}}}"),
    "mroot": (2, r"\sqrt[{1}]{{{0}}}"),
}


def formula(element: HtmlElement) -> str | None:
    """The formula an element shows, with its dollars; "" to leave it out; None if it is none."""
    tag = element.tag
    if tag == "math" or tag == "mjx-container":
        return _of_mathml(element)
    if tag == "script":
        return _of_script(element)
    if tag == "img":
        return _of_image(element)
    if tag not in ("span", "div", "p", "nobr") or not _HINT.search(element.get("class") or ""):
        return None
    classes = classes_of(element)
    if classes & _RENDERED and _has_source(element):
        return ""
    return _of_holder(element, classes) if classes & _HOLDERS else None


def in_text(text: str) -> str:
    r"""Text with `\(...\)` and `\[...\]` written with dollars."""
    return _DELIMITED.sub(_with_dollars, text) if "\\" in text or "$$" in text else text


def _with_dollars(match: regex.Match[str]) -> str:
    inline, *shown = match.groups()
    return _dollars(inline or shown[0] or shown[1] or "", display=inline is None)


def _dollars(tex: str, display: bool) -> str:
    tex = BLANKS.sub(" ", tex).strip()
    style = _STYLE.match(tex)
    if style:
        tex = style[2].strip()
    if not tex:
        return ""
    return f"$${tex}$$" if display else f"${tex}$"


def _is_tex(script: HtmlElement) -> bool:
    return (script.get("type") or "").lower().startswith("math/tex")


def _of_script(element: HtmlElement) -> str | None:
    if not _is_tex(element):
        return None
    return _dollars(element.text or "", "mode=display" in (element.get("type") or ""))


def _of_image(element: HtmlElement) -> str | None:
    alt = element.get("alt") or ""
    if alt and classes_of(element) & _IMAGES:
        return _dollars(alt.strip("$"), display=False)
    return None


def _has_source(element: HtmlElement) -> bool:
    """Whether a rendered formula stands next to the script with its source."""
    for sibling in islice(element.itersiblings(), 3):
        if sibling.tag == "script":
            return _is_tex(sibling)
        if not classes_of(sibling) & _RENDERED:
            return False
    return False


def _of_holder(element: HtmlElement, classes: frozenset[str]) -> str | None:
    display = bool(classes & _DISPLAY)
    mathml = next(element.iter("math"), None)
    if mathml is not None:
        return _of_mathml(mathml, display)
    image = next(element.iter("img"), None)
    if image is not None and image.get("alt"):
        return _dollars(image.get("alt") or "", display)
    if "math" not in classes:
        return None
    if next(element.iter("script", "pre"), None) is not None or len(element) > 3:
        return None
    text = element.text_content().strip()
    if _DELIMITED.search(text):
        return in_text(text)
    # pandoc and others mark bare TeX by a second class
    if classes & {"inline", "display"} or "\\" in text:
        return _dollars(text.strip("$"), element.tag == "div" or "display" in classes)
    return None


def _of_mathml(element: HtmlElement, display: bool = False) -> str:
    mathml = element if element.tag == "math" else next(element.iter("math"), None)
    display = display or "true" in (element.get("display"), element.get("data-display"))
    if mathml is None:
        return ""
    display = display or mathml.get("display") == "block" or mathml.get("mode") == "display"
    for note in mathml.iter("annotation"):
        if "tex" in (note.get("encoding") or "").lower() and note.text:
            return _dollars(note.text, display)
    return _dollars(mathml.get("alttext") or _written(mathml, 0), display)


def _written(element: HtmlElement, depth: int) -> str:
    """Presentation MathML as TeX."""
    if depth > _DEEPEST:
        return element.text_content()
    parts = [_written(child, depth + 1) for child in element if isinstance(child.tag, str)]
    tag = element.tag
    if tag in ("annotation", "annotation-xml", "maction"):
        return ""
    arity, template = _TEMPLATES.get(tag, (-1, ""))
    if len(parts) == arity:
        return template.format(*parts)
    if tag == "msqrt":
        return rf"\sqrt{{{' '.join(parts)}}}"
    if tag == "mtable":
        return r"\begin{matrix} " + r" \\ ".join(parts) + r" \end{matrix}"
    if tag in ("mtr", "mlabeledtr"):
        return " & ".join(parts)
    if tag == "mtext":
        return rf"\text{{{(element.text or '').strip()}}}"
    if tag == "mi" and len((element.text or "").strip()) > 1:
        return rf"\mathrm{{{(element.text or '').strip()}}}"
    return " ".join(part for part in [(element.text or "").strip(), *parts] if part)
