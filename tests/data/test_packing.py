"""Windows are the stream, cut; every epoch has every document once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.data.packing import TokenSource, number, permutation
from moebius.data.prepared import Prepared


def stream(source: TokenSource, epochs: int) -> tuple[list[int], list[int]]:
    """The tokens of the first epochs, and the document each belongs to, the slow way."""
    tokens: list[int] = []
    owners: list[int] = []
    for e in range(epochs):
        for document in source.epoch(e)[0].tolist():
            ids = source.shards.tokens(document).tolist()
            tokens += ids
            owners += [document] * len(ids)
    return tokens, owners


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(0, 2**63), st.integers(0, 50))
def test_permutation(length: int, seed: int, epoch: int) -> None:
    order = permutation(length, seed, epoch)
    assert sorted(order.tolist()) == list(range(length))
    assert (order == permutation(length, seed, epoch)).all()


def splitmix(x: int) -> int:
    """The mixer of splitmix64, in Python's own integers."""
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) % 2**64
    return x ^ x >> 31


def test_permutation_is_the_same_for_ever() -> None:
    golden, state = 0x9E3779B97F4A7C15, 0
    for seed in (7, 2, 1):
        state = splitmix((state + golden + seed) % 2**64)
    hashes = [splitmix((state + golden * (i + 1)) % 2**64) for i in range(100)]
    assert permutation(100, 7, 2, 1).tolist() == sorted(range(100), key=hashes.__getitem__)
    orders = {tuple(permutation(50, seed, e).tolist()) for seed in range(10) for e in range(10)}
    assert len(orders) == 100


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 700), k=st.integers(0, 60))
def test_a_window_is_a_cut_of_the_stream(prepared: Prepared, length: int, k: int) -> None:
    source = prepared.train[0]
    epochs = (k * length + length) // source.num_tokens + 1
    tokens, owners = stream(source, epochs)
    tokens.append(source.document)
    owners.append(-1)
    window = source.window(k, length)
    begin = k * length
    assert window.tokens.tolist() == tokens[begin : begin + length + 1]
    assert len(window.documents) == len(window.positions) == length + 1
    document = position = 0
    for i, token in enumerate(window.tokens.tolist()):
        if i and token == source.document:
            document, position = document + 1, 0
        assert (window.documents[i], window.positions[i]) == (document, position)
        position += 1
    touched = [owners[begin + i] for i in np.flatnonzero(window.positions == 0)]
    assert [d for d, owner in zip(window.touched, touched, strict=True) if owner != -1] == [
        owner for owner in touched if owner != -1
    ]


def test_every_epoch_has_every_document_once_in_its_own_order(prepared: Prepared) -> None:
    source = prepared.train[0]
    orders = [source.epoch(e)[0].tolist() for e in range(6)]
    assert all(sorted(order) == list(source.shards) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert source.epoch(0)[0].tolist() == orders[0]


def test_seeds_change_the_order(prepared: Prepared) -> None:
    source = prepared.train[0]
    other = source.reseed(1, 2, 3)
    assert other.epoch(0)[0].tolist() != source.epoch(0)[0].tolist()
    assert other.num_tokens == source.num_tokens


def test_a_document_of_n_tokens_gives_n_plus_1_predictions(prepared: Prepared) -> None:
    source = prepared.train[0]
    lengths = [len(source.shards.tokens(i)) for i in source.shards]
    texts = [len(text) for _, text in prepared.train_documents()]
    assert sum(lengths) == source.num_tokens and len(texts) == len(lengths)
    window = source.window(0, source.num_tokens)
    targets, owners = window.tokens[1:], window.documents[:-1]
    assert (targets == source.document).sum() == len(lengths)
    in_order = [lengths[i] for i in source.epoch(0)[0].tolist()]
    assert np.bincount(owners).tolist() == in_order


def test_number_restarts_at_documents_and_at_the_window() -> None:
    documents, positions = number(np.array([5, 6, 0, 7, 0, 8, 9]), 0)
    assert documents.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert positions.tolist() == [0, 1, 0, 1, 0, 1, 2]
    assert number(np.array([0, 6]), 0)[0].tolist() == [0, 0]


@pytest.mark.parametrize("length", [5, 16])
def test_draws_shuffle_each_epochs_worth_of_windows(prepared: Prepared, length: int) -> None:
    source = prepared.train[0]
    size = source.num_tokens // length
    for group in range(3):
        numbers = range(group * size, (group + 1) * size)
        drawn = [source.draw(n, length).tokens.tobytes() for n in numbers]
        assert sorted(drawn) == sorted(source.window(k, length).tokens.tobytes() for k in numbers)
        assert drawn != [source.window(k, length).tokens.tobytes() for k in numbers]
    assert source.draw(7, length).tokens.tolist() == source.draw(7, length).tokens.tolist()
