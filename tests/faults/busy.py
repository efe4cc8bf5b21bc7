"""A busy machine: jobs of 2 and 3 ranks three side by side with processes that only take the cores.

Each must end with the exit codes that its work has, without an abort, and leave whole files. What
is looked for here are races between a rank that leaves and threads that still work for it, so every
rank ends as the program ends it: jobs.py's ranks, which end by os._exit in any case, could not show
them.
"""

import gzip
import json
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
from helpers.tiny_world import jsonl
from safetensors import safe_open
from world import Outcome, World

TESTS = Path(__file__).resolve().parents[1]
CHECKOUT = TESTS.parent
SIDE_BY_SIDE = 3
NICENESS = 10  # of the processes that only take the cores: they get about a tenth of a busy core
STEPS = ("train.steps=2", "train.eval_every=0", "save.every=0", "loss.kl_coef=0")


class Ending(NamedTuple):
    """One job: its arguments after torchrun's, the exit code of each rank, and a check of what it
    left.
    """

    arguments: list[str]
    rank_code: int
    check: Callable[[str], None]


def end_jobs(world: World, n: int) -> Iterator[Outcome]:
    """Start n jobs: training to the end, SIGTERM, a search that fails on the way, evaluation,
    collectives alone; on 2 and 3 ranks in turn.

    Every eleventh is started by torchrun, the others by spawner.py, which spares them the seconds
    of their imports.
    """
    names = list(MAKERS)
    at_once = min(n, SIDE_BY_SIDE)
    with take_the_cores(), provide_spawners(at_once) as idle, ThreadPoolExecutor(at_once) as pool:

        def run_job(i: int) -> Outcome:
            name = names[i % len(names)]
            ranks = 2 + i // len(names) % 2
            folder = world.folder / f"ending{i}"
            if i % 11 == 10:
                return judge_job(world, name, ranks, folder, None)
            return judge_job(world, name, ranks, folder, idle)

        yield from pool.map(run_job, range(n))


def judge_job(
    world: World, name: str, ranks: int, folder: Path, idle: SimpleQueue | None
) -> Outcome:
    """Return the outcome of one job.

    idle: the spawners that have nothing to do; None: torchrun starts the job.
    """
    where = f"{name} on {ranks} ranks"
    folder.mkdir()
    output = folder / "said"
    ending = MAKERS[name](world, folder / "run")
    if idle is None:
        codes = run_by_torchrun(ranks, ending, output, world.limit)
    else:
        codes = run_by_spawner(ranks, ending, output, idle, world.limit)
    text = output.read_text(errors="replace")
    if codes is None:
        return Outcome(where, "lost", f"no end within {world.limit:.0f} s: {text[-4000:]}")
    if codes != {ending.rank_code} or "terminate called" in text or "Fatal Python error" in text:
        return Outcome(where, "lost", f"exit codes {codes}: {text[-4000:]}")
    try:
        ending.check(text)
    except Exception as error:
        return Outcome(where, "silent", f"{type(error).__name__}: {error}: {text[-4000:]}")
    shutil.rmtree(folder)
    return Outcome(where)


def run_by_spawner(
    ranks: int, ending: Ending, output: Path, idle: SimpleQueue, limit: float
) -> set[int] | None:
    """Return the exit codes of the job's ranks; None if they still run after `limit` seconds."""
    spawner = idle.get()
    job = dict(ranks=ranks, argv=ending.arguments, output=str(output))
    spawner.stdin.write(json.dumps(job) + "\n")
    spawner.stdin.flush()
    has_answer, _, _ = select.select([spawner.stdout], [], [], limit)
    if not has_answer:
        stop_spawner(spawner)
        idle.put(start_spawner())
        return None
    codes = json.loads(spawner.stdout.readline())
    idle.put(spawner)
    return set(codes)


