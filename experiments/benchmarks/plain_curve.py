"""Train the quickstart by recr1.plain for ten minutes, and by recr1.train for as many steps.

python experiments/benchmarks/plain_curve.py [--minutes 10] [a.b=value ...]

Both have the quickstart's config whole: the learning rates are those of its first steps. Plain is
stopped when the minutes are over, counted from its first step; recr1.train goes as far. The reward
and the seconds of each step stand side by side. One or two texts of the first step's 512 differ: a
random number of theirs lies within rounding of the edge between two tokens. From there on the two
are different samples of the same algorithm. Ends with one line of JSON: the bars and whether they
hold.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from few_queries import write_few_queries

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.2


def start_run(module: str, folder: Path, overrides: list[str]) -> subprocess.Popen:
    """Start the quickstart by a module of recr1."""
    command = [sys.executable, "-W", "ignore", "-m", module, "experiments/quickstart.yaml"]
    settings = [f"run.dir={folder}", "train.eval_every=0", "log.print_every=1000000", *overrides]
    return subprocess.Popen([*command, *settings], cwd=ROOT, stdout=subprocess.DEVNULL)


def read_rows(folder: Path) -> list[dict]:
    """Read the steps that a run has logged so far."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]  # the last one may be half written


def run_for(module: str, folder: Path, overrides: list[str], seconds: float) -> list[dict]:
    """Run for so many seconds from the first step on, and return the steps."""
    run = start_run(module, folder, overrides)
    try:
        while run.poll() is None and not (folder / "eval_before.jsonl").exists():
            time.sleep(POLL_S)
        deadline = time.monotonic() + seconds
        while run.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
    finally:
        stop(run)
    return read_rows(folder)


def run_to(module: str, folder: Path, overrides: list[str], steps: int) -> list[dict]:
    """Run until so many steps are logged, and return them."""
    run = start_run(module, folder, overrides)
    try:
        while run.poll() is None and len(read_rows(folder)) < steps:
            time.sleep(POLL_S)
    finally:
        stop(run)
    return read_rows(folder)[:steps]


def stop(run: subprocess.Popen) -> None:
    """End a run that goes on, and wait for it."""
    if run.poll() is None:
        run.terminate()
    run.wait()


def main() -> int:
    """Train by both and print the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, one step or so")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings of both runs")
    args = parser.parse_args()
    minutes = 0.02 if args.dry_run else args.minutes

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        overrides = args.overrides
        if args.dry_run:
            overrides = ["train.prompts_per_step=2", "sampling.max_new_tokens=4", *overrides]
            overrides += write_few_queries(folder)
        ours = run_for("recr1.plain", folder / "plain", overrides, 60 * minutes)
        if not ours:
            sys.exit("plain_curve.py: recr1.plain finished no step; give it more --minutes")
        theirs = run_to("recr1.train", folder / "fast", overrides, len(ours))

    print(f"{'step':>5}{'reward plain':>14}{'reward train':>14}{'s plain':>10}{'s train':>10}")
    for a, b in zip(ours, theirs, strict=True):
        print(
            f"{a['step']:>5}{a['reward']:14.4f}{b['reward']:14.4f}"
            f"{a['timing_s']['step']:10.2f}{b['timing_s']['step']:10.2f}"
        )
    differences = np.array([a["reward"] - b["reward"] for a, b in zip(ours, theirs)])
    differing = np.flatnonzero(differences)
    first = int(differing[0]) + 1 if len(differing) else None
    ratio = median(row["timing_s"]["step"] for row in ours) / median(
        row["timing_s"]["step"] for row in theirs
    )
    print(f"{len(ours)} steps; rewards first differ at step {first}")
    print(f"a step of recr1.plain takes {ratio:.1f} times as long")
    # Once a token differs the two sample different texts: a step's rewards then differ by chance,
    # and what must be near 0 is the mean over the steps.
    mean = float(differences.mean())
    error = float(differences.std() / len(differences) ** 0.5)
    largest = float(np.abs(differences).max())
    print(
        f"plain - train: {mean:+.4f}, standard error {error:.4f}; largest of a step {largest:.4f}"
    )
    in_errors = abs(mean) / error if error else 0.0
    holds = in_errors <= 3
    name = "mean difference of the steps' rewards, in standard errors"
    print(json.dumps({"bars": [dict(name=name, value=in_errors, bar=3.0, ok=holds)]}))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
