"""Seconds per step of the quickstart: one rank of two threads against two ranks of one, in turn. python experiments/bench/ranks.py [steps] [rounds]

Each round runs both, one after the other, and takes the median of `seconds.step` over its steps but the first five. The faster one should be the
quickstart's default.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def seconds(ranks: int, threads: int, steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        launch = ["-m", "recr1.train"] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "recr1.train"]
        command = [sys.executable, *launch, "experiments/quickstart.yaml", f"run.dir={folder}/run", f"run.threads={threads}", f"train.steps={steps}",
                   "train.eval_every=0"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        return float(np.median([json.loads(line)["seconds"]["step"] for line in open(f"{folder}/run/metrics.jsonl")][5:]))


def main() -> None:
    steps, rounds = (int(x) for x in (sys.argv[1:] + ["60", "3"][len(sys.argv) - 1:]))
    one, two = zip(*((seconds(1, 2, steps), seconds(2, 1, steps)) for _ in range(rounds)))
    print(f"seconds per step, median of {rounds} rounds: 1 rank x 2 threads {np.median(one):.3f} {[f'{x:.3f}' for x in one]}, "
          f"2 ranks x 1 thread {np.median(two):.3f} {[f'{x:.3f}' for x in two]}, ratio {np.median(two) / np.median(one):.2f}")
    ratio = float(np.median(np.array(one) / np.array(two)))
    print(json.dumps({"bars": [{"name": "the default (1 rank x 2 threads) over 2 ranks x 1 thread, seconds per step", "value": ratio, "bar": 1.0, "ok": ratio <= 1.0}]}))


if __name__ == "__main__":
    main()
