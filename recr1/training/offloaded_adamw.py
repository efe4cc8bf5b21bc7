"""AdamW with its moments in host memory."""

from __future__ import annotations

from typing import Callable

import torch

from recr1.distributed.cpu_offload import get_copy_stream, host_zeros


class OffloadedAdamW:
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
                exp_avg=host_zeros(p.shape, p.dtype),
                exp_avg_sq=host_zeros(p.shape, p.dtype),
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
        stream = get_copy_stream(p.device)
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
        stream = get_copy_stream(p.device)
        stream.wait_stream(torch.cuda.current_stream(p.device))
        with torch.cuda.stream(stream):
            for name in ("exp_avg", "exp_avg_sq"):
                self.host[p][name].copy_(state[name], non_blocking=True)
