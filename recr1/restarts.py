"""torchrun --max-restarts keeps one store for all starts of a job: the ranks of a start must not read in it what those before have left."""
from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as td


def store_of_this_start(limit: timedelta) -> tuple[td.Store, int, int]:
    """A store that only the ranks of this start use, this rank's number and how many they are.

    gloo and nccl would else connect to the addresses of the dead (pytorch issue 135712). What stands under a rank's number may be of an
    earlier start, and torchrun's count of restarts differs between machines: a rank belongs to this start when it answers rank 0.
    Raises DistStoreError when one does not within `limit`.
    """
    store, rank, world = next(td.rendezvous("env://", timeout=limit))
    own, deadline = uuid.uuid4().hex, time.monotonic() + limit.total_seconds()
    store.set(f"here/{rank}", own)
    if rank > 0:
        name = store.get(f"start of {own}").decode()               # waits
        store.set(f"{name}/has {rank}", "")
        return td.PrefixStore(name, store), rank, world
    missing = set(range(1, world))
    while missing := {r for r in missing if not store.check([f"{own}/has {r}"])}:
        for r in missing:
            if store.check([f"here/{r}"]):
                store.set(f"start of {store.get(f'here/{r}').decode()}", own)
        if time.monotonic() > deadline:
            raise td.DistStoreError(f"no sign of rank {min(missing)}")
        time.sleep(0.01)
    return td.PrefixStore(own, store), rank, world
