"""The parts of a reward against tables worked by hand and brute force, their sum, and `recr1
reward`.
"""

import json
import math
import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_world import THINGS, jsonl, write_yaml
from scipy.stats import permutation_test

from recr1 import cli
from recr1.config import loader as configs
from recr1.config.schema import Config, ConfigError, DataConfig, RewardConfig
from recr1.data.readers import DataError
from recr1.evaluation.bootstrap import compute_sign_flip_p
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


def test_intra_list_distance_worked_by_hand():
    for ranked, k, want in (
        (["a", "b", "c"], 10, (2 / 3 + 1 + 1 / 2) / 3),
        (["a", "b", "c"], 2, 2 / 3),
        (["a", "d"], 5, 1.0),
        (["d", "e"], 5, 0.0),
        (["a", "a", "b"], 5, 2 / 3),
        (["a"], 5, 0.0),
        ([], 5, 0.0),
        (["a", "a"], 5, 0.0),
    ):
        assert compute_intra_list_distance(ranked, ITEMS.distance, k) == pytest.approx(
            want, abs=1e-12
        ), ranked
    assert ITEMS.distance("nobody", "a") == 1.0


def test_novelty_worked_by_hand():
    """16 interactions: a 1 bit, b 2 bits, c 3 bits; d, which nobody has touched, as if once: 4
    bits.
    """
    for ranked, k, want in (
        (["a"], 5, 1.0),
        (["a", "b", "c"], 5, 2.0),
        (["c", "a"], 1, 3.0),
        (["d"], 5, 4.0),
        (["nobody"], 5, 4.0),
        (["a", "a", "c"], 5, 2.0),
        ([], 5, 0.0),
    ):
        assert compute_novelty(ranked, COUNTS, 16, k) == pytest.approx(want, abs=1e-12), ranked
    parts = RewardTerms(RewardConfig(weights=dict(novelty=1.0), k_list=2), 5, ITEMS)
    # of at most log2(16) bits
    assert parts({}, None, ["a", "d", "b"], {})["novelty"] == pytest.approx((1 + 4) / 2 / 4)


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
    gains = {"x": 0.0, "b": 1.0, "c": 3.0}  # the first relevant one is b, a film
    for ranked, k, want in (
        (["a", "b", "c", "d"], 4, 3 / 4),
        (["a", "b", "c", "d"], 3, 2 / 3),
        (["a", "c", "b"], 2, 0.0),
        (["b"], 9, 1.0),
        ([], 9, 0.0),
        (["b", "zz"], 9, 0.5),
    ):
        assert compute_category_consistency(ranked, gains, ITEMS.category, k) == pytest.approx(
            want
        ), ranked
    assert compute_category_consistency(["e", "a"], {"e": 1.0}, ITEMS.category, 5) == 0.0
    assert compute_category_consistency(["a"], {}, ITEMS.category, 5) == 0.0


def test_weighted_lcs_against_every_subsequence():
    """Brute force: of all sets of places, those whose documents stand in the label's order, the
    heaviest.
    """
    rng = random.Random(0)
    for _ in range(300):
        gains = {f"d{i}": rng.choice([0, 1, 1, 2]) for i in rng.sample(range(9), rng.randint(0, 6))}
        ranked = [f"d{rng.randrange(9)}" for _ in range(rng.randint(0, 8))]
        k = rng.randint(1, 9)
        label = sorted((d for d in gains if gains[d] > 0), key=lambda d: -gains[d])[:k]
        first = {d: i for i, d in reversed(list(enumerate(ranked[:k])))}
        places = [(i, label.index(d)) for d, i in first.items() if d in label]
        best = max(
            (
                sum(1 / math.log2(i + 2) for i, _ in chosen)
                for n in range(len(places) + 1)
                for chosen in combinations(sorted(places), n)
                if all(a[1] < b[1] for a, b in zip(chosen, chosen[1:]))
            ),
            default=0.0,
        )
        ideal = sum(1 / math.log2(i + 2) for i in range(len(label)))
        assert compute_weighted_lcs(ranked, gains, k) == pytest.approx(
            best / ideal if label else 0.0, abs=1e-12
        )
    assert compute_weighted_lcs(["b", "a"], {"a": 1, "b": 2}, 5) == 1.0


