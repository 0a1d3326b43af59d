"""A trained run as a scorer: its own loss on a text, in bits per byte (lower is likelier).

Tokens are read as evaluation reads them: `<|document|>` first, windows of the run's sequence length
that see nothing before them, the end of the document predicted too. Every text is computed by
itself, so its score does not depend on what else is scored. Letters: B windows of T tokens.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moebius.config import runtime
from moebius.curate.scorers import Scorer, Scores
from moebius.data.tokenizer import Tokenizer
from moebius.infer.load import LanguageModel, load
from moebius.model.context import Context
from moebius.monitor.runs import read_json

# Logits of at most so many tokens are held at once.
_TOKENS_AT_ONCE = 8192


@dataclasses.dataclass(frozen=True)
class LossScorer(Scorer):
    """A run folder; `score` is the bits per byte of its newest checkpoint."""

    run: str = ""
    # Tokens a window; none: the run's own sequence length.
    window: int | None = None
    # Of a longer text the first so many characters are scored.
    max_chars: int = 32768
    dtype: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu", "cuda"] = runtime("cpu")

    def __post_init__(self) -> None:
        if self.max_chars < 1 or (self.window is not None and self.window < 1):
            raise ValueError("max_chars and window must be at least 1")

    def build(self) -> "LossScores":
        if not self.run:
            raise ValueError("a loss scorer needs run, the folder of a trained run")
        dtype = torch.float32 if self.dtype == "fp32" else torch.bfloat16
        model, tokenizer = load(self.run, device=self.device, dtype=dtype)
        recipe = read_json(Path(self.run) / "run.json")["run"]
        return LossScores(
            model, tokenizer, self.window or recipe["sequence_length"], self.max_chars
        )


class LossScores(Scores):
    """The loaded model."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, window: int, max_chars: int
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.window, self.max_chars = window, max_chars

    def score(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Bits per byte of each text; an empty text has none."""
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> dict[str, float]:
        data = text[: self.max_chars].encode("utf-8", "replace")
        if not data:
            return {}
        ids = self.tokenizer.encode(data.decode())
        # What was cut off does not end here.
        end = [self.tokenizer.document] if len(text) <= self.max_chars else []
        nats = self.nats(torch.tensor([self.tokenizer.document, *ids, *end]))
        return {"score": nats / math.log(2) / len(data)}

    @torch.no_grad()
    def nats(self, tokens: Tensor) -> float:
        """The negative log-likelihood of each token but the first, summed, in nats."""
        size = self.window
        count = len(tokens) - 1
        whole = count // size * size
        pairs = [
            (tokens[:whole].view(-1, size), tokens[1 : whole + 1].view(-1, size)),
            (tokens[whole:-1].view(1, -1), tokens[whole + 1 :].view(1, -1)),
        ]
        rows = max(1, _TOKENS_AT_ONCE // size)
        device = self.model.lm.head.w_VD.device
        total = 0.0
        for inputs_BT, targets_BT in pairs:
            for start in range(0, len(inputs_BT) if inputs_BT.numel() else 0, rows):
                part_BT = inputs_BT[start : start + rows].to(device)
                wanted_BT = targets_BT[start : start + rows].to(device)
                ctx = Context.continuing(part_BT, 0)
                loss = self.model.lm.loss(
                    part_BT, wanted_BT, ctx, dtype=self.model.dtype, with_ends=False
                )
                total += float(loss.total)
        return total
