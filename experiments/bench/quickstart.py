"""Check finished quickstart runs against the project's bars, from the files they left.

python experiments/bench/quickstart.py RUN [RUN ...]

Make the runs with `bash experiments/quickstart.sh runs/seed0 run.seed=0`, and so on for seeds 1 and
2. Every figure is recomputed from eval_before.jsonl and eval_after.jsonl; the log-prob gap and the
seconds are read from summary.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from recr1.evaluation.bootstrap import compute_bootstrap_ci


def make_bar(name: str, value: float, limit: float, ok: bool) -> dict:
    """Return a bar for the line of JSON."""
    return dict(name=name, value=round(float(value), 10), bar=limit, ok=bool(ok))


def main(folders: list[str]) -> int:
    """Print the bars of the runs on the command line."""
    if not folders:
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    bars = []
    gains = []
    print(
        f"{'run':<24}{'seed':>5}{'raw':>8}{'before':>8}{'after':>8}   "
        f"{'after - raw':<28}{'after - before':<28}{'wall s':>7}"
    )
    for folder in folders:
        before, after = (
            [json.loads(line) for line in open(Path(folder) / name, encoding="utf-8")]
            for name in ("eval_before.jsonl", "eval_after.jsonl")
        )
        summary = json.loads((Path(folder) / "summary.json").read_text())
        raw, b, a = (
            np.array([row[key] for row in rows])
            for rows, key in ((after, "ndcg_raw"), (before, "ndcg"), (after, "ndcg"))
        )
        gain = a - raw
        lift = a - b
        (gain_low, gain_high), (lift_low, lift_high) = (
            compute_bootstrap_ci(gain),
            compute_bootstrap_ci(lift),
        )
        unparsable = np.mean([row["error"] is not None for row in after])
        gains.append(gain.mean())
        name = Path(folder).name
        seed = summary["seed"]
        print(
            f"{name:<24}{seed:>5}{raw.mean():8.4f}{b.mean():8.4f}{a.mean():8.4f}   "
            f"{f'{gain.mean():+.4f} [{gain_low:+.4f}, {gain_high:+.4f}]':<28}"
            f"{f'{lift.mean():+.4f} [{lift_low:+.4f}, {lift_high:+.4f}]':<28}"
            f"{summary['wall_s']:7.0f}"
        )
        bars += [
            make_bar(
                f"seed {seed}: |before - raw|",
                abs(b.mean() - raw.mean()),
                0.005,
                abs(b.mean() - raw.mean()) <= 0.005,
            ),
            make_bar(f"seed {seed}: after - before", lift.mean(), 0.005, lift.mean() >= 0.005),
            make_bar(
                f"seed {seed}: after - before, interval's low end", lift_low, 0.0, lift_low > 0
            ),
            make_bar(f"seed {seed}: after - raw, interval's low end", gain_low, 0.0, gain_low > 0),
            make_bar(f"seed {seed}: unparsable share", unparsable, 0.003, unparsable <= 0.003),
            make_bar(
                f"seed {seed}: gap mean",
                summary["logprob_gap_mean"],
                1e-6,
                summary["logprob_gap_mean"] <= 1e-6,
            ),
            make_bar(
                f"seed {seed}: gap p99.9",
                summary["logprob_gap_p999"],
                1e-5,
                summary["logprob_gap_p999"] <= 1e-5,
            ),
            make_bar(
                f"seed {seed}: gap max",
                summary["max_logprob_gap"],
                2e-4,
                summary["max_logprob_gap"] <= 2e-4,
            ),
            make_bar(
                f"seed {seed}: wall minutes", summary["wall_s"] / 60, 12, summary["wall_s"] <= 720
            ),
        ]
    bars.append(
        make_bar(
            f"mean after - raw of {len(gains)} runs", np.mean(gains), 0.010, np.mean(gains) >= 0.010
        )
    )
    print(json.dumps({"bars": bars}))
    return 0 if all(b["ok"] for b in bars) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
