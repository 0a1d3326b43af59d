"""Quantised weights, read as bf16: block FP8 (DeepSeek-V3) and MXFP4 (gpt-oss; OCP MX v1.0).

FP8: `w` is F8_E4M3 and `w_scale_inv` holds one factor a block (128 x 128; blocks at the edges are
cut). MXFP4: `w_blocks` [E, R, G, 16] holds two FP4 (E2M1) numbers a byte, the low half first, and
`w_scales` [E, R, G] the exponent, biased by 127, of 32 numbers. As in transformers, what the latter
make up is [E, 32 G, R].
"""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from moebius.checkpoint.hf.keys import Keys
from moebius.checkpoint.stored import Readable, Stored

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# E2M1: sign, two bits of exponent, one of mantissa.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@final
class BlockFP8(Readable):
    """`weight` times the factor of each of its blocks of (rows, columns)."""

    def __init__(self, weight: Stored, scale: Stored, block: tuple[int, int]) -> None:
        self._weight, self._scale, self._block = weight, scale, block

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        return self._weight.shape

    def rows(self, start: int, stop: int) -> Tensor:
        height, width = self._block
        first, last = start // height, -(-stop // height)
        factor = self._scale.rows(first, last).float()
        factor = factor.repeat_interleave(height, 0)[start - first * height :][: stop - start]
        factor = factor.repeat_interleave(width, 1)[:, : self.shape[1]]
        return (self._weight.rows(start, stop).float() * factor).bfloat16()

    def whole(self) -> Tensor:
        return self.rows(0, self.shape[0])


@final
class MXFP4(Readable):
    """`blocks` times two to the power of `scales`, its last two dims exchanged."""

    def __init__(self, blocks: Stored, scales: Stored) -> None:
        self._blocks, self._scales = blocks, scales

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        experts, rows, groups, _ = self._blocks.shape
        return experts, groups * 32, rows

    def rows(self, start: int, stop: int) -> Tensor:
        out = torch.empty((stop - start, *self.shape[1:]), dtype=torch.bfloat16)
        for i in range(start, stop):
            out[i - start] = self._expert(i).T
        return out

    def whole(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def _expert(self, i: int) -> Tensor:
        byte_RGB = self._blocks.rows(i, i + 1)[0]
        # A pair of numbers for each of the 256 bytes.
        value = torch.tensor([*_FP4, *(-x for x in _FP4)], dtype=torch.bfloat16)
        byte = torch.arange(256)
        pair = torch.stack([value[byte & 15], value[byte >> 4]], dim=-1)
        number = pair.index_select(0, byte_RGB.flatten().int()).view(*byte_RGB.shape[:2], 32)
        # 255 is the format's NaN.
        exponent_RG = self._scales.rows(i, i + 1)[0].double()
        scale_RG = torch.where(exponent_RG == 255, torch.nan, torch.exp2(exponent_RG - 127))
        return (number * scale_RG.bfloat16()[..., None]).flatten(-2)


def read_quantisation(keys: Keys) -> tuple[int, int]:
    """The FP8 block of a config's `quantization_config`; ValueError where it is of another kind."""
    found = keys.below("quantization_config")
    if found is None:
        return 128, 128
    method = found.text("quant_method")
    if method not in ("fp8", "mxfp4"):
        raise ValueError(
            f"config.json: weights quantised by {method!r} cannot be read; fp8 in blocks and mxfp4 "
            "can, or take the unquantised model"
        )
    block = found.items("weight_block_size") or [128, 128]
    if len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise ValueError(f"config.json: weight_block_size must be two whole numbers, not {block}")
    return block[0], block[1]


def dequantised(tensors: Mapping[str, Stored], block: tuple[int, int]) -> dict[str, Readable]:
    """The tensors of a folder by name, quantised ones under the name of what they make up."""
    found: dict[str, Readable] = dict(tensors)
    for name, x in tensors.items():
        if x.dtype in _FP8:
            found[name] = _fp8(name, x, found.pop(f"{name}_scale_inv", None), block)
        elif name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in tensors:
            whole = name.removesuffix("_blocks")
            found[whole] = _mxfp4(whole, x, tensors[f"{whole}_scales"])
            del found[name], found[f"{whole}_scales"]
    for name, x in found.items():
        if x.dtype not in _PLAIN:
            raise ValueError(f"{name} is of {x.dtype}, which no family here has for weights")
    return found


def _fp8(name: str, x: Stored, scale: Readable | None, block: tuple[int, int]) -> Readable:
    if not isinstance(scale, Stored):
        raise ValueError(f"{name} is in FP8, but {name}_scale_inv is missing from the folder")
    whole = tuple(-(-n // b) for n, b in zip(x.shape, block, strict=False))
    if len(x.shape) != 2 or scale.shape != whole:
        raise ValueError(
            f"{name}_scale_inv has shape {list(scale.shape)}; {list(x.shape)} in blocks of "
            f"{list(block)} needs {list(whole)}"
        )
    return BlockFP8(x, scale, block)


def _mxfp4(name: str, blocks: Stored, scales: Stored) -> Readable:
    fits = len(blocks.shape) == 4 and blocks.shape[-1] == 16 and blocks.shape[:-1] == scales.shape
    if not fits or {blocks.dtype, scales.dtype} != {torch.uint8}:
        raise ValueError(
            f"{name}_blocks {list(blocks.shape)} and {name}_scales {list(scales.shape)} are not "
            "MXFP4: [E, R, G, 16] and [E, R, G] of bytes"
        )
    return MXFP4(blocks, scales)
