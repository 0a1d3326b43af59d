"""Numbers and tokens as short texts, for the console and the report.

Counts as `4.2M`, durations as `7m 12s`, tokens with their blanks made visible and nothing in them
that could drive a terminal. A number that is missing or not finite reads `-`.
"""

import math
from collections.abc import Mapping
from typing import Any

_BLANKS = {" ": "\u2423", "\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d"}

# What a run's summary compares its bits per byte with, and how that reads.
BASELINES = {
    "xz_each_bits_per_byte": "xz -9e, each file alone",
    "xz_all_bits_per_byte": "xz -9e, all together",
    "ngram_bits_per_byte": "byte 5-gram",
}


def number(data: Mapping[str, Any], key: str) -> float | None:
    """`data[key]` where it is a finite number, else None (absent, null, a text)."""
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def count(value: float | None) -> str:
    """A count in three digits: 512, 9.13k, 4.2M, 27.2B."""
    if value is None:
        return "-"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def whole(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def decimal(value: float | None, places: int = 3) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def significant(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def percent(value: float | None, places: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{places}f}%"


def duration(seconds: float | None) -> str:
    """Seconds as `8s`, `7m 12s`, `2h 03m`."""
    if seconds is None:
        return "-"
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m {total % 60:02d}s"
    return f"{total // 3600}h {total % 3600 // 60:02d}m"


def printable(text: str) -> str:
    """The text with every control character but newline and tab replaced by U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def visible(token: str) -> str:
    """A token on one line: blanks as signs, control characters as U+FFFD."""
    return printable("".join(_BLANKS.get(c, c) for c in token))
