"""A config.json that is read strictly: each key is taken, harmless, or refused by name."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar, final

from moebius.config import nearest

T = TypeVar("T")

# What never changes the logits of a causal language model in evaluation.
_HARMLESS = """
    architectures auto_map model_type dtype torch_dtype transformers_version use_cache
    _name_or_path _attn_implementation attn_implementation initializer_range attention_dropout
    hidden_dropout resid_pdrop embd_pdrop bos_token_id eos_token_id pad_token_id sep_token_id
    decoder_start_token_id output_attentions output_hidden_states return_dict use_return_dict
    return_dict_in_generate torchscript pretraining_tp chunk_size_feed_forward problem_type id2label
    label2id num_labels finetuning_task task_specific_params tokenizer_class prefix max_length
    min_length do_sample temperature top_k top_p repetition_penalty output_router_logits
    router_aux_loss_coef keys_to_ignore_at_inference gradient_checkpointing unsloth_version
"""
HARMLESS: Final = frozenset(_HARMLESS.split())
# No model has a whole number above this in its config.
LARGEST: Final = (1 << 31) - 1


class _Required:
    """Stands for the absence of a default."""


_REQUIRED = _Required()


@final
class Keys:
    """The keys of a config, marked as they are taken."""

    def __init__(self, data: Mapping[str, Any], where: str = "config.json") -> None:
        self._data, self._where = dict(data), where
        self._taken: set[str] = set()

    def integer(self, name: str, default: int | _Required = _REQUIRED) -> int:
        """A whole number that can be a size; null counts as absent."""
        value = self._typed(name, int, "an integer", default)
        if not 0 <= value <= LARGEST:
            raise ValueError(f"{self._where}: {name} must lie in 0..{LARGEST}, not {value!r}")
        return value

    def number(self, name: str, default: float | _Required = _REQUIRED) -> float:
        """A finite number; null counts as absent."""
        value = self._typed(name, (int, float), "a number", default)
        if not abs(value) < math.inf or (isinstance(value, int) and abs(value) > LARGEST):
            raise ValueError(f"{self._where}: {name} must be a finite number, not {value!r}")
        return float(value)

    def flag(self, name: str, default: bool | _Required = _REQUIRED) -> bool:
        """True or false; null counts as absent."""
        return self._typed(name, bool, "true or false", default)

    def text(self, name: str, default: str | _Required = _REQUIRED) -> str:
        """A text; null counts as absent."""
        return self._typed(name, str, "a text", default)

    def integer_or_none(self, name: str) -> int | None:
        """A whole number, or None where it is null or absent."""
        return self.integer(name) if self.has(name) else self._none(name)

    def integers(self, name: str, count: int, default: int) -> list[int]:
        """A whole number for each of `count` layers, from one for all of them or a list."""
        if not isinstance(self._data.get(name), list):
            return count * [self.integer(name, default)]
        found = self.items(name) or []
        if len(found) < count or not all(type(n) is int and 0 <= n <= LARGEST for n in found):
            raise ValueError(f"{self._where}: {name} must be {count} whole numbers, not {found!r}")
        return found[:count]

    def number_or_none(self, name: str) -> float | None:
        """A number, or None where it is null or absent."""
        return self.number(name) if self.has(name) else self._none(name)

    def items(self, name: str) -> list[Any] | None:
        """A list as it is, or None where it is null or absent."""
        return self._typed(name, list, "a list", _REQUIRED) if self.has(name) else self._none(name)

    def below(self, name: str) -> "Keys | None":
        """The keys of an object, read as strictly by whoever takes it; None if null or absent."""
        if not self.has(name):
            return self._none(name)
        data = self._typed(name, dict, "an object", _REQUIRED)
        return Keys(data, f"{self._where}: {name}")

    def must(self, name: str, *values: Any, why: str) -> None:
        """Take a key that has to be absent or one of `values`; `why` says why others are refused.

        The first of `values` is the default.
        """
        self._taken.add(name)
        found = self._data.get(name, values[0])
        if found not in values:
            raise ValueError(f"{self._where}: {name} = {found!r} is not supported: {why}")

    def has(self, name: str) -> bool:
        """Whether a key is there and not null; this does not take it."""
        return self._data.get(name) is not None

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """ValueError naming the keys that were neither taken nor are harmless."""
        known = self._taken | set(harmless)
        unknown = sorted(self._data.keys() - known)
        if unknown:
            name = unknown[0]
            more = f" (nor are {', '.join(unknown[1:])})" if unknown[1:] else ""
            raise ValueError(
                f"{self._where}: {name!r} is not a key we know{more}{nearest(name, known)}; it may "
                "change what the model computes, so nothing was imported"
            )

    def _none(self, name: str) -> None:
        self._taken.add(name)

    def _typed(self, name: str, kind: Any, says: str, default: Any) -> Any:
        self._taken.add(name)
        value = self._data.get(name)
        if value is None:
            if isinstance(default, _Required):
                raise ValueError(
                    f"{self._where}: {name!r} is missing{nearest(name, self._data.keys())}"
                )
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self._where}: {name} must be {says}, not {value!r}")
        return value
