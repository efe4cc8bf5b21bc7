"""Compare BM25 with Lucene 9.5's recorded rankings, rank_bm25, bm25s and corpora worked by hand."""

import gzip
import json
import math
import random
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from recr1.retrieval.bm25 import searcher as module
from recr1.retrieval.bm25.analyzer import analyze
from recr1.retrieval.bm25.impacts import BM25Parameters, round_to_stored_lengths
from recr1.retrieval.bm25.index import BM25Index
from recr1.retrieval.bm25.searcher import BM25Searcher

LUCENE = Path(__file__).parents[2] / "data" / "lucene"
DATA = Path(__file__).parents[3] / "experiments" / "data"
CORPORA = ["msrd", "esci_small", "titles"]
SCORERS = module.SCORERS


def rows(name: str) -> list[list[str]]:
    return [line.split("\t") for line in (LUCENE / name).read_text().split("\n")[1:-1]]


@cache
def corpus(name: str) -> tuple[list[str], list[str]]:
    """Ids and texts, in file order."""
    docs = []
    for folder in ("msrd", "esci_small") if name == "titles" else (name,):
        with gzip.open(DATA / folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
            docs += [json.loads(line) for line in lines]
    return (
        [doc["id"] for doc in docs],
        [doc["title"] if name == "titles" else doc["title"] + " " + doc["text"] for doc in docs],
    )


@cache
def tokens(name: str) -> list[list[str]]:
    return [analyze(text) for text in corpus(name)[1]]


@cache
def made(name: str, **parameters) -> BM25Index:
    return BM25Index.of_texts(*corpus(name), BM25Parameters(**parameters))


def index(name: str, scorer: str = "torch", **parameters) -> BM25Searcher:
    return BM25Searcher(made(name, **parameters), scorer)


def lucene_index(name: str, scorer: str = "torch") -> BM25Searcher:
    # a title is short: both are the same
    return index(name, scorer, length="exact" if name == "titles" else "lucene")


@cache
def queries() -> dict[str, str]:
    lines = [
        line
        for path in DATA.glob("*/*.queries.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return {query["id"]: query["text"] for query in map(json.loads, lines)}


@cache
def queries_of_test(name: str) -> list[str]:
    lines = (DATA / name / "test.queries.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def some_queries(name: str, n: int) -> list[str]:
    """n queries of Lucene's table, those that repeat a word and that hit most first."""
    table = [
        (json.loads(found), int(hits), queries()[q])
        for c, q, found, hits in rows("matches.tsv")
        if c == name
    ]
    return [
        text for _, _, text in sorted(table, key=lambda r: (len(r[0]) == len(set(r[0])), -r[1]))[:n]
    ]


def ids(index: BM25Searcher, ranking: np.ndarray) -> list[str]:
    return [index.doc_ids[row] for row in ranking if row >= 0]


# ----------------------------------------------------------------------------------- against others


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize(
    "name, length",
    [("msrd", "lucene"), ("esci_small", "lucene"), ("titles", "lucene"), ("titles", "exact")],
)
def test_rankings_of_lucene(name, length, scorer):
    """The same documents in the same order, ties included, with the same scores. Titles are short:
    both lengths are the same.
    """
    searched = index(name, scorer, length=length)
    want = {}
    for c, query, _, doc_id, score in rows("ranking.tsv"):
        if c == name:
            want.setdefault(query, []).append((doc_id, float(score)))
    found, scores = searched.search([queries()[query] for query in want], 20)
    assert len(want) > 70
    for ranking, score, (query, expected) in zip(found, scores, want.items()):
        n = len(expected)
        np.testing.assert_allclose(score[:n], [s for _, s in expected], rtol=1e-6, err_msg=query)
        assert ids(searched, ranking) == [doc_id for doc_id, _ in expected], query
        assert (ranking[n:] == -1).all()
        assert (score[n:] == -np.inf).all()


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("name", CORPORA)
def test_matches_of_lucene(name, scorer):
    table = [row for row in rows("matches.tsv") if row[0] == name]
    texts = [queries()[query] for _, query, _, _ in table]
    assert [analyze(text) for text in texts] == [json.loads(found) for _, _, found, _ in table]
    found, _ = lucene_index(name, scorer).search(texts, len(corpus(name)[0]))
    assert (found >= 0).sum(1).tolist() == [int(hits) for _, _, _, hits in table]


def test_stored_length_of_lucene():
    table = rows("length_byte.tsv")
    stored = round_to_stored_lengths(np.array([int(length) for length, _, _ in table]))
    assert stored.tolist() == [int(decoded) for _, _, decoded in table]


def dense(index: BM25Searcher, query: str, doc_ids: list[str]) -> np.ndarray:
    """The score of every document in the order of doc_ids; 0 for those not found."""
    found, scores = index.search([query], len(doc_ids))
    by_id = dict(zip(ids(index, found[0]), scores[0]))
    return np.array([by_id.get(doc_id, 0.0) for doc_id in doc_ids])


@pytest.mark.parametrize("name", ["msrd", "esci_small"])
def test_scores_of_rank_bm25(name):
    from rank_bm25 import BM25Okapi

    oracle = BM25Okapi(tokens(name), k1=1.5, b=0.75)
    floored = [
        token for token, idf in oracle.idf.items() if idf == oracle.epsilon * oracle.average_idf
    ]
    assert floored  # terms in more than half of the documents: the epsilon rule
    for query in some_queries(name, 15) + [" ".join(floored[:2])]:
        want = oracle.get_scores(analyze(query))
        got = dense(index(name, variant="okapi", k1=1.5), query, corpus(name)[0])
        np.testing.assert_allclose(got, np.maximum(want, 0), rtol=1e-4, atol=1e-6, err_msg=query)


@pytest.mark.parametrize("name", ["msrd", "esci_small"])
def test_scores_of_bm25s(name):
    """Every test query: all of its scores, the documents not found included."""
    import bm25s

    oracle = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    oracle.index(tokens(name), show_progress=False)
    row = [index(name).doc_ids.find(doc_id) for doc_id in corpus(name)[0]]
    texts = queries_of_test(name)
    found, scores = index(name).search(texts, len(row))
    for query, ranking, score in zip(texts, found, scores):
        got = np.zeros(len(row))
        hits = ranking >= 0
        got[ranking[hits]] = score[hits]
        analyzed = analyze(query)  # bm25s takes no empty query
        want = oracle.get_scores(analyzed) if analyzed else np.zeros(len(row))
        np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-4, err_msg=query)


# ------------------------------------------------------------------------------------------ by hand

IDS = ["d3", "d1", "d2", "d4"]
TEXTS = ["red fox", "red red dog", "blue fox fox and a cat", "the"]  # the last has no token at all


def test_lucene_formula_by_hand():
    def term(tf, df, length):
        # d4 counts nowhere
        N = 3
        average = (2 + 3 + 4) / 3
        return (
            math.log(1 + (N - df + 0.5) / (df + 0.5))
            * tf
            / (tf + 1.2 * (0.25 + 0.75 * length / average))
        )

    index = BM25Searcher.build(IDS, TEXTS)
    found, scores = index.search(["a red red Fox"], 10)
    want = {"d1": 2 * term(2, 2, 3), "d2": term(2, 2, 4), "d3": 2 * term(1, 2, 2) + term(1, 2, 2)}
    assert ids(index, found[0]) == sorted(want, key=want.get, reverse=True)
    np.testing.assert_allclose(scores[0, :3], sorted(want.values(), reverse=True), rtol=1e-6)
    parts = index.explain("a red red Fox purple", index.doc_ids.find("d3"))
    assert [token for token, _ in parts] == ["red", "fox"]
    assert sum(value for _, value in parts) == pytest.approx(want["d3"], rel=1e-6)
    assert index.explain("red", index.doc_ids.find("d2")) == []


def test_parameters_matter():
    def impacts(*texts, **options):
        return BM25Searcher.build(*texts, **options).index.impacts

    for options in (dict(k1=2.0), dict(b=0.0), dict(variant="okapi")):
        assert not np.array_equal(impacts(IDS, TEXTS, **options), impacts(IDS, TEXTS))
    flat = BM25Searcher.build(IDS, TEXTS, k1=0.0).index  # k1 = 0: only whether the term is there
    assert len(set(flat.impacts[flat.offsets[flat.terms.find("fox")] :][:2])) == 1
    long = ["word " * 50 + f"w{i}" for i in range(3)]
    assert not np.array_equal(impacts("abc", long, length="lucene"), impacts("abc", long))


def test_okapi_drops_scores_that_are_not_positive():
    index = BM25Searcher.build(
        ["a", "b", "c", "d"], ["red x", "red y", "z u", "v w"], variant="okapi"
    )
    found, _ = index.search(["red", "x"], 4)  # a term in exactly half of the documents: idf 0
    assert (found[0] == -1).all()
    assert ids(index, found[1]) == ["a"]


def test_ties_are_ranked_by_id_as_string_also_at_the_cut():
    index = BM25Searcher.build(
        ["9", "10", "b", "a", "é", "z", "1"], ["same words"] * 6 + ["same same other"]
    )
    assert list(index.doc_ids) == ["1", "10", "9", "a", "b", "z", "é"]
    found, scores = index.search(["words"], 4)
    assert ids(index, found[0]) == ["10", "9", "a", "b"]
    assert len(set(scores[0])) == 1
    found, _ = index.search(["same words"], 3)
    assert ids(index, found[0]) == ["10", "9", "a"]


def test_rankings_nest():
    """Top k is the head of top K, whatever the ties at k: true of all k only if the cut obeys the
    order.
    """
    texts = some_queries("titles", 20)
    found, scores = lucene_index("titles").search(texts, 400)
    assert (scores[:, 1:] == scores[:, :-1]).mean() > 0.2  # ties there are
    for k in (1, 2, 7, 50, 399):
        fewer, lower = lucene_index("titles").search(texts, k)
        assert np.array_equal(fewer, found[:, :k])
        assert np.array_equal(lower, scores[:, :k])


def test_nothing_found():
    found, scores = BM25Searcher.build(IDS, TEXTS).search(["", "the and", "purple", "!?", "cat"], 6)
    assert (found[:4] == -1).all()
    assert (scores[:4] == -np.inf).all()
    assert (found[4] >= 0).tolist() == [True] + [False] * 5  # k above the corpus: the rest is empty
    assert found.dtype == np.int64
    assert scores.dtype == np.float32
    assert BM25Searcher.build(IDS, TEXTS).search([], 3)[0].shape == (0, 3)


def test_a_query_does_not_depend_on_its_batch():
    texts = some_queries("msrd", 40)
    found, scores = index("msrd").search(texts, 100)
    for i in (0, 17, 39):
        alone, score = index("msrd").search([texts[i]], 100)
        assert np.array_equal(alone[0], found[i])
        assert np.array_equal(score[0], scores[i])
    back, reverse = index("msrd").search(texts[::-1], 100)
    assert np.array_equal(back[::-1], found)
    assert np.array_equal(reverse[::-1], scores)
    words = random.Random(0).sample(texts[0].split(), len(texts[0].split()))
    assert np.array_equal(index("msrd").search([" ".join(words)], 100)[0][0], found[0])


def test_order_of_documents_does_not_matter():
    index = BM25Searcher.build(IDS, TEXTS).index
    other = BM25Searcher.build(IDS[::-1], TEXTS[::-1]).index
    assert list(index.doc_ids) == list(other.doc_ids) == sorted(IDS)
    assert list(index.terms) == list(other.terms) == sorted(index.terms)
    assert np.array_equal(index.impacts, other.impacts)


@pytest.mark.parametrize(
    "arguments, options, says",
    [
        ((["a", "b", "a"], ["x", "y", "z"]), {}, "'a' stands there twice"),
        (([], []), {}, "empty"),
        ((["a"], ["the"]), {}, "no document has a token"),
        ((["a", "b"], ["x"]), {}, "same length"),
        ((["a"], ["x"]), dict(variant="plus"), "variant"),
        ((["a"], ["x"]), dict(length="short"), "length"),
        ((["a"], ["x"]), dict(k1=-1), "k1"),
        ((["a"], ["x"]), dict(scorer="jax"), "scorer: must be one of torch, numba"),
        ((["a"], ["x"]), dict(repeat_terms="never"), "repeat_terms: must be one of count, once"),
        ((["a"], ["x"]), dict(b=1.5), "b between"),
    ],
)
def test_bad_arguments(arguments, options, says):
    with pytest.raises(ValueError, match=says):
        BM25Searcher.build(*arguments, **options)


@pytest.mark.parametrize("k", [0, -1])
def test_k_must_be_positive(k):
    with pytest.raises(ValueError, match="k: must be at least 1"):
        BM25Searcher.build(IDS, TEXTS).search(["red"], k)


def test_numba_that_is_absent_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(
        ValueError,
        match=r"numba, which is not installed here: pip install 'recr1\[fast\]'; scorer torch",
    ):
        BM25Searcher.build(IDS, TEXTS, scorer="numba")


# ---------------------------------------------------------------------------------- the two scorers


@pytest.fixture
def threads():
    """Sets torch's threads, one setting for both scorers."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("k", [1, 20, 1000, 17_000])
def test_both_scorers_rank_the_same(k, threads):
    """Scores to 1e-6; documents change places only where scores are that close. Threads change
    nothing.
    """
    texts = [*some_queries("titles", 40), "", "the", "zyxt", " ".join(some_queries("titles", 10))]
    (rows, scores), other = (
        index("titles").search(texts, k),
        index("titles", "numba").search(texts, k),
    )
    np.testing.assert_allclose(scores, other[1], rtol=1e-6)
    assert rows.shape == (44, k)
    assert (rows[:40, 0] >= 0).sum() > 30
    assert (rows[40:43] == -1).all()
    assert np.array_equal(rows >= 0, other[0] >= 0)
    for q, (every, score) in enumerate(
        zip(*index("titles", "numba").search(texts, len(corpus("titles")[0])))
    ):
        true = np.zeros(len(every) + 1, np.float32)
        true[every] = score  # of row -1: the last place
        hits = rows[q] >= 0
        np.testing.assert_allclose(true[rows[q][hits]], other[1][q][hits], rtol=1e-6)
    threads(2)
    for scorer, alone in zip(SCORERS, ((rows, scores), other)):
        shared = index("titles", scorer).search(texts, k)
        assert np.array_equal(alone[0], shared[0])
        assert np.array_equal(alone[1], shared[1])
    assert torch.get_num_threads() == 2


# ------------------------------------------------------------------------------ upstream's wrapping


def test_upstream_wrapping_loses_the_first_word():
    """REC_R1.md, 0.1: the published code's query, and what Lucene's tokenizer makes of it. Off
    unless it is named.
    """
    docs = dict(a="oculus rift", b="rift valley", c="gta", d="contents of a box")
    plain, wrapped = (
        BM25Searcher.build(list(docs), list(docs.values()), reproduce_upstream_query_bug=on)
        for on in (False, True)
    )
    assert analyze("(contents:oculus rift s)") == ["contents:oculu", "rift", "s"]

    def found(index, query):
        return set(ids(index, index.search([query], 4)[0][0]))

    assert found(plain, "oculus rift") == {"a", "b"}
    assert found(plain, "gta") == {"c"}
    assert found(plain, '"gta"') == {"c"}
    assert [part[0] for part in wrapped.explain("oculus rift", 0)] == ["rift"]  # `oculus` is gone
    assert found(wrapped, "gta") == set()  # a query of one word has no hit
    assert found(wrapped, '"gta"') == {"c", "d"}  # kept, and `content` comes in
    assert "upstream wrapping" in wrapped.description
    assert "wrapping" not in plain.description


# -------------------------------------------------------------------------------- repeated terms

# The second has each term of the first once, deduplicated by hand: Lucene's stemmer makes `movies`
# and `movie`, `Wars` and `war` the same term.
STUFFED = "movies star movie Star wars the star Wars war star"
BY_HAND = "movies star wars"


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_repeated_term_counts_once_where_that_is_asked_for(scorer):
    """Rows and scores are those of the query that was deduplicated by hand, to the bit."""
    once = BM25Searcher(made("msrd"), scorer, repeat_terms="once")
    count = BM25Searcher(made("msrd"), scorer)
    stuffed_rows, stuffed_scores = once.search([STUFFED], 1000)
    rows, scores = count.search([BY_HAND], 1000)
    assert (rows >= 0).sum() > 100
    assert np.array_equal(stuffed_rows, rows)
    assert np.array_equal(stuffed_scores.view(np.int32), scores.view(np.int32))


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_repeated_term_counts_as_often_as_it_stands_there_by_default(scorer):
    """Three times the term is three times the score; `once` gives the score of the single one."""
    texts = ["star wars", "star trek", "war"]
    count = BM25Searcher.build(IDS[:3], texts, scorer=scorer)
    once = BM25Searcher.build(IDS[:3], texts, scorer=scorer, repeat_terms="once")
    _, single = count.search(["star"], 2)
    _, triple = count.search(["star star star"], 2)
    _, triple_once = once.search(["star star star"], 2)
    np.testing.assert_allclose(triple, 3 * single, rtol=1e-6)
    assert np.array_equal(triple_once, single)


def test_counting_once_changes_no_query_without_a_repeat():
    texts = [
        text for text in queries_of_test("msrd") if len(set(analyze(text))) == len(analyze(text))
    ]
    assert len(texts) > 1000
    once = BM25Searcher(made("msrd"), "numba", repeat_terms="once")
    for one, other in zip(once.search(texts, 100), index("msrd", "numba").search(texts, 100)):
        assert np.array_equal(one, other)


def test_what_a_term_adds_is_shown_once_too():
    texts = ["star wars", "star trek", "war"]
    count = BM25Searcher.build(IDS[:3], texts)
    once = BM25Searcher.build(IDS[:3], texts, repeat_terms="once")
    assert once.explain("star star", 0) == count.explain("star", 0)
    assert count.explain("star star", 0)[0][1] == 2 * count.explain("star", 0)[0][1]


def test_the_description_says_that_terms_count_once():
    assert (
        "repeated terms count once"
        in BM25Searcher.build(IDS, TEXTS, repeat_terms="once").description
    )
    assert "repeated" not in BM25Searcher.build(IDS, TEXTS).description
