"""The width-transfer rule: which roles, which exponents, what becomes of the decay."""

import dataclasses

import pytest

from moebius.optim.optimizer import OptimConfig
from moebius.optim.roles import default_roles
from moebius.optim.rules import Rule
from moebius.optim.rules.adamw import AdamW
from moebius.optim.rules.muon import Muon
from moebius.optim.rules.soap import SOAP
from moebius.optim.schedules.constant import Constant
from moebius.optim.transfer import transferred


def config(matrix: Rule, width: int | None = 256) -> OptimConfig:
    roles = default_roles(matrix, expert_lr=0.5)
    return OptimConfig(1e-3, Constant(), roles, transfer_from_width=width)


def test_rates_of_matrices_fall_and_all_others_stay() -> None:
    """LongCat's s = 8 from 768 to 6144, with AdamW for all."""
    wide = transferred(config(AdamW(), 768), 6144)
    lrs = {name: role.lr for name, role in wide.roles.items()}
    same = dict.fromkeys(("embedding", "norm", "bias", "scalar"), 1.0)
    assert lrs == {"matrix": 1 / 8, "expert": 0.5 / 8, "router": 1 / 8, "head": 1 / 8, **same}
    for name, role in config(AdamW()).roles.items():
        now = wide.roles[name]
        assert now.lr * now.weight_decay == pytest.approx(role.lr * role.weight_decay)
    assert transferred(wide, 6144) == wide


@pytest.mark.parametrize(
    ("rule", "factor"),
    [
        (Muon(), 2.0),
        (Muon(scale="original"), 1.0),
        (Muon(scale="spectral"), 1.0),
        (SOAP(), 4.0),
    ],
)
def test_the_exponent_is_the_rules_own(rule: Rule, factor: float) -> None:
    roles = transferred(config(rule), 1024).roles
    assert (roles["matrix"].lr, roles["head"].lr) == (1 / factor, 1 / 4)
    assert roles["matrix"].weight_decay == factor


@pytest.mark.parametrize("scale", ["match_rms", "original", "spectral"])
def test_muons_exponent_keeps_the_spectral_norm_of_the_update(scale: str) -> None:
    rule = dataclasses.replace(Muon(compute="fp32"), scale=scale)
    norms = [
        rule._scale(2 * width, width) * width ** -rule.width_exponent() for width in (64, 1024)
    ]
    assert norms[0] == pytest.approx(norms[1])


def test_off_changes_nothing_and_bad_widths_are_refused() -> None:
    settings = config(AdamW(), None)
    assert transferred(settings, 512) is settings
    with pytest.raises(ValueError, match="transfer_from_width=0"):
        config(AdamW(), 0)
