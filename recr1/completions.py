"""`recr1 reward`: stored completions scored as a config's training does, every part on its own. No
model; a tokenizer only to see whether the prompt's template closes the thought, where
prompt.assistant says nothing of one.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
from tqdm import tqdm

from . import data, dist
from .chat import Chat, closes_thought
from .config import Config, ConfigError
from .data import DataError
from .evaluate import mean_ci
from .hub import load_tokenizer, resolve
from .log import say
from .records import Prompt
from .retrieval.base import NoRetriever
from .retrieval.make import make
from .splits import read_judged
from .tasks import make as tasks
from .tasks.rewards import Parts, read_items
from .tasks.scoring import Scorer

AT_ONCE = 1024  # completions searched together


def score(cfg: Config, path: str) -> dict:
    """{"n", "queries", "k", "errors": {name: count}, "metrics", "ci95": {part: ...}, "rows": [{id,
    total, parts, error, answer}]} at reward.k_train.

    A mean is that of queries: completions of one query are first averaged. Raises DataError,
    ConfigError and what its retriever raises.
    """
    task = tasks.make(cfg)
    splits, qrels = read_judged(cfg, task.needs)
    rows = dict(chain.from_iterable(part.items() for part in splits.values()))
    found, dropped = data.read_completions(path, cfg.data.on_bad_line)
    if dropped:
        say(f"recr1: {len(dropped)} completions left out, first: {dropped[0]}")
    if unknown := next((id for id, _ in found if id not in rows), None):
        raise DataError(
            f"{path}: query id {unknown[:60]!r} is in none of the config's query files; use the config of the run they come from"
        )
    parts = Parts(cfg.reward, cfg.reward.k_train, read_items(cfg), every=True)
    try:
        retriever, left_out = (make(cfg.retriever) if task.searches else NoRetriever.make)(
            cfg.data.corpus, cfg.data.on_bad_line, cfg.retriever.index_dir or None, say
        )
    except (DataError, ConfigError):
        raise
    except (ValueError, OSError) as e:
        raise ConfigError(str(e)) from None
    if left_out:
        say(f"recr1: {left_out}")
    scorer = Scorer(task, retriever, qrels, parts, thought_closed=_thought_closed(cfg, task))
    prompts = [Prompt(id, i, rows[id]["text"], (), rows[id]) for i, (id, _) in enumerate(found)]
    rewards = []
    for start in tqdm(
        range(0, len(found), AT_ONCE), "reward", disable=None if dist.rank() == 0 else True
    ):
        part = slice(start, start + AT_ONCE)
        texts = [text for _, text in found[part]]
        rewards += scorer.judge(prompts[part], texts, [0.0] * len(texts))
    scored = [
        dict(id=p.id, total=r.total, **r.parts, error=r.error, answer=r.answer)
        for p, r in zip(prompts, rewards)
    ]
    names = ["total", *parts.names]
    means = {}
    for row in scored:
        means.setdefault(row["id"], []).append([row[name] for name in names])
    by_query = np.array([np.mean(values, axis=0) for values in means.values()])  # (Q, parts)
    figures = {name: mean_ci(by_query[:, i]) for i, name in enumerate(names)}
    return dict(
        n=len(scored),
        queries=len(means),
        k=cfg.reward.k_train,
        errors=dict(Counter(r.error for r in rewards if r.error).most_common()),
        metrics={name: mean for name, (mean, _) in figures.items()},
        ci95={name: ci for name, (_, ci) in figures.items()},
        rows=scored,
    )


def _thought_closed(cfg: Config, task) -> bool:
    p = cfg.prompt
    if "think>" in p.assistant or not cfg.model.path:
        return closes_thought(p.assistant)
    return Chat(
        load_tokenizer(resolve(cfg.model.path)), p.system, p.user, p.assistant, task.places
    ).thought_closed


def table(result: dict) -> str:
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
