"""What lies in host memory for want of room on the GPU: a frozen model's shards, AdamW's moments.
Pinned, and copied beside the computation.

On a CPU the host is the device: nothing is copied, and the same calls give the same numbers.
Legend: W ranks, n numbers of a shard.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Callable

import torch

from . import dist


def zeros(shape: int | torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """In host memory, pinned where there is a GPU to copy it to."""
    return torch.zeros(shape, dtype=dtype, pin_memory=torch.cuda.is_available())


@lru_cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of the copies: they run beside what the current stream computes."""
    return torch.cuda.Stream(device)


def all_gather(
    shard: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> Callable[[], torch.Tensor]:
    """As dist.all_gather, of a shard (n,) that may lie on the host, in another type and on
    `device`.
    """
    if shard.device == device or device.type != "cuda":
        return dist.all_gather(shard.to(dtype))
    stream = side_stream(device)
    with torch.cuda.stream(stream):
        begun = dist.all_gather(shard.to(device, non_blocking=True).to(dtype))

    def wait() -> torch.Tensor:
        with torch.cuda.stream(stream):
            whole = begun()
        torch.cuda.current_stream(device).wait_stream(stream)
        # its memory is the side stream's: not to be given away while it is read
        whole.record_stream(torch.cuda.current_stream(device))
        return whole

    return wait


class HostAdamW:
    """torch's fused AdamW with its two moments in host memory. They come to the device shard by
    shard, one ahead of the update, and go back behind it.
    """

    def __init__(self, params: list[torch.Tensor], **settings):
        self.params = params
        self.updates = [torch.optim.AdamW([p], fused=True, **settings) for p in params]
        self.param_groups = [group for update in self.updates for group in update.param_groups]
        self.host = {
            p: dict(
                step=torch.zeros((), device=p.device),
                exp_avg=zeros(p.shape, p.dtype),
                exp_avg_sq=zeros(p.shape, p.dtype),
            )
            for p in params
        }

    @property
    def state(self) -> dict[torch.Tensor, dict]:
        """By parameter: step, exp_avg, exp_avg_sq, whole."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies back may be under way
        return self.host

    def step(self) -> None:
        chosen = [(p, update) for p, update in zip(self.params, self.updates) if p.grad is not None]
        coming = [self._fetch(p) for p, _ in chosen[:1]]
        for i, (p, update) in enumerate(chosen):
            coming += [self._fetch(q) for q, _ in chosen[i + 1 : i + 2]]
            update.state[p] = coming.pop(0)()
            update.step()
            self._store(p, update.state.pop(p))

    def _fetch(self, p: torch.Tensor) -> Callable[[], dict]:
        """Begins to copy the shard's moments to its device; the call it returns waits."""
        host = self.host[p]
        if p.device.type != "cuda":
            return lambda: host
        stream = side_stream(p.device)
        with torch.cuda.stream(stream):
            here = {
                name: host[name].to(p.device, non_blocking=True)
                for name in ("exp_avg", "exp_avg_sq")
            }
        done = stream.record_event()

        def wait() -> dict:
            torch.cuda.current_stream(p.device).wait_event(done)
            return dict(here, step=host["step"])

        return wait

    def _store(self, p: torch.Tensor, state: dict) -> None:
        """Begins to copy the updated moments back, after the update and before the next step's
        fetch.
        """
        if p.device.type != "cuda":
            return
        stream = side_stream(p.device)
        stream.wait_stream(torch.cuda.current_stream(p.device))
        with torch.cuda.stream(stream):
            for name in ("exp_avg", "exp_avg_sq"):
                self.host[p][name].copy_(state[name], non_blocking=True)
