"""The fused attention kernel against the written-out softmax, in fp64 of the same bf16 numbers."""

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from moebius.ops import native
from moebius.ops.attention import attention, attention_naive, choose
from moebius.ops.attention.native import TILE, attention_native

from .compare import noise, with_gradients

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

# Outputs and gradients are rounded once, weights and dS before their products.
TOLERANCE = 1e-2
# heads, key heads, key width, value width
MLA, GROUPED, ODD = (4, 4, 96, 64), (4, 2, 64, 64), (6, 2, 7, 21)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def causal(length: int, window: int | None = None) -> Tensor:
    distance_TT = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    seen_TT = distance_TT >= 0
    return (seen_TT if window is None else seen_TT & (distance_TT < window)).expand(2, -1, -1)


def packed(lengths: list[int], others: list[int]) -> Tensor:
    """Causal masks of two sequences whose documents have these lengths."""
    documents = [torch.arange(len(x)).repeat_interleave(torch.tensor(x)) for x in (lengths, others)]
    document_BT = torch.stack(documents)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return same_BTT & causal(document_BT.shape[1])


def inputs_of(
    sizes: tuple[int, ...], mask_BTS: Tensor, spread: float = 1.0, sink: bool = False
) -> dict[str, Tensor]:
    heads, kv_heads, width, value_width = sizes
    batch, queries, keys = mask_BTS.shape
    inputs = {
        "q": (noise(batch, queries, heads, width, seed=1) * spread).bfloat16(),
        "k": noise(batch, keys, kv_heads, width, seed=2).bfloat16(),
        "v": noise(batch, keys, kv_heads, value_width, seed=3).bfloat16(),
    }
    return inputs | ({"sink": noise(heads, seed=4).float()} if sink else {})


def run(x: Mapping[str, Tensor], mask_BTS: Tensor, scale: float = 0.3) -> Tensor:
    return attention_native(x["q"], x["k"], x["v"], mask_BTS, scale, x.get("sink"))


def truth(x: Mapping[str, Tensor], mask_BTS: Tensor, scale: float) -> Tensor:
    """The naive twin; queries that see nothing see one key instead, and give 0."""
    seen_BT1 = mask_BTS.any(-1, keepdim=True)
    mask_BTS = mask_BTS | ~seen_BT1
    out = attention_naive(x["q"], x["k"], x["v"], mask_BTS, scale, x.get("sink"))
    return out * seen_BT1[..., None]


def assert_near_truth(inputs: Mapping[str, Tensor], mask_BTS: Tensor, scale: float = 0.3) -> None:
    got = with_gradients(lambda x: run(x, mask_BTS, scale), inputs)
    wide = {name: x.double() for name, x in inputs.items()}
    direction = noise(*got["value"].shape, seed=99).bfloat16().double()
    leaves = {name: x.requires_grad_() for name, x in wide.items()}
    value = truth(leaves, mask_BTS, scale)
    (value * direction).sum().backward()
    want = {"value": value.detach()} | {name: x.grad for name, x in leaves.items()}
    for name, reference in want.items():
        assert reference is not None
        assert got[name].isfinite().all(), f"{name} is not finite"
        error = float((got[name].double() - reference).abs().max())
        largest = max(1e-3, float(reference.abs().max()))
        assert error <= TOLERANCE * largest, f"{name} is off by {error:.3g} of {largest:.3g}"


