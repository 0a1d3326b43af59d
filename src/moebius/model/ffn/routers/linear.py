"""The linear router that every score shares: logits by one matrix, in at least fp32.

Letters: N tokens, D width, E router outputs.
"""

from collections.abc import Callable

from torch import Tensor

from moebius.model.ffn.routers import Route, Router, Selection
from moebius.model.part import Site
from moebius.model.weight import Weight
from moebius.ops.linear import at_least_fp32, linear


class LinearRouter(Router):
    """Routes by `score(logits)`; final, used by every score's config."""

    def __init__(
        self,
        selection: Selection,
        site: Site,
        num_outputs: int,
        score: Callable[[Tensor], Tensor],
        bias: bool = False,
    ) -> None:
        super().__init__()
        selection.check(num_outputs)
        self.selection, self.score = selection, score
        self.w_ED = Weight((num_outputs, site.width), "router", std=site.into(site.width))
        self.b_E = Weight((num_outputs,), "bias") if bias else None

    def forward(self, x_ND: Tensor, bias_E: Tensor) -> Route:
        logit_NE = linear(x_ND.to(at_least_fp32(x_ND.dtype)), self.w_ED, self.b_E)
        return self.selection(logit_NE, self.score(logit_NE), bias_E)

    def check_trainable(self) -> None:
        if self.selection.renormalise and self.selection.top_k == 1:
            raise ValueError("top_k 1 with renormalise makes every weight 1: no router gradient")
