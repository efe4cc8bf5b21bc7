"""The optimizer: AdamW (and Muon for whole weights), the learning-rate schedule, clipping, and the
check that the gradient is finite before any weight moves.
"""

import math
from typing import Any

import torch

from recr1.config.schema import ConfigError, OptimizerConfig
from recr1.distributed import collectives as dist
from recr1.training.offloaded_adamw import AdamW, OffloadedAdamW

AnyOptimizer = torch.optim.Optimizer | OffloadedAdamW


class NonFiniteGradient(RuntimeError):
    """The gradient norm of a step is NaN or infinite, and optimizer.on_nonfinite is stop. No weight
    was changed.
    """


class Optimizer:
    """Update a model's parameters in at most `steps` calls of `step`.

    AdamW is torch's fused one (Loshchilov & Hutter 2019). Muon (Jordan 2024) takes the 2-D weights
    inside the blocks; a sharded policy, which is what both loops train, has none.
    """

    def __init__(self, model: torch.nn.Module, config: OptimizerConfig, steps: int):
        self.config = config
        self.steps = steps
        self.num_steps = 0
        self.num_skipped = 0
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}

        is_muon = config.kind == "muon"
        matrices = []
        other_params = []
        for p, name in self.names.items():
            if is_muon and p.ndim == 2 and "layers" in name:
                matrices.append(p)
            else:
                other_params.append(p)
        if is_muon and not matrices:
            raise ConfigError(
                "optimizer.kind: muon updates whole matrices and a sharded policy has none; "
                "use adamw"
            )

        # with the learning rate at the schedule's top
        adamw = make_adamw(other_params, config)
        self.optimizers: list[tuple[float, AnyOptimizer]] = [(config.lr, adamw)]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)
            self.optimizers.append((config.muon_lr, muon))

    def get_lr_scale(self, step: int) -> float:
        """Return the share of the base learning rate at `step`: linear warm-up, then linear to
        `min_lr_ratio`.
        """
        warmup_steps = self.config.warmup_steps
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        decay_steps = max(1, self.steps - warmup_steps)
        progress = (step - warmup_steps) / decay_steps
        return 1 - (1 - self.config.min_lr_ratio) * progress

    def step(self, loss: float = 0.0) -> tuple[float, float]:
        """Clip the gradient to `max_grad_norm`, check it, update the weights, clear the gradients.

        Args:
            loss: this rank's share of the step's loss. If it is not finite on any rank, the
                gradient counts as not finite.

        Returns:
            the gradient's norm before clipping, and the learning rate used.

        Raises NonFiniteGradient, or skips the update, as optimizer.on_nonfinite says.
        """
        step = self.num_steps
        self.num_steps += 1
        norm = self.compute_norm(loss)
        lr_scale = self.get_lr_scale(step)

        # The norm is that of all ranks' gradients: every rank takes the same branch.
        is_finite = math.isfinite(norm)
        if is_finite:
            self._clip_and_update(norm, lr_scale)
        for p in self.names:
            p.grad = None
        if not is_finite:
            if self.config.on_nonfinite == "stop":
                raise NonFiniteGradient(
                    f"optimizer step {step + 1}: the gradient norm is {norm}; "
                    "no weight was changed. "
                    "Lower optimizer.lr, or set optimizer.on_nonfinite=skip"
                )
            self.num_skipped += 1
        return norm, self.config.lr * lr_scale

    def _clip_and_update(self, norm: float, lr_scale: float) -> None:
        """Clip the gradient, whose norm is `norm`, and update the weights."""
        total_norm = torch.tensor(norm)
        torch.nn.utils.clip_grads_with_norm_(self.names, self.config.max_grad_norm, total_norm)
        for base_lr, optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = base_lr * lr_scale
            optimizer.step()

    def compute_norm(self, loss: float = 0.0) -> float:
        """Return the Euclidean norm of the gradient over all ranks' shards; NaN if a rank's loss is
        not finite.
        """
        grads = [p.grad for p in self.names if p.grad is not None]
        # over a long shard float32 loses digits
        norms = torch._foreach_norm(grads, dtype=torch.float64) if grads else []
        local_sum = sum(norm.square() for norm in norms)
        sum_of_squares, loss = dist.all_reduce_sum(float(local_sum), loss)
        if not math.isfinite(loss):
            return math.nan
        return math.sqrt(sum_of_squares)


def make_adamw(params: list[torch.nn.Parameter], config: OptimizerConfig) -> AdamW | OffloadedAdamW:
    """Return torch's fused AdamW, or the one whose moments are in host memory; with the moments."""
    settings: dict[str, Any] = dict(
        lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    if config.cpu_offload:
        return OffloadedAdamW(params, **settings)
    adamw = AdamW(params, fused=True, **settings)
    adamw.allocate_moments()
    return adamw
