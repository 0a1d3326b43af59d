"""The corpus as a Sankey, drawn from the top down: sources, steps, what is kept.

The trunk is striped by source; at each step what is dropped turns off to the right, a band a
reason, in proportion. Where little is left, the trunk is drawn wider from there on, and says by how
much. Plain SVG: it needs no script, prints, and takes forty steps as well as one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moebius.curate.report.counted import Amount, Amounts, Counted, StepCounts, total
from moebius.curate.report.words import safe, share, size
from moebius.monitor.plots import COLOURS
from moebius.monitor.text import whole

_LEFT, _WIDTH, _RIGHT, _TOTAL = 220.0, 380.0, 680.0, 1100.0
_MAX_SOURCES = 7
# Bands of one step, and of all together: forty steps have room for fewer each.
_MAX_REASONS, _MIN_REASONS, _ALL_REASONS = 12, 4, 160
_WIDEN_BELOW = 0.3
_NODE, _SLOT, _GAP, _STEP_ROW = 5.0, 18.0, 4.0, 46.0
_OTHERS = "other sources"


@dataclass(frozen=True)
class _Measure:
    """What the widths mean: documents or bytes."""

    name: str
    index: int

    def of(self, amount: Amount) -> float:
        return float(amount[self.index])

    def say(self, value: float) -> str:
        return size(value) if self.index else whole(value)


DOCUMENTS, BYTES = _Measure("documents", 0), _Measure("bytes", 1)


def flow(counted: Counted) -> str:
    """The drawing by documents and by bytes, with the buttons that choose one."""
    if not counted.read.documents:
        return '<p class="quiet">No document was read.</p>'
    parts = []
    for i, measure in enumerate((DOCUMENTS, BYTES)):
        chosen = " checked" if i == 0 else ""
        parts.append(
            f'<input type="radio" name="flow" id="flow{i}"{chosen}>'
            f'<label for="flow{i}">{measure.name}</label>'
        )
    drawn = "".join(
        f'<div class="scroll flow{i}">{_Drawing(counted, measure).svg()}</div>'
        for i, measure in enumerate((DOCUMENTS, BYTES))
    )
    return f'<div class="flow">{"".join(parts)}{_legend(counted)}{drawn}</div>'


def _shown_sources(counted: Counted) -> dict[str, str]:
    """The sources that have a stripe of their own, by size, with their colours."""
    names = sorted(counted.sources, key=lambda name: (-counted.sources[name].bytes, name))
    kept = names if len(names) <= _MAX_SOURCES + 1 else names[:_MAX_SOURCES]
    colours = {name: COLOURS[i] for i, name in enumerate(kept)}
    return colours if len(kept) == len(names) else {**colours, _OTHERS: COLOURS[_MAX_SOURCES]}


def _legend(counted: Counted) -> str:
    colours = _shown_sources(counted)
    amounts = _by_stripe(counted.sources, colours)
    items = "".join(
        f'<span><i style="background:{colour}"></i>{safe(name, 60)} '
        f"<small>{whole(amounts[name].documents)} documents, {size(amounts[name].bytes)}</small>"
        "</span>"
        for name, colour in colours.items()
    )
    return f'<div class="sources">{items}</div>'


def _by_stripe(amounts: Amounts, colours: Mapping[str, str]) -> dict[str, Amount]:
    """Amounts by source as they have stripes: what has none of its own is with the others."""
    found = {name: amounts.get(name, Amount(0, 0)) for name in colours if name != _OTHERS}
    if _OTHERS in colours:
        rest = [amount for name, amount in amounts.items() if name not in found]
        found[_OTHERS] = total(rest)
    return found


class _Drawing:
    """One drawing, made from the top down. Final."""

    def __init__(self, counted: Counted, measure: _Measure) -> None:
        self._counted, self._measure = counted, measure
        self._colours = _shown_sources(counted)
        # Bands and stripes lie below bars and texts.
        self._bands: list[str] = []
        self._parts: list[str] = []
        self._y = 26.0
        self._scale = _WIDTH / max(1.0, measure.of(counted.read))

    def svg(self) -> str:
        """The whole drawing."""
        read = self._counted.read
        self._node(read, "read", f"{self._measure.say(self._measure.of(read))} in all")
        present: Amounts = self._counted.sources
        self._trunk(present, self._y + _STEP_ROW)
        for step in self._counted.steps:
            after = step.leaves(present)
            self._step(step, present, after)
            self._trunk(after, self._y + 10)
            present = after
        kept = self._counted.kept
        value, all_read = self._measure.of(kept), self._measure.of(read)
        self._node(kept, "kept", f"{self._measure.say(value)} ({share(value, all_read)})", "last")
        height = self._y + 40
        return (
            f'<svg viewBox="0 0 {_TOTAL:.0f} {height:.0f}" role="img" '
            f'aria-label="The corpus step by step, by {self._measure.name}">'
            f"{''.join(self._bands)}{''.join(self._parts)}</svg>"
        )

    # --- pieces -----------------------------------------------------------------------------------

    def _node(self, amount: Amount, name: str, more: str, kind: str = "") -> None:
        width = max(1.0, self._measure.of(amount) * self._scale)
        self._rect(_LEFT, self._y, width, _NODE, f"node {kind}")
        self._text(_LEFT - 16, self._y + 6, name, "end name")
        self._text(_LEFT - 16, self._y + 22, more, "end")

    def _step(self, step: StepCounts, present: Amounts, remaining: Amounts) -> None:
        """A step: its bar, its name and figures, the bands of what it drops."""
        measure, top = self._measure, self._y
        before, after = (measure.of(total(x.values())) for x in (present, remaining))
        pieces = self._pieces(step)
        lost = sum(value for _, value, _ in pieces)
        width = max(before, after + lost) * self._scale
        self._rect(_LEFT, top, max(1.0, width), _NODE, "node")
        self._text(_LEFT - 16, top + 6, step.label, "end name")
        for i, text in enumerate(self._figures(step, before, after)):
            self._text(_LEFT - 16, top + 22 + 15 * i, text, "end")
        seen = measure.of(step.before)
        edge, slot = _LEFT + (after + lost) * self._scale, top + _NODE + 3
        for name, value, kind in pieces:
            thick = value * self._scale
            height = max(_SLOT, thick + _GAP)
            middle = slot + height / 2
            self._band(edge - thick, edge, top + _NODE, middle - thick / 2, kind, name, value)
            said = f"{name} \u00b7 {measure.say(value)} \u00b7 {share(value, seen)}"
            self._text(_RIGHT + 12, middle + 4, said, "reason" if kind == "drop" else "reason soft")
            edge, slot = edge - thick, slot + height
        bottom = max(slot + 6, top + _STEP_ROW)
        self._y = top + _NODE
        self._trunk(remaining, bottom)
        if after and not _WIDEN_BELOW <= after * self._scale / _WIDTH <= 1.3:
            self._widen(remaining, after)

    def _pieces(self, step: StepCounts) -> list[tuple[str, float, str]]:
        """What leaves the trunk at a step, largest first: reasons, and text taken out."""
        measure = self._measure
        found = sorted(step.dropped.items(), key=lambda item: (-measure.of(item[1]), item[0]))
        steps = len(self._counted.steps)
        room = max(_MIN_REASONS, min(_MAX_REASONS, _ALL_REASONS // steps))
        shown, rest = (found, []) if len(found) == room + 1 else (found[:room], found[room:])
        pieces = [(name, measure.of(amount), "drop") for name, amount in shown]
        dropped = measure.of(step.dropped_all)
        taken = measure.of(step.before) - dropped - measure.of(step.after)
        if taken > 0.0005 * measure.of(step.before):
            pieces.append(("taken out of kept documents", taken, "taken"))
        pieces.sort(key=lambda piece: -piece[1])
        if rest:
            other = measure.of(total(amount for _, amount in rest))
            pieces.append((f"{len(rest)} further reasons", other, "drop"))
        return pieces

    def _figures(self, step: StepCounts, before: float, after: float) -> list[str]:
        """The lines below a step's name."""
        measure = self._measure
        if not before:
            return ["nothing came"]
        seen = measure.of(step.before)
        part = [f"it saw {measure.say(seen)} of {measure.say(before)}"] if seen < before else []
        if before == after:
            change = f"changed {whole(step.changed)}" if step.changed else "nothing dropped"
            return [f"{measure.say(after)} \u00b7 {change}", *part]
        less = share(abs(before - after), before)
        sign = "\u2212" if after < before else "+"
        return [f"{measure.say(before)} \u2192 {measure.say(after)} \u00b7 {sign}{less}", *part]

    def _trunk(self, amounts: Amounts, bottom: float) -> None:
        """The stripes of all sources, straight down to `bottom`."""
        self._stripes(amounts, self._scale, self._scale, self._y, bottom)
        self._y = bottom

    def _widen(self, amounts: Amounts, value: float) -> None:
        """From here on what is left is as wide as the whole was."""
        scale = _WIDTH / value
        self._stripes(amounts, self._scale, scale, self._y, self._y + 54)
        said = f"drawn {scale / self._scale:.3g} times as wide from here on"
        self._text(_LEFT + _WIDTH + 14, self._y + 42, said, "note")
        self._y, self._scale = self._y + 54, scale

    def _stripes(
        self, amounts: Amounts, above: float, below: float, top: float, bottom: float
    ) -> None:
        stripes = _by_stripe(amounts, self._colours)
        if not any(self._measure.of(amount) for amount in stripes.values()):
            stripes = {"": total(amounts.values())}
        start = 0.0
        for name, amount in stripes.items():
            end = start + self._measure.of(amount)
            if end > start:
                left, right = _LEFT + start * above, _LEFT + end * above
                left_below, right_below = _LEFT + start * below, _LEFT + end * below
                middle = (top + bottom) / 2
                self._bands.append(
                    f'<path class="stripe" fill="{self._colours.get(name, COLOURS[0])}" '
                    f'd="M{left:.2f} {top:.2f}'
                    f"C{left:.2f} {middle:.2f} {left_below:.2f} {middle:.2f} "
                    f"{left_below:.2f} {bottom:.2f}L{right_below:.2f} {bottom:.2f}"
                    f"C{right_below:.2f} {middle:.2f} {right:.2f} {middle:.2f} "
                    f'{right:.2f} {top:.2f}Z"><title>{safe(name)}: '
                    f"{self._measure.say(end - start)}</title></path>"
                )
            start = end

    def _band(
        self, left: float, right: float, top: float, y: float, kind: str, name: str, value: float
    ) -> None:
        """From the bar at `left`..`right` down, and to the right at height `y`."""
        thick = right - left
        left = min(left, right - 0.8)
        below, bend = y + max(0.8, thick), min(14.0, max(0.5, y - top))
        inner = bend + max(0.8, thick)
        self._bands.append(
            f'<path class="{kind}" d="M{right:.2f} {top:.2f}V{y - bend:.2f}'
            f"Q{right:.2f} {y:.2f} {right + bend:.2f} {y:.2f}H{_RIGHT:.2f}V{below:.2f}"
            f"H{left + inner:.2f}Q{left:.2f} {below:.2f} {left:.2f} {below - inner:.2f}"
            f'V{top:.2f}Z"><title>{safe(name)}: {self._measure.say(value)}</title></path>'
        )

    def _rect(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        self._parts.append(
            f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" '
            f'height="{height:.2f}" rx="1.5"/>'
        )

    def _text(self, x: float, y: float, text: str, kind: str) -> None:
        self._parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{safe(text, 70)}</text>')
