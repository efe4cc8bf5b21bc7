"""Host memory for what does not fit on the GPU: a frozen model's shards, AdamW's moments. It is
pinned, and copied while the GPU computes.

On a CPU the host is the device: nothing is copied, and the same calls give the same numbers.

Legend: W ranks, n numbers of a shard.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Callable, NamedTuple, Sequence

import torch

from recr1.distributed import collectives as dist

# torch rounds each piece of pinned memory up to a power of two. Tensors share pieces of this size.
SLAB_BYTES = 4 << 30

# Where a tensor begins in its slab: a multiple of so many bytes.
SLAB_ALIGNMENT = 512


class Slab(NamedTuple):
    """A piece of pinned memory, and which tensors lie where in it."""

    num_bytes: int
    starts: dict[int, int]  # tensor's index -> its first byte


def make_host_zeros(shapes: Sequence[torch.Size], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return zeros of each shape in host memory, pinned if there is a GPU to copy them to."""
    if not torch.cuda.is_available():
        return [torch.zeros(shape, dtype=dtype) for shape in shapes]

    sizes = [prod(shape) * dtype.itemsize for shape in shapes]
    views: dict[int, torch.Tensor] = {}
    for slab in plan_slabs(sizes):
        memory = pinned_zeros(slab.num_bytes)
        for index, start in slab.starts.items():
            own_bytes = memory[start : start + sizes[index]]
            views[index] = own_bytes.view(dtype).view(shapes[index])
    return [views[index] for index in range(len(shapes))]


def pinned_zeros(num_bytes: int) -> torch.Tensor:
    """Return so many bytes of pinned host memory, all 0."""
    return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)


def plan_slabs(sizes: list[int]) -> list[Slab]:
    """Put tensors of `sizes` bytes into slabs whose sizes are powers of two, with little waste.

    AdamW's moments of a 3B, 24.7 GB, take 26.8 GB so; a piece of its own for each took 42.9 GB.
    The largest come first, and each goes into the first slab that has room. The last slab is as
    small as its tensors allow.
    """
    ends: list[int] = []  # of what is in each slab
    starts: list[dict[int, int]] = []
    largest_first = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    for index in largest_first:
        size = sizes[index]
        with_room = [n for n, end in enumerate(ends) if end + size <= SLAB_BYTES]
        if not with_room:
            with_room = [len(ends)]
            ends.append(0)
            starts.append({})
        number = with_room[0]
        starts[number][index] = ends[number]
        ends[number] += -(-size // SLAB_ALIGNMENT) * SLAB_ALIGNMENT
    return [Slab(_next_power_of_two(end), placed) for end, placed in zip(ends, starts)]


def _next_power_of_two(n: int) -> int:
    """Return the least power of two that is not below n; 0 of 0."""
    return 1 << (n - 1).bit_length() if n else 0


def wait_on_host(device: torch.device) -> None:
    """Hold the host until the GPU has done what it was given so far; a CPU has."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@lru_cache
def get_copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of the copies: they run beside what the current stream computes."""
    return torch.cuda.Stream(device)


def start_all_gather_from_host(
    shard: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> Callable[[], torch.Tensor]:
    """Start to collect all ranks' shards (n,), which may be in host memory, in `dtype` on `device`.
    Return a function that waits for the result (W n,).
    """
    if shard.device == device or device.type != "cuda":
        return dist.start_all_gather(shard.to(dtype))
    stream = get_copy_stream(device)
    with torch.cuda.stream(stream):
        source = shard.to(device, non_blocking=True).to(dtype)
        wait_on_copy_stream = dist.start_all_gather(source)

    def wait() -> torch.Tensor:
        with torch.cuda.stream(stream):
            full = wait_on_copy_stream()
        current_stream = torch.cuda.current_stream(device)
        current_stream.wait_stream(stream)
        # Its memory belongs to the copy stream: not to be given away while it is read here.
        full.record_stream(current_stream)
        return full

    return wait
