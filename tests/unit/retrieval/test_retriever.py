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


def wrap_search(search, timeout=0.0) -> UserRetriever:
    """Put a user's search function, whatever the corpus, behind the interface."""
    return UserRetriever("mine:f", lambda ids, texts: search, IDS, TEXTS, timeout)


def wrap_result(result, timeout=0.0) -> UserRetriever:
    """Put a search function that always returns this result behind the interface."""
    return wrap_search(lambda queries, k: result, timeout)


SHORT_ROWS = [[2, 0], [1, -1]]
SHORT_SCORES = [[2.0, 1.0], [0.5, 0.0]]
FILLED_ROWS = [
    [2, 0, -1, -1],
    [1, -1, -1, -1],
]
# behind a row -1 anything may stand
FILLED_SCORES = [
    [2.0, 1.0, 9, 9],
    [0.5, 0, 0, 0],
]
EXPECTED_SCORES = [
    [2, 1, -np.inf, -np.inf],
    [0.5, -np.inf, -np.inf, -np.inf],
]


def test_lists_arrays_and_tensors_fit_and_short_rankings_are_filled():
    for kind in (list, np.array, torch.tensor):
        for rows, scores in ((SHORT_ROWS, SHORT_SCORES), (FILLED_ROWS, FILLED_SCORES)):
            retriever = wrap_result((kind(rows), kind(scores)))

            actual_rows, actual_scores = retriever.search(["x", "y"], 4)

            assert actual_rows.dtype == np.int64
            assert actual_scores.dtype == np.float32
            assert actual_rows.tolist() == FILLED_ROWS
            assert actual_scores.tolist() == EXPECTED_SCORES


def test_no_query_no_text_and_no_hit():
    calls = []

    def search(queries, k):
        calls.append(queries)
        shape = (len(queries), k)
        return np.full(shape, -1), np.zeros(shape)

    retriever = wrap_search(search)

    rows, _ = retriever.search([], 3)
    assert rows.shape == (0, 3)
    rows, _ = retriever.search(["", "  "], 3)
    assert (rows == -1).all()
    assert not calls

    rows, _ = retriever.search(["", "x"], 3)
    assert (rows == -1).all()
    assert calls == [["x"]]

    no_columns = wrap_result(([[]], [[]]))
    rows, _ = no_columns.search(["x"], 2)
    assert rows.tolist() == [[-1, -1]]

    with pytest.raises(ValueError, match="k: must be at least 1"):
        retriever.search(["x"], 0)


WRONG_RESULTS = [
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
]


@pytest.mark.parametrize("rows, scores, reason", WRONG_RESULTS)
def test_a_wrong_result_names_the_call(rows, scores, reason):
    retriever = wrap_result((rows, scores))

    with pytest.raises(RetrieverError, match=reason) as error:
        retriever.search(["red lamp"], 3)

    message = str(error.value)
    call = "retriever mine:f: call 1 (1 queries, k 3, the first 'red lamp')"
    assert message.startswith(call)
    assert "\n" not in message


NO_PAIRS = [
    None,
    7,
    ([[0]],),
    ([[0]], [[1.0]], 3),
]


@pytest.mark.parametrize("result", NO_PAIRS)
def test_no_pair_is_a_wrong_result(result):
    retriever = wrap_result(result)
    with pytest.raises(RetrieverError, match="must return two arrays"):
        retriever.search(["x"], 3)


EXCEPTIONS = [
    (ConnectionError("refused\nby host"), "ConnectionError: refused by host"),
    (TimeoutError("server"), "raised TimeoutError: server"),
    (KeyError("x"), "KeyError: 'x'"),
]


@pytest.mark.parametrize("timeout", [0.0, 30.0])
@pytest.mark.parametrize("exception, message", EXCEPTIONS)
def test_an_exception_is_named_and_the_call_is_not_repeated(exception, message, timeout):
    calls = []

    def search(queries, k):
        calls.append(k)
        raise exception

    retriever = wrap_search(search, timeout)
    for n in (1, 2):
        with pytest.raises(RetrieverError, match=f"call {n} .*{message}") as error:
            retriever.search(["x"], 3)
        assert "\n" not in str(error.value)
        assert len(calls) == n