def test_the_sum_of_the_parts():
    rule = RewardConfig(
        weights={"ndcg": 1.0, "recall": 0.5, "diversity": 0.1, "category": 0.2, "hit": 0.0},
        bonus=0.1,
        miss=-0.2,
        unparsable=-3.0,
    )
    parts = RewardTerms(rule, 3, ITEMS)
    found = parts(dict(text="q"), None, ["a", "b", "c"], {"b": 1.0, "z": 1.0})
    ndcg = (1 / math.log2(3)) / (1 + 1 / math.log2(3))
    want = dict(ndcg=ndcg, recall=0.5, diversity=(2 / 3 + 1 + 1 / 2) / 3, category=2 / 3, hit=1.0)
    assert found == pytest.approx(want)
    reward = parts.make_reward("text", "answer", None, found, 0.0)
    assert reward.total == pytest.approx(
        0.1 + ndcg + 0.25 + 0.1 * want["diversity"] + 0.2 * want["category"]
    )
    assert reward.terms == found
    missed = parts.make_reward(
        "text", "answer", None, parts(dict(text="q"), None, ["a", "c"], {"z": 1.0}), 0.0
    )
    # other parts are paid without a hit too, the bonus is not
    assert missed.total == pytest.approx(-0.2 + 0.1 * 1.0)
    bad = parts.make_reward("text", None, "tags", None, 0.0)
    assert (bad.total, bad.terms, bad.error) == (-3.0, dict.fromkeys(want, 0.0), "tags")


def test_what_is_measured():
    assert RewardTerms(RewardConfig(), 5).names == ("ndcg",)
    assert RewardTerms(RewardConfig(metric="mrr", weights={"novelty": 1.0}), 5).names == (
        "mrr",
        "novelty",
    )
    assert RewardTerms(RewardConfig(weights={"novelty": 1.0}), 5, every=True).names == (
        "ndcg",
        "recall",
        "mrr",
        "hit",
        "novelty",
    )


