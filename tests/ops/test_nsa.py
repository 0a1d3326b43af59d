"""NSA's parts without weights: compressed attention, importance, the choice, chosen tokens."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from moebius.ops.nsa import (
    choose,
    choose_blocks,
    compressed_attention,
    importance,
    importance_naive,
    selected_attention,
    selected_naive,
)
from moebius.ops.nsa.fla import kernel_fits, selected_fla

from .compare import TOLERANCE, assert_same, noise


def test_importance_counts_the_overlap_by_hand() -> None:
    """Blocks of 32 every 16, selection blocks of 64: block 3 lies on the border of 0 and 1."""
    p_BGTC = torch.eye(9, dtype=torch.float64)[None, None]
    got_JC = importance(p_BGTC, torch.arange(9)[None], 3, 32, 16, 64)[0, 0].T
    want_JC = [
        [2, 2, 2, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 2, 2, 2, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1, 2],
    ]
    assert got_JC.tolist() == want_JC


def test_importance_of_equal_blocks_is_p() -> None:
    p_BGTC = noise(2, 2, 3, 5).abs()
    block_BC = torch.arange(5).expand(2, -1)
    assert torch.equal(importance(p_BGTC, block_BC, 5, 8, 8, 8), p_BGTC)


@pytest.mark.parametrize(
    ("block", "stride", "width"),
    [(4, 4, 4), (32, 16, 64), (4, 2, 8), (8, 2, 4), (6, 2, 2), (3, 1, 5)],
    ids=str,
)
def test_importance_is_the_printed_sum(block: int, stride: int, width: int) -> None:
    """Two rows of other documents: indices of blocks begin anew, p of another document is 0."""
    block_BC = torch.stack([torch.arange(9), torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 3])])
    inputs = {"p": noise(2, 2, 3, 9, seed=1).abs()}
    assert_same(
        lambda x: importance(x["p"], block_BC, 5, block, stride, width),
        lambda x: importance_naive(x["p"], block_BC, 5, block, stride, width),
        inputs,
        1e-14,
    )


def test_the_own_the_previous_and_the_first_block_are_always_chosen() -> None:
    importance_BGTJ = noise(2, 3, 40, 10, seed=1).abs()
    own_BT = (torch.arange(40) // 4).expand(2, -1)
    index_BGTX = choose_blocks(importance_BGTJ, own_BT, 5)
    for own in range(10):
        rows_BGTX = index_BGTX[:, :, own * 4 : own * 4 + 4].flatten(0, 2)
        for row, weight_J in zip(
            rows_BGTX, importance_BGTJ[:, :, own * 4 : own * 4 + 4].flatten(0, 2), strict=True
        ):
            chosen = [j for j in row.tolist() if j >= 0]
            forced = {0, max(own - 1, 0), own}
            rest = sorted(set(range(own)) - forced, key=lambda j: -float(weight_J[j]))
            assert len(set(chosen)) == len(chosen) == min(5, own + 1)
            assert set(chosen) == forced | set(rest[: 5 - len(forced)])


def test_of_blocks_without_importance_the_nearer_is_chosen() -> None:
    index_BGTX = choose_blocks(torch.zeros(1, 1, 1, 100), torch.tensor([[50]]), 6)
    assert set(index_BGTX.flatten().tolist()) == {0, 50, 49, 48, 47, 46}


@pytest.mark.parametrize("group", [1, 3])
def test_compressed_attention_is_its_formula(group: int) -> None:
    """Values, probabilities and gradients; a query that sees nothing gets zeros, and gives none."""
    inputs = {
        "q": noise(1, 6, 2 * group, 4, seed=1),
        "k": noise(1, 3, 2, 4, seed=2),
        "v": noise(1, 3, 2, 4, seed=3),
    }
    counts = [0, 1, 0, 3, 2, 2]
    visible_BTC = torch.arange(3) < torch.tensor(counts)[None, :, None]

    def formula(x: Mapping[str, Tensor]) -> Tensor:
        rows: list[Tensor] = []
        for t, count in enumerate(counts):
            for h in range(2 * group):
                power = (x["k"][0, :count, h // group] @ x["q"][0, t, h] * 0.3).exp()
                rows.append(power @ x["v"][0, :count, h // group] / max(power.sum(), 1e-300))
        return torch.stack(rows).view(1, 6, 2 * group, 4)

    def ours(x: Mapping[str, Tensor]) -> Tensor:
        return compressed_attention(x["q"], x["k"], x["v"], visible_BTC, 0.3)[0]

    assert_same(ours, formula, inputs, 1e-13)
    out_BTHK, p_BGTC = compressed_attention(inputs["q"], inputs["k"], inputs["v"], visible_BTC, 0.3)
    assert not out_BTHK[:, [0, 2]].any()
    want_T = torch.tensor([group * float(count > 0) for count in counts], dtype=torch.float64)
    torch.testing.assert_close(p_BGTC.sum(-1), want_T.expand(1, 2, -1))
    assert torch.equal(p_BGTC > 0, visible_BTC[:, None].expand(1, 2, -1, -1))


def test_compressed_attention_without_any_block_is_zero() -> None:
    q_BTHK, none = noise(1, 3, 4, 4), torch.zeros(1, 0, 2, 4, dtype=torch.float64)
    visible_BTC = torch.zeros(1, 3, 0, dtype=torch.bool)
    out_BTHK, p_BGTC = compressed_attention(q_BTHK, none, none, visible_BTC, 1.0)
    assert not out_BTHK.any() and out_BTHK.shape == q_BTHK.shape and p_BGTC.shape == (1, 2, 3, 0)


def packed(length: int, *cuts: int) -> tuple[Tensor, Tensor]:
    """position_BS and attend_BSS of two rows; the second begins new documents at `cuts`."""
    index_S = torch.arange(length)
    cut_C1 = torch.tensor(cuts)[:, None]
    document_BS = torch.stack([0 * index_S, (index_S >= cut_C1).sum(0)])
    same_BSS = document_BS[:, :, None] == document_BS[:, None]
    position_BS = same_BSS.tril().sum(-1) - 1
    return position_BS, same_BSS.tril()


def chosen(position_BT: Tensor, width: int, heads: int, num_chosen: int) -> Tensor:
    """index_BGTX of noise."""
    num_blocks = int(position_BT.max()) // width + 1
    batch, length = position_BT.shape
    importance_BGTJ = noise(batch, heads, length, num_blocks, seed=5).abs()
    return choose_blocks(importance_BGTJ, position_BT // width, num_chosen)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "queries", "width"),
    [(2, 2, 30, 30, 4), (6, 2, 30, 30, 5), (8, 1, 30, 4, 3), (4, 2, 300, 300, 16)],
    ids=str,
)
def test_dense_selection_equals_naive(
    heads: int, kv_heads: int, length: int, queries: int, width: int, dtype: torch.dtype
) -> None:
    """The last queries of the keys; whole rows go in blocks where they are long."""
    position_BS, attend_BSS = packed(length, 7, length // 2)
    index_BGTX = chosen(position_BS[:, -queries:], width, kv_heads, 4)
    inputs = {
        "q": noise(2, queries, heads, 8, seed=1, dtype=dtype),
        "k": noise(2, length, kv_heads, 8, seed=2, dtype=dtype),
        "v": noise(2, length, kv_heads, 8, seed=3, dtype=dtype),
    }
    rest = (index_BGTX, position_BS, attend_BSS[:, -queries:], width, 0.4)
    assert_same(
        lambda x: selected_attention(x["q"], x["k"], x["v"], *rest, whole=queries == length),
        lambda x: selected_naive(x["q"], x["k"], x["v"], *rest),
        inputs,
        TOLERANCE[dtype],
    )


def test_a_token_of_a_block_not_chosen_is_not_seen() -> None:
    position_BS, attend_BSS = packed(24, 12)
    index_BGTX = torch.full((2, 1, 24, 2), -1)
    index_BGTX[..., 0] = position_BS[:, None] // 4
    q, k, v = (noise(2, 24, 1, 4, seed=seed) for seed in range(3))
    out = selected_attention(q, k, v, index_BGTX, position_BS, attend_BSS, 4, 1.0, whole=True)
    k[:, 4:8], v[:, 4:8] = k[:, 4:8].flip(1), 9.0
    moved_BT = (
        selected_attention(q, k, v, index_BGTX, position_BS, attend_BSS, 4, 1.0, whole=True) != out
    ).any(-1)[..., 0]
    assert moved_BT.any(0).nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_the_kernel_is_only_used_where_its_limits_hold() -> None:
    half = torch.bfloat16
    assert kernel_fits(half, 16, 64, 64)
    assert not kernel_fits(torch.float32, 16, 64, 64)
    for limits in ((8, 64, 64), (24, 64, 64), (16, 257, 64), (16, 64, 48), (16, 64, 8)):
        assert not kernel_fits(half, *limits)
    assert choose(torch.device("cpu"), half, 16, 64, 64) == "dense"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a CUDA device")
@pytest.mark.filterwarnings("ignore")  # the package warns when it is imported
@pytest.mark.parametrize("num_chosen", [4, 5])
def test_the_kernel_equals_naive(num_chosen: int) -> None:
    pytest.importorskip("fla", reason="pip install fla-core")
    position_BS, attend_BSS = packed(200, 70, 103)
    index_BGTX = chosen(position_BS, 16, 2, num_chosen)
    inputs = {
        "q": noise(2, 200, 32, 64, seed=1, dtype=torch.bfloat16).cuda(),
        "k": noise(2, 200, 2, 64, seed=2, dtype=torch.bfloat16).cuda(),
        "v": noise(2, 200, 2, 64, seed=3, dtype=torch.bfloat16).cuda(),
    }
    rest = (index_BGTX.cuda(), position_BS.cuda(), attend_BSS.cuda(), 16, 0.125)
    assert_same(
        lambda x: selected_fla(x["q"], x["k"], x["v"], *rest),
        lambda x: selected_naive(x["q"], x["k"], x["v"], *rest),
        inputs,
        3e-2,
    )
