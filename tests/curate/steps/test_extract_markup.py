"""Each way in which pages write code, mathematics and images; markers; dates; character sets."""

import pytest

pytest.importorskip("trafilatura", reason="needs the curate extra")
page = pytest.importorskip("moebius.curate.steps.extract.page")
charset = pytest.importorskip("moebius.curate.steps.extract.charset")

BEFORE = "The first paragraph of this page says at some length what the page is going to be about."
AFTER = "The last paragraph of this page says at some length what the page has just been about."
HEAD = "<html><head><title>A page</title></head><body><nav><a href='/'>Home page</a></nav>"


def around(inner: str, head: str = HEAD) -> bytes:
    body = f"<article><h1>A page</h1><p>{BEFORE}</p>{inner}<p>{AFTER}</p></article>"
    return f"{head}{body}<footer>All rights reserved by us</footer></body></html>".encode()


def text_of(inner: str) -> str:
    """What stands between the two paragraphs."""
    text = page.read_page(around(inner)).text
    assert "rights reserved" not in text
    assert "Home page" not in text
    return text[text.index(BEFORE) + len(BEFORE) : text.index(AFTER)].strip("\n")


MATHML = (
    "<mrow><msup><mi>x</mi><mn>2</mn></msup><mo>+</mo><mfrac><mn>1</mn><mi>y</mi></mfrac></mrow>"
)
TEX = '<annotation encoding="application/x-tex">x^2</annotation>'
KATEX = (
    f'<span class="katex"><span class="katex-mathml"><math><semantics>{MATHML}{TEX}</semantics>'
    '</math></span><span class="katex-html" aria-hidden="true"><span>x</span><span>2</span></span>'
    "</span>"
)
FORMULAS = {
    "annotation": (f"<p>So <math><semantics>{MATHML}{TEX}</semantics></math> it is.</p>", "$x^2$"),
    "alttext": ('<p>So <math alttext="a_1"><mi>a</mi></math> it is.</p>', "$a_1$"),
    "mathml": (f"<p>So <math>{MATHML}</math> it is.</p>", r"${x}^{2} + \frac{1}{y}$"),
    "mathjax": ('<p>So <script type="math/tex">x^2</script> it is.</p>', "$x^2$"),
    "mathjax 2": (
        '<p>So <span class="MathJax_Preview">x2</span><span class="MathJax">x2</span>'
        '<script type="math/tex">x^2</script> it is.</p>',
        "$x^2$",
    ),
    "mathjax 3": (
        "<p>So <mjx-container><mjx-math>x</mjx-math><mjx-assistive-mml>"
        f"<math>{MATHML}</math></mjx-assistive-mml></mjx-container> it is.</p>",
        r"${x}^{2} + \frac{1}{y}$",
    ),
    "katex": (f"<p>So {KATEX} it is.</p>", "$x^2$"),
    "sphinx": (r'<p>So <span class="math notranslate">\(x^2\)</span> it is.</p>', "$x^2$"),
    "pandoc": (r'<p>So <span class="math inline">\(x^2\)</span> it is.</p>', "$x^2$"),
    "image": ('<p>So <img class="math" alt="x^2" src="1.png"> it is.</p>', "$x^2$"),
    "wikipedia": (
        '<p>So <span class="mwe-math-element"><span style="display: none;">'
        f'<math alttext="{{\\displaystyle x^2}}">{MATHML}</math></span>'
        '<img class="mwe-math-fallback-image-inline" alt="{\\displaystyle x^2}"></span> it is.</p>',
        "$x^2$",
    ),
}


@pytest.mark.parametrize("way", FORMULAS)
def test_a_formula_in_a_paragraph(way: str) -> None:
    html, tex = FORMULAS[way]
    assert text_of(html) == f"So {tex} it is."


SHOWN = {
    "mathml": f'<math display="block"><semantics>{MATHML}{TEX}</semantics></math>',
    "mathjax": '<script type="math/tex; mode=display">x^2</script>',
    "katex": f'<span class="katex-display">{KATEX}</span>',
    "sphinx": '<div class="math notranslate nohighlight">\n\\[x^2\\]</div>',
}


@pytest.mark.parametrize("way", SHOWN)
def test_a_formula_of_its_own(way: str) -> None:
    assert text_of(SHOWN[way]) == "$$x^2$$"


def test_tex_in_text_is_mathematics_where_the_page_shows_it_as_such() -> None:
    inner = r"<p>So \(x^2\) it is, and \[y \le 2\] as well.</p>"
    plain = page.read_page(around(inner)).text
    assert r"So \(x^2\) it is, and \[y \le 2\] as well." in plain
    head = HEAD.replace("</head>", "<script src='https://x.org/mathjax@3/tex.js'></script></head>")
    shown = page.read_page(around(inner, head)).text
    assert r"So $x^2$ it is, and $$y \le 2$$ as well." in shown


