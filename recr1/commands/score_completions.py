"""Score stored completions as a config's training does, every term on its own: `recr1 reward`.

No model is loaded. A tokenizer is loaded only where prompt.assistant says nothing of a thought, to
see whether the prompt's template closes it.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from recr1.config.schema import Config, ConfigError
from recr1.data import readers
from recr1.data.chat_template import ChatTemplate, ends_thought
from recr1.data.readers import DataError
from recr1.data_types import Prompt, Reward
from recr1.distributed import collectives as dist
from recr1.distributed.printing import print_rank0
from recr1.evaluation.evaluate import compute_mean_ci
from recr1.retrieval.factory import build_retriever
from recr1.retrieval.interface import NoRetriever, Retriever
from recr1.tasks import registry as tasks
from recr1.tasks.prompts import Queries, read_judged_queries
from recr1.tasks.registry import Task
from recr1.tasks.rewards import RewardTerms, read_item_table
from recr1.tasks.scorer import Scorer
from recr1.utils.hf_hub import load_tokenizer, resolve_model_folder

COMPLETIONS_PER_SEARCH = 1024


class Summary(NamedTuple):
    """Means over queries, and their 95% intervals."""

    num_queries: int
    means: dict[str, float]
    intervals: dict[str, list[float]]


def score_completions(cfg: Config, path: str) -> dict:
    """Score the completions of a file at reward.k_train.

    A mean is that over queries: the completions of one query are averaged first.

    Returns:
        {"n", "queries", "k", "format_errors": {name: count}, "metrics", "ci95": {term: ...},
        "rows": [{id, total, terms, error, answer}]}. Raises DataError, ConfigError and what its
        retriever raises.
    """
    task = tasks.build_task(cfg)
    splits, qrels = read_judged_queries(cfg, task.required_fields)
    query_rows: Queries = {}
    for rows_of_split in splits.values():
        query_rows.update(rows_of_split)
    prompts, texts = _read_completions(cfg, path, query_rows)

    terms = RewardTerms(cfg.reward, cfg.reward.k_train, read_item_table(cfg), every=True)
    retriever = _make_retriever(cfg, task)
    thought_closed = _is_thought_closed(cfg, task)
    scorer = Scorer(task, retriever, qrels, terms, thought_closed=thought_closed)
    rewards = _score_in_chunks(scorer, prompts, texts)

    scored_rows = []
    for prompt, reward in zip(prompts, rewards):
        row = dict(id=prompt.id, total=reward.total, **reward.terms)
        row.update(error=reward.error, answer=reward.answer)
        scored_rows.append(row)
    summary = _average_over_queries(scored_rows, ["total", *terms.names])
    errors = Counter(reward.error for reward in rewards if reward.error)
    return dict(
        n=len(scored_rows),
        queries=summary.num_queries,
        k=cfg.reward.k_train,
        format_errors=dict(errors.most_common()),
        metrics=summary.means,
        ci95=summary.intervals,
        rows=scored_rows,
    )


def _read_completions(
    cfg: Config, path: str, query_rows: Queries
) -> tuple[list[Prompt], list[str]]:
    """Read the completions: the prompt and the text of each. Raises DataError."""
    completions, dropped = readers.read_completions(path, cfg.data.on_bad_line)
    if dropped:
        print_rank0(f"recr1: {len(dropped)} completions left out, first: {dropped[0]}")
    prompts = []
    texts = []
    for index, (query_id, text) in enumerate(completions):
        if query_id not in query_rows:
            raise DataError(
                f"{path}: query id {query_id[:60]!r} is in none of the config's query files; "
                "use the config of the run they come from"
            )
        row = query_rows[query_id]
        prompts.append(Prompt(query_id, index, row["text"], (), row))
        texts.append(text)
    return prompts, texts


def _make_retriever(cfg: Config, task: Task) -> Retriever | NoRetriever:
    """Make the config's retriever, where the task uses one. Raises ConfigError, DataError."""
    index_dir = cfg.retriever.index_dir or None
    try:
        if task.uses_retriever:
            build = build_retriever(cfg.retriever)
        else:
            build = NoRetriever.make
        retriever, left_out = build(cfg.data.corpus, cfg.data.on_bad_line, index_dir, print_rank0)
    except (DataError, ConfigError):
        raise
    except (ValueError, OSError) as e:
        raise ConfigError(str(e)) from None
    if left_out:
        print_rank0(f"recr1: {left_out}")
    return retriever


def _is_thought_closed(cfg: Config, task: Task) -> bool:
    """Check whether the prompt has ended the thought, so that a completion is the answer alone."""
    prompt = cfg.prompt
    if "think>" in prompt.assistant or not cfg.model.path:
        return ends_thought(prompt.assistant)
    tokenizer = load_tokenizer(resolve_model_folder(cfg.model.path))
    chat = ChatTemplate(tokenizer, prompt.system, prompt.user, prompt.assistant, task.placeholders)
    return chat.thought_closed


def _score_in_chunks(scorer: Scorer, prompts: list[Prompt], texts: list[str]) -> list[Reward]:
    """Score the completions, with a progress bar on rank 0's terminal."""
    rewards: list[Reward] = []
    hide_bar = None if dist.rank() == 0 else True  # None: shown on a terminal
    for start in tqdm(range(0, len(texts), COMPLETIONS_PER_SEARCH), "reward", disable=hide_bar):
        chunk = slice(start, start + COMPLETIONS_PER_SEARCH)
        no_penalties = [0.0] * len(texts[chunk])
        rewards += scorer.score_texts(prompts[chunk], texts[chunk], no_penalties)
    return rewards


def _average_over_queries(rows: list[dict], names: list[str]) -> Summary:
    """Average each figure over the completions of a query, then over queries."""
    values_of_query: dict[str, list[list[float]]] = {}
    for row in rows:
        values = [row[name] for name in names]
        values_of_query.setdefault(row["id"], []).append(values)
    query_means = [np.mean(values, axis=0) for values in values_of_query.values()]
    by_query = np.array(query_means)  # (Q, names)

    means = {}
    intervals = {}
    for column, name in enumerate(names):
        means[name], intervals[name] = compute_mean_ci(by_query[:, column])
    return Summary(len(values_of_query), means, intervals)


def format_scores(result: dict) -> str:
    """Format the result of score_completions as text."""
    lines = [
        f"{result['n']} completions of {result['queries']} queries at k = {result['k']}"
        "      mean     95% interval over queries"
    ]
    for name, mean in result["metrics"].items():
        low, high = result["ci95"][name]
        lines.append(f"  {name:<34}{mean:8.4f}     [{low:.4f}, {high:.4f}]")
    errors = result["format_errors"]
    lines.append(f"  unparsable: {sum(errors.values())}")
    for name, count in errors.items():
        lines.append(f"    {name:<32}{count:>8}")
    return "\n".join(lines)
