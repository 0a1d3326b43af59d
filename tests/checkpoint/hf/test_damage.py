"""What cannot be imported exactly is refused by name, and nothing is written then."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moebius.checkpoint.hf.exporter import export_hf
from moebius.checkpoint.hf.importer import import_hf

from .folders import CONFIG, random_tensors, tiny_folder, write_folder

INDEX = "model.safetensors.index.json"
Change = Callable[[Path], object]


def refused(source: Path, tmp_path: Path) -> str:
    """The one line of a refused import, which left nothing behind."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError) as caught:
        import_hf(source, tmp_path / "run", say=print)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    data = json.loads((folder / INDEX).read_text())
    change(data["weight_map"])
    (folder / INDEX).write_text(json.dumps(data))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


SHARD = "model-00002-of-00003.safetensors"
Q, Q0 = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"
BIAS = Q.replace("weight", "bias")
SHARDED: dict[str, tuple[Change, str]] = {
    "a shard is missing": (
        lambda f: (f / SHARD).unlink(),
        f"lacks the file '{SHARD}' that {INDEX} names",
    ),
    "a shard is cut short": (
        lambda f: cut(f / SHARD, (f / SHARD).stat().st_size - 1),
        "that its header names; it is cut short or damaged: fetch it again",
    ),
    "a shard is cut in its header": (
        lambda f: cut(f / SHARD, 20),
        "is cut short or no safetensors file",
    ),
    "a shard is empty": (lambda f: cut(f / SHARD, 0), "is cut short or no safetensors file"),
    "a shard's header is no JSON": (
        lambda f: (f / SHARD).write_bytes((8).to_bytes(8, "little") + b"notjson!"),
        "its header is no JSON",
    ),
    "the index names a tensor that is nowhere": (
        lambda f: edit_index(f, lambda m: m.update({"more": SHARD})),
        f"{SHARD} lacks more, which {INDEX} puts there",
    ),
    "the index does not name a tensor of a shard": (
        lambda f: edit_index(f, lambda m: m.pop("model.norm.weight")),
        f"holds model.norm.weight, but {INDEX} does not name it",
    ),
    "the index puts a tensor elsewhere": (
        lambda f: edit_index(
            f, lambda m: m.update({Q0: next(x for x in set(m.values()) if x != m[Q0])})
        ),
        f"holds {Q0}, but {INDEX} puts it in model-",
    ),
    "the index leads out of the folder": (
        lambda f: edit_index(f, lambda m: m.update({Q: "../elsewhere.safetensors"})),
        "lacks the file '../elsewhere.safetensors'",
    ),
    "the index is damaged": (lambda f: cut(f / INDEX, 30), f"{INDEX} is damaged"),
    "the index has no map": (lambda f: (f / INDEX).write_text("{}"), "it has no weight_map"),
    "a single file stands beside the index": (
        lambda f: save_file({"x": torch.ones(1)}, f / "model.safetensors"),
        "which does not name it; remove one",
    ),
    "the config is missing": (
        lambda f: (f / "config.json").unlink(),
        "config.json (No such file or directory)",
    ),
    "the config is damaged": (lambda f: cut(f / "config.json", 9), "config.json is damaged"),
    "the config is no object": (
        lambda f: (f / "config.json").write_text("[]"),
        "it is no JSON object",
    ),
}


@pytest.mark.parametrize(("change", "reason"), SHARDED.values(), ids=SHARDED)
def test_damaged_files(tmp_path: Path, change: Change, reason: str) -> None:
    folder = tiny_folder(tmp_path / "hf", shards=3)
    change(folder)
    assert reason in refused(folder, tmp_path)


