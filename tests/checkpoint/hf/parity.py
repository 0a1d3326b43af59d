"""Parity with transformers, for any family: random tiny models, imported and exported.

`Twin(config, folder)` builds the peer's model of a config with every weight and buffer random,
saves it as the peer does, and imports it. `check_forward`, `check_gradients`, `check_greedy`,
`check_bf16` and `check_export` compare the two; `check_all` does all but bf16, the exported folder
included. `check_fresh(model, ...)` is for models of ours that leave for the first time.
"""

import copy
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius import checkpoint
from moebius.checkpoint.hf.assemble import ours
from moebius.checkpoint.hf.exporter import export_hf
from moebius.checkpoint.hf.folder import open_folder
from moebius.checkpoint.hf.importer import import_hf
from moebius.checkpoint.hf.matching import choose, family_of, read_config
from moebius.checkpoint.hf.quantised import dequantised
from moebius.config import from_json, to_json
from moebius.data.tokenizer import train_tokenizer
from moebius.infer.load import load
from moebius.infer.sample import generate
from moebius.model.context import Context
from moebius.model.lm import LM, ModelConfig

transformers = pytest.importorskip("transformers", reason="the peer that parity is against")
transformers.utils.logging.disable_progress_bar()

FORWARD, GRADIENT = 2e-5, 1e-4
# What an export may change of a config.json, as the exporter documents.
EXCEPTIONS = {"quantization_config", "auto_map"}


def say(text: str) -> None:
    """For imports and exports whose words do not matter."""


def randomise(model: Any, seed: int = 0) -> None:
    """Fill every parameter and saved buffer so that each matters, and logits are of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, x in model.state_dict(keep_vars=True).items():
        if x.is_floating_point():
            noise = torch.randn(x.shape, generator=generator)
            fan_in = x.shape[-1] ** -0.5 if x.ndim > 1 else 0.3
            around = 1.0 if x.ndim == 1 and "norm" in name and "bias" not in name else 0.0
            x.data.copy_(around + fan_in * noise)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest deviation, relative to the largest number expected."""
    size = float(expected.abs().max())
    return float((found.double() - expected.double()).abs().max()) / (size or 1.0)


