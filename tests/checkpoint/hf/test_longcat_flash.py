"""LongCat-Flash equals transformers' own class, both ways, in every layout its folders come in."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moebius.checkpoint.hf import Target
from moebius.checkpoint.hf.exporter import export_hf
from moebius.checkpoint.hf.importer import import_hf
from moebius.checkpoint.hf.keys import Keys
from moebius.checkpoint.hf.longcat_flash import LongcatFlash
from moebius.config import override
from moebius.infer.load import load
from moebius.model.block.scmoe import ScMoE
from moebius.model.ends.hidden_z import HiddenZ
from moebius.model.ends.mtp import MTP
from moebius.model.ffn.balance.budget import Budget
from moebius.model.ffn.balance.group import GroupLoss
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.lm import LM, ModelConfig
from moebius.model.mixers.mla import MLA
from moebius.recipes.longcat import longcat_flash

from .families import refused as refused_by
from .parity import (
    FORWARD,
    Twin,
    check_all,
    check_bf16,
    check_forward,
    check_fresh,
    fresh_run,
    model_of,
    our_logits,
    peer_of,
    relative,
    say,
    transformers,
)

pytestmark = pytest.mark.usefixtures("one_thread")
refused = partial(refused_by, LongcatFlash())

BASE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 40,
    "ffn_hidden_size": 26,
    "expert_ffn_hidden_size": 10,
    "num_layers": 2,
    "num_attention_heads": 3,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 6,
    "head_dim": 6,
    "qk_nope_head_dim": 8,
    "v_head_dim": 7,
    "n_routed_experts": 6,
    "zero_expert_num": 3,
    "moe_topk": 4,
    "max_position_embeddings": 128,
    # Or a token would end the peer's greedy decoding.
    "eos_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
CASES: dict[str, dict[str, Any]] = {
    "zero experts": {},
    "no zero experts, tied": {"zero_expert_num": 0, "tie_word_embeddings": True},
    "top 12 of 5 and 9, biases": {
        "n_routed_experts": 5,
        "zero_expert_num": 9,
        "moe_topk": 12,
        "attention_bias": True,
    },
    "yarn, top 2": {"rope_parameters": YARN, "moe_topk": 2, "routed_scaling_factor": 1.5},
}
ZERO_ROWS = "gate and up of zero experts, which compute nothing"


def config(**changes: Any) -> Any:
    return transformers.LongcatFlashConfig(**{**BASE, **changes})


def twin_of(home: Path, **changes: Any) -> Twin:
    """Its zero experts have zero rows, as those of an export have; the peer never reads them."""
    twin = Twin(config(**changes), home)
    for layer in twin.peer.model.layers:
        layer.mlp.experts.gate_up_proj.data[twin.config.n_routed_experts :] = 0.0
    return twin


def told(folder: Path, **changes: Any) -> None:
    """Change keys of a config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def dropped(run: Path) -> dict[str, int]:
    return json.loads((run / "run.json").read_text())["imported"]["dropped"]


# --- transformers' own folders --------------------------------------------------------------------


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_import_and_export_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    check_all(twin_of(tmp_path, **changes))


@pytest.mark.parametrize("pinned", [False, True])
def test_bf16_is_as_near_as_transformers_to_itself(tmp_path: Path, pinned: bool) -> None:
    twin = twin_of(tmp_path, hidden_size=64, expert_ffn_hidden_size=24, num_layers=1)
    if pinned:
        # Biases that outweigh any score, so that no rounding moves a selection.
        twin.peer.model.layers[0].mlp.router.e_score_correction_bias.mul_(100)
    check_bf16(twin)


def test_transformers_itself_fails_where_one_expert_is_chosen(tmp_path: Path) -> None:
    """Hence no case of top 1 above; that it is refused for transformers is tested below."""
    twin = twin_of(tmp_path, moe_topk=1)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        twin.peer(torch.arange(6)[None])


