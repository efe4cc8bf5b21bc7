"""The parts of a reward against tables worked by hand and brute force, their sum, and `recr1
reward`.
"""

import json
import math
import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from helpers.tiny_world import THINGS, jsonl, write_yaml
from scipy.stats import permutation_test

from recr1 import cli, train
from recr1.config import loader as configs
from recr1.config.schema import Config, ConfigError, DataConfig, RewardConfig
from recr1.data.readers import DataError
from recr1.evaluation.bootstrap import compute_sign_flip_p
from recr1.retrieval.bm25.searcher import load_or_build_bm25
from recr1.tasks.ranking_metrics import compute_intra_list_distance, compute_novelty
from recr1.tasks.rewards import (
    ItemTable,
    RewardTerms,
    compute_category_consistency,
    compute_weighted_lcs,
    read_item_table,
)
from recr1.training.launch import run_guarded

# The items of the worked table: genres, interactions. Jaccard distances: a-b 1 - 1/3, a-c 1, b-c 1
# - 1/2, with d (no genres) 1, d-e 0.
GENRES = dict(a={"drama", "war"}, b={"war", "comedy"}, c={"comedy"}, d=set(), e=set())
COUNTS = dict(a=8, b=4, c=2, d=0, e=2)
ITEMS = ItemTable(
    {id: frozenset(g) for id, g in GENRES.items()},
    dict(a="film", b="film", c="book", d="film"),
    COUNTS,
)


LIST_DISTANCES = [  # ranked, k, want
    (["a", "b", "c"], 10, (2 / 3 + 1 + 1 / 2) / 3),
    (["a", "b", "c"], 2, 2 / 3),
    (["a", "d"], 5, 1.0),
    (["d", "e"], 5, 0.0),
    (["a", "a", "b"], 5, 2 / 3),
    (["a"], 5, 0.0),
    ([], 5, 0.0),
    (["a", "a"], 5, 0.0),
]
NOVELTIES = [  # ranked, k, want in bits
    (["a"], 5, 1.0),
    (["a", "b", "c"], 5, 2.0),
    (["c", "a"], 1, 3.0),
    (["d"], 5, 4.0),
    (["nobody"], 5, 4.0),
    (["a", "a", "c"], 5, 2.0),
    ([], 5, 0.0),
]
DOCS = [f"d{i}" for i in range(9)]
CATEGORY_GAINS = {"x": 0.0, "b": 1.0, "c": 3.0}  # the first relevant one is b, a film
CONSISTENCIES = [  # ranked, k, want
    (["a", "b", "c", "d"], 4, 3 / 4),
    (["a", "b", "c", "d"], 3, 2 / 3),
    (["a", "c", "b"], 2, 0.0),
    (["b"], 9, 1.0),
    ([], 9, 0.0),
    (["b", "zz"], 9, 0.5),
]


def test_intra_list_distance_worked_by_hand():
    for ranked, k, want in LIST_DISTANCES:
        distance = compute_intra_list_distance(ranked, ITEMS.distance, k)
        assert distance == pytest.approx(want, abs=1e-12), ranked
    assert ITEMS.distance("nobody", "a") == 1.0


def test_novelty_worked_by_hand():
    """16 interactions: a 1 bit, b 2 bits, c 3 bits; d, which nobody has touched, as if once: 4
    bits.
    """
    for ranked, k, want in NOVELTIES:
        novelty = compute_novelty(ranked, COUNTS, 16, k)
        assert novelty == pytest.approx(want, abs=1e-12), ranked

    rule = RewardConfig(weights={"novelty": 1.0}, k_list=2)
    reward_terms = RewardTerms(rule, 5, ITEMS)
    terms = reward_terms({}, None, ["a", "d", "b"], {})
    # of at most log2(16) bits
    assert terms["novelty"] == pytest.approx((1 + 4) / 2 / 4)


@pytest.mark.parametrize(
    "metric",
    [
        lambda k: compute_intra_list_distance(["a"], ITEMS.distance, k),
        lambda k: compute_novelty(["a"], COUNTS, 16, k),
    ],
)
def test_no_list_is_cut_at_nothing(metric):
    with pytest.raises(ValueError, match="k of at least 1"):
        metric(0)


