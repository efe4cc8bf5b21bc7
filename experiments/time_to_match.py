"""How long until GRPO is as good as SFT? python experiments/time_to_match.py SFT_RUN GRPO_RUN
[--json]

Rec-R1 says that GRPO matches a two-epoch SFT model in 210 s, and a replication could not confirm
it. Both runs' validations are laid along their wall seconds (of steps; for SFT with the time its
teacher took, from summary.json): the first validation of GRPO that reaches SFT's last one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("sft", type=Path)
    p.add_argument("grpo", type=Path)
    p.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = p.parse_args()
    sft = validations(args.sft)
    grpo = validations(args.grpo)
    total = json.loads((args.sft / "summary.json").read_text())["wall_s"]
    target = sft[-1]
    reached = next((point for point in grpo if point["gain"] >= target["gain"]), None)
    print(
        f"SFT's last validation: gain {target['gain']:+.4f} {interval(target)} after "
        f"{target['seconds']:.0f} s of steps, {total:.0f} s with teacher and evaluations"
    )
    for point in grpo:
        print(
            f"  GRPO, {point['seconds']:6.0f} s: {point['gain']:+.4f} "
            f"{interval(point)}{'   <- reached' if point is reached else ''}"
        )
    if reached is None:
        print("GRPO did not reach it")
    if args.json:
        print(
            json.dumps(
                dict(
                    sft_gain=target["gain"],
                    sft_gain_ci95=target["ci"],
                    sft_wall_s=total,
                    grpo_seconds=reached and reached["seconds"],
                    grpo_gain=reached and reached["gain"],
                    grpo_gain_ci95=reached and reached["ci"],
                )
            )
        )


def validations(run: Path) -> list[dict]:
    """[{step, seconds since the first step, gain over raw, ci}] of a run's metrics.jsonl."""
    found = []
    seconds = 0.0
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        seconds += row["seconds"]["step"]
        if "val_gain" in row:
            found.append(
                dict(
                    step=row["step"], seconds=seconds, gain=row["val_gain"], ci=row["val_gain_ci95"]
                )
            )
    if not found:
        raise SystemExit(f"{run}: no validation in metrics.jsonl; train with train.eval_every")
    return found


def interval(point: dict) -> str:
    return f"[{point['ci'][0]:+.4f}, {point['ci'][1]:+.4f}]"


if __name__ == "__main__":
    main()
