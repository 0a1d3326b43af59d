"""All checks of a seam on one config: `check_mixer(config)` for a mixer of your own.

`failures` gives what is wrong by the name of the check, for any seam.
"""

from collections.abc import Callable
from typing import Any

from moebius.config import Variant
from moebius.model.block import BlockConfig
from moebius.model.ends import EndConfig
from moebius.model.ffn import FeedForwardConfig
from moebius.model.ffn.balance import BalanceConfig
from moebius.model.ffn.routers import RouterConfig
from moebius.model.mixers import MixerConfig

from .common import COMMON_CHECKS
from .decode import DECODE_CHECKS, MIXER_CHECKS
from .flow import FLOW_CHECKS
from .parts import BALANCE_CHECKS, END_CHECKS, FFN_CHECKS, ROUTER_CHECKS

Check = Callable[[Any], None]

CHECKS: dict[type[Variant], tuple[Check, ...]] = {
    MixerConfig: (*COMMON_CHECKS, *FLOW_CHECKS, *DECODE_CHECKS, *MIXER_CHECKS),
    FeedForwardConfig: (*COMMON_CHECKS, *FLOW_CHECKS, *FFN_CHECKS),
    BlockConfig: (*COMMON_CHECKS, *FLOW_CHECKS, *DECODE_CHECKS),
    EndConfig: (*COMMON_CHECKS, *END_CHECKS),
    RouterConfig: (*COMMON_CHECKS, *ROUTER_CHECKS),
    BalanceConfig: (*COMMON_CHECKS, *BALANCE_CHECKS),
}


def name_of(check: Check) -> str:
    """`check_causal` -> causal."""
    return check.__name__.removeprefix("check_")


def failures(config: Variant) -> dict[str, str]:
    """Every check of the config's seam that fails, with the reason."""
    seam = next(base for base in CHECKS if isinstance(config, base))
    wrong: dict[str, str] = {}
    for check in CHECKS[seam]:
        try:
            check(config)
        except Exception as error:  # whatever a part under test raises is its failure
            wrong[name_of(check)] = f"{type(error).__name__}: {error}"
    return wrong


def check_mixer(config: MixerConfig) -> None:
    """Assert that a mixer passes every check."""
    wrong = failures(config)
    assert not wrong, "\n".join(f"{name}: {reason}" for name, reason in wrong.items())
