"""Numbers and strangers' texts as HTML: everything from documents passes through `safe`."""

from collections.abc import Iterable, Sequence

from moebius.monitor.page import escape
from moebius.monitor.text import printable

_UNITS = ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters, the last one an ellipsis where some are left out."""
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


def safe(text: str, limit: int = 120) -> str:
    """A text as HTML: shortened, without control or direction characters, escaped."""
    return escape(printable(shortened(text, limit)))


def size(num_bytes: float) -> str:
    """Bytes in three digits: 512 B, 9.13 kB, 4.2 MB."""
    for scale, unit in _UNITS:
        if num_bytes >= scale * 0.9995:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def share(part: float, whole: float) -> str:
    """A part as a percentage: 12.3%, 0.04%; - of nothing."""
    if not whole:
        return "-"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return f"{percent:.1g}%" if percent >= 1e-4 else "<0.0001%"
    return f"{percent:.1f}%"


def bar(part: float, whole: float) -> str:
    """A short bar beside a figure."""
    width = 0.0 if not whole else min(100.0, 100 * part / whole)
    return f'<i class="meter"><i style="width:{width:.1f}%"></i></i>'


def figures_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1, foot: Sequence[str] = ()
) -> str:
    """A table of HTML cells: the first `texts` columns are words, the others figures."""

    def line(cells: Sequence[str], tag: str) -> str:
        made = (
            f"<{tag}{'' if i < texts else ' class=n'}>{cell}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(made)}</tr>"

    top = line([escape(name) for name in head], "th")
    body = "".join(line(row, "td") for row in rows)
    end = f"<tfoot>{line(foot, 'td')}</tfoot>" if foot else ""
    inner = f"<thead>{top}</thead><tbody>{body}</tbody>{end}"
    return f'<div class="scroll"><table>{inner}</table></div>'
