"""`moebius plan`: what a run costs before it is run, beside what was published of its model.

Everything is derived from the model built on the meta device: parameters and FLOPs from its
weights, the cache from its mixers' own states, optimizer memory from the states its rules make.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moebius.lab.memory import memory_of, optimizer_bytes
from moebius.lab.published import PUBLISHED, Figure
from moebius.model.block.prenorm import PreNorm
from moebius.model.count import Counts, count, count_groups, uses
from moebius.model.lm import LM, ModelConfig
from moebius.model.mixers import Mixer, MixerConfig
from moebius.model.mixers.cla import CLA
from moebius.model.mixers.gqa import GQA
from moebius.train.run import Run
from moebius.train.sections import sections_of

Report = dict[str, Any]
# So long that whatever a state keeps of fixed length is full; a multiple of any stride.
LONG = 1 << 20


def plan(run: Run, context: int | None = None) -> Report:
    """The costs of a run at a context length (its sequences'), and where they differ from print."""
    context = run.sequence_length if context is None else context
    if context < 1:
        raise ValueError(f"context must be at least 1 token, not {context}")
    with torch.device("meta"):
        model = run.model.build(run.vocab)
    counts = count(model, context)
    report: Report = {
        "recipe": run.name,
        "width": run.model.width,
        "layers": len(run.model.layers),
        "vocab": run.vocab,
        "context": context,
        "tokens_per_step": run.tokens_per_step(),
        "stages": [section.describe() for section in sections_of(run)[1:]],
        **_parameters(model, counts),
        "flops_forward": counts.flops_forward,
        "flops_backward": counts.flops_backward,
        "flops_train": counts.flops_train,
        "flops_forward_weights": counts.flops_weights,
        "flops_forward_mixing": counts.flops_mixing,
        "flops_train_weights": 3.0 * counts.flops_weights,
        **_cache(model, context),
        "memory": _memory(run, model),
        "groups": _groups(run, model, context),
    }
    table = kv_table(run.model)
    if table:
        report["kv_table"] = table
    report["published"] = _compared(report, PUBLISHED.get(run.name, {}))
    report["mismatches"] = [
        f"{key}: {row['ours']:,} here, {row['published']:,.0f} published ({row['source']})"
        for key, row in report["published"].items()
        if not row["agrees"]
    ]
    return report


def kv_table(config: ModelConfig) -> dict[str, int | float]:
    """Cache bytes per token, in bf16, of the schemes beside GQA with CLA; empty for other models.

    Each is that of the model's own layers, built with other attentions: every head with keys of
    its own (mha), as many key heads as there are (gqa), one (mqa); shared across layers (cla).
    """
    layers = [layer for layer in config.layers if isinstance(layer, PreNorm)]
    shared = [layer.mixer for layer in layers if isinstance(layer.mixer, CLA)]
    groups = [mixer.of for mixer in shared if isinstance(mixer.of, GQA)]
    if len(groups) < len(config.layers):
        return {}
    every = [dataclasses.replace(of, kv_heads=of.heads) for of in groups]
    schemes: dict[str, Sequence[MixerConfig]] = {
        "mha": every,
        "gqa": groups,
        "mqa": [dataclasses.replace(of, kv_heads=1) for of in groups],
        "cla": [CLA(of, mixer.borrows) for mixer, of in zip(shared, every, strict=True)],
        "gqa_cla": shared,
    }
    table: dict[str, int | float] = {}
    for name, mixers in schemes.items():
        pairs = zip(layers, mixers, strict=True)
        others = tuple(dataclasses.replace(layer, mixer=mixer) for layer, mixer in pairs)
        with torch.device("meta"):
            model = dataclasses.replace(config, layers=others).build(2)
        table[name] = cache_bytes_per_token(_mixers(model))
    return table


def _parameters(model: LM, counts: Counts) -> Report:
    """Parameters in all and active, and the same by the other conventions in use."""
    embedding, head = (
        sum(use.weight.numel() for use in uses(model) if use.group == group)
        for group in ("embedding", "head")
    )
    return {
        "params_total": counts.total,
        "params_active_min": counts.active_min,
        "params_active_mean": counts.active_mean,
        "params_active_max": counts.active_max,
        "params_active_with_embedding": counts.active_mean + embedding,
        "params_body": counts.total - embedding - head,
        "params_active_body": counts.active_mean - head,
    }


def _mixers(model: LM) -> list[Mixer]:
    return [mixer for block in model.blocks() for mixer in block.mixers()]


def cache_bytes_per_token(mixers: Sequence[Mixer]) -> int | float:
    """Bytes by which the states of one sequence grow for each token, once it is long."""
    at = [sum(mixer.state_bytes(n, torch.bfloat16) for mixer in mixers) for n in (LONG, 2 * LONG)]
    grown = at[1] - at[0]
    return grown // LONG if grown % LONG == 0 else grown / LONG


def _cache(model: LM, context: int) -> Report:
    """The decode state of one sequence in bf16: its growth, its fixed part, and at `context`."""
    mixers = _mixers(model)
    growth = cache_bytes_per_token(mixers)
    at_long, at_context = (
        sum(mixer.state_bytes(n, torch.bfloat16) for mixer in mixers) for n in (LONG, context)
    )
    return {
        "kv_bytes_per_token": growth,
        "kv_bytes_fixed": at_long - round(growth * LONG),
        "kv_bytes_at_context": at_context,
    }


def _memory(run: Run, model: LM) -> Report:
    memory = memory_of(run, model)
    tokens = min(run.micro_batch or run.batch, run.batch) * run.sequence_length
    return {
        "weights_bytes": memory.weights,
        "gradients_bytes": memory.gradients,
        "optimizer_bytes": memory.optimizer,
        "cast_bytes": memory.casts,
        "cast_bytes_recompute": memory.casts_recompute,
        "loss_bytes": memory.loss,
        "activation_bytes_per_token": memory.kept,
        "activation_bytes_per_token_recompute": memory.kept_recompute,
        "micro_batch_tokens": tokens,
        "training_bytes": memory.training(tokens, recompute=False),
        "training_bytes_recompute": memory.training(tokens, recompute=True),
        "recompute": run.recompute,
    }


def _groups(run: Run, model: LM, context: int) -> list[Report]:
    states, of_group = optimizer_bytes(run, model), defaultdict[str, int](int)
    for use in uses(model):
        of_group[use.group] += states[use.name]
    return [
        {
            "group": group,
            "params_total": counts.total,
            "params_active_min": counts.active_min,
            "params_active_mean": counts.active_mean,
            "params_active_max": counts.active_max,
            "flops_forward": counts.flops_forward,
            "flops_backward": counts.flops_backward,
            "optimizer_bytes": of_group[group],
        }
        for group, counts in count_groups(model, context).items()
    ]


def _compared(report: Report, figures: Mapping[str, Figure]) -> dict[str, Report]:
    rows: dict[str, Report] = {}
    for key, figure in figures.items():
        if figure.context not in (None, report["context"]):
            continue
        ours: Any = report
        for part in key.split("."):
            ours = ours.get(part, 0)
        rows[key] = {
            "published": figure.value,
            "ours": ours,
            "deviation": ours / figure.value - 1.0,
            "rounding": figure.rounding,
            "agrees": abs(ours - figure.value) <= figure.rounding,
            "source": figure.source,
        }
    return rows
