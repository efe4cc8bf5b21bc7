"""The interface that any function fits behind: what it may return, what ends a run in one line, and
rank_bm25 as its slow example.
"""

import json
import shlex
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_world import jsonl, refused, write_yaml
from rank_bm25 import BM25Okapi

from recr1 import cli, train
from recr1.config.loader import check_config
from recr1.config.schema import Config, ConfigError, RetrieverConfig
from recr1.retrieval.bm25.analyzer import analyze
from recr1.retrieval.bm25.searcher import BM25Searcher
from recr1.retrieval.factory import build_retriever
from recr1.retrieval.interface import RetrieverError
from recr1.retrieval.user_function import UserRetriever
from recr1.training.launch import run_guarded
from recr1.utils.interrupts import Stopped

IDS = ["a", "b", "c", "d"]
TEXTS = ["red lamp", "red chair", "blue lamp lamp", "table"]


def of(search, timeout=0.0) -> UserRetriever:
    return UserRetriever("mine:f", lambda ids, texts: search, IDS, TEXTS, timeout)


def returning(rows, scores) -> UserRetriever:
    return of(lambda queries, k: (rows, scores))


def test_lists_arrays_and_tensors_fit_and_short_rankings_are_filled():
    for kind in (list, np.array, torch.tensor):
        for rows, scores in (
            ([[2, 0], [1, -1]], [[2.0, 1.0], [0.5, 0.0]]),
            ([[2, 0, -1, -1], [1, -1, -1, -1]], [[2.0, 1.0, 9, 9], [0.5, 0, 0, 0]]),
        ):
            found, values = returning(kind(rows), kind(scores)).search(["x", "y"], 4)
            assert found.dtype == np.int64
            assert values.dtype == np.float32
            assert found.tolist() == [[2, 0, -1, -1], [1, -1, -1, -1]]
            assert values.tolist() == [
                [2, 1, -np.inf, -np.inf],
                [0.5] + 3 * [-np.inf],
            ]


def test_no_query_no_text_and_no_hit():
    asked = []
    f = of(
        lambda queries, k: (
            asked.append(queries) or (np.full((len(queries), k), -1), np.zeros((len(queries), k)))
        )
    )
    assert f.search([], 3)[0].shape == (0, 3)
    assert (f.search(["", "  "], 3)[0] == -1).all()
    assert not asked
    assert (f.search(["", "x"], 3)[0] == -1).all()
    assert asked == [["x"]]
    assert returning([[]], [[]]).search(["x"], 2)[0].tolist() == [[-1, -1]]
    with pytest.raises(ValueError, match="k: must be at least 1"):
        f.search(["x"], 0)


@pytest.mark.parametrize(
    "rows, scores, why",
    [
        ([[0, 1]], [[1.0]], r"rows \(1, 2\) and scores \(1, 1\)"),
        ([[0], [1]], [[1.0], [1.0]], r"must be two of \(1, up to 3\)"),
        ([[0, 1, 2, 3]], [[4.0, 3, 2, 1]], r"\(1, up to 3\)"),
        ([0, 1], [2.0, 1], r"rows \(2,\)"),
        ([[0.0, 1.0]], [[2.0, 1.0]], "whole numbers"),
        ([["a", "b"]], [[2.0, 1.0]], "whole numbers"),
        ([[0, 4]], [[2.0, 1.0]], "row 4, must be 0 to 3"),
        ([[0, -2]], [[2.0, 1.0]], "row -2"),
        ([[-1, 0]], [[2.0, 1.0]], "a hit behind a row -1"),
        ([[0, 1]], [[2.0, float("nan")]], "score nan"),
        ([[0, 1]], [[float("inf"), 1.0]], "score inf"),
        ([[0, 1]], [[1.0, 2.0]], "scores that rise"),
        ([[1, 1]], [[2.0, 1.0]], "a row twice"),
        ([[0, 1], [2]], [[2.0, 1.0], [1.0]], "must return two arrays"),
        ([[0]], [["good"]], "must return two arrays"),
    ],
)
def test_a_wrong_result_names_the_call(rows, scores, why):
    with pytest.raises(RetrieverError, match=why) as e:
        returning(rows, scores).search(["red lamp"], 3)
    assert str(e.value).startswith(
        "retriever mine:f: call 1 (1 queries, k 3, the first 'red lamp')"
    )
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("result", [None, 7, ([[0]],), ([[0]], [[1.0]], 3)])
def test_no_pair_is_a_wrong_result(result):
    with pytest.raises(RetrieverError, match="must return two arrays"):
        of(lambda queries, k: result).search(["x"], 3)


