"""A run's model in terms of a Hugging Face family, with what the family cannot hold left out.

What is left out (balance losses, ends beside the head) is left out of our model too when the two
are compared, and named in the peer's row. Weights go into a folder as an export writes them.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import save_file
from torch import Tensor

from moebius.checkpoint.hf import Family, Wanted
from moebius.checkpoint.hf.assemble import ours, theirs
from moebius.checkpoint.hf.matching import check_layout, family_named, theirs_of
from moebius.checkpoint.hf.refusals import Unfit
from moebius.checkpoint.stored import Readable
from moebius.config import fields
from moebius.model.ffn.moe import MoE
from moebius.model.lm import LM, ModelConfig
from moebius.optim.rules.adamw import AdamW
from moebius.train.run import Run


@final
@dataclasses.dataclass(frozen=True)
class Held(Readable):
    """A tensor that is there already."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop].clone()

    def whole(self) -> Tensor:
        return self.tensor.clone()


@dataclasses.dataclass(frozen=True)
class Expressed:
    """Our model without what the family cannot hold, the family, its config, what differs."""

    model: ModelConfig
    vocab: int
    family: Family
    config: dict[str, Any]
    notes: tuple[str, ...]


def express(run: Run) -> Expressed:
    """A run's model as some family holds it; ValueError listing why none does."""
    model, notes = run.model, []
    if model.ends:
        notes.append(f"without {', '.join(type(end).__name__ for end in model.ends)}")
        model = dataclasses.replace(model, ends=())
    plain = _unbalanced(model)
    if plain != model:
        notes.append("without balance losses and controllers")
    rules = {role.rule for role in run.optim.roles.values()}
    if not all(isinstance(rule, AdamW) for rule in rules):
        names = sorted({type(rule).__name__ for rule in rules} - {"AdamW"})
        notes.append(f"steps AdamW where ours steps {', '.join(names)}")
    reasons: list[str] = []
    for name in Family.TABLE:
        family = family_named(name)
        wanted = Wanted("transformers", run.sequence_length)
        try:
            config = family.write_config(plain, run.vocab, wanted)
        except Unfit as error:
            reasons.append(str(error))
            continue
        named = {"model_type": family.model_type, "architectures": [family.architecture]}
        # No token is special here: transformers would leave a padding token out of the gradient.
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), None)
        config = {**config, **named, **special, "use_cache": False}
        return Expressed(plain, run.vocab, family, config, tuple(notes))
    raise ValueError(f"no HF family can hold the model of {run.name}; {' | '.join(reasons)}")


def _unbalanced(value: Any) -> Any:
    if isinstance(value, MoE):
        return dataclasses.replace(value, balance=())
    if isinstance(value, tuple):
        return tuple(_unbalanced(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _unbalanced(getattr(value, f.name)) for f in fields(type(value))}
        return type(value)(**changed)
    return value


def under_their_names(expressed: Expressed, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of our model (its weights or gradients) as the family's files have them, in fp32."""
    (layout,) = expressed.family.layouts(expressed.model, expressed.vocab, "transformers")
    check_layout(layout, expressed.model, expressed.vocab)
    held = {name: Held(x.detach().cpu()) for name, x in tensors.items()}
    dtypes = dict.fromkeys(theirs_of(layout), torch.float32)
    return {name: lazy.make() for name, lazy in theirs(layout, held, dtypes).items()}


def write_folder(expressed: Expressed, model: LM, folder: Path) -> None:
    """Write config.json and the weights, in fp32, as `from_pretrained` reads them."""
    tensors = under_their_names(expressed, model.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(expressed.config))


def under_our_names(expressed: Expressed, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a peer's model in memory (its gradients) as those of ours."""
    held = {name: Held(x) for name, x in tensors.items()}
    layouts = expressed.family.layouts(expressed.model, expressed.vocab, None)
    # In memory there are buffers too, which no weight of ours is made of.
    layout = next(each for each in layouts if theirs_of(each).keys() <= held.keys())
    return {name: lazy.make() for name, lazy in ours(layout, held).items()}
