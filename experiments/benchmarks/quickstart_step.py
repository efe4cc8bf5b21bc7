"""Measure the seconds per step of the quickstart, in three variants, in turn.

They are: as it is, on two ranks of one thread, and with the recomputing head.

python experiments/benchmarks/quickstart_step.py [STEPS] [ROUNDS]. A figure is the median of
`timing_s.step` over a run's steps but the first five; each round runs all variants, one after the
other. The default should be the fastest. Run it on a quiet machine: two threads wait for each
other.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = "default (1 rank x 2 threads, fused)"
# ranks, threads of each, overrides
VARIANTS = {
    DEFAULT: (1, 2, ()),
    "2 ranks x 1 thread": (2, 1, ()),
    "head recompute": (1, 2, ("model.head=recompute",)),
}
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
SAME_WORK = ["train.eval_every=0", "optimizer.warmup_steps=0", "optimizer.lr=0"]
WARM = 5  # steps that do not count


def measure_seconds(ranks: int, threads: int, overrides: tuple, steps: int) -> float:
    """Run the quickstart and return the median seconds of a step."""
    launcher = [] if ranks == 1 else [*LAUNCHER, str(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            *launcher,
            "-m",
            "recr1.train",
            "experiments/quickstart.yaml",
            f"run.dir={folder}/run",
            f"run.threads={threads}",
            f"train.steps={steps}",
            *SAME_WORK,
            *overrides,
        ]
        subprocess.run(
            command,
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        seconds = read_seconds(Path(folder) / "run/metrics.jsonl")
    return float(np.median(seconds[WARM:]))


def read_seconds(path: Path) -> list[float]:
    """Read the seconds of each step."""
    seconds = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            seconds.append(row["timing_s"]["step"])
    return seconds


def main() -> None:
    """Run all variants in turn and print their seconds."""
    arguments = [int(text) for text in sys.argv[1:]]
    defaults = [60, 3]
    steps, rounds = arguments + defaults[len(arguments) :]
    seconds = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, (ranks, threads, overrides) in VARIANTS.items():
            median = measure_seconds(ranks, threads, overrides, steps)
            seconds[name].append(median)

    bars = []
    for name in VARIANTS:
        ratios = []
        for default, variant in zip(seconds[DEFAULT], seconds[name]):
            ratios.append(default / variant)
        ratio = float(np.median(ratios))
        median = np.median(seconds[name])
        by_round = [f"{value:.3f}" for value in seconds[name]]
        print(f"{name:<40} {median:.3f} s per step {by_round}, default / this {ratio:.2f}")
        if name != DEFAULT:
            title = f"default over {name}, seconds per step"
            bars.append(dict(name=title, value=ratio, bar=1.0, ok=ratio <= 1.0))
    print(json.dumps({"bars": bars}))


if __name__ == "__main__":
    main()