def test_rows_of_zero_experts_are_left_out_counted_and_written_as_zeros(tmp_path: Path) -> None:
    twin = Twin(config(), tmp_path)
    names = [f"{e}.{name}_proj.weight" for e in (6, 7, 8) for name in ("gate", "up")]
    check_forward(twin)
    assert dropped(twin.run) == {ZERO_ROWS: 2 * len(names)}
    out = load_file(export_hf(twin.run, tmp_path / "out", say=say) / "model.safetensors")
    assert out.keys() == load_file(twin.folder / "model.safetensors").keys()
    for name in names:
        x = out[f"model.layers.1.mlp.experts.{name}"]
        assert x.shape == (10, 40) and not x.any()
    assert "model.layers.1.mlp.experts.6.down_proj.weight" not in out


def test_fused_experts_are_read(tmp_path: Path) -> None:
    twin = Twin(config(), tmp_path)
    state = {name: x.contiguous() for name, x in twin.peer.state_dict().items()}
    assert state["model.layers.1.mlp.experts.gate_up_proj"].shape == (9, 20, 40)
    save_file(state, twin.folder / "model.safetensors", {"format": "pt"})
    check_forward(twin)
    assert dropped(twin.run) == {ZERO_ROWS: 2}


@pytest.mark.parametrize("number", [2, 4])
def test_num_hidden_layers_means_two_things_and_is_refused(tmp_path: Path, number: int) -> None:
    twin = twin_of(tmp_path)
    told(twin.folder, num_hidden_layers=number)
    with pytest.raises(ValueError, match=f"num_hidden_layers = {number} is not supported: it co"):
        import_hf(twin.folder, tmp_path / "run", say=say)
    # transformers would build this many layers, vLLM and SGLang as many as the number.
    assert transformers.AutoConfig.from_pretrained(twin.folder).num_layers == number // 2


ODD: dict[str, Any] = {
    "head_dim": 8,
    "zero_expert_type": "drop",
    "router_bias": True,
    "norm_topk_prob": True,
    "mla_scale_kv_lora": False,
    "attention_method": "MHA",
    "router_dtype": "bfloat16",
    "num_nextn_predict_layers": 2,
    "oe_split_num": 4,
}


@pytest.mark.parametrize(("key", "value"), ODD.items(), ids=ODD)
def test_what_a_config_may_not_say_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        keys = Keys(BASE | {key: value})
        LongcatFlash().read_config(keys)
        keys.finish(LongcatFlash.harmless)


@pytest.mark.parametrize(
    ("experts", "zero", "top_k", "budget"),
    [(512, 256, 12, 8.0), (6, 3, 4, 8 / 3), (64, 2, 12, 10.0), (2, 12, 12, 2.0), (4, 4, 1, 2 / 3)],
)
def test_the_budget_that_no_config_names_fits(
    experts: int, zero: int, top_k: int, budget: float
) -> None:
    numbers = {"n_routed_experts": experts, "zero_expert_num": zero, "moe_topk": top_k}
    model = LongcatFlash().read_config(Keys(BASE | numbers)).model
    (layer, _) = model.layers
    assert isinstance(layer, ScMoE) and isinstance(layer.moe, MoE)
    assert layer.moe.layout.ffn_per_token == pytest.approx(budget)


def test_the_published_config_is_the_recipe() -> None:
    """As released, but for the base of its last stage."""
    published = {
        "vocab_size": 131_072,
        "hidden_size": 6144,
        "ffn_hidden_size": 12_288,
        "expert_ffn_hidden_size": 2048,
        "num_layers": 28,
        "num_attention_heads": 64,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "attention_method": "MLA",
        "routed_scaling_factor": 6.0,
        "n_routed_experts": 512,
        "zero_expert_num": 256,
        "zero_expert_type": "identity",
        "moe_topk": 12,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 131_072,
    }
    recipe = longcat_flash()
    read = LongcatFlash().read_config(Keys(published))
    assert read.vocab == recipe.vocab
    # Scaling and compensation come multiplied; rules and losses only train.
    changes = [
        "layers.*.moe.split=1",
        "layers.*.moe.scaling=6",
        "layers.*.moe.balance=[]",
        "ends=[]",
    ]
    assert override(read.model, changes) == override(recipe.model, changes)


# --- models of our own, and the published layout --------------------------------------------------

MIXER = MLA(3, 14, 10, 8, 6, 7, rope_base=900.0, scale_correction=True)
MOE = MoE(
    experts=6,
    expert_width=12,
    top_k=3,
    zero_experts=4,
    ffn_per_token=2.0,
    split=2.0,
    scaling=1.5,
    balance=(GroupLoss(groups=3), Budget()),
)
LAYER = ScMoE(MIXER, Dense(20), MOE)


