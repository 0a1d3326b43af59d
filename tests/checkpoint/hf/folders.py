"""Small HF folders, written without the peer: what tests of damage and of size begin with."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moebius.checkpoint.hf.llama import Llama
from moebius.checkpoint.hf.matching import read_config, theirs_of

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_tensors(
    config: dict[str, Any], dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """All tensors of a llama by their published names."""
    model = read_config(Llama(), config)[0]
    (layout,) = Llama().layouts(model.model, model.vocab, None)
    generator = torch.Generator().manual_seed(0)
    shapes = {name: pieces[0][1].shape for name, pieces in theirs_of(layout).items()}
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


def write_folder(folder: Path, config: dict[str, Any], *shards: dict[str, Tensor]) -> Path:
    """A folder as published: config.json and the tensors in files, with an index if several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
        return folder
    placed: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        placed |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def dealt(tensors: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Tensors dealt to so many shards, as awkwardly as can be: neighbours lie apart."""
    return [{name: tensors[name] for name in list(tensors)[i::count]} for i in range(count)]


def tiny_folder(folder: Path, shards: int = 1, **changes: Any) -> Path:
    """A whole tiny llama."""
    config = {**CONFIG, **changes}
    return write_folder(folder, config, *dealt(random_tensors(config), shards))
