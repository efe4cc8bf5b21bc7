"""The head, the loss and the choice of the next token against their formulas in float64.

The oracle is written here, in plain torch, and shares no code with what it checks.

Legend: N trained tokens, C width, V vocabulary, B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from gpu_sections.report import Report
from gpu_sections.setting import Setting, relative_error

from recr1.kernels import logprob
from recr1.kernels.group_loss import GroupTokenLoss, LossRule
from recr1.kernels.logprob import fused_linear_loss, linear_log_probs, make_token_loss
from recr1.kernels.sample_token import sample_token, triton_sample_token
from recr1.model.log_probs import make_distribution

TEMPERATURE = 0.6
CLIP = 0.2  # on both sides
TOP_P = 0.9

LOGP_BAR = 0.1  # nats: bfloat16 rounds a logit of 14 by up to .03, and 1 / T makes .05 of it
GRADIENT_BAR = 3e-2  # relative: the same rounding in every ratio, and bfloat16's own


class HeadCase(NamedTuple):
    """The inputs of head and loss."""

    hidden: torch.Tensor  # (N, C)
    weight: torch.Tensor  # (V, C)
    target: torch.Tensor  # (N,)
    advantages: torch.Tensor  # (N,)
    old_logp: torch.Tensor  # (N,)


class Outcome(NamedTuple):
    """What a head has computed."""

    logp: torch.Tensor  # (N,)
    d_hidden: torch.Tensor  # (N, C)
    d_weight: torch.Tensor  # (V, C)


def check_head(report: Report, setting: Setting) -> None:
    """Head and clipped loss, fused and recomputed, in torch and Triton, against float64."""
    case = make_case(setting)
    want = compute_exactly(case)
    for kernels in setting.kernels:
        for name, run in HEADS.items():
            if name == "joined with the loss" and kernels != "triton":
                continue  # only Triton has it
            actual = run(case, kernels)
            title = f"{name}, {kernels}"
            largest = (actual.logp.double() - want.logp).abs().max().item()
            report.at_most(f"{title}: log-prob, largest error in nats", largest, LOGP_BAR)
            error = relative_error(actual.d_hidden, want.d_hidden)
            report.at_most(f"{title}: d_hidden", error, GRADIENT_BAR)
            error = relative_error(actual.d_weight, want.d_weight)
            report.at_most(f"{title}: d_weight", error, GRADIENT_BAR)
    if "triton" not in setting.kernels:
        report.skip("Triton's heads", "Triton cannot run here")


def make_case(setting: Setting) -> HeadCase:
    """Draw the inputs: more tokens than a chunk of the head has, an odd vocabulary.

    The ratios are e^0, e^.5 and e^-.5: none so near to the clip that rounding decides.
    """
    N = setting.pick(1280, 12)
    C = setting.pick(896, 16)
    V = setting.reachable
    hidden = setting.draw(N, C)
    weight = setting.draw(V, C, std=3 * C**-0.5)
    target = setting.draw_ids(N)
    advantages = setting.draw(N, dtype=torch.float32)

    logits = hidden.double() @ weight.double().T / TEMPERATURE
    logp = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    shift = torch.tensor([0.0, 0.5, -0.5]).repeat(N)[:N].to(setting.device)
    old_logp = (logp - shift).float()
    return HeadCase(hidden, weight, target, advantages, old_logp)


def clipped_loss(logp: torch.Tensor, case: HeadCase, rows: slice) -> torch.Tensor:
    """Compute DeepSeekMath's eq. 3 without KL, a mean over all N tokens; logp is of `rows`."""
    A = case.advantages[rows].to(logp.dtype)
    ratio = (logp - case.old_logp[rows].to(logp.dtype)).exp()
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - CLIP, 1 + CLIP) * A)
    return -surrogate.sum() / len(case.target)