def peer_of(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """What plain `from_pretrained` makes of a folder: nothing missing, left over or unfit."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    odd = ("missing_keys", "unexpected_keys", "mismatched_keys")
    assert not any(info[key] for key in odd), info
    return model.eval()


@dataclass(frozen=True)
class Twin:
    """A random model of the peer's, its folder, and the run it was imported as."""

    config: Any
    home: Path
    seed: int = 0

    @cached_property
    def peer(self) -> Any:
        """The peer's model, in fp32 and evaluation mode."""
        torch.manual_seed(self.seed)
        config = copy.deepcopy(self.config)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        randomise(model, self.seed)
        return model.float().eval()

    @cached_property
    def folder(self) -> Path:
        """The peer's own folder."""
        self.peer.save_pretrained(self.home / "theirs")
        return self.home / "theirs"

    @cached_property
    def run(self) -> Path:
        """The run it becomes."""
        return import_hf(self.folder, self.home / "run", say=say)

    @cached_property
    def lm(self) -> LM:
        """Our model of it."""
        return load(self.run)[0].lm

    @cached_property
    def tokens_BT(self) -> Tensor:
        """Two sequences."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randint(0, self.lm.vocab, (2, 24), generator=generator)


def our_logits(lm: LM, tokens_BT: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    out = lm(tokens_BT, Context.continuing(tokens_BT, 0), dtype=dtype)
    return lm.logits(out.hidden_BTD)


def check_forward(twin: Twin) -> None:
    """fp32 logits."""
    with torch.no_grad():
        expected = twin.peer(twin.tokens_BT).logits
        assert float(expected.std()) > 0.1, "these logits say nothing"
        assert relative(our_logits(twin.lm, twin.tokens_BT), expected) < FORWARD


def check_gradients(twin: Twin) -> None:
    """The gradient of every parameter, theirs saved and imported as if they were weights."""
    tokens_BT, lm = twin.tokens_BT, copy.deepcopy(twin.lm).requires_grad_(True)
    targets = tokens_BT.roll(-1, 1).flatten()
    peer = copy.deepcopy(twin.peer)
    peer.zero_grad()
    for logits in (our_logits(lm, tokens_BT), peer(tokens_BT).logits):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets).backward()
    for p in peer.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    theirs = imported(peer, twin.home / "gradients")
    checked = 0
    for name, p in lm.state_dict(keep_vars=True).items():
        if isinstance(p, torch.nn.Parameter):
            mine = torch.zeros_like(p) if p.grad is None else p.grad
            assert relative(mine, theirs[name]) < GRADIENT, name
            checked += float(mine.abs().max()) > 0
    assert checked > 0.8 * len(list(lm.parameters()))


def imported(peer: Any, folder: Path) -> dict[str, Tensor]:
    """The tensors of a peer's model under our names."""
    peer.save_pretrained(folder)
    found = open_folder(folder)
    family = family_of(found.config)
    model, block = read_config(family, found.config)
    sources = dequantised(found.tensors, block)
    choice = choose(family.layouts(model.model, model.vocab, None), sources)
    return {name: lazy.make() for name, lazy in ours(choice.layout, sources).items()}


def check_greedy(twin: Twin, num_tokens: int = 64) -> None:
    """A greedy continuation, token by token from our decode state."""
    prompt_BT = twin.tokens_BT[:, :5]
    mine = generate(twin.lm, prompt_BT, num_tokens, temperature=0.0)
    settings = transformers.GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    mask = torch.ones_like(prompt_BT)
    theirs = twin.peer.generate(prompt_BT, attention_mask=mask, generation_config=settings)
    assert torch.equal(mine, theirs[:, prompt_BT.shape[1] :])


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def check_bf16(twin: Twin) -> None:
    """Our bf16 is no farther from theirs than theirs is from itself in another order of sums, and
    no farther from fp32 than theirs.

    The other order: half of each sequence first, the rest from the cache, by another kernel.
    """
    tokens_BT = twin.tokens_BT
    peer = copy.deepcopy(twin.peer).bfloat16()
    with torch.no_grad():
        exact = twin.peer(tokens_BT).logits
        theirs = peer(tokens_BT).logits
        other = reordered(peer, tokens_BT)
        mine = our_logits(twin.lm, tokens_BT, torch.bfloat16)
    noise = max(rms(theirs - other), rms(theirs - exact))
    assert rms(mine - exact) < 1.2 * rms(theirs - exact)
    assert rms(mine - theirs) < 1.5 * noise


def reordered(peer: Any, tokens_BT: Tensor) -> Tensor:
    """The peer's logits, computed in two pieces and by torch's fused attention."""
    half = tokens_BT.shape[1] // 2
    peer = copy.deepcopy(peer)
    peer.set_attn_implementation("sdpa")
    first = peer(tokens_BT[:, :half], use_cache=True)
    second = peer(tokens_BT[:, half:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.logits, second.logits], dim=1)


def check_export(twin: Twin, target: Any = "transformers") -> Path:
    """Import then export: the same tensors to the last bit, the same config; the peer's logits."""
    out = export_hf(twin.run, twin.home / f"for-{target}", target=target, say=say)
    before, after = open_folder(twin.folder), open_folder(out)
    if target == "transformers":
        kept = {key: x for key, x in before.config.items() if key not in EXCEPTIONS}
        assert after.config == kept
        assert after.tensors.keys() == before.tensors.keys()
        for name, stored in before.tensors.items():
            x, y = stored.whole(), after.tensors[name].whole()
            assert x.dtype == y.dtype and x.shape == y.shape, name
            assert torch.equal(bits(x), bits(y)), name
    with torch.no_grad():
        found = peer_of(out)(twin.tokens_BT).logits
        assert relative(found, twin.peer(twin.tokens_BT).logits) < FORWARD
    return out


def bits(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def check_all(twin: Twin) -> None:
    """Every comparison but bf16, which wants a model wide enough to have noise."""
    check_forward(twin)
    check_gradients(twin)
    check_greedy(twin)
    check_export(twin)


def fresh_run(model: ModelConfig, vocab: int, folder: Path, seed: int = 0) -> tuple[Path, LM]:
    """A run folder of a random model of ours, as the trainer leaves it, and the model."""
    lm = model.build(vocab)
    randomise(lm, seed)
    folder.mkdir()
    recipe = {"model": to_json(model), "vocab": vocab, "data": {"path": "x"}, "sequence_length": 64}
    record = {"name": "fresh", "precision": "fp32", "run": recipe}
    (folder / "run.json").write_text(json.dumps(record))
    tensors = {f"model.{name}": x for name, x in lm.state_dict().items()}
    checkpoint.save(folder / "checkpoints", 3, tensors, {"step": 3, "tokens": 192}, keep=1)
    train_tokenizer(["some text to train on"], 257).save(folder / "tokenizer.json")
    return folder, lm.eval()


def check_fresh(model: ModelConfig, vocab: int, home: Path, target: Any = "transformers") -> Path:
    """A model of ours, exported: plain transformers computes its logits."""
    run, lm = fresh_run(model, vocab, home / "fresh")
    out = export_hf(run, home / f"fresh-{target}", target=target, say=say)
    tokens_BT = torch.randint(0, vocab, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = our_logits(lm, tokens_BT)
        assert relative(peer_of(out)(tokens_BT).logits, expected) < FORWARD
    back = load(import_hf(out, home / f"back-{target}", say=say))[0].lm
    with torch.no_grad():
        assert relative(our_logits(back, tokens_BT), expected) < FORWARD
    return out


def model_of(run: Path) -> ModelConfig:
    """The model that a run folder describes."""
    return from_json(ModelConfig, json.loads((run / "run.json").read_text())["run"]["model"])
