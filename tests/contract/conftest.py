"""`pytest tests/contract --mixer my_idea.py:MyMixer` checks a mixer of your own as well."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moebius.config import variant_class
from moebius.model.mixers import MixerConfig

from .cases import Case, cases, generic


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mixer", metavar="FILE.py:CLASS", help="a mixer of your own to check")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mixer" not in metafunc.fixturenames:
        return
    params: list[Any] = cases(MixerConfig)
    spec = metafunc.config.getoption("--mixer", None)
    if spec:
        case = Case(spec, lambda: generic(variant_class(MixerConfig, spec)))
        params.append(pytest.param(case, id=spec.rpartition(":")[2]))
    metafunc.parametrize("mixer", params)
