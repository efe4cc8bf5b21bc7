"""torchrun's environment, and the collectives that the rest of the project needs. With one process
there is no group: a call returns what it was given (`gather_to_rank0`: a list of it).

Every rank makes the same calls in the same order. A reduction is a sum, and for whole numbers that
steer the run also a maximum: nothing averages behind our back.

Legend: W ranks, n numbers of a shard.
"""

import os
from contextlib import contextmanager
from typing import Any, Callable, Iterator

import torch
import torch.distributed as td

from recr1.distributed.heartbeat import count_collective

# torch 2.13 deprecates the second names, 2.11 has no others
_all_gather = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor

_reduce_scatter = getattr(td, "reduce_scatter_single", None) or td.reduce_scatter_tensor


def rank() -> int:
    """Return this process's number in the group; 0 without a group."""
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks; 1 without a group."""
    return td.get_world_size() if td.is_initialized() else 1


def local_rank() -> int:
    """Return this rank's number on its machine."""
    if world_size() == 1:
        return 0
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of ranks on this machine: they share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device() -> torch.device:
    """Return this rank's GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def split_across_ranks(items: list) -> list:
    """Return this rank's slice of `items`.

    The ranks' slices, joined in the order of the ranks, are `items`. Their lengths differ by one at
    most.
    """
    n = len(items)
    start = rank() * n // world_size()
    end = (rank() + 1) * n // world_size()
    return items[start:end]


def all_reduce_sum(*values: float) -> tuple[float, ...]:
    """Return the sum of each value over the ranks, in float64."""
    if world_size() == 1:
        return values
    count_collective()
    sums = torch.tensor(values, dtype=torch.float64)
    td.all_reduce(sums)
    return tuple(sums.tolist())


def all_reduce_max(value: int) -> int:
    """Return the maximum over the ranks."""
    if world_size() == 1:
        return value
    count_collective()
    maximum = torch.tensor(value)
    td.all_reduce(maximum, op=td.ReduceOp.MAX)
    return int(maximum)


def broadcast_from_rank0(value: Any) -> Any:
    """Return rank 0's value on all ranks.

    It may be anything that pickles: it travels between our own processes only.
    """
    values = [value]
    if world_size() > 1:
        count_collective()
        td.broadcast_object_list(values)
    return values[0]


def gather_to_rank0(value: Any) -> list | None:
    """Return every rank's value, in the order of the ranks, on rank 0; None on the others."""
    if world_size() == 1:
        return [value]
    count_collective()
    values = [None] * world_size() if rank() == 0 else None
    td.gather_object(value, values)
    return values


@contextmanager
def fail_together() -> Iterator[None]:
    """Make a block that fails on one rank fail on all: all raise the error of the first rank that
    failed, and no rank waits for one that is gone.

    No collective may be called inside.
    """
    error = None
    try:
        yield
    except Exception as e:
        error = e
    if world_size() > 1:
        error = _first_error(error)
    if error is not None:
        error.is_common = True  # type: ignore[attr-defined]  # for is_common_error
        raise error


def is_common_error(error: BaseException) -> bool:
    """Return whether every rank raises this error: it comes from `fail_together`, or there is one
    rank.
    """
    return world_size() == 1 or getattr(error, "is_common", False)


def _first_error(error: Exception | None) -> Exception | None:
    """Return the exception of the first rank that has one."""
    count_collective()
    errors = [None] * world_size()
    td.all_gather_object(errors, error)
    for source, error_of_rank in enumerate(errors):
        if error_of_rank is None:
            continue
        if source == rank():
            return error  # this rank's own object has the traceback
        error_of_rank.add_note(f"on rank {source}")
        return error_of_rank
    return None


def start_all_gather(shard: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start to collect the shards (n,) of all ranks. Return a function that waits for the result
    (W n,).
    """
    full_size = world_size() * len(shard)
    return _start_collective(_all_gather, full_size, shard)


def start_reduce_scatter(full: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start to sum the vectors (W n,) over the ranks. Return a function that waits for this rank's
    slice of the sum (n,).
    """
    shard_size = len(full) // world_size()
    return _start_collective(_reduce_scatter, shard_size, full)


def _start_collective(
    collective: Callable[..., td.Work], size: int, source: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Start a collective that reads `source` and writes `size` numbers. Return a function that
    waits for them.
    """
    if world_size() == 1:
        return lambda: source
    count_collective()
    out = source.new_empty(size)
    work = collective(out, source, async_op=True)

    def wait() -> torch.Tensor:
        nonlocal work, source
        work.wait()
        # Until here the collective reads source, and a finished work holds its tensors.
        del work, source
        return out

    return wait
