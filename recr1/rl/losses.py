"""The surrogate objectives of GRPO's family, and which of them each published loss is made of.

Legend: n tokens.
"""

from dataclasses import dataclass
from typing import Callable

import torch

from recr1.config import plugins
from recr1.config.schema import ConfigError, LossConfig, ModelConfig
from recr1.data_types import MicroBatch
from recr1.distributed import collectives as dist
from recr1.kernels.availability import choose_backend
from recr1.rl.advantages import ADVANTAGES

# --- surrogates: log-probs (n,) -> what each token adds to the objective, (n,), to be maximized ---


def per_token(surrogate: Callable) -> Callable:
    """Mark a surrogate whose value at a token depends on that token alone.

    With `head: fused` the batch may then be cut into chunks anywhere.
    """
    surrogate.per_token = True  # type: ignore[attr-defined]
    return surrogate


@per_token
def clipped_surrogate(
    logp: torch.Tensor, old_logp: torch.Tensor, batch: MicroBatch, config: LossConfig
) -> torch.Tensor:
    """Clip the ratio of new to old policy (DeepSeekMath, eq. 3; DAPO, arXiv 2503.14476, eq. 8).

        min(ratio A, clip(ratio, 1 - low, 1 + high) A),  ratio = e^(logp - old_logp)

    old_logp (n,): log-probs under the policy that sampled, without gradient. With one optimizer
    step for a step's rollouts they are logp itself, and the ratio is 1. low and high are
    loss.clip_ratio_low and loss.clip_ratio_high; a high of 0 means low: `config.upper_clip_ratio`.
    """
    assert batch.advantages is not None
    ratio = (logp - old_logp).exp()
    clipped_ratio = ratio.clamp(1 - config.clip_ratio_low, 1 + config.upper_clip_ratio)
    return torch.minimum(ratio * batch.advantages, clipped_ratio * batch.advantages)


def sequence_clipped_surrogate(
    logp: torch.Tensor, old_logp: torch.Tensor, batch: MicroBatch, config: LossConfig
) -> torch.Tensor:
    """Clip one ratio per rollout: e^mean_t(logp - old_logp) (GSPO, arXiv 2507.18071, eq. 5-7)."""
    _, rollout_index, num_tokens = batch.rollout.unique(return_inverse=True, return_counts=True)
    zeros = torch.zeros(len(num_tokens), dtype=logp.dtype, device=logp.device)
    sum_log_ratio = zeros.index_add(0, rollout_index, logp - old_logp)  # (rollouts,)
    mean_log_ratio = sum_log_ratio / num_tokens
    token_log_ratio = mean_log_ratio.index_select(0, rollout_index)  # (n,)
    return clipped_surrogate(token_log_ratio, torch.zeros_like(old_logp), batch, config)


@per_token
def cispo_surrogate(
    logp: torch.Tensor, old_logp: torch.Tensor, batch: MicroBatch, config: LossConfig
) -> torch.Tensor:
    """Weight A logp by a cut ratio: weights are cut, gradients never.

    stop_gradient(min(ratio, 1 + high)) A logp    (CISPO, MiniMax-M1, arXiv 2506.13585, eq. 4-5)
    """
    assert batch.advantages is not None
    ratio = (logp.detach() - old_logp).exp()
    return ratio.clamp(max=1 + config.upper_clip_ratio) * batch.advantages * logp


@per_token
def reinforce_surrogate(
    logp: torch.Tensor, old_logp: torch.Tensor, batch: MicroBatch, config: LossConfig
) -> torch.Tensor:
    """Multiply A by logp (Williams 1992).

    old_logp is not used, so this is meant for one optimizer step for a step's rollouts.
    """
    assert batch.advantages is not None
    return batch.advantages * logp


# kind -> (surrogate, advantage, agg_mode). The agg_mode (`loss.agg_mode`, verl's names) is
#   token-mean: the mean over all tokens
#   seq-mean-token-mean: the mean over rollouts of the mean over each rollout's tokens
#   seq-mean-token-sum-norm: the sum over R * max_new_tokens
RECIPES = {
    # Rec-R1's verl; agg_mode: seq-mean-token-mean is DeepSeekMath's own eq. 3
    "grpo": (clipped_surrogate, "mean_std", "token-mean"),
    "dr_grpo": (
        clipped_surrogate,
        "mean",
        "seq-mean-token-sum-norm",
    ),  # arXiv 2503.20783, section 3
    # arXiv 2503.14476, eq. 8-12: with clip_ratio_high, sampling.dynamic_sampling and
    # reward.overlong_buffer
    "dapo": (clipped_surrogate, "mean_std", "token-mean"),
    "gspo": (sequence_clipped_surrogate, "mean_std", "seq-mean-token-mean"),
    "cispo": (cispo_surrogate, "mean_std", "token-mean"),
    "rloo": (reinforce_surrogate, "leave_one_out", "token-mean"),
    "reinforce": (reinforce_surrogate, "mean", "token-mean"),  # with the group's mean as baseline
}


@dataclass(frozen=True)
class Objective:
    """A loss with its names resolved: what the loop and `compute_policy_loss` need of a config."""

    config: LossConfig
    surrogate: Callable
    advantage: Callable
    agg_mode: str  # token-mean | seq-mean-token-mean | seq-mean-token-sum-norm
    head: str  # fused | recompute
    kernels: str  # torch | triton | auto

    @property
    def runs_in_kernel(self) -> bool:
        """Whether kernels/group_loss.py computes this loss instead of torch.

        It does so where the kernels are Triton's, for the losses that it has.
        """
        config = self.config
        kernel_has_kl = (
            config.kl_coef == 0 or config.kl_in == "reward" or config.kl_estimator == "k3"
        )
        return (
            choose_backend(self.kernels, dist.device()) == "triton"
            and self.surrogate in (clipped_surrogate, cispo_surrogate)
            and self.agg_mode != "seq-mean-token-mean"
            and config.entropy_coef == 0
            and kernel_has_kl
        )


def resolve_objective(config: LossConfig, model: ModelConfig) -> Objective:
    """Resolve loss.kind, loss.advantage and loss.agg_mode to functions.

    Raises ConfigError for an unknown name, and for a loss that the head cannot compute.
    """
    recipe = RECIPES.get(config.kind)
    if recipe is None:
        user_surrogate = plugins.load_function("loss.kind", config.kind, RECIPES)
        recipe = (user_surrogate, "mean_std", "token-mean")
    surrogate, default_advantage, default_agg_mode = recipe

    advantage_name = config.advantage or default_advantage
    advantage = ADVANTAGES.get(advantage_name)
    if advantage is None:
        advantage = plugins.load_function("loss.advantage", advantage_name, ADVANTAGES)

    # The fused head cuts rollouts into chunks.
    if model.head == "fused" and not getattr(surrogate, "per_token", False):
        raise ConfigError(
            f"loss.kind: {config.kind} needs whole rollouts, or does not say that it needs none "
            "(function.per_token = True); set model.head=recompute"
        )
    return Objective(
        config=config,
        surrogate=surrogate,
        advantage=advantage,
        agg_mode=config.agg_mode or default_agg_mode,
        head=model.head,
        kernels=model.kernels,
    )
