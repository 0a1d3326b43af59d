"""What the tests of families share, beside `parity`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moebius.checkpoint.hf import Family, Imported, Target, Wanted
from moebius.checkpoint.hf.importer import import_hf
from moebius.checkpoint.hf.matching import check_layout, read_config
from moebius.checkpoint.hf.refusals import Unfit
from moebius.infer.load import load
from moebius.model.count import count_config
from moebius.model.lm import ModelConfig

from .parity import Twin, say


def check_fused(twin: Twin) -> None:
    """The tensors as the peer holds them in memory, experts in one, make the same model."""
    folder = twin.home / "fused"
    folder.mkdir()
    state = {name: x.contiguous() for name, x in twin.peer.state_dict().items()}
    assert any(name.endswith(".experts.gate_up_proj") for name in state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((twin.folder / "config.json").read_bytes())
    found = load(import_hf(folder, twin.home / "fused-run", say=say))[0].lm.state_dict()
    for name, x in twin.lm.state_dict().items():
        assert torch.equal(x, found[name]), name


def check_published(family: Family, config: dict[str, Any], params: int) -> Imported:
    """A published config.json is read, is as large as they say, and its tensors are mapped."""
    imported, _ = read_config(family, config)
    assert count_config(imported.model, imported.vocab, 2048).total == params
    for target in (None, "vllm"):
        for layout in family.layouts(imported.model, imported.vocab, target):
            check_layout(layout, imported.model, imported.vocab)
    return imported


def refused(
    family: Family, ours: ModelConfig, reason: str, target: Target = "transformers"
) -> None:
    """An export refuses a model in one line that says why."""
    with pytest.raises(Unfit) as caught:
        family.write_config(ours, 300, Wanted(target, 64))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def check_unread(twin: Twin, changes: dict[str, Any], reason: str) -> None:
    """An import refuses a config with these keys in one line, and writes nothing."""
    path = twin.folder / "config.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | changes))
    with pytest.raises(ValueError) as caught:
        import_hf(twin.folder, twin.home / "unread", say=say)
    path.write_text(json.dumps(kept))
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert not (twin.home / "unread").exists()


def spelt(folder: Path, drop: tuple[str, ...], **keys: Any) -> None:
    """Change the spelling of a saved config.json."""
    path = folder / "config.json"
    found = {k: x for k, x in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps(found | keys))
