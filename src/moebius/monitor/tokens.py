"""Which tokens get few or many FFN experts: a coloured passage, and tables by token.

The numbers are means over the MoE layers. Colours run over the passage's own range, blue for few
and orange for many.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moebius.monitor.page import escape, table
from moebius.monitor.text import count, printable, visible

_SHADES = 9
_ROWS = 15
_MIN_COUNT = 5


def token_parts(tokens: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The HTML parts for a `tokens.json`; none where there is none."""
    if tokens is None:
        return ()
    passage, by_token = tokens.get("passage") or [], tokens.get("by_token") or []
    layers = tokens.get("layers")
    parts = [_passage(passage, layers)] if passage else []
    return (*parts, _tables(by_token)) if by_token else tuple(parts)


def _passage(passage: Sequence[tuple[str, float]], layers: int | None) -> str:
    values = [value for _, value in passage if value is not None]
    low, high = min(values, default=0.0), max(values, default=0.0)
    spans = "".join(_span(text, value, low, high) for text, value in passage)
    over = f" (mean of {layers} layers)" if layers else ""
    shades = "".join(f'<span class="h{i}"></span>' for i in range(_SHADES))
    return (
        f"<h3>FFN experts by token in a passage{escape(over)}</h3>"
        f'<div class="legend">{low:.2f} {shades} {high:.2f}</div>'
        f'<div class="passage">{spans}</div>'
    )


def _span(text: str, value: float | None, low: float, high: float) -> str:
    shown = escape(printable(text))
    if value is None:
        return f"<span>{shown}</span>"
    place = (value - low) / (high - low) if high > low else 0.5
    shade = min(_SHADES - 1, int(place * _SHADES))
    return f'<span class="h{shade}" title="{value:.2f}">{shown}</span>'


def _tables(by_token: Sequence[tuple[str, int, float]]) -> str:
    """The tokens with the most and the fewest experts, among those seen often enough."""
    often = [row for row in by_token if row[1] >= _MIN_COUNT and row[2] is not None]
    chosen = sorted(often, key=lambda row: row[2])
    half = min(_ROWS, len(chosen) // 2)
    if not half:
        return ""
    head = ("token", "seen", "FFN experts")
    many, few = (
        table(head, [(visible(text), count(seen), f"{value:.2f}") for text, seen, value in rows])
        for rows in (reversed(chosen[-half:]), chosen[:half])
    )
    rare = len(by_token) - len(often)
    note = f"Tokens seen at least {_MIN_COUNT} times; {rare} rarer ones are left out."
    return (
        f'<div class="pair"><div><h3>Most experts</h3>{many}</div>'
        f'<div><h3>Fewest experts</h3>{few}</div></div><p class="sub">{escape(note)}</p>'
    )
