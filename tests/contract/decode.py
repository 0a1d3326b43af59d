"""Checks of decoding, for what keeps a state: mixers, and blocks with the states of theirs.

The sequence is longer than any window of the cases and the slack of a ring, so that rings turn.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moebius.model.block import Block
from moebius.model.context import Context
from moebius.model.mixers import DecodeState, Mixer

from .common import close, context, fresh, hidden
from .flow import apply

LENGTH = 40

States = tuple[DecodeState, ...]


def mixers_of(module: nn.Module) -> tuple[Mixer, ...]:
    """A mixer itself, or those of a block."""
    if isinstance(module, Block):
        return module.mixers()
    assert isinstance(module, Mixer)
    return (module,)


def start(module: nn.Module, x_BTD: Tensor) -> States:
    """The states of empty sequences."""
    states: list[DecodeState] = []
    for mixer in mixers_of(module):
        states.append(mixer.init_state(x_BTD.shape[0], x_BTD.dtype, x_BTD.device))
        assert states[-1].length == 0, "the state of an empty sequence has seen tokens"
    return tuple(states)


def advance(module: nn.Module, x_BTD: Tensor, states: States) -> tuple[Tensor, States]:
    """The outputs of tokens that continue what the states have seen."""
    ctx = Context.continuing(x_BTD[:, :, 0], states[0].length)
    if isinstance(module, Block):
        out = module(x_BTD, ctx, states, {})
        assert out.states is not None, "a block that was given states returned none"
        return out.x_BTD, out.states
    y_BTD, state, _ = module(x_BTD, ctx, states[0], {})
    return y_BTD, (state,)


def continued(module: nn.Module, x_BTD: Tensor, chunk: int, states: States) -> Tensor:
    """The outputs of tokens given in chunks."""
    outputs: list[Tensor] = []
    for part_BTD in x_BTD.split(chunk, dim=1):
        seen = states[0].length
        y_BTD, states = advance(module, part_BTD, states)
        lengths = [state.length for state in states]
        want = seen + part_BTD.shape[1]
        assert lengths == [want] * len(states), f"the state says it saw {lengths}, not {want}"
        outputs.append(y_BTD)
    return torch.cat(outputs, dim=1)


def whole(config: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """A module, x_BTD, and its outputs over the whole sequence at once."""
    module, x_BTD = fresh(config), hidden(2, LENGTH)
    return module, x_BTD, apply(module, x_BTD, context((LENGTH,), (LENGTH,)))


def rolled_back(states: States, num_tokens: int) -> States:
    return tuple(state.rollback(num_tokens) for state in states)


@torch.no_grad()
def check_decode(config: Any) -> None:
    """Token by token equals the whole sequence."""
    module, x_BTD, want_BTD = whole(config)
    close(continued(module, x_BTD, 1, start(module, x_BTD)), want_BTD, "token by token")


@torch.no_grad()
def check_prefill(config: Any) -> None:
    """A prefill equals the whole sequence, at once and in chunks of any size."""
    module, x_BTD, want_BTD = whole(config)
    for chunk in (LENGTH, 3, 7, 25):
        got_BTD = continued(module, x_BTD, chunk, start(module, x_BTD))
        close(got_BTD, want_BTD, f"prefill in chunks of {chunk}")


@torch.no_grad()
def check_rollback(config: Any) -> None:
    """Rolling back n tokens equals never having gone there; out of reach is a ValueError."""
    module, x_BTD, want_BTD = whole(config)
    wrong_BTD = x_BTD.flip(1)
    for kept in (2, 30):
        _, states = advance(module, x_BTD[:, :kept], start(module, x_BTD))
        for strayed in (0, 1, 3, 8):
            _, gone = advance(module, wrong_BTD[:, :strayed], states) if strayed else (None, states)
            back = rolled_back(gone, strayed)
            assert {state.length for state in back} == {kept}
            got_BTD = continued(module, x_BTD[:, kept:], 4, back)
            close(got_BTD, want_BTD[:, kept:], f"{strayed} tokens beyond {kept}, rolled back")
    _, states = advance(module, x_BTD[:, :30], start(module, x_BTD))
    for beyond in (-1, 31):
        try:
            rolled_back(states, beyond)
        except ValueError:
            continue
        raise AssertionError(f"rolling back {beyond} of 30 tokens is not refused")


@torch.no_grad()
def check_rollback_again(config: Any) -> None:
    """Rolling back again and again is right as long as it is not refused."""
    module, x_BTD, want_BTD = whole(config)
    _, states = advance(module, x_BTD, start(module, x_BTD))
    while states[0].length > 5:
        try:
            states = rolled_back(states, 5)
        except ValueError:
            return
        seen = states[0].length
        got_BTD, _ = advance(module, x_BTD[:, seen : seen + 2], states)
        close(got_BTD, want_BTD[:, seen : seen + 2], f"rolled back from {LENGTH} to {seen}")


@torch.no_grad()
def check_snapshot(config: Any) -> None:
    """A snapshot is not changed by later steps."""
    module, x_BTD, want_BTD = whole(config)
    _, states = advance(module, x_BTD[:, :20], start(module, x_BTD))
    saved = tuple(state.snapshot() for state in states)
    continued(module, x_BTD.flip(1), 1, states)
    got_BTD = continued(module, x_BTD[:, 20:], 5, saved)
    close(got_BTD, want_BTD[:, 20:], "continued from a snapshot")


@torch.no_grad()
def check_bytes(config: Any) -> None:
    """`bytes` of the state, and `state_bytes` of the mixer, are what its tensors hold."""
    module, x_BTD = fresh(config), hidden(2, LENGTH)
    states = start(module, x_BTD)
    for part_BTD in x_BTD.split(8, dim=1):
        _, states = advance(module, part_BTD, states)
        for mixer, state in zip(mixers_of(module), states, strict=True):
            held = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(state))
            assert state.bytes == held, f"the state says {state.bytes} bytes, it holds {held}"
            said = 2 * mixer.state_bytes(state.length, x_BTD.dtype)
            assert said == held, f"the mixer says {said} bytes, its state holds {held}"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value) or isinstance(value, DecodeState):
        yield from _tensors(vars(value))
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def check_flops(config: Any) -> None:
    """FLOPs per token do not fall with the context."""
    for mixer in mixers_of(fresh(config)):
        flops = [mixer.flops(context) for context in (0, 8, 64, 4096)]
        assert flops[0] >= 0 and flops == sorted(flops), f"FLOPs at 0, 8, 64, 4096 tokens: {flops}"


DECODE_CHECKS = (
    check_decode,
    check_prefill,
    check_rollback,
    check_rollback_again,
    check_snapshot,
)
MIXER_CHECKS = (check_bytes, check_flops)
