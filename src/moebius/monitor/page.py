"""One self-contained HTML page: sections of prose, tables and interactive plots.

Nothing remote is loaded, and a content policy forbids it: only the scripts written here run, known
by their hashes. Whoever puts text into a page escapes it with `escape`; plot data travels as JSON
in which no tag can begin.
"""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from plotly.offline import get_plotlyjs

escape = html.escape


@dataclass(frozen=True)
class Choice:
    """One position of a plot's slider or one of its buttons: what changes in traces and layout."""

    label: str
    data: dict[str, Any]
    layout: dict[str, Any]


@dataclass(frozen=True)
class Plot:
    """A plotly figure with its title and one explanatory line; both are plain text."""

    title: str
    note: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    control: Literal["none", "slider", "buttons"] = "none"
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Section:
    """A heading, a line of introduction, and parts: plots, or HTML that is already escaped."""

    title: str
    intro: str
    parts: tuple[Plot | str, ...]


def render(title: str, head: str, sections: Iterable[Section]) -> str:
    """The whole page. `title` is plain text, `head` HTML; sections without parts are left out."""
    shown = [section for section in sections if section.parts]
    body = "\n".join(_section(section, i) for i, section in enumerate(shown))
    links = "".join(f'<a href="#s{i}">{escape(s.title)}</a>' for i, s in enumerate(shown))
    scripts = (get_plotlyjs(), _SCRIPT)
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"
    )
    tags = "\n".join(f"<script>{script}</script>" for script in scripts)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title><style>{_STYLE}</style></head>
<body><main><header>{head}</header><nav>{links}</nav>
<noscript><p>The plots of this page need JavaScript.</p></noscript>
{body}
</main>
{tags}
</body></html>
"""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table; every cell is escaped."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    inner = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{inner}</table></div>'


def folded(title: str, text: str) -> str:
    """Preformatted text behind a line that opens it."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _section(section: Section, index: int) -> str:
    parts = "\n".join(part if isinstance(part, str) else _plot(part) for part in section.parts)
    intro = f'<p class="intro">{escape(section.intro)}</p>' if section.intro else ""
    return f'<section id="s{index}"><h2>{escape(section.title)}</h2>{intro}\n{parts}\n</section>'


def _plot(plot: Plot) -> str:
    choices = [vars(choice) for choice in plot.choices]
    data = {"data": plot.data, "layout": plot.layout, "choices": choices}
    height = int(plot.layout.get("height", 300))
    caption = f"<h3>{escape(plot.title)}</h3><p>{escape(plot.note)}</p>"
    return f"""<figure><figcaption>{caption}</figcaption>
{_control(plot)}<div class="plot" style="height:{height}px"></div>
<script type="application/json">{_json(data)}</script></figure>"""


def _control(plot: Plot) -> str:
    if plot.control == "slider" and len(plot.choices) > 1:
        last = len(plot.choices) - 1
        label = escape(plot.choices[last].label)
        return (
            f'<div class="control"><input type="range" min="0" max="{last}" value="{last}" '
            f'aria-label="{escape(plot.title)}"><output>{label}</output></div>'
        )
    if plot.control == "buttons":
        items = (
            f'<button type="button" aria-pressed="{"true" if i == 0 else "false"}">'
            f"{escape(choice.label)}</button>"
            for i, choice in enumerate(plot.choices)
        )
        return f'<div class="control">{"".join(items)}</div>'
    return ""


