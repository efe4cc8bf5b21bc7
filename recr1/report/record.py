"""The files of a run, read for its report: config, versions, summary, test scores, and
metrics.jsonl as curves with marks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from recr1.config import loader as configs
from recr1.config.schema import Config
from recr1.data.readers import DataError
from recr1.evaluation.bootstrap import compute_bootstrap_ci
from recr1.tasks.registry import TASKS

POINTS = 400  # of a curve that are drawn; more steps share a point: their mean, least and largest

CURVES = (
    "loss",
    "reward",
    "reward_spread",
    "zero_variance",
    "kl",
    "entropy",
    "completion_tokens",
    "clip_share",
    "unparsable",
    "unfinished",
    "logprob_gap_mean",
    "logprob_gap_p999",
    "max_logprob_gap",
    "grad_norm",
    "lr",
    "rollout_tokens_per_s",
    "tokens_per_s",
)

WORDS = {
    "product_search": ("raw query", "rewrite"),
    "sequential": ("raw query", "policy's query"),
    "rerank": ("given order", "new order"),
    # what each task's answer is compared with, and the answer
    "recommend_list": ("given order", "list"),
}

PHASES = ("sample", "reward", "train", "step")


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
        return self.metrics[-1]["step"]

    @property
    def loop(self) -> str:
        """train, or sft, which has no rollouts and no rewards."""
        return "train" if any("reward" in row for row in self.metrics) else "sft"

    @property
    def planned(self) -> int | None:
        """Steps that the run was to take. SFT's passes over texts come to a number that only its
        end tells.
        """
        return self.summary.get("steps") or (
            None if self.loop == "sft" and self.config.sft.epochs else self.config.train.steps
        )

    @property
    def metric(self) -> str:
        return f"{self.config.reward.metric}@{self.config.reward.k_eval}"

    def scores(self, rows: list[dict], of: str = "") -> np.ndarray:
        """Each test query's reward.metric by the policy, of="_raw": by the answer without one."""
        return np.array([row[self.config.reward.metric + of] for row in rows])


def read_run(folder: Path) -> RunRecord:
    """A run's folder, finished or not. Raises DataError, ConfigError."""
    if not (folder / "config.yaml").is_file():
        raise DataError(
            f"{folder}: not a run's folder, it has no config.yaml; name what run.dir was"
        )
    config = configs.load_config(str(folder / "config.yaml"), [])
    notes = []
    metrics = _read_rows(folder / "metrics.jsonl", notes, torn=True)
    for row in metrics:
        if not isinstance(row.get("step"), int):
            raise DataError(
                f"{folder / 'metrics.jsonl'}: a row without its step; the run's log is damaged"
            )
    if not metrics:
        raise DataError(
            f"{folder}: the run has not finished a step; there is nothing to report yet"
        )
    before, after = (
        _read_scores(folder / name, notes, config.reward.metric)
        for name in ("eval_before.jsonl", "eval_after.jsonl")
    )
    if after and [row["id"] for row in before] != [row["id"] for row in after]:
        raise DataError(
            f"{folder / 'eval_after.jsonl'}: its queries are not those of eval_before.jsonl; the two are of different runs"
        )
    summary = _read_json_object(folder / "summary.json", notes, {})
    versions = _read_json_object(folder / "versions.json", notes, [])
    found = RunRecord(folder, config, metrics, before, after, summary, versions, notes)
    if not summary:
        notes.append(
            f"The run has not finished: {found.steps} of {found.planned or '?'} steps are there{'' if after else ', and no test scores after training'}."
        )
    if not versions:
        notes.append(
            "versions.json is missing: which versions and which commit made this run was not recorded."
        )
    return found


