"""Read the files of a run for its report.

The files are config, versions, summary, test scores, and metrics.jsonl, which becomes curves with
marks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recr1.config import loader as configs
from recr1.config.schema import Config
from recr1.data.readers import DataError
from recr1.evaluation.bootstrap import compute_bootstrap_ci
from recr1.tasks.registry import TASKS
from recr1.utils.renamed import (
    RENAMED_METRICS,
    RENAMED_SUMMARY_KEYS,
    RENAMED_TEACHER_KEYS,
    rename_keys,
)

# points drawn of a curve; more steps share a point, which has their mean, minimum and maximum
MAX_POINTS = 400

MAX_MARKS = 50  # of one kind

CURVES = (
    "loss",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "kl",
    "entropy",
    "completion_length",
    "clip_ratio",
    "format_error_rate",
    "truncated_ratio",
    "sampling_logp_diff_mean",
    "sampling_logp_diff_p999",
    "sampling_logp_diff_max",
    "grad_norm",
    "lr",
    "rollout_tokens_per_s",
    "tokens_per_s",
)

# what each task's answer is compared with, and the answer
TASK_WORDS = {
    "product_search": ("raw query", "rewrite"),
    "sequential": ("raw query", "policy's query"),
    "rerank": ("given order", "new order"),
    "recommend_list": ("given order", "list"),
}

METRIC_NAMES = {"hit": "hit rate", "ndcg": "NDCG", "mrr": "MRR"}

TIMED_PHASES = ("sample", "reward", "train", "step")


@dataclass
class RunRecord:
    """One run as its files have it. `notes`: what is missing or was left out, for the reader."""

    folder: Path
    config: Config
    metrics: list[dict]
    before: list[dict]
    after: list[dict]
    summary: dict
    versions: list[dict]
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Return the number of the last step that was logged."""
        return self.metrics[-1]["step"]

    @property
    def loop(self) -> str:
        """Return "train", or "sft", which has no rollouts and no rewards."""
        has_rewards = any("reward" in row for row in self.metrics)
        return "train" if has_rewards else "sft"

    @property
    def planned(self) -> int | None:
        """Return the number of steps that the run was to take; None where it is not known.

        Only the end of SFT's passes over texts tells how many steps they are.
        """
        steps_of_summary = self.summary.get("steps")
        if steps_of_summary:
            return steps_of_summary
        if self.loop == "sft" and self.config.sft.epochs:
            return None
        return self.config.train.steps

    @property
    def metric(self) -> str:
        """Return the metric that the report is about, such as ndcg@100."""
        return f"{self.config.reward.metric}@{self.config.reward.k_eval}"

    def scores(self, rows: list[dict], of: str = "") -> np.ndarray:
        """Return each test query's reward.metric, (Q,).

        of: "" for the policy's answer, "_raw" for the raw answer.
        """
        return np.array([row[self.config.reward.metric + of] for row in rows])


def read_run(folder: Path) -> RunRecord:
    """Read the folder of a run, finished or not. Raises DataError, ConfigError."""
    config_path = folder / "config.yaml"
    if not config_path.is_file():
        raise DataError(
            f"{folder}: not a run's folder, it has no config.yaml; name what run.dir was"
        )
    config = configs.load_run_config(folder)
    notes: list[str] = []
    metrics = _read_metrics(folder, notes)

    # Test scores before and after training belong to the same queries.
    before = _read_scores(folder / "eval_before.jsonl", notes, config.reward.metric)
    after = _read_scores(folder / "eval_after.jsonl", notes, config.reward.metric)
    if after and [row["id"] for row in before] != [row["id"] for row in after]:
        raise DataError(
            f"{folder / 'eval_after.jsonl'}: its queries are not those of eval_before.jsonl; "
            "the two are of different runs"
        )

    summary = _read_json_object(folder / "summary.json", notes, {})
    summary = rename_keys(summary, RENAMED_SUMMARY_KEYS)
    if "teacher" in summary:
        summary["teacher"] = rename_keys(summary["teacher"], RENAMED_TEACHER_KEYS)
    versions = _read_json_object(folder / "versions.json", notes, [])
    record = RunRecord(folder, config, metrics, before, after, summary, versions, notes)
    if not summary:
        no_scores = "" if after else ", and no test scores after training"
        notes.append(
            f"The run has not finished: {record.steps} of {record.planned or '?'} steps are there"
            f"{no_scores}."
        )
    if not versions:
        notes.append(
            "versions.json is missing: "
            "which versions and which commit made this run was not recorded."
        )
    return record