def model(layer: ScMoE = LAYER, **more: Any) -> ModelConfig:
    return ModelConfig(width=32, layers=2 * (layer,), **more)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_ours_runs_in_transformers(tmp_path: Path, tied: bool) -> None:
    layer = override(LAYER, [f"mixer.bias={str(tied).lower()}"])
    out = check_fresh(model(layer, tied=tied, ends=(HiddenZ(),)), 300, tmp_path)
    assert json.loads((out / "config.json").read_text())["routed_scaling_factor"] == 3.0


def exported(home: Path, ours: ModelConfig, target: Target) -> tuple[LM, Path, dict[str, Any]]:
    """A random model, the folder it leaves as, and its config."""
    run, lm = fresh_run(ours, 300, home / "run")
    out = export_hf(run, home / "out", target=target, say=say)
    return lm, out, json.loads((out / "config.json").read_text())


def same_logits(lm: LM, other: LM) -> None:
    tokens_BT = torch.arange(20)[None]
    with torch.no_grad():
        expected = our_logits(lm, tokens_BT)
        assert relative(our_logits(other, tokens_BT), expected) < FORWARD


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_servers_get_the_published_layout_and_every_key(tmp_path: Path, target: Target) -> None:
    lm, out, found = exported(tmp_path, model(tied=True), target)
    # Their defaults are of other models.
    keys = (
        "hidden_size ffn_hidden_size expert_ffn_hidden_size num_layers num_attention_heads "
        "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim vocab_size "
        "n_routed_experts moe_topk rope_theta rms_norm_eps max_position_embeddings"
    )
    assert found.keys() >= set(keys.split())
    expected = {
        "routed_scaling_factor": 3.0,
        "zero_expert_num": 4,
        "zero_expert_type": "identity",
        "norm_topk_prob": False,
        "router_bias": False,
        "router_dtype": "float32",
        "rounter_params_dtype": "float32",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "attention_method": "MLA",
        "attention_bias": False,
        "head_dim": 6,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 0,
    }
    assert found | expected == found
    assert "num_hidden_layers" not in found
    tensors = load_file(out / "model.safetensors")
    experts = {int(name.split(".")[5]) for name in tensors if ".experts." in name}
    assert experts == set(range(6)) and "lm_head.weight" in tensors
    assert not any(name.startswith("model.mtp") for name in tensors)
    classifier = tensors["model.layers.0.mlp.router.classifier.weight"]
    assert classifier.shape == (10, 32) and classifier.dtype == torch.float32
    # The norms are without the factors, which servers fold in as they load.
    norm = tensors["model.layers.0.self_attn.0.kv_a_layernorm.weight"]
    assert torch.equal(norm, lm.state_dict()["layers.0.mixer_0.latents.kv_norm.w_D"])
    same_logits(lm, load(import_hf(out, tmp_path / "back", say=say))[0].lm)


