"""Rec-R1 by GRPO: python -m recr1.train experiments/quickstart.yaml [a.b=value ...]

The loop reads as the algorithm (arXiv 2402.03300, algorithm 1, with one optimiser step per batch of rollouts).
"""
from __future__ import annotations

import sys
from dataclasses import replace

import torch

from . import config as configs
from . import dist
from .dryrun import shrunk
from .fsdp import Sharded, gathered
from .grpo import group_advantages, policy_loss
from .log import Step, say, token_values
from .optim import Optimizer
from .packing import distinct, in_step, pack
from .policy import score
from .records import Batch, Rollout
from .run import Run, guarded
from .sample import generate, new_cache


USAGE = "usage: python -m recr1.train CONFIG.yaml [a.b=value ...] [--dry-run], or torchrun --nproc-per-node N -m recr1.train ..."


def main(argv: list[str]) -> None:
    config, *overrides = [a for a in argv if a != "--dry-run"] or [""]
    if not config or config.startswith("-"):
        raise configs.ConfigError(USAGE)
    cfg = configs.load(config, overrides)
    if "--dry-run" not in argv:
        return train(cfg)
    with shrunk(cfg, config) as tiny:
        train(tiny)
    say(f"dry run passed: {config}")


def train(cfg: configs.Config) -> None:
    run = Run(cfg)
    policy, reference, sampling = run.policy, run.reference, cfg.sampling
    optimizer = Optimizer(policy, cfg.optimizer, cfg.train.steps)
    with gathered(policy):
        cache = new_cache(policy)

    before = run.test_scores("eval_before.jsonl")
    for step in run.steps():
        prompts = run.prompts(step)                                                          # P prompts, each rank its share
        with run.log.phase("sample"), gathered(policy):                                      # R = P * G, siblings adjacent
            rollouts = generate(policy, prompts, sampling.group_size, sampling.temperature, sampling.max_new_tokens, run.stops,
                                run.uniforms(step, prompts), cache)
        with run.log.phase("reward"):
            rewards = run.train_task.score(rollouts)                                         # the retriever runs here
        adv = group_advantages(torch.tensor([r.total for r in rewards]), sampling.group_size, cfg.loss.std_floor)   # (R,)
        [total] = dist.total(sum(len(r.ids) for r in rollouts))                              # the one denominator

        with run.log.phase("train"):
            texts, first = distinct(rollouts)                                                # identical siblings: one row, counted
            trained = [i for i, a in enumerate(adv[first]) if a != 0 or cfg.loss.kl > 0]     # the loss multiplies the others by 0
            batches = with_reference(reference, micro_batches([texts[i] for i in trained], cfg), sampling.temperature)
            kept = every_token(policy, reference, texts, cfg) if run.keeps_tokens(step) else None
            done = Step(rollouts, rewards, adv.tolist(), texts, first, kept)
            for batch in with_advantages(batches, adv[first][trained]):
                logp, entropy = score(policy, batch, sampling.temperature)                   # (N,)
                loss, stats = policy_loss(logp, batch, total, cfg.loss.clip, cfg.loss.kl)
                loss.backward()
                done.gap(logp, batch)
                done.sums.append(stats | dict(entropy=(batch.weight * entropy).sum().item(), trained=batch.weight.sum().item()))
            grad_norm, lr = optimizer.step(step - 1)

        run.record(step, done, grad_norm=grad_norm, lr=lr, skipped=optimizer.skipped)
    after = run.test_scores("eval_after.jsonl")
    run.finish(before, after)


def micro_batches(texts: list[Rollout], cfg: configs.Config) -> list[Batch]:
    """Packed by the token budget, as many on every rank."""
    return in_step(pack(texts, cfg.train.tokens_per_micro_batch, dist.device()), dist.device())


@torch.no_grad()
def with_reference(reference: Sharded | None, batches: list[Batch], temperature: float) -> list[Batch]:
    """Adds ref_logp (N,), the frozen initial policy's; unchanged when there is none."""
    return batches if reference is None else [replace(b, ref_logp=score(reference, b, temperature)[0]) for b in batches]


def with_advantages(batches: list[Batch], adv: torch.Tensor) -> list[Batch]:
    """Adds adv (N,): each token has its rollout's, an idle one 0. adv counts along the list that was packed."""
    adv = torch.cat([adv, adv.new_zeros(1)])                                                 # rollout -1
    return [replace(b, adv=adv.to(b.tokens.device)[b.rollout]) for b in batches]


@torch.no_grad()
def every_token(policy: Sharded, reference: Sharded | None, texts: list[Rollout], cfg: configs.Config) -> list[dict]:
    """Per-token values of all the step's texts before its update, untrained ones too, for rollouts.jsonl.gz."""
    batches = with_reference(reference, micro_batches(texts, cfg), cfg.sampling.temperature)
    scored = [score(policy, batch, cfg.sampling.temperature) for batch in batches]
    # one optimiser step per batch: the old policy is the one being trained (DESIGN decision 2)
    return token_values(len(texts), batches, [dict(trainer_logp=logp, ref_logp=b.ref_logp, old_logp=logp, entropy=entropy)
                                              for b, (logp, entropy) in zip(batches, scored)])


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
