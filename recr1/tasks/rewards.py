"""The terms of a reward and their weighted sum. Every term is logged on its own, in training and in
evaluation.

    ndcg recall mrr hit   accuracy of the ranking at k (reward.k_train, reward.k_eval): see
                          tasks/ranking_metrics.py
    lcs                   accuracy as an order: compute_weighted_lcs
    ndcg_gain             ndcg - that of the answer without a policy (the raw query, the given
                          order): in [-1, 1], 0 for who copies that answer
    category              share of the ranking with the category of the first relevant document, 0
                          where that is not in it (Rec-R1's later reward: weight 0.2)
    diversity             intra-list distance of the first reward.k_list; the distance of two items
                          is 1 - the share of genres that they have in common (or the category)
    novelty               self-information of the first reward.k_list, divided by its largest
                          possible value: in [0, 1]; the popularity is that of the training data
    module:function       one of yours, f(answer, ranked, gains, row) -> number: the parsed answer,
                          document ids, {document id: gain}, the query's row: "text" and the keys of
                          the task's required_fields, no others. It is called once for each query
                          and text (tasks/scorer.py)

    total = (bonus + A if A > 0 else miss) + the other terms weighted
    A     = the accuracy terms weighted
    total = unparsable where there is no answer

With reward.bonus_if: better the bonus is earned where ndcg_gain is above 0 and nowhere else: an
answer of the right form that improves nothing gets none (GR2, arXiv 2602.07774).

With ndcg alone, weight 1, that is Rec-R1's reward. RecLLM-R1 (arXiv 2506.19235) sums recommendation
metrics, diversity and business terms; its formula and weights are not public. One secondary account
has a position-weighted longest common subsequence in it, without saying how it is weighted. The
formulas here are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
GAIN = "ndcg_gain"


@dataclass(frozen=True)
class ItemTable:
    """What the terms need to know of documents; empty where no weight asks for it."""

    kinds: dict[str, frozenset[str]] = field(default_factory=dict)  # genres, or the category
    category: dict[str, str] = field(default_factory=dict)
    popularity: dict[str, float] = field(default_factory=dict)  # number of interactions

    def distance(self, a: str, b: str) -> float:
        """Compute 1 - Jaccard's index of the kinds of two documents; 0 where both have none."""
        a_kinds = self.kinds.get(a, frozenset())
        b_kinds = self.kinds.get(b, frozenset())
        either = a_kinds | b_kinds
        if not either:
            return 0.0
        return 1 - len(a_kinds & b_kinds) / len(either)


def read_item_table(cfg: Config) -> ItemTable:
    """Read the attributes that the weighted terms need, in one pass over the corpus.

    Where no term needs any, the corpus is not read. Raises DataError.
    """
    items = ItemTable()
    needs = (
        ("category", items.category, "category"),
        ("diversity", items.kinds, "genres or category"),
        ("novelty", items.popularity, "popularity"),
    )
    weighted_needs = [need for need in needs if need[0] in cfg.reward.weights]
    if not weighted_needs:
        return items

    # Equal values become one object: a corpus of millions has few different categories.
    interned: dict[Any, Any] = {}
    weights = cfg.reward.weights
    for doc_id, row in iterate_attributes(cfg.data.corpus, cfg.data.on_bad_line, []):
        if "category" in weights and "category" in row:
            category = row["category"]
            items.category[doc_id] = interned.setdefault(category, category)
        if "diversity" in weights and ("genres" in row or "category" in row):
            kinds = _get_kinds(row)
            items.kinds[doc_id] = interned.setdefault(kinds, kinds)
        if "novelty" in weights and "popularity" in row:
            items.popularity[doc_id] = row["popularity"]

    for term, values, keys in weighted_needs:
        if not values:
            raise DataError(
                f"{cfg.data.corpus}: no document has {keys}, which reward.weights {term} needs; "
                f"prepare the data anew, or leave {term} out"
            )
    return items


def _get_kinds(row: dict) -> frozenset[str]:
    """Return a document's genres, or its category where it has none."""
    genres = row.get("genres")
    if genres:
        return frozenset(genres)
    if "category" in row:
        return frozenset([row["category"]])
    return frozenset()