def test_published_to_transformers_and_back(tmp_path: Path) -> None:
    """The published layout loads in transformers once it has been through here."""
    lm, out, _ = exported(tmp_path, model(), "vllm")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        peer_of(out)
    run = import_hf(out, tmp_path / "again", say=say)
    there = export_hf(run, tmp_path / "there", say=say)
    tokens_BT = torch.arange(20)[None]
    with torch.no_grad():
        assert relative(peer_of(there)(tokens_BT).logits, our_logits(lm, tokens_BT)) < FORWARD
    back = export_hf(
        import_hf(there, tmp_path / "more", say=say), tmp_path / "b", target="vllm", say=say
    )
    before, after = (load_file(x / "model.safetensors") for x in (out, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_routers_and_biases_stay_fp32(tmp_path: Path) -> None:
    run, _ = fresh_run(model(), 300, tmp_path / "run")
    out = export_hf(run, tmp_path / "out", target="vllm", dtype="bf16", say=say)
    tensors = load_file(out / "model.safetensors")
    wide = {name.split("router.")[-1] for name, x in tensors.items() if x.dtype == torch.float32}
    assert wide == {"classifier.weight", "e_score_correction_bias"}


@pytest.mark.parametrize("target", ["transformers", "vllm"])
def test_a_prediction_layer_goes_out_and_comes_in(tmp_path: Path, target: Target) -> None:
    ours = model(ends=(HiddenZ(), MTP(MIXER, Dense(20), weight=0.1)))
    lm, out, found = exported(tmp_path, ours, target)
    assert found["num_nextn_predict_layers"] == 1
    tensors = load_file(out / "model.safetensors")
    assert torch.equal(tensors["model.mtp.embed_tokens.weight"], lm.embed.w_VD)
    parts = {name for name in tensors if name.startswith("model.mtp.layers.0.")}
    assert len(parts) == 1 + 2 + 2 + 7 + 3
    for name in ("enorm.m", "hnorm.m", "eh_proj", "transformer_layer.mlp.up_proj"):
        assert f"model.mtp.layers.0.{name}.weight" in parts
    run = import_hf(out, tmp_path / "back", say=say)
    assert dropped(run)["the prediction layer's copy of the embedding"] == 1
    assert model_of(run).ends == ours.ends[1:]
    back = load(run)[0].lm.state_dict()
    for name, x in lm.state_dict().items():
        if name.startswith("ends.1."):
            assert torch.equal(back[name.replace("ends.1.", "ends.0.")], x), name
    if target == "transformers":
        peer_of(out)
    again = export_hf(run, tmp_path / "again", target=target, say=say)
    for name, x in load_file(again / "model.safetensors").items():
        assert torch.equal(x, tensors[name]), name


def test_a_prediction_layer_that_no_key_names_is_left_out_and_counted(tmp_path: Path) -> None:
    lm, out, _ = exported(tmp_path, model(ends=(MTP(MIXER, Dense(20)),)), "vllm")
    told(out, num_nextn_predict_layers=None)
    run = import_hf(out, tmp_path / "back", say=say)
    assert dropped(run) == {"multi-token prediction, which config.json does not name": 17}
    same_logits(lm, load(run)[0].lm)


CANNOT: dict[str, list[str]] = {
    "mixer.q_rank: its queries": ["mixer.q_rank=none", "mixer.scale_correction=false"],
    "mixer.rope_base: it always rotates": ["mixer.rope_base=none"],
    "mixer.scale_correction: transformers always": ["mixer.scale_correction=false"],
    "mixer.latent_eps: must be 1e-06": ["mixer.latent_eps=1e-5"],
    "moe.shared_experts: it has none": ["moe.shared_experts=1"],
    "moe.router is sigmoid; it has only softmax": ["moe.router=sigmoid"],
    "moe.router.renormalise: it never": ["moe.router.renormalise=true"],
    "moe.router.bias: it has none": ["moe.router.bias=true"],
    "moe.balance: 2 rules hold a selection bias": ['moe.balance=["sign", "budget"]'],
    "moe.top_k: transformers' own class": ["moe.top_k=1", "moe.ffn_per_token=0.5"],
    "dense.bias: it has none": ["dense.bias=true"],
    "dense is moe; it has only dense": [
        'dense={"use":"moe","experts":2,"expert_width":4,"top_k":1}'
    ],
}


@pytest.mark.parametrize(("reason", "changes"), CANNOT.items(), ids=CANNOT)
def test_what_it_cannot_hold_is_refused(reason: str, changes: list[str]) -> None:
    refused(model(override(LAYER, changes)), f"layers.*.{reason}")


def test_prediction_layers_unlike_the_others_are_refused() -> None:
    like = MTP(MIXER, Dense(20))
    refused(model(ends=(dataclasses.replace(like, depth=2),)), "ends.0.depth")
    refused(model(ends=(MTP(MIXER, Dense(8)),)), "ends.0: its mixer and ffn must be those")
    refused(model(ends=(like, like)), "one prediction layer at most")
    refused(model(override(LAYER, ["mixer.bias=true"])), "sglang has none here", "sglang")


def test_what_only_transformers_lacks_goes_to_servers(tmp_path: Path) -> None:
    layer = override(
        LAYER, ["mixer.scale_correction=false", "moe.top_k=1", "moe.ffn_per_token=0.5"]
    )
    lm, out, found = exported(tmp_path, model(layer), "vllm")
    assert found["mla_scale_q_lora"] is False and found["moe_topk"] == 1
    same_logits(lm, load(import_hf(out, tmp_path / "back", say=say))[0].lm)
