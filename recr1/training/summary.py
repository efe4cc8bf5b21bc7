"""What a finished run says of itself: summary.json and the text that a user reads at the end."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from recr1.config.schema import Config
from recr1.evaluation import evaluate

BIASED_BY_TOP_P = (
    "sampling.top_p = {} samples from a truncated distribution and trains the whole one: "
    "the gradient is biased (1 is not)"
)


class RunResults(NamedTuple):
    """The test split before and after training: its rows, and the figures of every metric."""

    before: list[dict]
    after: list[dict]
    figures: dict[str, dict]  # by metric or reward term: see evaluate.compare_evaluations


def compare_test_results(before: list[dict], after: list[dict]) -> RunResults:
    """Compare the evaluations of the test split on every metric that their rows have."""
    figures = {
        name: evaluate.compare_evaluations(before, after, name)
        for name in evaluate.list_metrics(after)
    }
    return RunResults(before, after, figures)


def summarize_test_results(cfg: Config, results: RunResults) -> dict:
    """Return the part of summary.json that says what the run has achieved on the test split."""
    metric = cfg.reward.metric
    return dict(
        metric=f"{metric}@{cfg.reward.k_eval}",
        n_eval=len(results.after),
        **results.figures[metric],
        reward_terms=results.figures,
        unparsable_before=_count_errors(results.before),
        unparsable_after=_count_errors(results.after),
    )


def _count_errors(rows: list[dict]) -> int:
    return sum(row["error"] is not None for row in rows)


def describe_bias(cfg: Config, loop: str) -> str:
    """Say in a sentence why the gradient is biased; empty where it is not."""
    if loop == "train" and cfg.sampling.top_p < 1:
        return BIASED_BY_TOP_P.format(cfg.sampling.top_p)
    return ""


def format_results(
    cfg: Config, loop: str, results: RunResults, folder: Path, has_checkpoints: bool
) -> str:
    """Format what the user reads at the end: the table, some answers, and the folder's files."""
    metric = cfg.reward.metric
    table = evaluate.format_table(
        results.before, results.after, metric, cfg.reward.k_eval, results.figures
    )
    examples = evaluate.format_examples(results.after, metric)
    texts_of_loop = "rollouts.jsonl.gz" if loop == "train" else "teacher.jsonl"
    adapter = "adapter/ (PEFT's), " if cfg.lora.rank else ""
    checkpoints = ", checkpoints/" if has_checkpoints else ""
    return (
        f"\n{table}\n\nanswers on test:\n{examples}\n\n"
        f"{folder}/: model/ (Hugging Face folder), {adapter}summary.json, eval_before.jsonl, "
        f"eval_after.jsonl, metrics.jsonl, {texts_of_loop}, config.yaml, versions.json{checkpoints}"
    )