class RewardTerms:
    """Measure rankings at k, and sum the terms up to a reward.

    `names` are the terms that are measured, those of weight 0 too; in evaluations (`every`) all
    metrics.
    """

    def __init__(
        self, rule: RewardConfig, k: int, items: ItemTable = ItemTable(), every: bool = False
    ):
        self.rule = rule
        self.k = k
        self.items = items
        metrics = tuple(METRICS) if every else ()
        condition = (GAIN,) if rule.bonus_if == "better" else ()
        self.names = tuple(dict.fromkeys([rule.metric, *metrics, *rule.weights, *condition]))
        self.user_functions = {
            name: plugins.load_function("reward.weights", name, REWARD_TERMS)
            for name in self.names
            if ":" in name
        }
        self.num_interactions = sum(items.popularity.values())

    @property
    def needs_baseline(self) -> bool:
        """Return whether a term compares with the answer without a policy."""
        return GAIN in self.names

    def __call__(
        self,
        row: dict,
        answer: Any,
        ranked: Sequence[str],
        gains: Mapping[str, float],
        baseline_ndcg: float = 0.0,
    ) -> dict[str, float]:
        """Measure every term of one ranking.

        baseline_ndcg: of the answer without a policy; read where `needs_baseline`.
        """
        terms = {}
        for name in self.names:
            if name == GAIN:
                terms[name] = self.compute_ndcg(ranked, gains) - baseline_ndcg
            else:
                terms[name] = self._measure(name, row, answer, ranked, gains)
        return terms

    def compute_ndcg(self, ranked: Sequence[str], gains: Mapping[str, float]) -> float:
        """Compute the NDCG at k of a ranking."""
        return compute_ndcg(ranked, gains, self.k)

    def make_reward(
        self,
        text: str,
        answer: Any,
        error: str | None,
        terms: Mapping[str, float] | None,
        penalty: float,
    ) -> Reward:
        """Make the Reward of a completion: of its terms, or `unparsable` where it has no answer.

        Args:
            terms: None where there is no answer; `error` then says why.
            penalty: added to the total (overlong).
        """
        if terms is None:
            total = self.rule.unparsable
            logged_terms = dict.fromkeys(self.names, 0.0)
        else:
            total = self.compute_total(terms)
            logged_terms = dict(terms)
        if self.rule.overlong_buffer:
            logged_terms["overlong"] = penalty
        return Reward(total + penalty, logged_terms, error, answer, text)

    def compute_total(self, terms: Mapping[str, float]) -> float:
        """Compute the weighted sum, with the bonus, or the miss of the accuracy terms."""
        weighted = {name: weight * terms[name] for name, weight in self.rule.weights.items()}
        accuracy = sum(value for name, value in weighted.items() if name in ACCURACY)
        other_terms = sum(value for name, value in weighted.items() if name not in ACCURACY)
        reached = accuracy if accuracy > 0 else self.rule.miss
        earns_bonus = accuracy > 0
        if self.rule.bonus_if == "better":
            earns_bonus = terms[GAIN] > 0
        if earns_bonus:
            reached = self.rule.bonus + reached
        return reached + other_terms

    def _measure(
        self, name: str, row: dict, answer: Any, ranked: Sequence[str], gains: Mapping[str, float]
    ) -> float:
        """Measure one term of one ranking."""
        if name in METRICS:
            return METRICS[name](ranked, gains, self.k)
        if name == "lcs":
            return compute_weighted_lcs(ranked, gains, self.k)
        if name == "category":
            return compute_category_consistency(ranked, gains, self.items.category, self.k)
        if name == "diversity":
            return compute_intra_list_distance(ranked, self.items.distance, self.rule.k_list)
        if name == "novelty":
            return self._measure_novelty(ranked)
        return self._call_user_function(name, row, answer, ranked, gains)

    def _measure_novelty(self, ranked: Sequence[str]) -> float:
        """Measure the novelty as a share of its largest value, log2 of all interactions."""
        if self.num_interactions <= 1:
            return 0.0
        bits = compute_novelty(
            ranked, self.items.popularity, self.num_interactions, self.rule.k_list
        )
        return bits / math.log2(self.num_interactions)

    def _call_user_function(
        self, name: str, row: dict, answer: Any, ranked: Sequence[str], gains: Mapping[str, float]
    ) -> float:
        """Call a term of a user's own, with copies.

        Raises PluginError, also for NaN and infinity.
        """
        query = f" for the query {row['text'][:80]!r}"
        with plugins.calling_plugin(f"reward.weights: {name}", query):
            result = self.user_functions[name](answer, list(ranked), dict(gains), dict(row))
            value = float(result)
        if not math.isfinite(value):
            raise plugins.PluginError(
                f"reward.weights: {name} returned {value}{query}; a reward term is a finite number"
            )
        return value


def compute_weighted_lcs(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """Compute the weight of the longest common subsequence of the first k places and the label.

    An item at rank r counts 1 / log2(r + 1); the sum is divided by that of the label itself, so the
    label scores 1. The label is the relevant documents, the largest gain first, equal ones in the
    order of the judgements. A repeat counts at its first place.
    """
    relevant = [doc_id for doc_id, gain in gains.items() if gain > 0]
    relevant.sort(key=lambda doc_id: -gains[doc_id])
    label = relevant[:k]
    if not label:
        return 0.0

    # best[i] is the largest weight of a common subsequence that ends with label[i].
    best = [0.0] * len(label)
    place_of = {doc_id: i for i, doc_id in enumerate(label)}
    for rank, doc_id in enumerate(ranked[:k], 1):
        place = place_of.pop(doc_id, None)
        if place is not None:
            best_before = max(best[:place], default=0.0)
            best[place] = best_before + 1 / math.log2(rank + 1)

    label_weight = sum(1 / math.log2(rank + 1) for rank in range(1, len(label) + 1))
    return max(best) / label_weight


def compute_category_consistency(
    ranked: Sequence[str], gains: Mapping[str, float], category: Mapping[str, str], k: int
) -> float:
    """Compute the share of the first k places with the category of the first relevant document.

    0 where that document is not among them.
    """
    first_places = ranked[:k]
    target = next((doc_id for doc_id, gain in gains.items() if gain > 0), None)
    if target is None or target not in first_places or target not in category:
        return 0.0
    target_category = category[target]
    num_alike = sum(category.get(doc_id) == target_category for doc_id in first_places)
    return num_alike / len(first_places)


def compute_overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """Compute the penalty of a long completion (DAPO, arXiv 2503.14476, eq. 13).

    0 while `buffer` tokens are left, then linearly to -1 at the limit.
    """
    if buffer == 0:
        return 0.0
    return min(0.0, (limit - buffer - length) / buffer)
