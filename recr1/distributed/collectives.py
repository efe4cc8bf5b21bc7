"""torchrun's environment and the collectives that the rest needs. With one process there is no
group: every call returns its own input.

Every rank makes the same calls in the same order. Sums only: nothing averages behind our back
(DESIGN decision 3). Legend: W ranks.
"""

import os
from contextlib import contextmanager
from typing import Any, Callable

import torch
import torch.distributed as td

from recr1.distributed.heartbeat import count_collective

# torch 2.13 deprecates the second names, 2.11 has no others
_all_gather = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor

_reduce_scatter = getattr(td, "reduce_scatter_single", None) or td.reduce_scatter_tensor


def rank() -> int:
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    return td.get_world_size() if td.is_initialized() else 1


def local_rank() -> int:
    """This rank's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def local_world_size() -> int:
    """Ranks on this machine: they share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device() -> torch.device:
    """This rank's: its GPU where there is one, else the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def split_across_ranks(items: list) -> list:
    """This rank's part of `items`: contiguous, so that the ranks' parts in order are the whole.
    Parts differ by one at most.
    """
    at = rank()
    n = len(items)
    return items[at * n // world_size() : (at + 1) * n // world_size()]


def all_reduce_sum(*values: float) -> tuple[float, ...]:
    """The sum of each value over the ranks, in float64."""
    if world_size() == 1:
        return values
    count_collective()
    sums = torch.tensor(values, dtype=torch.float64)
    td.all_reduce(sums)
    return tuple(sums.tolist())


def all_reduce_max(value: int) -> int:
    """The maximum over the ranks."""
    if world_size() == 1:
        return value
    count_collective()
    most = torch.tensor(value)
    td.all_reduce(most, op=td.ReduceOp.MAX)
    return int(most)


def broadcast_from_rank0(value: Any) -> Any:
    """Rank 0's value, everywhere. Anything that pickles; it travels between our own processes only."""
    values = [value]
    if world_size() > 1:
        count_collective()
        td.broadcast_object_list(values)
    return values[0]


def gather_to_rank0(value: Any) -> list | None:
    """Rank 0: every rank's value, in their order; elsewhere None."""
    if world_size() == 1:
        return [value]
    count_collective()
    values = [None] * world_size() if rank() == 0 else None
    td.gather_object(value, values)
    return values


@contextmanager
def fail_together():
    """A block that fails on every rank if it fails on one, with the first one's exception: no rank
    waits for one that is gone.

    No collective may stand inside.
    """
    error = None
    try:
        yield
    except Exception as e:
        error = e
    if world_size() > 1:
        count_collective()
        errors = [None] * world_size()
        td.all_gather_object(errors, error)
        source = next((r for r, e in enumerate(errors) if e is not None), rank())
        if source != rank():  # its own copy has the traceback
            error = errors[source]
            error.add_note(f"on rank {source}")
    if error is not None:
        raise error


def start_all_gather(shard: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begins to collect (n,) of each rank; the call it returns waits and gives the (W n,)."""
    return _start_collective(_all_gather, world_size() * len(shard), shard)


def start_reduce_scatter(whole: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begins to sum (W n,) over the ranks; the call it returns waits and gives this rank's (n,)."""
    return _start_collective(_reduce_scatter, len(whole) // world_size(), whole)


def _start_collective(collective, size: int, source: torch.Tensor) -> Callable[[], torch.Tensor]:
    if world_size() == 1:
        return lambda: source
    count_collective()
    out = source.new_empty(size)
    work = collective(out, source, async_op=True)

    def wait() -> torch.Tensor:
        nonlocal work, source
        work.wait()
        # until here the collective reads source, and a finished work holds its tensors
        work = source = None
        return out

    return wait
