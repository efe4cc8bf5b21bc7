"""`recr1 reward`: stored completions scored as a config's training does, every part on its own. No
model; a tokenizer only to see whether the prompt's template closes the thought, where
prompt.assistant says nothing of one.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
from tqdm import tqdm

from recr1.config.schema import Config, ConfigError
from recr1.data import readers
from recr1.data.chat_template import ChatTemplate, ends_thought
from recr1.data.readers import DataError
from recr1.data_types import Prompt
from recr1.distributed import collectives as dist
from recr1.distributed.printing import print_rank0
from recr1.evaluation.evaluate import compute_mean_ci
from recr1.retrieval.factory import build_retriever
from recr1.retrieval.interface import NoRetriever
from recr1.tasks import registry as tasks
from recr1.tasks.prompts import read_judged_queries
from recr1.tasks.rewards import RewardTerms, read_item_table
from recr1.tasks.scorer import Scorer
from recr1.utils.hf_hub import load_tokenizer, resolve_model_folder

AT_ONCE = 1024  # completions searched together


def score_completions(cfg: Config, path: str) -> dict:
    """{"n", "queries", "k", "errors": {name: count}, "metrics", "ci95": {part: ...}, "rows": [{id,
    total, parts, error, answer}]} at reward.k_train.

    A mean is that of queries: completions of one query are first averaged. Raises DataError,
    ConfigError and what its retriever raises.
    """
    task = tasks.build_task(cfg)
    splits, qrels = read_judged_queries(cfg, task.required_fields)
    rows = dict(chain.from_iterable(part.items() for part in splits.values()))
    found, dropped = readers.read_completions(path, cfg.data.on_bad_line)
    if dropped:
        print_rank0(f"recr1: {len(dropped)} completions left out, first: {dropped[0]}")
    if unknown := next((id for id, _ in found if id not in rows), None):
        raise DataError(
            f"{path}: query id {unknown[:60]!r} is in none of the config's query files; use the config of the run they come from"
        )
    parts = RewardTerms(cfg.reward, cfg.reward.k_train, read_item_table(cfg), every=True)
    try:
        retriever, left_out = (
            build_retriever(cfg.retriever) if task.uses_retriever else NoRetriever.make
        )(cfg.data.corpus, cfg.data.on_bad_line, cfg.retriever.index_dir or None, print_rank0)
    except (DataError, ConfigError):
        raise
    except (ValueError, OSError) as e:
        raise ConfigError(str(e)) from None
    if left_out:
        print_rank0(f"recr1: {left_out}")
    scorer = Scorer(task, retriever, qrels, parts, thought_closed=_ends_thought(cfg, task))
    prompts = [Prompt(id, i, rows[id]["text"], (), rows[id]) for i, (id, _) in enumerate(found)]
    rewards = []
    for start in tqdm(
        range(0, len(found), AT_ONCE), "reward", disable=None if dist.rank() == 0 else True
    ):
        part = slice(start, start + AT_ONCE)
        texts = [text for _, text in found[part]]
        rewards += scorer.score_texts(prompts[part], texts, [0.0] * len(texts))
    scored = [
        dict(id=p.id, total=r.total, **r.terms, error=r.error, answer=r.answer)
        for p, r in zip(prompts, rewards)
    ]
    names = ["total", *parts.names]
    means = {}
    for row in scored:
        means.setdefault(row["id"], []).append([row[name] for name in names])
    by_query = np.array([np.mean(values, axis=0) for values in means.values()])  # (Q, parts)
    figures = {name: compute_mean_ci(by_query[:, i]) for i, name in enumerate(names)}
    return dict(
        n=len(scored),
        queries=len(means),
        k=cfg.reward.k_train,
        errors=dict(Counter(r.error for r in rewards if r.error).most_common()),
        metrics={name: mean for name, (mean, _) in figures.items()},
        ci95={name: ci for name, (_, ci) in figures.items()},
        rows=scored,
    )


def _ends_thought(cfg: Config, task) -> bool:
    p = cfg.prompt
    if "think>" in p.assistant or not cfg.model.path:
        return ends_thought(p.assistant)
    return ChatTemplate(
        load_tokenizer(resolve_model_folder(cfg.model.path)),
        p.system,
        p.user,
        p.assistant,
        task.placeholders,
    ).thought_closed


def format_scores(result: dict) -> str:
    lines = [
        f"{result['n']} completions of {result['queries']} queries at k = {result['k']}      mean     95% interval over queries"
    ]
    for name, mean in result["metrics"].items():
        low, high = result["ci95"][name]
        lines.append(f"  {name:<34}{mean:8.4f}     [{low:.4f}, {high:.4f}]")
    errors = result["errors"]
    lines.append(
        f"  unparsable: {sum(errors.values())}"
        + "".join(f"\n    {name:<32}{count:>8}" for name, count in errors.items())
    )
    return "\n".join(lines)
