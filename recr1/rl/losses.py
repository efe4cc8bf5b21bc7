"""The surrogate objectives of GRPO's family, and which of them each published loss is made of."""

from dataclasses import dataclass
from typing import Callable

import torch

from recr1.config import plugins
from recr1.config.schema import ConfigError, LossConfig, ModelConfig
from recr1.data_types import MicroBatch
from recr1.rl.advantages import ADVANTAGES

# --- gains: log-probs (n,) -> what each token adds to the objective, (n,), to be made large --------------------------------------
# old (n,): log-probs under the policy that sampled, without gradient; one optimiser step per batch:
# logp itself, ratio 1.


def clipped_surrogate(
    logp: torch.Tensor, old: torch.Tensor, batch: MicroBatch, c: LossConfig
) -> torch.Tensor:
    """min(rho A, clip(rho, 1 - clip, 1 + clip_high) A), rho = e^(logp - old) (DeepSeekMath, eq. 3;
    DAPO, arXiv 2503.14476, eq. 8).
    """
    rho = (logp - old).exp()
    return torch.minimum(
        rho * batch.advantages, rho.clamp(1 - c.clip, 1 + c.high) * batch.advantages
    )


def sequence_clipped_surrogate(
    logp: torch.Tensor, old: torch.Tensor, batch: MicroBatch, c: LossConfig
) -> torch.Tensor:
    """The same with one rho per rollout: e^mean_t(logp - old) (GSPO, arXiv 2507.18071, eq. 5-7)."""
    _, index, size = batch.rollout.unique(return_inverse=True, return_counts=True)
    mean_log = (
        torch.zeros(len(size), dtype=logp.dtype, device=logp.device).index_add(0, index, logp - old)
        / size
    )
    return clipped_surrogate(mean_log.index_select(0, index), torch.zeros_like(old), batch, c)


def cispo_surrogate(
    logp: torch.Tensor, old: torch.Tensor, batch: MicroBatch, c: LossConfig
) -> torch.Tensor:
    """sg(min(rho, 1 + clip_high)) A logp: weights are cut, gradients never (CISPO, MiniMax-M1,
    arXiv 2506.13585, eq. 4-5).
    """
    return (logp.detach() - old).exp().clamp(max=1 + c.high) * batch.advantages * logp


def reinforce_surrogate(
    logp: torch.Tensor, old: torch.Tensor, batch: MicroBatch, c: LossConfig
) -> torch.Tensor:
    """A logp (Williams 1992); `old` has no part in it, so it is meant for one optimiser step per
    batch.
    """
    return batch.advantages * logp


# gain, advantage, average (token: mean over all tokens; sequence: mean over rollouts of their
# means; constant: sum over R * max_new_tokens)
RECIPES = {
    # Rec-R1's verl; average: sequence is DeepSeekMath's own eq. 3
    "grpo": (clipped_surrogate, "mean_std", "token"),
    "dr_grpo": (clipped_surrogate, "mean", "constant"),  # arXiv 2503.20783, section 3
    # arXiv 2503.14476, eq. 8-12: with clip_high, sampling.resample, reward.overlong
    "dapo": (clipped_surrogate, "mean_std", "token"),
    "gspo": (sequence_clipped_surrogate, "mean_std", "sequence"),
    "cispo": (cispo_surrogate, "mean_std", "token"),
    "rloo": (reinforce_surrogate, "leave_one_out", "token"),
    "reinforce": (reinforce_surrogate, "mean", "token"),  # with the group's mean as baseline
}


@dataclass(frozen=True)
class Objective:
    """A loss with its names resolved: what `policy_loss` and the loop need of the config."""

    config: LossConfig
    surrogate: Callable
    advantage: Callable
    agg_mode: str
    head: str  # one_shot | recompute
    kernels: str  # torch | triton

    @property
    def fused(self) -> bool:
        """Whether kernels/group_loss.py has this loss: with kernels: triton it then takes the place
        of `pulled`.
        """
        c = self.config
        return (
            self.kernels == "triton"
            and self.surrogate in (clipped_surrogate, cispo_surrogate)
            and self.agg_mode != "sequence"
            and c.entropy == 0
            and (c.kl == 0 or c.kl_in == "reward" or c.kl_estimator == "k3")
        )


def resolve_objective(c: LossConfig, model: ModelConfig) -> Objective:
    """Resolves loss.kind, loss.advantage, loss.average. Raises ConfigError."""
    gain, name, average = RECIPES.get(c.kind) or (
        plugins.load_function("loss.kind", c.kind, RECIPES),
        "mean_std",
        "token",
    )
    name = c.advantage or name
    advantage = ADVANTAGES.get(name) or plugins.load_function("loss.advantage", name, ADVANTAGES)
    if model.head == "one_shot" and not getattr(gain, "per_token", False):
        raise ConfigError(
            f"loss.kind: {c.kind} needs whole rollouts, or does not say that it needs none (function.per_token = True); "
            "set model.head=recompute"
        )
    return Objective(c, gain, advantage, c.average or average, model.head, model.kernels)