def test_a_call_that_takes_too_long_is_left_alone():
    result = ([[0]], [[1.0]])
    may_end = threading.Event()

    def search_slowly(queries, k):
        may_end.wait(60)
        return result

    slow = wrap_search(search_slowly, timeout=0.2)
    started = time.perf_counter()
    message = "call 1 .* took longer than retriever.timeout = 0.2 s"
    with pytest.raises(RetrieverError, match=message):
        slow.search(["x"], 1)
    seconds = time.perf_counter() - started
    assert seconds < 30
    may_end.set()

    fast = wrap_result(result, timeout=30.0)
    rows, _ = fast.search(["x"], 1)
    assert rows.tolist() == [[0]]


def test_asked_to_stop_inside_it_is_no_fault_of_the_function():
    def stop(*_):
        raise Stopped("now")

    retriever = wrap_search(stop)
    with pytest.raises(Stopped):
        retriever.search(["x"], 1)
    with pytest.raises(Stopped):
        UserRetriever("mine:f", stop, IDS, TEXTS)


BAD_KINDS = [
    ("no_such_module:f", "cannot be loaded"),
    ("math:no_such_name", "cannot be loaded"),
    ("math:pi", "is no function, it is float"),
    (":f", "cannot be loaded"),
]


def test_what_makes_it_may_fail_too():
    def divide_by_zero(ids, texts):
        return 1 / 0

    def return_nothing(ids, texts):
        return None

    message = r"mine:f: called with the corpus \(4 documents\) it raised ZeroDivisionError"
    with pytest.raises(RetrieverError, match=message):
        UserRetriever("mine:f", divide_by_zero, IDS, TEXTS)
    with pytest.raises(RetrieverError, match="must return a function search.*returned NoneType"):
        UserRetriever("mine:f", return_nothing, IDS, TEXTS)
    with pytest.raises(ValueError, match="corpus is empty"):
        UserRetriever("mine:f", return_nothing, [], [])

    for kind, reason in BAD_KINDS:
        with pytest.raises(ConfigError, match=f"retriever.kind: .*{reason}"):
            build_retriever(RetrieverConfig(kind=kind))
    config = Config(retriever=RetrieverConfig(kind="lucene"))
    with pytest.raises(ConfigError, match="not one of bm25, dense, rank_bm25"):
        check_config(config)


WORDS = "red green blue lamp chair table shirt kettle guitar camera".split()


def write_random_corpus(path: Path) -> tuple[list[str], list[str]]:
    """Write 60 documents of 1 to 11 words; return their ids and texts."""
    rng = np.random.default_rng(0)
    ids = []
    texts = []
    lines = ""
    for i in range(60):
        num_words = rng.integers(1, 12)
        words = rng.choice(np.array(WORDS), num_words)
        doc = dict(id=f"d{i:02}", text=" ".join(words))
        ids.append(doc["id"])
        texts.append(doc["text"])
        lines += json.dumps(doc) + "\n"
    path.write_text(lines)
    return ids, texts


def test_rank_bm25_is_the_package_and_our_okapi(tmp_path):
    path = tmp_path / "corpus.jsonl"
    ids, texts = write_random_corpus(path)
    queries = ["red lamp", "lamp lamp guitars", "xyzzy", "the", ""]
    build = build_retriever(RetrieverConfig(kind="rank_bm25", k1=1.5))
    retriever, left_out = build(path, "stop", None, print)
    assert not left_out

    rows, scores = retriever.search(queries, 100)

    assert rows.shape == (5, 100)
    package = BM25Okapi([analyze(text) for text in texts])
    for i, query in enumerate(queries):
        true_scores = np.zeros(60)
        if query:
            true_scores = package.get_scores(analyze(query))
        ranking = np.argsort(-true_scores, kind="stable")
        hits = [row for row in ranking.tolist() if true_scores[row] > 0]
        n = len(hits)
        assert rows[i, :n].tolist() == hits
        assert (rows[i, n:] == -1).all()
        assert np.allclose(scores[i, :n], true_scores[hits], rtol=1e-6)

    searcher = BM25Searcher.build(ids, texts, k1=1.5, variant="okapi")
    _, our_scores = searcher.search(queries, 100)
    assert np.allclose(our_scores, scores, rtol=1e-5)
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


