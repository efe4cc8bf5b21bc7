"""Host memory for what does not fit on the GPU: a frozen model's shards, AdamW's moments. It is
pinned, and copied while the GPU computes.

On a CPU the host is the device: nothing is copied, and the same calls give the same numbers.

Legend: W ranks, n numbers of a shard.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Callable

import torch

from recr1.distributed import collectives as dist


def host_zeros(shape: int | torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros in host memory, pinned if there is a GPU to copy them to."""
    has_gpu = torch.cuda.is_available()
    return torch.zeros(shape, dtype=dtype, pin_memory=has_gpu)


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
