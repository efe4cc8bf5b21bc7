"""Rec-R1 by GRPO: python -m recr1.train experiments/quickstart.yaml [a.b=value ...]

`train` reads as the algorithm (arXiv 2402.03300, algorithm 1); below it stand its steps, in the
order in which they are called.

Legend: P prompts of this rank, G siblings of a group, R = P * G rollouts, U unique ones of them, N
trained tokens of a micro-batch.
"""

import sys
from dataclasses import replace
from typing import NamedTuple

import torch

from recr1.config.schema import Config
from recr1.data_types import MicroBatch, Prompt, Reward, Rollout
from recr1.distributed import collectives as dist
from recr1.distributed.fsdp import Sharded, unsharded
from recr1.model.decoder import ScoredDecoder
from recr1.model.log_probs import compute_log_probs
from recr1.rl.advantages import RewardParts, compute_group_advantages, split_rewards
from recr1.rl.async_rewards import AsyncRewards
from recr1.rl.kl import sum_kl_by_rollout
from recr1.rl.losses import Objective, resolve_objective
from recr1.rl.packing import deduplicate, pack_rollouts, pad_to_same_count
from recr1.rl.policy_loss import compute_policy_loss, count_denominator
from recr1.sampling.generate import generate
from recr1.sampling.kv_cache import KVCache
from recr1.tracking.step_metrics import StepRecord, collect_token_values
from recr1.training.launch import launch_loop, run_command
from recr1.training.optimizer import Optimizer
from recr1.training.run import Run
from recr1.training.setup import setup_run
from recr1.utils.interrupts import raise_on_signal, signal_handlers


def main(argv: list[str]) -> None:
    """Run the command line."""
    launch_loop(argv, "recr1.train", train)


def train(cfg: Config) -> None:
    """Train by GRPO: DeepSeekMath (arXiv 2402.03300), algorithm 1, rewarded by the retriever."""
    run = setup_run(cfg)
    policy = run.policy
    objective = resolve_objective(cfg.loss, cfg.model)
    optimizer = Optimizer(policy, cfg.optimizer, cfg.train.steps * cfg.train.num_mini_batches)
    cache = run.make_sampling_cache()

    with run.resume_or_start(optimizer):  # when asked to stop, it saves a checkpoint
        before = run.evaluate_test("eval_before.jsonl")
        for step in run.steps():
            # Sample G completions of each prompt and score what the retriever finds for them.
            samples = sample_and_score(run, step, cache)

            with run.log.time_phase("train"):
                # An advantage is a reward relative to its group.
                unique, first = deduplicate(samples.rollouts)  # (U,): identical siblings are one
                divergence = compute_kl_penalty(run.reward_reference, unique, samples.rollouts, cfg)
                rewards = samples.total_rewards() - cfg.loss.kl_coef * divergence  # (R,)
                advantages = compute_group_advantages(
                    rewards,
                    cfg.sampling.group_size,
                    objective.advantage,
                    cfg.loss,
                    samples.split_rewards(cfg, objective),
                )  # (R,)
                record = start_record(run, step, samples, unique, first, advantages, divergence)

                # One optimizer step each: one, unless train.num_mini_batches says more.
                for update in make_updates(
                    policy, run.loss_reference, unique, advantages[first], cfg, objective.agg_mode
                ):
                    for batch in run.iterate_micro_batches(update.micro_batches):
                        loss, logp, stats = compute_policy_loss(
                            policy, batch, update.denominator, cfg.sampling.temperature, objective
                        )
                        loss.backward()
                        record.add(loss, logp, batch, stats)
                    grad_norm, lr = run.optimizer_step(step, update.micro_batches, record)

            run.finish_step(
                step, record, grad_norm=grad_norm, lr=lr, skipped_steps=optimizer.num_skipped
            )
        after = run.evaluate_test("eval_after.jsonl")
    run.write_results(before, after)


# --- Sampling -------------------------------------------------------------------------------------


class Samples(NamedTuple):
    """What this rank has sampled in a step: R = P * G rollouts, siblings adjacent."""

    rollouts: list[Rollout]
    rewards: list[Reward]
    num_sampled_groups: int  # more than P where groups were sampled again

    def total_rewards(self) -> torch.Tensor:
        """Return the rewards as a tensor (R,)."""
        return torch.tensor([reward.total for reward in self.rewards])

    def split_rewards(self, cfg: Config, objective: Objective) -> RewardParts | None:
        """Return the rewards' parts where the advantage looks at them, else None."""
        if not objective.needs_reward_parts:
            return None
        return split_rewards(self.rewards, cfg.reward.weights)


class ScoredGroup(NamedTuple):
    """The G siblings of one prompt."""

    rollouts: list[Rollout]
    rewards: list[Reward]

    def teaches_nothing(self) -> bool:
        """Return whether all rewards are equal: then all advantages are 0."""
        return len({reward.total for reward in self.rewards}) == 1


