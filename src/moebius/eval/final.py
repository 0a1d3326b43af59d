"""The evaluation at the end of a run: what its summary says beside its own speed and size.

Bits per byte beside the compressors (measured once a corpus and kept beside its shards), a sample,
and which tokens get few or many FFN experts.
"""

import contextlib
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius.data.prepared import Prepared
from moebius.eval.baselines import ngram, xz_all, xz_each
from moebius.eval.bits_per_byte import Heldout, bits_per_byte
from moebius.infer.sample import sample_text
from moebius.model.lm import LM
from moebius.monitor.tap import Observer, observing

# Baselines of a large corpus are taken over this much of each side.
BASELINE_BYTES = 64 << 20
# The sample continues so many tokens of the first held-out document.
PROMPT = 24
PASSAGE = 400


def evaluate(
    model: LM,
    prepared: Prepared,
    *,
    sequence_length: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    write: Callable[[str, Mapping[str, Any]], object],
) -> dict[str, Any]:
    """The figures of a finished run; `write(name, data)` keeps `tokens.json` if it routes."""
    model.eval()
    heldout = Heldout(prepared, sequence_length, batch, dtype, device)
    result = bits_per_byte(model, heldout)
    use = expert_use(model, heldout)
    if use is not None:
        write("tokens.json", use)
    sample = sample_text(model, prepared.tokenizer, opening(prepared), 160, seed=seed)
    return {
        "val_bits_per_byte": result.bits_per_byte,
        "val_loss": result.loss,
        "val_tokens": result.num_tokens,
        "val_bytes": result.num_bytes,
        **baselines(prepared),
        "sample": sample,
    }


def opening(prepared: Prepared) -> str:
    """The first tokens of the first held-out document, as text: a prompt that fits any corpus."""
    shards = prepared.heldout[0].shards
    tokens = shards.tokens(next(iter(shards)), 0, PROMPT + 1).tolist()
    return prepared.tokenizer.decode(tokens[1:])


def baselines(prepared: Prepared) -> dict[str, float]:
    """xz -9e and the byte 5-gram on the same bytes, from the corpus's folder if measured before."""
    path = prepared.folder / "baselines.json"
    known = _known(path)
    if known.pop("digest", None) == prepared.digest:
        return known
    heldout = _up_to(BASELINE_BYTES, (text for _, text in prepared.heldout_documents()))
    train = _up_to(BASELINE_BYTES, (text for _, text in prepared.train_documents()))
    figures = {
        "xz_each_bits_per_byte": xz_each(heldout),
        "xz_all_bits_per_byte": xz_all(heldout),
        "ngram_bits_per_byte": ngram(train, heldout),
        "baseline_train_bytes": sum(map(len, train)),
        "baseline_val_bytes": sum(map(len, heldout)),
    }
    # A convenience for the next run: what cannot be kept, or is torn, is measured again.
    with contextlib.suppress(OSError):
        path.write_text(json.dumps({**figures, "digest": prepared.digest}, indent=2))
    return figures


def _known(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _up_to(limit: int, texts: Iterable[bytes]) -> list[bytes]:
    size = 0
    kept: list[bytes] = []
    for text in texts:
        size += len(text)
        if kept and size > limit:
            break
        kept.append(text)
    return kept


class _Budgets(Observer):
    """FFN experts of each token, summed over the layers that route."""

    def __init__(self) -> None:
        self.total_N: Tensor | None = None
        self.num_layers = 0

    def see(self, name: str, x: Tensor) -> None:
        if name.endswith("/ffn_per_token"):
            self.total_N = x.clone() if self.total_N is None else self.total_N + x
            self.num_layers += 1

    def see_gradient(self, name: str, grad: Tensor, index: Tensor) -> None:
        """No gradients flow in an evaluation."""


@torch.no_grad()
def expert_use(model: LM, heldout: Heldout, num_batches: int = 8) -> dict[str, Any] | None:
    """Mean FFN experts of held-out tokens: a passage, and by token; None without a router."""
    token_text = heldout.prepared.tokenizer.token_text
    counts: dict[int, int] = defaultdict(int)
    totals: dict[int, float] = defaultdict(float)
    passage: list[tuple[str, float]] = []
    num_layers = 0
    for tokens_BT, _, ctx in itertools.islice(heldout.batches(), num_batches):
        budgets = _Budgets()
        with observing(budgets):
            model(tokens_BT, ctx, dtype=heldout.dtype)
        if budgets.total_N is None:
            return None
        num_layers = budgets.num_layers
        mean_N = budgets.total_N.float() / num_layers
        valid_N = ctx.valid_BT.flatten()
        means = mean_N[valid_N].tolist()
        pairs = list(zip(tokens_BT.flatten()[valid_N].tolist(), means, strict=True))
        for token, mean in pairs:
            counts[token] += 1
            totals[token] += mean
        passage = passage or [(token_text(token), mean) for token, mean in pairs[:PASSAGE]]
    by_token = [(token_text(token), n, totals[token] / n) for token, n in counts.items()]
    return {"passage": passage, "by_token": by_token, "layers": num_layers}
