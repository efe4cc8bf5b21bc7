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


def train_run(folder: Path, invariant: bool, steps: int, overrides: list[str]) -> Path:
    """Train a run in a process of its own."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "recr1.train",
            "experiments/quickstart.yaml",
            f"run.dir={folder}",
            f"train.steps={steps}",
            "train.eval_every=0",
            f"model.batch_invariant={str(invariant).lower()}",
            *overrides,
        ],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return folder


def main() -> int:
    """Compare the runs and print the bars."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--runs", nargs=2, type=Path, metavar=("OFF", "ON"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs: dict[bool, list[Path]] = {False: [], True: []}
        for pair in range(0 if args.runs else args.pairs):
            for on in (bool(pair % 2), not pair % 2):
                runs[on].append(
                    train_run(Path(scratch) / f"{on}{pair}", on, args.steps, args.overrides)
                )
        if args.runs:
            runs = {False: [args.runs[0]], True: [args.runs[1]]}
        seconds = {}
        bars = []
        for on, folders in runs.items():
            rows = [
                [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]
                for folder in folders
            ]
            summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
            seconds[on] = median(
                row["timing_s"]["step"] for some in rows for row in some[10:] or some
            )
            word = "on" if on else "off"
            print(
                f"batch_invariant {word:<3} {sum(map(len, rows)):>5} steps, "
                f"{summaries[0]['threads']} threads, {seconds[on]:.3f} s a step; gap of the runs: "
                + "; ".join(
                    f"mean {s['sampling_logp_diff_mean']:.1e}, "
                    f"p99.9 {s['sampling_logp_diff_p999']:.1e}, "
                    f"max {s['sampling_logp_diff_max']:.1e}"
                    for s in summaries
                )
            )
            for name, limit in (
                ("sampling_logp_diff_mean", 1e-6),
                ("sampling_logp_diff_p999", 1e-5),
                ("sampling_logp_diff_max", 2e-4),
            ):
                value = max(s[name] for s in summaries)
                bar = 0.0 if on else limit
                bars.append(dict(name=f"{word}: {name}", value=value, bar=bar, ok=value <= bar))
    ratio = seconds[True] / seconds[False]
    bars.append(
        dict(name="seconds of a step, on / off", value=round(ratio, 3), bar=1.3, ok=ratio <= 1.3)
    )
    print(json.dumps({"bars": bars}))
    return 0 if all(bar["ok"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
