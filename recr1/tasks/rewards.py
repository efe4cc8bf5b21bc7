"""The parts of a reward and their weighted sum. Every part is logged on its own, in training and in
evaluation.

    ndcg recall mrr hit   accuracy of the ranking at k (reward.k_train, reward.k_eval): tasks/ranking_metrics.py
    lcs                   accuracy as an order: the position-weighted longest common subsequence
    below category              share of the ranking with the category of the first relevant
    document, 0 where that is not found (Rec-R1's later reward: weight 0.2) diversity
    intra-list distance of the first reward.k_list; between two items 1 - the share of genres they
    have in common (or the category) novelty               self-information of the first
    reward.k_list, divided by the largest there can be: in [0, 1]; popularity from the training data
    module:function       one of yours, f(answer, ranked, gains, row) -> number: the parsed answer,
    document ids, {document id: gain}, the query's row

    total = (bonus + A if A > 0 else miss) + the other parts weighted,   A = the accuracy parts
    weighted;   unparsable where there is no answer

With ndcg alone, weight 1, that is Rec-R1's reward. RecLLM-R1 (arXiv 2506.19235) sums recommendation
metrics, diversity and business terms; its formula and weights are not public. One secondary account
has a position-weighted longest common subsequence in it, without saying how it is weighted. What
stands here is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from recr1.config import plugins
from recr1.config.loader import REWARD_TERMS
from recr1.config.schema import Config, RewardConfig
from recr1.data.readers import DataError, iterate_attributes
from recr1.data_types import Reward
from recr1.tasks.ranking_metrics import (
    compute_hit_rate,
    compute_intra_list_distance,
    compute_ndcg,
    compute_novelty,
    compute_recall,
    compute_reciprocal_rank,
)

METRICS = {
    "ndcg": compute_ndcg,
    "recall": compute_recall,
    "mrr": compute_reciprocal_rank,
    "hit": compute_hit_rate,
}

ACCURACY = (*METRICS, "lcs")


@dataclass(frozen=True)
class ItemTable:
    """What the parts know of documents; empty where no weight asks for it."""

    kinds: dict[str, frozenset[str]] = field(default_factory=dict)  # genres, or the category
    category: dict[str, str] = field(default_factory=dict)
    popularity: dict[str, float] = field(default_factory=dict)

    def distance(self, a: str, b: str) -> float:
        """1 - Jaccard's index of the two items' kinds; of two without any 0."""
        a = self.kinds.get(a, frozenset())
        b = self.kinds.get(b, frozenset())
        return 1 - len(a & b) / len(a | b) if a | b else 0.0


def read_item_table(cfg: Config) -> ItemTable:
    """One pass over the corpus, and only where a weight asks for it. Raises DataError."""
    items = ItemTable()
    weights = cfg.reward.weights
    alike = {}
    wanted = [
        (part, known, keys)
        for part, known, keys in (
            ("category", items.category, "category"),
            ("diversity", items.kinds, "genres or category"),
            ("novelty", items.popularity, "popularity"),
        )
        if part in weights
    ]
    for id, row in iterate_attributes(cfg.data.corpus, cfg.data.on_bad_line, []) if wanted else ():
        if "category" in weights and "category" in row:
            items.category[id] = alike.setdefault(row["category"], row["category"])
        if "diversity" in weights and ("genres" in row or "category" in row):
            kinds = frozenset(
                row.get("genres") or [row[key] for key in ("category",) if key in row]
            )
            items.kinds[id] = alike.setdefault(kinds, kinds)
        if "novelty" in weights and "popularity" in row:
            items.popularity[id] = row["popularity"]
    for part, known, keys in wanted:
        if not known:
            raise DataError(
                f"{cfg.data.corpus}: no document has {keys}, which reward.weights {part} needs; prepare the data anew, or leave {part} out"
            )
    return items


class RewardTerms:
    """Measures rankings at k. names: the parts that are measured, those of weight 0 too; in
    evaluations (`every`) all metrics.
    """

    def __init__(
        self, rule: RewardConfig, k: int, items: ItemTable = ItemTable(), every: bool = False
    ):
        self.rule = rule
        self.k = k
        self.items = items
        self.names = tuple(dict.fromkeys([rule.metric, *(METRICS if every else ()), *rule.weights]))
        self.own = {
            name: plugins.load_function("reward.weights", name, REWARD_TERMS)
            for name in self.names
            if ":" in name
        }
        self.interactions = sum(items.popularity.values())

    def __call__(
        self, row: dict, answer, ranked: Sequence[str], gains: Mapping[str, float]
    ) -> dict[str, float]:
        return {name: self._one(name, row, answer, ranked, gains) for name in self.names}

    def reward(
        self, text: str, answer, error: str | None, parts: Mapping[str, float] | None, late: float
    ) -> Reward:
        """A completion's: `unparsable` where it has no answer (parts None, an error), else what its
        parts come to; `late` is added (overlong).
        """
        total = self.rule.unparsable if parts is None else self.total(parts)
        logged = dict(parts or dict.fromkeys(self.names, 0.0)) | (
            {"overlong": late} if self.rule.overlong else {}
        )
        return Reward(total + late, logged, error, answer, text)

    def total(self, parts: Mapping[str, float]) -> float:
        weighted = {name: weight * parts[name] for name, weight in self.rule.weights.items()}
        accuracy = sum(value for name, value in weighted.items() if name in ACCURACY)
        rest = sum(value for name, value in weighted.items() if name not in ACCURACY)
        return (self.rule.bonus + accuracy if accuracy > 0 else self.rule.miss) + rest

    def _one(self, name, row, answer, ranked, gains):
        if name in METRICS:
            return METRICS[name](ranked, gains, self.k)
        if name == "lcs":
            return compute_weighted_lcs(ranked, gains, self.k)
        if name == "category":
            return compute_category_consistency(ranked, gains, self.items.category, self.k)
        if name == "diversity":
            return compute_intra_list_distance(ranked, self.items.distance, self.rule.k_list)
        if name == "novelty":
            return (
                compute_novelty(ranked, self.items.popularity, self.interactions, self.rule.k_list)
                / math.log2(self.interactions)
                if self.interactions > 1
                else 0.0
            )
        where = f" for the query {row['text'][:80]!r}"
        with plugins.calling_plugin(f"reward.weights: {name}", where):
            value = float(self.own[name](answer, list(ranked), dict(gains), dict(row)))
        if not math.isfinite(value):
            raise plugins.PluginError(
                f"reward.weights: {name} returned {value}{where}; a part is a finite number"
            )
        return value


def compute_weighted_lcs(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """The longest common subsequence of the first k places and the label, an item at rank r
    counting 1 / log2(r + 1); 1 for the label itself.

    The label: the relevant documents, the largest gain first, equal ones in the order of the
    judgements. A repeat counts at its first place.
    """
    label = sorted((doc for doc, gain in gains.items() if gain > 0), key=lambda doc: -gains[doc])[
        :k
    ]
    # best[i]: of the subsequences that end with label[i]
    place = {doc: i for i, doc in enumerate(label)}
    best = [0.0] * len(label)
    for rank, doc in enumerate(ranked[:k], 1):
        if (i := place.pop(doc, None)) is not None:
            best[i] = max(best[:i], default=0.0) + 1 / math.log2(rank + 1)
    return (
        max(best) / sum(1 / math.log2(rank + 1) for rank in range(1, len(label) + 1))
        if label
        else 0.0
    )


def compute_category_consistency(
    ranked: Sequence[str], gains: Mapping[str, float], category: Mapping[str, str], k: int
) -> float:
    """Share of the first k places that have the category of the first relevant document, 0 where
    that one is not among them.
    """
    found = ranked[:k]
    target = next((doc for doc, gain in gains.items() if gain > 0), None)
    if target not in found or target not in category:
        return 0.0
    return sum(category.get(doc) == category[target] for doc in found) / len(found)


def compute_overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """0 while `buffer` tokens are left, then linearly to -1 at the limit (DAPO, arXiv 2503.14476,
    eq. 13).
    """
    return min(0.0, (limit - buffer - length) / buffer) if buffer else 0.0
