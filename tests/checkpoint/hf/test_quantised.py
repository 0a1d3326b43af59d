"""FP8 in blocks and MXFP4 are read by their formats' definitions: values worked out by hand, the
peer's own functions where they are installed, and whole folders.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moebius.checkpoint.hf.exporter import export_hf
from moebius.checkpoint.hf.importer import import_hf
from moebius.checkpoint.hf.quantised import MXFP4, BlockFP8, dequantised
from moebius.checkpoint.stored import Stored, stored_in
from moebius.infer.load import load

from .folders import CONFIG, dealt, random_tensors, write_folder


def stored(folder: Path, **tensors: Tensor) -> dict[str, Stored]:
    save_file(tensors, folder / "x.safetensors")
    return stored_in(folder / "x.safetensors")


def test_fp8_by_hand(tmp_path: Path) -> None:
    # 0x40 is 2 (exponent 8 - 7), 0x38 is 1, 0x7E is 448, 0x01 is 2^-9, 0xB8 is -1.
    bits = torch.tensor([[0x40, 0x38, 0x7E], [0x01, 0xB8, 0x00], [0x38, 0x38, 0x38]])
    weight = bits.to(torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5, 2.0], [3.0, 0.25]])
    found = stored(tmp_path, w=weight, s=scale)
    whole = BlockFP8(found["w"], found["s"], (2, 2))
    expected = torch.tensor([[1.0, 0.5, 896.0], [2.0**-10, -0.5, 0.0], [3.0, 3.0, 0.25]])
    assert whole.dtype == torch.bfloat16 and torch.equal(whole.whole().float(), expected)
    for start in range(3):
        assert torch.equal(whole.rows(start, 3), expected[start:].bfloat16())
        assert torch.equal(whole.rows(start, start + 1), expected[start : start + 1].bfloat16())


@pytest.mark.parametrize("shape", [(256, 384), (130, 257), (1, 1), (127, 128)], ids=str)
def test_fp8_blocks_of_any_edge(tmp_path: Path, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    expected = torch.empty(shape)
    for i in range(shape[0]):
        for j in range(0, shape[1], 128):
            block = weight[i, j : j + 128].float() * scale[i // 128, j // 128]
            expected[i, j : j + 128] = block
    found = dequantised(stored(tmp_path, w=weight, w_scale_inv=scale), (128, 128))
    assert found.keys() == {"w"} and torch.equal(found["w"].whole(), expected.bfloat16())


def test_mxfp4_by_hand(tmp_path: Path) -> None:
    blocks = torch.zeros(1, 2, 1, 16, dtype=torch.uint8)
    # Low half first: 1 is 0.5, 2 is 1, 7 is 6, 9 is -0.5, 15 is -6.
    blocks[0, 0, 0, :3] = torch.tensor([0x21, 0xF7, 0x09])
    blocks[0, 1, 0, 15] = 0x53
    scales = torch.tensor([[[128], [126]]], dtype=torch.uint8)
    found = stored(tmp_path, b=blocks, s=scales)
    whole = MXFP4(found["b"], found["s"])
    expected = torch.zeros(1, 32, 2)
    expected[0, :6, 0] = torch.tensor([1.0, 2.0, 12.0, -12.0, -1.0, 0.0])
    expected[0, 30:, 1] = torch.tensor([0.75, 1.5])
    assert whole.shape == (1, 32, 2) and torch.equal(whole.whole().float(), expected)


def test_the_ends_of_mxfp4_s_range(tmp_path: Path) -> None:
    blocks = torch.full((1, 1, 3, 16), 0x22, dtype=torch.uint8)
    scales = torch.tensor([[[0, 254, 255]]], dtype=torch.uint8)
    found = stored(tmp_path, b=blocks, s=scales)
    values = MXFP4(found["b"], found["s"]).whole().float()[0, :, 0]
    assert values[0] == 2.0**-127 and values[32] == 2.0**127 and values[64:].isnan().all()


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", reason="the peer's own reading")
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 10, 2), dtype=torch.uint8)
    expected = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    found = dequantised(stored(tmp_path, w_blocks=blocks, w_scales=scales), (128, 128))
    assert found.keys() == {"w"} and torch.equal(found["w"].whole(), expected)
    assert torch.equal(found["w"].rows(1, 3), expected[1:3])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    weight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    found = stored(tmp_path, w=weight, w_scale_inv=torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"w_scale_inv has shape \[2, 2\].* needs \[1, 1\]"):
        dequantised(found, (128, 128))
    odd = torch.ones(1, 2, 3, 16, dtype=torch.uint8)
    found = stored(tmp_path, w_blocks=odd, w_scales=odd[..., 0, 0].clone())
    with pytest.raises(ValueError, match="are not MXFP4"):
        dequantised(found, (128, 128))


def test_a_folder_in_fp8_is_imported_and_leaves_in_bf16(tmp_path: Path) -> None:
    plain = random_tensors(CONFIG)
    quantised, expected = dict(plain), dict(plain)
    for name, x in plain.items():
        if "_proj" in name:
            scale = torch.full((math.ceil(x.shape[0] / 8), math.ceil(x.shape[1] / 8)), 0.25)
            scale[0, 0] = 0.5
            quantised[name] = (x.float() * 3).to(torch.float8_e4m3fn)
            quantised[f"{name}_scale_inv"] = scale
            wide = scale.repeat_interleave(8, 0).repeat_interleave(8, 1)
            wide = wide[: x.shape[0], : x.shape[1]]
            expected[name] = (quantised[name].float() * wide).bfloat16()
    method = {"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "dynamic"}
    config = {**CONFIG, "quantization_config": method}
    folder = write_folder(tmp_path / "hf", config, *dealt(quantised, 3))
    run = import_hf(folder, tmp_path / "run", say=print)
    assert load(run)[0].lm.vocab == CONFIG["vocab_size"]
    out = export_hf(run, tmp_path / "out", say=print)
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    # Nothing of the quantisation is left in the config; all else is.
    assert json.loads((out / "config.json").read_text()) == CONFIG