def sample_and_score(run: Run, step: int, cache: KVCache | None) -> Samples:
    """Sample and score G completions of each of this rank's prompts, or replay a logged step.

    A collective: what fails on one rank, or a signal to it, ends the sampling on all.
    """
    with unsharded(run.policy), dist.fail_together(), raise_on_signal():
        if run.replay:
            return Samples(*run.replay.step(step))
        return sample_groups(run, step, cache)


def sample_groups(run: Run, step: int, cache: KVCache | None) -> Samples:
    """Sample the step's groups; sampling.dynamic_sampling replaces those that teach nothing.

    A group whose rewards are all equal has no gradient. Other prompts are drawn in its place, that
    many times (dynamic sampling: DAPO, arXiv 2503.14476, section 3.2). What is then still missing
    is filled with the groups that teach nothing.
    """
    max_redraws = run.cfg.sampling.dynamic_sampling
    group_size = run.cfg.sampling.group_size
    num_prompts = len(run.prompts(step))
    groups: list[ScoredGroup] = []
    spare_groups: list[ScoredGroup] = []
    num_sampled_groups = 0

    # Each turn draws other prompts for the groups that are still missing.
    for turn in range(1 + max_redraws):
        prompts = run.prompts(step, turn)[: num_prompts - len(groups)]
        rollouts, rewards = sample_once(run, step, prompts, cache)
        num_sampled_groups += len(prompts)

        for start in range(0, len(rollouts), group_size):
            siblings = slice(start, start + group_size)
            group = ScoredGroup(rollouts[siblings], rewards[siblings])
            if max_redraws and group.teaches_nothing():
                spare_groups.append(group)
            else:
                groups.append(group)
        if len(groups) == num_prompts:
            break

    return join_groups([*groups, *spare_groups][:num_prompts], num_sampled_groups)


def sample_once(
    run: Run, step: int, prompts: list[Prompt], cache: KVCache | None
) -> tuple[list[Rollout], list[Reward]]:
    """Sample G completions of each prompt and score them.

    The retriever works on groups that have ended while others are still being sampled.
    """
    sampling = run.cfg.sampling
    async_rewards = AsyncRewards(run.train_scorer.score, run.scores_async)
    with run.log.time_phase("sample"):
        rollouts = generate(
            run.policy,
            prompts,
            sampling.group_size,
            sampling.temperature,
            sampling.max_new_tokens,
            run.stops,
            run.draw_uniforms(step, prompts),
            cache,
            top_p=sampling.top_p,
            max_cache_tokens=run.get_kv_cache_budget(),
            kernels=run.cfg.model.kernels,
            on_group_finished=async_rewards.submit,
        )
    with run.log.time_phase("reward"):
        rewards = async_rewards.results()  # what is not scored yet: the step waits for it
    return rollouts, rewards


def join_groups(groups: list[ScoredGroup], num_sampled_groups: int) -> Samples:
    """Join the groups and number them in their order."""
    rollouts = []
    rewards = []
    for number, group in enumerate(groups):
        rollouts += [replace(rollout, group=number) for rollout in group.rollouts]
        rewards += group.rewards
    return Samples(rollouts, rewards, num_sampled_groups)


# --- From rewards to micro-batches ----------------------------------------------------------------


def compute_kl_penalty(
    reference: ScoredDecoder | None, unique: list[Rollout], rollouts: list[Rollout], cfg: Config
) -> torch.Tensor:
    """Compute the KL to the reference of each rollout, summed over its tokens.

    Returns (R,), zeros without a reference.
    """
    if reference is None:
        return torch.zeros(len(rollouts))
    micro_batches = make_micro_batches(unique, cfg)
    micro_batches = add_ref_logp(
        reference, micro_batches, cfg.sampling.temperature, cfg.model.kernels
    )

    # Siblings with the same text have the same KL.
    kl_by_unique = sum_kl_by_rollout(micro_batches, len(unique), cfg.loss.kl_estimator)  # (U,)
    index_by_text = {(text.group, text.ids): index for index, text in enumerate(unique)}
    indices = [index_by_text[rollout.group, rollout.ids] for rollout in rollouts]
    return kl_by_unique[indices]


def start_record(
    run: Run,
    step: int,
    samples: Samples,
    unique: list[Rollout],
    first: list[int],
    advantages: torch.Tensor,
    divergence: torch.Tensor,
) -> StepRecord:
    """Begin the step's record; its micro-batches add their statistics as they are trained."""
    token_values = None
    if run.logs_tokens(step):
        token_values = log_token_values(run.policy, run.reference, unique, run.cfg)
    stats = []
    if run.reference:
        stats.append(dict(kl=divergence.sum().item()))
    return StepRecord(
        rollouts=samples.rollouts,
        rewards=samples.rewards,
        advantages=advantages.tolist(),
        unique=unique,
        first_index=first,
        num_sampled_groups=samples.num_sampled_groups,
        token_values=token_values,
        stats=stats,
    )


