"""Listing a corpus and holding a tenth of it out."""

import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from moebius.data.documents import LIBRARY, Split, find_split, open_corpus


@pytest.mark.parametrize(
    "name, root, one",
    [
        (LIBRARY, Path(sysconfig.get_path("stdlib")), "argparse.py"),
        ("python:torch", Path(torch.__file__).parent, "nn/functional.py"),
    ],
)
def test_python_source_leaves_tests_out(name: str, root: Path, one: str) -> None:
    corpus = open_corpus(name)
    keys = [file.key for file in corpus.files]
    assert keys == sorted(keys) and one in keys
    excluded = {"test", "tests", "idle_test", "pydoc_data", "site-packages"}
    wanted = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not excluded & set(path.relative_to(root).parts[:-1])
    }
    assert set(keys) == wanted


def test_folder_is_sorted_and_counts_what_it_passes_over(tmp_path: Path) -> None:
    for name in ("b.py", "a.txt", "sub/c.jsonl.gz", "image.png", ".hidden.txt", ".git/config.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    corpus = open_corpus(str(tmp_path))
    assert [file.key for file in corpus.files] == ["a.txt", "b.py", "sub/c.jsonl.gz"]
    assert {reason: n for reason, (n, _) in corpus.passed_over.skipped.items()} == {
        "unknown kind of file": 1,
        "hidden file or folder": 2,
        "unreadable file": 1,
        "link to a folder": 1,
    }


@pytest.mark.parametrize("name", ["python:nowhere", "python:this", "python:torch.nn", "python:"])
def test_what_is_no_installed_package_is_said(name: str) -> None:
    with pytest.raises(ValueError, match=r"data\.path") as caught:
        open_corpus(name)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "empty", "only-images", "empty.txt", "hf:nowhere"])
def test_nothing_to_read_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "only-images").mkdir()
    (tmp_path / "only-images" / "a.png").write_bytes(b"x")
    (tmp_path / "empty.txt").touch()
    path = name if name.startswith("hf:") else str(tmp_path / name)
    with pytest.raises(ValueError, match=r"data\.path") as caught:
        open_corpus(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_file_and_folder_are_said(tmp_path: Path) -> None:
    """In a child without the rights of root, which may read anything."""
    (tmp_path / "locked.txt").write_text("text")
    (tmp_path / "locked.txt").chmod(0)
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "a.txt").write_text("text")
    (tmp_path / "closed").chmod(0)
    tmp_path.chmod(0o755)
    code = (
        "import os, sys\n"
        "from moebius.data.documents import open_corpus\n"
        "os.chdir(sys.argv[1])\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "for name in ('locked.txt', 'closed'):\n"
        "    try: open_corpus(name)\n"
        "    except ValueError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (tmp_path / "closed").chmod(0o700)
    lines = done.stdout.splitlines()
    assert lines[0] == "data.path: 'locked.txt' is unreadable"
    assert "'closed'" in lines[1] and lines[1].endswith("unreadable folder: 1")
    assert len(lines) == 2


def test_lone_plain_file_is_cut_smaller_the_smaller_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    pieces = {}
    for size in (100, 64 << 10, 1 << 20):
        path.write_bytes(b"x" * size)
        pieces[size] = open_corpus(str(path)).piece
    assert pieces == {100: 256, 64 << 10: 4096, 1 << 20: 16 << 10}


def _number(origin: str) -> int:
    return int(hashlib.sha256(os.fsencode(origin)).hexdigest(), 16)


def test_a_tenth_by_sha256_is_held_out() -> None:
    origins = [f"a/{i}.txt" for i in range(2000)]
    split = find_split(origins, "x")
    held_out = [origin for origin in origins if split.held_out(origin)]
    assert held_out == [origin for origin in origins if _number(origin) % 10 == 0]
    assert 140 < len(held_out) < 260


@pytest.mark.parametrize("held_out", [False, True])
def test_a_one_sided_corpus_gives_one_document_over(held_out: bool) -> None:
    sided = [f"{i}" for i in range(300) if (_number(f"{i}") % 10 == 0) == held_out][:5]
    split = find_split(sided, "x")
    moved = [origin for origin in sided if split.held_out(origin) != held_out]
    assert moved == [max(sided, key=_number) if held_out else min(sided, key=_number)]
    assert split != Split() and find_split(reversed(sided), "x") == split


def test_fewer_than_two_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="no usable text in y"):
        find_split([], "y")
    with pytest.raises(ValueError, match="only one document in y"):
        find_split(["a", "a", "a"], "y")
