"""Global batches are a pure function of the step; cutting them changes nothing."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from moebius.data.config import DataConfig, Source
from moebius.data.loader import Loader, heldout_batches
from moebius.data.prepare import prepare
from moebius.data.prepared import Prepared

from .conftest import write_folder

FIELDS = ("tokens_BT", "targets_BT", "document_BT", "position_BT", "valid_BT", "sequence_B")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    root = tmp_path_factory.mktemp("mixed")
    a, b = write_folder(root / "a", 40), write_folder(root / "b", 30, first=100)
    sources = (Source(str(a), 0.75), Source(str(b), 0.25, max_epochs=2.0))
    return prepare(DataConfig(sources=sources, seed=5, cache=str(root / "cache")), 300)


def same(left, right) -> bool:
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in FIELDS)


def test_batch_is_a_pure_function_of_the_step(mixed: Prepared) -> None:
    loader = Loader(mixed, 32, 8, seed=1)
    in_order = [loader.batch(step) for step in range(12)]
    for step in (11, 3, 7, 3):
        assert same(Loader(mixed, 32, 8, seed=1).batch(step), in_order[step])
        assert same(loader.batch(step), in_order[step])
    assert not same(Loader(mixed, 32, 8, seed=2).batch(0), in_order[0])


def test_batch_fields(mixed: Prepared) -> None:
    batch = Loader(mixed, 32, 8, seed=1).batch(2)
    for name in FIELDS[:4]:
        assert getattr(batch, name).shape == (8, 32) and getattr(batch, name).dtype == torch.int64
    assert torch.equal(batch.tokens_BT[:, 1:], batch.targets_BT[:, :-1])
    assert batch.valid_BT.all() and batch.num_targets == 256
    assert batch.sequence_B.tolist() == list(range(16, 24))
    starts = batch.tokens_BT == mixed.tokenizer.document
    starts[:, 0] = True
    assert torch.equal(batch.position_BT == 0, starts)
    assert torch.equal(batch.document_BT, starts.long().cumsum(1) - 1)


def test_split_and_shard_only_cut(mixed: Prepared) -> None:
    batch = Loader(mixed, 16, 8, seed=1).batch(0)
    for micro in (1, 2, 3, 8, 100):
        parts = batch.split(micro)
        assert len(parts) == math.ceil(8 / micro)
        assert all(part.num_targets == 128 and len(part) <= micro for part in parts)
        for name in FIELDS:
            assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(batch, name))
        assert sorted(set().union(*(part.keys() for part in parts))) == sorted(batch.keys())
    for world in (1, 2, 3, 8):
        ranks = [batch.shard(rank, world) for rank in range(world)]
        assert torch.equal(torch.cat([rank.tokens_BT for rank in ranks]), batch.tokens_BT)
    with pytest.raises(ValueError, match="9 ranks"):
        batch.shard(0, 9)
    assert same(batch.to("cpu"), batch)


def test_keys_are_those_of_the_texts(mixed: Prepared) -> None:
    texts = dict(mixed.train_documents())
    for row in Loader(mixed, 16, 8, seed=1).batch(1).split(1):
        tokens = [*row.tokens_BT[0].tolist(), int(row.targets_BT[0, -1])]
        pieces = mixed.tokenizer.decode(tokens).split("<|document|>")
        keys = row.keys()
        for piece in pieces:
            assert any(piece.encode().strip(b"\xef\xbf\xbd") in texts[key] for key in keys)


def test_ramp(prepared: Prepared) -> None:
    loader = Loader(prepared, 8, 2, seed=0, ramp=((3, 4), (5, 6)))
    sizes = [len(loader.batch(step)) for step in range(8)]
    assert sizes == [2, 2, 2, 4, 4, 6, 6, 6]
    assert [loader.tokens_until(step) for step in range(9)] == [
        8 * sum(sizes[:step]) for step in range(9)
    ]
    plain = Loader(prepared, 8, 2, seed=0)
    ahead = torch.cat([plain.batch(step).tokens_BT for step in range(16)])
    ramped = torch.cat([loader.batch(step).tokens_BT for step in range(8)])
    assert torch.equal(ramped, ahead)
    for ramp in (((0, 4),), ((5, 4), (3, 6)), ((2, 0),)):
        with pytest.raises(ValueError):
            Loader(prepared, 8, 2, seed=0, ramp=ramp)


def test_mixture_and_epochs(mixed: Prepared) -> None:
    loader = Loader(mixed, 32, 4, seed=1)
    given = 2 * (mixed.train[1].num_tokens // 32)
    steps = given + 20
    keys = {1: set(), 0: set()}
    counts = [0, 0]
    for step in range(steps):
        for row in loader.batch(step).split(1):
            ours = [shards is loader._sources[1].shards for shards, _ in row.touched[0]]
            assert all(ours) or not any(ours)
            counts[ours[0]] += 1
            keys[ours[0]].update(row.keys())
            if ours[0]:
                assert step <= given
    assert counts == [4 * steps - given, given]
    assert len(keys[1]) == mixed.train[1].shards.num_documents


def test_a_run_longer_than_the_capped_data_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    source = prepared.config.path
    config = DataConfig(sources=(Source(source, max_epochs=1.5),), cache=str(tmp_path))
    capped = prepare(config, 300)
    longest = int(capped.train[0].num_tokens * 1.5) // 16 // 4
    Loader(capped, 16, 4, seed=0, steps=longest).batch(longest - 1)
    with pytest.raises(ValueError, match="max_epochs"):
        Loader(capped, 16, 4, seed=0, steps=longest + 1)
    with pytest.raises(ValueError, match="max_epochs"):
        Loader(capped, 16, 4, seed=0).batch(longest)
    with pytest.raises(ValueError, match="no whole sequence"):
        Loader(capped, 10**6, 1, seed=0)


@pytest.mark.parametrize(("length", "batch"), [(1, 7), (16, 4), (33, 3), (10**5, 2)])
def test_every_held_out_token_is_a_target_once(mixed: Prepared, length: int, batch: int) -> None:
    batches = list(heldout_batches(mixed, length, batch))
    targets, inputs = [], []
    for part in batches:
        assert part.num_targets == int(part.valid_BT.sum())
        targets += part.targets_BT[part.valid_BT].tolist()
        inputs += part.tokens_BT[part.valid_BT].tolist()
    stream: list[int] = []
    for _, text in mixed.heldout_documents():
        stream += [mixed.tokenizer.document, *mixed.tokenizer.encode(text.decode())]
    assert inputs == stream and targets == [*stream[1:], mixed.tokenizer.document]
    assert sum(part.num_targets for part in batches) == sum(s.num_tokens for s in mixed.heldout)
    assert all(part.valid_BT.all() for part in batches[:-1])
    numbers = torch.cat([part.sequence_B for part in batches])
    assert numbers.tolist() == list(range(len(numbers)))
    keys = itertools.chain.from_iterable(part.keys() for part in batches)
    assert list(dict.fromkeys(keys)) == [key for key, _ in mixed.heldout_documents()]


# --- stages ---------------------------------------------------------------------------------------


def test_a_stage_draws_anew_in_an_order_of_its_own(mixed: Prepared) -> None:
    first = Loader(mixed, 16, 4, seed=1)
    start = first.after(6)
    stage = Loader(mixed, 32, 3, seed=1, start=start)
    assert stage.tokens_until(6) == first.tokens_until(6) == 6 * 64
    assert stage.tokens_until(8) == 6 * 64 + 2 * 96
    batch = stage.batch(7)
    assert batch.tokens_BT.shape == (3, 32) and batch.num_targets == 96
    assert batch.sequence_B.tolist() == [27, 28, 29]
    assert same(batch, Loader(mixed, 32, 3, seed=1, start=first.after(6)).batch(7))
    # Not a piece of what a run of that length without stages would read, nor of the next stage.
    again = Loader(mixed, 32, 3, seed=1, start=stage.after(6))
    orders = [one.batch(6).tokens_BT for one in (stage, again)]
    orders.append(Loader(mixed, 32, 3, seed=1).batch(0).tokens_BT)
    orders.append(Loader(mixed, 32, 3, seed=2, start=start).batch(6).tokens_BT)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(orders, 2))


def test_epochs_are_counted_over_all_stages(mixed: Prepared) -> None:
    """The second source has a quarter of the sequences, and two epochs in all."""
    tokens = mixed.train[1].num_tokens
    first = Loader(mixed, 8, 4, seed=1)
    half = tokens // 8
    assert first.after(half).taken == (3 * 8 * half, 8 * half)
    second = Loader(mixed, 16, 4, seed=1, start=first.after(half))
    end = half + tokens // 16 + 50
    assert 2 * tokens - 3 * 16 < second.after(end).taken[1] <= 2 * tokens
    # Spent in the stage before, the source is met no more.
    third = Loader(mixed, 64, 2, seed=1, start=second.after(end))
    for row in third.batch(end + 3).split(1):
        assert all(shards is mixed.train[0].shards for shards, _ in row.touched[0])
    later, now = third.after(end + 50).taken, third.after(end).taken
    assert later == (now[0] + 100 * 64, now[1])


def test_capped_sources_that_stages_spend(prepared: Prepared, tmp_path: Path) -> None:
    config = DataConfig(
        sources=(Source(prepared.config.path, max_epochs=1.0),), cache=str(tmp_path)
    )
    capped = prepare(config, 300)
    half = capped.train[0].num_tokens // 16 // 4 // 2
    stage = Loader(capped, 32, 2, seed=0, start=Loader(capped, 16, 4, seed=0).after(half))
    left = (capped.train[0].num_tokens // 32 - half * 2) // 2
    stage.check(half + left)
    with pytest.raises(ValueError, match=f"from step {half} on and the sources give"):
        stage.check(half + left + 1)


def windows(loader: Loader, first: int, stop: int) -> list[list[tuple[int, ...]]]:
    """The sequences of some steps, by the source they come from."""
    found: list[list[tuple[int, ...]]] = [[], []]
    for step in range(first, stop):
        for row in loader.batch(step).split(1):
            ours = row.touched[0][0][0] is loader._sources[1].shards
            found[ours].append(tuple(row.tokens_BT[0].tolist()))
    return found


def test_a_stage_with_weights_goes_on_in_the_order_of_each_source(mixed: Prepared) -> None:
    """What its sources give is what they would have given next, whatever the shares were."""
    first = Loader(mixed, 16, 4, seed=1, weights=(0.5, 0.5))
    second = Loader(mixed, 16, 4, seed=1, start=first.after(5), weights=(0.25, 0.75))
    third = Loader(mixed, 16, 4, seed=1, start=second.after(9), weights=(1.0, 0.0))
    assert third.tokens_until(9) == 9 * 64
    parts = [windows(first, 0, 5), windows(second, 5, 9), windows(third, 9, 12)]
    assert [[len(own) for own in part] for part in parts] == [[10, 10], [4, 12], [12, 0]]
    plain = Loader(mixed, 16, 1, seed=1)
    for i, own in enumerate(plain._sources):
        given = [row for part in parts for row in part[i]]
        ahead = [tuple(own.draw(k, 16).tokens[:16].tolist()) for k in range(len(given))]
        assert given == ahead
    # Of other lengths the windows are others: an order of the stage's own, from its beginning.
    longer = Loader(mixed, 32, 2, seed=1, start=second.after(9), weights=(1.0, 0.0))
    anew = mixed.train[0].reseed(mixed.config.seed, 1, 0, 2)
    ahead = [tuple(anew.draw(k, 32).tokens[:32].tolist()) for k in range(6)]
    assert windows(longer, 9, 12) == [ahead, []]
    # And a stage that goes on after that one goes on in that order.
    last = Loader(mixed, 32, 2, seed=1, start=longer.after(12), weights=(0.5, 0.5))
    assert windows(last, 12, 13)[0] == [tuple(anew.draw(6, 32).tokens[:32].tolist())]


def test_caps_hold_whatever_the_weights_of_stages(mixed: Prepared) -> None:
    """The second source gives two epochs, each of its windows twice, and then leaves."""
    size = mixed.train[1].num_tokens // 16
    first = Loader(mixed, 16, 4, seed=1, weights=(0.5, 0.5))
    second = Loader(mixed, 16, 4, seed=1, start=first.after(9), weights=(0.0, 1.0))
    most = (2 * size - 18) // 4
    second.check(9 + most)
    with pytest.raises(ValueError, match="from step 9 on and the sources give"):
        second.check(9 + most + 1)
    end = second.after(9 + most).drawn
    assert end == (18, 18 + 4 * most) and 2 * size - 4 < end[1] <= 2 * size


def test_a_source_of_weight_0_needs_no_whole_sequence(mixed: Prepared) -> None:
    length = 2 * mixed.train[1].num_tokens + 1
    with pytest.raises(ValueError, match="no whole sequence"):
        Loader(mixed, length, 1, seed=0)
    batch = Loader(mixed, length, 1, seed=0, weights=(1.0, 0.0)).batch(0)
    assert batch.touched[0][0][0] is mixed.train[0].shards
