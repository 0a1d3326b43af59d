"""What the tests of several rooms share: a small corpus, and places to run commands in."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .running import Place, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small texts. Nothing may be changed in it."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where that corpus lies prepared."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost far more than models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, cache: Path, one_thread: None
) -> Place:
    """A folder that the tests of one file share."""
    return Place(tmp_path_factory.mktemp("place"), corpus, cache)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, corpus: Path, cache: Path) -> Path:
    """A run of `tiny` over 40 steps that nothing ever stopped. Nothing may be changed in it."""
    home = Place(tmp_path_factory.mktemp("reference"), corpus, cache)
    return home.train("whole", "steps=40", "checkpoint_every=20")