def describe_run(record: RunRecord) -> dict:
    """What the page shows of it."""
    rule = record.config.reward
    parts = list(
        dict.fromkeys([rule.metric, *rule.weights, *(["overlong"] if rule.overlong else [])])
    )
    searches = getattr(TASKS.get(record.config.task), "uses_retriever", True)
    return dict(
        name=record.folder.resolve().name,
        loop=record.loop,
        retriever=record.config.retriever.kind if searches else None,
        steps=record.steps,
        planned=record.planned,
        metric=record.metric,
        parts=parts,
        label=format_metric(record.metric),
        words=name_task_words(record.config),
        summary=replace_nonfinite(record.summary),
        results=summarize_results(record),
        n_eval=len(record.before or record.after),
        config=list_settings(record.config),
        versions=replace_nonfinite(record.versions),
        curves=make_curves(record.metrics, parts),
        evaluations=list_validations(record.metrics, rule.metric),
        marks=list_marks(record.metrics),
        notes=record.notes,
    )


def name_task_words(config: Config) -> list[str]:
    """What the task's answer is compared with, and what it is, as a reader calls them."""
    return list(WORDS.get(config.task, ("raw answer", "answer")))


def format_metric(metric: str) -> str:
    """ndcg@100 -> NDCG@100."""
    name, _, k = metric.partition("@")
    return (
        f"{dict(hit='hit rate').get(name, name.upper() if name in ('ndcg', 'mrr') else name)}@{k}"
    )


def list_settings(config: Config) -> list[dict]:
    """[{"key": dotted, "value", "default"}] of every setting, as text in YAML's spelling."""

    def flat(config: Config) -> dict[str, str]:
        sections = {
            k: v if isinstance(v, dict) else {"": v} for k, v in dataclasses.asdict(config).items()
        }
        return {
            f"{section}.{key}".rstrip("."): json.dumps(value, ensure_ascii=False)
            for section, some in sections.items()
            for key, value in some.items()
        }

    ours = flat(config)
    usual = flat(Config())
    return [dict(key=key, value=value, default=usual[key]) for key, value in ours.items()]


def summarize_results(record: RunRecord) -> dict:
    """Test scores of the raw answer and of the policy before and after training, and paired
    differences, each [mean, low, high].
    """
    found = {}
    if record.before:
        raw = record.scores(record.before, "_raw")
        before = record.scores(record.before)
        found |= dict(
            raw=compute_interval(raw),
            before=compute_interval(before),
            before_minus_raw=compute_interval(before - raw),
        )
        if record.after:
            after = record.scores(record.after)
            found |= dict(
                after=compute_interval(after),
                after_minus_raw=compute_interval(after - raw),
                after_minus_before=compute_interval(after - before),
            )
    return found


def compute_interval(values: np.ndarray, samples: int = 10_000) -> list[float]:
    """[mean, low, high] over queries, 95%, bootstrap."""
    return [float(values.mean()), *compute_bootstrap_ci(values, samples=samples)]


