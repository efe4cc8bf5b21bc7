"""Values that are none: losses, gradients, rewards and log-probs that are not finite, and a user's
retriever and reward that fail. Each function makes n faults.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import shaky
import torch
from helpers.tiny_world import jsonl
from jobs import Job
from safetensors import safe_open
from stops import IN_A_ROW, find_lines, find_resumed_step, judge_chain
from world import RANKS, STEPS, Outcome, World

from recr1 import train
from recr1.distributed import heartbeat
from recr1.rl import policy_loss
from recr1.training.optimizer import Optimizer


def spoil_values(world: World, n: int) -> Iterator[Outcome]:
    """Make a value NaN or infinite on one rank: no weight moves on any, the batches of all are
    kept; stopped, the run goes on to the same bytes.
    """
    cases = []
    for what in FAULTS:
        for value in (math.nan, math.inf):
            for policy in ("stop", "skip"):
                cases.append((what, value, policy))
    if n < len(cases):
        cases = world.rng.sample(cases, n)
    for what, value, policy in cases:
        rank = world.rng.randrange(RANKS)
        step = world.rng.randrange(2, STEPS)
        verdict, note = spoil_value(world, what, value, policy, rank, step)
        yield Outcome(f"{what} {value}, {policy}", verdict, note)


def spoil_value(
    world: World, what: str, value: float, policy: str, spoilt_rank: int, step: int
) -> tuple[str, str]:
    """Return (verdict, note)."""

    def prepare(rank: int) -> None:
        if rank == spoilt_rank:
            spoil = FAULTS[what]
            spoil(value, step)

    run = world.choose_folder()
    settings = (f"optimizer.on_nonfinite={policy}", "save.keep_last=9")
    job = world.start(run, *settings, prepare=prepare)
    codes = job.wait(world.limit)
    folder = f"nonfinite/step_{step:06d}"
    lines = find_lines(job, "no weight was changed", f"step {step}: ", folder)
    code = 2 if policy == "stop" else 0
    if codes != [code] * RANKS or len(lines) != 1 or "Traceback" in job.read_output():
        return "lost", f"exit codes {codes}: {job.read_output()[-1500:]}"
    why = explain_missing(run / folder, step)
    if why:
        return "silent", why
    if policy == "stop":
        _, verdict, note = world.finish(run, "save.keep_last=9")
        return verdict, note
    why = explain_move(run, step)
    if why:
        return "silent", why
    return "survived", ""


def is_in_step(step: int) -> bool:
    return bool(heartbeat._heartbeat) and heartbeat._heartbeat.state["step"] == step


def patch_result(owner, name: str, step: int, change: Callable) -> None:
    """In this process, in this step: owner.name(...) gives change(what it gives)."""
    inner = getattr(owner, name)

    def outer(*args, **kwargs):
        value = inner(*args, **kwargs)
        if is_in_step(step):
            return change(value)
        return value

    setattr(owner, name, outer)


def spoil_loss(value: float, step: int) -> None:
    """Of the last micro-batch of every rank's; its gradient stays as it is."""

    def change(losses: tuple) -> tuple:
        loss, *rest = losses
        return loss + value, *rest

    patch_result(train, "compute_policy_loss", step, change)


def spoil_gradient(value: float, step: int) -> None:
    """One number of this rank's shards."""
    inner = Optimizer.step

    def outer(self, *args):
        if is_in_step(step):
            gradients = [p.grad for p in self.names if p.grad is not None and p.numel()]
            gradients[0][0] = value
        return inner(self, *args)

    Optimizer.step = outer


def spoil_reward(value: float, step: int) -> None:
    def change(samples: train.Samples) -> train.Samples:
        first, *rest = samples.rewards
        first = dataclasses.replace(first, total=value)
        return samples._replace(rewards=[first, *rest])

    patch_result(train, "sample_and_score", step, change)


def spoil_logp(value: float, step: int) -> None:
    """The trainer's, of one token."""
    inner = policy_loss.compute_token_loss

    def outer(logp, *args):
        if is_in_step(step):
            first = logp.new_full((1,), value)
            logp = torch.cat([first, logp[1:]])
        return inner(logp, *args)

    policy_loss.compute_token_loss = outer


FAULTS = {
    "loss": spoil_loss,
    "gradient": spoil_gradient,
    "reward": spoil_reward,
    "log-prob": spoil_logp,
}