def read_rewards(run_dir: Path) -> list[float]:
    return [row["reward"] for row in jsonl(run_dir / "metrics.jsonl")]


def test_a_function_of_a_users_own_trains_and_what_it_breaks_costs_no_step(
    tmp_path, monkeypatch, capsys
):
    """A run whose retriever fails in step 3 has steps 1 and 2 on disk, without a checkpoint being
    due; with the retriever back it goes on.
    """
    (tmp_path / "my_retriever.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = {
        "retriever.kind": "my_retriever:overlap",
        "train.steps": 4,
        "train.eval_every": 0,
        "save.every": 100,
    }
    path = write_yaml(tmp_path, **settings)

    assert run_guarded(train.main, [path, f"run.dir={tmp_path}/straight"]) == 0
    assert "retriever my_retriever:overlap" in capsys.readouterr().out
    assert (tmp_path / "straight/summary.json").exists()

    # calls 1 and 2: the test split, raw and rewritten; 3 and 4: steps 1 and 2
    failing = [path, "retriever.kind=my_retriever:breaks"]
    Path("down").write_text("raises")
    message = refused(failing, capsys)
    assert "my_retriever:breaks: call 5 (" in message
    assert "ZeroDivisionError" in message
    assert "stopped after step 2; the same command goes on from" in message

    import my_retriever

    my_retriever.calls[0] = 3  # the evaluation before is kept; step 3 is the next call
    Path("down").write_text("slow")
    message = refused([*failing, "retriever.timeout=3"], capsys)  # another limit is no other run
    assert "took longer than retriever.timeout = 3 s" in message
    assert "after step 3" in message

    Path("down").unlink()
    assert run_guarded(train.main, failing) == 0
    assert "goes on after step 3" in capsys.readouterr().out
    rewards = read_rewards(tmp_path / "run")
    assert rewards == read_rewards(tmp_path / "straight")
    assert len(rewards) == 4


def test_the_readmes_function_is_a_retriever():
    path = Path(__file__).parents[3] / "recr1/retrieval/README.md"
    readme = path.read_text(encoding="utf-8")
    _, after_fence = readme.split("```python\n# my_retriever.py")
    block, *_ = after_fence.split("```")
    _, _, code = block.partition("\n")
    names: dict = {}
    exec(code, names)
    retriever = UserRetriever("overlap", names["overlap"], IDS, TEXTS)

    queries = [TEXTS[2], "", TEXTS[0]]
    rows, scores = retriever.search(queries, len(IDS) + 3)

    assert rows[0, 0] == 2
    assert rows[2, 0] == 0
    assert (rows[1] == -1).all()
    assert (rows[:, len(IDS) :] == -1).all()
    assert np.isfinite(scores[0, 0])


def test_the_command_that_a_refused_index_names_makes_it_anew(tmp_path, capsys):
    corpus = tmp_path / "corpus.jsonl"
    index_dir = str(tmp_path / "index")
    flags = ["--corpus", str(corpus), "--index-dir", index_dir, "--k1", "0.9"]
    search = ["search", *flags, "lamp"]
    search_and_drop = ["search", *flags, "--on-bad-line", "drop", "lamp"]
    corpus.write_text('{"id": "a", "text": "red lamp"}\n')
    assert run_guarded(cli.main, ["index", *flags]) == 0
    assert run_guarded(cli.main, search) == 0

    corpus.write_text('{"id": "b", "text": "blue lamp"}\n{"id": "b", "text": "again"}\n')
    assert run_guarded(cli.main, search_and_drop) == 2
    assert capsys.readouterr().err.endswith(" --on-bad-line drop\n")
    assert run_guarded(cli.main, search) == 2
    message = capsys.readouterr().err.strip()
    _, _, command = message.rpartition("make the index anew: ")
    index_anew = shlex.split(command)[1:]

    # a bad line is not passed over
    assert run_guarded(cli.main, index_anew) == 2
    assert "corpus.jsonl:2" in capsys.readouterr().err
    assert run_guarded(cli.main, [*index_anew, "--on-bad-line", "drop"]) == 0
    assert "1 lines of the corpus left out" in capsys.readouterr().out
    assert run_guarded(cli.main, search_and_drop) == 0
    assert " b  blue lamp" in capsys.readouterr().out
