"""Measure the log-prob gap between sampler and trainer, and what model.batch_invariant costs.

python experiments/benchmarks/exact.py [--steps 100] [--pairs 2] [a.b=value ...]

Runs the quickstart as it is and with model.batch_invariant=true, each in a process of its own, in
turn (off, on; on, off; ...), in a temporary folder. With `--runs OFF ON` two finished runs are read
instead, for example whole quickstarts. All figures come from the metrics.jsonl and summary.json
that runs leave: the gap over all trained tokens of a run, and the median seconds of a step, its
first ten left out. Ends with one line of JSON: the bars and whether they hold. The ratio needs a
quiet machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
# the gap without batch_invariant; with it the gap is 0
GAP_BARS = {
    "sampling_logp_diff_mean": 1e-6,
    "sampling_logp_diff_p999": 1e-5,
    "sampling_logp_diff_max": 2e-4,
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--runs", nargs=2, type=Path, metavar=("OFF", "ON"))
    parser.add_argument("overrides", nargs="*")
    return parser.parse_args()


def main() -> int:
    """Compare the runs and print the bars."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        if args.runs:
            off_folders = [args.runs[0]]
            on_folders = [args.runs[1]]
        else:
            off_folders, on_folders = train_pairs(Path(scratch), args)
        off_seconds, bars = measure_runs("off", off_folders, GAP_BARS)
        on_seconds, on_bars = measure_runs("on", on_folders, dict.fromkeys(GAP_BARS, 0.0))
    bars += on_bars
    ratio = on_seconds / off_seconds
    bars.append(
        dict(name="seconds of a step, on / off", value=round(ratio, 3), bar=1.3, ok=ratio <= 1.3)
    )
    print(json.dumps({"bars": bars}))
    return 0 if all(bar["ok"] for bar in bars) else 1


def train_pairs(scratch: Path, args: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """Train runs without and with batch_invariant in turn; return the folders of each side."""
    folders = {False: [], True: []}
    for pair in range(args.pairs):
        first = bool(pair % 2)
        for invariant in (first, not first):
            folder = scratch / f"{invariant}{pair}"
            train_run(folder, invariant, args.steps, args.overrides)
            folders[invariant].append(folder)
    return folders[False], folders[True]


def train_run(folder: Path, invariant: bool, steps: int, overrides: list[str]) -> None:
    """Train a run in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "recr1.train",
        "experiments/quickstart.yaml",
        f"run.dir={folder}",
        f"train.steps={steps}",
        "train.eval_every=0",
        f"model.batch_invariant={str(invariant).lower()}",
        *overrides,
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def measure_runs(
    side: str, folders: list[Path], limits: dict[str, float]
) -> tuple[float, list[dict]]:
    """Print one side's figures; return its seconds of a step and the bars of its gap."""
    step_count = 0
    step_seconds = []
    summaries = []
    for folder in folders:
        rows = read_rows(folder / "metrics.jsonl")
        step_count += len(rows)
        for row in rows[10:] or rows:
            step_seconds.append(row["timing_s"]["step"])
        summary = (folder / "summary.json").read_text()
        summaries.append(json.loads(summary))

    seconds = median(step_seconds)
    threads = summaries[0]["threads"]
    gaps = "; ".join(format_gap(summary) for summary in summaries)
    print(
        f"batch_invariant {side:<3} {step_count:>5} steps, "
        f"{threads} threads, {seconds:.3f} s a step; gap of the runs: {gaps}"
    )
    bars = []
    for name, limit in limits.items():
        value = max(summary[name] for summary in summaries)
        bars.append(dict(name=f"{side}: {name}", value=value, bar=limit, ok=value <= limit))
    return seconds, bars


def read_rows(path: Path) -> list[dict]:
    """Read a JSONL file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def format_gap(summary: dict) -> str:
    """Format the gap of one run."""
    mean = summary["sampling_logp_diff_mean"]
    p999 = summary["sampling_logp_diff_p999"]
    largest = summary["sampling_logp_diff_max"]
    return f"mean {mean:.1e}, p99.9 {p999:.1e}, max {largest:.1e}"


if __name__ == "__main__":
    sys.exit(main())
