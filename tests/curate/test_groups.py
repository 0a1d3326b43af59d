"""Connected components and runs of repeats against searches one by one."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.curate.groups import REPEATS, components, distinct, repeats, united

EDGES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40)


def smallest_reachable(num_nodes: int, edges: list[tuple[int, int]]) -> list[int]:
    """By walking from every node."""
    near: dict[int, set[int]] = {node: set() for node in range(num_nodes)}
    for one, other in edges:
        near[one].add(other)
        near[other].add(one)
    found = []
    for node in range(num_nodes):
        seen, open_ends = {node}, [node]
        while open_ends:
            fresh = near[open_ends.pop()] - seen
            seen |= fresh
            open_ends += fresh
        found.append(min(seen))
    return found


@settings(deadline=None, max_examples=40)
@given(edges=EDGES)
def test_components(edges: list[tuple[int, int]]) -> None:
    ends = np.array(edges, np.int64).reshape(-1, 2)
    found = components(31, ends[:, 0], ends[:, 1])
    assert found.tolist() == smallest_reachable(31, edges)


def test_long_paths_in_any_order() -> None:
    order = np.random.default_rng(0).permutation(20_000)
    assert components(20_000, order[:-1], order[1:]).max() == 0


@settings(deadline=None, max_examples=40)
@given(edges=EDGES)
def test_verdicts_name_the_smallest_place(edges: list[tuple[int, int]]) -> None:
    places = [(node % 3 << 40) + node for node in range(31)]
    found = np.array([(places[a], places[b]) for a, b in edges], REPEATS)
    assert distinct(found).tolist() == sorted(set(found.tolist()))
    verdicts = united(found)
    assert (np.diff(verdicts["place"].astype(object)) > 0).all()
    order = sorted(range(31), key=lambda node: places[node])
    rank = {node: order.index(node) for node in range(31)}
    smallest = smallest_reachable(31, [(rank[a], rank[b]) for a, b in edges])
    expected = [(places[order[i]], places[order[s]]) for i, s in enumerate(smallest) if s != i]
    assert [tuple(verdict) for verdict in verdicts.tolist()] == expected


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(*[st.integers(0, 2)] * 2), max_size=20))
def test_repeats_are_all_but_the_first(values: list[tuple[int, int]]) -> None:
    rows = sorted((*value, place) for place, value in enumerate(values))
    columns = [("hash", "<u8"), ("check", "<u8"), ("place", "<u8")]
    found = repeats(np.array(rows, columns), ("hash", "check"))
    expected = [
        (place, min(p for h, c, p in rows if (h, c) == (name, check)))
        for name, check, place in rows
    ]
    assert found.tolist() == [pair for pair in expected if pair[0] != pair[1]]
