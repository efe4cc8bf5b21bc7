"""A greedy pass over a split: the policy's answers against the raw ones, paired, with bootstrap
intervals and a paired test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from recr1.data_types import Prompt, Reward, Rollout
from recr1.distributed import collectives as dist
from recr1.distributed.fsdp import unsharded
from recr1.evaluation.bootstrap import compute_bootstrap_ci, compute_sign_flip_p
from recr1.memory.estimate import ROWS_AT_ONCE
from recr1.model.decoder import AnyDecoder
from recr1.sampling.generate import prepare_sampler
from recr1.tasks.scorer import Scorer
from recr1.utils.interrupts import raise_on_signal

MAX_ANSWER_LENGTH = 200  # characters of an answer that an example shows


# --- The greedy pass ------------------------------------------------------------------------------


def evaluate_prompts(
    model: AnyDecoder,
    prompts: list[Prompt],
    scorer: Scorer,
    max_new_tokens: int,
    prompts_at_once: int = ROWS_AT_ONCE,
    kernels: str = "torch",
    max_cache_tokens: int | None = None,
) -> list[dict]:
    """Answer each prompt greedily, and score the answer beside the one without a policy.

    Each rank takes its share of the prompts; rank 0 gets the rows of all, in order, the others
    none.

    Returns:
        Rows {id, raw, rewrite, TERM_raw and TERM for every term of the reward, text, error}; an
        answer that cannot be parsed scores 0.
    """
    local_prompts = dist.split_across_ranks(prompts)
    rollouts = generate_greedily(
        model,
        local_prompts,
        scorer.stops,
        max_new_tokens,
        prompts_at_once,
        kernels,
        max_cache_tokens,
    )
    with dist.fail_together(), raise_on_signal():
        raw_answers = [scorer.task.baseline_answer(prompt.row) for prompt in local_prompts]
        raw_terms = scorer.score_answers(local_prompts, raw_answers)
        rewards = scorer.score(rollouts)
        local_rows = [
            make_row(*of_prompt)
            for of_prompt in zip(local_prompts, raw_answers, raw_terms, rewards)
        ]

    rows = []
    for rows_of_rank in dist.gather_to_rank0(local_rows) or []:
        rows += rows_of_rank
    return rows


def make_row(
    prompt: Prompt, raw_answer: str | Sequence[str], raw_terms: dict[str, float], reward: Reward
) -> dict:
    """Make a query's row of an evaluation file."""
    raw_by_name = {f"{name}_raw": value for name, value in raw_terms.items()}
    return dict(
        id=prompt.id,
        raw=raw_answer,
        rewrite=reward.answer,
        **raw_by_name,
        **reward.terms,
        text=reward.text,
        error=reward.error,
    )


def generate_greedily(
    model: AnyDecoder,
    prompts: list[Prompt],
    stops: frozenset[int],
    max_new_tokens: int,
    prompts_at_once: int = ROWS_AT_ONCE,
    kernels: str = "torch",
    max_cache_tokens: int | None = None,
) -> list[Rollout]:
    """Generate the most likely text of each prompt, `prompts_at_once` of them decoded together, or
    as many as `max_cache_tokens` has room for (see sampling/generate.py).

    A collective: every rank calls it, with its own prompts or none.
    """
    rollouts = []
    with unsharded(model), dist.fail_together(), raise_on_signal():
        with prepare_sampler(model, 1.0, kernels=kernels) as sampler:
            for start in range(0, len(prompts), prompts_at_once):
                chunk = prompts[start : start + prompts_at_once]
                rollouts += sampler.generate(
                    chunk,
                    1,
                    max_new_tokens,
                    stops,
                    uniforms=None,
                    max_cache_tokens=max_cache_tokens,
                )
    return rollouts


# --- Its figures ----------------------------------------------------------------------------------


def get_column(rows: list[dict], name: str) -> np.ndarray:
    """Return one value of each row (n,)."""
    return np.array([row[name] for row in rows], dtype=np.float64)


def compute_mean_ci(values: np.ndarray) -> tuple[float, list[float]]:
    """Compute the mean and its 95% interval over queries."""
    return float(values.mean()), list(compute_bootstrap_ci(values))


class MetricColumns(NamedTuple):
    """One metric of every query (n,): of the raw answer, and of the policy before and after."""

    raw: np.ndarray
    before: np.ndarray
    after: np.ndarray


def collect_columns(before: list[dict], after: list[dict], metric: str) -> MetricColumns:
    """Collect a metric from the rows of two evaluations of the same queries."""
    return MetricColumns(
        raw=get_column(before, f"{metric}_raw"),
        before=get_column(before, metric),
        after=get_column(after, metric),
    )


