"""Values that are none: losses, gradients, rewards and log-probs that are not finite, and a user's
retriever and reward that fail. Each function makes n faults.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator

import shaky
import torch
from safetensors import safe_open
from stops import IN_A_ROW, judged, resumed
from world import RANKS, STEPS, Outcome, World

from recr1 import train
from recr1.distributed import heartbeat
from recr1.rl import policy_loss
from recr1.training.optimizer import Optimizer


def nonfinite(world: World, n: int) -> Iterator[Outcome]:
    """NaN or infinity on one rank: no weight moves on any, the batches of all are kept; stopped,
    the run goes on to the same bytes.
    """
    cases = [
        (what, value, policy)
        for what in FAULTS
        for value in (math.nan, math.inf)
        for policy in ("stop", "skip")
    ]
    for what, value, policy in cases if n >= len(cases) else world.rng.sample(cases, n):
        yield Outcome(
            f"{what} {value}, {policy}",
            *_spoilt(
                world,
                what,
                value,
                policy,
                world.rng.randrange(RANKS),
                world.rng.randrange(2, STEPS),
            ),
        )


def _spoilt(
    world: World, what: str, value: float, policy: str, rank: int, step: int
) -> tuple[str, str]:
    run = world.fresh()
    job = world.start(
        run,
        f"optimizer.on_nonfinite={policy}",
        "save.keep_last=9",
        prepare=lambda r: r == rank and FAULTS[what](value, step),
    )
    codes = job.wait(world.limit)
    lines = [
        line
        for line in job.lines()
        if "no weight was changed" in line
        and f"step {step}: " in line
        and f"nonfinite/step_{step:06d}" in line
    ]
    if (
        codes != [2 if policy == "stop" else 0] * RANKS
        or len(lines) != 1
        or "Traceback" in job.said()
    ):
        return "lost", f"exit codes {codes}: {job.said()[-1500:]}"
    if why := _not_kept(run, step):
        return "silent", why
    if policy == "stop":
        return world.finish(run, "save.keep_last=9")[1:]
    why = _moved(run, step)
    return "silent" if why else "survived", why


def _here(step: int) -> bool:
    return bool(heartbeat._heartbeat) and heartbeat._heartbeat.state["step"] == step


def _patch(owner, name: str, step: int, change) -> None:
    """In this process, in this step: owner.name(...) gives change(what it gives)."""
    inner = getattr(owner, name)

    def outer(*args, **kwargs):
        result = inner(*args, **kwargs)
        return change(result) if _here(step) else result

    setattr(owner, name, outer)


def _loss(value: float, step: int) -> None:
    """Of the last micro-batch of every rank's; its gradient stays as it is."""
    _patch(train, "compute_policy_loss", step, lambda result: (result[0] + value, *result[1:]))


def _gradient(value: float, step: int) -> None:
    """One number of this rank's shards."""
    inner = Optimizer.step

    def outer(self, *args):
        if _here(step):
            next(p.grad for p in self.names if p.grad is not None and p.numel())[0] = value
        return inner(self, *args)

    Optimizer.step = outer


def _reward(value: float, step: int) -> None:
    def change_first(samples: train.Samples) -> train.Samples:
        first = dataclasses.replace(samples.rewards[0], total=value)
        return samples._replace(rewards=[first, *samples.rewards[1:]])

    _patch(train, "sample_and_score", step, change_first)


def _logp(value: float, step: int) -> None:
    """The trainer's, of one token."""
    inner = policy_loss.compute_token_loss

    def outer(logp, *args):
        if _here(step):
            logp = torch.cat([logp.new_full((1,), value), logp[1:]])
        return inner(logp, *args)

    policy_loss.compute_token_loss = outer


FAULTS = {"loss": _loss, "gradient": _gradient, "reward": _reward, "log-prob": _logp}


def _not_kept(run, step: int) -> str:
    """Why the batches of a step are not what somebody could look for the cause in."""
    folder = run / f"nonfinite/step_{step:06d}"
    for rank in range(RANKS):
        kept = json.loads((folder / f"rank_{rank:05d}.json").read_text())
        with safe_open(folder / f"rank_{rank:05d}.safetensors", "pt") as file:
            names = set(file.keys())
        if (
            kept["step"] != step
            or not kept["texts"]
            or not {
                f"{i}.{name}"
                for i in range(len(kept["losses"]))
                for name in ("tokens", "advantages")
            }
            <= names
        ):
            return f"{folder} does not hold the batches of rank {rank}: {sorted(names)}"
    return ""


def _moved(run, step: int) -> str:
    """Whether a skipped step has moved a weight or a moment, or was not counted."""
    for rank in range(RANKS):
        before, after = (
            (
                run / f"checkpoints/step_{s:06d}/rank_{rank:05d}-of-{RANKS:05d}.safetensors"
            ).read_bytes()
            for s in (step - 1, step)
        )
        if before != after:
            return f"the weights of rank {rank} are others after step {step}"
    counted = [
        json.loads(line)["skipped_steps"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    want = [int(s >= step) for s in range(1, STEPS + 1)]
    return "" if counted == want else f"skipped steps are counted {counted}, not {want}"


KINDS = (
    "retriever.kind=shaky:overlap",
    "reward.weights={ndcg: 1.0, 'shaky:part': 0.5}",
    "task=shaky:Task",
)
LINE = (
    r"recr1: (retriever shaky:overlap: call \d+ \(|reward.weights: shaky:part |task: shaky:Task: )"
    r".*({})"
)


def functions(world: World, n: int) -> Iterator[Outcome]:
    """A user's retriever, reward or task fails in a step: one line names it, the state before the
    step is saved, and the run goes on to the same bytes.
    """
    says = shaky.SEARCHES | shaky.PARTS | shaky.TASKS
    ways = world.rng.sample(list(says), min(n, len(says)))
    want = world.undisturbed(*KINDS)
    while ways:
        run = world.fresh()
        chain = []
        after = 0
        while True:
            way = ways[0] if ways and len(chain) < IN_A_ROW else None
            rank = world.rng.randrange(RANKS)
            step = after + world.rng.randrange(1, 3)
            limit = [f"retriever.timeout={world.slow:.1f}"] if way == "sleeps" else []
            job = world.start(
                run,
                *KINDS,
                *limit,
                prepare=lambda r: way and r == rank and setattr(shaky, "fault", (step, way)),
            )
            codes = job.wait(world.limit)
            if chain and resumed(job) != after:
                chain[-1].verdict = "lost"
                chain[
                    -1
                ].note = f"stopped after step {after}, it went on otherwise: {job.said()[-1500:]}"
            # also where the run was through before the next fault came: that is made in another
            if not way or codes == [0] * RANKS:
                break
            chain.append(Outcome(ways.pop(0)))
            stopped = re.search(
                r"stopped after step (\d+); the same command goes on|there is nothing new to save",
                job.said(),
            )
            lines = [
                line
                for line in job.lines()
                if line.isprintable() and re.match(LINE.format(says[way][1]), line)
            ]
            if codes != [2] * RANKS or len(lines) != 1 or not stopped or "Traceback" in job.said():
                chain[-1].verdict = "lost"
                chain[-1].note = f"exit codes {codes}: {job.said()[-1500:]}"
                break
            after = int(stopped[1] or 0)
        if way and not chain:
            chain.append(Outcome(ways.pop(0), "silent", "the run went through"))
        yield from judged(world, run, job, codes, chain, want)
