"""Processes that stop: killed anywhere, killed inside a save, asked to end, hanging, leaving. Each
function makes n faults.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from jobs import Job, at_events, end_all
from world import RANKS, STEPS, Outcome, World, checkpoints

from recr1 import train
from recr1.distributed import heartbeat

PHASES = ("setup", "eval", "sample", "reward", "train", "step", "log", "save", "gather")
IN_A_ROW = 5  # kills of one run, one after the other
ENDS = 25.0  # seconds after SIGTERM
CHECKOUT = Path(__file__).resolve().parents[2]


def kills(world: World, n: int) -> Iterator[Outcome]:
    """SIGKILL of a random rank at a random moment; the same command again, until the run is
    through.
    """
    made = 0
    first = world.rng.randrange(len(PHASES))
    while made < n:
        run = world.fresh()
        chain = []
        step = 0
        while True:
            job = world.start(run)
            before = step
            killed = None
            if len(chain) < min(IN_A_ROW, n - made):
                killed = _kill_one(
                    world, job, PHASES[(first + made + len(chain)) % len(PHASES)], step
                )
            if not killed:
                codes = job.wait(world.limit)
            if (went := resumed(job)) is not None and before and went not in (before - 1, before):
                chain[-1].verdict = "lost"
                chain[
                    -1
                ].note = f"killed in step {before}, it went on after step {went}: {job.said()}"
            if not killed:
                break
            step = max(step, killed[0])
            outcome = killed[1]
            chain.append(outcome)
        made += len(chain := judged(world, run, job, codes, chain))
        yield from chain


def judged(
    world: World,
    run: Path,
    job: Job,
    codes: list[int] | None,
    chain: list[Outcome],
    want: dict | None = None,
) -> list[Outcome]:
    """The faults made one after the other in a run that `job` was to finish. One that no fault came
    into is a fault that was not survived.
    """
    verdict, note = world.judge(run, job, codes, want)
    for outcome in chain:
        if outcome.verdict == "survived" and verdict != "survived":
            outcome.verdict, outcome.note = verdict, note
    return chain or [Outcome("no fault came", "lost", note or "the run was through before")]


def resumed(job: Job) -> int | None:
    """The step after which a job went on, 0: from the start; None if it was killed before that or
    has not said.
    """
    found = re.search(r"goes on after step (\d+)", job.said())
    return int(found[1]) if found else 0 if "starts from step 1" in job.said() else None


def _kill_one(world: World, job: Job, phase: str, step: int) -> tuple[int, Outcome] | None:
    """Kills a rank in this phase of a step soon after `step`: (the step that it was in, outcome);
    None if the job was through first.
    """
    rank = world.rng.randrange(RANKS)
    at = 0 if phase == "setup" else min(STEPS, step + world.rng.randrange(1, 3))
    if not job.reached(rank, phase, at):
        return None
    time.sleep(world.rng.random() ** 4 * 0.02)
    job.kill(ranks=[rank])
    codes = job.wait(world.limit)
    if codes is None:
        return step, Outcome(
            "?", "lost", f"the other rank hangs after rank {rank} was killed: {job.said()[-1000:]}"
        )
    if codes[rank] != -signal.SIGKILL:
        return None
    was = heartbeat.read_heartbeat(job.folder / "heartbeats", rank)
    was = was if was and was["pid"] == job.pids[rank] else dict(phase="setup", step=0)
    outcome = Outcome(was["phase"].split()[0])
    blamed = (
        f"rank {rank} (pid {job.pids[rank]}, {was.get('host')}) is gone; "
        f"it was in phase {was['phase']} of step {was['step']}"
    )
    others = [code for r, code in enumerate(codes) if r != rank]
    if was["step"] and (others != [3] or f"recr1: {blamed}" not in job.lines()):
        outcome.verdict, outcome.note = (
            "lost",
            f"the other rank ended with {others} and said {job.lines()[-1:]}, not {blamed!r}",
        )
    return was["step"], outcome


def saves(world: World, n: int) -> Iterator[Outcome]:
    """SIGKILL inside a save, before or after a file reached the disk or got its name: the
    checkpoint before is used and nothing partial.
    """
    points = [
        (rank, k, name) for rank, names in world.events().items() for k, name in enumerate(names)
    ]
    for rank, k, name in sorted(world.rng.sample(points, min(n, len(points)))):
        yield _kill_in_save(world, rank, k, name, world.rng.randrange(2, STEPS))


def _kill_in_save(world: World, rank: int, k: int, name: str, step: int) -> Outcome:
    run = world.fresh()
    where = f"rank {rank} before {name}"
    job = world.start(
        run,
        prepare=lambda r: (
            r == rank
            and at_events(r, lambda i, name: i == k and os.kill(os.getpid(), signal.SIGKILL), step)
        ),
    )
    codes = job.wait(world.limit)
    if codes is None or codes[rank] != -signal.SIGKILL:
        return Outcome(where, "lost", f"exit codes {codes}: {job.said()[-1000:]}")
    there = checkpoints(run)
    job, verdict, note = world.finish(run)
    if verdict == "survived" and resumed(job) != step - (f"step_{step:06d}" not in there):
        return Outcome(where, "silent", f"{there} were there; it went on otherwise: {job.lines()}")
    return Outcome(where, verdict, note)


def terms(world: World, n: int) -> Iterator[Outcome]:
    """SIGTERM to all ranks at a random moment, with no checkpoint but the one that it asks for: all
    exit 0 in time, the run goes on from there.
    """
    made = 0
    first = world.rng.randrange(len(PHASES))
    while made < n:
        run = world.fresh()
        chain = []
        step = 0
        while True:
            job = world.start(run, "save.every=0")
            rank = world.rng.randrange(RANKS)
            phase = PHASES[(first + made + len(chain)) % len(PHASES)]
            if len(chain) == min(IN_A_ROW, n - made) or not job.reached(
                rank, phase, min(STEPS, step + (phase != "setup"))
            ):
                break
            time.sleep(world.rng.random() * 0.05)
            was = job.state(rank)
            if not job.running():
                break
            job.kill(signal.SIGTERM)
            start = time.monotonic()
            codes = job.wait(world.limit)
            took = time.monotonic() - start
            outcome = Outcome(was["phase"].split()[0], seconds=took)
            saved = [
                int(name[5:])
                for name in checkpoints(run)
                if name.startswith("step_") and name[5:].isdigit()
            ]
            if codes != [0] * RANKS or took > ENDS * world.slow:
                outcome.verdict, outcome.note = (
                    "lost",
                    f"exit codes {codes} after {took:.1f} s: {job.said()[-1000:]}",
                )
            elif not (run / "summary.json").exists() and max(saved, default=0) < was["step"] - 1:
                outcome.verdict, outcome.note = (
                    "lost",
                    f"in step {was['step']}; saved {saved}: {job.said()[-1000:]}",
                )
            chain.append(outcome)
            step = was["step"]
            if (run / "summary.json").exists():
                break
        made += len(chain := judged(world, run, job, job.wait(world.limit), chain))
        yield from chain


def _stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def _fail():
    raise IndexError("made up")


UNEVEN = "a micro-batch less"
WAYS = {
    "exits 0": (lambda: os._exit(0), "is gone; it was in"),
    "sys.exit(0)": (lambda: sys.exit(0), "failed in"),
    "raises": (_fail, "failed in"),
    "hangs": (_stop, "has not moved for"),
}


def between_ranks(world: World, n: int) -> Iterator[Outcome]:
    """One of three ranks hangs, leaves, raises or makes a micro-batch less: the job ends soon, with
    that rank and its phase in one line of another.
    """
    ways = [
        *((way, "reward") for way in WAYS),
        *((way, "train") for way in ("exits 0", "raises", "hangs")),
        (UNEVEN, "train"),
    ]
    for way, phase in ways if n >= len(ways) else world.rng.sample(ways, n):
        yield _spoil_one(world, way, world.rng.randrange(3), phase)


def _spoil_one(world: World, way: str, rank: int, phase: str) -> Outcome:
    (act, says), patience = WAYS.get(way, (None, "has not moved for")), round(5 * world.slow)
    job = world.start(
        world.fresh(),
        f"run.collective_timeout={patience}",
        "save.every=2",
        ranks=3,
        prepare=lambda r: r == rank and (_in_phase(phase, 2, act) if act else _one_less(2)),
    )
    start = time.monotonic()
    while (
        sum(code is None for code in job.codes.values()) > (way == "hangs")
        and time.monotonic() < start + world.limit
    ):
        job.running()
        time.sleep(0.01)
    took = time.monotonic() - start
    job.kill()
    codes = job.wait(10 * world.slow)
    lines = [
        line
        for line in job.lines()
        if f"rank {rank} " in line
        and says in line
        and f"phase {phase}" in line
        and "step 2" in line
    ]
    others = [code for r, code in enumerate(codes or ()) if r != rank]
    # then every rank waits for the others, and those that did as they should may be named too
    if way == UNEVEN:
        fine = (
            codes == [3, 3, 3]
            and any(says in line and f"phase {phase} of step 2" in line for line in job.lines())
            and "Traceback" not in job.said()
        )
    elif way == "raises" and phase != "train":  # where all ranks hear of it, all raise it
        fine = others == [1, 1] and job.said().count(f"on rank {rank}") == 2
    else:
        fine = (
            others == [3, 3]
            and len(lines) == 1
            and job.said().count("Traceback") == (way == "raises")
        )
    fine = fine and took < patience + 15 * world.slow
    return Outcome(
        f"{way} in {phase}",
        "survived" if fine else "lost",
        "" if fine else f"rank {rank}: exit codes {codes}, said {job.said()[-1500:]}",
        took,
    )


def _one_less(step: int) -> None:
    """In this process, the step has a micro-batch less than on the other ranks."""
    made = train.make_micro_batches
    train.make_micro_batches = lambda *args: made(*args)[
        : -1 if heartbeat._heartbeat.state["step"] == step else None
    ]


def _in_phase(phase: str, step: int, act) -> None:
    """In this process, acts when the rank enters the phase of the step."""
    at = heartbeat.enter_phase

    def watched(name, number=None):
        at(name, number)
        state = heartbeat._heartbeat and heartbeat._heartbeat.state
        if state and state["step"] == step and state["phase"].split()[0] == phase:
            act()

    heartbeat.enter_phase = watched


def torchruns(world: World, n: int) -> Iterator[Outcome]:
    """A rank killed under torchrun --max-restarts: it starts all of them again, and the run comes
    to its end by itself.
    """
    for i in range(n):
        yield _kill_under_torchrun(world, i % RANKS, ("sample", "train", "save")[i % 3])


def _kill_under_torchrun(world: World, rank: int, phase: str) -> Outcome:
    run = world.fresh()
    where = f"rank {rank} in {phase}"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(RANKS),
        "--max-restarts",
        "1",
        "--standalone",
        "-m",
        "recr1.train",
        world.config,
        f"run.dir={run}",
    ]
    with open(world.folder / "torchrun.log", "w+") as log:
        job = subprocess.Popen(command, cwd=CHECKOUT, stdout=log, stderr=log)
        killed = None
        deadline = time.monotonic() + world.limit
        while job.poll() is None and time.monotonic() < deadline:
            state = heartbeat.read_heartbeat(run / "heartbeats", rank)
            if not killed and state and state["step"] == 3 and state["phase"].split()[0] == phase:
                os.kill(state["pid"], signal.SIGKILL)
                killed = state
            time.sleep(0.0005)
        if (code := job.poll()) is None:
            end_all()  # torchrun's ranks too
        log.seek(0)
        said = log.read()
    if not killed or code != 0:
        return Outcome(where, "lost", f"torchrun ends with {code}: {said[-2000:]}")
    verdict, note = world.judge(run, None, [0] * RANKS)
    named = f"rank {rank} (pid {killed['pid']}" in said
    return Outcome(
        where, verdict, note or ("" if named else f"nobody named the rank: {said[-1500:]}")
    )
