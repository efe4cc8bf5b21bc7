"""experiments/analysis/score_lists.py: Rec-R1's released list format under both conventions,
against trec_eval and against figures that upstream stored.
"""

import gzip
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from recr1.training.launch import run_guarded

SCRIPT = Path(__file__).resolve().parents[2] / "experiments/analysis/score_lists.py"
sys.path.insert(0, str(SCRIPT.parent))
import score_lists  # noqa: E402


def write(path, rows) -> str:
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return str(path)


def scored(path, capsys, *options) -> dict:
    assert run_guarded(score_lists.main, [path, "--json", *options]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(path, capsys, *options) -> str:
    assert run_guarded(score_lists.main, [path, *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("recr1: ")
    assert err.count("\n") == 1
    return err


def released() -> dict:
    """The first three queries of upstream's Video_Games file
    (metric_res/query_metric_results-rec-r1-Video_Games.json): at which ranks the targets stand, how
    often each is named, and the figures stored there; ids of our own.
    """

    def row(number, target, ranks, ndcg10, ndcg20, ndcg100, recall):
        retrieved = [ranks.get(rank, f"other{rank}") for rank in range(1, 101)]
        return dict(id=number, retrieved=str(retrieved), target=str(target.split())) | {
            "ndcg@10": ndcg10,
            "ndcg@20": ndcg20,
            "ndcg@100": ndcg100,
            "recall@100": recall,
        }

    return {
        "0_oculus": row(
            "0",
            "a a a f d b e gone g c",
            {4: "a", 6: "b", 8: "c", 11: "e", 12: "d", 21: "f", 25: "g"},
            0.24261785528500343,
            0.36348809361879214,
            0.4596659676717802,
            0.875,
        ),
        "1_switch": row(
            "1",
            "b gone gone lost a",
            {10: "a", 56: "b"},
            0.09803928583135704,
            0.09803928583135704,
            0.15618545427444283,
            0.5,
        ),
        "2_tablet": row(
            "2",
            "d gone b c a",
            {2: "a", 3: "b", 9: "c", 33: "d"},
            0.4856637624942473,
            0.4856637624942473,
            0.5523296460312485,
            0.8,
        ),
    }


def test_upstreams_stored_figures_come_out(tmp_path, capsys):
    """Three rows that upstream's code scored: under its convention nothing differs; under ours the
    NDCG of the two that repeat a target does.
    """
    result = scored(write(tmp_path / "lists.json", released()), capsys)
    assert (
        result["n"],
        result["repeated_target"],
        result["repeated_retrieved"],
        result["longest"],
    ) == (3, 2, 0, 100)
    for name in ("ndcg@10", "ndcg@20", "ndcg@100", "recall@100"):
        entry = result["metrics"][name]
        mean = sum(row[name] for row in released().values()) / 3
        assert entry["upstream"] == pytest.approx(mean, abs=1e-12)
        assert entry["stored"]["mean"] == pytest.approx(mean, abs=1e-12)
        assert entry["stored"]["differ_from_upstream"]["n"] == 0
        assert entry["stored"]["differ_from_upstream"]["key"] is None
        assert entry["stored"]["differ_from_ours"]["n"] == (2 if name.startswith("ndcg") else 0)
    # row 0 by hand, ours: eight distinct targets, three in the first ten
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, 9))
    ours = sum(1 / math.log2(rank + 1) for rank in (4, 6, 8)) / ideal
    alone = scored(write(tmp_path / "one.json", dict(list(released().items())[:1])), capsys)[
        "metrics"
    ]["ndcg@10"]
    assert alone["ours"] == pytest.approx(ours, abs=1e-12)
    assert alone["difference"] == pytest.approx(ours - 0.24261785528500343, abs=1e-12)


@pytest.mark.parametrize("as_text", [True, False], ids=["strings", "lists"])
def test_equals_trec_eval(as_text, tmp_path, capsys):
    """Ours is trec_eval's figure whatever repeats among the targets; upstream's too, where nothing
    does.
    """
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = random.Random(1)
    docs = [f"B{i:03}" for i in range(200)]
    kind = str if as_text else list
    for repeats in (False, True):
        rows = {}
        qrels = {}
        run = {}
        for i in range(60):
            target = rng.sample(docs, rng.randint(1, 30))
            retrieved = rng.sample(docs, rng.randint(0, 120))
            qrels[f"q{i}"] = dict.fromkeys(target, 1)
            run[f"q{i}"] = {doc: float(len(retrieved) - rank) for rank, doc in enumerate(retrieved)}
            rows[f"q{i}"] = dict(
                retrieved=kind(retrieved),
                target=kind(target + rng.choices(target, k=3 if repeats else 0)),
            )
        names = {
            "ndcg_cut_10": "ndcg@10",
            "ndcg_cut_100": "ndcg@100",
            "recall_10": "recall@10",
            "recall_100": "recall@100",
        }
        true = pytrec_eval.RelevanceEvaluator(qrels, set(names)).evaluate(run)
        result = scored(write(tmp_path / "lists.json", rows), capsys)["metrics"]
        for theirs, name in names.items():
            # trec_eval leaves out what found nothing
            mean = sum(true[q][theirs] if q in true else 0.0 for q in rows) / len(rows)
            assert result[name]["ours"] == pytest.approx(mean, abs=1e-6), name
            assert (result[name]["upstream"] == pytest.approx(mean, abs=1e-6)) == (
                not repeats or name.startswith("recall")
            ), name


def test_a_document_retrieved_twice(tmp_path, capsys):
    """Upstream pays for it each time, ours once: worked by hand."""
    path = write(
        tmp_path / "lists.json", {"0_q": dict(retrieved=["a", "a", "x"], target=["a", "b"])}
    )
    entry = scored(path, capsys, "--metrics", "ndcg@3")["metrics"]["ndcg@3"]
    ideal = 1 + 1 / math.log2(3)
    assert entry["ours"] == pytest.approx(1 / ideal)
    assert entry["upstream"] == pytest.approx(1.0)


def test_stored_figures_are_compared_not_trusted(tmp_path, capsys):
    rows = released()
    # a wrong one, one that is missing, one that is no number, one that nobody computes here
    rows["1_switch"]["ndcg@10"] = 0.9
    del rows["2_tablet"]["ndcg@20"]
    rows["0_oculus"]["recall@100"] = float("nan")
    rows["0_oculus"]["mrr@10"] = 0.25
    path = write(tmp_path / "lists.json", rows)
    assert run_guarded(score_lists.main, [path, "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    metrics = json.loads(last)["metrics"]
    wrong = metrics["ndcg@10"]["stored"]["differ_from_upstream"]
    assert (wrong["n"], wrong["key"]) == (1, "1_switch")
    assert wrong["largest"] == pytest.approx(0.9 - 0.09803928583135704)
    assert (
        metrics["ndcg@10"]["upstream"]
        == scored(write(tmp_path / "good.json", released()), capsys)["metrics"]["ndcg@10"][
            "upstream"
        ]
    )
    assert metrics["ndcg@20"]["stored"]["n"] == 2
    assert metrics["recall@100"]["stored"]["differ_from_ours"]["n"] == 1
    text = "\n".join(text)
    assert "'1_switch'" in text
    assert "2 of 3 queries" in text
    assert "not a number" in text
    assert "not compared: mrr@10" in text


def test_an_interval_is_over_queries_and_k_beyond_the_lists_is_said(tmp_path, capsys):
    path = write(
        tmp_path / "lists.json",
        {"0_a": dict(retrieved=["a"], target=["a"]), "1_b": dict(retrieved=["x"], target=["b"])},
    )
    assert run_guarded(score_lists.main, [path, "--metrics", "recall@1000,ndcg@1"]) == 0
    out = capsys.readouterr().out
    assert "no list is that long" in next(
        line for line in out.splitlines() if line.startswith("recall@1000")
    )
    assert "no list is that long" not in next(
        line for line in out.splitlines() if line.startswith("ndcg@1 ")
    )
    entry = scored(path, capsys)["metrics"]["recall@10"]
    assert entry["ours"] == 0.5
    assert entry["ci95"] == [0.0, 1.0]


def test_gzip_and_the_command_itself(tmp_path):
    (tmp_path / "lists.json.gz").write_bytes(gzip.compress(json.dumps(released()).encode()))
    done = subprocess.run(
        [sys.executable, SCRIPT, "lists.json.gz", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["n"] == 3, done.stderr


GOOD = dict(retrieved=["a"], target=["a"])


@pytest.mark.parametrize(
    "rows, says",
    [
        ({"7_shoes": GOOD | dict(target="['a'")}, ("'7_shoes'", "'target'", "no Python list")),
        (
            {"7_shoes": GOOD | dict(target="B000000001")},
            ("'7_shoes'", "'target'", "no Python list"),
        ),
        (
            {"7_shoes": GOOD | dict(target="__import__('os').getcwd()")},
            ("'7_shoes'", "no Python list"),
        ),
        (
            {"7_shoes": GOOD | dict(retrieved="[" * 5000)},
            ("'7_shoes'", "'retrieved'", "no Python list"),
        ),
        ({"7_shoes": GOOD | dict(retrieved="('a',)")}, ("'7_shoes'", "'retrieved'", "tuple")),
        ({"7_shoes": GOOD | dict(retrieved=None)}, ("'7_shoes'", "'retrieved'", "NoneType")),
        ({"7_shoes": GOOD | dict(retrieved=["a", 7])}, ("'7_shoes'", "'retrieved'", "7, a int")),
        ({"7_shoes": GOOD | dict(target=[])}, ("'7_shoes'", "'target' is empty")),
        ({"7_shoes": dict(retrieved=["a"])}, ("'7_shoes'", "no 'target'")),
        ({"7_shoes": ["a"]}, ("'7_shoes'", "list")),
        ({"7_shoes": GOOD | {"ndcg@10": "0.5"}}, ("'7_shoes'", "'ndcg@10'", "str")),
        ({"7_shoes": GOOD | {"ndcg@10": 10**400}}, ("'7_shoes'", "'ndcg@10'", "int")),
        (
            '{"7_shoes": {"retrieved": [], "target": ["a"]}, '
            '"7_shoes": {"retrieved": [], "target": ["b"]}}',
            ("'7_shoes'", "twice"),
        ),
        ('{"7_shoes": {"retrieved": []', ("not JSON",)),
        ("[" * 100_000, ("not JSON",)),
        ({}, ("empty object",)),
        ([], ("list",)),
        ("", ("not JSON",)),
    ],
)
def test_a_bad_file_is_one_clear_line(rows, says, tmp_path, capsys):
    if isinstance(rows, dict) and rows:
        rows = {"0_good": GOOD} | rows
    err = refused(write(tmp_path / "lists.json", rows), capsys)
    assert "lists.json" in err and all(part in err for part in says), err


def test_files_that_cannot_be_read(tmp_path, capsys):
    assert "no such file" in refused(str(tmp_path / "none.json"), capsys)
    assert "cannot be read" in refused(str(tmp_path), capsys)
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(json.dumps(released()).encode())[:-9])
    assert "torn" in refused(str(tmp_path / "cut.json.gz"), capsys)
    (tmp_path / "latin.json").write_bytes('{"é": 1}'.encode("latin-1"))
    assert "UTF-8" in refused(str(tmp_path / "latin.json"), capsys)
    with pytest.raises(SystemExit):
        score_lists.main([str(tmp_path), "--metrics", "mrr@10"])
    assert "'mrr@10' is no metric here" in capsys.readouterr().err
