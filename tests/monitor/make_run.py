"""A made-up run folder for the tests of this room: two MoE layers, 8 FFN and 4 zero experts."""

import json
import math
from pathlib import Path
from typing import Any

NUM_FFN, NUM_ZERO, TOP_K = 8, 4, 3
HOSTILE = "</script><img src=x onerror=alert(1)>"


def layer(load: list[float] | None = None) -> dict[str, Any]:
    """The telemetry of a healthy layer, or of one with the given shares."""
    share = 2 / 3 / NUM_FFN
    shares = load or [share * (0.9 + 0.2 * (i % 2)) for i in range(NUM_FFN)] + [1 / 12] * NUM_ZERO
    ffn = [x / sum(shares[:NUM_FFN]) for x in shares[:NUM_FFN]]
    entropy = -sum(x * math.log(x) for x in ffn if x > 0)
    return {
        "load": shares,
        "num_ffn": NUM_FFN,
        "load_cv": 0.1,
        "max_load": max(shares[:NUM_FFN]),
        "entropy": entropy,
        "effective_experts": math.exp(entropy),
        "dead_experts": sum(x == 0 for x in ffn),
        "ffn_mean": 2.0,
        "ffn_std": 0.7,
        "ffn_hist": [0.1, 0.2, 0.3, 0.4],
        "dropped": 0.0,
        "recycled": 0.0,
        "bias_min": -0.01,
        "bias_max": 0.02,
        "router_similarity": 0.05,
        "r_g": 0.02,
    }


def line(step: int, **other: Any) -> dict[str, Any]:
    """A whole metrics line of a healthy run."""
    loss = 2 + 5 * math.exp(-step / 20)
    healthy = {
        "step": step,
        "tokens": step * 100,
        "loss": loss,
        "loss_hex": loss.hex(),
        "bits_per_byte": loss / 2,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "seconds": step * 0.5,
        "tokens_per_second": 200.0,
        "mfu": 0.3,
        "skipped": 0,
        "layers": {"0": layer(), "1": layer()},
        "hidden_rms": [1.0, 2.0],
        "roles": {"matrix": {"grad_rms": 1e-5, "update_ratio": 1e-3}},
        "alarms": [],
    }
    return healthy | other


def write_run(
    folder: Path,
    lines: list[dict[str, Any]],
    name: str = "toy-1",
    recipe: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    tokens: dict[str, Any] | None = None,
    events: list[dict[str, Any]] | None = None,
) -> Path:
    """Write a run folder; what is None is left out, as in a run that has not ended."""
    folder.mkdir(parents=True)
    info = {"name": name, "run": recipe or {"steps": 60}, "params_total": 1000, "precision": "fp32"}
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
    for data, file in ((summary, "summary.json"), (tokens, "tokens.json")):
        if data is not None:
            (folder / file).write_text(json.dumps(data))
    if events is not None:
        (folder / "events.jsonl").write_text("".join(json.dumps(item) + "\n" for item in events))
    return folder


SUMMARY = {
    "val_bits_per_byte": 1.4,
    "xz_each_bits_per_byte": 1.915,
    "xz_all_bits_per_byte": 1.476,
    "ngram_bits_per_byte": 1.7,
    "params_total": 24_300_000,
    "params_active_mean": 5_100_000,
    "params_active_min": 3_100_000,
    "params_active_max": 6_200_000,
    "tokens_per_second": 9100.0,
    "seconds": 432.0,
    "tokens": 6000,
    "steps": 60,
    "sample": "def f():\n    return 1\n",
    "precision": "fp32",
    "skipped_steps": 0,
}