def run_by_torchrun(ranks: int, ending: Ending, output: Path, limit: float) -> set[int] | None:
    """Do as run_by_spawner; torchrun names the codes of ranks that failed, and ends with 0 if none
    has.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
    ]
    with open(output, "w") as out:
        try:
            torchrun = subprocess.run(
                [*command, *ending.arguments],
                cwd=CHECKOUT,
                env=make_environment(),
                stdout=out,
                stderr=out,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return None
    text = output.read_text(errors="replace")
    codes = {int(code) for code in re.findall(r"exitcode *: *(-?\d+)", text)}
    if torchrun.returncode == 0:
        codes.add(0)
    return codes


def make_environment() -> dict[str, str]:
    path = os.pathsep.join([str(TESTS), str(TESTS / "faults"), str(CHECKOUT)])
    return os.environ | dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", PYTHONPATH=path)


@contextmanager
def provide_spawners(n: int):
    """Provide a queue of n processes of spawner.py."""
    idle = SimpleQueue()
    for _ in range(n):
        idle.put(start_spawner())
    try:
        yield idle
    finally:
        while not idle.empty():
            stop_spawner(idle.get())


def start_spawner() -> subprocess.Popen:
    command = [sys.executable, str(TESTS / "faults/spawner.py")]
    return subprocess.Popen(
        command,
        cwd=CHECKOUT,
        env=make_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def stop_spawner(spawner: subprocess.Popen) -> None:
    """Kill it; its ranks die with it (jobs.die_with_parent)."""
    spawner.kill()
    spawner.communicate()


def train_to_the_end(world: World, folder: Path) -> Ending:
    """Train to the end."""

    def check(text: str) -> None:
        assert len(jsonl(folder / "metrics.jsonl")) == 2
        assert jsonl(folder / "eval_before.jsonl")
        assert jsonl(folder / "eval_after.jsonl")
        assert json.loads((folder / "summary.json").read_text())["steps"] == 2
        assert gzip.decompress((folder / "rollouts.jsonl.gz").read_bytes()).endswith(b"\n")
        assert (folder / "report.html").stat().st_size > 10_000
        read_weights(folder / "model/model.safetensors")

    return Ending(["-m", "recr1.train", world.config, *STEPS, f"run.dir={folder}"], 0, check)


def stop_training(world: World, folder: Path) -> Ending:
    """Get a SIGTERM in the second step, and save what the first has made."""

    def check(text: str) -> None:
        assert "recr1: stopped after step 1" in text
        saved = folder / "checkpoints/step_000001"
        assert (saved / "manifest.json").exists()
        for shard in saved.glob("rank_*.safetensors"):
            read_weights(shard)
        assert not (folder / "summary.json").exists()

    script = str(TESTS / "helpers/interrupted.py")
    arguments = [script, "sigterm-sample@2", world.config, *STEPS, f"run.dir={folder}"]
    return Ending(arguments, 0, check)


def fail_midway(world: World, folder: Path) -> Ending:
    """End by a user's own search that raises in training: one line, exit code 2 on every rank."""

    def check(text: str) -> None:
        lines = [line for line in text.splitlines() if line.startswith("recr1: ")]
        failed = [line for line in lines if "IndexError: made up" in line]
        assert len(failed) == 1
        assert len(jsonl(folder / "metrics.jsonl")) == 1
        assert (folder / "checkpoints/step_000001/manifest.json").exists()

    setting = "retriever.kind=busy:build_failing_search"
    return Ending(
        ["-m", "recr1.train", world.config, *STEPS, setting, f"run.dir={folder}"], 2, check
    )


def build_failing_search(doc_ids: list[str], texts: list[str]) -> Callable:
    """The search of fail_midway: a retriever of a user's own, which the ranks import from this
    file.
    """
    from recr1.distributed import heartbeat

    def search(queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        if heartbeat._heartbeat.state["step"] == 2:
            raise IndexError("made up")
        lengths = np.array([len(query) for query in queries])
        rows = lengths[:, None] % len(doc_ids)
        return rows, np.ones(rows.shape)

    return search


def score_rewrites(world: World, folder: Path) -> Ending:
    """Score a policy's rewrites by `recr1 eval`."""

    def check(text: str) -> None:
        [line] = [line for line in text.splitlines() if line.startswith("{")]
        assert json.loads(line)["n"] == 12

    root = world.folder
    files = [
        *("--model", str(root / "policy"), "--config", world.config),
        *("--corpus", str(root / "data/corpus.jsonl"), "--index-dir", str(root / "index")),
        *("--queries", str(root / "data/test.queries.jsonl")),
        *("--qrels", str(root / "data/test.qrels.tsv")),
    ]
    return Ending(["-m", "recr1.cli", "eval", *files, "--json"], 0, check)


def meet(world: World, folder: Path) -> Ending:
    """Run collectives and nothing else."""

    def check(text: str) -> None:
        assert "has met the others" in text

    return Ending([str(TESTS / "faults/meets.py")], 0, check)


MAKERS = {
    "trains": train_to_the_end,
    "is_told_to_stop": stop_training,
    "fails_midway": fail_midway,
    "evaluates": score_rewrites,
    "meets": meet,
}


def read_weights(path: Path) -> None:
    with safe_open(path, "pt") as file:
        for name in file.keys():
            file.get_tensor(name)


@contextmanager
def take_the_cores():
    """Run a process for each core that does nothing but take it."""
    command = ["nice", "-n", str(NICENESS), sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for hog in running:
            hog.kill()
            hog.wait()
