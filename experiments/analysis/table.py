"""Make a markdown table of runs.

python experiments/analysis/table.py OUT  (of run_all_cpu.sh, run_all_lm.sh), or RUN [RUN ...]

Figures are computed again from the rows of eval_before.jsonl and eval_after.jsonl; a summary.json
that says otherwise ends it. What failed is in the table as failed. Runs that are called
NAME_seed0, NAME_seed1, ... are averaged too. Outputs of the scripts (questions, baselines) follow
as they were printed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

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
EVALUATION_HEAD = ("rows", "metric", *SHORT_HEAD, "unparsable")
SEEDS_HEAD = ("runs", "metric", "seeds", *SHORT_HEAD)

# of summary.json, what SHORT_HEAD shows
SHORT_FIGURES = (*SCORES, "gain", "after_minus_before")
SEED_SUFFIX = re.compile(r"(.+)_seed(\d+)")


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
    lines += format_seeds(runs)
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
    """List the runs in the folder of a script of many steps, the oldest first."""
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
    """Return the table of the script's steps: their seconds and commands."""
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
    cells = [run.name, summary["metric"]]
    cells += format_figures(figures)
    cells.append(f"{figures['after_minus_before_p']:.4f}")
    cells.append(count_unparsable(after))
    cells.append(summary["steps"])
    cells.append(f"{summary['wall_s']:.0f}")
    cells.append(summary["seed"])
    return format_row(cells)


def format_seeds(runs: list[Path]) -> list[str]:
    """Return the table of the runs that differ in their seed alone: mean and spread over seeds.

    The spread is the standard deviation, with one degree of freedom less; what one seed alone says
    stands in its own row.
    """
    summaries: dict[str, list[dict]] = {}
    for run in runs:
        match = SEED_SUFFIX.fullmatch(run.name)
        path = run / "summary.json"
        if match and path.exists():
            summary = json.loads(path.read_text(encoding="utf-8"))
            summaries.setdefault(match[1], []).append(summary)

    lines = []
    for name, of_seeds in summaries.items():
        if len(of_seeds) < 2:
            continue
        cells = [name, of_seeds[0]["metric"], len(of_seeds)]
        for figure in SHORT_FIGURES:
            values = np.array([summary[figure] for summary in of_seeds])
            sign = "" if figure in SCORES else "+"
            cells.append(f"{values.mean():{sign}.4f} ± {values.std(ddof=1):.4f}")
        lines.append(format_row(cells))
    if not lines:
        return []
    return ["", "Mean ± standard deviation over seeds", "", *format_head(SEEDS_HEAD), *lines]


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
        return format_row([folder.name, metric, *cells, count_unparsable(after)])
    raw = get_column(after, f"{metric}_raw")
    scores = get_column(after, metric)
    gain, interval = compute_mean_ci(scores - raw)
    figures = dict(gain=gain, gain_ci95=interval)
    gain_text = format_change(figures, "gain")
    raw_text = f"{raw.mean():.4f}"
    score_text = f"{scores.mean():.4f}"
    cells = [raw_text, "", score_text, gain_text, ""]
    return format_row([folder.name, metric, *cells, count_unparsable(after)])


def count_unparsable(rows: list[dict]) -> str:
    """Say of how many rows the answer could not be parsed."""
    errors = [row["error"] for row in rows if row["error"] is not None]
    return f"{len(errors)} of {len(rows)}"


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
