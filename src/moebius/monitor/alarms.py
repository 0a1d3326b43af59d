"""Alarms: signs that a Mixture-of-Experts run goes wrong while its loss may still look fine.

Each condition is judged over a window of logged lines, most by its median, so that neither one
noisy line nor the first steps raise it. R_g and Adam's eps follow LongCat-Flash (2509.01322,
3.1.3). A layer collapses when its max load nears 1/S, the share of an expert that every token
picks, or when exp(entropy) is far below the number of experts.

Letters: E router outputs, S selected.
"""

import statistics
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from moebius.config import runtime
from moebius.monitor.text import number, significant

# Scores lie in [0, 1]: at a bias range of 2 no token's scores can change which expert comes first.
_BIAS_RANGE_LIMIT = 2.0


@dataclass(frozen=True)
class AlarmConfig:
    """Thresholds. `collapse_load` is the way from an even load (0) to 1/S (1).

    `bias_range` counts mean scores. Healthy controllers stay within a few of them (the bias has to
    correct differences of that size); at 30 it is the bias that chooses, not the token.
    `budget_swing` is the standard deviation of FFN experts a token over the window, by their mean;
    0.15 has been seen in healthy runs, 0.6 where a layer leapt between no expert and all.
    """

    window: int = runtime(10)
    quiet_steps: int = runtime(20)
    repeat_every: int = runtime(50)
    collapse_load: float = runtime(0.7)
    collapse_experts: float = runtime(0.25)
    dead_experts: int = runtime(0)
    bias_range: float = runtime(30.0)
    budget_swing: float = runtime(0.3)
    r_g: float = runtime(0.1)
    eps_factor: float = runtime(1e3)

    def __post_init__(self) -> None:
        if self.window < 1 or self.repeat_every < 1:
            raise ValueError("window and repeat_every of the alarms must be at least 1")


