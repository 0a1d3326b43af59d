"""What is saved is what is loaded, bit by bit; the last few are kept."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moebius.checkpoint import CheckpointError, complete, latest_intact, load, save, verify
from moebius.checkpoint import tensors as tensors_module

EVERY_DTYPE = list(tensors_module._DTYPES)


def silent(line: str) -> None:
    raise AssertionError(line)


def random_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Any bit pattern, NaNs with payloads among them."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    size = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8).view(dtype).reshape(shape)


def bits(x: torch.Tensor) -> bytes:
    return bytes(x.contiguous().reshape(-1).view(torch.uint8).tolist())


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
        assert bits(found[name]) == bits(x), name


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (3, 4, 7)], ids=str)
def test_every_dtype_and_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {str(dtype): random_bits(dtype, shape) for dtype in EVERY_DTYPE}
    check_equal(load(save(tmp_path, 1, tensors, {}, keep=1))[0], tensors)


def test_any_name(tmp_path: Path) -> None:
    names = ["", " ", "a.b", "a/b", "..", 'q"uote', "line\nbreak", "größe ☃", "\x00", "x" * 500]
    tensors = {name: torch.randn(3) for name in names}
    check_equal(load(save(tmp_path, 1, tensors, {}, keep=1))[0], tensors)


def test_a_name_that_a_fragment_would_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor can be named"):
        save(tmp_path, 1, {"w[0:,0:]": torch.ones(3)}, {}, keep=1)
    assert not complete(tmp_path)


def test_views_and_shared_memory(tmp_path: Path) -> None:
    base = torch.randn(6, 8, requires_grad=True)
    tensors = {
        "tied.a": base,
        "tied.b": base,
        "transposed": base.T,
        "sliced": base[1:5:2, 3:],
        "expanded": base[:1].expand(4, 8),
        "parameter": torch.nn.Parameter(torch.randn(3).bfloat16()),
    }
    found, _ = load(save(tmp_path, 1, tensors, {}, keep=1))
    check_equal(found, {name: x.detach() for name, x in tensors.items()})


def test_a_loaded_tensor_does_not_write_to_its_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"w": torch.ones(100)}, {}, keep=1)
    load(path)[0]["w"].zero_()
    check_equal(load(path)[0], {"w": torch.ones(100)})


def test_no_tensors(tmp_path: Path) -> None:
    assert load(save(tmp_path, 0, {}, {}, keep=1)) == ({}, {})


def test_split_into_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors_module, "MAX_FILE_BYTES", 1000)
    tensors = {f"w{i}": torch.randn(40 * i) for i in range(9)}
    path = save(tmp_path, 1, tensors, {}, keep=1)
    files = sorted(path.glob("tensors-*.safetensors"))
    assert [file.name for file in files] == [f"tensors-{i:05d}.safetensors" for i in range(1, 7)]
    assert [len(load_file(file)) for file in files] == [4, 1, 1, 1, 1, 1]
    check_equal(load(path)[0], tensors)
    check_equal({k: x for file in files for k, x in load_file(file).items()}, tensors)


def test_state_round_trips_exactly(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "floats": [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1e22],
        "integers": [0, -1, 2**64, 2**63 - 1],
        "others": {"none": None, "yes": True, "no": False, "text": 'ü "\n\x00 ☃ \ud800', "": {}},
        "order": (3, (1, 2)),
    }
    _, found = load(save(tmp_path, 1, {}, state, keep=1))
    assert found == state | {"order": [3, [1, 2]]}
    assert [x.hex() for x in found["floats"]] == [x.hex() for x in state["floats"]]
    assert [type(x) for x in found["others"].values()] == [
        type(x) for x in state["others"].values()
    ]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": [0.0, math.nan]}}, r"state\.a\.b\[1\] is nan, .* hex"),
        ({"a": math.inf}, r"state\.a is inf"),
        ({"a": {1: 2}}, r"state\.a has the key 1"),
        ({"a": torch.ones(1)}, r"state\.a is a Tensor"),
    ],
)
def test_state_that_json_would_change_is_refused(
    tmp_path: Path, state: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 1, {}, state, keep=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("w", torch.ones(1, dtype=torch.complex64), "'w': safetensors has no torch.complex64"),
        ("w", torch.ones(2, device="meta"), "'w' has no plain bytes"),
        ("w", torch.eye(2).to_sparse(), "'w' has no plain bytes"),
        ("__metadata__", torch.ones(1), "reserves it"),
        ("\ud800", torch.ones(1), "cannot be read"),
    ],
)
def test_tensors_that_cannot_be_stored_are_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 1, {name: tensor}, {}, keep=1)
    assert list(tmp_path.iterdir()) == []


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "checkpoints"
    for step in (1, 5, 120, 99_999_999, 100_000_000):
        assert save(folder, step, {}, {}, keep=2) == complete(folder)[-1]
    assert names(folder) == ["step-100000000", "step-99999999"]
    assert [path.name for path in complete(folder)] == ["step-99999999", "step-100000000"]
    assert latest_intact(folder, say=silent) == folder / "step-100000000"


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 7, {"w": torch.zeros(2)}, {"version": 0}, keep=1)
    path = save(tmp_path, 7, {"w": torch.ones(2)}, {"version": 1}, keep=1)
    assert names(tmp_path) == ["step-00000007"]
    assert load(path)[1] == {"version": 1}


def test_later_steps_do_not_crowd_out_the_one_just_saved(tmp_path: Path) -> None:
    for step in (1, 2, 8, 9):
        save(tmp_path, step, {}, {}, keep=9)
    save(tmp_path, 3, {}, {}, keep=2)
    assert [path.name[-1] for path in complete(tmp_path)] == ["2", "3", "8", "9"]


def test_left_overs_are_cleaned_and_never_listed(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {}, {}, keep=3)
    for name in (".writing-step-00000002", ".removing-step-00000000", ".replaced-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{")
    (tmp_path / "notes.txt").write_text("the user's own")
    assert complete(tmp_path) == [path]
    assert latest_intact(tmp_path, say=silent) == path
    save(tmp_path, 2, {}, {}, keep=3)
    assert names(tmp_path) == ["notes.txt", "step-00000001", "step-00000002"]


def test_a_replaced_checkpoint_stands_in_until_the_next_save(tmp_path: Path) -> None:
    path = save(tmp_path, 4, {"w": torch.ones(3)}, {}, keep=1)
    aside = path.rename(tmp_path / ".replaced-step-00000004")
    assert complete(tmp_path) == [aside] and latest_intact(tmp_path, say=silent) == aside
    verify(aside)
    save(tmp_path, 5, {}, {}, keep=2)
    assert complete(tmp_path) == [path, tmp_path / "step-00000005"]


def test_no_checkpoints(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        assert complete(folder) == []
        assert latest_intact(folder, say=silent) is None


@pytest.mark.parametrize(("step", "keep"), [(1, 0), (-1, 1)])
def test_numbers_that_do_not_fit_are_refused(tmp_path: Path, step: int, keep: int) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save(tmp_path, step, {}, {}, keep=keep)
