"""The loss of a micro-batch: the one line of the training loop, `compute_policy_loss`.

    loss = sum_t w_t (-surrogate_t + kl_coef KL_t - entropy_coef H_t) / denominator

A loss of GRPO's family is an advantage (rl/advantages.py), a surrogate per token (rl/losses.py), a
KL estimator (rl/kl.py) and an agg_mode. RECIPES in rl/losses.py names those of the papers.
`loss.kind` and `loss.advantage` also take a function of yours (`module:function`): one with the
signature of the surrogates in rl/losses.py, or of the advantages in rl/advantages.py.

w_t counts identical siblings. The denominator is counted over the whole optimizer step: all ranks,
all micro-batches. There are no masks: a MicroBatch holds real tokens only.

Legend: N trained tokens, n tokens of a chunk.
"""

from typing import NamedTuple

import torch

from recr1.data_types import MicroBatch, Rollout
from recr1.kernels.group_loss import GroupTokenLoss, LossRule, WithGradients
from recr1.model.decoder import AnyDecoder
from recr1.model.log_probs import compute_fused_loss, compute_log_probs
from recr1.rl.corrections import correct
from recr1.rl.kl import estimate_kl
from recr1.rl.losses import Objective, cispo_surrogate


class PolicyLoss(NamedTuple):
    """The loss of one micro-batch."""

    value: torch.Tensor  # scalar with gradient
    logp: torch.Tensor  # (N,) without gradient
    stats: dict[str, float]  # sums over the micro-batch's tokens


class TokenLossTerms(NamedTuple):
    """The loss of some tokens, its derivatives, and its statistics."""

    loss: torch.Tensor  # scalar
    grad_logp: torch.Tensor  # (n,) d loss / d logp
    grad_entropy: (
        torch.Tensor | None
    )  # (n,) d loss / d entropy; None: the entropy is not in the loss
    stats: dict[str, torch.Tensor]  # sums over the tokens


def count_denominator(rollouts: list[Rollout], agg_mode: str, max_new_tokens: int) -> int:
    """Count what this rank adds to the denominator. A rollout counts for its identical siblings."""
    num_siblings = sum(rollout.count for rollout in rollouts)
    num_tokens = sum(rollout.count * len(rollout.ids) for rollout in rollouts)
    denominators = {
        "token-mean": num_tokens,
        "seq-mean-token-mean": num_siblings,
        "seq-mean-token-sum": num_siblings,
        "seq-mean-token-sum-norm": num_siblings * max_new_tokens,
    }
    return denominators[agg_mode]


def compute_policy_loss(
    policy: AnyDecoder,
    batch: MicroBatch,
    denominator: float,
    temperature: float,
    objective: Objective,
) -> PolicyLoss:
    """Compute the loss of one micro-batch.

    Both heads ask `token_loss` for d loss / d logp and d loss / d entropy, (N,) each.

    Args:
        denominator: what the average divides by, counted over the whole optimizer step: all ranks,
            all micro-batches.
    """
    token_loss = _build_token_loss(batch, denominator, objective)

    if objective.head == "fused":
        # The head calls token_loss chunk by chunk and makes its gradients in the forward pass.
        loss, logp, entropy = compute_fused_loss(
            policy, batch, temperature, token_loss, objective.kernels
        )
    else:
        # The log-probs of all tokens come first, the loss is made of them.
        logp, entropy = compute_log_probs(policy, batch, temperature, objective.kernels)
        all_tokens = slice(0, len(logp))
        value, grad_logp, grad_entropy = token_loss(logp.detach(), entropy.detach(), all_tokens)
        loss = WithGradients.apply(logp, entropy, value, grad_logp, grad_entropy)

    logp = logp.detach()
    sums = token_loss.stats() | _sum_policy_stats(batch, logp, entropy.detach())
    values = torch.stack(list(sums.values())).tolist()  # at once: each would wait for the GPU
    stats = dict(zip(sums, values))
    return PolicyLoss(loss, logp, stats)


