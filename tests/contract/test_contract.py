"""Every check over every entry of every table; `-k gqa` for an entry, `-k causal` for a check."""

from typing import Any

import pytest

from moebius.config import Variant
from moebius.model.block import BlockConfig
from moebius.model.ends import EndConfig
from moebius.model.ffn import FeedForwardConfig
from moebius.model.ffn.balance import BalanceConfig
from moebius.model.ffn.routers import RouterConfig
from moebius.model.mixers import MixerConfig

from .cases import LISTED, Case, cases, generic
from .harness import CHECKS, Check, name_of


def checks(base: type[Variant]) -> list[Any]:
    return [pytest.param(check, id=name_of(check)) for check in CHECKS[base]]


@pytest.mark.parametrize("check", checks(MixerConfig))
def test_mixer(mixer: Case, check: Check) -> None:
    check(mixer.make())


@pytest.mark.parametrize("check", checks(FeedForwardConfig))
@pytest.mark.parametrize("case", cases(FeedForwardConfig))
def test_ffn(case: Case, check: Check) -> None:
    check(case.make())


@pytest.mark.parametrize("check", checks(BlockConfig))
@pytest.mark.parametrize("case", cases(BlockConfig))
def test_block(case: Case, check: Check) -> None:
    check(case.make())


@pytest.mark.parametrize("check", checks(EndConfig))
@pytest.mark.parametrize("case", cases(EndConfig))
def test_end(case: Case, check: Check) -> None:
    check(case.make())


@pytest.mark.parametrize("check", checks(RouterConfig))
@pytest.mark.parametrize("case", cases(RouterConfig))
def test_router(case: Case, check: Check) -> None:
    check(case.make())


@pytest.mark.parametrize("check", checks(BalanceConfig))
@pytest.mark.parametrize("case", cases(BalanceConfig))
def test_balance_rule(case: Case, check: Check) -> None:
    check(case.make())


@pytest.mark.parametrize("base", CHECKS, ids=lambda base: base.SEAM)
def test_an_entry_without_a_line_is_built_from_its_fields(base: type[Variant]) -> None:
    for variants in LISTED[base].values():
        cls = type(next(iter(variants.values())))
        assert isinstance(generic(cls), cls)


def test_listed_entries_are_those_of_the_tables() -> None:
    for base, listed in LISTED.items():
        assert set(listed) <= set(base.TABLE), f"{base.SEAM}: {set(listed) - set(base.TABLE)}"
