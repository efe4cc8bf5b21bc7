"""What lies in host memory for want of room on the GPU: a frozen model's shards, AdamW's moments.
Pinned, and copied beside the computation.

On a CPU the host is the device: nothing is copied, and the same calls give the same numbers.
Legend: W ranks, n numbers of a shard.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Callable

import torch

from recr1.distributed import collectives as dist


def host_zeros(shape: int | torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """In host memory, pinned where there is a GPU to copy it to."""
    return torch.zeros(shape, dtype=dtype, pin_memory=torch.cuda.is_available())


@lru_cache
def get_copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of the copies: they run beside what the current stream computes."""
    return torch.cuda.Stream(device)


def start_all_gather_from_host(
    shard: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> Callable[[], torch.Tensor]:
    """As dist.start_all_gather, of a shard (n,) that may lie on the host, in another type and on
    `device`.
    """
    if shard.device == device or device.type != "cuda":
        return dist.start_all_gather(shard.to(dtype))
    stream = get_copy_stream(device)
    with torch.cuda.stream(stream):
        begun = dist.start_all_gather(shard.to(device, non_blocking=True).to(dtype))

    def wait() -> torch.Tensor:
        with torch.cuda.stream(stream):
            whole = begun()
        torch.cuda.current_stream(device).wait_stream(stream)
        # its memory is the side stream's: not to be given away while it is read
        whole.record_stream(torch.cuda.current_stream(device))
        return whole

    return wait
