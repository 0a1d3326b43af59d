"""The guide "add an attention": its mixer works and passes every check; planted defects do not."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moebius.config import from_json, override, to_json
from moebius.infer.sample import generate
from moebius.model.block.prenorm import PreNorm
from moebius.model.lm import ModelConfig
from moebius.model.mixers import TABLE, MixerConfig
from moebius.model.weight import initialise
from moebius.recipes import recipe

from .cases import DENSE, GQA_, WIDTH, cases
from .harness import CHECKS, check_mixer, failures

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "add-an-attention.md"


def guide_code() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text("utf-8"), re.M | re.S)
    assert len(blocks) == 1, "the guide needs exactly one block of Python: the mixer's file"
    return blocks[0]


def written(folder: Path, *changes: tuple[str, str]) -> str:
    """`file.py:Class` of the guide's mixer, with pieces of its text exchanged."""
    code = guide_code()
    for old, new in changes:
        assert code.count(old) == 1, f"{old!r} occurs {code.count(old)} times in the guide's code"
        code = code.replace(old, new)
    path = folder / "my_idea.py"
    path.write_text(code, "utf-8")
    return f"{path}:RunningMean"


def built(spec: str) -> MixerConfig:
    return from_json(MixerConfig, {"use": spec, "hidden": 24})


def test_the_guides_mixer_passes_every_check(tmp_path: Path) -> None:
    check_mixer(built(written(tmp_path)))


def test_a_future_leak_is_caught(tmp_path: Path) -> None:
    """The mean over the whole document instead of its past; decoding cannot know it either."""
    leak = ("ctx.attend_BTT.to(", "(ctx.attend_BTT | ctx.attend_BTT.mT).to(")
    wrong = failures(built(written(tmp_path, leak)))
    assert "changed an output before it" in wrong["causal"]
    after = {"causal", "decode", "prefill", "rollback", "rollback_again", "snapshot"}
    assert set(wrong) == after


def test_a_leak_between_documents_is_caught(tmp_path: Path) -> None:
    leak = ("ctx.attend_BTT.to(", "torch.ones_like(ctx.attend_BTT).tril().to(")
    wrong = failures(built(written(tmp_path, leak)))
    assert set(wrong) == {"packed"}


def test_an_uninitialised_weight_is_caught(tmp_path: Path) -> None:
    """A weight in a plain list is no attribute of its module: `initialise` never meets it."""
    declared = 'self.w_gate = Weight((config.hidden, site.width), "matrix", std=into)'
    hidden = 'self.gates = [Weight((config.hidden, site.width), "matrix", std=into)]'
    used = ("linear(x_BTD, self.w_gate)", "linear(x_BTD, self.gates[0])")
    wrong = failures(built(written(tmp_path, (declared, hidden), used)))
    assert "not finite after `initialise`" in wrong["finite"]


def test_a_weight_filled_with_nan_is_caught(tmp_path: Path) -> None:
    declared = 'self.w_gate = Weight((config.hidden, site.width), "matrix", std=into)'
    nan = 'self.w_gate = Weight((config.hidden, site.width), "matrix", constant=float("nan"))'
    wrong = failures(built(written(tmp_path, (declared, nan))))
    assert "not initialised: w_gate" in wrong["initialised"]


def test_a_parameter_without_a_role_is_caught(tmp_path: Path) -> None:
    declared = 'self.w_gate = Weight((config.hidden, site.width), "matrix", std=into)'
    bare = "self.w_gate = torch.nn.Parameter(torch.empty(config.hidden, site.width))"
    wrong = failures(built(written(tmp_path, (declared, bare))))
    assert "w_gate has no role" in wrong["initialised"]


def test_the_guides_commands_fit_the_quickstart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^moebius train quickstart (.*)$", GUIDE.read_text("utf-8"), re.M)
    assert commands, "the guide shows no command that trains"
    for command in commands:
        run = override(recipe("quickstart"), command.split())
        assert from_json(type(run), json.loads(json.dumps(to_json(run)))) == run
        with torch.device("meta"):
            layers = run.model.build(run.vocab).layers
        mixers = [type(m).__name__ for m in layers.modules() if "Mean" in type(m).__name__]
        assert mixers == 2 * len(layers) * ["_RunningMean"]


def test_the_guides_mixer_generates_beside_another(tmp_path: Path) -> None:
    mixers = (built(written(tmp_path)), GQA_)
    lm = ModelConfig(WIDTH, tuple(PreNorm(mixer, DENSE) for mixer in mixers)).build(40)
    initialise(lm, 0)
    tokens_BT = generate(lm.eval(), torch.tensor([[1, 2, 3]]), 5, temperature=0.0)
    assert tokens_BT.shape == (1, 5)


def test_the_guides_line_names_a_class_of_its_code() -> None:
    line = re.findall(
        r'^ +"(\w+)": "moebius\.model\.mixers\.(\w+):(\w+)",$', GUIDE.read_text(), re.M
    )
    assert line == [("running_mean", "running_mean", "RunningMean")]
    assert f"class {line[0][2]}(MixerConfig)" in guide_code()


def test_one_line_in_the_table_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests find the new entry, build it from its fields, and it goes by its name."""
    monkeypatch.setitem(TABLE, "running_mean", written(tmp_path))  # pyright: ignore
    found = {case.id: case.values[0] for case in cases(MixerConfig)}
    check_mixer(found["running_mean"].make())
    assert from_json(MixerConfig, "running_mean") == from_json(MixerConfig, written(tmp_path))


def test_an_entry_that_cannot_be_guessed_asks_for_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = ("    hidden: int = 128\n", "    hidden: int\n    kind: str\n")
    monkeypatch.setitem(TABLE, "running_mean", written(tmp_path, changed))  # pyright: ignore
    found = {case.id: case.values[0] for case in cases(MixerConfig)}
    with pytest.raises(AssertionError, match=r"'kind' cannot be guessed; add one line for it"):
        found["running_mean"].make()


def test_the_guides_test_command_runs_every_check(tmp_path: Path) -> None:
    """In a process of its own, as a user types it."""
    command = re.findall(r"^pytest (tests/contract .*)$", GUIDE.read_text("utf-8"), re.M)
    assert len(command) == 1
    words = command[0].replace("my_idea.py:RunningMean", written(tmp_path)).split()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(CHECKS[MixerConfig])} passed" in done.stdout
