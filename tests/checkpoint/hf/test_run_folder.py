"""An imported folder is a run folder like any other, its text included; and an export is a HF
folder.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers, processors

from moebius import checkpoint
from moebius.checkpoint.hf.exporter import export_hf
from moebius.checkpoint.hf.folder import open_folder
from moebius.checkpoint.hf.importer import import_hf
from moebius.checkpoint.hf.special_tokens import document_token
from moebius.infer.load import load
from moebius.infer.sample import sample_text
from moebius.monitor.runs import list_runs, open_run
from moebius.train.run import from_folder_json

from .folders import CONFIG, random_tensors, tiny_folder, write_folder

pytestmark = pytest.mark.usefixtures("one_thread")


def byte_level(*, adds: bool) -> tokenizers.Tokenizer:
    """A byte-level BPE whose specials are 256..258, as published ones are made."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({x: i for i, x in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    inner.add_special_tokens(["<|begin|>", "<|end|>", "<|turn ü|>"])
    if adds:
        inner.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<|begin|> $A", special_tokens=[("<|begin|>", 256)]
        )
    return inner


def with_text(folder: Path, inner: tokenizers.Tokenizer, **settings: Any) -> Path:
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages }} ü")
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 258]}')
    return folder


def record_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def test_a_run_folder_like_any_other(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "published", shards=3)
    run = import_hf(folder, tmp_path / "runs" / "mine", say=print)
    record = record_of(run)
    recipe = from_folder_json(record["run"], run)
    assert (recipe.name, recipe.vocab, recipe.sequence_length) == ("mine", 40, 64)
    assert recipe.optim.roles.keys() >= {"embedding", "head", "matrix", "norm", "bias", "expert"}
    assert record["imported"] | {"dropped": {}} == {
        "family": "llama",
        "source": "published",
        "dropped": {},
        "document": None,
        "eos": [2],
    }
    (row,) = list_runs(tmp_path / "runs")
    assert (row["name"], row["state"]) == ("mine", "stopped")
    total = sum(x.numel() for x in random_tensors(CONFIG).values())
    assert row["params_total"] == record["params_total"] == total
    assert open_run(run).steps == recipe.steps


