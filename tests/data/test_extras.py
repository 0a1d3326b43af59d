"""Without the `data` extra, what needs it says which command installs it, before writing."""

import json
import sys
from pathlib import Path

import pytest

from moebius.data.config import DataConfig
from moebius.data.prepare import prepare


@pytest.mark.parametrize(
    ("package", "path"),
    [("datasets", "hf:{}"), ("zstandard", "{}/a.jsonl.zst"), ("pyarrow", "{}/a.parquet")],
)
def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, path: str
) -> None:
    for name in ("a.jsonl.zst", "a.parquet", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": "a"}))
    monkeypatch.setitem(sys.modules, package, None)
    config = DataConfig(path=path.format(tmp_path), cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"pip install 'moebius\[data\]'"):
        prepare(config, 300)
    assert not (tmp_path / "cache").exists()