def describe_run(record: RunRecord) -> dict:
    """Return what the page shows of a run."""
    rule = record.config.reward
    reward_terms = [rule.metric, *rule.weights]
    if rule.overlong_buffer:
        reward_terms.append("overlong")
    reward_terms = list(dict.fromkeys(reward_terms))
    task = TASKS.get(record.config.task)
    uses_retriever = getattr(task, "uses_retriever", True)
    return dict(
        name=record.folder.resolve().name,
        loop=record.loop,
        retriever=record.config.retriever.kind if uses_retriever else None,
        steps=record.steps,
        planned=record.planned,
        metric=record.metric,
        reward_terms=reward_terms,
        label=format_metric(record.metric),
        words=name_task_words(record.config),
        summary=replace_nonfinite(record.summary),
        results=summarize_results(record),
        n_eval=len(record.before or record.after),
        config=list_settings(record.config),
        versions=replace_nonfinite(record.versions),
        curves=make_curves(record.metrics, reward_terms),
        evaluations=list_validations(record.metrics, rule.metric),
        marks=list_marks(record.metrics),
        notes=record.notes,
    )


def name_task_words(config: Config) -> list[str]:
    """Return what the task's answer is compared with, and the answer, as a reader calls them."""
    words = TASK_WORDS.get(config.task, ("raw answer", "answer"))
    return list(words)


def format_metric(metric: str) -> str:
    """Format a metric for the reader: ndcg@100 -> NDCG@100."""
    name, _, k = metric.partition("@")
    return f"{METRIC_NAMES.get(name, name)}@{k}"


def list_settings(config: Config) -> list[dict]:
    """Return [{"key": dotted, "value", "default"}] of every setting, as text in YAML's spelling."""
    values = _flatten_config(config)
    defaults = _flatten_config(Config())
    return [dict(key=key, value=value, default=defaults[key]) for key, value in values.items()]


def _flatten_config(config: Config) -> dict[str, str]:
    """Return {dotted key: value as text}."""
    texts = {}
    for name, section in dataclasses.asdict(config).items():
        # A setting outside of any section has the section's name as its own.
        settings = section if isinstance(section, dict) else {"": section}
        for key, value in settings.items():
            dotted_key = f"{name}.{key}".rstrip(".")
            texts[dotted_key] = json.dumps(value, ensure_ascii=False)
    return texts


def summarize_results(record: RunRecord) -> dict:
    """Return the test scores and their paired differences, each as [mean, low, high].

    The scores are those of the raw answer, and of the policy before and after training.
    """
    if not record.before:
        return {}
    raw = record.scores(record.before, "_raw")
    before = record.scores(record.before)
    results = dict(
        raw=compute_interval(raw),
        before=compute_interval(before),
        before_minus_raw=compute_interval(before - raw),
    )
    if record.after:
        after = record.scores(record.after)
        results["after"] = compute_interval(after)
        results["after_minus_raw"] = compute_interval(after - raw)
        results["after_minus_before"] = compute_interval(after - before)
    return results


def compute_interval(values: np.ndarray, samples: int = 10_000) -> list[float]:
    """Return [mean, low, high] over queries; low and high are the 95% bootstrap interval."""
    interval = compute_bootstrap_ci(values, samples=samples)
    return [float(values.mean()), *interval]


