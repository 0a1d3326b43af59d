"""`load(run)`: a trained model and its tokenizer, from the run folder alone."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moebius import checkpoint
from moebius.config import kept_file, map_user_files
from moebius.data.tokenizer import Tokenizer
from moebius.model.context import Context
from moebius.model.lm import LM
from moebius.model.longer import effective_model
from moebius.monitor.runs import read_json


class LanguageModel(nn.Module):
    """A model as a user wants it: `model(tokens_BT)` gives `logits_BTV`. `lm` is what it wraps.

    `stops` are tokens that end a text of an imported model.
    """

    def __init__(self, lm: LM, dtype: torch.dtype, stops: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.lm, self.dtype, self.stops = lm, dtype, stops

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of every next token; each row is one document."""
        ctx = Context.continuing(tokens_BT, 0)
        return self.lm.logits(self.lm(tokens_BT, ctx, dtype=self.dtype).hidden_BTD)


def load(
    run: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[LanguageModel, Tokenizer]:
    """The model of a run at its newest intact checkpoint, in evaluation mode, and its tokenizer.

    Raises ValueError where the folder holds no run, or no intact checkpoint. A tokenizer that an
    imported model lacks, or that is not byte-level, raises it when it is used.
    """
    folder = Path(run)
    if not (folder / "run.json").is_file():
        raise ValueError(f"there is no run in {folder} (no run.json); `moebius runs` lists them")
    record = read_json(folder / "run.json")
    recipe = map_user_files(record["run"], lambda file: kept_file(folder / file))
    path = checkpoint.latest_intact(folder / "checkpoints", say=_say)
    if path is None:
        raise ValueError(f"{folder} has no checkpoint yet; wait for its first, or train it on")
    tensors, state = checkpoint.load(path)
    lm = effective_model(recipe, state["tokens"]).build(recipe["vocab"])
    if record["precision"] == "fp64":
        lm.double()
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    # Copied, not assigned: weights keep their roles, and tied ones stay one.
    try:
        lm.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"{folder / 'run.json'} is not of this checkpoint ({first}); restore it from a copy"
        ) from error
    lm.eval().requires_grad_(False).to(device)
    stops = tuple(record.get("imported", {}).get("eos", ()))
    return LanguageModel(lm, dtype, stops), _tokenizer(folder, record)


def _tokenizer(folder: Path, record: dict[str, Any]) -> Tokenizer:
    """The run's tokenizer. An imported model may have none that we read: what needs it says so."""
    named = record["run"]["data"].get("document") or record.get("imported", {}).get("document")
    try:
        return Tokenizer.load(folder / "tokenizer.json", named)
    except ValueError as error:
        if "imported" not in record:
            raise
        return Tokenizer(error)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