def explain_missing(folder: Path, step: int) -> str:
    """Say why the batches of a step are not what somebody could look for the cause in; "" if they
    are.
    """
    for rank in range(RANKS):
        batches = json.loads((folder / f"rank_{rank:05d}.json").read_text())
        with safe_open(folder / f"rank_{rank:05d}.safetensors", "pt") as file:
            names = set(file.keys())
        want = set()
        for i in range(len(batches["losses"])):
            want |= {f"{i}.tokens", f"{i}.advantages"}
        is_described = batches["step"] == step and batches["texts"]
        if not is_described or not want <= names:
            return f"{folder} does not hold the batches of rank {rank}: {sorted(names)}"
    return ""


def explain_move(run: Path, step: int) -> str:
    """Say how a skipped step has moved a weight or a moment, or was not counted; "" if neither."""
    for rank in range(RANKS):
        if read_shard(run, step - 1, rank) != read_shard(run, step, rank):
            return f"the weights of rank {rank} are others after step {step}"
    rows = jsonl(run / "metrics.jsonl")
    counts = [row["skipped_steps"] for row in rows]
    want = [int(number >= step) for number in range(1, STEPS + 1)]
    if counts != want:
        return f"skipped steps are counted {counts}, not {want}"
    return ""


def read_shard(run: Path, step: int, rank: int) -> bytes:
    name = f"rank_{rank:05d}-of-{RANKS:05d}.safetensors"
    return (run / f"checkpoints/step_{step:06d}" / name).read_bytes()


KINDS = (
    "retriever.kind=shaky:overlap",
    "reward.weights={ndcg: 1.0, 'shaky:part': 0.5}",
    "task=shaky:Task",
)
LINE = (
    r"recr1: (retriever shaky:overlap: call \d+ \(|reward.weights: shaky:part |task: shaky:Task: )"
    r".*({})"
)
USERS = shaky.SEARCHES | shaky.PARTS | shaky.TASKS
STOPPED = r"stopped after step (\d+); the same command goes on|there is nothing new to save"


def break_functions(world: World, n: int) -> Iterator[Outcome]:
    """Let a user's retriever, reward or task fail in a step: one line names it, the state before
    the step is saved, and the run goes on to the same bytes.
    """
    ways = list(USERS)
    ways = world.rng.sample(ways, min(n, len(ways)))
    want = world.run_undisturbed(*KINDS)
    while ways:
        yield from fail_in_one_run(world, ways, want)


def fail_in_one_run(world: World, ways: list[str], want: dict) -> list[Outcome]:
    """Let one run fail in the first of these ways, then in the next, and take them off the list."""
    run = world.choose_folder()
    chain = []
    after = 0
    while True:
        way = None
        if ways and len(chain) < IN_A_ROW:
            way = ways[0]
        job = start_failing(world, run, way, after)
        codes = job.wait(world.limit)
        if chain and find_resumed_step(job) != after:
            output = job.read_output()[-1500:]
            chain[-1].lose(f"stopped after step {after}, it went on otherwise: {output}")
        # also where the run was through before the next fault came: that is made in another
        if not way or codes == [0] * RANKS:
            break
        outcome = Outcome(ways.pop(0))
        chain.append(outcome)
        stopped = re.search(STOPPED, job.read_output())
        lines = find_naming(job, way)
        if (
            codes != [2] * RANKS
            or len(lines) != 1
            or not stopped
            or "Traceback" in job.read_output()
        ):
            outcome.lose(f"exit codes {codes}: {job.read_output()[-1500:]}")
            break
        after = int(stopped[1] or 0)
    if way and not chain:
        outcome = Outcome(ways.pop(0), "silent", "the run went through")
        chain.append(outcome)
    return judge_chain(world, run, job, codes, chain, want)


def start_failing(world: World, run: Path, way: str | None, after: int) -> Job:
    """Start a job that fails in this way soon after a step; None: that does not fail."""
    failing_rank = world.rng.randrange(RANKS)
    step = after + world.rng.randrange(1, 3)
    settings = [*KINDS]
    if way == "sleeps":
        settings.append(f"retriever.timeout={world.slow:.1f}")

    def prepare(rank: int) -> None:
        if way and rank == failing_rank:
            shaky.fault = (step, way)

    return world.start(run, *settings, prepare=prepare)


def find_naming(job: Job, way: str) -> list[str]:
    """Return the job's lines that say what failed in this way."""
    _, says = USERS[way]
    pattern = LINE.format(says)
    lines = []
    for line in job.read_lines():
        if line.isprintable() and re.match(pattern, line):
            lines.append(line)
    return lines
