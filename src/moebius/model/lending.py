"""What layers lend each other: that every borrower has its lender, and who must stay together.

A layer borrows by name from the nearest earlier layer that lends the name (cross-layer keys and
values). A unit is a run of layers that nothing lent leaves: recompute, compilation and pipeline
stages take units whole.
"""

from collections.abc import Iterable

from moebius.model.block import Block
from moebius.model.mixers import Mixer


def units_of(blocks: Iterable[Block]) -> tuple[range, ...]:
    """The units of a model's layers, in order.

    ValueError where a layer borrows what none before it lends, or lends in another form.
    """
    lenders: dict[str, tuple[int, Mixer]] = {}
    units: list[range] = []
    for i, block in enumerate(blocks):
        first = start = i
        for mixer in block.mixers():
            first = min([first, *(_lender(name, mixer, i, lenders) for name in mixer.borrows)])
            lenders |= dict.fromkeys(mixer.lends, (i, mixer))
        while start > first:
            start = units.pop().start
        units.append(range(start, i + 1))
    return tuple(units)


def _lender(name: str, mixer: Mixer, layer: int, lenders: dict[str, tuple[int, Mixer]]) -> int:
    """The layer that lends `name` to a mixer of `layer`."""
    if name not in lenders:
        raise ValueError(
            f"layers.{layer} borrows {name!r}, which no layer before it lends; "
            "begin each group of layers with its lender"
        )
    i, lender = lenders[name]
    lent, wanted = lender.loan, mixer.loan
    wrong = [
        f"{key} is {lent.get(key)} there, {wanted.get(key)} here"
        for key in {**lent, **wanted}
        if lent.get(key) != wanted.get(key)
    ]
    if wrong:
        raise ValueError(f"layers.{layer} cannot borrow {name!r} of layers.{i}: {'; '.join(wrong)}")
    return i
