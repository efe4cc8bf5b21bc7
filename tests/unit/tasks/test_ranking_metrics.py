"""Metrics against hand-worked figures and trec_eval; the bootstrap against the formula and by its
coverage.
"""

import math
import random
import tracemalloc

import numpy as np
import pytest

from recr1.evaluation.bootstrap import compute_bootstrap_ci
from recr1.tasks.ranking_metrics import (
    compute_hit_rate,
    compute_ndcg,
    compute_recall,
    compute_reciprocal_rank,
)

ALL = [compute_ndcg, compute_recall, compute_reciprocal_rank, compute_hit_rate]
GAINS = {"a": 3, "b": 2, "c": 0, "d": 1}


def test_worked_by_hand():
    ranked = ["x", "b", "c", "a"]
    dcg = 2 / math.log2(3) + 3 / math.log2(5)
    ideal = 3 + 2 / math.log2(3) + 1 / math.log2(4)
    assert compute_ndcg(ranked, GAINS, 10) == pytest.approx(dcg / ideal, abs=1e-12)
    assert compute_ndcg(ranked, GAINS, 2) == pytest.approx(
        2 / math.log2(3) / (3 + 2 / math.log2(3)), abs=1e-12
    )
    assert compute_recall(ranked, GAINS, 10) == 2 / 3
    assert compute_recall(ranked, GAINS, 2) == 1 / 3
    assert compute_reciprocal_rank(ranked, GAINS, 10) == 1 / 2
    assert compute_reciprocal_rank(ranked, GAINS, 1) == 0
    assert compute_hit_rate(ranked, GAINS, 2) == 1
    assert compute_hit_rate(ranked, GAINS, 1) == 0


def test_perfect_order_is_one_at_every_k():
    assert [compute_ndcg(["a", "b", "d", "c"], GAINS, k) for k in (1, 2, 3, 4, 100)] == [1] * 5


def test_equals_trec_eval_on_500_random_graded_runs():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = random.Random(0)
    cuts = (1, 5, 10, 100)
    docs = [f"d{i}" for i in range(300)]
    names = [f"{name}_{k}" for name in ("ndcg_cut", "recall", "success") for k in cuts]
    seen_relevant = 0
    for _ in range(500):
        gains = {
            doc: rng.choice([0, 0, 1, 2, 3, 10, 100])
            for doc in rng.sample(docs, rng.randint(1, 150))
        }
        ranked = rng.sample(docs, rng.randint(1, 200))
        seen_relevant += any(gains.values())
        # distinct falling scores: trec_eval breaks ties by document id
        run = {"q": {doc: float(len(ranked) - i) for i, doc in enumerate(ranked)}}
        true = pytrec_eval.RelevanceEvaluator({"q": gains}, {*names, "recip_rank"}).evaluate(run)[
            "q"
        ]
        for k in cuts:
            for ours, theirs in (
                (compute_ndcg, "ndcg_cut"),
                (compute_recall, "recall"),
                (compute_hit_rate, "success"),
            ):
                assert ours(ranked, gains, k) == pytest.approx(true[f"{theirs}_{k}"], abs=1e-6), (
                    theirs,
                    k,
                )
        assert compute_reciprocal_rank(ranked, gains, len(ranked)) == pytest.approx(
            true["recip_rank"], abs=1e-6
        )
    assert seen_relevant > 450


@pytest.mark.parametrize("metric", ALL)
def test_no_relevant_document_or_no_result_is_zero(metric):
    for ranked, gains in (
        (["a"], {}),
        (["a"], {"a": 0}),
        (["a"], {"a": -1.0}),
        ([], GAINS),
        ([], {}),
    ):
        assert metric(ranked, gains, 10) == 0.0


def test_a_repeat_gains_nothing_and_keeps_its_rank():
    once = ["x", "b", "y", "d"]
    twice = ["x", "b", "b", "d"]
    for metric in ALL:
        assert metric(twice, GAINS, 4) == metric(once, GAINS, 4)
    assert compute_ndcg(["a"] * 10, {"a": 1}, 10) == 1
    assert compute_recall(["a"] * 10, {"a": 1, "b": 1}, 10) == 0.5


def test_a_negative_gain_counts_as_zero():
    assert compute_ndcg(["e", "a"], {"a": 3, "e": -5}, 10) == compute_ndcg(["x", "a"], {"a": 3}, 10)


@pytest.mark.parametrize("metric", ALL)
def test_k_below_one_is_refused(metric):
    for gains in (GAINS, {}):
        with pytest.raises(ValueError, match="k of at least 1"):
            metric(["a"], gains, 0)


def test_interval_is_the_normal_one_for_many_values_and_repeats():
    values = np.random.default_rng(1).normal(0.01, 0.2, 1577)
    half = 1.96 * values.std() / len(values) ** 0.5
    low, high = compute_bootstrap_ci(values)
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert (low, high) == compute_bootstrap_ci(values) != compute_bootstrap_ci(values, seed=1)


def test_interval_covers_the_true_mean_95_times_in_100():
    rng = np.random.default_rng(2)
    intervals = [compute_bootstrap_ci(rng.exponential(1.0, 60), seed, 1000) for seed in range(400)]
    # skewed data, n = 60: the percentile interval is known to cover a little less than 95%
    assert 0.89 < np.mean([low <= 1.0 <= high for low, high in intervals]) < 0.98


def test_interval_is_cut_at_the_percentiles_of_the_last_partial_chunk_too():
    # 2 resamples at a time, 5 in all: chunks of 2, 2, 1
    values = np.random.default_rng(3).random(400_000)
    low, high = compute_bootstrap_ci(values, samples=5)
    assert abs(low - values.mean()) < 0.002
    assert abs(high - values.mean()) < 0.002


def test_interval_memory_stays_small():
    tracemalloc.start()
    compute_bootstrap_ci(np.random.default_rng(0).random(1577))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6, peak


def test_interval_edges():
    assert compute_bootstrap_ci(np.array([0.25])) == (0.25, 0.25)
    for bad in ([], [[1.0, 2.0]], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="non-empty"):
            compute_bootstrap_ci(np.array(bad))
