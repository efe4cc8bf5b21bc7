"""Rec-R1 by GRPO: python -m recr1.train experiments/quickstart.yaml [a.b=value ...]

The loop reads as the algorithm (arXiv 2402.03300, algorithm 1, with one optimiser step per batch of rollouts).
"""
from __future__ import annotations

import copy
import sys
from dataclasses import replace

import torch

from . import config as configs
from .grpo import group_advantages, policy_loss
from .log import step_row, token_values
from .model import Decoder
from .optim import Optimizer
from .packing import distinct, pack
from .policy import score
from .records import Batch, Rollout
from .run import Run, guarded
from .sample import generate, new_cache


def main(argv: list[str]) -> None:
    if not argv:
        raise configs.ConfigError("usage: python -m recr1.train CONFIG.yaml [a.b=value ...]")
    cfg = configs.load(argv[0], argv[1:])
    run = Run(cfg)
    policy, sampling = run.policy, cfg.sampling
    reference = copy.deepcopy(policy).requires_grad_(False) if cfg.loss.kl > 0 else None
    optimizer, cache = Optimizer(policy, cfg.optimizer, cfg.train.steps), new_cache(policy)

    before = run.test_scores("eval_before.jsonl")
    for step in run.steps():
        prompts = run.prompts(step)                                                          # P prompts
        with run.log.phase("sample"):                                                        # R = P * G, siblings adjacent
            rollouts = generate(policy, prompts, sampling.group_size, sampling.temperature, sampling.max_new_tokens, run.stops,
                                run.uniforms(step, prompts), cache)
        with run.log.phase("reward"):
            rewards = run.train_task.score(rollouts)                                         # the retriever runs here
        adv = group_advantages(torch.tensor([r.total for r in rewards]), sampling.group_size, cfg.loss.std_floor)   # (R,)
        total = sum(len(r.ids) for r in rollouts)                                            # the one denominator

        with run.log.phase("train"):
            texts, first = distinct(rollouts)                                                # identical siblings: one row, counted
            trained = [i for i, a in enumerate(adv[first]) if a != 0 or cfg.loss.kl > 0]     # the loss multiplies the others by 0
            batches = with_reference(reference, pack([texts[i] for i in trained], cfg.train.tokens_per_micro_batch), sampling.temperature)
            kept = every_token(policy, reference, texts, cfg) if run.keeps_tokens(step) else None
            sums: list[dict] = []
            for batch in with_advantages(batches, adv[first][trained]):
                logp, entropy = score(policy, batch, sampling.temperature)                   # (N,)
                loss, stats = policy_loss(logp, batch, total, cfg.loss.clip, cfg.loss.kl)
                loss.backward()
                run.log.gap(logp, batch)
                sums.append(stats | dict(entropy=(batch.weight * entropy).sum().item(), trained=batch.weight.sum().item()))
            grad_norm, lr = optimizer.step(step - 1)

        row = step_row(step, rollouts, rewards, adv, sampling.group_size, sums, grad_norm=grad_norm, lr=lr, skipped=optimizer.skipped)
        run.record(step, row, texts, [rewards[i] for i in first], adv[first].tolist(), kept)
    after = run.test_scores("eval_after.jsonl")
    run.finish(before, after)


@torch.no_grad()
def with_reference(reference: Decoder | None, batches: list[Batch], temperature: float) -> list[Batch]:
    """Adds ref_logp (N,), the frozen initial policy's; unchanged when there is none."""
    return batches if reference is None else [replace(b, ref_logp=score(reference, b, temperature)[0]) for b in batches]


def with_advantages(batches: list[Batch], adv: torch.Tensor) -> list[Batch]:
    """Adds adv (N,): each token has its rollout's. adv counts along the list that was packed."""
    return [replace(b, adv=adv[b.rollout]) for b in batches]


@torch.no_grad()
def every_token(policy: Decoder, reference: Decoder | None, texts: list[Rollout], cfg: configs.Config) -> list[dict]:
    """Per-token values of all the step's texts before its update, untrained ones too, for rollouts.jsonl.gz."""
    batches = with_reference(reference, pack(texts, cfg.train.tokens_per_micro_batch), cfg.sampling.temperature)
    scored = [score(policy, batch, cfg.sampling.temperature) for batch in batches]
    # one optimiser step per batch: the old policy is the one being trained (DESIGN decision 2)
    return token_values(len(texts), batches, [dict(trainer_logp=logp, ref_logp=b.ref_logp, old_logp=logp, entropy=entropy)
                                              for b, (logp, entropy) in zip(batches, scored)])


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
