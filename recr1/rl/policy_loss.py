"""GRPO's family: advantages, gains, KL estimators, and the one line of the loop, `policy_loss`.
Plain tensors in, plain tensors out.

    loss = sum_t w_t (-gain_t + kl KL_t - entropy H_t) / total

A loss is an advantage, a gain per token and an average; RECIPES names those of the papers, and
`loss.kind`, `loss.advantage` take a function of yours (`module:function`) with the same signature.
w_t counts identical siblings; `total` is the average's denominator over the whole optimiser step,
all ranks and micro-batches. Masks do not exist: a Batch holds real tokens only.

Legend: P prompts, G group, R = P*G rollouts, N trained tokens, n of a chunk.
"""

from dataclasses import replace

import torch

from recr1.data_types import MicroBatch, Rollout
from recr1.kernels.group_loss import GroupTokenLoss, LossRule, WithGradients
from recr1.model.log_probs import compute_fused_loss, compute_log_probs
from recr1.rl.kl import KL_ESTIMATORS
from recr1.rl.losses import Objective, cispo_surrogate, clipped_surrogate, reinforce_surrogate

for gain in (clipped_surrogate, cispo_surrogate, reinforce_surrogate):
    # a token's gain depends on that token alone: head: one_shot may cut the batch into chunks
    gain.per_token = True


def count_denominator(texts: list[Rollout], average: str, max_new_tokens: int) -> int:
    """This rank's part of `total`; texts count for their identical siblings."""
    siblings = sum(r.count for r in texts)
    return {
        "token": sum(r.count * len(r.ids) for r in texts),
        "sequence": siblings,
        "constant": siblings * max_new_tokens,
    }[average]


def compute_policy_loss(
    model: torch.nn.Module, batch: MicroBatch, total: float, temperature: float, o: Objective
):
    """A micro-batch -> (loss, scalar with gradient; logp (N,); statistics, sums over its tokens).

    head one_shot: the loss goes down to the head, which makes gradients chunk by chunk. recompute:
    log-probs come up, the loss is made of all of them. Either way d loss / d logp and d entropy,
    (N,), come from `pull`.
    """
    weight = compute_token_weights(batch, o)
    sums: dict[str, torch.Tensor] = {}

    def by_tokens(logp, entropy, rows):
        cut = {
            name: x[rows]
            for name, x in vars(batch).items()
            if name not in ("tokens", "positions", "layout") and x is not None
        }
        part, *gradients, stats = compute_token_loss(
            logp, entropy, replace(batch, **cut), weight[rows], total, o
        )
        for name, value in stats.items():
            sums[name] = sums.get(name, 0.0) + value
        return part, *gradients

    pull = _build_fused_token_loss(batch, total, o) if o.fused else by_tokens
    if o.head == "one_shot":
        loss, logp, entropy = compute_fused_loss(model, batch, temperature, pull, o.kernels)
    else:
        logp, entropy = compute_log_probs(model, batch, temperature, o.kernels)
        loss = WithGradients.apply(
            logp, entropy, *pull(logp.detach(), entropy.detach(), slice(0, len(logp)))
        )
    if o.fused:
        sums = pull.logged()
    logp = logp.detach()
    w = batch.weight
    old = logp if batch.old_logp is None else batch.old_logp
    sums |= dict(
        ratio_off=(w * (logp - old).expm1().abs()).sum(),
        trust=(w * (old - batch.sampler_logp).exp()).sum(),
        entropy=(w * entropy.detach()).sum(),
        trained=w.sum(),
    )
    return loss, logp, {name: float(value) for name, value in sums.items()}


def _build_fused_token_loss(batch: MicroBatch, total: float, o: Objective) -> GroupTokenLoss:
    """The same loss by its kernel; every token is given its own advantage."""
    c = o.config
    kl = c.kl if c.kl_in == "loss" else 0.0
    rule = LossRule(
        clip_low=1.0 if o.surrogate is cispo_surrogate else c.clip,
        clip_high=c.high,
        kl=kl,
        cispo=o.surrogate is cispo_surrogate,
        sampler_cap=c.importance_cap,
    )
    return GroupTokenLoss(
        rule,
        None,
        torch.arange(len(batch.target), device=batch.target.device),
        batch.weight,
        batch.sampler_logp,
        total,
        batch.old_logp,
        batch.ref_logp if kl else None,
        batch.advantages,
    )


def compute_token_loss(
    logp: torch.Tensor,
    entropy: torch.Tensor,
    batch: MicroBatch,
    weight: torch.Tensor,
    total: float,
    o: Objective,
):
    """(loss of these tokens, d loss / d logp (n,), d loss / d entropy (n,) or None, statistics)."""
    c = o.config
    with torch.enable_grad():
        x = logp.detach().requires_grad_()
        old = logp if batch.old_logp is None else batch.old_logp
        gain = o.surrogate(x, old, batch, c)  # (n,)
        [slope] = torch.autograd.grad(gain.sum(), x, retain_graph=True)
        # truncated importance sampling: the sampler's arithmetic is another (Yao et al. 2025)
        if c.importance_cap > 0:
            gain = gain * (old - batch.sampler_logp).exp().clamp(max=c.importance_cap)
        loss = -(weight * gain).sum() / total
        # (n,)
        divergence = (
            KL_ESTIMATORS[c.kl_estimator](x, batch.ref_logp)
            if c.kl > 0 and c.kl_in == "loss"
            else None
        )
        if divergence is not None:
            loss = loss + c.kl * (weight * divergence).sum() / total
        [d_logp] = torch.autograd.grad(loss, x)
    d_entropy = -c.entropy / total * weight
    stats = dict(
        clip_share=(batch.weight * ((slope == 0) & (batch.advantages != 0))).sum(),
        dlogp_square=d_logp.square().sum(),
    )
    if divergence is not None:
        stats["kl"] = (batch.weight * divergence.detach()).sum()
    return (
        loss.detach() + (d_entropy * entropy).sum(),
        d_logp,
        d_entropy if c.entropy else None,
        stats,
    )


def compute_token_weights(batch: MicroBatch, o: Objective) -> torch.Tensor:
    """w (N,): identical siblings; in a mean over sequences shared by the tokens of each. A batch
    holds rollouts whole.
    """
    if o.agg_mode != "sequence":
        return batch.weight
    _, index, size = batch.rollout.unique(return_inverse=True, return_counts=True)
    return batch.weight / size[index]
