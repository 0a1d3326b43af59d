"""Small corpora for the tests of the data room."""

import random
from pathlib import Path

import pytest

from moebius.data.config import DataConfig
from moebius.data.prepare import prepare
from moebius.data.prepared import Prepared

WORDS = [*"abcxyz=[]():,.\t", "lion", "river", "été", "数学", "def", "return", "None", "12", "345"]


def text_of(seed: int, lines: int = 12) -> str:
    """A text of its own for each seed."""
    rng = random.Random(seed)
    rows = (" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(lines))
    return f"document {seed}\n" + "\n    ".join(rows) + "\n"


def write_folder(folder: Path, count: int, first: int = 0) -> Path:
    """A folder of `count` text files, one of them in a folder below."""
    for i in range(first, first + count):
        path = folder / ("below" if i % 7 == 3 else ".") / f"text-{i:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text_of(i, 1 + i % 23).encode())
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A prepared folder of 60 documents."""
    root = tmp_path_factory.mktemp("corpus")
    config = DataConfig(path=str(write_folder(root / "texts", 60)), cache=str(root / "cache"))
    return prepare(config, 300)
