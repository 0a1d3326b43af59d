"""Kimi Delta Attention against its equation: values, every gradient, weak and strong decay."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from moebius.ops.kda import BACKENDS, absorb, choose, kda, kda_onward
from moebius.ops.kda.chunk import CHUNK, kda_chunk
from moebius.ops.kda.fla import MAX_WIDTH, kda_fla
from moebius.ops.kda.naive import kda_naive

from .compare import TOLERANCE, assert_same, noise, with_gradients

Inputs = dict[str, Tensor]


def inputs_of(
    length: int,
    decay: float,
    dtype: torch.dtype = torch.float64,
    shape: tuple[int, int, int, int] = (2, 2, 5, 3),
) -> Inputs:
    """Log-decays are `decay` times the size of standard normal numbers; beta goes up to 2."""
    batch, heads, width, value_width = shape
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "q": noise(batch, length, heads, width, seed=1, dtype=dtype),
        "k": noise(batch, length, heads, width, seed=2, dtype=dtype),
        "v": noise(batch, length, heads, value_width, seed=3, dtype=dtype),
        "g": -decay * noise(batch, length, heads, width, seed=4, dtype=wide).abs(),
        "beta": 2 * noise(batch, length, heads, seed=5, dtype=wide).sigmoid(),
    }


def firsts(length: int, *rows: tuple[int, ...]) -> Tensor:
    """first_BT from the places where documents begin."""
    first_BT = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, places in zip(first_BT, rows, strict=True):
        row[list(places)] = True
    return first_BT


def equation(x: Mapping[str, Tensor], first_BT: Tensor, state_BHKV: Tensor | None = None) -> Tensor:
    """S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_(t-1) + beta_t k_t v_t^T, by head."""
    batch, length, heads, width = x["q"].shape
    rows: list[Tensor] = []
    for b in range(batch):
        by_head: list[Tensor] = []
        for h in range(heads):
            empty = torch.zeros(width, x["v"].shape[-1], dtype=torch.float64)
            state, outs = empty if state_BHKV is None else state_BHKV[b, h], []
            for t in range(length):
                q, k, v = x["q"][b, t, h], x["k"][b, t, h], x["v"][b, t, h]
                q = q / (q.dot(q) + 1e-6).sqrt() / width**0.5
                k = k / (k.dot(k) + 1e-6).sqrt()
                if first_BT[b, t]:
                    state = empty
                erase = torch.eye(width) - x["beta"][b, t, h] * torch.outer(k, k)
                write = x["beta"][b, t, h] * torch.outer(k, v)
                state = erase @ torch.diag(x["g"][b, t, h].exp()) @ state + write
                outs.append(state.T @ q)
            by_head.append(torch.stack(outs))
        rows.append(torch.stack(by_head, dim=1))
    return torch.stack(rows)


def function(name: str, first_BT: Tensor) -> Callable[[Mapping[str, Tensor]], Tensor]:
    op = BACKENDS[name]
    return lambda x: op(x["q"], x["k"], x["v"], x["g"], x["beta"], first_BT)


@pytest.mark.parametrize("decay", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("backend", ["naive", "chunk"])
def test_the_op_is_its_equation(backend: str, decay: float) -> None:
    first_BT = firsts(21, (0, 7), (16, 20))
    want = lambda x: equation(x, first_BT)  # noqa: E731
    assert_same(function(backend, first_BT), want, inputs_of(21, decay), 1e-11)


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 75])
def test_chunks_equal_naive_at_any_length(length: int) -> None:
    first_BT = firsts(length, (), (0, length // 2))
    inputs = inputs_of(length, 1.0)
    assert_same(function("chunk", first_BT), function("naive", first_BT), inputs, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", [0.1, 1.0, 5.0])
def test_chunks_equal_naive_at_any_decay(decay: float, dtype: torch.dtype) -> None:
    first_BT = firsts(100, (30,), ())
    inputs = inputs_of(100, decay, dtype, (2, 3, 16, 16))
    naive = function("naive", first_BT)
    assert_same(function("chunk", first_BT), naive, inputs, TOLERANCE[dtype])
    assert naive(inputs).dtype == dtype


@pytest.mark.parametrize("backend", ["naive", "chunk"])
@pytest.mark.parametrize("step", [-5.0, -20.0, -200.0])
def test_gradients_are_finite_at_strong_decay(step: float, backend: str) -> None:
    inputs = inputs_of(96, 1.0, torch.float32)
    inputs["g"] = torch.full_like(inputs["g"], step)
    for name, result in with_gradients(function(backend, firsts(96, (), (9,))), inputs).items():
        assert result.isfinite().all(), name


def test_a_strong_decay_does_not_blur_the_weak_ones_beside_it() -> None:
    """Differences of cumulated log-decays would lose the digits of the weak ones in fp32."""
    inputs = inputs_of(64, 1e-3, torch.float64)
    inputs["g"][:, 3::8] = -30_000.0
    first_BT = firsts(64, (), ())
    exact = with_gradients(function("chunk", first_BT), inputs)
    rounded = {name: x.float() for name, x in inputs.items()}
    for name, got in with_gradients(function("chunk", first_BT), rounded).items():
        torch.testing.assert_close(got.double(), exact[name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("backend", ["naive", "chunk"])
def test_a_document_is_as_if_alone(backend: str) -> None:
    """Documents of one token, at the edges of chunks, and across them."""
    places = (0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 45)
    x = inputs_of(50, 0.3, shape=(1, 2, 5, 3))
    out_BTHV = function(backend, firsts(50, places))(x)
    for start, end in zip(places, (*places[1:], 50), strict=True):
        alone = {name: tensor[:, start:end] for name, tensor in x.items()}
        want_BTHV = function("naive", firsts(end - start, ()))(alone)
        torch.testing.assert_close(out_BTHV[:, start:end], want_BTHV, rtol=1e-10, atol=1e-12)


def test_no_gradient_crosses_into_another_document() -> None:
    x = {name: tensor.requires_grad_() for name, tensor in inputs_of(40, 0.3).items()}
    out_BTHV = function("chunk", firsts(40, (21,), (21,)))(x)
    out_BTHV[:, 21:].square().sum().backward()
    for name, tensor in x.items():
        assert tensor.grad is not None
        assert not tensor.grad[:, :21].any() and tensor.grad[:, 22:].any(), name


@pytest.mark.parametrize("pieces", [(40,), (1,) * 40, (3, 1, 16, 20), (17, 23)])
def test_pieces_that_continue_a_state_equal_the_whole(pieces: tuple[int, ...]) -> None:
    x = inputs_of(sum(pieces), 0.5)
    want_BTHV = function("naive", firsts(sum(pieces), (), ()))(x)
    state_BHKV = torch.zeros(2, 2, 5, 3, dtype=torch.float64)
    outs: list[Tensor] = []
    for part in zip(*(tensor.split(pieces, dim=1) for tensor in x.values()), strict=True):
        q, k, v, g, beta = part
        out_BTHV, delta_BTHV = kda_onward(q, k, v, g, beta, state_BHKV)
        state_BHKV = absorb(state_BHKV, k, delta_BTHV, g)
        outs.append(out_BTHV)
    torch.testing.assert_close(torch.cat(outs, dim=1), want_BTHV, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("op", [kda_naive, kda_chunk])
def test_an_initial_state_is_that_of_the_equation(op: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """With its gradient, and with a document that begins and forgets it."""
    first_BT = firsts(20, (), (18,))
    inputs = {**inputs_of(20, 0.2), "state": noise(2, 2, 5, 3, seed=6)}

    def got(x: Mapping[str, Tensor]) -> Tensor:
        return op(x["q"], x["k"], x["v"], x["g"], x["beta"], x["state"], first_BT)[0]

    assert_same(got, lambda x: equation(x, first_BT, x["state"]), inputs, 1e-11)


def test_the_choice_is_a_backend() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose(cpu, torch.float32, 64) == "chunk"
    assert choose(cuda, torch.float64, 64) == choose(cuda, torch.float32, 64) == "chunk"
    assert choose(cuda, torch.bfloat16, MAX_WIDTH + 1) == "chunk"
    assert choose(cuda, torch.bfloat16, 64) in BACKENDS
    x, first_BT = inputs_of(20, 0.5), firsts(20, (3,), ())
    out_BTHV = kda(x["q"], x["k"], x["v"], x["g"], x["beta"], first_BT)
    assert torch.equal(out_BTHV, function("chunk", first_BT)(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a CUDA device")
@pytest.mark.parametrize("decay", [0.1, 1.0, 5.0])
def test_the_kernel_equals_naive(decay: float) -> None:
    pytest.importorskip("fla", reason="pip install fla-core")
    first_BT = firsts(200, (0, 30, 31), (150,)).cuda()
    inputs = inputs_of(200, decay, torch.bfloat16, (2, 4, 64, 64))
    assert_same(
        lambda x: kda_fla(x["q"], x["k"], x["v"], x["g"], x["beta"], first_BT),
        function("naive", first_BT),
        {name: tensor.cuda() for name, tensor in inputs.items()},
        3e-2,
    )
