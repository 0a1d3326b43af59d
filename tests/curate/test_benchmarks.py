"""Reading benchmarks: every format, fields, and what is wrong with them."""

import gzip
import json
from pathlib import Path

import pytest

from moebius.config import from_json, to_json
from moebius.curate.benchmarks import Benchmark, items
from moebius.curate.steps.decontaminate import Decontaminate

RECORDS = [
    {"id": 1, "question": "What is it?", "choices": ["this", "that"], "meta": {"by": "me"}},
    {"id": 2, "question": "Why?", "choices": ["because"]},
]


@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz", "b.json", "b.json.gz", "whole.json"])
def test_records_of_every_format(tmp_path: Path, name: str) -> None:
    lines = "\n".join(json.dumps(record) for record in RECORDS) + "\n\n"
    whole = json.dumps({"version": 3, "data": RECORDS} if name == "whole.json" else RECORDS)
    data = (lines if "jsonl" in name else whole).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found = list(items(Benchmark(str(path), fields=("question", "question+choices"))))
    assert [item.parts for item in found] == [
        ("What is it?", "What is it?\nthis\nthat"),
        ("Why?", "Why?\nbecause"),
    ]
    stem = name.partition(".")[0]
    assert [item.name for item in found] == [f"{stem} {name}#0", f"{stem} {name}#1"]


def test_without_fields_all_texts_are_parts(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    first, _ = items(Benchmark(str(tmp_path), name="mine"))
    assert first.name == "mine b.jsonl#0"
    assert first.parts[:4] == ("What is it?", "this", "that", "me")
    assert first.parts[4] == "What is it?\nthis\nthat\nme"


def test_texts_are_divided_by_empty_lines_or_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("one\nmore\n  \n\ntwo\n")
    found = [item.parts[0] for item in items(Benchmark(str(tmp_path)))]
    assert found == ["one", "two", "one\nmore", "two"]


def test_mistakes_are_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "x"}\n')
    (tmp_path / "bad.jsonl").write_text('{"question": \n')
    (tmp_path / "bad.json.gz").write_bytes(b"no gzip")
    (tmp_path / "none.jsonl").write_text("\n")
    (tmp_path / "a.csv").write_text("x")
    for name, fields, message in [
        ("missing.jsonl", (), "there is no benchmark"),
        ("a.csv", (), "has no file of .jsonl"),
        ("a.jsonl", ("question", "questoin"), "no field 'questoin'; did you mean 'question'"),
        ("bad.jsonl", (), "is not JSON"),
        ("bad.json.gz", (), "cannot be read"),
        ("none.jsonl", (), "has no items"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            list(items(Benchmark(str(tmp_path / name), fields=fields)))
        assert "\n" not in str(error.value)


def test_configs_go_through_json() -> None:
    step = Decontaminate(benchmarks=(Benchmark("a", fields=("q+c",), rule="ratio", ratio=0.5),))
    assert from_json(Decontaminate, to_json(step)) == step
    with pytest.raises(ValueError, match="at least one benchmark"):
        Decontaminate()
    with pytest.raises(ValueError, match="shortest must lie"):
        Decontaminate(benchmarks=step.benchmarks, shortest=14)
    with pytest.raises(ValueError, match="ratio must lie"):
        Benchmark("a", ratio=0.0)