def compute_exactly(case: HeadCase) -> Outcome:
    """Compute log-probs and gradients in float64, all logits at once."""
    hidden = case.hidden.double().requires_grad_()
    weight = case.weight.double().requires_grad_()
    log_softmax = (hidden @ weight.T / TEMPERATURE).log_softmax(-1)
    logp = log_softmax.gather(1, case.target[:, None])[:, 0]
    loss = clipped_loss(logp, case, slice(None))
    return Outcome(logp.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def make_leaves(case: HeadCase) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden and weight as leaves of a graph of their own."""
    hidden = case.hidden.detach().clone().requires_grad_()
    weight = case.weight.detach().clone().requires_grad_()
    return hidden, weight


def run_fused(case: HeadCase, kernels: str) -> Outcome:
    token_loss = make_token_loss(lambda logp, rows: clipped_loss(logp, case, rows))
    return run_token_loss(case, token_loss, kernels)


def run_joined(case: HeadCase, kernels: str) -> Outcome:
    N = len(case.target)
    token_loss = GroupTokenLoss(
        LossRule(clip_ratio_low=CLIP, clip_ratio_high=CLIP),
        rewards=None,
        rollout=torch.arange(N, device=case.target.device),
        weight=torch.ones_like(case.old_logp),
        sampler_logp=case.old_logp,
        denominator=float(N),
        old_logp=case.old_logp,
        advantages=case.advantages,
    )
    return run_token_loss(case, token_loss, kernels)


def run_token_loss(case: HeadCase, token_loss: logprob.TokenLoss, kernels: str) -> Outcome:
    hidden, weight = make_leaves(case)
    loss, logp, _ = fused_linear_loss(
        hidden, weight, case.target, TEMPERATURE, make_distribution, token_loss, kernels
    )
    return Outcome(logp, *torch.autograd.grad(loss, (hidden, weight)))


def run_recomputed(case: HeadCase, kernels: str) -> Outcome:
    hidden, weight = make_leaves(case)
    logp, _ = linear_log_probs(hidden, weight, case.target, TEMPERATURE, make_distribution, kernels)
    loss = clipped_loss(logp, case, slice(None))
    return Outcome(logp.detach(), *torch.autograd.grad(loss, (hidden, weight)))


HEADS: dict[str, Callable[[HeadCase, str], Outcome]] = {
    "fused": run_fused,
    "recompute": run_recomputed,
    "joined with the loss": run_joined,
}


# --- the next token -------------------------------------------------------------------------------


class Draws(NamedTuple):
    """What the next tokens are chosen from."""

    logits: torch.Tensor  # (B, V), rows that start aligned
    uniforms: torch.Tensor  # (B, 1) float64
    p: torch.Tensor  # (B, V) float64


def check_sampling(report: Report, setting: Setting) -> None:
    """The next token by inverse CDF, top-p and greedy, in torch and Triton, against float64."""
    draws = make_draws(setting)
    want_ids = invert_cdf(draws.p, draws.uniforms)
    nucleus_ids = invert_cdf(cut_to_nucleus(draws.p), draws.uniforms)
    greedy_ids = (draws.logits == draws.logits.amax(-1, keepdim=True)).int().argmax(-1)

    for kernels in setting.kernels:
        choose = choose_by_triton if kernels == "triton" else choose_by_torch
        sampled = choose(draws, draws.uniforms, 1.0)
        share = compute_share_equal(sampled.ids, want_ids)
        report.at_least(f"{kernels}: rows with the id of float64's CDF", share, 0.99)

        want_logp = draws.p.gather(1, sampled.ids).log()
        largest = (sampled.logp.double() - want_logp).abs().max().item()
        report.at_most(f"{kernels}: log-prob of the id, largest error in nats", largest, 1e-3)

        nucleus = choose(draws, draws.uniforms, TOP_P)
        share = compute_share_equal(nucleus.ids, nucleus_ids)
        report.at_least(f"{kernels}: the same with top_p {TOP_P}", share, 0.98)

        greedy = choose(draws, None, 1.0)
        share = compute_share_equal(greedy.ids, greedy_ids[:, None])
        report.equals(f"{kernels}: rows with the lowest of the most likely ids", share, 1.0)
        if kernels == "triton":
            compare_with_statistics(report, draws, sampled.ids, sampled.logp)
    if "triton" not in setting.kernels:
        report.skip("Triton's choice", "Triton cannot run here")


def make_draws(setting: Setting) -> Draws:
    """Draw logits as a decode step has them."""
    B = setting.pick(384, 16)
    V = setting.reachable
    stride = -(-V // 16) * 16
    logits = setting.draw(B, stride, std=3.0)[:, :V]
    p = (logits.double() / TEMPERATURE).softmax(-1)
    return Draws(logits, setting.draw_uniforms(B, 1), p)


def invert_cdf(p: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return the first id whose cumulative probability is above the uniform, (B, 1)."""
    cdf = p.cumsum(-1)
    return (cdf <= uniforms * cdf[:, -1:]).sum(-1, keepdim=True)


def cut_to_nucleus(p: torch.Tensor) -> torch.Tensor:
    """Set to 0 what is outside the fewest most likely ids that hold TOP_P (arXiv 1904.09751, 3.1).

    Whatever is as likely as the least likely of them stays.
    """
    descending = p.sort(-1, descending=True).values
    mass_before = descending.cumsum(-1) - descending
    least_likely = descending.where(mass_before < TOP_P, 2.0).amin(-1, keepdim=True)
    return p.where(p >= least_likely, 0.0)


def choose_by_torch(draws: Draws, uniforms: torch.Tensor | None, top_p: float):
    return sample_token(make_distribution(draws.logits, TEMPERATURE), uniforms, top_p)


def choose_by_triton(draws: Draws, uniforms: torch.Tensor | None, top_p: float):
    return triton_sample_token(draws.logits, TEMPERATURE, uniforms, top_p)


def compute_share_equal(actual: torch.Tensor, want: torch.Tensor) -> float:
    return (actual == want).double().mean().item()


def compare_with_statistics(
    report: Report, draws: Draws, ids: torch.Tensor, logp: torch.Tensor
) -> None:
    """Check that the sampler's log-prob is the trainer's, to the bit: both are of one function."""
    B = len(ids)
    statistics = [torch.empty(B, device=ids.device) for _ in range(3)]
    logprob.compute_statistics(draws.logits, ids[:, 0].contiguous(), TEMPERATURE, *statistics)
    difference = (statistics[0] - logp[:, 0]).abs().max().item()
    report.equals("triton: log-prob of sampler and trainer differ by", difference, 0.0)