@torch.no_grad()
def log_token_values(
    policy: Sharded, reference: ScoredDecoder | None, unique: list[Rollout], cfg: Config
) -> list[dict]:
    """Compute per-token values of all texts of a step, untrained ones too, for rollouts.jsonl.gz.

    They are those of the policy before the step's update.
    """
    temperature = cfg.sampling.temperature
    kernels = cfg.model.kernels
    micro_batches = add_ref_logp(reference, make_micro_batches(unique, cfg), temperature, kernels)
    columns = []
    for batch in micro_batches:
        logp, entropy = compute_log_probs(policy, batch, temperature, kernels)  # (N,), (N,)
        # Before the first optimizer step on these texts the old policy is the one being trained.
        old_logp = batch.sampler_logp if cfg.train.replay else logp
        columns.append(
            dict(trainer_logp=logp, ref_logp=batch.ref_logp, old_logp=old_logp, entropy=entropy)
        )
    return collect_token_values(len(unique), micro_batches, columns)


class PolicyUpdate(NamedTuple):
    """The data of one optimizer step."""

    denominator: float  # what the loss's average divides by: all ranks, all micro-batches
    micro_batches: list[MicroBatch]


def make_updates(
    policy: Sharded,
    reference: ScoredDecoder | None,
    unique: list[Rollout],
    advantages: torch.Tensor,
    cfg: Config,
    agg_mode: str,
) -> list[PolicyUpdate]:
    """Divide the rollouts into the micro-batches of train.num_mini_batches optimizer steps.

    Each optimizer step has an equal share of the prompts (PPO's mini-batches). Texts with advantage
    0, such as those of a group without variance, are left out unless the loss has a KL. They are
    left out even if `loss.entropy_coef` or a surrogate of a user's own would add something there;
    the denominator counts them all the same.

    Args:
        reference: where the KL is in the loss; else None.
        advantages: (U,).
    """
    num_groups = unique[-1].group + 1 if unique else 0
    num_updates = cfg.train.num_mini_batches
    temperature = cfg.sampling.temperature
    kernels = cfg.model.kernels
    updates = []
    for number in range(num_updates):
        # This update's share of the groups, and how many tokens or rollouts all ranks have in it.
        share = [i for i, r in enumerate(unique) if r.group * num_updates // num_groups == number]
        local_count = count_denominator(
            [unique[i] for i in share], agg_mode, cfg.sampling.max_new_tokens
        )
        [denominator] = dist.all_reduce_sum(local_count)

        # What the loss needs at each token beside the text itself.
        trained = [i for i in share if advantages[i] != 0 or reference]
        micro_batches = make_micro_batches([unique[i] for i in trained], cfg)
        micro_batches = add_ref_logp(reference, micro_batches, temperature, kernels)
        micro_batches = add_advantages(micro_batches, advantages[trained])
        if cfg.train.replay:  # whoever wrote these texts, it was not this policy
            micro_batches = [replace(b, old_logp=b.sampler_logp) for b in micro_batches]
        elif num_updates > 1:
            micro_batches = add_old_logp(policy, micro_batches, temperature, kernels)
        updates.append(PolicyUpdate(max(1, denominator), micro_batches))
    return updates


def make_micro_batches(rollouts: list[Rollout], cfg: Config) -> list[MicroBatch]:
    """Pack rollouts by the token budget, into as many micro-batches on every rank."""
    micro_batches = pack_rollouts(rollouts, cfg.train.tokens_per_micro_batch, dist.device())
    return pad_to_same_count(micro_batches, dist.device())


@torch.no_grad()
def add_ref_logp(
    reference: ScoredDecoder | None,
    micro_batches: list[MicroBatch],
    temperature: float,
    kernels: str = "torch",
) -> list[MicroBatch]:
    """Add ref_logp (N,), the frozen initial policy's; without one nothing changes."""
    if reference is None:
        return micro_batches
    return [
        replace(batch, ref_logp=compute_log_probs(reference, batch, temperature, kernels)[0])
        for batch in micro_batches
    ]


@torch.no_grad()
def add_old_logp(
    policy: Sharded,
    micro_batches: list[MicroBatch],
    temperature: float,
    kernels: str = "torch",
) -> list[MicroBatch]:
    """Add old_logp (N,), the policy's before the first of several optimizer steps."""
    return [
        replace(batch, old_logp=compute_log_probs(policy, batch, temperature, kernels)[0])
        for batch in micro_batches
    ]


def add_advantages(micro_batches: list[MicroBatch], advantages: torch.Tensor) -> list[MicroBatch]:
    """Add advantages (N,): each token has its rollout's, one of an idle batch 0.

    `advantages` counts along the list that was packed.
    """
    # the last entry is for rollout -1
    padded = torch.cat([advantages, advantages.new_zeros(1)])
    return [
        replace(batch, advantages=padded.to(batch.tokens.device)[batch.rollout])
        for batch in micro_batches
    ]


if __name__ == "__main__":
    with signal_handlers():
        run_command(main, sys.argv[1:])