def make_curves(metrics: list[dict], parts: Sequence[str] = ()) -> dict:
    """Return {"step": [...], name: {"mean": [...], "low": [...], "high": [...]}}.

    low and high are absent while every step has its own point. `parts`: the terms of the reward.
    """
    steps_per_point = -(-len(metrics) // MAX_POINTS)
    starts = range(0, len(metrics), steps_per_point)
    spans = [metrics[start : start + steps_per_point] for start in starts]
    curves: dict = dict(step=[span[-1]["step"] for span in spans], per=steps_per_point)
    has_range = steps_per_point > 1
    for name in (*CURVES, *parts):
        cells = [[row.get(name) for row in span] for span in spans]
        _add_curve(curves, name, cells, has_range)
    for phase in TIMED_PHASES:
        cells = []
        for span in spans:
            timings = [row.get("timing_s") or {} for row in span]
            cells.append([seconds.get(phase) for seconds in timings])
        _add_curve(curves, f"timing_s.{phase}", cells, has_range)
    return curves


def _add_curve(curves: dict, name: str, cells: Iterable[list], has_range: bool) -> None:
    """Add the curve of one quantity; a quantity without any finite number has none.

    cells: the values of the steps that share a point, for each point.
    """
    points = [[value for value in cell if _is_finite(value)] for cell in cells]
    if not any(points):
        return

    def reduce_points(reduce) -> list[float | None]:
        return [round_digits(reduce(values)) if values else None for values in points]

    curves[name] = dict(mean=reduce_points(lambda values: sum(values) / len(values)))
    if has_range:
        curves[name]["low"] = reduce_points(min)
        curves[name]["high"] = reduce_points(max)


def list_validations(metrics: list[dict], metric: str) -> list[dict]:
    """Return the validations: {"step", "score", "raw", "gain": [mean, low, high], "errors"}."""
    validations = []
    for row in metrics:
        if f"val_{metric}" not in row:
            continue
        interval = row.get("val_gain_ci95") or [None, None]
        validations.append(
            dict(
                step=row["step"],
                score=replace_nonfinite(row[f"val_{metric}"]),
                raw=replace_nonfinite(row.get("val_raw")),
                gain=replace_nonfinite([row.get("val_gain"), *interval]),
                errors=row.get("val_format_errors"),
            )
        )
    return validations


def list_marks(metrics: list[dict]) -> list[dict]:
    """Return the steps worth a mark: {"kind", "step", "text"}, in the order of steps.

    A skipped step is one whose loss or gradient was not finite; no weight was changed.
    """
    marks = []
    for row in metrics:
        if _is_finite(row.get("val_gain")):
            text = f"validation: gain {row['val_gain']:+.4f}"
            marks.append(dict(kind="evaluation", step=row["step"], text=text))

    # The first step whose groups cannot teach: all rewards of a group are equal.
    for row in metrics:
        if (row.get("frac_reward_zero_std") or 0) > 0:
            share = row["frac_reward_zero_std"]
            text = f"first groups whose rewards are all equal: {share:.0%} of the step's"
            marks.append(dict(kind="frac_reward_zero_std", step=row["step"], text=text))
            break

    marks += _limit_marks(_list_clip_spikes(metrics))
    skipped_steps = []
    num_skipped = 0
    for row in metrics:
        num_skipped_before = num_skipped
        num_skipped = row.get("skipped_steps") or 0
        if num_skipped > num_skipped_before:
            text = "skipped: the loss or gradient was not finite, no weight was changed"
            skipped_steps.append(dict(kind="skipped", step=row["step"], text=text))
    marks += _limit_marks(skipped_steps)
    return sorted(marks, key=lambda mark: mark["step"])


def _list_clip_spikes(metrics: list[dict]) -> list[dict]:
    """Return the marks of clip spikes.

    A clip spike is a share of clipped tokens above 1% and above the median of all steps by more
    than 6 median absolute deviations.
    """
    logged_shares = [row.get("clip_ratio") for row in metrics]
    shares = np.array([share if _is_finite(share) else 0.0 for share in logged_shares])
    median = float(np.median(shares))
    deviation = float(np.median(np.abs(shares - median)))
    limit = max(0.01, median + 6 * deviation)
    spikes = []
    for row, share in zip(metrics, shares.tolist()):
        if share > limit:
            text = f"{share:.1%} of the tokens clipped; the median step has {median:.1%}"
            spikes.append(dict(kind="clip_spike", step=row["step"], text=text))
    return spikes


def _limit_marks(marks: list[dict]) -> list[dict]:
    """Keep the first marks of a kind; the last one that is kept says how many are left out."""
    kept_marks = marks[:MAX_MARKS]
    num_left_out = len(marks) - len(kept_marks)
    if num_left_out:
        kept_marks[-1]["text"] += f"; {num_left_out} more of this kind are not marked"
    return kept_marks


def replace_nonfinite(value: Any) -> Any:
    """Replace numbers that are not finite by None: JSON has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def round_digits(x: float) -> float:
    """Round to five digits: more than a pixel shows."""
    return float(f"{x:.5g}")


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _read_metrics(folder: Path, notes: list[str]) -> list[dict]:
    """Read metrics.jsonl, whose last line may be cut. Raises DataError where it has no step."""
    path = folder / "metrics.jsonl"
    rows = _read_rows(path, notes, may_be_cut=True)
    metrics = [rename_keys(row, RENAMED_METRICS) for row in rows]
    for row in metrics:
        if not isinstance(row.get("step"), int):
            raise DataError(f"{path}: a row without its step; the run's log is damaged")
    if not metrics:
        raise DataError(
            f"{folder}: the run has not finished a step; there is nothing to report yet"
        )
    return metrics


def _read_rows(path: Path, notes: list[str], may_be_cut: bool = False) -> list[dict]:
    """Read the objects of a JSONL file; [] where there is no file.

    A last line that is cut is left out where `may_be_cut` allows it. Raises DataError.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogatepass").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot be read: {e}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        row = _parse_object(line)
        if row is not None:
            rows.append(row)
        elif may_be_cut and number == len(lines):
            # It has no line end: it is being written, or was when the run ended.
            notes.append(f"{path.name}: its last line is cut and left out.")
        else:
            raise DataError(f"{path}:{number}: not a JSON object; the run's log is damaged")
    return rows


def _parse_object(line: str) -> dict | None:
    """Return the JSON object of a line; None where the line is anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _read_scores(path: Path, notes: list[str], metric: str) -> list[dict]:
    """Read the scores of the test queries. Raises DataError for a row that lacks a field."""
    rows = _read_rows(path, notes)
    for number, row in enumerate(rows, 1):
        has_id = isinstance(row.get("id"), str)
        has_answers = row.get("raw") is not None and "rewrite" in row
        has_scores = _is_finite(row.get(f"{metric}_raw")) and _is_finite(row.get(metric))
        if not (has_id and has_answers and has_scores):
            raise DataError(
                f"{path}:{number}: a row needs id, raw, rewrite, {metric}_raw and {metric}; "
                "the file is damaged"
            )
    return rows


def _read_json_object(path: Path, notes: list[str], empty: Any) -> Any:
    """Read a JSON file of the type of `empty`; return `empty` where there is none, or damage."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return empty
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, type(empty)):
        notes.append(f"{path.name} is damaged and left out.")
        return empty
    return value
