"""Rec-R1 by GRPO: python -m recr1.train experiments/quickstart.yaml [a.b=value ...]

`train` reads as the algorithm (arXiv 2402.03300, algorithm 1); below it stand its steps, in the
order in which they are called.
"""

import sys
from dataclasses import replace

import torch

from recr1.config.schema import Config
from recr1.data_types import MicroBatch, Reward, Rollout
from recr1.distributed import collectives as dist, heartbeat
from recr1.distributed.fsdp import Sharded, unsharded
from recr1.model.log_probs import compute_log_probs
from recr1.rl.advantages import compute_group_advantages
from recr1.rl.async_rewards import AsyncRewards
from recr1.rl.kl import sum_kl_by_rollout
from recr1.rl.losses import resolve_objective
from recr1.rl.packing import deduplicate, pack_rollouts, pad_to_same_count
from recr1.rl.policy_loss import compute_policy_loss, count_denominator
from recr1.sampling.generate import generate, make_cache
from recr1.tracking.step_metrics import StepRecord, collect_token_values
from recr1.training.launch import launch_loop, run_command
from recr1.training.optimizer import Optimizer
from recr1.training.run import Run
from recr1.utils.interrupts import raise_on_signal, signal_handlers


def main(argv: list[str]) -> None:
    launch_loop(argv, "recr1.train", train)


def train(cfg: Config) -> None:
    run = Run(cfg)
    policy = run.policy
    loss = resolve_objective(cfg.loss, cfg.model)
    # the KL's place: the loss, or the reward
    in_loss = run.reference if cfg.loss.kl_in == "loss" else None
    optimizer = Optimizer(policy, cfg.optimizer, cfg.train.steps * cfg.train.inner_steps)
    with unsharded(policy):  # fresh pages are dear on a CPU; on a GPU training needs the room
        cache = make_cache(policy) if dist.device().type == "cpu" else None

    with run.resume_or_start(
        optimizer
    ):  # from the last checkpoint; when asked to stop, it saves one
        before = run.evaluate_test("eval_before.jsonl")
        for step in run.steps():
            with unsharded(policy), dist.fail_together(), raise_on_signal():
                # R = P * G, siblings adjacent; P is this rank's share
                rollouts, rewards, drawn = sample_and_score(run, step, cache)
            with run.log.time_phase("train"):
                texts, first = deduplicate(rollouts)  # identical siblings: one row, counted
                # (R,), 0 where the loss has it
                divergence = compute_kl_penalty(
                    None if in_loss else run.reference, texts, rollouts, cfg
                )
                totals = torch.tensor([r.total for r in rewards]) - cfg.loss.kl * divergence  # (R,)
                # (R,)
                adv = compute_group_advantages(
                    totals, cfg.sampling.group_size, loss.advantage, cfg.loss
                )
                kept = (
                    log_token_values(policy, run.reference, texts, cfg)
                    if run.logs_tokens(step)
                    else None
                )
                done = StepRecord(
                    rollouts,
                    rewards,
                    adv.tolist(),
                    texts,
                    first,
                    drawn,
                    kept,
                    [dict(kl=divergence.sum().item())] if run.reference else [],
                )
                # one, unless train.inner_steps > 1
                for total, batches in make_updates(
                    policy, in_loss, texts, adv[first], cfg, loss.agg_mode
                ):
                    for i, batch in enumerate(batches, 1):
                        heartbeat.enter_phase(f"train {i}/{len(batches)}")
                        # the last backward sums over ranks
                        policy.hold = cfg.train.reduce == "step" and i < len(batches)
                        value, logp, stats = compute_policy_loss(
                            policy, batch, total, cfg.sampling.temperature, loss
                        )
                        value.backward()
                        done.add(value, logp, batch, stats)
                        run.stop_if_asked()
                    grad_norm, lr = run.optimizer_step(step, batches, done)
            run.finish_step(step, done, grad_norm=grad_norm, lr=lr, skipped=optimizer.num_skipped)
        after = run.evaluate_test("eval_after.jsonl")
    run.write_results(before, after)


def sample_and_score(run: Run, step: int, cache) -> tuple[list[Rollout], list[Reward], int]:
    """Rollouts and rewards of this rank's prompts, or of a replayed step, and how many groups were
    drawn for them.

    Groups whose rewards are all equal teach nothing: with sampling.resample other prompts are drawn
    in their place, that many times (DAPO, arXiv 2503.14476, section 3.2). What is then still
    missing is filled with them.
    """
    if run.replay:
        return run.replay.step(step)
    s = run.cfg.sampling
    groups = []
    idle = []
    drawn = 0
    wanted = len(run.prompts(step))
    for turn in range(1 + s.resample):
        prompts = run.prompts(step, turn)[: wanted - len(groups)]
        # the retriever runs here, on groups that have ended
        scored = AsyncRewards(run.train_scorer.score, run.scores_async)
        with run.log.time_phase("sample"):
            rollouts = generate(
                run.policy,
                prompts,
                s.group_size,
                s.temperature,
                s.max_new_tokens,
                run.stops,
                run.draw_uniforms(step, prompts),
                cache,
                top_p=s.top_p,
                max_cache_tokens=run.get_kv_cache_budget(),
                kernels=run.cfg.model.kernels,
                on_group_finished=scored.submit,
            )
        with run.log.time_phase("reward"):
            rewards = scored.results()  # what is still to be done: the step waits for it
        drawn += len(prompts)
        for i in range(0, len(rollouts), s.group_size):
            group = slice(i, i + s.group_size)
            same = s.resample and len({r.total for r in rewards[group]}) == 1
            (idle if same else groups).append((rollouts[group], rewards[group]))
        if len(groups) == wanted:
            break
    groups = [*groups, *idle][:wanted]
    return (
        [replace(r, group=g) for g, (mine, _) in enumerate(groups) for r in mine],
        [r for _, mine in groups for r in mine],
        drawn,
    )


