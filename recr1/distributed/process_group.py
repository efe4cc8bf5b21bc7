"""The process group of a torchrun job: how it begins, also after a restart, how long a rank waits
for the others, and how it ends.
"""

from __future__ import annotations

import os
import time
import uuid
from contextlib import contextmanager
from datetime import timedelta
from typing import Iterator

import torch
import torch.distributed as td

from recr1.distributed.collectives import device, local_world_size, world_size
from recr1.distributed.heartbeat import explain_exit

_abandoned_groups: list[td.ProcessGroup | None] = []  # of jobs that failed

# The limit of one collective while the run is set up: the others wait while rank 0 builds an index.
SETUP_TIMEOUT = timedelta(minutes=30)


class TooFewGpus(ValueError):
    """A machine has GPUs, and fewer than the job has ranks there."""


@contextmanager
def process_group() -> Iterator[None]:
    """Provide the process group of a torchrun job for the duration of the block: nccl between GPUs,
    gloo between CPUs and for tensors in host memory. Without torchrun there is none.

    Raises TooFewGpus, and heartbeat.RankLost in place of a collective's own error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    has_gpu = device().type == "cuda"
    if has_gpu:
        check_gpu_count()
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # device() knows only inside the group
    # The functions of this module take, as a default, the group that exists when they are imported,
    # and keep it alive for good. So they are imported before there is one.
    from torch.distributed.nn import functional  # noqa: F401

    try:
        store, rank, num_ranks = connect_store(SETUP_TIMEOUT)
        td.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=num_ranks,
            timeout=SETUP_TIMEOUT,
        )
        yield
        # A rank that leaves while another still receives would break the other's connection.
        td.barrier()
    except BaseException as e:
        if td.is_initialized():
            # To release a group is to wait for its threads, and they may wait for a rank that is
            # gone. exits.leave_process ends them with the process.
            _abandoned_groups.append(td.group.WORLD)
        explained = explain_exit(e)
        if explained is e:
            raise
        raise explained from None
    finally:
        if td.is_initialized():
            # This drops the last reference to the group: its threads have ended when it returns.
            td.destroy_process_group()


def check_gpu_count() -> None:
    """Raise TooFewGpus unless every rank of this machine has a GPU of its own."""
    num_ranks = local_world_size()
    num_gpus = torch.cuda.device_count()
    if num_ranks > num_gpus:
        raise TooFewGpus(
            f"torchrun: {num_ranks} ranks on a machine with {num_gpus} GPU(s), and each needs one; "
            f"start --nproc-per-node {num_gpus}, or set CUDA_VISIBLE_DEVICES= to run on CPUs"
        )


def set_collective_timeout(seconds: int) -> None:
    """Limit the time of every collective from here on, also of those that run already and are
    waited for later.
    """
    if world_size() > 1:
        # for both backends; torch has no public name for it
        td.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def connect_store(limit: timedelta) -> tuple[td.Store, int, int]:
    """Return a store that only the ranks of this start use, this rank's number, and the number of
    ranks.

    torchrun --max-restarts keeps one store for all starts of a job. The ranks of a start must not
    read in it what the starts before have left: gloo and nccl would connect to the addresses of the
    dead (pytorch issue 135712). What stands under a rank's number may come from an earlier start,
    and torchrun's count of restarts differs between machines. So a rank belongs to this start when
    it answers rank 0. Raises DistStoreError when one does not within `limit`.
    """
    store, rank, num_ranks = next(td.rendezvous("env://", timeout=limit))
    own_id = uuid.uuid4().hex
    deadline = time.monotonic() + limit.total_seconds()
    store.set(f"here/{rank}", own_id)

    # The name of a start is rank 0's id. Another rank waits until rank 0 has sent it the name under
    # its own id, and answers.
    if rank > 0:
        start_name = store.get(f"start of {own_id}").decode()  # waits
        store.set(f"{start_name}/has {rank}", "")
        return td.PrefixStore(start_name, store), rank, num_ranks

    # Rank 0 sends the name to whatever id stands under a rank's number, until all have answered.
    missing = set(range(1, num_ranks))
    while True:
        missing = {r for r in missing if not store.check([f"{own_id}/has {r}"])}
        if not missing:
            return td.PrefixStore(own_id, store), rank, num_ranks
        for r in missing:
            if store.check([f"here/{r}"]):
                other_id = store.get(f"here/{r}").decode()
                store.set(f"start of {other_id}", own_id)
        if time.monotonic() > deadline:
            raise td.DistStoreError(f"no sign of rank {min(missing)}")
        time.sleep(0.01)