MASKS = {
    "one": causal(1),
    "short": causal(11),
    "half": causal(TILE // 2),
    "tile": causal(TILE),
    "tiles": causal(3 * TILE),
    "between": causal(2 * TILE + 9),
    "window": causal(3 * TILE + 5, 70),
    "narrow": causal(2 * TILE + 1, 1),
    "documents": packed([1, 1, 62, 64, 2, 70, 1], [3, 190, 1, 7]),
    "everything": torch.ones(2, TILE, 2 * TILE, dtype=torch.bool),
    "longer": causal(200)[:, 150:],
    "scattered": noise(2, 70, 150) > 1.5,
    "nothing": torch.zeros(2, 5, 130, dtype=torch.bool),
}


@pytest.mark.parametrize("sink", [False, True], ids=["plain", "sink"])
@pytest.mark.parametrize("sizes", [MLA, GROUPED, ODD], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_native_attention_equals_naive(mask: str, sizes: tuple[int, ...], sink: bool) -> None:
    assert_near_truth(inputs_of(sizes, MASKS[mask], sink=sink), MASKS[mask])


@pytest.mark.parametrize("sizes", [(1, 1, 128, 128), (8, 1, 40, 32), (2, 2, 16, 200)], ids=str)
def test_wide_and_narrow_heads(sizes: tuple[int, ...]) -> None:
    assert_near_truth(inputs_of(sizes, MASKS["between"]), MASKS["between"], sizes[2] ** -0.5)


@pytest.mark.parametrize("sink", [False, True], ids=["plain", "sink"])
def test_large_scores(sink: bool) -> None:
    """Beyond 100 either way: nothing overflows, and the largest takes all."""
    mask_BTS = MASKS["documents"]
    inputs = inputs_of(GROUPED, mask_BTS, spread=50.0, sink=sink)
    scores = torch.einsum("bthk,bsgk->bhgts", inputs["q"].float(), inputs["k"].float()) * 0.125
    assert scores.max() > 100 and scores.min() < -100
    assert_near_truth(inputs, mask_BTS, 0.125)


def test_queries_that_see_nothing_give_nothing() -> None:
    mask_BTS = causal(2 * TILE).clone()
    mask_BTS[0, 3] = mask_BTS[1, TILE:] = False
    got = with_gradients(
        lambda x: run(x, mask_BTS),
        inputs_of(GROUPED, mask_BTS),
    )
    for name in ("value", "q"):
        assert not got[name][0, 3].any() and not got[name][1, TILE:].any()
        assert got[name][0, 4].any()


def test_a_query_that_sees_one_key_gives_its_value() -> None:
    mask_BTS = causal(2 * TILE + 1, 1)
    inputs = inputs_of(MLA, mask_BTS)
    assert torch.equal(run(inputs, mask_BTS), inputs["v"])


def test_masked_keys_have_no_weight_at_all() -> None:
    mask_BTS = causal(TILE + 8)
    inputs = inputs_of(GROUPED, mask_BTS)
    before = run(inputs, mask_BTS)
    inputs["k"][:, -1], inputs["v"][:, -1] = 1e4, 1e30
    after = run(inputs, mask_BTS)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_strided_views_are_read_as_they_are() -> None:
    """Slices, transposes and expanded heads, as mixers and checkpoints hand them over."""
    mask_BTS = torch.zeros(2, 100, 164, dtype=torch.bool)
    mask_BTS[:, :, 30:130] = causal(100)
    mask_BTS = mask_BTS[:, :, 30:130]
    qkv = noise(2, 4, 100, 96).bfloat16().transpose(1, 2)
    q, k, v = qkv.split(32, dim=-1)
    one_k = k[:, :, :1].expand(-1, -1, 4, -1)
    for keys in (k, one_k, k.transpose(-1, -2).contiguous().transpose(-1, -2)):
        want = attention_native(q.contiguous(), keys.contiguous(), v.contiguous(), mask_BTS, 0.3)
        assert torch.equal(attention_native(q, keys, v, mask_BTS, 0.3), want)


@pytest.mark.parametrize("sizes", [MLA, GROUPED], ids=str)
def test_every_call_gives_the_same_bits(sizes: tuple[int, ...], threads: None) -> None:
    mask_BTS = causal(600, 400)
    inputs = inputs_of(sizes, mask_BTS, sink=True)
    results: list[dict[str, Tensor]] = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        results.append(with_gradients(lambda x: run(x, mask_BTS), inputs))
    for name, first in results[0].items():
        assert torch.equal(first, results[1][name]) and torch.equal(first, results[2][name]), name


def test_training_in_bf16_takes_the_kernel() -> None:
    assert choose(torch.device("cpu"), torch.bfloat16, 512) == "native"
    inputs, mask_BTS = inputs_of(MLA, MASKS["tile"]), MASKS["tile"]
    want = run(inputs, mask_BTS)
    assert torch.equal(
        attention(inputs["q"], inputs["k"], inputs["v"], mask_BTS, 0.3, causal=True), want
    )


def test_what_it_cannot_take_is_refused() -> None:
    q, k, v = inputs_of(GROUPED, MASKS["short"]).values()
    with pytest.raises(ValueError, match="bf16"):
        attention_native(q.float(), k, v, MASKS["short"], 0.3)
    with pytest.raises(ValueError, match="do not fit"):
        attention_native(q[:, :, :3], k, v, MASKS["short"], 0.3)
    with pytest.raises(ValueError, match="positive scale"):
        attention_native(q, k, v, MASKS["short"], -0.3)