def bare(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def renamed(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)


FILES: dict[str, tuple[Change, str]] = {
    "nothing": (bare, "holds no weights (model.safetensors, or shards with"),
    "pickle": (lambda f: renamed(f, "pytorch_model.bin"), "as pickle (pytorch_model.bin)"),
    "pickle of shards": (lambda f: renamed(f, "consolidated.00.pth"), "(consolidated.00.pth)"),
    "an adapter": (lambda f: renamed(f, "adapter_model.safetensors"), "merge the adapter"),
    "a tensor is missing": (
        lambda f: edit_tensors(f, lambda t: t.pop(Q)),
        f"the folder lacks {Q}; nothing",
    ),
    "a tensor is renamed": (
        lambda f: edit_tensors(f, lambda t: t.update({Q.replace("q_", "Q_"): t.pop(Q)})),
        f"the folder lacks {Q}; did you mean '{Q.replace('q_', 'Q_')}'?",
    ),
    "a tensor is more": (
        lambda f: edit_tensors(f, lambda t: t.update({"score.weight": torch.ones(2, 2)})),
        "score.weight is not a tensor of such a model; nothing was imported",
    ),
    "a layer is more": (
        lambda f: edit_tensors(f, lambda t: t.update({Q.replace("1", "2"): t[Q].clone()})),
        "model.layers.2.self_attn.q_proj.weight is not a tensor of such a model",
    ),
    "a shape is wrong": (
        lambda f: edit_tensors(f, lambda t: t.update({Q: t[Q][:6].clone()})),
        f"{Q} has shape [6, 16], but config.json makes it [12, 16]",
    ),
    "a bias came along": (
        lambda f: edit_tensors(f, lambda t: t.update({BIAS: t[Q][0].clone()})),
        "q_proj.bias is not a tensor of such a model",
    ),
    "weights are whole numbers": (
        lambda f: edit_tensors(f, lambda t: t.update({Q: t[Q].to(torch.int8)})),
        f"{Q} is of torch.int8",
    ),
    "FP8 came without scales": (
        lambda f: edit_tensors(f, lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})),
        f"{Q} is in FP8, but {Q}_scale_inv is missing",
    ),
}


@pytest.mark.parametrize(("change", "reason"), FILES.values(), ids=FILES)
def test_unfit_weights(tmp_path: Path, change: Change, reason: str) -> None:
    folder = tiny_folder(tmp_path / "hf")
    change(folder)
    assert reason in refused(folder, tmp_path)


CODE = {"AutoModelForCausalLM": "modeling_x.X"}
ROPE = "config.json: rope_parameters"
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"sliding_windwo": 8}, "'sliding_windwo' is not a key we know"),
    "a key near one that is known": (
        {"num_kv_value_heads": 1},
        "'num_kv_value_heads' is not a key we know; did you mean 'num_key_value_heads'?",
    ),
    "two unknown keys": ({"a_b": 1, "c_d": 2}, "'a_b' is not a key we know (nor are c_d)"),
    "a missing key": ({"hidden_size": None}, "config.json: 'hidden_size' is missing"),
    "a text for a number": (
        {"num_hidden_layers": "2"},
        "num_hidden_layers must be an integer, not '2'",
    ),
    "true for a number": ({"hidden_size": True}, "hidden_size must be an integer, not True"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    "an encoder": ({"is_encoder_decoder": True}, "only decoders of one stream are read"),
    "an unknown model": ({"model_type": "lama"}, "unknown model_type 'lama'; did you mean 'llama'"),
    "a model of its own code": (
        {"model_type": "x", "auto_map": CODE},
        "model_type 'x' is code of its own (auto_map), which is never run here; known: llama,",
    ),
    "another quantisation": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "weights quantised by 'gptq' cannot be read",
    ),
    "an odd block": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
        "weight_block_size must be two whole numbers",
    ),
    "positions that change with the length": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "rope type 'dynamic' without alpha changes with the length of each sequence",
    ),
    "unknown positions": (
        {"rope_parameters": {"rope_type": "yarm"}},
        "unknown rope type 'yarm'; did you mean 'yarn'?",
    ),
    "a part of each head rotated": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        f"{ROPE}: partial_rotary_factor = 0.5 is not supported: only whole heads",
    ),
    "an unknown key of positions": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "facto": 3.0}},
        f"{ROPE}: 'facto' is not a key we know; did you mean 'factor'?",
    ),
    "linear without its factor": (
        {"rope_parameters": {"rope_type": "linear"}},
        f"{ROPE}: 'factor' is missing",
    ),
    "a negative size": ({"hidden_size": -16}, "hidden_size must lie in 0..2147483647, not -16"),
    "a size beyond all": ({"vocab_size": 10**30}, "vocab_size must lie in 0..2147483647"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, not 0"),
    "an epsilon below 0": ({"rms_norm_eps": -1.0}, "a norm's epsilon cannot be -1.0"),
    "no rotary base": ({"rope_theta": 0}, "rope_theta must be above 0, not 0.0"),
    "no number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number, not nan"),
    "more layers than tensors": (
        {"num_hidden_layers": 10**8},
        "num_hidden_layers is 100,000,000, more than the folder's 21 tensors can hold",
    ),
    "more experts than numbers": (
        {"model_type": "olmoe", "num_experts": 10**8},
        "num_experts is 100,000,000, more than the folder's",
    ),
    "a model type that is a list": ({"model_type": ["llama"]}, "unknown model_type ['llama']"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "must be a multiple of kv_heads"),
}


