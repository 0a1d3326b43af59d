"""Causal attention in blocks of queries against the written-out softmax, beyond one block."""

import functools

import pytest
import torch

from moebius.ops.attention import attention, attention_naive
from moebius.ops.attention.sdpa import BLOCK

from .compare import TOLERANCE, assert_same, noise
from .test_attention import function, mask_of


@pytest.mark.parametrize("length", [BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 37])
@pytest.mark.parametrize("window", [None, 1, 2, BLOCK, BLOCK + 5])
def test_blocks_equal_naive(length: int, window: int | None) -> None:
    inputs = {
        name: noise(1, length, 2, 4, seed=i, dtype=torch.float64) for i, name in enumerate("qkv")
    }
    inputs["sink"] = noise(2, seed=4, dtype=torch.float64)
    mask_BTS = mask_of("documents", length, length)[:1]
    if window is not None:
        index_T = torch.arange(length)
        mask_BTS = mask_BTS & (index_T[:, None] - index_T[None, :] < window)
    blocks = functools.partial(attention, causal=True, window=window)
    fast, naive = function(blocks, mask_BTS), function(attention_naive, mask_BTS)
    assert_same(fast, naive, inputs, TOLERANCE[torch.float64])