def test_category_consistency_worked_by_hand():
    categories = ITEMS.category
    for ranked, k, want in CONSISTENCIES:
        consistency = compute_category_consistency(ranked, CATEGORY_GAINS, categories, k)
        assert consistency == pytest.approx(want), ranked
    assert compute_category_consistency(["e", "a"], {"e": 1.0}, categories, 5) == 0.0
    assert compute_category_consistency(["a"], {}, categories, 5) == 0.0


def discount(rank: int) -> float:
    """Return the weight of a rank that is counted from 0."""
    return 1 / math.log2(rank + 2)


def find_heaviest(ranks: dict[str, int], label: list[str]) -> float:
    """Find the heaviest subsequence by brute force: of all sets of documents, those that stand in
    the label's order.
    """
    docs = [doc for doc in ranks if doc in label]
    docs.sort(key=ranks.__getitem__)
    heaviest = 0.0
    for size in range(1, len(docs) + 1):
        for chosen in combinations(docs, size):
            places = [label.index(doc) for doc in chosen]
            weight = sum(discount(ranks[doc]) for doc in chosen)
            if places == sorted(places) and weight > heaviest:
                heaviest = weight
    return heaviest


def test_weighted_lcs_against_every_subsequence():
    """Draw graded documents and rankings, with repeats and unjudged ones in them."""
    rng = random.Random(0)
    for _ in range(300):
        judged = rng.sample(DOCS, rng.randint(0, 6))
        gains = {doc: rng.choice([0, 1, 1, 2]) for doc in judged}
        length = rng.randint(0, 8)
        ranked = [rng.choice(DOCS) for _ in range(length)]
        k = rng.randint(1, 9)
        relevant = [doc for doc in gains if gains[doc] > 0]
        label = sorted(relevant, key=gains.__getitem__, reverse=True)[:k]
        first_ranks = {}
        for rank, doc in enumerate(ranked[:k]):
            first_ranks.setdefault(doc, rank)

        want = 0.0
        if label:
            ideal = sum(discount(rank) for rank, _ in enumerate(label))
            want = find_heaviest(first_ranks, label) / ideal

        actual = compute_weighted_lcs(ranked, gains, k)
        assert actual == pytest.approx(want, abs=1e-12)
    assert compute_weighted_lcs(["b", "a"], {"a": 1, "b": 2}, 5) == 1.0


def test_the_sum_of_the_parts():
    weights = {"ndcg": 1.0, "recall": 0.5, "diversity": 0.1, "category": 0.2, "hit": 0.0}
    rule = RewardConfig(weights=weights, bonus=0.1, miss=-0.2, unparsable=-3.0)
    reward_terms = RewardTerms(rule, 3, ITEMS)
    row = dict(text="q")
    second_gain = 1 / math.log2(3)
    ndcg = second_gain / (1 + second_gain)
    diversity = (2 / 3 + 1 + 1 / 2) / 3
    want = dict(ndcg=ndcg, recall=0.5, diversity=diversity, category=2 / 3, hit=1.0)

    terms = reward_terms(row, None, ["a", "b", "c"], {"b": 1.0, "z": 1.0})
    reward = reward_terms.make_reward("text", "answer", None, terms, 0.0)
    assert terms == pytest.approx(want)
    total = 0.1 + ndcg + 0.25 + 0.1 * diversity + 0.2 * want["category"]
    assert reward.total == pytest.approx(total)
    assert reward.terms == terms

    terms = reward_terms(row, None, ["a", "c"], {"z": 1.0})
    missed = reward_terms.make_reward("text", "answer", None, terms, 0.0)
    # other parts are paid without a hit too, the bonus is not
    assert missed.total == pytest.approx(-0.2 + 0.1 * 1.0)

    bad = reward_terms.make_reward("text", None, "tags", None, 0.0)
    assert bad.total == -3.0
    assert bad.terms == dict.fromkeys(want, 0.0)
    assert bad.error == "tags"


