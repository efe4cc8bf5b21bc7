"""Measure how OpenMP's threads should wait: seconds per step, quiet and beside busy processes.

python experiments/benchmarks/wait_policy.py [--case quickstart|smollm2] [--rounds 8]

A thread that waits for the others spins for a while and then sleeps. Spinning saves the time of
waking it up; but where more threads are busy than there are cores, it takes the core from the
thread that it waits for. The ways are settings of libgomp, torch's OpenMP on Linux: passive is
OMP_WAIT_POLICY=PASSIVE, the others are GOMP_SPINCOUNT; 300000 is what libgomp does unasked.

Each way has a training of its own. All are started, and stopped (SIGSTOP) when their first step is
done; then they take turns, a step each: quiet, beside a process that keeps one core busy, and
beside a training of the quickstart that waits in the same way. `smollm2` is SFT of SmolLM2-135M on
four texts a step, prepared as in experiments/language_model.sh (3 GB for each way).

Ends with one line of JSON, the bars of what recr1 asks for (recr1/__init__.py): quiet against
300000, and beside either neighbour against its own quiet figure. Linux, on a machine that does
nothing else; two threads want two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from few_queries import write_few_queries
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
UNASKED = "300000"
DEFAULT = "2000"
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
NEIGHBOURS = dict(quiet="quiet", busy="beside a busy process", second="beside a second training")
QUIET_BAR = 1.03
BUSY_BAR = 2.5
POLL_SECONDS = 0.005


class Training:
    """A training of a case whose threads wait in one way; it runs only inside `run_step`.

    Leaving it as a context kills the process.
    """

    def __init__(self, case: str, way: str, threads: int, folder: Path):
        run_dir = folder / f"{case}_{way}"
        self.metrics = run_dir / "metrics.jsonl"
        self.log = open(folder / f"{case}_{way}.log", "w+", encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        self.process = subprocess.Popen(
            make_command(case, run_dir, threads),
            cwd=ROOT,
            env=environment | make_settings(way),
            stdout=self.log,
            stderr=self.log,
        )

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def run_step(self) -> float:
        """Let the training go on until it has written a step; return the seconds."""
        target = self.count_steps() + 1
        began = time.perf_counter()
        self.go_on()
        while self.count_steps() < target:
            if self.process.poll() is not None:
                self.log.seek(0)
                raise SystemExit(f"a training ended before its time:\n{self.log.read()}")
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - began
        self.stop()
        return seconds

    def go_on(self) -> None:
        """Let the process run."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Let the process stand still."""
        self.process.send_signal(signal.SIGSTOP)

    def count_steps(self) -> int:
        """Return how many steps the training has written."""
        if not self.metrics.exists():
            return 0
        return self.metrics.read_bytes().count(b"\n")


def main() -> int:
    """Measure all ways and print the table and the bars."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="quickstart", choices=["quickstart", "smollm2"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=["passive", DEFAULT, UNASKED])
    parser.add_argument("--neighbours", nargs="+", default=[*NEIGHBOURS], choices=[*NEIGHBOURS])
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trainings = start_trainings(args.case, args, Path(folder), stack)
        seconds = {}
        for neighbour in args.neighbours:
            others = {}
            if neighbour == "second":
                second = Path(folder) / "second"
                second.mkdir()
                others = start_trainings("quickstart", args, second, stack)
            seconds[neighbour] = measure_ways(trainings, neighbour, others, args.rounds)

    medians = {}
    for neighbour, by_way in seconds.items():
        medians[neighbour] = {way: median(steps) for way, steps in by_way.items()}
    print_table(args, medians)
    bars = make_bars(args.case, medians)
    print(json.dumps({"bars": bars}))
    return 0 if all(bar["ok"] for bar in bars) else 1


def start_trainings(
    case: str, args: argparse.Namespace, folder: Path, stack: ExitStack
) -> dict[str, Training]:
    """Start a training for each way, one after the other, and stop it after its first step."""
    trainings = {}
    for way in tqdm(args.ways, "start", disable=None):
        trainings[way] = stack.enter_context(Training(case, way, args.threads, folder))
        trainings[way].run_step()
    return trainings


def measure_ways(
    trainings: dict[str, Training], neighbour: str, others: dict[str, Training], rounds: int
) -> dict[str, list[float]]:
    """Let the ways take turns, a step each beside the neighbour; return the seconds by way."""
    seconds: dict[str, list[float]] = {way: [] for way in trainings}
    busy = None
    if neighbour == "busy":
        busy = subprocess.Popen(["yes"], stdout=subprocess.DEVNULL)
    try:
        for _ in tqdm(range(rounds), neighbour, disable=None):
            for way, training in trainings.items():
                if way in others:
                    others[way].go_on()
                seconds[way].append(training.run_step())
                if way in others:
                    others[way].stop()
    finally:
        if busy is not None:
            busy.kill()
            busy.wait()
    return seconds


def make_settings(way: str) -> dict[str, str]:
    """Return the variables that ask for a way: "passive", or how often a thread looks."""
    if way == "passive":
        return dict(OMP_WAIT_POLICY="PASSIVE")
    return dict(GOMP_SPINCOUNT=way)


def make_command(case: str, run_dir: Path, threads: int) -> list[str]:
    """Return the command of a training of many steps, without evaluations and saves."""
    loop, config = "train", "quickstart.yaml"
    overrides = write_few_queries(run_dir.parent, 2)  # both cases have MSRD's documents
    if case == "smollm2":
        loop, config = "sft", "configs/cpu/plots_sft.yaml"
        overrides += ["train.prompts_per_step=4"]
    overrides += [
        f"run.dir={run_dir}",
        f"run.threads={threads}",
        "train.steps=1000",
        "train.eval_every=0",
        "save.every=0",
    ]
    python = [sys.executable, "-W", "ignore", "-m", f"recr1.{loop}"]
    return [*python, f"experiments/{config}", *overrides]


def print_table(args: argparse.Namespace, medians: dict[str, dict[str, float]]) -> None:
    """Print the seconds per step of each way beside each neighbour."""
    print(f"{args.case}, {args.threads} threads, {args.rounds} rounds, seconds per step (median)")
    print(f"  {'':<8}" + "".join(f"{NEIGHBOURS[neighbour]:>26}" for neighbour in medians))
    for way in args.ways:
        cells = [f"{by_way[way]:26.3f}" for by_way in medians.values()]
        print(f"  {way:<8}" + "".join(cells))


def make_bars(case: str, medians: dict[str, dict[str, float]]) -> list[dict]:
    """Return the bars of the default; none without a quiet figure."""
    if DEFAULT not in medians.get("quiet", {}):
        return []
    quiet = medians["quiet"][DEFAULT]
    bars = []
    for neighbour, by_way in medians.items():
        name = f"{case}: {NEIGHBOURS[neighbour]}"
        value = by_way[DEFAULT] / quiet
        limit = BUSY_BAR
        if neighbour == "quiet":
            name += ", against no setting"
            value = quiet / by_way[UNASKED]
            limit = QUIET_BAR
        bars.append(dict(name=name, value=round(value, 3), bar=limit, ok=value <= limit))
    return bars


if __name__ == "__main__":
    sys.exit(main())
