"""Measure on the ranks of a torchrun job how much of the sharding's communication is hidden.

torchrun --nproc-per-node 2 experiments/gpu_sections/overlap_job.py FILE [--tiny]

FILE: {"together": seconds of forward and backward, "computation alone": with collectives that give
back what is there, "communication alone": the same collectives one after another}. Of 1.5B's shape
with random weights and gradient checkpointing; the slowest rank, the fastest of three.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_sections.setting import (
    Setting,
    Work,
    attribute_set,
    load_benchmark,
    make_random_policy,
)

from recr1.config.schema import Config, SamplingConfig
from recr1.data_types import MicroBatch
from recr1.distributed import collectives as dist
from recr1.distributed.fsdp import Sharded
from recr1.distributed.process_group import process_group
from recr1.rl.losses import Objective, resolve_objective
from recr1.rl.policy_loss import compute_policy_loss
from recr1.train import make_updates
from recr1.utils.exits import end_process

REPEATS = 3


def main() -> int:
    """Measure, and let rank 0 write the file."""
    path, *flags = sys.argv[1:]
    with process_group(), tempfile.TemporaryDirectory() as folder:
        setting = Setting(dist.device(), "--tiny" in flags, Path(folder))
        seconds = measure(setting)
        if dist.rank() == 0:
            Path(path).write_text(json.dumps(seconds), encoding="utf-8")
    return 0


def measure(setting: Setting) -> dict[str, float]:
    """Return the seconds of the three ways."""
    work = Work(prompts=4, group=6, prompt=256, completion=256)
    if setting.tiny:
        work = Work(prompts=2, group=2, prompt=8, completion=8)
    policy = make_random_policy(setting, "1.5B", checkpointing=True)
    cfg = Config(sampling=SamplingConfig(group_size=work.group, max_new_tokens=work.completion))
    objective = resolve_objective(cfg.loss, cfg.model)
    rollouts = load_benchmark("mfu").make_rollouts(setting.reachable, work)
    advantages = torch.tensor([1.0, -1.0]).repeat(len(rollouts))[: len(rollouts)]
    [update] = make_updates(policy, None, rollouts, advantages, cfg, objective.agg_mode)

    def compute() -> None:
        train_batches(policy, update.micro_batches, update.denominator, objective)

    seconds = {"together": time_slowest(setting, compute)}
    with (
        attribute_set(dist, "start_all_gather", pretend_all_gather),
        attribute_set(dist, "start_reduce_scatter", pretend_reduce_scatter),
    ):
        seconds["computation alone"] = time_slowest(setting, compute)
    num_batches = len(update.micro_batches)
    seconds["communication alone"] = time_slowest(setting, lambda: communicate(policy, num_batches))
    return seconds


def train_batches(
    policy: Sharded, batches: list[MicroBatch], denominator: float, objective: Objective
) -> None:
    """Run forward and backward of all micro-batches."""
    for batch in batches:
        compute_policy_loss(policy, batch, denominator, 1.0, objective).value.backward()


def time_slowest(setting: Setting, run: Callable[[], None]) -> float:
    """Return the seconds of the slowest rank, the fastest of some calls after one to warm up."""
    run()
    fastest = min(setting.time(run) for _ in range(REPEATS))
    microseconds = dist.all_reduce_max(round(fastest * 1e6))
    return microseconds / 1e6


def pretend_all_gather(shard: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Stand in for the all-gather: every rank's shard is taken to be this one's."""
    full = shard.repeat(dist.world_size())
    return lambda: full


def pretend_reduce_scatter(full: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Stand in for the reduce-scatter: the sum is taken to be this rank's own."""
    shard_size = len(full) // dist.world_size()
    shard = full[:shard_size].clone()
    return lambda: shard


def communicate(policy: Sharded, num_batches: int) -> None:
    """Issue the collectives of so many micro-batches, each waited for at once.

    With gradient checkpointing a block's weights are gathered for the forward and again for the
    backward, the root's once for each; then its gradient is summed.
    """
    for _ in range(num_batches):
        for group in policy.units:
            for _ in range(2):
                dist.start_all_gather(group.shard.detach().to(group.compute))()
            full_size = dist.world_size() * len(group.shard)
            gradient = torch.zeros(full_size, dtype=group.shard.dtype, device=group.device)
            dist.start_reduce_scatter(gradient)()


if __name__ == "__main__":
    end_process(main)