@pytest.mark.parametrize("timeout", [0.0, 30.0])
@pytest.mark.parametrize(
    "error, said",
    [
        (ConnectionError("refused\nby host"), "ConnectionError: refused by host"),
        (TimeoutError("server"), "raised TimeoutError: server"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
def test_an_exception_is_named_and_the_call_is_not_repeated(error, said, timeout):
    calls = []

    def search(queries, k):
        calls.append(k)
        raise error

    f = of(search, timeout)
    for n in (1, 2):
        with pytest.raises(RetrieverError, match=f"call {n} .*{said}") as e:
            f.search(["x"], 3)
        assert "\n" not in str(e.value)
        assert len(calls) == n


def test_a_call_that_takes_too_long_is_left_alone():
    free = threading.Event()
    f = of(lambda queries, k: free.wait(60) and ([[0]], [[1.0]]), 0.2)
    started = time.perf_counter()
    with pytest.raises(
        RetrieverError, match="call 1 .* took longer than retriever.timeout = 0.2 s"
    ):
        f.search(["x"], 1)
    assert time.perf_counter() - started < 30
    free.set()
    assert of(lambda queries, k: ([[0]], [[1.0]]), 30.0).search(["x"], 1)[0].tolist() == [[0]]


def test_asked_to_stop_inside_it_is_no_fault_of_the_function():
    def stop(*_):
        raise Stopped("now")

    with pytest.raises(Stopped):
        of(stop).search(["x"], 1)
    with pytest.raises(Stopped):
        UserRetriever("mine:f", stop, IDS, TEXTS)


def test_what_makes_it_may_fail_too():
    with pytest.raises(
        RetrieverError,
        match=r"mine:f: called with the corpus \(4 documents\) it raised ZeroDivisionError",
    ):
        UserRetriever("mine:f", lambda ids, texts: 1 / 0, IDS, TEXTS)
    with pytest.raises(RetrieverError, match="must return a function search.*returned NoneType"):
        UserRetriever("mine:f", lambda ids, texts: None, IDS, TEXTS)
    for kind, why in (
        ("no_such_module:f", "cannot be loaded"),
        ("math:no_such_name", "cannot be loaded"),
        ("math:pi", "is no function, it is float"),
        (":f", "cannot be loaded"),
    ):
        with pytest.raises(ConfigError, match=f"retriever.kind: .*{why}"):
            build_retriever(RetrieverConfig(kind=kind))
    with pytest.raises(ConfigError, match="not one of bm25, dense, rank_bm25"):
        check_config(Config(retriever=RetrieverConfig(kind="lucene")))
    with pytest.raises(ValueError, match="corpus is empty"):
        UserRetriever("mine:f", lambda ids, texts: None, [], [])


def test_rank_bm25_is_the_package_and_our_okapi(tmp_path):
    rng = np.random.default_rng(0)
    words = np.array("red green blue lamp chair table shirt kettle guitar camera".split())
    texts = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(60)]
    ids = [f"d{i:02}" for i in range(60)]
    queries = ["red lamp", "lamp lamp guitars", "xyzzy", "the", ""]
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps(dict(id=id, text=text)) + "\n" for id, text in zip(ids, texts))
    )
    retriever, left_out = build_retriever(RetrieverConfig(kind="rank_bm25", k1=1.5))(
        tmp_path / "corpus.jsonl", "stop", None, print
    )
    rows, scores = retriever.search(queries, 100)
    assert not left_out
    package = BM25Okapi([analyze(text) for text in texts])
    for query, row, score in zip(queries, rows.tolist(), scores):
        true = package.get_scores(analyze(query)) if query else np.zeros(60)
        hits = [int(i) for i in np.argsort(-true, kind="stable") if true[i] > 0]
        assert row == hits + [-1] * (100 - len(hits))
        assert np.allclose(score[: len(hits)], true[hits], rtol=1e-6)
    ours = BM25Searcher.build(ids, texts, k1=1.5, variant="okapi").search(queries, 100)
    assert np.allclose(ours[1], scores, rtol=1e-5)
    assert (rows[0] >= 0).any()
    assert (rows[2] == -1).all()


@pytest.mark.parametrize("kind", ["bm25", "rank_bm25"])
def test_the_config_says_that_a_repeated_term_counts_once(kind, tmp_path):
    texts = ["red lamp", "red red chair", "blue lamp", "green kettle", "green table"]
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps(dict(id=f"d{i}", text=text)) + "\n" for i, text in enumerate(texts))
    )

    def search(query, repeat_terms):
        settings = RetrieverConfig(kind=kind, repeat_terms=repeat_terms)
        build = build_retriever(settings)
        retriever, _ = build(tmp_path / "corpus.jsonl", "stop", None, print)
        return retriever.search([query], 5)

    # by hand: `lamps` is the term of `lamp`
    stuffed_rows, stuffed_scores = search("red lamps red lamp red", "once")
    rows, scores = search("red lamps", "count")
    assert np.array_equal(stuffed_rows, rows)
    assert np.array_equal(stuffed_scores, scores)
    _, counted_scores = search("red lamps red lamp red", "count")
    assert not np.array_equal(counted_scores, scores)


