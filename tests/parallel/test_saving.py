"""Checkpoints that ranks write together: whole, once, as it was; or not at all, said by each."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.checkpoint.stored import Assembled, stored_tensors

from .ranks import launch
from .saving_worker import WIDE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saving")


@pytest.fixture(scope="module")
def found(folder: Path) -> Any:
    return launch(2, "saving_worker.py", folder / "found.json", folder / "checkpoints")


def test_what_each_rank_has_is_put_together(found: Any) -> None:
    assert found["kept"]["step-00000001"] == {
        "matrix": WIDE.tolist(),
        "first": [0.0] * 5,
        "second": [0.0] * 5,
    }


def test_what_changes_afterwards_is_not_saved(found: Any) -> None:
    assert found["kept"]["step-00000002"]["matrix"] == (WIDE + 0.5).tolist()
    assert found["kept"]["step-00000002"]["second"] == [0.5] * 5


def test_a_rank_without_room_is_named_by_all_and_leaves_nothing(found: Any) -> None:
    assert found["names"] == ["step-00000001", "step-00000002"]
    texts = [starved for starved, *_ in found["said"]]
    assert texts[0] == texts[1] and texts[0].count("rank 1: cannot save step 3") == 2
    assert "raise the limit on file sizes" in texts[0]


def test_an_element_given_twice_or_by_nobody_is_refused(found: Any) -> None:
    for _, twice, lost, twisted, outside in found["said"]:
        assert twice.count("24 elements of matrix to save, not each of its 24 once") == 2
        assert lost.count("12 elements of matrix to save, not each of its 24 once") == 2
        assert twisted.count("24 elements of matrix to save, not each of its 24 once") == 2
        assert outside.count("does not fit a tensor of [4, 6]") == 2


def test_what_one_rank_finds_damaged_all_pass_over(found: Any) -> None:
    for path, said in found["chosen"]:
        assert path == "step-00000001"
        assert len(said) == 1 and "step-00000002" in said[0] and "damaged" in said[0]


def test_any_rows_are_read_from_the_files_of_both_ranks(folder: Path, found: Any) -> None:
    path = folder / "checkpoints" / "step-00000001"
    assert path.name in found["names"]
    files = [file.name for file in path.glob("*.safetensors")]
    assert sorted(files) == ["tensors-of-00000.safetensors", "tensors-of-00001.safetensors"]
    stored, state = stored_tensors(path)
    matrix = stored["matrix"]
    assert isinstance(matrix, Assembled) and state == {"step": 1}
    assert (matrix.dtype, matrix.shape) == (torch.float32, (4, 6))
    for start in range(5):
        for stop in range(start, 5):
            assert torch.equal(matrix[start:stop], WIDE[start:stop])