SECOND = 1 / math.log2(3)  # the NDCG of one relevant document at rank 2
# ndcg of the raw answer -> (total with the bonus for accuracy, for a better order), both + 0.5 gain
GAINS = [
    (0.0, 0.1 + SECOND + 0.5 * SECOND, 0.1 + SECOND + 0.5 * SECOND),
    (SECOND, 0.1 + SECOND, SECOND),
    (1.0, 0.1 + SECOND + 0.5 * (SECOND - 1), SECOND + 0.5 * (SECOND - 1)),
]


@pytest.mark.parametrize("baseline, accurate, better", GAINS)
def test_what_pays_only_for_better(baseline, accurate, better):
    totals = {}
    for condition in ("accurate", "better"):
        weights = {"ndcg": 1.0, "ndcg_gain": 0.5}
        rule = RewardConfig(weights=weights, bonus=0.1, bonus_if=condition)
        reward_terms = RewardTerms(rule, 3)
        terms = reward_terms({}, None, ["x", "a"], {"a": 1.0}, baseline)
        assert reward_terms.needs_baseline
        assert terms["ndcg_gain"] == pytest.approx(SECOND - baseline)
        totals[condition] = reward_terms.compute_total(terms)

    assert totals == pytest.approx(dict(accurate=accurate, better=better))


def test_a_bonus_for_better_without_accuracy():
    """A bonus alone, for the gain: a miss that was a miss before pays the miss."""
    rule = RewardConfig(weights={"ndcg": 0.0}, bonus=1.0, miss=-0.2, bonus_if="better")
    reward_terms = RewardTerms(rule, 3)
    assert reward_terms.names == ("ndcg", "ndcg_gain")

    hit = reward_terms({}, None, ["a"], {"a": 1.0}, 0.5)
    miss = reward_terms({}, None, ["x"], {"a": 1.0}, 0.0)

    assert reward_terms.compute_total(hit) == pytest.approx(1.0 - 0.2)
    assert reward_terms.compute_total(miss) == pytest.approx(-0.2)


def test_a_run_that_is_paid_for_better(tmp_path):
    """Each rollout's gain is its ndcg less that of its own query, searched as it is."""
    overrides = {
        "reward.weights": {"ndcg_gain": 1.0},
        "reward.bonus_if": "better",
        "reward.bonus": 0.25,
        "log.tokens_every": 1,
    }
    config = write_yaml(tmp_path, **overrides)
    assert run_guarded(train.main, [config]) == 0
    cfg = configs.load_config(config, [])
    raw_ndcg = find_raw_ndcg(cfg)

    rows = jsonl(tmp_path / "run/rollouts.jsonl.gz")
    parsed = [row for row in rows if row["error"] is None]
    assert len(parsed) > 10
    gains = []
    for row in parsed:
        terms = row["reward_terms"]
        gain = terms["ndcg"] - raw_ndcg[row["prompt"]]
        assert terms["ndcg_gain"] == pytest.approx(gain, abs=1e-6)
        bonus = cfg.reward.bonus if gain > 1e-9 else 0.0
        assert row["reward"] == pytest.approx(gain + bonus + cfg.reward.miss, abs=1e-5)
        gains.append(gain)
    assert min(gains) < 0 < max(gains)

    for row in jsonl(tmp_path / "run/eval_after.jsonl"):
        assert row["ndcg_gain_raw"] == 0


def find_raw_ndcg(cfg: Config) -> dict[str, float]:
    """Search the train queries as they are; the NDCG is pytrec_eval's."""
    judgements: dict[str, dict[str, int]] = {}
    for line in Path(cfg.data.train_qrels).read_text().splitlines():
        query_id, doc_id, gain = line.split("\t")
        judgements.setdefault(query_id, {})[doc_id] = int(float(gain))
    searcher = load_or_build_bm25(None, cfg.data.corpus)
    k = cfg.reward.k_train
    found = {}
    for query in jsonl(Path(cfg.data.train_queries)):
        indices, _ = searcher.search([query["text"]], k)
        hits = [searcher.doc_ids[index] for index in indices[0].tolist() if index >= 0]
        found[query["id"]] = {doc_id: float(-rank) for rank, doc_id in enumerate(hits)}
    measure = f"ndcg_cut.{k}"
    rows = pytrec_eval.RelevanceEvaluator(judgements, {measure}).evaluate(found)
    return {query_id: row[f"ndcg_cut_{k}"] for query_id, row in rows.items()}


