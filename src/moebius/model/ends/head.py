"""Embedding, final norm and head, tied or not. Letters: N = B x T tokens, D width, V vocabulary."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moebius.model.part import Norm
from moebius.model.weight import Weight
from moebius.ops.linear import linear
from moebius.ops.loss import head_cross_entropy
from moebius.ops.ranks import Cut, Ranks, Spread, looked_up


class Embedding(nn.Module, Spread):
    """Token vectors. Tied to the head they are drawn small, as the head needs them."""

    def __init__(self, vocab: int, width: int, tied: bool, scale: float | None = None) -> None:
        super().__init__()
        role = "head" if tied else "embedding"
        self.w_VD = Weight((vocab, width), role, std=width**-0.5 if tied else 1.0)
        usual = width**0.5 if tied else 1.0
        self.scale = usual if scale is None else scale
        self.ranks = Ranks()

    def spread(self, ranks: Ranks) -> Mapping[str, Cut]:
        """Each rank of `ranks.tensor` holds an equal share of the vocabulary."""
        self.ranks = ranks
        return {"w_VD": Cut(ranks.tensor)}

    def forward(self, tokens_BT: Tensor, dtype: torch.dtype) -> Tensor:
        x_BTD = looked_up(tokens_BT, self.w_VD, self.ranks.tensor).to(dtype)
        return x_BTD * self.scale if self.scale != 1.0 else x_BTD


class Head(nn.Module, Spread):
    """Final norm and projection to the vocabulary; the loss never holds all logits."""

    def __init__(self, vocab: int, width: int, eps: float, tied_to: Weight | None) -> None:
        super().__init__()
        self.norm = Norm(width, eps)
        # Small at first, so that training starts near the uniform distribution.
        self.w_VD = Weight((vocab, width), "head", std=0.1 * width**-0.5)
        if tied_to is not None:
            self.w_VD = tied_to
        self.ranks = Ranks()

    def spread(self, ranks: Ranks) -> Mapping[str, Cut]:
        """Each rank of `ranks.tensor` holds an equal share of the vocabulary."""
        self.ranks = ranks
        return {"w_VD": Cut(ranks.tensor)}

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits_BTV of hidden states."""
        return linear(self.norm(hidden_BTD), self.w_VD)

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """Sum over valid tokens of the negative log-likelihood, in nats."""
        return self.cross_entropy(self.norm(hidden_BTD), targets_BT, valid_BT)

    def cross_entropy(self, h_BTD: Tensor, targets_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """The same of hidden states that are normed already."""
        tokens = (h_BTD.flatten(0, 1), self.w_VD, targets_BT.flatten(), valid_BT.flatten())
        return head_cross_entropy(*tokens, self.ranks.tensor)