def test_the_checkpoint_holds_weights_alone_as_they_were(tmp_path: Path) -> None:
    run = import_hf(tiny_folder(tmp_path / "hf"), tmp_path / "run", say=print)
    path = checkpoint.latest_intact(run / "checkpoints", say=print)
    assert path is not None and path.name == "step-00000000"
    tensors, state = checkpoint.load(path)
    assert state["step"] == 0 and state["weights_only"] is True
    assert all(name.startswith("model.") for name in tensors)
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16}
    source = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(tensors["model.embed.w_VD"], source["model.embed_tokens.weight"])
    gate_up = [source[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(tensors["model.layers.1.ffn.w_gate_up"], torch.cat(gate_up))
    model, _ = load(run)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("adds", [True, False], ids=["begins", "ends"])
def test_text_of_an_imported_model(tmp_path: Path, adds: bool) -> None:
    folder = tiny_folder(tmp_path / "hf", vocab_size=300)
    with_text(folder, byte_level(adds=adds), bos_token="<|begin|>", eos_token="<|end|>")
    run = import_hf(folder, tmp_path / "run", say=print)
    document = "<|begin|>" if adds else "<|end|>"
    assert record_of(run)["imported"]["document"] == document
    assert record_of(run)["imported"]["eos"] == [257, 258]
    model, tokenizer = load(run)
    assert tokenizer.document == (256 if adds else 257) and tokenizer.vocab == 259
    text = "größe <|begin|> 漢"
    ids = tokenizer.encode(text)
    assert max(ids) < 256 and tokenizer.decode(ids) == text
    assert tokenizer.decode([256, 258, 97]) == "<|begin|><|turn ü|>" + tokenizer.decode([97])
    assert tokenizer.token_bytes(tokenizer.document) == b"" and tokenizer.token_bytes(299) == b""
    assert tokenizer.token_text(258) == "<|turn ü|>"
    assert sample_text(model.lm, tokenizer, "a", 5, temperature=0.0).startswith("a")


def test_text_goes_along_byte_for_byte(tmp_path: Path) -> None:
    folder = with_text(tiny_folder(tmp_path / "hf", vocab_size=300), byte_level(adds=True))
    (folder / "notes.txt").write_text("not kept")
    run = import_hf(folder, tmp_path / "run", say=print)
    out = export_hf(run, tmp_path / "out", say=print)
    kept = sorted(path.name for path in (run / "hf").iterdir())
    files = ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"]
    assert kept == [*files, "tokenizer_config.json"]
    for path in (run / "hf").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
        if path.name != "config.json":
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert json.loads((out / "config.json").read_text()) == {**CONFIG, "vocab_size": 300}


def words() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    inner.add_special_tokens(["<s>"])
    return inner


def test_a_tokenizer_that_is_not_byte_level_is_refused_where_text_is_needed(tmp_path: Path) -> None:
    folder = with_text(tiny_folder(tmp_path / "hf"), words(), eos_token={"content": "<s>"})
    model, tokenizer = load(import_hf(folder, tmp_path / "run", say=print))
    assert model(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 2, 40)
    for use in (lambda: tokenizer.encode("a"), lambda: tokenizer.document, lambda: tokenizer.vocab):
        with pytest.raises(ValueError, match=r"WordLevel.* is not byte-level BPE; the model takes"):
            use()


def test_a_model_without_tokenizer_takes_ids(tmp_path: Path) -> None:
    said: list[str] = []
    run = import_hf(tiny_folder(tmp_path / "hf"), tmp_path / "run", say=said.append)
    assert "there is no tokenizer.json: the model takes token ids, but no text" in said
    model, tokenizer = load(run)
    assert model(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 2, 40)
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        sample_text(model.lm, tokenizer, "a", 1)
    out = export_hf(run, tmp_path / "out", say=print)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]


DOCUMENTS: list[tuple[dict[str, dict[str, Any]], str | None]] = [
    ({}, None),
    ({"tokenizer_config.json": {"bos_token": "<b>"}}, None),
    ({"tokenizer_config.json": {"bos_token": "<b>", "add_bos_token": True}}, "<b>"),
    ({"tokenizer_config.json": {"bos_token": "<b>", "eos_token": {"content": "<e>"}}}, "<e>"),
    ({"special_tokens_map.json": {"eos_token": "<e>"}}, "<e>"),
    (
        {
            "config.json": {"eos_token_id": [7, 8]},
            "tokenizer.json": {"added_tokens": [{"id": 7, "content": "<seven>"}]},
        },
        "<seven>",
    ),
    (
        {
            "tokenizer_config.json": {"eos_token": "<e>"},
            "tokenizer.json": {
                "post_processor": {
                    "processors": [
                        {"type": "ByteLevel"},
                        {"single": [{"SpecialToken": {"id": "<t>"}}, {"Sequence": {"id": "A"}}]},
                    ]
                }
            },
        },
        "<t>",
    ),
    (
        {
            "tokenizer_config.json": {"eos_token": "<e>"},
            "tokenizer.json": {"post_processor": {"single": [{"Sequence": {"id": "A"}}]}},
        },
        "<e>",
    ),
]


@pytest.mark.parametrize(("files", "token"), DOCUMENTS)
def test_which_token_opens_a_document(
    tmp_path: Path, files: dict[str, dict[str, Any]], token: str | None
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_text(json.dumps(data))
    assert document_token(tmp_path) == token


def test_shards_and_their_index(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "hf")
    run = import_hf(folder, tmp_path / "run", say=print)
    out = export_hf(run, tmp_path / "out", shard_bytes=2500, say=print)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert max(sum(x.nbytes for x in load_file(path).values()) for path in shards) <= 2500
    index = json.loads((out / "model.safetensors.index.json").read_text())
    source = load_file(folder / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in source.values())
    assert index["weight_map"].keys() == source.keys()
    found = open_folder(out).tensors
    assert all(torch.equal(found[name].whole(), x) for name, x in source.items())


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    run = import_hf(tiny_folder(tmp_path / "hf"), tmp_path / "run", say=print)

    def refused(reason: str, out: str = "out", **options: Any) -> None:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ValueError, match=reason):
            export_hf(options.pop("run", run), tmp_path / out, say=print, **options)
        assert sorted(tmp_path.iterdir()) == before

    refused("'bf61' is no dtype to export; did you mean 'bf16'", dtype="bf61")
    refused("is there already and not an empty folder", out="hf")
    refused("there is no run in", run=tmp_path / "hf")
    path = next((run / "checkpoints").glob("*/tensors.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused("no intact checkpoint")
    path.parent.rename(tmp_path / "elsewhere")
    refused("has no checkpoint yet")


def test_weights_that_were_trained_on_are_stored_wider_and_say_so(tmp_path: Path) -> None:
    run = import_hf(tiny_folder(tmp_path / "hf"), tmp_path / "run", say=print)
    tensors, _ = checkpoint.load(run / "checkpoints" / "step-00000000")
    wide = {name: x.float() + 1 for name, x in tensors.items()}
    checkpoint.save(run / "checkpoints", 5, wide, {"step": 5, "tokens": 320}, keep=2)
    for dtype, name in ((None, "float32"), ("bf16", "bfloat16")):
        out = export_hf(run, tmp_path / name, dtype=dtype, say=print)
        config = json.loads((out / "config.json").read_text())
        assert config == {**CONFIG, "torch_dtype": name}
        found = load_file(out / "model.safetensors")
        assert {str(x.dtype) for x in found.values()} == {f"torch.{name}"}
        x = wide["model.head.norm.w_D"]
        assert torch.equal(found["model.norm.weight"], x.to(found["model.norm.weight"].dtype))


MY_FAMILY = """
import dataclasses
from moebius.checkpoint.hf import Family
from moebius.checkpoint.hf.llama import Llama

@dataclasses.dataclass(frozen=True)
class Mine(Family):
    model_type = "mine"
    architecture = "MineForCausalLM"
    harmless = frozenset({"colour"})

    def read_config(self, keys):
        return Llama().read_config(keys)

    def write_config(self, model, vocab, wanted):
        return {**Llama().write_config(model, vocab, wanted), "colour": "blue"}

    def layouts(self, model, vocab, target):
        return Llama().layouts(model, vocab, target)
"""


def test_a_family_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MY_FAMILY)
    mine = f"{tmp_path / 'mine.py'}:Mine"
    config = {**CONFIG, "model_type": "mine", "colour": "red"}
    folder = write_folder(tmp_path / "hf", config, random_tensors(CONFIG))
    run = import_hf(folder, tmp_path / "run", family=mine, say=print)
    red = json.loads((export_hf(run, tmp_path / "red", say=print) / "config.json").read_text())
    assert (red["colour"], red["model_type"]) == ("red", "mine")
    llama = import_hf(tiny_folder(tmp_path / "other"), tmp_path / "llama", say=print)
    out = export_hf(llama, tmp_path / "blue", family=mine, say=print)
    blue = json.loads((out / "config.json").read_text())
    assert (blue["colour"], blue["architectures"]) == ("blue", ["MineForCausalLM"])


def test_a_changed_model_keeps_only_what_is_harmless_of_its_config(tmp_path: Path) -> None:
    config = {**CONFIG, "pretraining_tp": 2, "auto_map": {"AutoConfig": "x.X"}}
    folder = write_folder(tmp_path / "hf", config, random_tensors(CONFIG))
    run = import_hf(folder, tmp_path / "run", say=print)
    record = record_of(run)
    record["run"]["model"]["norm_eps"] = 3e-4
    (run / "run.json").write_text(json.dumps(record))
    found = json.loads((export_hf(run, tmp_path / "out", say=print) / "config.json").read_text())
    assert found["rms_norm_eps"] == 3e-4 and found["pretraining_tp"] == 2
    assert found["eos_token_id"] == 2 and found["torch_dtype"] == "bfloat16"
    assert "auto_map" not in found and found["max_position_embeddings"] == 64
