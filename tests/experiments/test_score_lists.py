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


def write_lists(path, rows) -> str:
    text = rows if isinstance(rows, str) else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def score(path, capsys, *options) -> dict:
    """Score the file; return what the last line of the output holds."""
    assert run_guarded(score_lists.main, [path, "--json", *options]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    return json.loads(last)


def refuse(path, capsys, *options) -> str:
    """Fail on the file; return the one line that says why."""
    assert run_guarded(score_lists.main, [path, *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("recr1: ")
    assert err.count("\n") == 1
    return err


RELEASED_METRICS = ["ndcg@10", "ndcg@20", "ndcg@100", "recall@100"]
# key, id, targets, {rank: target}, the stored figures of RELEASED_METRICS
RELEASED = [
    (
        "0_oculus",
        "0",
        ["a", "a", "a", "f", "d", "b", "e", "gone", "g", "c"],
        {4: "a", 6: "b", 8: "c", 11: "e", 12: "d", 21: "f", 25: "g"},
        [0.24261785528500343, 0.36348809361879214, 0.4596659676717802, 0.875],
    ),
    (
        "1_switch",
        "1",
        ["b", "gone", "gone", "lost", "a"],
        {10: "a", 56: "b"},
        [0.09803928583135704, 0.09803928583135704, 0.15618545427444283, 0.5],
    ),
    (
        "2_tablet",
        "2",
        ["d", "gone", "b", "c", "a"],
        {2: "a", 3: "b", 9: "c", 33: "d"},
        [0.4856637624942473, 0.4856637624942473, 0.5523296460312485, 0.8],
    ),
]


def make_released() -> dict:
    """Make the first three queries of upstream's Video_Games file
    (metric_res/query_metric_results-rec-r1-Video_Games.json): at which ranks the targets stand, how
    often each is named, and the figures stored there; ids of our own.
    """
    rows = {}
    for key, number, target, ranks, figures in RELEASED:
        retrieved = [ranks.get(rank, f"other{rank}") for rank in range(1, 101)]
        row = dict(id=number, retrieved=str(retrieved), target=str(target))
        row.update(zip(RELEASED_METRICS, figures))
        rows[key] = row
    return rows


def compute_discount(rank: int) -> float:
    return 1 / math.log2(rank + 1)


def test_upstreams_stored_figures_come_out(tmp_path, capsys):
    """Three rows that upstream's code scored: under its convention nothing differs; under ours the
    NDCG of the two that repeat a target does.
    """
    rows = make_released()

    result = score(write_lists(tmp_path / "lists.json", rows), capsys)

    assert result["n"] == 3
    assert result["repeated_target"] == 2
    assert result["repeated_retrieved"] == 0
    assert result["longest"] == 100
    for name in RELEASED_METRICS:
        entry = result["metrics"][name]
        stored = entry["stored"]
        mean = sum(row[name] for row in rows.values()) / 3
        num_ours_differ = 2 if name.startswith("ndcg") else 0
        assert entry["upstream"] == pytest.approx(mean, abs=1e-12)
        assert stored["mean"] == pytest.approx(mean, abs=1e-12)
        assert stored["differ_from_upstream"]["n"] == 0
        assert stored["differ_from_upstream"]["key"] is None
        assert stored["differ_from_ours"]["n"] == num_ours_differ

    # row 0 by hand, ours: eight distinct targets, three in the first ten
    ideal = sum(compute_discount(rank) for rank in range(1, 9))
    gain = sum(compute_discount(rank) for rank in (4, 6, 8))
    ours = gain / ideal
    one = write_lists(tmp_path / "one.json", {"0_oculus": rows["0_oculus"]})
    alone = score(one, capsys)["metrics"]["ndcg@10"]
    assert alone["ours"] == pytest.approx(ours, abs=1e-12)
    assert alone["difference"] == pytest.approx(ours - 0.24261785528500343, abs=1e-12)


def make_released_beauty() -> dict:
    """Make two queries in the form of upstream's Amazon Beauty files: `target` is one bare id,
    `retrieved` a string that holds a Python list. With one target the metrics are closed forms: it
    stands at rank 3 in the first, at rank 14 in the second.
    """
    rows = {}
    for number, target, rank in (("0", "B0BKKMZCJ7", 3), ("1", "1455516910", 14)):
        retrieved = [f"B{place:09}" for place in range(1, 51)]
        retrieved[rank - 1] = target
        row = dict(id=number, retrieved=str(retrieved), target=target)
        gain = compute_discount(rank)
        row["ndcg@10"] = gain if rank <= 10 else 0.0
        row["ndcg@50"] = gain
        row["recall@10"] = float(rank <= 10)
        row["recall@50"] = 1.0
        rows[f"{number}_query"] = row
    return rows


def test_one_bare_id_is_a_target(tmp_path, capsys):
    result = score(write_lists(tmp_path / "lists.json", make_released_beauty()), capsys)

    assert result["n"] == 2
    assert result["not_compared"] == []
    mean = (1 / math.log2(4) + 1 / math.log2(15)) / 2
    assert result["metrics"]["ndcg@50"]["ours"] == pytest.approx(mean, abs=1e-12)
    for name in ("ndcg@10", "ndcg@50", "recall@10", "recall@50"):
        stored = result["metrics"][name]["stored"]
        assert stored["n"] == 2
        assert stored["differ_from_upstream"]["n"] == 0
        assert stored["differ_from_ours"]["n"] == 0


def test_a_bare_id_scores_as_a_list_of_it(tmp_path, capsys):
    """An id of digits alone is an id too, no Python number."""
    bare = make_released_beauty()
    listed = {}
    for key, row in bare.items():
        listed[key] = row | dict(target=[row["target"]])

    one = score(write_lists(tmp_path / "bare.json", bare), capsys)
    other = score(write_lists(tmp_path / "listed.json", listed), capsys)

    assert one == other


# trec_eval's name, ours
TREC_METRICS = {
    "ndcg_cut_10": "ndcg@10",
    "ndcg_cut_100": "ndcg@100",
    "recall_10": "recall@10",
    "recall_100": "recall@100",
}


def draw_lists(rng, num_repeats: int, kind) -> tuple[dict, dict, dict]:
    """Draw 60 queries: the rows of a file, and the same as trec_eval's qrels and run."""
    docs = [f"B{i:03}" for i in range(200)]
    rows = {}
    qrels = {}
    run = {}
    for i in range(60):
        key = f"q{i}"
        target = rng.sample(docs, rng.randint(1, 30))
        retrieved = rng.sample(docs, rng.randint(0, 120))
        qrels[key] = dict.fromkeys(target, 1)
        run[key] = {doc: float(len(retrieved) - rank) for rank, doc in enumerate(retrieved)}
        named = target + rng.choices(target, k=num_repeats)
        rows[key] = dict(retrieved=kind(retrieved), target=kind(named))
    return rows, qrels, run


@pytest.mark.parametrize("as_text", [True, False], ids=["strings", "lists"])
def test_equals_trec_eval(as_text, tmp_path, capsys):
    """Ours is trec_eval's figure whatever repeats among the targets; upstream's too, where nothing
    does.
    """
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = random.Random(1)
    kind = str if as_text else list

    for num_repeats in (0, 3):
        rows, qrels, run = draw_lists(rng, num_repeats, kind)
        true = pytrec_eval.RelevanceEvaluator(qrels, set(TREC_METRICS)).evaluate(run)
        result = score(write_lists(tmp_path / "lists.json", rows), capsys)["metrics"]

        for theirs, name in TREC_METRICS.items():
            # trec_eval leaves out what found nothing
            mean = sum(of_query[theirs] for of_query in true.values()) / len(rows)
            expected = pytest.approx(mean, abs=1e-6)
            upstream_agrees = num_repeats == 0 or name.startswith("recall")
            assert result[name]["ours"] == expected, name
            assert (result[name]["upstream"] == expected) == upstream_agrees, name


def test_a_document_retrieved_twice(tmp_path, capsys):
    """Upstream pays for it each time, ours once: worked by hand."""
    row = dict(retrieved=["a", "a", "x"], target=["a", "b"])
    path = write_lists(tmp_path / "lists.json", {"0_q": row})

    entry = score(path, capsys, "--metrics", "ndcg@3")["metrics"]["ndcg@3"]

    ideal = 1 + 1 / math.log2(3)
    assert entry["ours"] == pytest.approx(1 / ideal)
    assert entry["upstream"] == pytest.approx(1.0)


def test_stored_figures_are_compared_not_trusted(tmp_path, capsys):
    rows = make_released()
    # a wrong one, one that is missing, one that is no number, one that nobody computes here
    rows["1_switch"]["ndcg@10"] = 0.9
    del rows["2_tablet"]["ndcg@20"]
    rows["0_oculus"]["recall@100"] = float("nan")
    rows["0_oculus"]["mrr@10"] = 0.25
    path = write_lists(tmp_path / "lists.json", rows)

    assert run_guarded(score_lists.main, [path, "--json"]) == 0

    *lines, last = capsys.readouterr().out.splitlines()
    metrics = json.loads(last)["metrics"]
    wrong = metrics["ndcg@10"]["stored"]["differ_from_upstream"]
    assert wrong["n"] == 1
    assert wrong["key"] == "1_switch"
    assert wrong["largest"] == pytest.approx(0.9 - 0.09803928583135704)
    good = score(write_lists(tmp_path / "good.json", make_released()), capsys)["metrics"]
    assert metrics["ndcg@10"]["upstream"] == good["ndcg@10"]["upstream"]
    assert metrics["ndcg@20"]["stored"]["n"] == 2
    assert metrics["recall@100"]["stored"]["differ_from_ours"]["n"] == 1
    text = "\n".join(lines)
    assert "'1_switch'" in text
    assert "2 of 3 queries" in text
    assert "not a number" in text
    assert "not compared: mrr@10" in text


def find_line(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_an_interval_is_over_queries_and_k_beyond_the_lists_is_said(tmp_path, capsys):
    hit = dict(retrieved=["a"], target=["a"])
    miss = dict(retrieved=["x"], target=["b"])
    path = write_lists(tmp_path / "lists.json", {"0_a": hit, "1_b": miss})

    assert run_guarded(score_lists.main, [path, "--metrics", "recall@1000,ndcg@1"]) == 0

    out = capsys.readouterr().out
    assert "no list is that long" in find_line(out, "recall@1000")
    assert "no list is that long" not in find_line(out, "ndcg@1 ")
    entry = score(path, capsys)["metrics"]["recall@10"]
    assert entry["ours"] == 0.5
    assert entry["ci95"] == [0.0, 1.0]


def test_gzip_and_the_command_itself(tmp_path):
    data = json.dumps(make_released()).encode()
    (tmp_path / "lists.json.gz").write_bytes(gzip.compress(data))
    command = [sys.executable, SCRIPT, "lists.json.gz", "--json"]

    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert json.loads(last)["n"] == 3


GOOD = dict(retrieved=["a"], target=["a"])
# what the row 7_shoes is, beside a good one; what is said of it
BAD_ROWS = [
    (GOOD | dict(target="['a'"), ["'target'", "no Python list"]),
    (
        GOOD | dict(target="B000000001 B000000002"),
        ["'target'", "no Python list and is no id"],
    ),
    (GOOD | dict(retrieved="B000000001"), ["'retrieved'", "no Python list:"]),
    (GOOD | dict(target="__import__('os').getcwd()"), ["no Python list"]),
    (GOOD | dict(retrieved="[" * 5000), ["'retrieved'", "no Python list"]),
    (GOOD | dict(retrieved="('a',)"), ["'retrieved'", "tuple"]),
    (GOOD | dict(retrieved=None), ["'retrieved'", "NoneType"]),
    (GOOD | dict(retrieved=["a", 7]), ["'retrieved'", "7, a int"]),
    (GOOD | dict(target=[]), ["'target' is empty"]),
    (dict(retrieved=["a"]), ["no 'target'"]),
    (["a"], ["list"]),
    (GOOD | {"ndcg@10": "0.5"}, ["'ndcg@10'", "str"]),
    (GOOD | {"ndcg@10": 10**400}, ["'ndcg@10'", "int"]),
]
GIVEN_TWICE = """{"7_shoes": {"retrieved": [], "target": ["a"]},
                  "7_shoes": {"retrieved": [], "target": ["b"]}}"""
BAD_FILES = [
    (GIVEN_TWICE, ["'7_shoes'", "twice"]),
    ('{"7_shoes": {"retrieved": []', ["not JSON"]),
    ("[" * 100_000, ["not JSON"]),
    ({}, ["empty object"]),
    ([], ["list"]),
    ("", ["not JSON"]),
]


@pytest.mark.parametrize("row, parts", BAD_ROWS)
def test_a_bad_row_is_one_clear_line(row, parts, tmp_path, capsys):
    path = write_lists(tmp_path / "lists.json", {"0_good": GOOD, "7_shoes": row})

    err = refuse(path, capsys)

    assert "lists.json" in err
    assert "'7_shoes'" in err
    for part in parts:
        assert part in err


@pytest.mark.parametrize("rows, parts", BAD_FILES)
def test_a_bad_file_is_one_clear_line(rows, parts, tmp_path, capsys):
    path = write_lists(tmp_path / "lists.json", rows)

    err = refuse(path, capsys)

    assert "lists.json" in err
    for part in parts:
        assert part in err


def test_files_that_cannot_be_read(tmp_path, capsys):
    assert "no such file" in refuse(str(tmp_path / "none.json"), capsys)
    assert "cannot be read" in refuse(str(tmp_path), capsys)

    data = json.dumps(make_released()).encode()
    torn = tmp_path / "cut.json.gz"
    torn.write_bytes(gzip.compress(data)[:-9])
    assert "torn" in refuse(str(torn), capsys)

    latin = tmp_path / "latin.json"
    latin.write_bytes('{"é": 1}'.encode("latin-1"))
    assert "UTF-8" in refuse(str(latin), capsys)

    with pytest.raises(SystemExit):
        score_lists.main([str(tmp_path), "--metrics", "mrr@10"])
    assert "'mrr@10' is no metric here" in capsys.readouterr().err
