"""Make a markdown table of runs.

python experiments/analysis/table.py OUT  (run_all_cpu.sh's folder), or RUN [RUN ...] (run folders)

Figures are computed again from the rows of eval_before.jsonl and eval_after.jsonl; a summary.json
that says otherwise ends it. What failed is in the table as failed. Outputs of the scripts
(questions, baselines) follow as they were printed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
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

SCORES = ("raw", "before", "after")

SHORT_HEAD = (*SCORES, "after - raw", "after - before")
TERM_HEAD = ("run", "part", *SHORT_HEAD)
EVALUATION_HEAD = ("rows", "metric", *SHORT_HEAD)


def main() -> None:
    """Print the tables of the paths on the command line."""
    paths = [Path(path) for path in sys.argv[1:]]
    if not paths:
        sys.exit(__doc__)
    out = paths[0] if len(paths) == 1 and (paths[0] / "done").is_dir() else None
    runs = list_runs(out) if out else paths
    lines = format_head(HEAD)
    for run in runs:
        lines.append(format_run(run))
    term_lines = []
    for run in runs:
        if (run / "summary.json").exists():
            term_lines += format_reward_terms(run)
    if term_lines:
        lines += ["", "Parts beside the accuracy", ""]
        lines += format_head(TERM_HEAD)
        lines += term_lines
    if out:
        lines += ["", "Other test sets", ""]
        lines += format_head(EVALUATION_HEAD)
        for path in sorted(out.glob("*/eval_after.jsonl")):
            folder = path.parent
            is_run = (folder / "config.yaml").exists()
            if not is_run:
                lines.append(format_evaluation(folder))
        lines += format_logs(out)
        lines += format_commands(out)
    print("\n".join(lines))


def list_runs(out: Path) -> list[Path]:
    """List the runs in run_all_cpu.sh's folder, the oldest first."""
    runs = [path.parent for path in out.glob("*/config.yaml")]
    return sorted(runs, key=lambda run: run.stat().st_ctime)


def format_logs(out: Path) -> list[str]:
    """Return what the scripts printed; runs and the scripts that prepare data are left out."""
    lines = []
    for log in sorted(out.glob("*.log"), key=get_modified_time):
        is_run = (out / log.stem / "config.yaml").exists()
        if is_run or log.stem.startswith(("data_", "cold_")):
            continue
        printed = log.read_text(encoding="utf-8").splitlines()
        # A line of JSON repeats the figures for programs.
        text = [line for line in printed if not re.match(r"[\[{]", line)]
        lines += ["", f"{log.stem}:", "```", *text, "```"]
    return lines


def format_commands(out: Path) -> list[str]:
    """Return the table of the steps of run_all_cpu.sh: their seconds and commands."""
    lines = ["", "| step | seconds | command |", "|---|---|---|"]
    for path in sorted(out.glob("done/*"), key=get_modified_time):
        text = path.read_text(encoding="utf-8")
        seconds, command = text.rstrip("\n").split("\t", 1)
        lines.append(f"| {path.name} | {seconds} | `{command}` |")
    return lines


def get_modified_time(path: Path) -> float:
    """Return when a file was written last."""
    return path.stat().st_mtime


def format_run(run: Path) -> str:
    """Return a run's row. Exits where summary.json and the rows disagree."""
    summary_path = run / "summary.json"
    if not summary_path.exists():
        empty_cells = [""] * (len(HEAD) - 2)
        return format_row([run.name, "not finished", *empty_cells])
    summary = json.loads(summary_path.read_text(encoding="utf-8"))
    before = read_rows(run / "eval_before.jsonl")
    after = read_rows(run / "eval_after.jsonl")
    metric, *_ = summary["metric"].partition("@")
    figures = compare_evaluations(before, after, metric)
    for name in (*SCORES, "gain"):
        if abs(figures[name] - summary[name]) > 1e-9:
            sys.exit(
                f"{run}: summary.json says {name} {summary[name]}, its rows {figures[name]}; "
                "one of the files is not this run's"
            )
    errors = [row["error"] for row in after if row["error"] is not None]
    cells = [run.name, summary["metric"]]
    cells += format_figures(figures)
    cells.append(f"{figures['after_minus_before_p']:.4f}")
    cells.append(f"{len(errors)} of {len(after)}")
    cells.append(summary["steps"])
    cells.append(f"{summary['wall_s']:.0f}")
    cells.append(summary["seed"])
    return format_row(cells)


def format_reward_terms(run: Path) -> list[str]:
    """Return a row for each term of the reward that is no accuracy, such as diversity."""
    before = read_rows(run / "eval_before.jsonl")
    after = read_rows(run / "eval_after.jsonl")
    lines = []
    for term in list_metrics(after):
        if term not in METRICS:
            figures = compare_evaluations(before, after, term)
            cells = format_figures(figures)
            line = format_row([run.name, term, *cells])
            lines.append(line)
    return lines


def format_evaluation(folder: Path) -> str:
    """Return the row of an evaluation without a run (evaluate.py)."""
    after = read_rows(folder / "eval_after.jsonl")
    metric, *_ = list_metrics(after)
    before_path = folder / "eval_before.jsonl"
    if before_path.exists():
        before = read_rows(before_path)
        figures = compare_evaluations(before, after, metric)
        cells = format_figures(figures)
        return format_row([folder.name, metric, *cells])
    raw = get_column(after, f"{metric}_raw")
    scores = get_column(after, metric)
    gain, interval = compute_mean_ci(scores - raw)
    figures = dict(gain=gain, gain_ci95=interval)
    gain_text = format_change(figures, "gain")
    raw_text = f"{raw.mean():.4f}"
    score_text = f"{scores.mean():.4f}"
    return format_row([folder.name, metric, raw_text, "", score_text, gain_text, ""])


def format_figures(figures: dict) -> list[str]:
    """Return the cells of SHORT_HEAD."""
    cells = [f"{figures[name]:.4f}" for name in SCORES]
    cells.append(format_change(figures, "gain"))
    cells.append(format_change(figures, "after_minus_before"))
    return cells


def format_change(figures: dict, name: str) -> str:
    """Format a mean change with its interval."""
    low, high = figures[f"{name}_ci95"]
    return f"{figures[name]:+.4f} [{low:+.4f}, {high:+.4f}]"


def read_rows(path: Path) -> list[dict]:
    """Read a JSONL file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def format_head(cells: Iterable[str]) -> list[str]:
    """Return the two lines that begin a table."""
    cells = list(cells)
    rules = ["---"] * len(cells)
    return [format_row(cells), format_row(rules)]


def format_row(cells: Iterable) -> str:
    """Format a row of a markdown table."""
    texts = [str(cell) for cell in cells]
    return "| " + " | ".join(texts) + " |"


if __name__ == "__main__":
    main()
