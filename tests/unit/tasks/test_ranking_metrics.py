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
CUTS = (1, 5, 10, 100)
TREC_NAMES = {"ndcg_cut": compute_ndcg, "recall": compute_recall, "success": compute_hit_rate}


def test_worked_by_hand():
    ranked = ["x", "b", "c", "a"]
    dcg_at_2 = 2 / math.log2(3)
    dcg = dcg_at_2 + 3 / math.log2(5)
    ideal_at_2 = 3 + 2 / math.log2(3)
    ideal = ideal_at_2 + 1 / math.log2(4)

    ndcg = compute_ndcg(ranked, GAINS, 10)
    ndcg_at_2 = compute_ndcg(ranked, GAINS, 2)
    assert ndcg == pytest.approx(dcg / ideal, abs=1e-12)
    assert ndcg_at_2 == pytest.approx(dcg_at_2 / ideal_at_2, abs=1e-12)
    assert compute_recall(ranked, GAINS, 10) == 2 / 3
    assert compute_recall(ranked, GAINS, 2) == 1 / 3
    assert compute_reciprocal_rank(ranked, GAINS, 10) == 1 / 2
    assert compute_reciprocal_rank(ranked, GAINS, 1) == 0
    assert compute_hit_rate(ranked, GAINS, 2) == 1
    assert compute_hit_rate(ranked, GAINS, 1) == 0


def test_perfect_order_is_one_at_every_k():
    for k in (1, 2, 3, 4, 100):
        assert compute_ndcg(["a", "b", "d", "c"], GAINS, k) == 1


def draw_gains(rng: random.Random, docs: list[str]) -> dict[str, int]:
    judged = rng.sample(docs, rng.randint(1, 150))
    return {doc: rng.choice([0, 0, 1, 2, 3, 10, 100]) for doc in judged}


def evaluate_by_trec(ranked: list[str], gains: dict[str, int]) -> dict[str, float]:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    names = {"recip_rank"}
    for name in TREC_NAMES:
        names |= {f"{name}_{k}" for k in CUTS}
    evaluator = pytrec_eval.RelevanceEvaluator({"q": gains}, names)
    # distinct falling scores: trec_eval breaks ties by document id
    scores = {}
    for i, doc in enumerate(ranked):
        scores[doc] = float(len(ranked) - i)
    return evaluator.evaluate({"q": scores})["q"]


def test_equals_trec_eval_on_500_random_graded_runs():
    rng = random.Random(0)
    docs = [f"d{i}" for i in range(300)]
    with_relevant = 0
    for _ in range(500):
        gains = draw_gains(rng, docs)
        ranked = rng.sample(docs, rng.randint(1, 200))
        with_relevant += any(gains.values())

        want = evaluate_by_trec(ranked, gains)

        for name, metric in TREC_NAMES.items():
            for k in CUTS:
                actual = metric(ranked, gains, k)
                wanted = want[f"{name}_{k}"]
                assert actual == pytest.approx(wanted, abs=1e-6), (name, k)
        reciprocal_rank = compute_reciprocal_rank(ranked, gains, len(ranked))
        assert reciprocal_rank == pytest.approx(want["recip_rank"], abs=1e-6)
    assert with_relevant > 450


@pytest.mark.parametrize("metric", ALL)
def test_no_relevant_document_or_no_result_is_zero(metric):
    assert metric(["a"], {}, 10) == 0.0
    assert metric(["a"], {"a": 0}, 10) == 0.0
    assert metric(["a"], {"a": -1.0}, 10) == 0.0
    assert metric([], GAINS, 10) == 0.0
    assert metric([], {}, 10) == 0.0


def test_a_repeat_gains_nothing_and_keeps_its_rank():
    once = ["x", "b", "y", "d"]
    twice = ["x", "b", "b", "d"]

    for metric in ALL:
        assert metric(twice, GAINS, 4) == metric(once, GAINS, 4)
    assert compute_ndcg(["a"] * 10, {"a": 1}, 10) == 1
    assert compute_recall(["a"] * 10, {"a": 1, "b": 1}, 10) == 0.5


def test_a_negative_gain_counts_as_zero():
    with_negative = compute_ndcg(["e", "a"], {"a": 3, "e": -5}, 10)
    with_unjudged = compute_ndcg(["x", "a"], {"a": 3}, 10)

    assert with_negative == with_unjudged


@pytest.mark.parametrize("metric", ALL)
def test_k_below_one_is_refused(metric):
    for gains in (GAINS, {}):
        with pytest.raises(ValueError, match="k of at least 1"):
            metric(["a"], gains, 0)


def test_interval_is_the_normal_one_for_many_values_and_repeats():
    rng = np.random.default_rng(1)
    values = rng.normal(0.01, 0.2, 1577)
    mean = values.mean()
    half = 1.96 * values.std() / len(values) ** 0.5

    low, high = compute_bootstrap_ci(values)

    assert low == pytest.approx(mean - half, abs=0.05 * half)
    assert high == pytest.approx(mean + half, abs=0.05 * half)
    assert compute_bootstrap_ci(values) == (low, high)
    assert compute_bootstrap_ci(values, seed=1) != (low, high)


def test_interval_covers_the_true_mean_95_times_in_100():
    rng = np.random.default_rng(2)
    covered = []
    for seed in range(400):
        values = rng.exponential(1.0, 60)
        low, high = compute_bootstrap_ci(values, seed, 1000)
        covered.append(low <= 1.0 <= high)

    # skewed data, n = 60: the percentile interval is known to cover a little less than 95%
    assert 0.89 < np.mean(covered) < 0.98


def test_interval_is_cut_at_the_percentiles_of_the_last_partial_chunk_too():
    # 2 resamples at a time, 5 in all: chunks of 2, 2, 1
    rng = np.random.default_rng(3)
    values = rng.random(400_000)
    mean = values.mean()

    low, high = compute_bootstrap_ci(values, samples=5)

    assert abs(low - mean) < 0.002
    assert abs(high - mean) < 0.002


def test_interval_memory_stays_small():
    tracemalloc.start()
    rng = np.random.default_rng(0)
    values = rng.random(1577)
    compute_bootstrap_ci(values)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 64e6, peak


def test_interval_edges():
    one_value = np.array([0.25])
    assert compute_bootstrap_ci(one_value) == (0.25, 0.25)
    for bad in ([], [[1.0, 2.0]], [1.0, math.nan], [math.inf]):
        bad_values = np.array(bad)
        with pytest.raises(ValueError, match="non-empty"):
            compute_bootstrap_ci(bad_values)