def test_what_is_measured():
    default = RewardConfig()
    novelty = RewardConfig(weights={"novelty": 1.0})
    mrr_and_novelty = RewardConfig(metric="mrr", weights={"novelty": 1.0})

    assert RewardTerms(default, 5).names == ("ndcg",)
    assert RewardTerms(mrr_and_novelty, 5).names == ("mrr", "novelty")
    every = RewardTerms(novelty, 5, every=True)
    assert every.names == ("ndcg", "recall", "mrr", "hit", "novelty")


MY_REWARD = """
def short(answer, ranked, gains, row):
    share = len(answer.split()) / len(row['text'].split())
    return -share + ('a' in gains) + ranked.index('a')

def nan(answer, ranked, gains, row):
    return float('nan')

def text(*_):
    return 'x'
"""
BAD_FUNCTIONS = [  # function, message
    ("nan", "returned nan"),
    ("text", "raised ValueError"),
    ("short", "raised ValueError.*'b c'"),
]


def test_a_function_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(MY_REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    rule = RewardConfig(weights={"ndcg": 1.0, "my_reward:short": 2.0}, bonus=0.0)
    reward_terms = RewardTerms(rule, 3)
    row = dict(text="a b")
    ndcg = 1 / math.log2(3)

    terms = reward_terms(row, "one two three", ["b", "a"], {"a": 1.0})
    total = reward_terms.compute_total(terms)

    assert terms["my_reward:short"] == 0.5
    assert total == pytest.approx(ndcg + 1.0)
    other_row = dict(text="b c")
    for name, message in BAD_FUNCTIONS:
        bad_rule = RewardConfig(weights={f"my_reward:{name}": 1.0})
        bad_terms = RewardTerms(bad_rule, 3)
        with pytest.raises(ConfigError, match=message) as error:
            bad_terms(other_row, "x", ["b"], {})
        text = str(error.value)
        assert f"reward.weights: my_reward:{name}" in text
        assert "\n" not in text
    absent = RewardConfig(weights={"my_reward:none": 1.0})
    with pytest.raises(ConfigError, match="reward.weights: 'my_reward:none' cannot be loaded"):
        RewardTerms(absent, 3)


BAD_WEIGHTS = [  # YAML, message
    ("{ndgc: 1}", "'ndgc' is not one of ndcg, recall"),
    ("{ndcg: 0}", "at least one must be other than 0"),
    ("{}", "at least one"),
    ("[ndcg]", "expected name: value pairs"),
    ("{ndcg: much}", "reward.weights.ndcg: expected float"),
    ("{3: 1}", "reward.weights: expected str"),
    ("{ndcg: .inf}", "must be a finite number"),
]


@pytest.mark.parametrize("text, message", BAD_WEIGHTS)
def test_weights_that_are_refused(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(f"reward: {{weights: {text}}}")

    with pytest.raises(ConfigError, match=message):
        configs.load_config(str(path), [])


def test_weights_of_the_yaml_take_the_place_of_the_default(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("reward: {weights: {recall: 1, diversity: 1e-1}, metric: recall}")
    dumped_path = tmp_path / "d.yaml"

    cfg = configs.load_config(str(path), ["reward.weights.recall=2"])
    dumped_path.write_text(configs.dump_config(cfg))

    assert cfg.reward.weights == {"recall": 2.0, "diversity": 0.1}
    assert configs.load_config(str(dumped_path), []) == cfg


def format_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_items(tmp_path, rows, **weights) -> ItemTable:
    """Read the item table of a corpus of these rows, for these weights of the reward."""
    path = tmp_path / "corpus.jsonl"
    path.write_text(format_lines(rows))
    data = DataConfig(corpus=str(path))
    reward = RewardConfig(weights=weights)
    return read_item_table(Config(data=data, reward=reward))


ABSENT_FIELDS = [  # term, message
    ("category", "no document has category"),
    ("diversity", "no document has genres or category"),
    ("novelty", "no document has popularity"),
]
BAD_FIELDS = [  # term, field of the row, message
    ("novelty", dict(popularity=-1), "'popularity' is -1; want a finite number"),
    ("diversity", dict(genres="x"), "'genres' is x; want a list of strings"),
    ("category", dict(category=3), "'category' is a int"),
]


def test_items_are_read_where_a_weight_asks_for_them(tmp_path):
    plain = dict(id="a", title="t")
    rows = [
        dict(id="a", title="t", genres=["x", "y"], category="c", popularity=3),
        dict(id="b", title="t", category="c"),
        dict(id="c", title="t", genres=[]),
    ]
    kinds = dict(a=frozenset("xy"), b=frozenset("c"), c=frozenset())
    without_corpus = Config(data=DataConfig(corpus="nowhere"))

    empty = ItemTable()
    assert read_items(tmp_path, rows, ndcg=1.0) == empty
    assert read_item_table(without_corpus) == empty
    assert read_items(tmp_path, rows, diversity=0.0).kinds == kinds
    items = read_items(tmp_path, rows, category=0.2, novelty=0.1)
    assert items.category == dict(a="c", b="c")
    assert items.popularity == dict(a=3)
    assert items.kinds == {}
    for term, message in ABSENT_FIELDS:
        with pytest.raises(DataError, match=message):
            read_items(tmp_path, [plain], **{term: 1.0})
    for term, field, message in BAD_FIELDS:
        with pytest.raises(DataError, match=f"corpus.jsonl:1: {message}"):
            read_items(tmp_path, [plain | field], **{term: 1.0})


# --- the paired test ------------------------------------------------------------------------------


def compute_mean_difference(x, y):
    return np.mean(x - y)


def test_the_sign_flip_test_is_scipys():
    rng = np.random.default_rng(0)
    for n, shift in ((9, 0.3), (12, 0.0), (30, 0.4)):
        differences = np.round(rng.normal(shift, 1, n), 1)  # with ties and zeros
        scipys = permutation_test(
            (differences, np.zeros(n)),
            compute_mean_difference,
            permutation_type="samples",
            n_resamples=50_000,
            rng=1,
        )
        p = compute_sign_flip_p(differences)
        assert p == pytest.approx(scipys.pvalue, abs=0.015), (n, shift)


def test_the_sign_flip_tests_edges():
    zeros = np.zeros(7)
    one_value = np.array([0.5])
    forty_equal = np.full(40, 0.1)
    three_equal = np.full(3, 0.1)
    nothing = np.array([])
    rng = np.random.default_rng(1)
    many = rng.normal(0, 1, 200_000)

    assert compute_sign_flip_p(zeros) == 1.0
    assert compute_sign_flip_p(one_value) == 1.0
    assert compute_sign_flip_p(forty_equal) == 1 / 10_001
    p_of_three = compute_sign_flip_p(three_equal)
    assert p_of_three == pytest.approx(0.25, abs=0.02)
    p_of_many = compute_sign_flip_p(many, samples=20)
    assert compute_sign_flip_p(many, samples=20) == p_of_many
    with pytest.raises(ValueError, match="sign_flip_p needs"):
        compute_sign_flip_p(nothing)


# --- recr1 reward ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    weights = {"ndcg": 1.0, "recall": 0.5}
    return write_yaml(folder, **{"model.path": "nowhere", "reward.weights": weights})


def write_answer(query: str) -> str:
    body = json.dumps({"query": query})
    return f"so</think><answer>{body}</answer>"


@pytest.fixture
def run_reward(tmp_path, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run `recr1 reward` on rows of completions.

    run_reward(config, rows, overrides...) -> (exit code, stdout, stderr)
    """

    def run_command(config: str, rows: list[dict], *overrides: str):
        path = tmp_path / "f.jsonl"
        path.write_text(format_lines(rows))
        argv = ["reward", "--config", config, "--completions", str(path), "--json", *overrides]
        capsys.readouterr()
        code = run_guarded(cli.main, argv)
        out, err = capsys.readouterr()
        return code, out, err

    return run_command


def read_result(ran: tuple[int, str, str]) -> dict:
    """Read the JSON of a command that succeeded."""
    code, out, _ = ran
    assert code == 0
    return json.loads(out.splitlines()[-1])


def find_target(config: str, query: str) -> str:
    """Find the thing that a test query looks for."""
    cfg = configs.load_config(config, [])
    lines = Path(cfg.data.test_qrels).read_text().splitlines()
    for line in lines:
        query_id, doc_id, _ = line.split("\t")
        if query_id == query:
            product = int(doc_id.removeprefix("d"))
    return THINGS[product % len(THINGS)]


def test_stored_completions_are_scored_part_by_part(world, run_reward):
    thing = find_target(world, "test0")
    rows = [
        dict(id="test0", text=write_answer(thing), more=1),
        dict(id="test0", text="nothing"),
        dict(id="test1", text=""),
        dict(id="train0", text=write_answer("xyzzy")),
    ]

    ran = run_reward(world, rows, "reward.k_train=40")

    result = read_result(ran)
    first, second, third, fourth = result["rows"]
    assert first["recall"] == 1.0
    assert 0 < first["ndcg"] < 1
    assert first["total"] == pytest.approx(first["ndcg"] + 0.5)
    assert first["answer"] == thing
    assert second["total"] == -1.0
    assert second["error"] == "no_think_end"
    assert third["error"] == "no_think_end"
    assert fourth["total"] == 0.0
    assert fourth["error"] is None

    mean_of_test0 = (first["total"] - 1) / 2
    assert result["n"] == 4
    assert result["queries"] == 3
    assert result["k"] == 40
    assert result["format_errors"] == {"no_think_end": 2}
    assert result["metrics"]["total"] == pytest.approx((mean_of_test0 - 1 + 0) / 3)
    assert set(result["metrics"]) == {"total", "ndcg", "recall", "mrr", "hit"}
    _, out, _ = ran
    assert "unparsable: 2" in out
    assert "no_think_end" in out

    ran_alone = run_reward(world, rows[:1], "reward.k_train=1")
    alone = read_result(ran_alone)
    assert alone["rows"][0]["recall"] <= 1
    assert alone["k"] == 1


def test_a_prompt_that_closes_the_thought(world, run_reward):
    rows = [dict(id="test0", text='<answer>{"query": "lamp"}</answer>')]

    ran_open = run_reward(world, rows)
    ran_closed = run_reward(world, rows, "prompt.assistant=<think></think>")

    assert read_result(ran_open)["format_errors"] == {"no_think_end": 1}
    assert read_result(ran_closed)["format_errors"] == {}


BAD_COMPLETIONS = [  # rows, message
    ([dict(id="ghost", text="x")], "query id 'ghost' is in none"),
    ([dict(id="test0")], "f.jsonl:1: no key 'text'"),
    ([], "the file is empty"),
]


def test_bad_completions_are_one_line(world, run_reward):
    for rows, message in BAD_COMPLETIONS:
        code, _, err = run_reward(world, rows)
        assert code != 0
        assert message in err
        assert err.startswith("recr1: ")
        assert err.count("\n") == 1

    row = dict(id="test0", text="x")
    code, _, err = run_reward(world, [row], "reward.k=3")
    assert code != 0
    assert "unknown key reward.k" in err


def test_a_runs_evaluation_scores_the_same(tmp_path, run_reward):
    """`recr1 reward` on eval_after.jsonl, at the evaluation's depth: every part of every row."""
    config = write_yaml(tmp_path, **{"train.steps": 1, "train.eval_every": 0})
    assert run_guarded(train.main, [config]) == 0
    rows = jsonl(tmp_path / "run/eval_after.jsonl")

    ran = run_reward(config, rows, "reward.k_train=10")

    result = read_result(ran)
    for row, scored in zip(rows, result["rows"], strict=True):
        for name in ("id", "ndcg", "recall", "mrr", "hit", "error"):
            assert scored[name] == row[name]
        assert row["rewrite"] == scored["answer"]
