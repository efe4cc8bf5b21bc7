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
from recr1.rl.advantages import ADVANTAGES, normalize_each_part
from recr1.rl.by_rollout import average_over_rollout

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
    """Clip one ratio per rollout: e^mean_t(logp - old_logp) (GSPO, arXiv 2507.18071, eq. 5-7).

    Summed over the rollout's tokens instead of averaged, it is LUSPO's (arXiv 2602.05261): GSPO's
    term times the rollout's length.
    """
    mean_log_ratio = average_over_rollout(logp - old_logp, batch.rollout)  # (n,)
    return clipped_surrogate(mean_log_ratio, torch.zeros_like(old_logp), batch, config)


def geometric_surrogate(
    logp: torch.Tensor, old_logp: torch.Tensor, batch: MicroBatch, config: LossConfig
) -> torch.Tensor:
    """Average the clipped log-ratios of a rollout (GMPO, arXiv 2507.20673).

        A e^mean_t(min(log ratio, high) if A > 0 else max(log ratio, -low))

    The geometric mean of clipped ratios. loss.clip_ratio_low and loss.clip_ratio_high bound the
    logarithm: the paper's are 0.4 and 0.4, ratios from e^-0.4 to e^0.4.
    """
    assert batch.advantages is not None
    log_ratio = logp - old_logp
    clipped_log_ratio = torch.where(
        batch.advantages > 0,
        log_ratio.clamp(max=config.upper_clip_ratio),
        log_ratio.clamp(min=-config.clip_ratio_low),
    )
    return average_over_rollout(clipped_log_ratio, batch.rollout).exp() * batch.advantages


@per_token
def soft_gated_surrogate(
    logp: torch.Tensor, old_logp: torch.Tensor, batch: MicroBatch, config: LossConfig
) -> torch.Tensor:
    """Fade a token out by how far its ratio is from 1 (SAPO, arXiv 2511.20347).

        4 / tau sigmoid(tau (ratio - 1)) A

    tau is loss.sapo_temperature_pos where A > 0, else loss.sapo_temperature_neg. The gradient is
    ratio A at a ratio of 1 and fades on both sides of it; no clip.
    """
    assert batch.advantages is not None
    ratio = (logp - old_logp).exp()
    tau = torch.full_like(ratio, config.sapo_temperature_neg)
    tau = tau.masked_fill(batch.advantages > 0, config.sapo_temperature_pos)
    gate = 4 / tau * torch.sigmoid(tau * (ratio - 1))
    return gate * batch.advantages


@per_token
def tv_masked_surrogate(
    logp: torch.Tensor, old_logp: torch.Tensor, batch: MicroBatch, config: LossConfig
) -> torch.Tensor:
    """Stop a token whose probability has moved too far (DPPO-Binary-TV, arXiv 2602.04879).

    ratio A, but 0 where a step would go on from |p - p_old| > delta: see `mask_divergence`. That is
    the total variation between "this token" and "another one".
    """
    divergence = (logp.detach().exp() - old_logp.exp()).abs()
    return mask_divergence(divergence, logp, old_logp, batch, config)


@per_token
def kl_masked_surrogate(
    logp: torch.Tensor, old_logp: torch.Tensor, batch: MicroBatch, config: LossConfig
) -> torch.Tensor:
    """Stop a token whose distribution has moved too far (DPPO-Binary-KL, arXiv 2602.04879).

    As `tv_masked_surrogate`, with the KL between "this token" and "another one":

        p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p))
    """
    new_logp = logp.detach()
    rest = (-new_logp.expm1()).clamp(min=1e-8)  # 1 - p
    old_rest = (-old_logp.expm1()).clamp(min=1e-8)
    divergence = old_logp.exp() * (old_logp - new_logp) + old_rest * (old_rest / rest).log()
    return mask_divergence(divergence, logp, old_logp, batch, config)


def mask_divergence(
    divergence: torch.Tensor,
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    batch: MicroBatch,
    config: LossConfig,
) -> torch.Tensor:
    """Compute ratio A, and 0 where a token is beyond delta and would go further.

    Beyond: divergence (n,) > loss.clip_ratio_high and ratio > 1 where A > 0, > loss.clip_ratio_low
    and ratio < 1 where A < 0. The paper's deltas are 0.15 for the TV and 0.05 for the KL.
    """
    assert batch.advantages is not None
    ratio = (logp - old_logp).exp()
    rises_too_far = (ratio > 1) & (divergence > config.upper_clip_ratio)
    falls_too_far = (ratio < 1) & (divergence > config.clip_ratio_low)
    is_stopped = torch.where(batch.advantages > 0, rises_too_far, falls_too_far)
    return torch.where(is_stopped, 0.0, ratio * batch.advantages)


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
#   seq-mean-token-sum: the mean over rollouts of the sum over each rollout's tokens
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
    "sapo": (soft_gated_surrogate, "mean_std", "seq-mean-token-mean"),
    "gmpo": (geometric_surrogate, "mean_std", "seq-mean-token-mean"),
    "luspo": (sequence_clipped_surrogate, "mean_std", "seq-mean-token-sum"),
    "dppo_tv": (tv_masked_surrogate, "mean_std", "token-mean"),
    "dppo_kl": (kl_masked_surrogate, "mean_std", "token-mean"),
    # GRPO with another advantage
    "maxrl": (clipped_surrogate, "maxrl", "token-mean"),
    "pass_at_k": (clipped_surrogate, "pass_at_k", "token-mean"),
    "gdpo": (clipped_surrogate, "gdpo", "token-mean"),
}


@dataclass(frozen=True)
class Objective:
    """A loss with its names resolved: what the loop and `compute_policy_loss` need of a config."""

    config: LossConfig
    surrogate: Callable
    advantage: Callable
    agg_mode: str  # a value of loss.agg_mode, not empty
    head: str  # fused | recompute
    kernels: str  # torch | triton | auto

    @property
    def needs_reward_parts(self) -> bool:
        """Whether the advantage is made of the reward's terms, and not of their sum."""
        return self.advantage is normalize_each_part

    @property
    def runs_in_kernel(self) -> bool:
        """Whether kernels/group_loss.py computes this loss instead of torch.

        It does so where the kernels are Triton's, for the losses that it has.
        """
        config = self.config
        kernel_has_kl = (
            config.kl_coef == 0 or config.kl_in == "reward" or config.kl_estimator == "k3"
        )
        kernel_has_correction = (
            config.tis_level == "token"
            and config.tis_mode == "truncate"
            and config.tis_floor == 0
            and config.off_policy_mask_threshold == 0
        )
        return (
            choose_backend(self.kernels, dist.device()) == "triton"
            and self.surrogate in (clipped_surrogate, cispo_surrogate)
            and self.agg_mode != "seq-mean-token-mean"
            and config.entropy_coef == 0
            and kernel_has_kl
            and kernel_has_correction
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
    if model.head == "fused" and config.tis_level == "sequence":
        raise ConfigError("loss.tis_level: sequence needs whole rollouts; set model.head=recompute")
    if model.head == "fused" and config.off_policy_mask_threshold:
        raise ConfigError(
            "loss.off_policy_mask_threshold: needs whole rollouts; set model.head=recompute"
        )
    return Objective(
        config=config,
        surrogate=surrogate,
        advantage=advantage,
        agg_mode=config.agg_mode or default_agg_mode,
        head=model.head,
        kernels=model.kernels,
    )
