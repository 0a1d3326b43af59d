"""The plots of one run's report, by section: learning, router, stability, speed."""

from collections.abc import Sequence

from moebius.monitor.page import Plot
from moebius.monitor.plots import (
    Line,
    by_layer,
    curves,
    depth_colours,
    key,
    over_layers,
    points,
    with_trend,
)
from moebius.monitor.router_plots import bias_range, effective_experts, load_map
from moebius.monitor.runs import RunRecord
from moebius.monitor.text import BASELINES, number


def learning(run: RunRecord) -> list[Plot | None]:
    lines, levels = run.lines, {}
    found = {**run.info, **(run.summary or {})}
    for field, name in {"val_bits_per_byte": "validation", **BASELINES}.items():
        value = number(found, field)
        if value is not None:
            levels[name] = value
    return [
        with_trend(
            "Training loss",
            "Pure cross-entropy in nats a token; balance and z-losses are not in it.",
            points(lines, key("loss")),
            "nats / token",
        ),
        with_trend(
            "Bits per byte",
            "The same, by bytes of original text; dotted: reached on the validation text.",
            points(lines, key("bits_per_byte")),
            "bits / byte",
            levels,
        ),
        curves("Learning rate", "The schedule.", {"lr": points(lines, key("lr"))}, "learning rate"),
    ]


def router(lines: Sequence[Line]) -> list[Plot | None]:
    return [
        load_map(lines),
        effective_experts(lines),
        by_layer(
            "Load variation",
            "Standard deviation of the experts' load over its mean; 0 is even.",
            lines,
            "load_cv",
            "CV",
        ),
        by_layer(
            "Highest load",
            "The busiest expert's share of all assignments.",
            lines,
            "max_load",
            "share",
        ),
        by_layer(
            "Dropped assignments",
            "Share of assignments beyond an expert's capacity that were dropped.",
            _where_any(lines, "dropped"),
            "dropped",
            "share",
        ),
        by_layer(
            "Recycled assignments",
            "Share of assignments sent to a free slot of another expert.",
            _where_any(lines, "recycled"),
            "recycled",
            "share",
        ),
    ]


def stability(lines: Sequence[Line]) -> list[Plot | None]:
    return [
        with_trend("Gradient norm", "Before clipping.", points(lines, key("grad_norm")), "L2 norm"),
        bias_range(lines),
        by_layer(
            "Router similarity",
            "Mean cosine similarity of the router's rows; high means experts that look alike.",
            lines,
            "router_similarity",
            "cosine",
        ),
        by_layer(
            "R_g",
            "The balance loss's gradient on the router over the language loss's; keep below 0.1.",
            lines,
            "r_g",
            "ratio",
        ),
        _hidden(lines),
        _by_role(
            "Gradient RMS by role",
            "Root mean square over the weights of a role; it must stay far above Adam's eps.",
            lines,
            "grad_rms",
        ),
        _by_role(
            "Update by role",
            "Norm of one update over the norm of the weights; about 1e-3 is usual.",
            lines,
            "update_ratio",
        ),
    ]


def _hidden(lines: Sequence[Line]) -> Plot | None:
    depth = max((len(line.get("hidden_rms") or ()) for line in lines), default=0)
    unpacked = [
        {"step": line["step"], **{str(i): x for i, x in enumerate(line.get("hidden_rms") or ())}}
        for line in lines
    ]
    return curves(
        "Hidden norms",
        "RMS of the residual stream after each layer.",
        {f"layer {i}": points(unpacked, key(str(i))) for i in range(depth)},
        "RMS",
        depth_colours(depth),
        log="plain",
    )


def _by_role(title: str, note: str, lines: Sequence[Line], name: str) -> Plot | None:
    roles = sorted({role for line in lines for role in line.get("roles") or {}})
    series = {role: points(lines, key(name, "roles", role)) for role in roles}
    return curves(title, note, series, "", log="powers")


def speed(lines: Sequence[Line]) -> list[Plot | None]:
    return [
        with_trend(
            "Throughput",
            "Tokens trained on a second, waiting and logging included.",
            points(lines, key("tokens_per_second")),
            "tokens / s",
        ),
        with_trend(
            "Model FLOP utilisation",
            "Useful matrix FLOPs over this machine's measured matmul rate.",
            points(lines, key("mfu")),
            "MFU",
        ),
    ]


def _where_any(lines: Sequence[Line], name: str) -> Sequence[Line]:
    """The lines, or none of them where no layer ever has more than 0 of `name`."""
    return lines if any(points(lines, over_layers(name, max))[1]) else ()
