"""The HF families: how a published architecture's config and tensors map to ours, and back.

A family is one file plus one line in `TABLE`: it reads a `config.json`, writes one, and lists the
names of the tensors beside ours. `importer` and `exporter` do all that touches files. What a family
cannot hold it refuses by name with the reason; nothing is ever exported approximately.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from moebius.checkpoint.hf.keys import Keys
from moebius.checkpoint.hf.layout import Layout
from moebius.config import Variant
from moebius.model.lm import ModelConfig

TABLE = {
    "llama": "moebius.checkpoint.hf.llama:Llama",
    "qwen3_moe": "moebius.checkpoint.hf.qwen3_moe:Qwen3MoE",
    "olmoe": "moebius.checkpoint.hf.olmoe:OLMoE",
    "hunyuan_v1_moe": "moebius.checkpoint.hf.hunyuan_v1_moe:HunYuanMoEV1",
    "gpt_oss": "moebius.checkpoint.hf.gpt_oss:GptOss",
    "deepseek_v3": "moebius.checkpoint.hf.deepseek_v3:DeepseekV3",
    "longcat_flash": "moebius.checkpoint.hf.longcat_flash:LongcatFlash",
    "kimi_linear": "moebius.checkpoint.hf.kimi_linear:KimiLinear",
}

# Who is to load an exported folder; their layouts and the keys they need differ for some families.
Target = Literal["transformers", "vllm", "sglang"]


@dataclasses.dataclass(frozen=True)
class Imported:
    """What a config.json says, in our terms. `vocab` counts the embedding's rows."""

    model: ModelConfig
    vocab: int


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a config.json is written for. `context` is its max_position_embeddings."""

    target: Target
    context: int


@dataclasses.dataclass(frozen=True)
class Family(Variant, ABC):
    """The contract of a family. Its key in `TABLE` is its `model_type`."""

    TABLE: ClassVar[Mapping[str, str]] = TABLE
    SEAM: ClassVar[str] = "HF family"

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    # Keys of its config that change nothing we compute, beyond `keys.HARMLESS`.
    harmless: ClassVar[frozenset[str]] = frozenset()
    # Keys without which (or with a list in which) transformers fails: an export always writes them.
    explicit: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def read_config(self, keys: Keys) -> Imported:
        """Our model of a config; takes every key that means something, ValueError where unfit.

        What is neither taken nor harmless is refused by the caller, as is a map that does not fit
        the model. Absent keys mean transformers' defaults. `quantization_config` is not seen here.
        """

    @abstractmethod
    def write_config(self, model: ModelConfig, vocab: int, wanted: Wanted) -> dict[str, Any]:
        """The keys that describe this model, every one of them explicitly.

        ValueError (see `Refusals`) listing all that the family cannot hold. `model_type`,
        `architectures`, `dtype` and the token ids are added by the caller.
        """

    @abstractmethod
    def layouts(self, model: ModelConfig, vocab: int, target: Target | None) -> tuple[Layout, ...]:
        """The name maps. For an import (None): all there are; the one whose names are in the folder
        is taken, the first if they share them. For an export: exactly one.
        """
