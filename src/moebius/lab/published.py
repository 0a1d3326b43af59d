"""What sources say of the models whose recipes are here: each figure with its place and rounding.

A figure is compared with the plan's value under the same key (a dotted path). `rounding` is how far
the exact number may lie from the printed one; figures marked "transformers" are parameters of that
class at its published config, counted on the meta device (5.23; balance biases are buffers there
as here). Its LongCat class is no such figure: it gives zero experts 180B weights that are never
used.
"""

import dataclasses
from collections.abc import Mapping

LONGCAT = "arXiv 2509.01322"
HUNYUAN = "arXiv 2411.02265"
LLAMA = "arXiv 2407.21783, table 3"
DEEPSEEK = "arXiv 2412.19437"
INSIGHTS = "arXiv 2505.09343"
MOONLIGHT = "arXiv 2502.16982"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A published number; `context` where it holds at one length only."""

    value: float
    rounding: float
    source: str
    context: int | None = None


def _billions(value: float, digits: int, source: str) -> Figure:
    """A number of billions printed with so many digits after the point."""
    return Figure(value * 1e9, 0.5 * 10.0 ** (9 - digits), source)


def _exact(value: int, source: str) -> Figure:
    return Figure(float(value), 0.0, source)


PUBLISHED: Mapping[str, Mapping[str, Figure]] = {
    "longcat-flash": {
        "params_total": _billions(560.66, 2, f"{LONGCAT} 2.4: 560B, by its config 560.66B"),
        "params_active_min": _billions(18.69, 2, f"{LONGCAT} 2.1: 18.6B, with the router 18.69B"),
        "params_active_mean": _billions(27.15, 2, f"{LONGCAT} 2.1: 27B, with the router 27.15B"),
        "params_active_max": _billions(31.38, 2, f"{LONGCAT} 2.1: 31.3B, with the router 31.38B"),
        "kv_bytes_per_token": _exact(64_512, f"{LONGCAT} 6: 512 + 64 numbers, 56 attentions, bf16"),
    },
    "hunyuan-large": {
        "params_total": _billions(388.7, 1, f"{HUNYUAN} 1: 389B, by its config 388.7B"),
        "params_active_mean": _billions(51.3, 1, f"{HUNYUAN} 1: 52B, by its config 51.3B"),
        "kv_bytes_per_token": _exact(81_920, f"{HUNYUAN}, table of KV caches"),
        "kv_table.mha": _exact(1_638_400, f"{HUNYUAN}, table of KV caches"),
        "kv_table.gqa": _exact(163_840, f"{HUNYUAN}, table of KV caches"),
        "kv_table.mqa": _exact(20_480, f"{HUNYUAN}, table of KV caches"),
        "kv_table.cla": _exact(819_200, f"{HUNYUAN}, table of KV caches"),
        "kv_table.gqa_cla": _exact(81_920, f"{HUNYUAN}, table of KV caches"),
    },
    "llama3-8b": {"params_total": _billions(8.03, 2, f"{LLAMA}: 8B, by its config 8.03B")},
    "llama3-70b": {"params_total": _billions(70.55, 2, f"{LLAMA}: 70B, by its config 70.55B")},
    "llama3-405b": {
        "params_total": _billions(405.85, 2, f"{LLAMA}: 405B, by its config 405.85B"),
        "kv_bytes_per_token": _exact(516_096, f"{INSIGHTS}, table 1"),
        # 3.8e25 FLOPs for 15.6T tokens, both rounded to a unit of their last digit.
        "flops_train_weights": Figure(
            3.8e25 / 15.6e12, 4.0e10, "arXiv 2407.21783, 3.2.1: 3.8e25 FLOPs, 15.6T tokens"
        ),
    },
    "deepseek-v3": {
        "params_total": _exact(671_026_404_352, f"transformers; {DEEPSEEK}: 671B"),
        "params_active_mean": _billions(37, 0, f"{DEEPSEEK}, abstract"),
        "kv_bytes_per_token": _exact(70_272, f"{INSIGHTS}, table 1"),
        "flops_train": Figure(250e9, 0.5e9, f"{INSIGHTS}, table 2", context=4096),
    },
    "moonlight-16b-a3b": {
        "params_total": _exact(15_960_108_544, f"transformers; {MOONLIGHT}: 16B"),
        "params_body": _billions(15.29, 2, f"{MOONLIGHT}, without embedding and head"),
        "params_active_body": _billions(2.24, 2, f"{MOONLIGHT}, without embedding and head"),
    },
    "qwen3-30b-a3b": {
        "params_total": _exact(30_532_122_624, "transformers; arXiv 2505.09388: 30.5B"),
        "params_body": _billions(29.9, 1, "its model card: 29.9B, without embedding and head"),
        "params_active_mean": _billions(3, 0, "its name, A3B"),
    },
    "olmoe-1b-7b": {
        "params_total": _exact(6_919_161_856, "transformers; arXiv 2409.02060: 6.9B"),
        "params_active_with_embedding": _billions(1.3, 1, "arXiv 2409.02060, the look-up included"),
    },
    "kimi-linear-48b-a3b": {
        "params_total": _exact(49_122_675_072, "transformers"),
        "params_body": _billions(48, 0, "arXiv 2510.26692: 48B, without embedding and head"),
        "params_active_mean": _billions(3, 0, "arXiv 2510.26692: 3B"),
    },
}