def test_a_function_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(
        "def short(answer, ranked, gains, row):\n"
        "    share = len(answer.split()) / len(row['text'].split())\n"
        "    return -share + ('a' in gains) + ranked.index('a')\n"
        "def nan(answer, ranked, gains, row):\n"
        "    return float('nan')\n"
        "def text(*_):\n"
        "    return 'x'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    parts = RewardTerms(RewardConfig(weights={"ndcg": 1.0, "my_reward:short": 2.0}, bonus=0.0), 3)
    found = parts(dict(text="a b"), "one two three", ["b", "a"], {"a": 1.0})
    assert found["my_reward:short"] == 0.5
    assert parts.compute_total(found) == pytest.approx(1 / math.log2(3) + 1.0)
    for name, message in (
        ("nan", "returned nan"),
        ("text", "raised ValueError"),
        ("short", "raised ValueError.*'b c'"),
    ):
        with pytest.raises(ConfigError, match=message) as e:
            RewardTerms(RewardConfig(weights={f"my_reward:{name}": 1.0}), 3)(
                dict(text="b c"), "x", ["b"], {}
            )
        assert f"reward.weights: my_reward:{name}" in str(e.value)
        assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="reward.weights: 'my_reward:none' cannot be loaded"):
        RewardTerms(RewardConfig(weights={"my_reward:none": 1.0}), 3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{ndgc: 1}", "'ndgc' is not one of ndcg, recall"),
        ("{ndcg: 0}", "at least one must be other than 0"),
        ("{}", "at least one"),
        ("[ndcg]", "expected name: value pairs"),
        ("{ndcg: much}", "reward.weights.ndcg: expected float"),
        ("{3: 1}", "reward.weights: expected str"),
        ("{ndcg: .inf}", "must be a finite number"),
    ],
)
def test_weights_that_are_refused(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(f"reward: {{weights: {text}}}")
    with pytest.raises(ConfigError, match=message):
        configs.load_config(str(tmp_path / "c.yaml"), [])


def test_weights_of_the_yaml_take_the_place_of_the_default(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "reward: {weights: {recall: 1, diversity: 1e-1}, metric: recall}"
    )
    cfg = configs.load_config(str(tmp_path / "c.yaml"), ["reward.weights.recall=2"])
    assert cfg.reward.weights == {"recall": 2.0, "diversity": 0.1}
    (tmp_path / "d.yaml").write_text(configs.dump_config(cfg))
    assert configs.load_config(str(tmp_path / "d.yaml"), []) == cfg


def items_of(tmp_path, rows, **weights):
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_item_table(
        Config(
            data=DataConfig(corpus=str(tmp_path / "corpus.jsonl")),
            reward=RewardConfig(weights=weights),
        )
    )


def test_items_are_read_where_a_weight_asks_for_them(tmp_path):
    rows = [
        dict(id="a", title="t", genres=["x", "y"], category="c", popularity=3),
        dict(id="b", title="t", category="c"),
        dict(id="c", title="t", genres=[]),
    ]
    assert (
        items_of(tmp_path, rows, ndcg=1.0)
        == ItemTable()
        == read_item_table(Config(data=DataConfig(corpus="nowhere")))
    )
    assert items_of(tmp_path, rows, diversity=0.0).kinds == dict(
        a=frozenset("xy"), b=frozenset("c"), c=frozenset()
    )
    found = items_of(tmp_path, rows, category=0.2, novelty=0.1)
    assert (found.category, found.popularity, found.kinds) == (dict(a="c", b="c"), dict(a=3), {})
    for part, message in (
        ("category", "no document has category"),
        ("diversity", "no document has genres or category"),
        ("novelty", "no document has popularity"),
    ):
        with pytest.raises(DataError, match=message):
            items_of(tmp_path, [dict(id="a", title="t")], **{part: 1.0})
    for bad, message in (
        (dict(popularity=-1), "'popularity' is -1; want a finite number"),
        (dict(genres="x"), "'genres' is x; want a list of strings"),
        (dict(category=3), "'category' is a int"),
    ):
        with pytest.raises(DataError, match=f"corpus.jsonl:1: {message}"):
            items_of(
                tmp_path,
                [dict(id="a", title="t") | bad],
                **{
                    next(iter(bad))
                    .replace("popularity", "novelty")
                    .replace("genres", "diversity"): 1.0
                },
            )


# --- the paired test ------------------------------------------------------------------------------


def test_the_sign_flip_test_is_scipys():
    rng = np.random.default_rng(0)
    for n, shift in ((9, 0.3), (12, 0.0), (30, 0.4)):
        d = np.round(rng.normal(shift, 1, n), 1)  # with ties and zeros
        theirs = permutation_test(
            (d, np.zeros(n)),
            lambda x, y: np.mean(x - y),
            permutation_type="samples",
            n_resamples=50_000,
            rng=1,
        ).pvalue
        assert compute_sign_flip_p(d) == pytest.approx(theirs, abs=0.015), (n, shift)


def test_the_sign_flip_tests_edges():
    assert compute_sign_flip_p(np.zeros(7)) == 1.0
    assert compute_sign_flip_p(np.array([0.5])) == 1.0
    assert compute_sign_flip_p(np.full(40, 0.1)) == 1 / 10_001
    assert compute_sign_flip_p(np.full(3, 0.1)) == pytest.approx(0.25, abs=0.02)
    values = np.random.default_rng(1).normal(0, 1, 200_000)
    assert compute_sign_flip_p(values, samples=20) == compute_sign_flip_p(values, samples=20)
    with pytest.raises(ValueError, match="sign_flip_p needs"):
        compute_sign_flip_p(np.array([]))


# --- recr1 reward ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_yaml(
        tmp_path_factory.mktemp("world"),
        **{"model.path": "nowhere", "reward.weights": {"ndcg": 1.0, "recall": 0.5}},
    )


