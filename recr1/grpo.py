"""GRPO's family: advantages, gains, KL estimators, and the one line of the loop, `policy_loss`.
Plain tensors in, plain tensors out.

    loss = sum_t w_t (-gain_t + kl KL_t - entropy H_t) / total

A loss is an advantage, a gain per token and an average; RECIPES names those of the papers, and
`loss.kind`, `loss.advantage` take a function of yours (`module:function`) with the same signature.
w_t counts identical siblings; `total` is the average's denominator over the whole optimiser step,
all ranks and micro-batches. Masks do not exist: a Batch holds real tokens only.

Legend: P prompts, G group, R = P*G rollouts, N trained tokens, n of a chunk.
"""

from dataclasses import dataclass, replace
from typing import Callable

import torch

from . import named
from .config import ConfigError, Loss, Model
from .kernels.group_loss import GroupPull, Known, Rule
from .policy import score, score_loss
from .records import Batch, Rollout

# --- advantages: rewards (P, G) -> (P, G) ---------------------------------------------------------------------------------------


def mean_std(r: torch.Tensor, c: Loss) -> torch.Tensor:
    """(r - mean) / (std + std_floor), unbiased std (GRPO: DeepSeekMath, arXiv 2402.03300, section
    4.1.2).
    """
    return mean(r, c) / (r.std(1, keepdim=True) + c.std_floor)


def mean(r: torch.Tensor, c: Loss) -> torch.Tensor:
    """r - mean: no group counts for more because its rewards lie close together (Dr. GRPO, arXiv
    2503.20783, section 3.2).
    """
    return r - r.mean(1, keepdim=True)


def leave_one_out(r: torch.Tensor, c: Loss) -> torch.Tensor:
    """r - the mean of its siblings, an unbiased baseline (RLOO, arXiv 2402.14740, section 2.2)."""
    return mean(r, c) * r.shape[1] / (r.shape[1] - 1)


def group_advantages(
    rewards: torch.Tensor, group_size: int, advantage: Callable, c: Loss
) -> torch.Tensor:
    """`advantage` over each group of adjacent siblings. rewards (R,) -> (R,).

    A group of equal rewards is exactly 0, never the rounding of its mean divided by a tiny floor.
    """
    if not len(rewards):
        return rewards  # a rank without a share
    r = rewards.view(-1, group_size)  # (P, G)
    same = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)
    return torch.where(same, 0.0, advantage(r, c)).flatten()


# --- gains: log-probs (n,) -> what each token adds to the objective, (n,), to be made large --------------------------------------
# old (n,): log-probs under the policy that sampled, without gradient; one optimiser step per batch:
# logp itself, ratio 1.


def clipped(logp: torch.Tensor, old: torch.Tensor, batch: Batch, c: Loss) -> torch.Tensor:
    """min(rho A, clip(rho, 1 - clip, 1 + clip_high) A), rho = e^(logp - old) (DeepSeekMath, eq. 3;
    DAPO, arXiv 2503.14476, eq. 8).
    """
    rho = (logp - old).exp()
    return torch.minimum(rho * batch.adv, rho.clamp(1 - c.clip, 1 + c.high) * batch.adv)


def sequence_clipped(logp: torch.Tensor, old: torch.Tensor, batch: Batch, c: Loss) -> torch.Tensor:
    """The same with one rho per rollout: e^mean_t(logp - old) (GSPO, arXiv 2507.18071, eq. 5-7)."""
    _, index, size = batch.rollout.unique(return_inverse=True, return_counts=True)
    mean_log = (
        torch.zeros(len(size), dtype=logp.dtype, device=logp.device).index_add(0, index, logp - old)
        / size
    )
    return clipped(mean_log.index_select(0, index), torch.zeros_like(old), batch, c)


def cispo(logp: torch.Tensor, old: torch.Tensor, batch: Batch, c: Loss) -> torch.Tensor:
    """sg(min(rho, 1 + clip_high)) A logp: weights are cut, gradients never (CISPO, MiniMax-M1,
    arXiv 2506.13585, eq. 4-5).
    """
    return (logp.detach() - old).exp().clamp(max=1 + c.high) * batch.adv * logp