def compare_evaluations(before: list[dict], after: list[dict], metric: str) -> dict:
    """Compare the evaluations before and after training on one metric or term of the reward.

    Returns the means, and the paired differences with their interval and p-value
    (compute_sign_flip_p).
    """
    columns = collect_columns(before, after, metric)
    figures: dict[str, float | list[float]] = dict(
        raw=float(columns.raw.mean()),
        before=float(columns.before.mean()),
        after=float(columns.after.mean()),
    )
    differences = dict(
        gain=columns.after - columns.raw, after_minus_before=columns.after - columns.before
    )
    for name, difference in differences.items():
        figures[name], figures[f"{name}_ci95"] = compute_mean_ci(difference)
        figures[f"{name}_p"] = compute_sign_flip_p(difference)
    return figures


def list_metrics(rows: list[dict]) -> list[str]:
    """List the metrics and terms that the rows have for the policy and the raw answer."""
    return [name for name in rows[0] if f"{name}_raw" in rows[0]]


# --- What a user reads ----------------------------------------------------------------------------


def format_table(
    before: list[dict], after: list[dict], metric: str, k: int, figures: dict[str, dict]
) -> str:
    """Format what a run achieved: raw answer, policy before and after, and their differences.

    figures: {metric or term: compare_evaluations(...)}.
    """
    columns = collect_columns(before, after, metric)
    gain_p = figures[metric]["gain_p"]
    after_minus_before_p = figures[metric]["after_minus_before_p"]
    lines = [
        f"{metric}@{k} on {len(columns.raw)} test queries      mean     95% interval",
        _format_mean("raw", columns.raw),
        _format_mean("before training", columns.before),
        _format_mean("after training", columns.after),
        _format_difference("after - raw", columns.after - columns.raw, gain_p),
        _format_difference("after - before", columns.after - columns.before, after_minus_before_p),
    ]
    for name, figures_of_term in figures.items():
        if name != metric:
            lines.append(_format_term(name, figures_of_term))
    lines.append(_format_errors(after))
    return "\n".join(lines)


def _format_mean(name: str, values: np.ndarray, sign: str = "") -> str:
    mean, (low, high) = compute_mean_ci(values)
    return f"  {name:<30}{mean:{sign}8.4f}     [{low:{sign}.4f}, {high:{sign}.4f}]"


def _format_difference(name: str, difference: np.ndarray, p: float) -> str:
    return f"{_format_mean(name, difference, sign='+')}     p {p:.4f}"


def _format_term(name: str, figures: dict) -> str:
    low, high = figures["gain_ci95"]
    return (
        f"  {name:<30}{figures['raw']:8.4f} raw, {figures['before']:.4f} before, "
        f"{figures['after']:.4f} after; "
        f"after - raw {figures['gain']:+.4f} [{low:+.4f}, {high:+.4f}]"
    )


def _format_errors(rows: list[dict]) -> str:
    errors = Counter(row["error"] for row in rows if row["error"] is not None)
    by_name = ""
    if errors:
        counts = [f"{name} {count}" for name, count in errors.most_common()]
        by_name = f" ({', '.join(counts)})"
    num_errors = sum(errors.values())
    return f"  unparsable answers after training: {num_errors} of {len(rows)}{by_name}"


def format_examples(after: list[dict], metric: str) -> str:
    """Format three answers: the largest gain over the raw answer, the median, the largest loss.

    The median is that of the answers that changed the result. Where all gain, the last is the
    smallest gain.
    """

    def gain(row: dict) -> float:
        return row[metric] - row[f"{metric}_raw"]

    changed = sorted((row for row in after if gain(row)), key=gain)
    if not changed:
        return "no answer changed a result"
    worst = changed[0]
    median = changed[len(changed) // 2]
    best = changed[-1]
    examples = {
        "largest gain" if gain(best) > 0 else "smallest loss": best,
        "median change": median,
        "largest loss" if gain(worst) < 0 else "smallest gain": worst,
    }
    lines = []
    for name, row in examples.items():
        answers = f"{_shorten_answer(row['raw'])} -> {_shorten_answer(row['rewrite'])}"
        scores = f"{row[f'{metric}_raw']:.3f} -> {row[metric]:.3f}"
        lines.append(f"  {name:<14} {answers}   {scores}")
    return "\n".join(lines)


def _shorten_answer(answer: str | Sequence[str] | None) -> str:
    text = repr(answer)
    if len(text) <= MAX_ANSWER_LENGTH:
        return text
    return text[: MAX_ANSWER_LENGTH - 3] + "..."
