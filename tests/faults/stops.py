"""Processes that stop: killed anywhere, killed inside a save, asked to end, hanging, leaving. Each
function makes n faults.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jobs import Job, end_all, first_word, watch_events
from world import RANKS, STEPS, Outcome, World, list_checkpoints

from recr1 import train
from recr1.distributed import heartbeat

PHASES = ("setup", "eval", "sample", "reward", "train", "step", "log", "save", "gather")
IN_A_ROW = 5  # kills of one run, one after the other
ENDS = 25.0  # seconds after SIGTERM
CHECKOUT = Path(__file__).resolve().parents[2]


def kill_ranks(world: World, n: int) -> Iterator[Outcome]:
    """Kill a random rank by SIGKILL at a random moment; the same command again, until the run is
    through.
    """
    return fill_runs(kill_in_one_run, world, n)


def fill_runs(
    in_one_run: Callable[[World, int, int], list[Outcome]], world: World, n: int
) -> Iterator[Outcome]:
    """Yield n outcomes, of as many runs as that takes; in_one_run(world, first phase, at most)."""
    first = world.rng.randrange(len(PHASES))
    count = 0
    while count < n:
        outcomes = in_one_run(world, first + count, min(IN_A_ROW, n - count))
        count += len(outcomes)
        yield from outcomes


def kill_in_one_run(world: World, first: int, at_most: int) -> list[Outcome]:
    """Kill a run again and again, first in the phase of this number."""
    run = world.choose_folder()
    chain = []
    step = 0
    while True:
        job = world.start(run)
        killed = None
        if len(chain) < at_most:
            phase = PHASES[(first + len(chain)) % len(PHASES)]
            killed = kill_one(world, job, phase, step)
        if not killed:
            codes = job.wait(world.limit)
        after = find_resumed_step(job)
        if step and after not in (None, step - 1, step):
            chain[-1].lose(
                f"killed in step {step}, it went on after step {after}: {job.read_output()}"
            )
        if not killed:
            return judge_chain(world, run, job, codes, chain)
        killed_in, outcome = killed
        step = max(step, killed_in)
        chain.append(outcome)


def judge_chain(
    world: World,
    run: Path,
    job: Job,
    codes: list[int] | None,
    chain: list[Outcome],
    want: dict | None = None,
) -> list[Outcome]:
    """Judge the faults made one after the other in a run that `job` was to finish. One that no
    fault came into is a fault that was not survived.
    """
    verdict, note = world.judge(run, job, codes, want)
    if not chain:
        return [Outcome("no fault came", "lost", note or "the run was through before")]
    if verdict == "survived":
        return chain
    for outcome in chain:
        if outcome.verdict == "survived":
            outcome.verdict = verdict
            outcome.note = note
    return chain


def find_resumed_step(job: Job) -> int | None:
    """Return the step after which a job went on, 0: from the start; None if it was killed before
    that or has not said.
    """
    match = re.search(r"goes on after step (\d+)", job.read_output())
    if match:
        return int(match[1])
    if "starts from step 1" in job.read_output():
        return 0
    return None


def kill_one(world: World, job: Job, phase: str, step: int) -> tuple[int, Outcome] | None:
    """Kill a rank in this phase of a step soon after `step`. Return (the step that it was in,
    outcome); None if the job was through first.
    """
    rank = world.rng.randrange(RANKS)
    target = 0
    if phase != "setup":
        target = min(STEPS, step + world.rng.randrange(1, 3))
    if not job.wait_for_phase(rank, phase, target):
        return None
    time.sleep(world.rng.random() ** 4 * 0.02)
    job.kill(ranks=[rank])
    codes = job.wait(world.limit)
    if codes is None:
        note = f"the other rank hangs after rank {rank} was killed: {job.read_output()[-1000:]}"
        return step, Outcome("?", "lost", note)
    if codes[rank] != -signal.SIGKILL:
        return None
    state = heartbeat.read_heartbeat(job.folder / "heartbeats", rank)
    if not state or state["pid"] != job.pids[rank]:
        state = dict(phase="setup", step=0)
    outcome = Outcome(first_word(state["phase"]))
    blame = (
        f"rank {rank} (pid {job.pids[rank]}, {state.get('host')}) is gone; "
        f"it was in phase {state['phase']} of step {state['step']}"
    )
    others = list_others(codes, rank)
    is_blamed = others == [3] and f"recr1: {blame}" in job.read_lines()
    if state["step"] and not is_blamed:
        last_line = job.read_lines()[-1:]
        outcome.lose(f"the other rank ended with {others} and said {last_line}, not {blame!r}")
    return state["step"], outcome


def list_others(codes: list[int] | None, rank: int) -> list[int]:
    """Return the exit codes of all ranks but this one."""
    return [code for other, code in enumerate(codes or ()) if other != rank]


def kill_in_saves(world: World, n: int) -> Iterator[Outcome]:
    """Kill a rank by SIGKILL inside a save, before or after a file reached the disk or got its
    name: the checkpoint before is used and nothing partial.
    """
    points = []
    for rank, names in world.read_events().items():
        for event, name in enumerate(names):
            points.append((rank, event, name))
    drawn = world.rng.sample(points, min(n, len(points)))
    for rank, event, name in sorted(drawn):
        step = world.rng.randrange(2, STEPS)
        yield kill_in_save(world, rank, event, name, step)


def kill_in_save(world: World, killed_rank: int, event: int, name: str, step: int) -> Outcome:
    def kill_itself(number: int, name: str) -> None:
        if number == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def prepare(rank: int) -> None:
        if rank == killed_rank:
            watch_events(rank, kill_itself, step)

    run = world.choose_folder()
    where = f"rank {killed_rank} before {name}"
    job = world.start(run, prepare=prepare)
    codes = job.wait(world.limit)
    if codes is None or codes[killed_rank] != -signal.SIGKILL:
        return Outcome(where, "lost", f"exit codes {codes}: {job.read_output()[-1000:]}")
    names = list_checkpoints(run)
    last_step = step if f"step_{step:06d}" in names else step - 1
    job, verdict, note = world.finish(run)
    if verdict == "survived" and find_resumed_step(job) != last_step:
        note = f"{names} were there; it went on otherwise: {job.read_lines()}"
        return Outcome(where, "silent", note)
    return Outcome(where, verdict, note)


def stop_jobs(world: World, n: int) -> Iterator[Outcome]:
    """Send SIGTERM to all ranks at a random moment, with no checkpoint but the one that it asks
    for: all exit 0 in time, the run goes on from there.
    """
    return fill_runs(stop_in_one_run, world, n)


def stop_in_one_run(world: World, first: int, at_most: int) -> list[Outcome]:
    """Stop a run again and again, first in the phase of this number."""
    run = world.choose_folder()
    chain = []
    step = 0
    while True:
        job = world.start(run, "save.every=0")
        rank = world.rng.randrange(RANKS)
        phase = PHASES[(first + len(chain)) % len(PHASES)]
        target = step if phase == "setup" else min(STEPS, step + 1)
        if len(chain) == at_most or not job.wait_for_phase(rank, phase, target):
            break
        time.sleep(world.rng.random() * 0.05)
        state = job.read_state(rank)
        if not job.is_running():
            break
        outcome = stop_job(world, run, job, state)
        chain.append(outcome)
        step = state["step"]
        if (run / "summary.json").exists():
            break
    codes = job.wait(world.limit)
    return judge_chain(world, run, job, codes, chain)


def stop_job(world: World, run: Path, job: Job, state: dict) -> Outcome:
    """Send SIGTERM to a job whose rank was in this state."""
    job.kill(signal.SIGTERM)
    start = time.monotonic()
    codes = job.wait(world.limit)
    seconds = time.monotonic() - start
    outcome = Outcome(first_word(state["phase"]), seconds=seconds)
    steps = list_saved_steps(run)
    is_through = (run / "summary.json").exists()
    if codes != [0] * RANKS or seconds > ENDS * world.slow:
        outcome.lose(f"exit codes {codes} after {seconds:.1f} s: {job.read_output()[-1000:]}")
    elif not is_through and max(steps, default=0) < state["step"] - 1:
        outcome.lose(f"in step {state['step']}; saved {steps}: {job.read_output()[-1000:]}")
    return outcome


def list_saved_steps(run: Path) -> list[int]:
    steps = []
    for name in list_checkpoints(run):
        match = re.fullmatch(r"step_(\d+)", name)
        if match:
            steps.append(int(match[1]))
    return steps


def leave() -> None:
    os._exit(0)


def exit_by_zero() -> None:
    sys.exit(0)


def fail() -> None:
    raise IndexError("made up")


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


UNEVEN = "a micro-batch less"
HANGS = "has not moved for"
WAYS = {  # name: (what the rank does, what is said of it)
    "exits 0": (leave, "is gone; it was in"),
    "sys.exit(0)": (exit_by_zero, "failed in"),
    "raises": (fail, "failed in"),
    "hangs": (stop_itself, HANGS),
}
SPOILT = [  # (what a rank does, in which phase)
    ("exits 0", "reward"),
    ("sys.exit(0)", "reward"),
    ("raises", "reward"),
    ("hangs", "reward"),
    ("exits 0", "train"),
    ("raises", "train"),
    ("hangs", "train"),
    (UNEVEN, "train"),
]


def spoil_ranks(world: World, n: int) -> Iterator[Outcome]:
    """Let one of three ranks hang, leave, raise or make a micro-batch less: the job ends soon, with
    that rank and its phase in one line of another.
    """
    ways = SPOILT
    if n < len(SPOILT):
        ways = world.rng.sample(SPOILT, n)
    for way, phase in ways:
        rank = world.rng.randrange(3)
        yield spoil_one(world, way, rank, phase)


def spoil_one(world: World, way: str, spoilt_rank: int, phase: str) -> Outcome:
    def prepare(rank: int) -> None:
        if rank != spoilt_rank:
            return
        if way == UNEVEN:
            make_one_less(2)
        else:
            act, _ = WAYS[way]
            act_in_phase(phase, 2, act)

    patience = round(5 * world.slow)
    settings = (f"run.collective_timeout={patience}", "save.every=2")
    job = world.start(world.choose_folder(), *settings, ranks=3, prepare=prepare)
    seconds = wait_for_ranks(job, 1 if way == "hangs" else 0, world.limit)
    job.kill()
    codes = job.wait(10 * world.slow)
    is_named = is_spoilt_named(job, codes, way, spoilt_rank, phase)
    if is_named and seconds < patience + 15 * world.slow:
        return Outcome(f"{way} in {phase}", seconds=seconds)
    note = f"rank {spoilt_rank}: exit codes {codes}, said {job.read_output()[-1500:]}"
    return Outcome(f"{way} in {phase}", "lost", note, seconds)


def wait_for_ranks(job: Job, hanging: int, limit: float) -> float:
    """Wait until all ranks but so many that hang have ended. Return the seconds that it took."""
    start = time.monotonic()
    while count_running(job) > hanging and time.monotonic() < start + limit:
        job.is_running()
        time.sleep(0.01)
    return time.monotonic() - start


def count_running(job: Job) -> int:
    return list(job.codes.values()).count(None)


def is_spoilt_named(job: Job, codes: list[int] | None, way: str, rank: int, phase: str) -> bool:
    """Say whether the other ranks ended as they should, and named this one as they should."""
    others = list_others(codes, rank)
    # then every rank waits for the others, and those that did as they should may be named too
    if way == UNEVEN:
        lines = find_lines(job, HANGS, f"phase {phase} of step 2")
        return codes == [3, 3, 3] and bool(lines) and "Traceback" not in job.read_output()
    if way == "raises" and phase != "train":  # where all ranks hear of it, all raise it
        return others == [1, 1] and job.read_output().count(f"on rank {rank}") == 2
    _, says = WAYS[way]
    lines = find_lines(job, f"rank {rank} ", says, f"phase {phase}", "step 2")
    tracebacks = 1 if way == "raises" else 0
    is_told_once = len(lines) == 1 and job.read_output().count("Traceback") == tracebacks
    return others == [3, 3] and is_told_once


def find_lines(job: Job, *parts: str) -> list[str]:
    """Return the job's lines that hold all of these."""
    lines = []
    for line in job.read_lines():
        if all(part in line for part in parts):
            lines.append(line)
    return lines


