"""The process group of a torchrun job: how it begins, also after a restart, how long a rank waits
for the others, how it ends.
"""

from __future__ import annotations

import os
import time
import uuid
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as td

from recr1.distributed.collectives import device, world_size
from recr1.distributed.heartbeat import explain_exit

_abandoned_groups = []  # groups of sessions that failed

# of one collective while the run is set up: the others wait while rank 0 builds an index
SETUP_TIMEOUT = timedelta(minutes=30)


@contextmanager
def process_group():
    """The process group of a torchrun job for the time of the block: nccl between GPUs, gloo
    between CPUs and for what lies on the host.

    Raises heartbeat.RankLost in place of a collective's own error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device().type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # device() knows only inside the group
    # Its functions take the group of the moment of their import as a default and keep it alive for
    # good: to be imported before there is one
    from torch.distributed.nn import functional  # noqa: F401

    try:
        store, me, ranks = connect_store(SETUP_TIMEOUT)
        td.init_process_group(
            "cpu:gloo,cuda:nccl" if device().type == "cuda" else "gloo",
            store=store,
            rank=me,
            world_size=ranks,
            timeout=SETUP_TIMEOUT,
        )
        yield
        # a rank that leaves while another still receives would break the other's connection
        td.barrier()
    except BaseException as e:
        if td.is_initialized():
            # To let go of a group is to wait for its threads, and they may wait for a rank that is
            # gone: exits.leave_process ends them with the process
            _abandoned_groups.append(td.group.WORLD)
        if (end := explain_exit(e)) is e:
            raise
        raise end from None
    finally:
        if td.is_initialized():
            # the last reference to it: its threads have ended when this returns
            td.destroy_process_group()


def set_collective_timeout(seconds: int) -> None:
    """From here on no collective may take longer, those that are waited for later neither."""
    if world_size() > 1:
        # of both backends; torch has no public name for it
        td.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def connect_store(limit: timedelta) -> tuple[td.Store, int, int]:
    """A store that only the ranks of this start use, this rank's number and how many they are.

    torchrun --max-restarts keeps one store for all starts of a job: the ranks of a start must not
    read in it what those before have left. gloo and nccl would else connect to the addresses of the
    dead (pytorch issue 135712). What stands under a rank's number may be of an earlier start, and
    torchrun's count of restarts differs between machines: a rank belongs to this start when it
    answers rank 0. Raises DistStoreError when one does not within `limit`.
    """
    store, rank, world = next(td.rendezvous("env://", timeout=limit))
    own = uuid.uuid4().hex
    deadline = time.monotonic() + limit.total_seconds()
    store.set(f"here/{rank}", own)
    if rank > 0:
        name = store.get(f"start of {own}").decode()  # waits
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
