"""Train the quickstart's policy under every loss: python experiments/benchmarks/losses.py [OUT]

Every recipe of recr1/rl/losses.py has the quickstart's settings but --steps, four optimizer steps
for a step's rollouts (with one, every ratio is 1 and no clip does anything) and what its paper
prescribes (PRESCRIBED). maxrl needs rewards of at least 0 and gdpo two terms: their rewards are
others, and so is their zero-variance share. The validation split is scored once, at the end; of the
test split 20 queries stand in. A run that is finished is not run again, one that was stopped goes
on. Writes OUT/losses.md and prints it; ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from few_queries import write_few_queries
from tqdm import tqdm

from recr1.rl.losses import RECIPES

ROOT = Path(__file__).resolve().parents[2]
WHOLE_ROLLOUTS = ("gspo", "gmpo", "luspo")  # these need model.head=recompute
GSPO_CLIP = ("loss.clip_ratio_low=3e-4", "loss.clip_ratio_high=4e-4")
PRESCRIBED = {
    "dapo": ("loss.clip_ratio_high=0.28", "sampling.dynamic_sampling=2"),
    "gspo": GSPO_CLIP,
    "gmpo": ("loss.clip_ratio_low=0.4",),
    "luspo": GSPO_CLIP,
    "dppo_tv": ("loss.clip_ratio_low=0.15",),
    "dppo_kl": ("loss.clip_ratio_low=0.05",),
    "maxrl": ("reward.unparsable=0",),
    "gdpo": ("reward.weights={ndcg: 1.0, recall: 1.0}",),
}
SMALL = ("train.prompts_per_step=4", "train.eval_queries=8", "sampling.max_new_tokens=8")


class Figures(NamedTuple):
    """What one run has come to."""

    gain: float  # of ndcg over the raw query's, on validation
    low: float  # its 95% interval over the queries
    high: float
    zero_variance: float  # share of the groups, mean over the steps
    entropy: float  # mean over the last tenth of the steps
    clipped: float  # share of the tokens, mean over the steps
    seconds: float  # of a step, median


def list_settings(kind: str, seed: int, steps: int, folder: Path) -> list[str]:
    """List the settings of a run that are not the quickstart's."""
    settings = [f"loss.kind={kind}", f"run.seed={seed}", f"run.dir={folder}"]
    settings += [f"train.steps={steps}", f"train.eval_every={steps}", "train.num_mini_batches=4"]
    settings += ["log.print_every=1000000", "log.show_every=0", *PRESCRIBED.get(kind, ())]
    if kind in WHOLE_ROLLOUTS:
        settings.append("model.head=recompute")
    return settings


def run_once(kind: str, seed: int, steps: int, folder: Path, more: list[str]) -> Figures:
    """Return the figures of a run, which is trained unless it is finished."""
    if not (folder / "summary.json").exists():
        settings = list_settings(kind, seed, steps, folder)
        command = [sys.executable, "-W", "ignore", "-m", "recr1.train"]
        command += ["experiments/quickstart.yaml", *settings, *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"losses.py: {kind}, seed {seed}:\n{done.stderr[-2000:]}")
    return read_figures(folder)


def read_figures(folder: Path) -> Figures:
    """Read the figures of a finished run from its metrics."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    low, high = rows[-1]["val_gain_ci95"]
    last_tenth = rows[-max(1, len(rows) // 10) :]
    # a step in which nothing was trained has no entropy
    entropies = [row["entropy"] for row in last_tenth if row.get("entropy") is not None]
    return Figures(
        gain=rows[-1]["val_gain"],
        low=low,
        high=high,
        zero_variance=mean(row["frac_reward_zero_std"] for row in rows),
        entropy=mean(entropies) if entropies else 0.0,
        clipped=mean(row["clip_ratio"] for row in rows),
        seconds=median(row["timing_s"]["step"] for row in rows),
    )


def format_table(figures: dict[str, list[Figures]]) -> str:
    """Format a row per loss: means over the seeds, the interval too, and every seed's gain."""
    names = "validation gain", "by seed", "zero-variance", "entropy", "clipped", "s/step"
    lines = [f"| loss | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for kind, runs in figures.items():
        average = Figures(*(mean(column) for column in zip(*runs)))
        seeds = ", ".join(f"{run.gain:+.4f}" for run in runs)
        lines.append(
            f"| `{kind}` | {average.gain:+.4f} [{average.low:+.4f}, {average.high:+.4f}] | {seeds} "
            f"| {average.zero_variance:.3f} | {average.entropy:.3f} | {average.clipped:.4f} "
            f"| {average.seconds:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Train what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "runs/losses")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=value", dest="overrides")
    args = parser.parse_args()

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    more = [*(SMALL if args.dry_run else ()), *args.overrides, *write_few_queries(out)]
    figures: dict[str, list[Figures]] = {kind: [] for kind in args.kinds}
    # all losses of one seed first: a part of the table is a fair one
    runs = [(kind, seed) for seed in args.seeds for kind in args.kinds]
    for kind, seed in tqdm(runs, "runs", disable=None):
        folder = out / f"{kind}-{args.steps}-seed{seed}"
        figures[kind].append(run_once(kind, seed, args.steps, folder, more))

    table = format_table(figures)
    (out / "losses.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    print(json.dumps({"bars": []}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
