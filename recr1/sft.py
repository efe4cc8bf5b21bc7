"""Supervised fine-tuning: python -m recr1.sft experiments/configs/cpu/msrd_sft.yaml [a.b=value ...]

The cold start before GRPO (RecLLM-R1, arXiv 2506.19235, section 3.2) and Rec-R1's SFT baseline:
cross-entropy of a teacher's completions (training/teacher.py). What GRPO goes on from is RUN/model:
python -m recr1.train CONFIG.yaml model.path=RUN/model
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import NamedTuple

import torch

from recr1.config.schema import Config, LossConfig
from recr1.data.prompt_order import choose_prompts, count_steps_per_epoch
from recr1.data_types import MicroBatch, Rollout
from recr1.distributed import collectives as dist
from recr1.model.decoder import AnyDecoder
from recr1.rl.losses import Objective, resolve_objective
from recr1.rl.packing import pack_rollouts, pad_to_same_count
from recr1.rl.policy_loss import compute_policy_loss, count_denominator
from recr1.tracking.step_metrics import SftStepRecord
from recr1.training.launch import launch_loop, run_command
from recr1.training.optimizer import Optimizer
from recr1.training.setup import setup_run
from recr1.training.teacher import load_sft_data
from recr1.utils.interrupts import signal_handlers

# -sum A log p / denominator: cross-entropy is A = 1 at every token of the teacher's text
CROSS_ENTROPY = LossConfig(kind="reinforce")


def main(argv: list[str]) -> None:
    """Run the command line."""
    launch_loop(argv, "recr1.sft", train)


def train(cfg: Config) -> None:
    """Train by cross-entropy on the teacher's texts, in epochs."""
    run = setup_run(cfg, "sft")
    per_step = cfg.train.prompts_per_step
    policy = run.policy
    objective = resolve_objective(CROSS_ENTROPY, cfg.model)
    texts, about_teacher = load_sft_data(run)  # one Rollout each
    steps_per_epoch = count_steps_per_epoch(len(texts), per_step)
    run.num_steps = cfg.sft.epochs * steps_per_epoch or cfg.train.steps
    optimizer = Optimizer(policy, cfg.optimizer, run.num_steps)

    with run.resume_or_start(optimizer):  # when asked to stop, it saves a checkpoint
        before = run.evaluate_test("eval_before.jsonl")
        for step in run.steps():
            with run.log.time_phase("train"):
                # Cross-entropy of this step's texts, averaged over the tokens of all ranks.
                targets = choose_targets(texts, step, cfg)
                update = make_update(targets, cfg.train.tokens_per_micro_batch)
                record = SftStepRecord(targets)
                for batch in run.iterate_micro_batches(update.micro_batches):
                    loss, stats = compute_cross_entropy(
                        policy, batch, update.denominator, cfg.sampling.temperature, objective
                    )
                    loss.backward()
                    record.stats.append(dict(loss=loss.item(), **stats))
                grad_norm, lr = run.optimizer_step(step, update.micro_batches, record)

            epoch = step * per_step / len(texts)
            num_skipped = optimizer.num_skipped
            run.finish_step(
                step, record, epoch=epoch, grad_norm=grad_norm, lr=lr, skipped_steps=num_skipped
            )
        after = run.evaluate_test("eval_after.jsonl")
    run.write_results(before, after, loop="sft", teacher=about_teacher)


def choose_targets(texts: list[Rollout], step: int, cfg: Config) -> list[Rollout]:
    """Choose the texts of this rank in a step, and what is learned of them.

    A function of (seed, step).
    """
    order = choose_prompts(len(texts), cfg.train.prompts_per_step, cfg.run.seed, step - 1)
    local_order = dist.split_across_ranks(order.tolist())
    return [select_targets(texts[index], cfg.sft.mask_prompt) for index in local_order]


def select_targets(text: Rollout, mask_prompt: bool) -> Rollout:
    """Put what is learned of a text behind what is only read.

    What is learned is the completion; without `mask_prompt` all but the prompt's first token.
    """
    if mask_prompt:
        return text
    prompt = replace(text.prompt, ids=text.prompt.ids[:1])
    ids = (*text.prompt.ids[1:], *text.ids)
    return replace(text, prompt=prompt, ids=ids, sampler_logp=(0.0,) * len(ids))


class SftUpdate(NamedTuple):
    """The data of one optimizer step."""

    denominator: float  # target tokens of all ranks
    micro_batches: list[MicroBatch]  # this rank's, as many on every rank


def make_update(texts: list[Rollout], max_tokens: int) -> SftUpdate:
    """Pack this rank's texts into micro-batches, and count the target tokens of all ranks."""
    [denominator] = dist.all_reduce_sum(count_denominator(texts, "token-mean", 0))
    micro_batches = pack_rollouts(texts, max_tokens, dist.device())
    return SftUpdate(denominator, pad_to_same_count(micro_batches, dist.device()))


def compute_cross_entropy(
    policy: AnyDecoder,
    batch: MicroBatch,
    denominator: float,
    temperature: float,
    objective: Objective,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Compute a micro-batch's share of the mean over the step's target tokens, in nats.

    Args:
        temperature: the policy's (model/log_probs.py). Samples of temperature 1.2 learned at 1
            would make it flatter than the policy that wrote them.
    Returns:
        The loss, a scalar with gradient, and sums over the micro-batch's tokens.
    """
    batch = replace(batch, advantages=torch.ones_like(batch.weight))
    loss, _, stats = compute_policy_loss(policy, batch, denominator, temperature, objective)
    return loss, dict(entropy=stats["entropy"], trained=stats["trained"])


if __name__ == "__main__":
    with signal_handlers():
        run_command(main, sys.argv[1:])