CODE = "def f(x):\n    if x:\n\n        return 'a &  b'\n    # no"
HTML_CODE = CODE.replace("&", "&amp;")
ROWS = [line.replace("&", "&amp;") for line in CODE.split("\n")]
NUMBERED = "".join(
    f'<tr><td class="blob-num" data-line-number="{i}"></td><td class="blob-code">{row}\n</td></tr>'
    for i, row in enumerate(ROWS)
)
NUMBERS = "\n".join("12345")
CODES = {
    "pre": f"<pre>{HTML_CODE}</pre>",
    "highlighted": '<div class="highlight-python notranslate"><div class="highlight"><pre><span>'
    f'</span><span class="k">{HTML_CODE}\n</span></pre></div></div>',
    "two columns": '<table class="highlighttable"><tr><td class="linenos"><div class="linenodiv">'
    f"<pre>{NUMBERS}</pre></div></td><td class='code'><div><pre>{HTML_CODE}</pre></div></td></tr>"
    "</table>",
    "rows": f'<table class="highlight js-file-line-container">{NUMBERED}</table>',
    "breaks": "<pre>" + "<br>".join(ROWS) + "</pre>",
    "blocks": "<pre><code>"
    + "".join(f"<div>{row or '<br>'}</div>" for row in ROWS)
    + "</code></pre>",
    "numbers inside": "<pre>"
    + "\n".join(f'<span class="lineno">{i} </span>{row}' for i, row in enumerate(ROWS))
    + "</pre>",
    "a button": f"<pre><button>Copy</button><code>{HTML_CODE}</code></pre>",
}


@pytest.mark.parametrize("way", CODES)
def test_code_keeps_its_lines(way: str) -> None:
    assert text_of(CODES[way]) == CODE


def test_code_is_kept_where_trafilatura_drops_its_section() -> None:
    filler = "".join(f"<p>{BEFORE} {i}</p>" for i in range(8))
    lost = (
        f"<div class='x'><dl><dt><code>f(x)</code></dt><dd><pre>{HTML_CODE}</pre></dd></dl></div>"
    )
    text = page.read_page(f"<body><main>{lost}<div>{filler}</div></main></body>".encode()).text
    assert CODE in text
    assert "f(x)" in text


def test_images_give_their_alternative_text() -> None:
    image = '<img src="a.png" alt="A diagram of two boxes">'
    assert text_of(f"<figure>{image}<figcaption>Fig. 1</figcaption></figure>").startswith(
        "A diagram of two boxes"
    )
    inline = '<p>Press the <img alt="big red" src="b.png"> button and wait for it.</p>'
    assert text_of(inline) == "Press the big red button and wait for it."
    assert text_of('<p><img src="a.png" alt="IMG_001.jpg"></p><img alt="" src="b.png">') == ""


TABLE = "<table><tr><th>Name</th><th>Value</th></tr><tr><td>one</td><td>1</td></tr></table>"
LIST = "<h2>A heading</h2><ul><li>first item of all</li><li><p>second item of all</p></li></ul>"


def test_markers_only_where_asked_for() -> None:
    raw = around(f"{LIST}<pre>{HTML_CODE}</pre>{TABLE}")
    plain = page.read_page(raw).text
    marked = page.read_page(raw, markdown=True).text
    assert "A heading\n\nfirst item of all\nsecond item of all" in plain
    assert "Name\tValue\none\t1" in plain
    assert (
        f"## A heading\n\n- first item of all\n- second item of all\n\n```\n{CODE}\n```" in marked
    )
    assert "| Name | Value |\n| one | 1 |" in marked
    assert not set("#`|") & set(plain.replace(CODE, ""))


DATES = {
    '<meta property="article:published_time" content="2019-11-18T20:19:05Z">': "2019-11-18",
    '<meta name="date" content="Mon, 18 Nov 2019 20:19:05 GMT">': "2019-11-18",
    '<meta itemprop="datePublished" content="2019/3/8">': "2019-03-08",
    '<script type="application/ld+json">{"datePublished":"2020-01-02T03"}</script>': "2020-01-02",
    '<meta name="date" content="yesterday">': "",
    '<meta name="date" content="2019-23-45">': "",
}


@pytest.mark.parametrize("head", DATES)
def test_dates(head: str) -> None:
    raw = around("", HEAD.replace("</head>", f"{head}</head>"))
    assert page.read_page(raw).date == DATES[head]


WORDS = "Größe, naïve, œuvre — “so”"
RUSSIAN = "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 3
JAPANESE = "日本語の文字コードはいろいろある。"
CHARSETS = {
    "utf-8": (WORDS.encode(), "", WORDS),
    "mark": (b"\xef\xbb\xbf" + WORDS.encode(), "latin-1", WORDS),
    "utf-16": (b"\xff\xfe" + WORDS.encode("utf-16-le"), "", WORDS),
    "utf-16 of the server": (WORDS.encode("utf-16-le"), "utf-16le", WORDS),
    "server": (WORDS.encode("cp1252"), "iso-8859-1", WORDS),
    "server lies": (WORDS.encode(), "iso-8859-1", WORDS),
    "page": (b"<meta charset=windows-1251>" + RUSSIAN.encode("cp1251"), "", RUSSIAN),
    "old page": (
        b'<meta http-equiv="Content-Type" content="text/html; charset=shift_jis">'
        + JAPANESE.encode("cp932"),
        "",
        JAPANESE,
    ),
    "seven bits": (JAPANESE.encode("iso2022_jp"), "iso-2022-jp", JAPANESE),
    "unknown name": (WORDS.encode(), "no-such-charset", WORDS),
    "a guess": (RUSSIAN.encode("cp1251"), "", RUSSIAN),
    "a wrong byte": (b"<p>" + WORDS.encode() * 9 + b"\xff", "", WORDS * 9 + "\ufffd"),
}


@pytest.mark.parametrize("way", CHARSETS)
def test_character_sets(way: str) -> None:
    raw, declared, wanted = CHARSETS[way]
    assert charset.decode(raw, declared).rpartition(">")[2] == wanted
