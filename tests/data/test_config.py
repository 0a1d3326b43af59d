"""The data configuration refuses what makes no sense, and keeps run-time fields apart."""

import pytest

from moebius.config import fingerprint, from_json, to_json
from moebius.data.config import DataConfig, Source


@pytest.mark.parametrize("fields", [{}, {"path": "a", "sources": (Source("b"),)}])
def test_exactly_one_of_path_and_sources(fields: dict) -> None:
    with pytest.raises(ValueError, match=r"data\.path and data\.sources"):
        DataConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"max_bytes": 0}, {"max_document_bytes": 10}, {"workers": -1}],
)
def test_senseless_numbers_are_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        DataConfig(path="a", **fields)


@pytest.mark.parametrize("fields", [{"weight": 0.0}, {"weight": -1.0}, {"max_epochs": 0.0}])
def test_senseless_sources_are_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Source("a", **fields)


def test_json_and_identity() -> None:
    config = DataConfig(sources=(Source("a", 0.7), Source("b", 0.3, 2.0)), seed=3)
    assert from_json(DataConfig, to_json(config)) == config
    moved = from_json(DataConfig, to_json(config) | {"cache": "/elsewhere", "workers": 5})
    assert fingerprint(moved) == fingerprint(config)
    assert fingerprint(DataConfig(path="a", seed=1)) != fingerprint(DataConfig(path="a"))
