"""AdamW (and Muon for cold starts), the learning-rate schedule, clipping, and the finite check
before any weight moves.
"""

import math
from functools import partial

import torch

from recr1.config.schema import ConfigError, OptimizerConfig
from recr1.distributed import collectives as dist
from recr1.training.offloaded_adamw import OffloadedAdamW


class NonFiniteGradient(RuntimeError):
    """The gradient norm of a step is NaN or infinite and the config says stop. No weight was
    changed.
    """


class Optimizer:
    """`step()`, at most `steps` times: clip to `clip_norm`, check, update, clear the gradients.

    AdamW is torch's fused one (Loshchilov & Hutter 2019). Muon (Jordan 2024) takes the 2-D weights
    inside the blocks.
    """

    def __init__(self, model: torch.nn.Module, config: OptimizerConfig, steps: int):
        self.config = config
        self.steps = steps
        self.num_steps = 0
        self.num_skipped = 0
        self.names = {p: n for n, p in model.named_parameters() if p.requires_grad}
        matrices = {
            p: n
            for p, n in self.names.items()
            if config.kind == "muon" and p.ndim == 2 and "layers" in n
        }
        if config.kind == "muon" and not matrices:
            raise ConfigError(
                "optimizer.kind: muon updates whole matrices and a sharded policy has none; use adamw"
            )
        rest = [p for p in self.names if p not in matrices]
        adamw = OffloadedAdamW if config.on_host else partial(torch.optim.AdamW, fused=True)
        self.optimizers = [
            (
                config.lr,
                adamw(
                    rest,
                    lr=config.lr,
                    betas=config.betas,
                    eps=config.eps,
                    weight_decay=config.weight_decay,
                ),
            )
        ]
        if matrices:
            self.optimizers.append(
                (
                    config.muon_lr,
                    torch.optim.Muon(
                        list(matrices), lr=config.muon_lr, weight_decay=config.weight_decay
                    ),
                )
            )

    def get_lr_scale(self, step: int) -> float:
        """Share of the base learning rate at `step`: linear warm-up, then linear to `final_lr`."""
        c = self.config
        if step < c.warmup_steps:
            return (step + 1) / c.warmup_steps
        done = (step - c.warmup_steps) / max(1, self.steps - c.warmup_steps)
        return 1 - (1 - c.final_lr) * done

    def step(self, loss: float = 0.0) -> tuple[float, float]:
        """Gradient norm before clipping, and the learning rate used. Raises NonFiniteGradient (or
        skips, as configured).

        loss: this rank's part of the step's; one that is not finite on any rank counts as a
        gradient that is not.
        """
        step = self.num_steps
        self.num_steps = self.num_steps + 1
        norm = self.compute_norm(loss)
        factor = self.get_lr_scale(step)
        # of all ranks' gradients together: every rank takes the same turn
        finite = math.isfinite(norm)
        if finite:
            torch.nn.utils.clip_grads_with_norm_(
                self.names, self.config.clip_norm, torch.tensor(norm)
            )
            for base, optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = base * factor
                optimizer.step()
        for p in self.names:
            p.grad = None
        if not finite and self.config.on_nonfinite == "stop":
            raise NonFiniteGradient(
                f"optimiser step {step + 1}: the gradient norm is {norm}; no weight was changed. "
                "Lower optimizer.lr, or set optimizer.on_nonfinite=skip"
            )
        self.num_skipped += not finite
        return norm, self.config.lr * factor

    def compute_norm(self, loss: float = 0.0) -> float:
        """Euclidean norm of the whole gradient: each rank has its shards' part. NaN when a rank's
        loss is not finite.
        """
        grads = [p.grad for p in self.names if p.grad is not None]
        # over a long shard float32 loses digits
        parts = torch._foreach_norm(grads, dtype=torch.float64) if grads else []
        squares, loss = dist.all_reduce_sum(float(sum(part.square() for part in parts)), loss)
        return math.sqrt(squares) if math.isfinite(loss) else math.nan
