"""Damage is detected whatever byte it hits, named, and passed over for an older checkpoint."""

from pathlib import Path

import pytest
import torch

from moebius.checkpoint import CheckpointError, latest_intact, load, save, verify

FILES = ["manifest.json", "state.json", "tensors.safetensors"]
FRACTIONS = [0.0, 0.01, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9, 0.99, 1.0]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        tensors = {"w": torch.arange(20.0) * step, "n": torch.tensor(step)}
        save(tmp_path, step, tensors, {"step": step, "rng": "0" * 50}, keep=3)
    return tmp_path / "step-00000003"


def check_passed_over(path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        verify(path)
    with pytest.raises(CheckpointError, match=name):
        load(path)
    said: list[str] = []
    assert latest_intact(path.parent, say=said.append) == path.parent / "step-00000002"
    assert len(said) == 1 and name in said[0] and path.name in said[0] and "\n" not in said[0]


@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF])
@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte(saved: Path, name: str, fraction: float, mask: int) -> None:
    data = bytearray((saved / name).read_bytes())
    data[round(fraction * (len(data) - 1))] ^= mask
    (saved / name).write_bytes(data)
    check_passed_over(saved, name)


def test_every_byte_of_the_manifest(saved: Path) -> None:
    file = saved / "manifest.json"
    intact = file.read_bytes()
    for i in range(len(intact)):
        for mask in (0x01, 0x10, 0x80):
            file.write_bytes(intact[:i] + bytes([intact[i] ^ mask]) + intact[i + 1 :])
            with pytest.raises(CheckpointError, match=r"manifest\.json"):
                verify(saved)
    file.write_bytes(intact)
    verify(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    check_passed_over(saved, name)


@pytest.mark.parametrize("size", [0, 1, -1])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file(saved: Path, name: str, size: int) -> None:
    (saved / name).write_bytes((saved / name).read_bytes()[:size])
    check_passed_over(saved, name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_bytes_added(saved: Path, name: str) -> None:
    with open(saved / name, "ab") as file:
        file.write(b"\n")
    check_passed_over(saved, name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint(saved: Path, name: str) -> None:
    other = saved.with_name("step-00000001") / name
    (saved / name).write_bytes(other.read_bytes())
    check_passed_over(saved, name)


def test_a_foreign_file_beside_does_no_harm(saved: Path) -> None:
    (saved / "tensors-00002.safetensors").write_bytes(b"\x08")
    verify(saved)
    assert load(saved)[1]["step"] == 3


def test_a_share_of_the_files(saved: Path) -> None:
    """Each damaged file is found by one of those who share the work, and by nobody else."""
    for name in FILES[1:]:
        data = (saved / name).read_bytes()
        (saved / name).write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        found = 0
        for share in range(3):
            try:
                verify(saved, share=(share, 3))
            except CheckpointError as error:
                assert name in str(error)
                found += 1
        assert found == 1
        (saved / name).write_bytes(data)


def test_all_damaged(saved: Path) -> None:
    for step in (1, 2, 3):
        (saved.with_name(f"step-0000000{step}") / FILES[step - 1]).unlink()
    said: list[str] = []
    with pytest.raises(CheckpointError, match="no intact checkpoint") as caught:
        latest_intact(saved.parent, say=said.append)
    assert len(said) == 3
    message = str(caught.value)
    assert all(name in message for name in FILES) and "\n" not in message


def test_a_newer_format(saved: Path) -> None:
    file = saved / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(CheckpointError, match="newer format 2"):
        verify(saved)


def test_a_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        load(tmp_path / "absent")
