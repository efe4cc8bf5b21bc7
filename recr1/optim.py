"""AdamW (and Muon for cold starts), the learning-rate schedule, clipping, and the finite check before any weight moves."""
from __future__ import annotations

import torch

from .config import Optimizer as OptimizerConfig


class NonFiniteGradient(RuntimeError):
    """The gradient norm of a step is NaN or infinite and the config says stop. No weight was changed."""


class Optimizer:
    """`step(i)` for i = 0, 1, ...: clip to `clip_norm`, check, update, clear the gradients.

    AdamW is torch's fused one (Loshchilov & Hutter 2019). Muon (Jordan 2024) takes the 2-D weights inside the blocks.
    """

    def __init__(self, model: torch.nn.Module, config: OptimizerConfig, steps: int):
        self.config, self.steps, self.skipped = config, steps, 0
        self.params = list(model.parameters())
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n] if config.kind == "muon" else []
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.params if id(p) not in chosen]
        self.parts = [(config.lr, torch.optim.AdamW(rest, lr=config.lr, betas=config.betas, eps=config.eps,
                                                    weight_decay=config.weight_decay, fused=True))]
        if matrices:
            self.parts.append((config.muon_lr, torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)))

    def factor(self, step: int) -> float:
        """Share of the base learning rate at `step`: linear warm-up, then linear to `final_lr`."""
        c = self.config
        if step < c.warmup_steps:
            return (step + 1) / c.warmup_steps
        done = (step - c.warmup_steps) / max(1, self.steps - c.warmup_steps)
        return 1 - (1 - c.final_lr) * done

    def step(self, step: int) -> tuple[float, float]:
        """Gradient norm before clipping, and the learning rate used. Raises NonFiniteGradient (or skips, as configured)."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        lr = self.config.lr * self.factor(step)
        if not torch.isfinite(norm):
            self.zero()
            if self.config.on_nonfinite == "stop":
                raise NonFiniteGradient(f"step {step}: the gradient norm is {norm.item()}; no weight was changed. "
                                        "Lower optimizer.lr, or set optimizer.on_nonfinite=skip")
            self.skipped += 1
            return norm.item(), lr
        torch.nn.utils.clip_grads_with_norm_(self.params, self.config.clip_norm, norm)
        for base, optimizer in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = base * self.factor(step)
            optimizer.step()
        self.zero()
        return norm.item(), lr

    def zero(self) -> None:
        for p in self.params:
            p.grad = None