@pytest.mark.parametrize(("change", "reason"), CONFIGS.values(), ids=CONFIGS)
def test_unfit_configs(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    folder = write_folder(tmp_path / "hf", {**CONFIG, **change}, random_tensors(CONFIG))
    assert reason in refused(folder, tmp_path)


def test_code_beside_a_known_model_is_neither_run_nor_kept(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "hf", auto_map=CODE)
    for name in ("modeling_x.py", "tokenizer_x.py", "configuration_x.py"):
        (folder / name).write_text("raise SystemExit('this was run')")
    run = import_hf(folder, tmp_path / "run", say=print)
    assert not list(run.rglob("*.py"))


def test_a_model_type_left_out_is_found_by_its_architecture(tmp_path: Path) -> None:
    config = {key: x for key, x in CONFIG.items() if key != "model_type"}
    folder = write_folder(tmp_path / "hf", config, random_tensors(CONFIG))
    run = import_hf(folder, tmp_path / "run", say=print)
    assert json.loads((run / "run.json").read_text())["imported"]["family"] == "llama"


def test_places_that_are_taken(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "hf")
    assert "there is no folder" in refused(tmp_path / "nowhere", tmp_path)
    (tmp_path / "run").mkdir()
    import_hf(folder, tmp_path / "run", say=print)
    assert "is there already and not an empty folder" in refused(folder, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is not a folder"):
        import_hf(folder, tmp_path / "file" / "run", say=print)


def test_what_a_killed_import_left_is_replaced(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "hf")
    (tmp_path / ".writing-run").mkdir()
    (tmp_path / ".writing-run" / "half").touch()
    import_hf(folder, tmp_path / "run", say=print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_dropped_tensors_are_counted_and_said(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "hf", tie_word_embeddings=True)

    def more(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        for i in range(2):
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(3)

    edit_tensors(folder, more)
    said: list[str] = []
    run = import_hf(folder, tmp_path / "run", say=said.append)
    dropped = json.loads((run / "run.json").read_text())["imported"]["dropped"]
    assert dropped == {"tied to the embedding": 1, "computed from the config": 2}
    assert "left out 2 tensor(s): computed from the config" in said


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """A change of the header of model.safetensors, its bytes left as they are."""

    def changed(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        found = json.loads(data[8:end])
        text = change(found)
        raw = (text if isinstance(text, str) else json.dumps(found)).encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[end:])

    return changed


K0 = Q0.replace("q_", "k_")
V0 = Q0.replace("q_", "v_")
NO_SENSE = f"its header has no sense at '{Q0}'"
HEADERS: dict[str, tuple[Change, str]] = {
    "bytes are shared": (
        header(lambda h: h[K0].update(data_offsets=h[V0]["data_offsets"])),
        "do not follow those before it",
    ),
    "a name stands in it twice": (
        header(lambda h: json.dumps(h)[:-1] + f", {json.dumps(K0)}: {json.dumps(h[V0])}}}"),
        f"'{K0}' stands in it twice",
    ),
    "offsets are texts": (header(lambda h: h[Q0].update(data_offsets=["0", "1"])), NO_SENSE),
    "offsets are fractions": (header(lambda h: h[Q0].update(data_offsets=[0.0, 384.0])), NO_SENSE),
    "offsets lie before the file": (
        header(lambda h: h[Q0].update(data_offsets=[-384, 0])),
        NO_SENSE,
    ),
    "a shape is of texts": (header(lambda h: h[Q0].update(shape=["12", "16"])), NO_SENSE),
    "a shape is endless": (header(lambda h: h[Q0].update(shape=[1e400])), NO_SENSE),
    "a shape is negative": (header(lambda h: h[Q0].update(shape=[-12, -16])), NO_SENSE),
    "a dtype is a list": (header(lambda h: h[Q0].update(dtype=["BF16"])), "of dtype ['BF16']"),
    "it is too deep": (header(lambda h: 100_000 * "["), "its header is no JSON"),
    "it has bytes without a tensor": (header(lambda h: "{}"), "instead of the"),
}


@pytest.mark.parametrize(("change", "reason"), HEADERS.values(), ids=HEADERS)
def test_headers_that_lie(tmp_path: Path, change: Change, reason: str) -> None:
    folder = tiny_folder(tmp_path / "hf")
    change(folder)
    assert reason in refused(folder, tmp_path)


def written(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text)


def linked(folder: Path) -> None:
    bare(folder)
    (folder / "model.safetensors").symlink_to("nowhere")


TWICE = json.dumps(CONFIG)[:-1] + ', "rms_norm_eps": 0.5}'
SIDE: dict[str, tuple[Change, str]] = {
    "a key of the config twice": (
        written("config.json", TWICE),
        "'rms_norm_eps' stands in it twice",
    ),
    "a config too deep": (written("config.json", 100_000 * "["), "config.json is damaged"),
    "a link to nothing": (linked, "model.safetensors is no file, or a link to none"),
    "an end token that is text": (
        written("generation_config.json", '{"eos_token_id": "2"}'),
        "generation_config.json: eos_token_id must be a whole number or a list of them, not '2'",
    ),
    "end tokens that are none": (
        written("generation_config.json", '{"eos_token_id": [null]}'),
        "eos_token_id must be a whole number or a list of them, not [None]",
    ),
}


@pytest.mark.parametrize(("change", "reason"), SIDE.values(), ids=SIDE)
def test_unfit_files_beside_the_weights(tmp_path: Path, change: Change, reason: str) -> None:
    folder = tiny_folder(tmp_path / "hf")
    change(folder)
    assert reason in refused(folder, tmp_path)


def test_a_damaged_list_of_tokens_names_none(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "hf")
    odd = {"added_tokens": ["a", {"content": "b"}], "post_processor": {"processors": 5}}
    (folder / "tokenizer.json").write_text(json.dumps(odd))
    said: list[str] = []
    run = import_hf(folder, tmp_path / "run", say=said.append)
    assert "no text can be read" in said[-1]
    assert json.loads((run / "run.json").read_text())["imported"]["document"] is None


def test_a_place_that_is_a_link(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "hf")
    (tmp_path / "run").symlink_to("nowhere")
    assert "run is a link; name a place of its own" in refused(folder, tmp_path)


def test_numbers_that_are_not_finite_are_counted_and_said(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "hf")
    edit_tensors(folder, lambda t: (t[Q][0].fill_(torch.nan), t[K0][0, :2].fill_(torch.inf)))
    said: list[str] = []
    run = import_hf(folder, tmp_path / "run", say=said.append)
    odd = [text for text in said if "NaN or infinite" in text]
    assert [text.split(" number")[0] for text in sorted(odd)] == [
        "layers.0.mixer.kv.w_k holds 2",
        "layers.1.mixer.heads.w_q holds 16",
    ]
    with pytest.raises(ValueError, match=r"in bf16, .* NaN or infinite"):
        export_hf(run, tmp_path / "out", dtype="bf16", say=print)
    assert not (tmp_path / "out").exists()
    export_hf(run, tmp_path / "out", say=said.append)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert bool(found[Q][0].isnan().all())


def test_numbers_too_large_for_fp16_are_not_exported_in_it(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "hf")
    edit_tensors(folder, lambda t: t[Q].mul_(1e9))
    run = import_hf(folder, tmp_path / "run", say=print)
    with pytest.raises(ValueError, match=r"in fp16, .*; leave out --dtype"):
        export_hf(run, tmp_path / "out", dtype="fp16", say=print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


@pytest.mark.parametrize("place", ["model.width", "vocab"])
def test_a_recipe_that_is_not_of_its_weights_is_not_exported(tmp_path: Path, place: str) -> None:
    run = import_hf(tiny_folder(tmp_path / "hf"), tmp_path / "run", say=print)
    record = json.loads((run / "run.json").read_text())
    at = record["run"]["model"] if place == "model.width" else record["run"]
    at[place.removeprefix("model.")] = 24
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"run\.json is not of this checkpoint"):
        export_hf(run, tmp_path / "out", say=print)
    assert not (tmp_path / "out").exists()