def make_updates(
    policy: Sharded,
    reference: Sharded | None,
    texts: list[Rollout],
    adv: torch.Tensor,
    cfg: Config,
    average: str,
) -> list[tuple[float, list[MicroBatch]]]:
    """(the loss's denominator, micro-batches) of each optimiser step on these rollouts; adv
    (texts,). Equal shares of the prompts.

    What the loss multiplies by 0 is left out: groups without variance, unless a KL in the loss
    reaches them too.
    """
    groups = texts[-1].group + 1 if texts else 0
    steps = cfg.train.inner_steps
    made = []
    for k in range(steps):
        share = [i for i, r in enumerate(texts) if r.group * steps // groups == k]
        [total] = dist.all_reduce_sum(
            count_denominator([texts[i] for i in share], average, cfg.sampling.max_new_tokens)
        )
        trained = [i for i in share if adv[i] != 0 or reference]
        batches = add_advantages(
            add_ref_logp(
                reference,
                make_micro_batches([texts[i] for i in trained], cfg),
                cfg.sampling.temperature,
            ),
            adv[trained],
        )
        if cfg.train.replay:  # whoever wrote these texts, it was not this policy
            batches = [replace(b, old_logp=b.sampler_logp) for b in batches]
        elif steps > 1:
            batches = add_old_logp(policy, batches, cfg.sampling.temperature)
        made.append((max(1, total), batches))
    return made


def make_micro_batches(texts: list[Rollout], cfg: Config) -> list[MicroBatch]:
    """Packed by the token budget, as many on every rank."""
    return pad_to_same_count(
        pack_rollouts(texts, cfg.train.tokens_per_micro_batch, dist.device()), dist.device()
    )


@torch.no_grad()
def add_ref_logp(
    reference: Sharded | None, batches: list[MicroBatch], temperature: float
) -> list[MicroBatch]:
    """Adds ref_logp (N,), the frozen initial policy's; unchanged when there is none."""
    return (
        batches
        if reference is None
        else [replace(b, ref_logp=compute_log_probs(reference, b, temperature)[0]) for b in batches]
    )


@torch.no_grad()
def add_old_logp(
    policy: Sharded, batches: list[MicroBatch], temperature: float
) -> list[MicroBatch]:
    """Adds old_logp (N,), the policy's before the first of several optimiser steps."""
    return [replace(b, old_logp=compute_log_probs(policy, b, temperature)[0]) for b in batches]


def add_advantages(batches: list[MicroBatch], adv: torch.Tensor) -> list[MicroBatch]:
    """Adds adv (N,): each token has its rollout's, an idle one 0. adv counts along the list that
    was packed.
    """
    adv = torch.cat([adv, adv.new_zeros(1)])  # rollout -1
    return [replace(b, advantages=adv.to(b.tokens.device)[b.rollout]) for b in batches]


def compute_kl_penalty(
    reference: Sharded | None, texts: list[Rollout], rollouts: list[Rollout], cfg: Config
) -> torch.Tensor:
    """The KL to the reference of each rollout, (R,): summed over its tokens; 0 without one."""
    if reference is None:
        return torch.zeros(len(rollouts))
    summed = sum_kl_by_rollout(
        add_ref_logp(reference, make_micro_batches(texts, cfg), cfg.sampling.temperature),
        len(texts),
        cfg.loss.kl_estimator,
    )
    place = {(r.group, r.ids): i for i, r in enumerate(texts)}
    return summed[[place[r.group, r.ids] for r in rollouts]]


@torch.no_grad()
def log_token_values(
    policy: Sharded, reference: Sharded | None, texts: list[Rollout], cfg: Config
) -> list[dict]:
    """Per-token values of all the step's texts before its update, untrained ones too, for
    rollouts.jsonl.gz.
    """
    batches = add_ref_logp(reference, make_micro_batches(texts, cfg), cfg.sampling.temperature)
    scored = [compute_log_probs(policy, batch, cfg.sampling.temperature) for batch in batches]
    # before the first optimiser step on it the old policy is the one being trained (DESIGN decision
    # 2)
    columns = [
        dict(
            trainer_logp=logp,
            ref_logp=b.ref_logp,
            old_logp=b.sampler_logp if cfg.train.replay else logp,
            entropy=entropy,
        )
        for b, (logp, entropy) in zip(batches, scored)
    ]
    return collect_token_values(len(texts), batches, columns)


if __name__ == "__main__":
    with signal_handlers():
        run_command(main, sys.argv[1:])
