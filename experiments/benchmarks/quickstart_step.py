"""Measure the seconds per step of the quickstart, in three variants, in turn.

They are: as it is, on two ranks of one thread, and with the recomputing head.

python experiments/benchmarks/quickstart_step.py [STEPS] [ROUNDS]. A figure is the median of
`seconds.step` over a run's steps but the first five; each round runs all variants, one after the
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
VARIANTS = {
    "default (1 rank x 2 threads, fused)": (1, 2, ()),
    "2 ranks x 1 thread": (2, 1, ()),
    "head recompute": (1, 2, ("model.head=recompute",)),
}


def measure_seconds(ranks: int, threads: int, overrides: tuple, steps: int) -> float:
    """Run the quickstart and return the median seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        launch = (
            ["-m", "recr1.train"]
            if ranks == 1
            else [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(ranks),
                "-m",
                "recr1.train",
            ]
        )
        command = [
            sys.executable,
            *launch,
            "experiments/quickstart.yaml",
            f"run.dir={folder}/run",
            f"run.threads={threads}",
            f"train.steps={steps}",
            # lr 0: every variant does the same work
            "train.eval_every=0",
            "optimizer.warmup_steps=0",
            "optimizer.lr=0",
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
        return float(
            np.median(
                [
                    json.loads(line)["timing_s"]["step"]
                    for line in open(f"{folder}/run/metrics.jsonl")
                ][5:]
            )
        )


def main() -> None:
    """Run all variants in turn and print their seconds."""
    arguments = [int(text) for text in sys.argv[1:]]
    steps, rounds = arguments + [60, 3][len(arguments) :]
    rows = [
        {name: measure_seconds(*how, steps) for name, how in VARIANTS.items()}
        for _ in range(rounds)
    ]
    base = next(iter(VARIANTS))
    bars = []
    for name in VARIANTS:
        ratio = float(np.median([row[base] / row[name] for row in rows]))
        print(
            f"{name:<40} {np.median([row[name] for row in rows]):.3f} s per step "
            f"{[f'{row[name]:.3f}' for row in rows]}, default / this {ratio:.2f}"
        )
        if name != base:
            bars.append(
                {
                    "name": f"default over {name}, seconds per step",
                    "value": ratio,
                    "bar": 1.0,
                    "ok": ratio <= 1.0,
                }
            )
    print(json.dumps({"bars": bars}))


if __name__ == "__main__":
    main()