def answer(text):
    return f"so</think><answer>{json.dumps({'query': text})}</answer>"


def command(world, rows, tmp_path, capsys, *more):
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    code = run_guarded(
        cli.main,
        ["reward", "--config", world, "--completions", str(tmp_path / "f.jsonl"), "--json", *more],
    )
    out, err = capsys.readouterr()
    return (json.loads(out.splitlines()[-1]), out) if code == 0 else err


def test_stored_completions_are_scored_part_by_part(world, tmp_path, capsys):
    data = configs.load_config(world, []).data
    target = {
        line.split("\t")[0]: int(line.split("\t")[1][1:])
        for line in Path(data.test_qrels).read_text().splitlines()
    }
    thing = THINGS[target["test0"] % len(THINGS)]
    rows = [
        dict(id="test0", text=answer(thing), more=1),
        dict(id="test0", text="nothing"),
        dict(id="test1", text=""),
        dict(id="train0", text=answer("xyzzy")),
    ]
    result, out = command(world, rows, tmp_path, capsys, "reward.k_train=40")
    first, second, third, fourth = result["rows"]
    assert first["recall"] == 1.0
    assert 0 < first["ndcg"] < 1
    assert first["total"] == pytest.approx(first["ndcg"] + 0.5)
    assert first["answer"] == thing
    assert (second["total"], second["error"], third["error"], fourth["total"], fourth["error"]) == (
        -1.0,
        "no_think_end",
        "no_think_end",
        0.0,
        None,
    )
    assert (result["n"], result["queries"], result["k"], result["format_errors"]) == (
        4,
        3,
        40,
        {"no_think_end": 2},
    )
    assert result["metrics"]["total"] == pytest.approx(((first["total"] - 1) / 2 - 1 + 0) / 3)
    assert set(result["metrics"]) == {"total", "ndcg", "recall", "mrr", "hit"}
    assert "unparsable: 2" in out
    assert "no_think_end" in out
    alone, _ = command(world, rows[:1], tmp_path, capsys, "reward.k_train=1")
    assert alone["rows"][0]["recall"] <= 1
    assert alone["k"] == 1


def test_a_prompt_that_closes_the_thought(world, tmp_path, capsys):
    rows = [dict(id="test0", text='<answer>{"query": "lamp"}</answer>')]
    assert command(world, rows, tmp_path, capsys)[0]["format_errors"] == {"no_think_end": 1}
    assert (
        command(world, rows, tmp_path, capsys, "prompt.assistant=<think></think>")[0][
            "format_errors"
        ]
        == {}
    )


def test_bad_completions_are_one_line(world, tmp_path, capsys):
    for rows, message in (
        ([dict(id="ghost", text="x")], "query id 'ghost' is in none"),
        ([dict(id="test0")], "f.jsonl:1: no key 'text'"),
        ([], "the file is empty"),
    ):
        err = command(world, rows, tmp_path, capsys)
        assert message in err
        assert err.startswith("recr1: ")
        assert err.count("\n") == 1
    assert "unknown key reward.k" in command(
        world, [dict(id="test0", text="x")], tmp_path, capsys, "reward.k=3"
    )


def test_a_runs_evaluation_scores_the_same(tmp_path, capsys):
    """`recr1 reward` on eval_after.jsonl, at the evaluation's depth: every part of every row."""
    from recr1 import train

    config = write_yaml(tmp_path, **{"train.steps": 1, "train.eval_every": 0})
    assert run_guarded(train.main, [config]) == 0
    rows = jsonl(tmp_path / "run/eval_after.jsonl")
    result, _ = command(config, rows, tmp_path, capsys, "reward.k_train=10")
    for row, scored in zip(rows, result["rows"], strict=True):
        assert {name: row[name] for name in ("id", "ndcg", "recall", "mrr", "hit", "error")} == {
            name: scored[name] for name in ("id", "ndcg", "recall", "mrr", "hit", "error")
        }
        assert row["rewrite"] == scored["answer"]
