"""A borrower beside its lender, so that the checks of mixers run for it too.

Both mix the same tokens, and their outputs are added: what a check finds may be either's fault, and
the lender is checked alone as well.
"""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from moebius.model.block import Block, BlockOutput, States
from moebius.model.context import Context
from moebius.model.mixers import Mixer
from moebius.model.mixers.cla import CLA
from moebius.model.part import Site


class Beside(Block):
    """A borrowing mixer, and the lender it asks for, as two mixers of one block."""

    def __init__(self, config: CLA, site: Site) -> None:
        super().__init__()
        self.lender = dataclasses.replace(config, borrows=False).build(site)
        self.borrower = config.build(site)

    def mixers(self) -> tuple[Mixer, ...]:
        return (self.lender, self.borrower)

    def forward(
        self, x_BTD: Tensor, ctx: Context, states: States | None, borrowed: Mapping[str, Tensor]
    ) -> BlockOutput:
        lender_state, own_state = (None, None) if states is None else states
        y_BTD, lender_state, lent = self.lender(x_BTD, ctx, lender_state, borrowed)
        own_BTD, own_state, nothing = self.borrower(x_BTD, ctx, own_state, lent)
        assert not nothing, f"a borrower lent {sorted(nothing)}"
        pair = None
        if lender_state is not None and own_state is not None:
            pair = (lender_state, own_state)
        return BlockOutput(y_BTD + own_BTD, pair, {}, ())
