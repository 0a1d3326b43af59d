"""Reading run folders: torn and damaged lines, and the list of runs."""

import json
from pathlib import Path

import pytest
from make_run import SUMMARY, line, write_run

from moebius.monitor.runs import list_runs, open_run, read_json, read_metrics


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [line(1), line(2)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line(3))[:40])
    assert [item["step"] for item in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    assert open_run(folder).torn == ("metrics.jsonl",)


@pytest.mark.parametrize("damage", [b'{"step": 2, "lo', b"[1]", b"\xff\xfe"])
def test_damage_before_the_last_line_names_file_and_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is damaged"):
        read_metrics(path)


def test_a_run_that_has_not_logged_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_read_json_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    with pytest.raises(ValueError, match="cannot read"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        read_json(path)


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it has no run\.json"):
        open_run(tmp_path)
    with pytest.raises(ValueError, match="there is no run folder"):
        open_run(tmp_path / "missing")


def test_list_runs(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "runs") == []
    write_run(tmp_path / "b", [line(1), line(2)], name="stopped-one")
    write_run(tmp_path / "a", [line(60)], name="finished-one", summary=SUMMARY)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    (tmp_path / "notes").mkdir()
    damaged = write_run(tmp_path / "c", [])
    (damaged / "run.json").write_text("{")
    first, second, third = list_runs(tmp_path)
    assert (first["name"], first["steps"], first["state"]) == ("finished-one", 60, "finished")
    assert (first["val_bits_per_byte"], first["params_total"]) == (1.4, 24_300_000)
    assert (second["name"], second["steps"], second["state"]) == ("stopped-one", 2, "stopped")
    assert second["loss"] == line(2)["loss"] and second["val_bits_per_byte"] is None
    assert third["state"] == "damaged" and "run.json is damaged" in third["problem"]
