"""Runs -> markdown: python experiments/table.py OUT  (cpu_all.sh's folder), or RUN [RUN ...] (run
folders)

Figures are computed again from the rows of eval_before.jsonl and eval_after.jsonl; a summary.json
that says otherwise ends it. What failed stands in the table as failed. Outputs of the scripts
(questions, baselines) follow as they were printed.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from recr1.evaluation.evaluate import compare_evaluations, compute_mean_ci, get_column, list_metrics
from recr1.tasks.rewards import METRICS

HEAD = (
    "run",
    "metric",
    "raw",
    "before",
    "after",
    "after - raw",
    "after - before",
    "p",
    "unparsable",
    "steps",
    "wall s",
    "seed",
)


def main() -> None:
    paths = [Path(path) for path in sys.argv[1:]]
    if not paths:
        sys.exit(__doc__)
    out = paths[0] if len(paths) == 1 and (paths[0] / "done").is_dir() else None
    runs = (
        sorted(
            (path.parent for path in out.glob("*/config.yaml")), key=lambda run: run.stat().st_ctime
        )
        if out
        else paths
    )
    lines = [row(HEAD), row("---" for _ in HEAD), *map(run_row, runs)]
    if parts := [
        line for run in runs if (run / "summary.json").exists() for line in parts_rows(run)
    ]:
        lines += [
            "",
            "Parts beside the accuracy",
            "",
            row(("run", "part", "raw", "before", "after", "after - raw", "after - before")),
            row(["---"] * 7),
            *parts,
        ]
    if out:
        lines += [
            "",
            "Other test sets",
            "",
            row(("rows", "metric", "raw", "before", "after", "after - raw", "after - before")),
            row(["---"] * 7),
        ]
        lines += [
            rows_row(path.parent)
            for path in sorted(out.glob("*/eval_after.jsonl"))
            if not (path.parent / "config.yaml").exists()
        ]
        for log in sorted(out.glob("*.log"), key=lambda path: path.stat().st_mtime):
            if not (out / log.stem / "config.yaml").exists() and not log.stem.startswith(
                ("data_", "cold_")
            ):
                text = [
                    line
                    for line in log.read_text(encoding="utf-8").splitlines()
                    if not re.match(r"[\[{]", line)
                ]
                lines += ["", f"{log.stem}:", "```", *text, "```"]
        lines += ["", "| step | seconds | command |", "|---|---|---|"]
        for name in sorted(out.glob("done/*"), key=lambda path: path.stat().st_mtime):
            seconds, command = name.read_text(encoding="utf-8").rstrip("\n").split("\t", 1)
            lines.append(f"| {name.name} | {seconds} | `{command}` |")
    print("\n".join(lines))


def run_row(run: Path) -> str:
    if not (run / "summary.json").exists():
        return row([run.name, "not finished", *[""] * (len(HEAD) - 2)])
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    before = read(run, "eval_before.jsonl")
    after = read(run, "eval_after.jsonl")
    metric = summary["metric"].partition("@")[0]
    figures = compare_evaluations(before, after, metric)
    for name in ("raw", "before", "after", "gain"):
        if abs(figures[name] - summary[name]) > 1e-9:
            sys.exit(
                f"{run}: summary.json says {name} {summary[name]}, its rows {figures[name]}; "
                "one of the files is not this run's"
            )
    return row(
        [
            run.name,
            summary["metric"],
            *(f"{figures[name]:.4f}" for name in ("raw", "before", "after")),
            change(figures, "gain"),
            change(figures, "after_minus_before"),
            f"{figures['after_minus_before_p']:.4f}",
            f"{sum(r['error'] is not None for r in after)} of {len(after)}",
            summary["steps"],
            f"{summary['wall_s']:.0f}",
            summary["seed"],
        ]
    )


def parts_rows(run: Path) -> list[str]:
    """A row for each part of the reward that is no accuracy, such as diversity."""
    before = read(run, "eval_before.jsonl")
    after = read(run, "eval_after.jsonl")
    figures = {
        part: compare_evaluations(before, after, part)
        for part in list_metrics(after)
        if part not in METRICS
    }
    return [
        row(
            [
                run.name,
                part,
                *(f"{f[name]:.4f}" for name in ("raw", "before", "after")),
                change(f, "gain"),
                change(f, "after_minus_before"),
            ]
        )
        for part, f in figures.items()
    ]


def rows_row(folder: Path) -> str:
    """Of rows without a run (evaluate.py)."""
    after = read(folder, "eval_after.jsonl")
    metric = list_metrics(after)[0]
    if (folder / "eval_before.jsonl").exists():
        figures = compare_evaluations(read(folder, "eval_before.jsonl"), after, metric)
        return row(
            [
                folder.name,
                metric,
                *(f"{figures[name]:.4f}" for name in ("raw", "before", "after")),
                change(figures, "gain"),
                change(figures, "after_minus_before"),
            ]
        )
    raw = get_column(after, f"{metric}_raw")
    own = get_column(after, metric)
    gain, ci = compute_mean_ci(own - raw)
    return row(
        [
            folder.name,
            metric,
            f"{raw.mean():.4f}",
            "",
            f"{own.mean():.4f}",
            change(dict(gain=gain, gain_ci95=ci), "gain"),
            "",
        ]
    )


def change(figures: dict, name: str) -> str:
    low, high = figures[f"{name}_ci95"]
    return f"{figures[name]:+.4f} [{low:+.4f}, {high:+.4f}]"


def read(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


def row(cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
