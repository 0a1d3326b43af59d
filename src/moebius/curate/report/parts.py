"""The tables and the examples of the report, as HTML in which all foreign text is escaped."""

from collections.abc import Iterable, Mapping

import regex

from moebius.curate.report.counted import Amount, Amounts, Counted, StepCounts, total
from moebius.curate.report.sample import TEXT, Example, Sample
from moebius.curate.report.words import bar, figures_table, safe, share, shortened, size
from moebius.monitor.page import escape
from moebius.monitor.text import count, duration, printable, whole

_MAX_ROWS = 300
# Several empty lines are shown as one.
_BLANK = regex.compile(r"\n(?:[ \t\r\f]*\n){2,}")
# A page with many reasons shows fewer examples of each.
_EXAMPLES = ((8, 3), (25, 2), (150, 1))


def steps_table(counted: Counted) -> str:
    """A row a step: in, out, dropped, changed, bytes, speed."""
    head = ("step", "in", "out", "dropped", "", "changed")
    head = (*head, "bytes in", "bytes out", "docs/s", "time")
    rows = []
    for step in counted.steps:
        dropped = step.dropped_all.documents
        speed = step.before.documents / step.seconds if step.seconds else None
        rows.append(
            (
                safe(step.label),
                whole(step.before.documents),
                whole(step.after.documents),
                whole(dropped),
                share(dropped, step.before.documents) + bar(dropped, step.before.documents),
                whole(step.changed),
                size(step.before.bytes),
                size(step.after.bytes),
                count(speed),
                "-" if step.seconds is None else _seconds(step.seconds),
            )
        )
    return figures_table(head, rows)


def _seconds(value: float) -> str:
    if value < 0.1:
        return f"{1000 * value:.2g}ms"
    return f"{value:.2g}s" if value < 9.5 else duration(value)


def unread_table(counted: Counted) -> str:
    """What readers could not use, by source and reason."""
    rows = [
        (safe(source), safe(reason), whole(amount.documents), size(amount.bytes))
        for source, reasons in counted.unread.items()
        for reason, amount in _by_count(reasons)
    ]
    if not rows:
        return '<p class="quiet">Everything that was found was read.</p>'
    every = total(amount for reasons in counted.unread.values() for amount in reasons.values())
    foot = ("all", "", whole(every.documents), size(every.bytes))
    table = figures_table(("source", "reason", "inputs", "bytes"), rows[:_MAX_ROWS], 2, foot)
    return table + _more(len(rows))


def kept_tables(counted: Counted) -> str:
    """What is kept, by source, kind, group and language, beside each other."""
    parts = []
    for name, amounts in counted.kept_by.items():
        if not amounts or (name == "group" and not any(amounts)):
            continue
        rows = [
            (
                safe(value, 60) or "-",
                whole(amount.documents),
                size(amount.bytes),
                share(amount.bytes, counted.kept.bytes) + bar(amount.bytes, counted.kept.bytes),
            )
            for value, amount in _by_count(amounts)
        ]
        table = figures_table((name, "documents", "bytes", "of bytes"), rows[:25])
        parts.append(f"<div>{table}{_more(len(rows), 25)}</div>")
    return f'<div class="two kept">{"".join(parts)}</div>' if parts else ""


def _by_count(amounts: Amounts) -> list[tuple[str, Amount]]:
    return sorted(amounts.items(), key=lambda item: (-item[1].documents, -item[1].bytes, item[0]))


def _more(rows: int, limit: int = _MAX_ROWS) -> str:
    return f'<p class="quiet">... and {rows - limit} more.</p>' if rows > limit else ""


# --- examples -------------------------------------------------------------------------------------


def step_part(step: StepCounts, dropped: Sample, kept: Mapping[str, list[Example]]) -> str:
    """One step behind a line that opens it: its reasons, and documents it dropped or changed."""
    lost, before = step.dropped_all.documents, step.before.documents
    inner = _reasons(step)
    reasons = [reason for reason, _ in _by_count(step.dropped)]
    said = []
    if lost:
        most = ", ".join(safe(reason, 40) for reason in reasons[:3])
        more = ", ..." if len(reasons) > 3 else ""
        said.append(f"{whole(lost)} dropped ({share(lost, before)}): {most}{more}")
    if step.changed:
        said.append(f"{whole(step.changed)} changed")
    limit = next((each for most, each in _EXAMPLES if len(reasons) <= most), 1)
    for reason in reasons[: _EXAMPLES[-1][0]]:
        found = dropped.examples.get(reason, [])[:limit]
        number = whole(step.dropped[reason].documents)
        head = f"<h4>Dropped: {safe(reason)} <small>{number}</small></h4>"
        inner += head + (examples(found) or '<p class="quiet">No document of it was found.</p>')
    changed = kept.get(f"changed by {step.name}", [])[:2]
    if changed:
        inner += (
            f"<h4>Kept, and changed here <small>as they are now</small></h4>{examples(changed)}"
        )
    inner = inner or '<p class="quiet">It dropped and changed nothing.</p>'
    told = " &middot; ".join(said) or "nothing dropped or changed"
    summary = f"<summary>{safe(step.label)}<small>{told}</small></summary>"
    return f'<details class="step">{summary}{inner}</details>'


def _reasons(step: StepCounts) -> str:
    if not step.dropped:
        return ""
    before = step.before.documents
    rows = [
        (
            safe(reason),
            whole(amount.documents),
            share(amount.documents, before) + bar(amount.documents, before),
            size(amount.bytes),
        )
        for reason, amount in _by_count(step.dropped)
    ]
    head = ("reason", "documents", "of what came in", "bytes")
    return figures_table(head, rows[:_MAX_ROWS]) + _more(len(rows))


def examples(found: Iterable[Example]) -> str:
    """Documents as cards: where they are from, why they went, how they begin."""
    return "".join(_card(example) for example in found)


def _card(example: Example) -> str:
    about = [
        f"<b>{safe(example.key, 160)}</b>",
        *(safe(text, 200) for text in (example.source, example.url, example.date) if text),
        *([safe(example.language, 20)] if example.language else []),
        size(example.num_bytes) + (" of raw page" if example.raw else ""),
    ]
    figures = [f"{safe(n, 40)} {x:.4g}" for n, x in list(example.scores.items())[:12]]
    figures += [f"{safe(n, 40)}: {safe(x, 40)}" for n, x in list(example.labels.items())[:12]]
    if example.lineage:
        figures.append("changed by " + ", ".join(safe(x, 40) for x in example.lineage[:8]))
    why = f'<div class="why">{safe(example.detail, 300)}</div>' if example.detail else ""
    more = f"<div><small>{' &middot; '.join(figures)}</small></div>" if figures else ""
    text = escape(printable(_BLANK.sub("\n\n", shortened(example.text, TEXT).strip())))
    body = f'<pre dir="auto">{text}</pre>' if text else ""
    return (
        f'<article class="example"><header>{" &middot; ".join(about)}{why}{more}</header>'
        f"{body}</article>"
    )