def make_curves(metrics: list[dict], parts: Sequence[str] = ()) -> dict:
    """{"step": [...], name: {"mean": [...], "low": [...], "high": [...]}}; low and high are absent
    while every step has its own point. `parts`: of the reward.
    """
    per = -(-len(metrics) // POINTS)
    spans = [metrics[i : i + per] for i in range(0, len(metrics), per)]
    found: dict = dict(step=[span[-1]["step"] for span in spans], per=per)
    columns = {
        name: [[row.get(name) for row in span] for span in spans] for name in (*CURVES, *parts)
    }
    columns |= {
        f"seconds.{name}": [
            [(row.get("seconds") or {}).get(name) for row in span] for span in spans
        ]
        for name in PHASES
    }
    for name, cells in columns.items():
        numbers = [[v for v in cell if _is_finite(v)] for cell in cells]
        if any(numbers):
            found[name] = dict(mean=[round_digits(sum(c) / len(c)) if c else None for c in numbers])
            if per > 1:
                found[name] |= dict(
                    low=[round_digits(min(c)) if c else None for c in numbers],
                    high=[round_digits(max(c)) if c else None for c in numbers],
                )
    return found


def list_validations(metrics: list[dict], metric: str) -> list[dict]:
    """The validations: {"step", "score", "raw", "gain": [mean, low, high], "errors"}."""
    return [
        dict(
            step=row["step"],
            score=replace_nonfinite(row[f"val_{metric}"]),
            raw=replace_nonfinite(row.get("val_raw")),
            gain=replace_nonfinite(
                [row.get("val_gain"), *(row.get("val_gain_ci95") or [None, None])]
            ),
            errors=row.get("val_errors"),
        )
        for row in metrics
        if f"val_{metric}" in row
    ]


def list_marks(metrics: list[dict]) -> list[dict]:
    """Steps worth a mark: {"kind", "step", "text"}.

    A clip spike: a share of clipped tokens above 1% and above the median of all steps by more than
    6 median absolute deviations. A skipped step: the loss or its gradient was not finite, no weight
    was changed.
    """
    found = [
        dict(kind="evaluation", step=row["step"], text=f"validation: gain {row['val_gain']:+.4f}")
        for row in metrics
        if _is_finite(row.get("val_gain"))
    ]
    zero = next((row for row in metrics if (row.get("zero_variance") or 0) > 0), None)
    if zero:
        found.append(
            dict(
                kind="zero_variance",
                step=zero["step"],
                text=f"first groups whose rewards are all equal: {zero['zero_variance']:.0%} of the step's",
            )
        )
    shares = np.array(
        [row["clip_share"] if _is_finite(row.get("clip_share")) else 0.0 for row in metrics]
    )
    middle = float(np.median(shares))
    limit = max(0.01, middle + 6 * float(np.median(np.abs(shares - middle))))
    spikes = [
        dict(
            kind="clip_spike",
            step=row["step"],
            text=f"{share:.1%} of the tokens clipped; the median step has {middle:.1%}",
        )
        for row, share in zip(metrics, shares.tolist())
        if share > limit
    ]
    skipped = [
        dict(
            kind="skipped",
            step=row["step"],
            text="skipped: the loss or gradient was not finite, no weight was changed",
        )
        for last, row in zip([{}, *metrics], metrics)
        if (row.get("skipped") or 0) > (last.get("skipped") or 0)
    ]
    for kind in (spikes, skipped):
        found += kind[:50]
        if len(kind) > 50:
            found[-1]["text"] += f"; {len(kind) - 50} more of this kind are not marked"
    return sorted(found, key=lambda mark: mark["step"])


def replace_nonfinite(value):
    """The same with None for what is no finite number: JSON has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {k: replace_nonfinite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_nonfinite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def round_digits(x: float) -> float:
    """Five digits: more than a pixel shows."""
    return float(f"{x:.5g}")


def _is_finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _read_rows(path: Path, notes: list[str], torn: bool = False) -> list[dict]:
    """The objects of a JSONL file; [] where there is none. A last line that is cut is left out when
    `torn` allows it. Raises DataError.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogatepass").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot be read: {e}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line else None
        except (ValueError, RecursionError):
            row = ()
        if line and not isinstance(row, dict):
            # no line end: it is being written, or was when the run ended
            if torn and number == len(lines):
                notes.append(f"{path.name}: its last line is cut and left out.")
                break
            raise DataError(f"{path}:{number}: not a JSON object; the run's log is damaged")
        rows += [row] if row is not None else []
    return rows


def _read_scores(path: Path, notes: list[str], metric: str) -> list[dict]:
    rows = _read_rows(path, notes)
    for number, row in enumerate(rows, 1):
        texts = isinstance(row.get("id"), str) and row.get("raw") is not None and "rewrite" in row
        if not (texts and _is_finite(row.get(f"{metric}_raw")) and _is_finite(row.get(metric))):
            raise DataError(
                f"{path}:{number}: a row needs id, raw, rewrite, {metric}_raw and {metric}; the file is damaged"
            )
    return rows


def _read_json_object(path: Path, notes: list[str], empty):
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
