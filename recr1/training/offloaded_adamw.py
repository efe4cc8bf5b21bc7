"""torch's AdamW as runs use it, and with its moments in host memory."""

from __future__ import annotations

import inspect
from typing import Any, Callable

import torch
from torch import nn

from recr1.distributed.cpu_offload import get_copy_stream, make_host_zeros

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """torch's AdamW, without the decorators that import torch._dynamo.

    They are there for torch.compile, and take seconds at the start of every rank.
    """

    def allocate_moments(self) -> None:
        """Make the moments of every parameter now, not in the first update.

        A run has then taken all that it keeps before it samples: on a GPU moments that come later
        would lie, for good, in the middle of what sampling has given back.
        """
        for group in self.param_groups:
            for p in group["params"]:
                zeros = [torch.zeros_like(p, requires_grad=False) for _ in MOMENTS]
                self.state[p] = make_initial_state(p, zeros)

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    # torch's decorator of step switches gradients off, too
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class OffloadedAdamW:
    """torch's fused AdamW with its two moments in host memory.

    They are copied to the device parameter by parameter, one ahead of the update, and back after
    it.
    """

    def __init__(self, params: list[nn.Parameter], **settings: Any):
        self.params = params
        self.updates = [AdamW([p], fused=True, **settings) for p in params]
        self.param_groups: list[dict[str, Any]] = []
        for update in self.updates:
            self.param_groups += update.param_groups
        self.host_state = _make_host_state(params)

    @property
    def state(self) -> dict[nn.Parameter, dict[str, torch.Tensor]]:
        """Return, by parameter, its step, exp_avg and exp_avg_sq, on the host."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies back may be under way
        return self.host_state

    def step(self) -> None:
        """Update the parameters that have a gradient."""
        params = []
        updates = []
        for p, update in zip(self.params, self.updates):
            if p.grad is not None:
                params.append(p)
                updates.append(update)
        if not params:
            return

        wait_for_next = self._start_fetch(params[0])
        for i, (p, update) in enumerate(zip(params, updates)):
            wait = wait_for_next
            if i + 1 < len(params):
                wait_for_next = self._start_fetch(params[i + 1])
            update.state[p] = wait()
            update.step()
            self._start_store(p, update.state.pop(p))

    def _start_fetch(self, p: nn.Parameter) -> Callable[[], dict[str, torch.Tensor]]:
        """Start to copy a parameter's moments to its device. Return a function that waits for
        them.
        """
        host_state = self.host_state[p]
        if p.device.type != "cuda":
            return lambda: host_state
        stream = get_copy_stream(p.device)
        with torch.cuda.stream(stream):
            moments = {name: host_state[name].to(p.device, non_blocking=True) for name in MOMENTS}
        copied = stream.record_event()

        def wait() -> dict[str, torch.Tensor]:
            torch.cuda.current_stream(p.device).wait_event(copied)
            return dict(moments, step=host_state["step"])

        return wait

    def _start_store(self, p: nn.Parameter, state: dict[str, torch.Tensor]) -> None:
        """Start to copy the updated moments back. The copy runs after the update and before the
        next step's fetch.
        """
        if p.device.type != "cuda":
            return
        stream = get_copy_stream(p.device)
        stream.wait_stream(torch.cuda.current_stream(p.device))
        with torch.cuda.stream(stream):
            for name in MOMENTS:
                self.host_state[p][name].copy_(state[name], non_blocking=True)


def make_initial_state(p: nn.Parameter, moments: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state of a parameter before its first update, as torch's fused AdamW makes it."""
    step = torch.zeros((), device=p.device)
    return dict(step=step, **dict(zip(MOMENTS, moments)))


def _make_host_state(params: list[nn.Parameter]) -> dict[nn.Parameter, dict[str, torch.Tensor]]:
    """Return the states of all parameters before the first update, moments in host memory."""
    [dtype] = {p.dtype for p in params}
    shapes = [p.shape for p in params for _ in MOMENTS]
    zeros = iter(make_host_zeros(shapes, dtype))
    return {p: make_initial_state(p, [next(zeros) for _ in MOMENTS]) for p in params}