class TorchTokenLoss:
    """The token loss in plain torch, for any slice of a micro-batch's tokens.

    It is a TokenLoss of kernels/logprob.py: call it as (logp (n,), entropy (n,), tokens).
    kernels/group_loss.py has the same interface as one Triton kernel: GroupTokenLoss.
    """

    def __init__(self, batch: MicroBatch, denominator: float, objective: Objective):
        self.batch = batch
        self.weight = compute_token_weights(batch, objective)  # (N,)
        self.denominator = denominator
        self.objective = objective
        self.sums: dict[str, torch.Tensor] = {}

    def __call__(
        self, logp: torch.Tensor, entropy: torch.Tensor, tokens: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the loss of `tokens`, d loss / d logp (n,), d loss / d entropy (n,) or None."""
        chunk = self.batch.select_tokens(tokens)
        weight = self.weight[tokens]
        terms = compute_token_loss(logp, entropy, chunk, weight, self.denominator, self.objective)
        for name, value in terms.stats.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        return terms.loss, terms.grad_logp, terms.grad_entropy

    def stats(self) -> dict[str, torch.Tensor]:
        """Return the sums over all tokens so far, by the names that are logged."""
        return self.sums


def compute_token_loss(
    logp: torch.Tensor,
    entropy: torch.Tensor,
    batch: MicroBatch,
    weight: torch.Tensor,
    denominator: float,
    objective: Objective,
) -> TokenLossTerms:
    """Compute the loss of the batch's tokens and its derivatives.

    Args:
        logp: (n,) log-probs of the tokens; no gradient flows back through them here.
        entropy: (n,) entropy of the policy at the tokens.
        weight: (n,) w, see `compute_token_weights`.
    """
    config = objective.config
    has_kl = config.kl_coef > 0 and config.kl_in == "loss"
    old_logp = logp if batch.old_logp is None else batch.old_logp

    with torch.enable_grad():
        new_logp = logp.detach().requires_grad_()
        surrogate = objective.surrogate(new_logp, old_logp, batch, config)  # (n,)
        [grad_surrogate] = torch.autograd.grad(surrogate.sum(), new_logp, retain_graph=True)

        correction = correct(logp, old_logp, batch, config)  # (n,) or None
        if correction is not None:
            surrogate = surrogate * correction
        loss = -(weight * surrogate).sum() / denominator

        if has_kl:
            assert batch.ref_logp is not None
            kl = estimate_kl(config.kl_estimator, new_logp, batch.ref_logp, old_logp)  # (n,)
            loss = loss + config.kl_coef * (weight * kl).sum() / denominator
        [grad_logp] = torch.autograd.grad(loss, new_logp)

    # The loss is linear in the entropy: its derivative needs no autograd.
    grad_entropy = -config.entropy_coef / denominator * weight
    loss = loss.detach() + (grad_entropy * entropy).sum()

    is_clipped = (grad_surrogate == 0) & (batch.advantages != 0)
    stats = {
        "clip_ratio": (batch.weight * is_clipped).sum(),
        "grad_logp_square": grad_logp.square().sum(),
    }
    if config.masks_tokens:
        assert correction is not None
        stats["masked"] = (batch.weight * (correction == 0)).sum()
    if has_kl:
        stats["kl"] = (batch.weight * kl.detach()).sum()
    return TokenLossTerms(loss, grad_logp, grad_entropy if config.entropy_coef else None, stats)


def compute_token_weights(batch: MicroBatch, objective: Objective) -> torch.Tensor:
    """Compute w (N,): the number of identical siblings of each token's rollout.

    In a mean over sequences a rollout's weight is shared by its tokens. This needs whole rollouts,
    and a micro-batch holds whole rollouts.
    """
    if objective.agg_mode != "seq-mean-token-mean":
        return batch.weight
    _, rollout_index, num_tokens = batch.rollout.unique(return_inverse=True, return_counts=True)
    return batch.weight / num_tokens[rollout_index]


def _build_token_loss(
    batch: MicroBatch, denominator: float, objective: Objective
) -> TorchTokenLoss | GroupTokenLoss:
    """Return the loss as a Triton kernel where one has it and is asked for, else in torch."""
    if not objective.runs_in_kernel:
        return TorchTokenLoss(batch, denominator, objective)

    config = objective.config
    is_cispo = objective.surrogate is cispo_surrogate
    kl_coef = config.kl_coef if config.kl_in == "loss" else 0.0
    rule = LossRule(
        clip_ratio_low=1.0 if is_cispo else config.clip_ratio_low,
        clip_ratio_high=config.upper_clip_ratio,
        kl_coef=kl_coef,
        cispo=is_cispo,
        sampler_cap=config.tis_cap,
    )
    return GroupTokenLoss(
        rule=rule,
        rewards=None,
        # The kernel looks up an advantage by rollout: here every token has its own.
        rollout=torch.arange(len(batch.target), device=batch.target.device),
        weight=batch.weight,
        sampler_logp=batch.sampler_logp,
        denominator=denominator,
        old_logp=batch.old_logp,
        ref_logp=batch.ref_logp if kl_coef else None,
        advantages=batch.advantages,
    )


def _sum_policy_stats(
    batch: MicroBatch, logp: torch.Tensor, entropy: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Sum over the tokens what is logged of the policy whatever the loss is. logp, entropy (N,)."""
    weight = batch.weight
    old_logp = logp if batch.old_logp is None else batch.old_logp
    ratio_deviation = (logp - old_logp).expm1().abs()
    importance = (old_logp - batch.sampler_logp).exp()
    return {
        "ratio_abs_deviation": (weight * ratio_deviation).sum(),
        "importance_sampling_ratio": (weight * importance).sum(),
        "entropy": (weight * entropy).sum(),
        "trained": weight.sum(),
    }
