"""litgpt's GPT of a run's shapes: dense Llamas and Qwen3's mixtures, experts in a loop.

litgpt 0.5 pins a huggingface-hub older than ours, so no environment installs both; put it aside and
name the folder: `pip install --no-deps --target DIR litgpt lightning lightning-utilities
torchmetrics jsonargparse docstring_parser typeshed_client psutil`, then PYTHONPATH=DIR. Its own
converter renames the weights, and our gradients too when the two are compared.
"""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moebius.bench.peers import Peer
from moebius.bench.peers.expressed import Expressed, express, under_their_names
from moebius.bench.peers.plain import Grads, Plain, agree, errors_of, rule_of
from moebius.bench.stepper import Place
from moebius.data.loader import Batch
from moebius.model.weight import initialise
from moebius.train.precision import DTYPES
from moebius.train.run import Run

SPEC = "moebius.bench.peers.litgpt:LitGPT"
# Families it has a converter for.
CONVERTERS = {"llama": "copy_weights_hf_llama", "qwen3_moe": "copy_weights_qwen_3"}


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"--peer litgpt needs litgpt on PYTHONPATH ({error}); how to put it there stands at "
            "the top of moebius/bench/peers/litgpt.py"
        ) from error


def prepare(run: Run, batch: Batch, device: torch.device, folder: Path) -> Peer:
    """Express a run, write its weights, compare; ValueError where litgpt has no such model.

    Its precision must be settled.
    """
    expressed = express(run)
    family = expressed.family.model_type
    if family not in CONVERTERS:
        raise ValueError(
            f"--peer litgpt: {run.name} is of family {family}; it has {' and '.join(CONVERTERS)}"
        )
    model = expressed.model.build(run.vocab)
    initialise(model, run.seed)
    config, dtype = _config(expressed, run.sequence_length), DTYPES[run.precision]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_renamed(expressed, config, model.state_dict()), folder / "model.safetensors")
    errors = errors_of(
        model.to(device),
        batch.to(device),
        dtype,
        lambda low: _loaded(folder, low).to(device),
        peer_loss,
        lambda ours, theirs: (_renamed(expressed, config, ours), theirs),
    )
    options = {"folder": str(folder), "adamw": dataclasses.asdict(rule_of(run))}
    notes = (*expressed.notes, "sees each row as one text, without a document mask")
    return Peer("litgpt", SPEC, options, errors, agree(errors), notes)


def _config(expressed: Expressed, length: int) -> dict[str, Any]:
    """Their config of a Hugging Face one."""
    given = expressed.config
    lacking = [name for name in ("rope_scaling", "tie_word_embeddings") if given.get(name)]
    if lacking:
        raise ValueError(f"--peer litgpt: not built here with {' and '.join(lacking)}")
    found = {
        "block_size": length,
        "n_layer": given["num_hidden_layers"],
        "n_embd": given["hidden_size"],
        "vocab_size": expressed.vocab,
        "padded_vocab_size": expressed.vocab,
        "n_head": given["num_attention_heads"],
        "head_size": given["head_dim"],
        "n_query_groups": given["num_key_value_heads"],
        "rotary_percentage": 1.0,
        "rope_base": int(given["rope_theta"]),
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "norm_eps": given["rms_norm_eps"],
        "intermediate_size": given["intermediate_size"],
        "mlp_class_name": "LLaMAMLP",
    }
    if expressed.family.model_type == "qwen3_moe":
        found |= {
            "norm_qk": True,
            "mlp_class_name": "LLaMAMoE",
            "moe_intermediate_size": given["moe_intermediate_size"],
            "n_expert": given["num_experts"],
            "n_expert_per_token": given["num_experts_per_tok"],
        }
    return found


def _renamed(expressed: Expressed, config: dict[str, Any], tensors: Grads) -> dict[str, Tensor]:
    """Tensors of our model as those of theirs, by their converter."""
    convert = _module("litgpt.scripts.convert_hf_checkpoint")
    made: dict[str, Tensor] = {}
    copy = getattr(convert, CONVERTERS[expressed.family.model_type])
    copy(_module("litgpt").Config(**config), {}, made, under_their_names(expressed, tensors))
    return {name: x.contiguous() for name, x in made.items()}


def _loaded(folder: str | Path, dtype: torch.dtype) -> Any:
    config = json.loads((Path(folder) / "config.json").read_text())
    litgpt = _module("litgpt")
    model = litgpt.GPT(litgpt.Config(**config))
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.to(dtype)


def peer_loss(model: Any, batch: Batch) -> Tensor:
    """The mean loss of a batch, as their pretraining computes it."""
    logits = model(batch.tokens_BT)
    return _module("litgpt.utils").chunked_cross_entropy(logits, batch.targets_BT)


@final
class LitGPT(Plain):
    """Their model of the weights in `options["folder"]`."""

    def __init__(self, place: Place, options: Any) -> None:
        super().__init__(place, options, _loaded(options["folder"], place.dtype).to(place.device))

    def loss(self, batch: Batch) -> Tensor:
        return peer_loss(self.model, batch)
