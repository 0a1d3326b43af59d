"""Turns are invertible and say what they say; maps that do not fit are caught as such."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moebius.checkpoint.hf.assemble import ours, theirs
from moebius.checkpoint.hf.layout import (
    SAME,
    Chain,
    Entry,
    EvenOdd,
    Layout,
    Pairs,
    Piece,
    Scaled,
    Shaped,
    Transposed,
    Turn,
)
from moebius.checkpoint.hf.llama import Llama
from moebius.checkpoint.hf.matching import check_layout, choose, read_config
from moebius.checkpoint.stored import Stored, stored_in

from .folders import CONFIG

TURNS: dict[str, tuple[Turn, tuple[int, ...]]] = {
    "same": (SAME, (4, 3)),
    "pairs of heads": (Pairs(6), (18, 5)),
    "pairs of a vector": (Pairs(4), (8,)),
    "transposed": (Transposed(), (2, 3, 4)),
    "even and odd": (EvenOdd(), (8, 3)),
    "shaped": (Shaped((4, 1, 3), (4, 3)), (4, 1, 3)),
    "scaled by a power of two": (Scaled(0.25), (3, 3)),
    "a chain": (Chain(Transposed(), EvenOdd(), Pairs(4)), (3, 8)),
}


@pytest.mark.parametrize(("turn", "shape"), TURNS.values(), ids=TURNS)
def test_turns_come_back(turn: Turn, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(turn.back(turn.into(x)), x)
    assert torch.equal(turn.into(turn.back(turn.into(x))), turn.into(x))


@pytest.mark.parametrize(("turn", "shape"), TURNS.values(), ids=TURNS)
def test_a_turn_by_rows_is_the_turn_of_the_whole(turn: Turn, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    if turn.granule:
        parts = [turn.into(part) for part in x.split(turn.granule)]
        assert torch.equal(torch.cat(parts), turn.into(x))
    else:
        assert not torch.equal(turn.into(x), x) or isinstance(turn, Shaped)


def test_turns_by_hand() -> None:
    rows = torch.arange(12)
    assert Pairs(6).into(rows).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert EvenOdd().into(rows[:6]).tolist() == [0, 2, 4, 1, 3, 5]
    assert Scaled(3.0).back(torch.tensor([2.0])).item() == 6.0


# A map with all that pieces can say: cut into experts and halves, with rows left over on either
# side, turned, shared (tied), and a tensor of each side that the other lacks.
LAYOUT = Layout(
    entries=(
        Entry(
            "experts",
            (2, 4, 3),
            tuple(
                Piece(f"e{e}.{name}", (2, 3), at=(e, slice(2 * i, 2 * i + 2)))
                for e in range(2)
                for i, name in enumerate(("gate", "up"))
            ),
        ),
        Entry("down", (2, 3, 2), (Piece("down", (4, 3, 2), part=slice(0, 2)),)),
        Entry(
            "turned",
            (2, 3, 4),
            tuple(Piece("packed", (2, 4, 3), at=(e,), part=e, turn=Transposed()) for e in range(2)),
        ),
        Entry("embed", (5, 3), (Piece("embed", (5, 3)),)),
        Entry("head", (5, 3), (Piece("embed", (5, 3)),)),
        Entry("bias", (6,), (Piece("bias", (4,), at=(slice(0, 4),)),), fill=-1.0),
        Entry("controller", (2,), fill=0.5, why="it only trains"),
        Entry("scalar", (), (Piece("scalar", ()),)),
    ),
    dropped=((r"down", "rows of zero experts"), (r"old\..*", "of an older version")),
    filled=(("zeros", (2, 2), torch.bfloat16),),
)


def stored(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Stored]:
    save_file(tensors, folder / "x.safetensors")
    return stored_in(folder / "x.safetensors")


def folder_of(names: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in names.items()}


def test_a_map_with_all_that_pieces_can_say(tmp_path: Path) -> None:
    gates = {f"e{e}.{name}": (2, 3) for e in range(2) for name in ("gate", "up")}
    rest = {"down": (4, 3, 2), "packed": (2, 4, 3), "embed": (5, 3), "bias": (4,), "scalar": ()}
    x = folder_of({**gates, **rest, "old.a": (1,), "old.b": (1,)})
    sources = stored(tmp_path, x)
    choice = choose([LAYOUT], sources)
    assert choice.dropped == {"rows of zero experts": 1, "of an older version": 2}
    made = {name: lazy.make() for name, lazy in ours(LAYOUT, sources).items()}
    experts = [torch.cat([x[f"e{e}.gate"], x[f"e{e}.up"]]) for e in range(2)]
    assert torch.equal(made["experts"], torch.stack(experts))
    assert torch.equal(made["down"], x["down"][:2])
    assert torch.equal(made["turned"], x["packed"].mT)
    assert torch.equal(made["embed"], x["embed"]) and torch.equal(made["head"], x["embed"])
    assert torch.equal(made["bias"], torch.cat([x["bias"], torch.tensor([-1.0, -1.0])]))
    assert torch.equal(made["controller"], torch.tensor([0.5, 0.5]))
    assert torch.equal(made["scalar"], x["scalar"])

    mine = stored(tmp_path, {name: y.clone() for name, y in made.items()})
    dtypes = dict.fromkeys(x, torch.float32)
    back = {name: lazy.make() for name, lazy in theirs(LAYOUT, mine, dtypes).items()}
    assert back.keys() == {*x, "zeros"} - {"old.a", "old.b"}
    assert torch.equal(back.pop("zeros"), torch.zeros(2, 2, dtype=torch.bfloat16))
    assert torch.equal(back.pop("down"), torch.cat([x["down"][:2], torch.zeros(2, 3, 2)]))
    for name, y in back.items():
        assert torch.equal(y, x[name]), name


def test_a_dtype_that_differs_widens_what_is_made(tmp_path: Path) -> None:
    two = (Piece("a", (2,), at=(slice(0, 2),)), Piece("b", (2,), at=(slice(2, 4),)))
    sources = stored(tmp_path, {"a": torch.ones(2).bfloat16(), "b": torch.ones(2)})
    made = ours(Layout((Entry("ab", (4,), two),)), sources)["ab"]
    assert made.dtype == torch.float32 and torch.equal(made.make(), torch.ones(4))


def test_the_nearest_layout_is_what_a_refusal_speaks_of(tmp_path: Path) -> None:
    one = Layout((Entry("x", (2,), (Piece("model.x", (2,)),)),))
    far = Layout(tuple(Entry(n, (2,), (Piece(f"far.{n}", (2,)),)) for n in "abc"))
    with pytest.raises(ValueError, match=r"lacks model\.x; did you mean 'module\.x'\?"):
        choose([far, one], stored(tmp_path, {"module.x": torch.ones(2)}))
    assert choose([far, one], stored(tmp_path, {"model.x": torch.ones(2)})).layout is one


def broken(layout: Layout, **changes: object) -> Layout:
    first, *rest = layout.entries
    return dataclasses.replace(layout, entries=(dataclasses.replace(first, **changes), *rest))


def test_a_map_that_does_not_fit_the_model_is_an_assertion() -> None:
    model, vocab = read_config(Llama(), CONFIG)[0].model, 40
    (layout,) = Llama().layouts(model, vocab, None)
    check_layout(layout, model, vocab)
    wrong = {
        "the map does not fit the model at embed.w_VD, other": broken(layout, ours="other"),
        "the map does not fit the model at embed.w_VD": broken(layout, shape=(4, 16)),
        "embed.w_VD is not covered by its pieces": broken(layout, pieces=()),
        "embed.w_VD is left out without a reason": broken(layout, pieces=(), fill=0.0),
        "a tensor is mapped twice": dataclasses.replace(
            layout, entries=(*layout.entries, layout.entries[0])
        ),
    }
    for reason, bad in wrong.items():
        with pytest.raises(AssertionError, match=reason):
            check_layout(bad, model, vocab)
