"""Ranks that share sequences: equal to one process, alone and beside the other degrees.

Losses are sums divided by one global count, so sharing sequences and heads at once cannot halve
them, as an average over each of the two groups would (torchtitan's TP x CP).
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.model.context import Context
from moebius.ops.sequences import places, sequences

from .ranks import launch
from .test_data import check, json_of

TWO: list[dict[str, Any]] = [{"cp": 2}, {"cp": 2, "ep": 2}]
FOUR: list[dict[str, Any]] = [{"cp": 2, "tp": 2}, {"cp": 2}, {"cp": 4, "ep": 4}]


@pytest.mark.parametrize(("ranks", "layouts"), [(2, TWO), (4, FOUR)])
def test_training_equals_one_process(
    ranks: int, layouts: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A window, grouped heads, tied weights (`pattern`); latents and zero experts (`tiny`)."""
    exact = ["precision=fp64"]
    cases = [["pattern", exact, 3, layouts], ["tiny", exact, 3, layouts[:1]]]
    check(launch(ranks, "data_worker.py", tmp_path / "found.json", json_of(cases)), 1e-10)


def test_alone_a_rank_has_whole_sequences() -> None:
    x_BTX = torch.randn(2, 6, 3)
    assert sequences(x_BTX, None) is x_BTX
    assert places(6, None).tolist() == [0, 1, 2, 3, 4, 5]


def test_tokens_of_a_context_see_the_keys_of_all() -> None:
    document_BT = torch.tensor([[0, 0, 1, 1, 1, 1]])
    position_BT = torch.tensor([[0, 1, 0, 1, 2, 3]])
    valid_BT = torch.ones(1, 6, dtype=torch.bool)
    ctx = Context.packed(position_BT, document_BT, valid_BT, torch.arange(1), 6, 0)
    part = ctx.at(torch.tensor([1, 4]))
    assert part.position_BT.tolist() == [[1, 2]] and part.place_T.tolist() == [1, 4]
    assert part.attend_BTT.int().tolist() == [[[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0]]]