@final
class Alarms:
    """Reads every logged line and says what is wrong, each thing once in `repeat_every` lines.

    `adam_eps` and `roles` name what Adam divides by and the weight roles that it updates.
    A layer's bias is judged against the `mean_score` of its line (1/E where the line has none).
    """

    def __init__(
        self,
        config: AlarmConfig,
        adam_eps: float,
        roles: Collection[str],
    ) -> None:
        self._config = config
        self._adam_eps = adam_eps
        self._roles = tuple(roles)
        self._recent: dict[tuple[str, str], deque[Any]] = {}
        self._said: dict[tuple[str, str], int] = {}
        self._num_lines = 0

    def check(self, line: Mapping[str, Any]) -> list[str]:
        """The alarms that this line raises, given those before it; [] where all is well."""
        self._num_lines += 1
        if line["step"] < self._config.quiet_steps:
            return []
        messages: list[str | None] = []
        for layer, stats in line.get("layers", {}).items():
            place = f"layer {layer}"
            messages += [
                self._collapse(place, stats),
                self._dead(place, stats),
                self._bias(place, stats),
                self._swing(place, stats),
                self._r_g(place, stats),
            ]
        measured = line.get("roles", {})
        messages += [
            self._near_eps(role, measured[role]) for role in self._roles if role in measured
        ]
        return [message for message in messages if message is not None]

    def _collapse(self, place: str, stats: Mapping[str, Any]) -> str | None:
        num_ffn, top_k = _num_ffn(stats), len(stats.get("ffn_hist") or ()) - 1
        load, num_outputs = _ffn_load(stats), len(stats.get("load") or ()) or num_ffn
        highest = self._median("max load", place, max(load) if load else number(stats, "max_load"))
        effective = self._median("effective", place, number(stats, "effective_experts"))
        if highest is not None and 0 < top_k < num_ffn:
            even, full = 1 / num_outputs, 1 / top_k
            limit = even + self._config.collapse_load * (full - even)
            if highest >= limit:
                text = f"max load {highest:.3g} is near 1/S = {full:.3g} (threshold {limit:.3g})"
                return self._say("collapse", place, text)
        limit = self._config.collapse_experts * num_ffn
        if effective is not None and effective <= limit:
            text = f"{effective:.3g} effective experts of {num_ffn} (threshold {limit:.3g})"
            return self._say("collapse", place, text)
        return None

    def _dead(self, place: str, stats: Mapping[str, Any]) -> str | None:
        idle = frozenset(i for i, share in enumerate(_ffn_load(stats)) if share == 0)
        window = self._window("dead", place, idle if stats.get("load") else None)
        dead = sorted(frozenset.intersection(*window)) if window else []
        limit = self._config.dead_experts
        if len(dead) <= limit:
            return None
        names = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
        text = f"{len(dead)} experts without a token: {names} (threshold: more than {limit})"
        return self._say("dead experts", place, text)

    def _bias(self, place: str, stats: Mapping[str, Any]) -> str | None:
        low, high = number(stats, "bias_min"), number(stats, "bias_max")
        num_outputs = len(stats.get("load") or ()) or _num_ffn(stats)
        width = None if low is None or high is None else high - low
        middle = self._median("bias", place, width)
        if middle is None or not num_outputs:
            return None
        mean_score = number(stats, "mean_score") or 1 / num_outputs
        limit = min(self._config.bias_range * mean_score, _BIAS_RANGE_LIMIT)
        if middle <= limit:
            return None
        text = f"bias range {middle:.3g} against a mean score of {mean_score:.3g}"
        return self._say("saturated bias", place, f"{text} (threshold {limit:.3g})")

    def _swing(self, place: str, stats: Mapping[str, Any]) -> str | None:
        means = self._window("ffn_mean", place, number(stats, "ffn_mean"))
        if not means:
            return None
        middle, swing = statistics.fmean(means), statistics.pstdev(means)
        limit = self._config.budget_swing * middle
        if swing <= limit:
            return None
        text = f"FFN experts a token swing by {swing:.3g} around {middle:.3g}"
        return self._say("unsteady budget", place, f"{text} (threshold {limit:.3g})")

    def _r_g(self, place: str, stats: Mapping[str, Any]) -> str | None:
        middle = self._median("r_g", place, number(stats, "r_g"))
        if middle is None or middle <= self._config.r_g:
            return None
        text = f"R_g {middle:.3g}: the balance loss steers the router"
        return self._say("R_g", place, f"{text} (threshold {significant(self._config.r_g)})")

    def _near_eps(self, role: str, stats: Mapping[str, Any]) -> str | None:
        middle = self._median("grad_rms", role, number(stats, "grad_rms"))
        limit = self._config.eps_factor * self._adam_eps
        if middle is None or middle >= limit:
            return None
        text = f"gradient RMS {middle:.3g} is near Adam's eps {self._adam_eps:.3g}"
        return self._say("gradient near eps", f"role {role}", f"{text} (threshold {limit:.3g})")

    def _say(self, kind: str, place: str, text: str) -> str | None:
        last = self._said.get((kind, place))
        if last is not None and self._num_lines - last < self._config.repeat_every:
            return None
        self._said[kind, place] = self._num_lines
        return f"{kind}, {place}: {text}"

    def _window(self, name: str, place: str, value: Any) -> Sequence[Any]:
        """The last `window` values, this one included; empty while there are fewer."""
        recent = self._recent.setdefault((name, place), deque(maxlen=self._config.window))
        if value is None:
            return ()
        recent.append(value)
        return recent if len(recent) == self._config.window else ()

    def _median(self, name: str, place: str, value: float | None) -> float | None:
        window = self._window(name, place, value)
        return statistics.median(window) if window else None


def _num_ffn(stats: Mapping[str, Any]) -> int:
    return int(number(stats, "num_ffn") or len(stats.get("load") or ()))


def _ffn_load(stats: Mapping[str, Any]) -> list[float]:
    """The shares of the FFN experts alone; zero experts may rightly be crowded or empty."""
    load = (stats.get("load") or [])[: _num_ffn(stats)]
    return [share for share in load if share is not None]
