"""The evaluation at the end of a run: what its summary says beside its own speed and size.

Bits per byte beside the compressors (measured once a corpus and kept beside its shards), a sample, and
which tokens get few or many FFN experts.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius.data import Prepared, Tokenizer, heldout_batches
from moebius.eval.baselines import ngram, xz_all, xz_each
from moebius.eval.bits_per_byte import bits_per_byte
from moebius.infer.sample import sample_text
from moebius.monitor.tap import Observer, observing
from moebius.train.session import Session
from moebius.train.step import context_of

# Baselines of a large corpus are taken over this much of each side.
BASELINE_BYTES = 64 << 20
PROMPT = "def "
PASSAGE = 400


def evaluate(session: Session) -> dict[str, Any]:
    """The figures of a finished run; writes `tokens.json` where the model routes."""
    run, model, prepared = session.run, session.state.model, session.prepared
    result = bits_per_byte(
        model,
        prepared,
        run.sequence_length,
        run.batch,
        dtype=session.dtype,
        device=session.device,
    )
    tokens = expert_use(session)
    if tokens is not None:
        session.folder.write_json("tokens.json", tokens)
    model.eval()
    sample = sample_text(model, prepared.tokenizer, PROMPT, 200, seed=run.seed)
    model.train()
    return {
        "val_bits_per_byte": result.bits_per_byte,
        "val_loss": result.loss,
        "val_tokens": result.num_tokens,
        "val_bytes": result.num_bytes,
        **baselines(prepared),
        "sample": sample,
    }


def baselines(prepared: Prepared) -> dict[str, float]:
    """xz -9e and the byte 5-gram on the same bytes, from the corpus's folder if measured before."""
    path = Path(prepared.folder) / "baselines.json"
    if path.is_file():
        known = json.loads(path.read_text())
        if known.pop("digest") == prepared.digest:
            return known
    heldout = _upto(text for _, text in prepared.heldout_documents())
    train = _upto(text for _, text in prepared.train_documents())
    figures = {
        "xz_each_bits_per_byte": xz_each(heldout),
        "xz_all_bits_per_byte": xz_all(heldout),
        "ngram_bits_per_byte": ngram(train, heldout),
        "baseline_train_bytes": sum(map(len, train)),
        "baseline_val_bytes": sum(map(len, heldout)),
    }
    path.write_text(json.dumps({**figures, "digest": prepared.digest}, indent=2))
    return figures


def _upto(texts: Iterable[bytes]) -> list[bytes]:
    sizes = 0
    kept: list[bytes] = []
    for text in texts:
        sizes += len(text)
        if kept and sizes > BASELINE_BYTES:
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
        pass


@torch.no_grad()
def expert_use(session: Session, num_batches: int = 8) -> dict[str, Any] | None:
    """Mean FFN experts of held-out tokens: a passage, and by token; None without a router."""
    run, tokenizer = session.run, session.prepared.tokenizer
    parts = heldout_batches(session.prepared, run.sequence_length, run.batch)
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    passage: list[list[Any]] = []
    num_layers = 0
    session.state.model.eval()
    for part in itertools.islice(parts, num_batches):
        rows = part.to(session.device)
        budgets = _Budgets()
        with observing(budgets):
            session.state.model(rows.tokens_BT, context_of(rows, 0), dtype=session.dtype)
        if budgets.total_N is None:
            break
        num_layers = budgets.num_layers
        mean_N = budgets.total_N.float() / num_layers
        tokens = rows.tokens_BT.flatten().tolist()
        for token, mean in zip(tokens, mean_N.tolist(), strict=True):
            sums[token][0] += 1
            sums[token][1] += mean
        if not passage:
            pairs = zip(tokens[:PASSAGE], mean_N[:PASSAGE].tolist(), strict=True)
            passage = [[_text(tokenizer, token), mean] for token, mean in pairs]
    session.state.model.train()
    if not passage:
        return None
    by_token = [[_text(tokenizer, k), int(n), total / n] for k, (n, total) in sums.items()]
    return {"passage": passage, "by_token": by_token, "layers": num_layers}


def _text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_text(token)
