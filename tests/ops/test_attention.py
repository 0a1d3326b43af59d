"""Attention by torch's sdpa against the written-out softmax."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from moebius.ops.attention import attention_naive, choose
from moebius.ops.attention.sdpa import BLOCK, attention_sdpa

from .compare import TOLERANCE, assert_same, noise

DTYPES = list(TOLERANCE)
# heads, key heads, key width, value width, queries, keys
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (4, 4, 8, 8, 7, 7),
    (6, 2, 8, 8, 5, 5),
    (3, 1, 4, 4, 6, 6),
    (4, 2, 12, 5, 3, 9),
    (4, 4, 5, 12, 1, 11),
    (6, 3, 7, 3, 33, 40),
]


def mask_of(kind: str, queries: int, keys: int) -> Tensor:
    """Which keys queries may see: the last queries of `keys` tokens; each sees itself."""
    distance_TS = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None, :]
    causal_TS = distance_TS >= 0
    if kind == "causal":
        return causal_TS.expand(2, -1, -1)
    if kind == "window":
        return (causal_TS & (distance_TS < 2)).expand(2, -1, -1)
    document_S = torch.arange(keys) * 3 // keys
    same_TS = document_S[keys - queries :, None] == document_S[None, :]
    return torch.stack([causal_TS & same_TS, causal_TS])


def function(
    op: Callable[..., Tensor], mask_BTS: Tensor
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    return lambda x: op(x["q"], x["k"], x["v"], mask_BTS, 0.37, x.get("sink"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sink", [False, True], ids=["plain", "sink"])
@pytest.mark.parametrize("kind", ["causal", "window", "documents"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sdpa_equals_naive(
    shape: tuple[int, ...], kind: str, sink: bool, dtype: torch.dtype
) -> None:
    heads, kv_heads, width, value_width, queries, keys = shape
    inputs = {
        "q": noise(2, queries, heads, width, seed=1, dtype=dtype),
        "k": noise(2, keys, kv_heads, width, seed=2, dtype=dtype),
        "v": noise(2, keys, kv_heads, value_width, seed=3, dtype=dtype),
    }
    if sink:
        master = torch.promote_types(dtype, torch.float32)
        inputs["sink"] = noise(heads, seed=4, dtype=master)
    mask_BTS = mask_of(kind, queries, keys)
    # The naive twin rounds once, in bf16 sdpa keeps its probabilities in bf16.
    assert_same(
        function(attention_sdpa, mask_BTS),
        function(attention_naive, mask_BTS),
        inputs,
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("sink", [False, True], ids=["plain", "sink"])
@pytest.mark.parametrize(
    ("length", "window"),
    [
        (BLOCK, None),
        (BLOCK + 1, None),
        (2 * BLOCK + 7, None),
        (2 * BLOCK, 1),
        (600, 40),
        (600, 300),
    ],
    ids=str,
)
def test_skipped_keys_are_those_nobody_sees(length: int, window: int | None, sink: bool) -> None:
    """Long causal sequences go in blocks of queries; documents end inside of them."""
    inputs = {
        "q": noise(1, length, 2, 4, seed=1),
        "k": noise(1, length, 1, 4, seed=2),
        "v": noise(1, length, 1, 3, seed=3),
    }
    if sink:
        inputs["sink"] = noise(2, seed=4)
    distance_TT = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    document_T = (torch.arange(length) > length // 3).int()
    mask_TT = (distance_TT >= 0) & (document_T[:, None] == document_T[None, :])
    if window is not None:
        mask_TT &= distance_TT < window
    mask_BTS = mask_TT[None]
    assert_same(
        lambda x: attention_sdpa(
            x["q"], x["k"], x["v"], mask_BTS, 0.37, x.get("sink"), causal=True, window=window
        ),
        function(attention_naive, mask_BTS),
        inputs,
        TOLERANCE[torch.float64],
    )


def test_a_sink_is_a_key_without_value() -> None:
    """A query that sees one key of logit s, beside a sink of logit z, gets v e^s / (e^s + e^z)."""
    q, k, v = (noise(1, 1, 2, 4, seed=seed) for seed in range(3))
    sink_H = torch.tensor([0.5, -30.0], dtype=torch.float64)
    out = attention_sdpa(q, k, v, torch.ones(1, 1, 1, dtype=torch.bool), 0.5, sink_H)
    logit_H = 0.5 * (q * k).sum(-1)[0, 0]
    want = v * torch.sigmoid(logit_H - sink_H)[:, None]
    torch.testing.assert_close(out, want)


def test_masked_keys_have_no_weight_at_all() -> None:
    """Not a small one: neither large values nor large keys behind the mask come through."""
    q, k, v = (noise(1, 4, 2, 8, seed=seed, dtype=torch.float32) for seed in range(3))
    mask_BTS = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    for sink_H in (None, torch.zeros(2)):
        before = attention_sdpa(q, k, v, mask_BTS, 1.0, sink_H)
        far_k, far_v = k.clone(), v.clone()
        far_k[:, -1], far_v[:, -1] = 1e4, 1e30
        after = attention_sdpa(q, far_k, far_v, mask_BTS, 1.0, sink_H)
        assert torch.equal(after[:, :-1], before[:, :-1])


def test_other_dtypes_and_devices_and_single_steps_take_sdpa() -> None:
    cpu = torch.device("cpu")
    assert choose(cpu, torch.float32, 512) == choose(cpu, torch.float64, 512) == "sdpa"
    assert choose(torch.device("cuda"), torch.bfloat16, 512) == "sdpa"
    assert choose(cpu, torch.bfloat16, 1) == "sdpa"
