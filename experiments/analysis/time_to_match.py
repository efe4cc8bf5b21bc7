"""Measure how long GRPO takes to be as good as SFT.

python experiments/analysis/time_to_match.py SFT_RUN GRPO_RUN [--json]

Rec-R1 says that GRPO matches a two-epoch SFT model in 210 s, and a replication could not confirm
it. The validations of both runs are compared along their wall seconds (of steps; for SFT with the
time its teacher took, from summary.json): the answer is the first validation of GRPO that reaches
SFT's last one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    """Print both runs' validations and where GRPO reaches SFT."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sft", type=Path)
    parser.add_argument("grpo", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = parser.parse_args()
    sft_validations = read_validations(args.sft)
    grpo_validations = read_validations(args.grpo)
    summary = json.loads((args.sft / "summary.json").read_text())
    sft_wall_s = summary["wall_s"]
    target = sft_validations[-1]
    print(
        f"SFT's last validation: gain {format_gain(target)} after "
        f"{target['seconds']:.0f} s of steps, {sft_wall_s:.0f} s with teacher and evaluations"
    )

    match = None  # the first validation that reaches the target
    for validation in grpo_validations:
        note = ""
        if match is None and validation["gain"] >= target["gain"]:
            match = validation
            note = "   <- reached"
        gain = format_gain(validation)
        print(f"  GRPO, {validation['seconds']:6.0f} s: {gain}{note}")
    if match is None:
        print("GRPO did not reach it")
    if args.json:
        figures = dict(
            sft_gain=target["gain"],
            sft_gain_ci95=target["ci"],
            sft_wall_s=sft_wall_s,
            grpo_seconds=match and match["seconds"],
            grpo_gain=match and match["gain"],
            grpo_gain_ci95=match and match["ci"],
        )
        print(json.dumps(figures))


def read_validations(run: Path) -> list[dict]:
    """Return [{step, seconds since the first step, gain over raw, ci}] of a run's metrics.jsonl."""
    validations = []
    seconds = 0.0
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    for line in text.splitlines():
        row = json.loads(line)
        seconds += row["timing_s"]["step"]
        if "val_gain" in row:
            validation = dict(step=row["step"], seconds=seconds)
            validation["gain"] = row["val_gain"]
            validation["ci"] = row["val_gain_ci95"]
            validations.append(validation)
    if not validations:
        raise SystemExit(f"{run}: no validation in metrics.jsonl; train with train.eval_every")
    return validations


def format_gain(validation: dict) -> str:
    """Format a validation's gain with its 95% interval."""
    low, high = validation["ci"]
    return f"{validation['gain']:+.4f} [{low:+.4f}, {high:+.4f}]"


if __name__ == "__main__":
    main()
