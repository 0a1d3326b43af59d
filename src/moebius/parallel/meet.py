"""Where the ranks of one start meet, when the store they share remembers earlier starts.

torchrun keeps one store over all restarts, so that ranks find the addresses of ranks that are dead
(pytorch issues 135712 and 167288). Ranks therefore first agree on a name that no start had before:
each asks with a number of its own, and only a living main rank can answer it.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

# Seconds between two looks of the main rank.
PAUSE = 0.02


def meet(store: Store, rank: int, size: int, within: timedelta) -> Store:
    """A part of the store that this start alone uses; ValueError where a rank does not come."""
    if rank == 0:
        name = uuid.uuid4().hex
        _gather(store, name, size, within)
    else:
        name = _ask(store, rank, within)
    return PrefixStore(name, store)


def _ask(store: Store, rank: int, within: timedelta) -> str:
    mine = uuid.uuid4().hex
    store.set(f"ask/{rank}", mine)
    try:
        store.wait([f"answer/{mine}"], within)
    except (dist.DistStoreError, RuntimeError) as error:
        raise ValueError(f"rank 0 has not come within {within}; see why it did not") from error
    name = store.get(f"answer/{mine}").decode()
    store.set(f"here/{name}/{rank}", "")
    return name


def _gather(store: Store, name: str, size: int, within: timedelta) -> None:
    """Answer every rank that asks until all have heard; old questions are answered in vain."""
    missing, deadline = set(range(1, size)), time.monotonic() + within.total_seconds()
    while missing:
        for rank in sorted(missing):
            if store.check([f"here/{name}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"ask/{rank}"]):
                store.set(f"answer/{store.get(f'ask/{rank}').decode()}", name)
        if missing and time.monotonic() > deadline:
            lost = ", ".join(map(str, sorted(missing)))
            raise ValueError(f"rank {lost} has not come within {within}; see why it did not")
        time.sleep(PAUSE)