MODULE = """
import numpy as np, os, time

def overlap(doc_ids, texts):
    words = [set(text.split()) for text in texts]
    def search(queries, k):
        scores = np.array([[len(set(q.split()) & w) for w in words] for q in queries], np.float32)
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return rows, np.take_along_axis(scores, rows, 1)
    return search

calls = [0]

def breaks(doc_ids, texts):
    search = overlap(doc_ids, texts)
    def sometimes(queries, k):
        calls[0] += 1
        if os.path.exists("down") and calls[0] > 4:
            time.sleep(60) if open("down").read() == "slow" else 1 / 0
        return search(queries, k)
    return sometimes
"""


def test_a_function_of_a_users_own_trains_and_what_it_breaks_costs_no_step(
    tmp_path, monkeypatch, capsys
):
    """A run whose retriever fails in step 3 has steps 1 and 2 on disk, without a checkpoint being
    due; with the retriever back it goes on.
    """
    (tmp_path / "my_retriever.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = write_yaml(
        tmp_path,
        **{
            "retriever.kind": "my_retriever:overlap",
            "train.steps": 4,
            "train.eval_every": 0,
            "save.every": 100,
        },
    )
    assert run_guarded(train.main, [path, f"run.dir={tmp_path}/straight"]) == 0
    assert "retriever my_retriever:overlap" in capsys.readouterr().out
    assert (Path(tmp_path) / "straight/summary.json").exists()

    failing = [path, "retriever.kind=my_retriever:breaks"]
    # calls 1 and 2: the test split, raw and rewritten; 3 and 4: steps 1 and 2
    Path("down").write_text("raises")
    line = refused(failing, capsys)
    assert "my_retriever:breaks: call 5 (" in line
    assert "ZeroDivisionError" in line
    assert "stopped after step 2; the same command goes on from" in line
    import my_retriever

    my_retriever.calls[0] = 3  # the evaluation before is kept; step 3 is the next call
    Path("down").write_text("slow")
    line = refused([*failing, "retriever.timeout=3"], capsys)  # another limit is no other run
    assert "took longer than retriever.timeout = 3 s" in line
    assert "after step 3" in line
    Path("down").unlink()
    assert run_guarded(train.main, failing) == 0
    assert "goes on after step 3" in capsys.readouterr().out

    def rewards(run):
        return [row["reward"] for row in jsonl(Path(tmp_path) / run / "metrics.jsonl")]

    assert rewards("run") == rewards("straight")
    assert len(rewards("run")) == 4


def test_the_readmes_function_is_a_retriever():
    readme = (Path(__file__).parents[3] / "recr1/retrieval/README.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(readme.split("```python\n# my_retriever.py")[1].split("```")[0].partition("\n")[2], names)
    rows, scores = UserRetriever("overlap", names["overlap"], IDS, TEXTS).search(
        [TEXTS[2], "", TEXTS[0]], len(IDS) + 3
    )
    assert rows[0, 0] == 2
    assert rows[2, 0] == 0
    assert (rows[1] == -1).all()
    assert (rows[:, len(IDS) :] == -1).all()
    assert np.isfinite(scores[0, 0])


def test_the_command_that_a_refused_index_names_makes_it_anew(tmp_path, capsys):
    corpus = tmp_path / "corpus.jsonl"
    where = str(tmp_path / "index")
    corpus.write_text('{"id": "a", "text": "red lamp"}\n')
    flags = ["--corpus", str(corpus), "--index-dir", where, "--k1", "0.9"]
    assert run_guarded(cli.main, ["index", *flags]) == 0
    assert run_guarded(cli.main, ["search", *flags, "lamp"]) == 0
    corpus.write_text('{"id": "b", "text": "blue lamp"}\n{"id": "b", "text": "again"}\n')
    assert run_guarded(cli.main, ["search", *flags, "--on-bad-line", "drop", "lamp"]) == 2
    assert capsys.readouterr().err.endswith(" --on-bad-line drop\n")
    assert run_guarded(cli.main, ["search", *flags, "lamp"]) == 2
    command = capsys.readouterr().err.strip().rpartition("make the index anew: ")[2]
    # a bad line is not passed over
    assert run_guarded(cli.main, shlex.split(command)[1:]) == 2
    assert "corpus.jsonl:2" in capsys.readouterr().err
    assert run_guarded(cli.main, [*shlex.split(command)[1:], "--on-bad-line", "drop"]) == 0
    assert "1 lines of the corpus left out" in capsys.readouterr().out
    assert run_guarded(cli.main, ["search", *flags, "--on-bad-line", "drop", "lamp"]) == 0
    assert " b  blue lamp" in capsys.readouterr().out
