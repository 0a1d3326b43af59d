"""Runs small enough to grow in a test."""

import dataclasses
from pathlib import Path

from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.dense import Dense
from moebius.model.lm import ModelConfig
from moebius.model.mixers.cla import shared
from moebius.model.mixers.gqa import GQA
from moebius.optim.roles import default_roles
from moebius.optim.rules import Rule
from moebius.train.run import Run

from .. import tiny
from ..running import RECIPES, Place


def placed(run: Run, place: Place, *, evaluation: str = f"{RECIPES}:no_evaluation") -> Run:
    """A run on the tests' own corpus."""
    data = dataclasses.replace(run.data, path=str(place.corpus), cache=str(place.cache))
    return dataclasses.replace(run, data=data, evaluation=evaluation)


def dense(matrix: Rule | None = None, other: Rule | None = None, *, bias: bool = False) -> Run:
    """Two Llama-like layers, the one wider than the other."""
    run = tiny.tiny()
    heads = GQA(heads=4, kv_heads=2, head_width=8)
    layers = (PreNorm(heads, Dense(48, bias=bias)), PreNorm(heads, Dense(64, bias=bias)))
    optim = dataclasses.replace(run.optim, roles=default_roles(matrix, other))
    model = dataclasses.replace(run.model, layers=layers)
    return dataclasses.replace(run, name="dense", model=model, optim=optim)


def sharing() -> Run:
    """Two layers, of which the second reads the keys and values of the first."""
    mixers = shared(GQA(heads=4, kv_heads=2, head_width=8), 2)
    layers = tuple(PreNorm(mixer, Dense(48)) for mixer in mixers)
    run = dense()
    return dataclasses.replace(run, name="sharing", model=ModelConfig(32, layers))


HELD_OUT = f"{Path(__file__).with_name('held_out.py')}:held_out"