def _json(data: Any) -> str:
    """JSON that may stand inside a script element: no `<`, so no tag begins or ends in it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


_STYLE = """
:root{--paper:#fdfcfa;--card:#f5f3ee;--ink:#22252a;--soft:#646a73;--rule:#e2ded6;--link:#2f65a7;
--low:47 111 178;--high:217 119 40;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--paper:#15171a;--card:#1d2024;--ink:#e4e3df;
--soft:#9aa0a8;--rule:#32363c;--link:#84b3e8;--low:91 150 214;--high:226 138 66;--bad:#ff8a80}}
*{box-sizing:border-box}html{scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);line-height:1.55;
font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:58rem;margin:0 auto;padding:3.5rem 1.5rem 5rem}
h1{font-size:2rem;font-weight:650;letter-spacing:-.02em;line-height:1.2;margin:0;
overflow-wrap:anywhere}
h2{font-size:1.3rem;font-weight:650;letter-spacing:-.01em;margin:4rem 0 .2rem;padding-top:1.2rem;
border-top:1px solid var(--rule)}
h3{font-size:1rem;font-weight:600;margin:2rem 0 0}figcaption h3{margin:0}p{margin:.3rem 0}
.sub,.intro,figcaption p,.foot{color:var(--soft)}figcaption p{font-size:.9rem;max-width:46rem}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:2rem 0 0;font-size:.9rem}
a{color:var(--link);text-decoration:none}a:hover{text-decoration:underline}
figure{margin:2rem 0 0}.plot{width:100%;margin-top:.4rem}
.plot .modebar{opacity:0;transition:opacity .2s}.plot:hover .modebar{opacity:1}
.figures{display:flex;flex-wrap:wrap;gap:1px;
background:var(--rule);border:1px solid var(--rule);border-radius:8px;overflow:hidden;
margin:1.8rem 0 0}
.figures div{flex:1 1 9.5rem;background:var(--card);padding:.9rem 1rem}
.figures dt{font-size:.78rem;color:var(--soft)}
.figures dd{margin:.1rem 0 0;font-size:1.35rem;font-weight:600;font-variant-numeric:tabular-nums}
.figures dd small{display:block;font-size:.78rem;font-weight:400;color:var(--soft)}
.bars{display:grid;grid-template-columns:max-content 1fr max-content;gap:.45rem 1rem;
align-items:center;margin:1.8rem 0 0;font-size:.92rem;font-variant-numeric:tabular-nums}
.bars i{display:block;height:.7rem;border-radius:3px;background:var(--soft);opacity:.45}
.bars i.ours{background:rgb(var(--low));opacity:1}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums;
margin-top:.8rem}
th{text-align:left;font-weight:600;color:var(--soft);white-space:nowrap}
th,td{padding:.34rem .9rem .34rem 0;border-bottom:1px solid var(--rule);vertical-align:top;
overflow-wrap:break-word}
.alarm{color:var(--bad)}.quiet{color:var(--soft)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:0 3rem}
pre,.passage{font:13px/1.65 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;
background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:1rem 1.1rem;
margin:.8rem 0 0;white-space:pre-wrap;overflow-wrap:anywhere;overflow-x:auto}
.passage span{border-radius:2px;padding:.08em 0}
.h0{background:rgb(var(--low)/.65)}.h1{background:rgb(var(--low)/.42)}
.h2{background:rgb(var(--low)/.22)}.h3{background:rgb(var(--low)/.09)}
.h5{background:rgb(var(--high)/.12)}.h6{background:rgb(var(--high)/.27)}
.h7{background:rgb(var(--high)/.48)}.h8{background:rgb(var(--high)/.72)}
.legend{display:flex;align-items:center;gap:.5rem;font-size:.85rem;color:var(--soft);
margin-top:.8rem}
.legend span{display:inline-block;width:1.5rem;height:.8rem;border-radius:2px}
details{margin-top:1rem}summary{cursor:pointer;color:var(--link)}
.control{display:flex;align-items:center;gap:.6rem;margin-top:.6rem;font-size:.88rem;
color:var(--soft);font-variant-numeric:tabular-nums}
.control input{flex:1;max-width:30rem;accent-color:rgb(var(--low))}
.control button{font:inherit;color:var(--soft);background:none;border:1px solid var(--rule);
border-radius:6px;padding:.15rem .7rem;cursor:pointer}
.control button[aria-pressed=true]{color:var(--ink);background:var(--card);border-color:var(--soft)}
@media print{nav,.control{display:none}}
"""

_SCRIPT = """
(() => {
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axesOf = layout => Object.keys(layout).filter(key => /^[xy]axis/.test(key));
  const colours = axes => {
    const own = {'font.color': css('--soft'), 'hoverlabel.bgcolor': css('--card'),
      'hoverlabel.bordercolor': css('--rule'), 'hoverlabel.font.color': css('--ink'),
      'modebar.bgcolor': 'rgba(0,0,0,0)', 'modebar.color': css('--rule'),
      'modebar.activecolor': css('--soft')};
    for (const axis of axes) for (const line of ['gridcolor', 'linecolor', 'zerolinecolor'])
      own[axis + '.' + line] = css('--rule');
    return own;
  };
  const nested = (layout, flat) => {
    for (const [path, value] of Object.entries(flat)) {
      const keys = path.split('.'), last = keys.pop();
      keys.reduce((at, key) => at[key] ??= {}, layout)[last] = value;
    }
    return layout;
  };
  const options = {responsive: true, displaylogo: false, showSendToCloud: false,
    modeBarButtonsToRemove: ['select2d', 'lasso2d', 'autoScale2d']};
  const draw = figure => {
    const div = figure.querySelector('.plot');
    const spec = JSON.parse(figure.querySelector('script').textContent);
    spec.layout.font = {family: getComputedStyle(document.body).fontFamily, size: 12};
    Plotly.newPlot(div, spec.data, nested(spec.layout, colours(axesOf(spec.layout))), options);
    const choose = i => Plotly.update(div, spec.choices[i].data, spec.choices[i].layout);
    const slider = figure.querySelector('input');
    if (slider) slider.addEventListener('input', () => {
      choose(slider.valueAsNumber);
      figure.querySelector('output').textContent = spec.choices[slider.valueAsNumber].label;
    });
    const buttons = [...figure.querySelectorAll('.control button')];
    buttons.forEach((button, i) => button.addEventListener('click', () => {
      buttons.forEach(other => other.setAttribute('aria-pressed', other === button));
      choose(i);
    }));
  };
  document.querySelectorAll('figure').forEach(draw);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () =>
    document.querySelectorAll('.plot').forEach(div =>
      Plotly.relayout(div, colours(axesOf(div.layout)))));
})();
"""