def reinforce(logp: torch.Tensor, old: torch.Tensor, batch: Batch, c: Loss) -> torch.Tensor:
    """A logp (Williams 1992); `old` has no part in it, so it is meant for one optimiser step per
    batch.
    """
    return batch.adv * logp


for gain in (clipped, cispo, reinforce):
    # a token's gain depends on that token alone: head: one_shot may cut the batch into chunks
    gain.per_token = True


# --- KL(policy || reference) per token, d = ref - logp (Schulman 2020, "Approximating KL divergence") ----------------------------


def k1(logp: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """-d: unbiased; in the loss its gradient is 0 in the mean, so it belongs into the reward."""
    return logp - ref


def k2(logp: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """d^2 / 2: biased, but its gradient is that of the KL."""
    return (ref - logp).square() / 2


def k3(logp: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """e^d - 1 - d: unbiased and never negative."""
    d = ref - logp
    # not exp(d) - 1 - d: that is noise, even negative, for small d in float32
    return torch.expm1(d) - d


KL = {"k1": k1, "k2": k2, "k3": k3}
ADVANTAGES = {f.__name__: f for f in (mean_std, mean, leave_one_out)}
# gain, advantage, average (token: mean over all tokens; sequence: mean over rollouts of their
# means; constant: sum over R * max_new_tokens)
RECIPES = {
    # Rec-R1's verl; average: sequence is DeepSeekMath's own eq. 3
    "grpo": (clipped, "mean_std", "token"),
    "dr_grpo": (clipped, "mean", "constant"),  # arXiv 2503.20783, section 3
    # arXiv 2503.14476, eq. 8-12: with clip_high, sampling.resample, reward.overlong
    "dapo": (clipped, "mean_std", "token"),
    "gspo": (sequence_clipped, "mean_std", "sequence"),
    "cispo": (cispo, "mean_std", "token"),
    "rloo": (reinforce, "leave_one_out", "token"),
    "reinforce": (reinforce, "mean", "token"),  # with the group's mean as baseline
}


@dataclass(frozen=True)
class Objective:
    """A loss with its names resolved: what `policy_loss` and the loop need of the config."""

    config: Loss
    gain: Callable
    advantage: Callable
    average: str
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
            and self.gain in (clipped, cispo)
            and self.average != "sequence"
            and c.entropy == 0
            and (c.kl == 0 or c.kl_in == "reward" or c.kl_estimator == "k3")
        )


def objective(c: Loss, model: Model) -> Objective:
    """Resolves loss.kind, loss.advantage, loss.average. Raises ConfigError."""
    gain, name, average = RECIPES.get(c.kind) or (
        named.function("loss.kind", c.kind, RECIPES),
        "mean_std",
        "token",
    )
    name = c.advantage or name
    advantage = ADVANTAGES.get(name) or named.function("loss.advantage", name, ADVANTAGES)
    if model.head == "one_shot" and not getattr(gain, "per_token", False):
        raise ConfigError(
            f"loss.kind: {c.kind} needs whole rollouts, or does not say that it needs none (function.per_token = True); "
            "set model.head=recompute"
        )
    return Objective(c, gain, advantage, c.average or average, model.head, model.kernels)


def denominator(texts: list[Rollout], average: str, max_new_tokens: int) -> int:
    """This rank's part of `total`; texts count for their identical siblings."""
    siblings = sum(r.count for r in texts)
    return {
        "token": sum(r.count * len(r.ids) for r in texts),
        "sequence": siblings,
        "constant": siblings * max_new_tokens,
    }[average]


def policy_loss(
    model: torch.nn.Module, batch: Batch, total: float, temperature: float, o: Objective
):
    """A micro-batch -> (loss, scalar with gradient; logp (N,); statistics, sums over its tokens).

    head one_shot: the loss goes down to the head, which makes gradients chunk by chunk. recompute:
    log-probs come up, the loss is made of all of them. Either way d loss / d logp and d entropy,
    (N,), come from `pull`.
    """
    weight = token_weights(batch, o)
    sums: dict[str, torch.Tensor] = {}

    def by_tokens(logp, entropy, rows):
        cut = {
            name: x[rows]
            for name, x in vars(batch).items()
            if name not in ("tokens", "positions", "layout") and x is not None
        }
        part, *gradients, stats = pulled(
            logp, entropy, replace(batch, **cut), weight[rows], total, o
        )
        for name, value in stats.items():
            sums[name] = sums.get(name, 0.0) + value
        return part, *gradients

    pull = _fused(batch, total, o) if o.fused else by_tokens
    if o.head == "one_shot":
        loss, logp, entropy = score_loss(model, batch, temperature, pull, o.kernels)
    else:
        logp, entropy = score(model, batch, temperature, o.kernels)
        loss = Known.apply(
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


def _fused(batch: Batch, total: float, o: Objective) -> GroupPull:
    """The same loss by its kernel; every token is given its own advantage."""
    c = o.config
    kl = c.kl if c.kl_in == "loss" else 0.0
    rule = Rule(
        clip_low=1.0 if o.gain is cispo else c.clip,
        clip_high=c.high,
        kl=kl,
        cispo=o.gain is cispo,
        sampler_cap=c.importance_cap,
    )
    return GroupPull(
        rule,
        None,
        torch.arange(len(batch.target), device=batch.target.device),
        batch.weight,
        batch.sampler_logp,
        total,
        batch.old_logp,
        batch.ref_logp if kl else None,
        batch.adv,
    )


def pulled(
    logp: torch.Tensor,
    entropy: torch.Tensor,
    batch: Batch,
    weight: torch.Tensor,
    total: float,
    o: Objective,
):
    """(loss of these tokens, d loss / d logp (n,), d loss / d entropy (n,) or None, statistics)."""
    c = o.config
    with torch.enable_grad():
        x = logp.detach().requires_grad_()
        old = logp if batch.old_logp is None else batch.old_logp
        gain = o.gain(x, old, batch, c)  # (n,)
        [slope] = torch.autograd.grad(gain.sum(), x, retain_graph=True)
        # truncated importance sampling: the sampler's arithmetic is another (Yao et al. 2025)
        if c.importance_cap > 0:
            gain = gain * (old - batch.sampler_logp).exp().clamp(max=c.importance_cap)
        loss = -(weight * gain).sum() / total
        # (n,)
        divergence = (
            KL[c.kl_estimator](x, batch.ref_logp) if c.kl > 0 and c.kl_in == "loss" else None
        )
        if divergence is not None:
            loss = loss + c.kl * (weight * divergence).sum() / total
        [d_logp] = torch.autograd.grad(loss, x)
    d_entropy = -c.entropy / total * weight
    stats = dict(
        clip_share=(batch.weight * ((slope == 0) & (batch.adv != 0))).sum(),
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


def kl_of_rollouts(batches: list[Batch], count: int, estimator: str) -> torch.Tensor:
    """KL to the reference summed over each packed rollout's tokens, (count,): what `kl_in: reward`
    takes off the rewards. Uses the sampler's log-probs.
    """
    sums = torch.zeros(count + 1)  # the last one: idle batches' rollout -1
    for b in batches:
        sums.index_add_(
            0, b.rollout.cpu() % (count + 1), KL[estimator](b.sampler_logp, b.ref_logp).cpu()
        )
    return sums[:count]


def token_weights(batch: Batch, o: Objective) -> torch.Tensor:
    """w (N,): identical siblings; in a mean over sequences shared by the tokens of each. A batch
    holds rollouts whole.
    """
    if o.average != "sequence":
        return batch.weight
    _, index, size = batch.rollout.unique(return_inverse=True, return_counts=True)
    return batch.weight / size[index]