def make_one_less(step: int) -> None:
    """In this process, the step has a micro-batch less than on the other ranks."""
    make_all = train.make_micro_batches

    def make_less(*args):
        batches = make_all(*args)
        if heartbeat._heartbeat.state["step"] == step:
            return batches[:-1]
        return batches

    train.make_micro_batches = make_less


def act_in_phase(phase: str, step: int, act: Callable[[], None]) -> None:
    """In this process, act when the rank enters the phase of the step."""
    enter_phase = heartbeat.enter_phase

    def watched(name, number=None):
        enter_phase(name, number)
        state = heartbeat._heartbeat and heartbeat._heartbeat.state
        if state and state["step"] == step and first_word(state["phase"]) == phase:
            act()

    heartbeat.enter_phase = watched


def kill_under_torchrun(world: World, n: int) -> Iterator[Outcome]:
    """Kill a rank under torchrun --max-restarts: it starts all of them again, and the run comes to
    its end by itself.
    """
    for i in range(n):
        phase = ("sample", "train", "save")[i % 3]
        yield kill_one_under_torchrun(world, i % RANKS, phase)


def kill_one_under_torchrun(world: World, rank: int, phase: str) -> Outcome:
    run = world.choose_folder()
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
        killed = kill_once(job, run, rank, phase, world.limit)
        code = job.poll()
        if code is None:
            end_all()  # torchrun's ranks too
        log.seek(0)
        output = log.read()
    if killed is None or code != 0:
        return Outcome(where, "lost", f"torchrun ends with {code}: {output[-2000:]}")
    verdict, note = world.judge(run, None, [0] * RANKS)
    if not note and f"rank {rank} (pid {killed}" not in output:
        note = f"nobody named the rank: {output[-1500:]}"
    return Outcome(where, verdict, note)


def kill_once(job: subprocess.Popen, run: Path, rank: int, phase: str, limit: float) -> int | None:
    """Kill the rank in this phase of step 3 and wait for torchrun's end. Return the rank's id."""
    killed = None
    deadline = time.monotonic() + limit
    while job.poll() is None and time.monotonic() < deadline:
        state = heartbeat.read_heartbeat(run / "heartbeats", rank)
        if not killed and state and state["step"] == 3 and first_word(state["phase"]) == phase:
            killed = state["pid"]
            os.kill(killed, signal.SIGKILL)
        time.sleep(0.0005)
    return killed
