"""Documents that repeat others: runs of equal records, and what hangs together through them.

Findings and verdicts of all deduplication are `REPEATS`: the place of a document that repeats, and
of the one that is kept for it.
"""

import numpy as np

REPEATS = np.dtype([("place", "<u8"), ("kept", "<u8")])


def repeats(records: np.ndarray, columns: tuple[str, ...]) -> np.ndarray:
    """Sorted records -> for all but the first of each run of equal `columns`, who repeats whom."""
    if not len(records):
        return np.zeros(0, REPEATS)
    begins = np.zeros(len(records), bool)
    begins[0] = True
    for column in columns:
        begins[1:] |= records[column][1:] != records[column][:-1]
    starts = np.flatnonzero(begins)
    first = np.repeat(starts, np.diff(starts, append=len(records)))
    found = np.zeros(len(records) - len(starts), REPEATS)
    found["place"] = records["place"][~begins]
    found["kept"] = records["place"][first[~begins]]
    return found


def distinct(found: np.ndarray) -> np.ndarray:
    """Findings without those that are there twice, sorted."""
    found = found[np.lexsort((found["kept"], found["place"]))]
    again = (found["place"][1:] == found["place"][:-1]) & (found["kept"][1:] == found["kept"][:-1])
    return found[np.append(np.ones(min(len(found), 1), bool), ~again)]


def by_place(found: np.ndarray) -> np.ndarray:
    """Verdicts from findings that name a document at most once."""
    return found[np.argsort(found["place"], kind="stable")]


def united(found: np.ndarray) -> np.ndarray:
    """Verdicts from any findings: all that hangs together repeats its smallest place."""
    ends = np.concatenate([found["place"], found["kept"]])
    places, index = np.unique(ends, return_inverse=True)
    root = components(len(places), index[: len(found)], index[len(found) :])
    repeated = np.flatnonzero(root != np.arange(len(places)))
    verdicts = np.zeros(len(repeated), REPEATS)
    verdicts["place"] = places[repeated]
    verdicts["kept"] = places[root[repeated]]
    return verdicts


def components(num_nodes: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """For each node the smallest one that edges `one`-`other` connect it with, as an index.

    Roots hook onto their smallest neighbour and paths are cut short, all at once; edges inside a
    component are let go.
    """
    root = np.arange(num_nodes)
    while True:
        low, high = np.minimum(root[one], root[other]), np.maximum(root[one], root[other])
        apart = low != high
        if not apart.any():
            return root
        one, other = low[apart], high[apart]
        np.minimum.at(root, other, one)
        while True:
            shorter = root[root]
            if np.array_equal(shorter, root):
                break
            root = shorter
