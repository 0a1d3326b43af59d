"""A run's folder: fresh, locked by one process, and its files whole whatever happens."""

import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moebius.train.folder import Cut, RunFolder

LOCKER = """
import os, sys
from pathlib import Path
from moebius.train.folder import RunFolder

with RunFolder(Path(sys.argv[1])).lock():
    if "fork" in sys.argv and os.fork() == 0:
        print("forked", flush=True)
        sys.stdin.read()
        os._exit(0)
    if "fork" not in sys.argv:
        print("locked", flush=True)
    sys.stdin.read()
"""


def start(folder: RunFolder, *arguments: str) -> subprocess.Popen[str]:
    """A process that holds the lock until its standard input ends."""
    command = [sys.executable, "-c", LOCKER, str(folder.path), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# --- making ---------------------------------------------------------------------------------------


def test_create_takes_the_next_number(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "runs"
    assert [RunFolder.create(root, "tiny").path for _ in range(2)] == [
        root / "tiny-1",
        root / "tiny-2",
    ]
    (root / "tiny-9").mkdir()
    (root / "tiny-x").mkdir()
    (root / "tiny-more-50").mkdir()
    assert RunFolder.create(root, "tiny").path == root / "tiny-10"
    assert RunFolder.create(root, "my_idea.py:run").path == root / "my_idea.py-run-1"
    assert RunFolder.create(root, "../up").path == root / "up-1"


def test_create_never_gives_a_folder_twice(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: RunFolder.create(tmp_path, "run").path, range(100)))
    assert len(set(made)) == 100 == len(list(tmp_path.iterdir()))


def test_at_takes_a_new_or_an_empty_folder(tmp_path: Path) -> None:
    assert RunFolder.at(tmp_path / "a" / "b").path.is_dir()
    with RunFolder.at(tmp_path / "a" / "b").lock():
        pass
    assert RunFolder.at(tmp_path / "a" / "b").path == tmp_path / "a" / "b"
    (tmp_path / "a" / "b" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty; .*--resume, or choose another --out"):
        RunFolder.at(tmp_path / "a" / "b")


def test_open_needs_a_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"there is no run in .*run\.json"):
            RunFolder.open(path)
    RunFolder(tmp_path).write_json("run.json", {})
    assert RunFolder.open(tmp_path).path == tmp_path


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunFolder.create(Path("runs"), "a").path == tmp_path / "runs" / "a-1"
    assert RunFolder.at(Path("b")).path == tmp_path / "b"


def refuse_all(path: Path, reason: str) -> None:
    """No folder can be made below `path`, and each way says so in one line."""
    for make in (lambda: RunFolder.create(path, "run"), lambda: RunFolder.at(path / "run")):
        with pytest.raises(ValueError, match=f"^cannot make .*{reason}.*--out$"):
            make()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^cannot make the run folder .*File exists"):
        RunFolder.at(tmp_path / "file")
    refuse_all(tmp_path / "file" / "runs", "Not a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir(0o500)
    refuse_all(tmp_path / "empty", "Permission denied")
    with pytest.raises(ValueError, match="cannot be written; choose another --out"):
        RunFolder.at(tmp_path / "empty")
    folder = RunFolder(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"^cannot write to .*Permission denied"), folder.lock():
        pass
    with pytest.raises(ValueError, match=r"^cannot write .*Permission denied"):
        folder.write_json("run.json", {})


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"^cannot write to .*No such file"), folder.lock():
        pass
    with pytest.raises(ValueError, match=r"^cannot write .*No such file"):
        folder.write_json("run.json", {})


# --- the lock -------------------------------------------------------------------------------------


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    with start(folder) as process:
        assert first_line(process) == "locked"
        with pytest.raises(ValueError, match=re.escape(f"is training in {folder.path}")):
            folder.lock().__enter__()
        process.communicate("")
    with folder.lock():
        pass


def test_a_killed_process_frees_the_lock(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    with start(folder) as process:
        assert first_line(process) == "locked"
        process.kill()
        process.wait()
        with folder.lock():
            assert (folder.path / ".lock").exists()


def test_a_forked_worker_does_not_keep_a_killed_process_lock(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    with start(folder, "fork") as process:
        assert first_line(process) == "forked"
        with pytest.raises(ValueError, match="another process is training"):
            folder.lock().__enter__()
        process.kill()
        process.wait()
        with folder.lock():
            pass
        process.communicate("")  # ends the worker


def test_the_lock_holds_within_a_process_and_after_an_error(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    with folder.lock(), pytest.raises(ValueError, match="another process is training"):
        folder.lock().__enter__()
    with pytest.raises(KeyError), folder.lock():
        raise KeyError
    with folder.lock():
        pass


# --- its files ------------------------------------------------------------------------------------


def line(step: int, **more: Any) -> str:
    return json.dumps({"step": step, "loss": 1 / step, **more}) + "\n"


@pytest.mark.parametrize("torn", ["", '{"step": 4, "lo', '{"step": 4', "{", "12", "\x00\x00"])
def test_cut_metrics(tmp_path: Path, torn: str) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("".join(line(step) for step in range(1, 8)) + torn)
    folder.events.write_text(line(2, event="alarm") + '{"event": "start"}\n' + line(5) + torn)
    assert folder.cut_metrics(4) == Cut(later=4, unreadable=2 if torn else 0)
    assert folder.metrics.read_text() == "".join(line(step) for step in range(1, 5))
    assert folder.events.read_text() == line(2, event="alarm") + '{"event": "start"}\n'
    assert folder.cut_metrics(4) == Cut(0, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "metrics.jsonl"]


def test_cut_metrics_ends_a_last_line_that_lacks_only_its_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text(line(1) + line(2).rstrip())
    assert folder.cut_metrics(2) == Cut(0, 0)
    assert folder.metrics.read_text() == line(1) + line(2)


def test_cut_metrics_of_a_run_without_any(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).cut_metrics(3) == Cut(0, 0)
    assert list(tmp_path.iterdir()) == []


def test_json_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    path = folder.write_json("summary.json", {"a": [0.1, math.nan, (math.inf, 3)], "b": "ü \ud800"})
    assert path == tmp_path / "summary.json"
    assert folder.read_json("summary.json") == {"a": [0.1, None, [None, 3]], "b": "ü \ud800"}
    with pytest.raises(TypeError):
        folder.write_json("summary.json", {"a": object()})
    assert folder.read_json("summary.json")["a"][0] == 0.1
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("run.json", {"version": 1})
    (tmp_path / ".writing-run.json").write_text('{"vers')
    assert folder.read_json("run.json") == {"version": 1}
    folder.write_json("run.json", {"version": 2})
    assert folder.read_json("run.json") == {"version": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match=r"has no run\.json"):
        folder.read_json("run.json")
    (tmp_path / "run.json").write_text('{"steps": ')
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        folder.read_json("run.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match=r"^cannot read .*Is a directory"):
        folder.read_json("folder.json")


def test_keep_user_file(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    mine = tmp_path / "my_idea.py"
    mine.write_text("WIDTH = 1\n")
    kept = folder.keep_user_file(mine)
    assert re.fullmatch(r"my_idea-[0-9a-f]{12}\.py", Path(kept).name)
    assert Path(kept).parent == folder.path / "code"
    assert folder.keep_user_file(str(mine)) == folder.keep_user_file(kept) == kept
    mine.write_text("WIDTH = 2\n")
    other = folder.keep_user_file(mine)
    assert other != kept
    assert Path(kept).read_text() == "WIDTH = 1\n" and Path(other).read_text() == "WIDTH = 2\n"
    Path(other).write_text("half of it")
    assert folder.keep_user_file(mine) == other and Path(other).read_text() == "WIDTH = 2\n"
    with pytest.raises(ValueError, match=r"^cannot read .*No such file"):
        folder.keep_user_file(tmp_path / "absent.py")
