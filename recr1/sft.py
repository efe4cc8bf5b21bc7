"""Supervised fine-tuning: python -m recr1.sft experiments/msrd_sft.yaml [a.b=value ...]

The cold start before GRPO (RecLLM-R1, arXiv 2506.19235, section 3.2) and Rec-R1's SFT baseline:
cross-entropy of a teacher's completions (training/teacher.py). What GRPO goes on from is RUN/model: python
-m recr1.train CONFIG.yaml model.path=RUN/model
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace

import torch

from recr1.config.schema import Config, LossConfig
from recr1.data.prompt_order import choose_prompts, count_steps_per_epoch
from recr1.data_types import MicroBatch, Rollout
from recr1.distributed import collectives as dist, heartbeat
from recr1.rl.losses import Objective, resolve_objective
from recr1.rl.packing import pack_rollouts, pad_to_same_count
from recr1.rl.policy_loss import compute_policy_loss, count_denominator
from recr1.tracking.run_log import RunLog
from recr1.training.launch import launch_loop, run_command
from recr1.training.optimizer import Optimizer
from recr1.training.run import Run
from recr1.training.teacher import load_sft_data
from recr1.utils.interrupts import signal_handlers


def main(argv: list[str]) -> None:
    launch_loop(argv, "recr1.sft", train)


def train(cfg: Config) -> None:
    run = Run(cfg, "sft")
    per_step = cfg.train.prompts_per_step
    policy = run.policy
    loss = resolve_objective(CROSS_ENTROPY, cfg.model)
    texts, about = load_sft_data(run)  # the teacher's, one Rollout each
    run.num_steps = cfg.sft.epochs * count_steps_per_epoch(len(texts), per_step) or cfg.train.steps
    optimizer = Optimizer(policy, cfg.optimizer, run.num_steps)

    with run.resume_or_start(
        optimizer
    ):  # from the last checkpoint; when asked to stop, it saves one
        before = run.evaluate_test("eval_before.jsonl")
        for step in run.steps():
            with run.log.time_phase("train"):
                # a function of (seed, step)
                order = choose_prompts(len(texts), per_step, cfg.run.seed, step - 1)
                mine = [
                    select_targets(texts[i], cfg.sft.mask_prompt)
                    for i in dist.split_across_ranks(order.tolist())
                ]
                total, batches = make_update(mine, cfg.train.tokens_per_micro_batch)
                done = SftStepRecord(mine)
                for i, batch in enumerate(batches, 1):
                    heartbeat.enter_phase(f"train {i}/{len(batches)}")
                    # the last backward sums over ranks
                    policy.hold = cfg.train.reduce == "step" and i < len(batches)
                    value, stats = compute_cross_entropy(
                        policy, batch, total, cfg.sampling.temperature, loss
                    )
                    value.backward()
                    done.sums.append(dict(loss=value.item(), **stats))
                    run.stop_if_asked()
                grad_norm, lr = run.optimizer_step(step, batches, done)
            run.finish_step(
                step,
                done,
                epoch=step * per_step / len(texts),
                grad_norm=grad_norm,
                lr=lr,
                skipped=optimizer.num_skipped,
            )
        after = run.evaluate_test("eval_after.jsonl")
    run.write_results(before, after, loop="sft", teacher=about)


# -sum A log p / total: cross-entropy is A = 1 at every token of the teacher's text
CROSS_ENTROPY = LossConfig(kind="reinforce")


def select_targets(text: Rollout, mask_prompt: bool) -> Rollout:
    """The text with what is learnt of it behind what is only read: the completion, or all but the
    prompt's first token.
    """
    if mask_prompt:
        return text
    prompt = text.prompt
    ids = (*text.prompt.ids[1:], *text.ids)
    return replace(
        text, prompt=replace(prompt, ids=prompt.ids[:1]), ids=ids, sampler_logp=(0.0,) * len(ids)
    )


def make_update(texts: list[Rollout], max_tokens: int) -> tuple[int, list[MicroBatch]]:
    """The loss's denominator, target tokens of all ranks, and this rank's micro-batches, as many on
    every rank.
    """
    [total] = dist.all_reduce_sum(count_denominator(texts, "token", 0))
    return total, pad_to_same_count(pack_rollouts(texts, max_tokens, dist.device()), dist.device())


def compute_cross_entropy(
    policy: torch.nn.Module, batch: MicroBatch, total: float, temperature: float, loss: Objective
) -> tuple[torch.Tensor, dict[str, float]]:
    """A micro-batch's part of the mean over the step's target tokens, nats; sums over its tokens.

    `temperature` is the policy's (model/log_probs.py): samples of temperature 1.2 learnt at 1 would make it
    flatter than the policy that wrote them.
    """
    value, _, stats = compute_policy_loss(
        policy, replace(batch, advantages=torch.ones_like(batch.weight)), total, temperature, loss
    )
    return value, dict(entropy=stats["entropy"], trained=stats["trained"])


@dataclass
class SftStepRecord:
    """What one rank did in a step; the ranks' merged are the step's."""

    texts: list[Rollout]
    sums: list[dict] = field(default_factory=list)  # by micro-batch

    def merge(self, other: SftStepRecord) -> None:
        self.texts = self.texts + other.texts
        self.sums = self.sums + other.sums

    def logged(self, step: int, log: RunLog, cfg: Config, **more) -> dict:
        """The step's row of metrics.jsonl."""
        loss, entropy, tokens = (
            sum(s[name] for s in self.sums) for name in ("loss", "entropy", "trained")
        )
        return log.add_timings(
            dict(
                step=step,
                loss=loss,
                entropy=entropy / tokens,
                tokens=int(tokens),
                tokens_per_s=tokens / log.seconds["train"],
                **more,
            )
        )

    def named(self) -> list[dict]:
        """The texts, for who looks at what was not finite."""
        return [dict(prompt=r.prompt.id, ids=list(r.ids)) for r in self.texts]


if __name__ == "__main__":
    with signal_handlers():
        run_command(main, sys.argv[1:])
