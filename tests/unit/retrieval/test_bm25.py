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


def read_table(name: str) -> list[list[str]]:
    lines = (LUCENE / name).read_text().split("\n")
    rows = lines[1:-1]
    return [row.split("\t") for row in rows]


def read_docs(folder: str) -> list[dict]:
    path = DATA / folder / "corpus.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@cache
def read_corpus(name: str) -> tuple[list[str], list[str]]:
    """Read ids and texts, in file order."""
    if name == "titles":
        docs = read_docs("msrd") + read_docs("esci_small")
    else:
        docs = read_docs(name)
    ids = []
    texts = []
    for doc in docs:
        text = doc["title"]
        if name != "titles":
            text += " " + doc["text"]
        ids.append(doc["id"])
        texts.append(text)
    return ids, texts


@cache
def analyze_corpus(name: str) -> list[list[str]]:
    _, texts = read_corpus(name)
    return [analyze(text) for text in texts]


@cache
def build_index(name: str, **parameters) -> BM25Index:
    ids, texts = read_corpus(name)
    return BM25Index.of_texts(ids, texts, BM25Parameters(**parameters))


def build_searcher(name: str, scorer: str = "torch", **parameters) -> BM25Searcher:
    index = build_index(name, **parameters)
    return BM25Searcher(index, scorer)


def build_lucene_searcher(name: str, scorer: str = "torch") -> BM25Searcher:
    if name == "titles":
        length = "exact"  # a title is short: both lengths are the same
    else:
        length = "lucene"
    return build_searcher(name, scorer, length=length)


@cache
def read_queries() -> dict[str, str]:
    queries = {}
    for path in DATA.glob("*/*.queries.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            query = json.loads(line)
            queries[query["id"]] = query["text"]
    return queries


@cache
def read_test_queries(name: str) -> list[str]:
    path = DATA / name / "test.queries.jsonl"
    queries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        query = json.loads(line)
        queries.append(query["text"])
    return queries


def select_queries(name: str, n: int) -> list[str]:
    """Select n queries of Lucene's table: first those that repeat a word, then by most hits."""
    queries = read_queries()
    table = []
    for corpus, query_id, tokens_json, hits in read_table("matches.tsv"):
        if corpus == name:
            tokens = json.loads(tokens_json)
            repeats_no_word = len(tokens) == len(set(tokens))
            table.append((repeats_no_word, -int(hits), queries[query_id]))
    table.sort(key=lambda row: row[:2])
    return [text for _, _, text in table[:n]]


def list_ids(searcher: BM25Searcher, ranking: np.ndarray) -> list[str]:
    return [searcher.doc_ids[row] for row in ranking if row >= 0]


# ----------------------------------------------------------------------------------- against others

RANKED_CORPORA = [
    ("msrd", "lucene"),
    ("esci_small", "lucene"),
    ("titles", "lucene"),
    ("titles", "exact"),
]


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("name, length", RANKED_CORPORA)
def test_rankings_of_lucene(name, length, scorer):
    """The same documents in the same order, ties included, with the same scores. Titles are short:
    both lengths are the same.
    """
    queries = read_queries()
    expected_ids = {}
    expected_scores = {}
    for corpus, query_id, _, doc_id, score in read_table("ranking.tsv"):
        if corpus == name:
            expected_ids.setdefault(query_id, []).append(doc_id)
            expected_scores.setdefault(query_id, []).append(float(score))
    assert len(expected_ids) > 70

    searcher = build_searcher(name, scorer, length=length)
    texts = [queries[query_id] for query_id in expected_ids]
    rankings, scores = searcher.search(texts, 20)

    for i, query_id in enumerate(expected_ids):
        n = len(expected_ids[query_id])
        np.testing.assert_allclose(
            scores[i, :n], expected_scores[query_id], rtol=1e-6, err_msg=query_id
        )
        assert list_ids(searcher, rankings[i]) == expected_ids[query_id], query_id
        assert (rankings[i, n:] == -1).all()
        assert (scores[i, n:] == -np.inf).all()


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("name", CORPORA)
def test_matches_of_lucene(name, scorer):
    queries = read_queries()
    texts = []
    expected_hits = []
    for corpus, query_id, tokens_json, hits in read_table("matches.tsv"):
        if corpus == name:
            text = queries[query_id]
            assert analyze(text) == json.loads(tokens_json)
            texts.append(text)
            expected_hits.append(int(hits))

    searcher = build_lucene_searcher(name, scorer)
    num_documents = len(searcher.doc_ids)
    rankings, _ = searcher.search(texts, num_documents)

    num_hits = (rankings >= 0).sum(1)
    assert num_hits.tolist() == expected_hits


def test_stored_length_of_lucene():
    lengths = []
    expected = []
    for length, _, decoded in read_table("length_byte.tsv"):
        lengths.append(int(length))
        expected.append(int(decoded))

    stored = round_to_stored_lengths(np.array(lengths))

    assert stored.tolist() == expected


def score_documents(searcher: BM25Searcher, query: str, doc_ids: list[str]) -> np.ndarray:
    """Return the score of every document in the order of doc_ids; 0 for those without a hit."""
    rankings, scores = searcher.search([query], len(doc_ids))
    hits = list_ids(searcher, rankings[0])
    score_of = dict(zip(hits, scores[0]))
    return np.array([score_of.get(doc_id, 0.0) for doc_id in doc_ids])


@pytest.mark.parametrize("name", ["msrd", "esci_small"])
def test_scores_of_rank_bm25(name):
    from rank_bm25 import BM25Okapi

    oracle = BM25Okapi(analyze_corpus(name), k1=1.5, b=0.75)
    # terms in more than half of the documents: the epsilon rule
    floor = oracle.epsilon * oracle.average_idf
    floored = [token for token, idf in oracle.idf.items() if idf == floor]
    assert floored
    queries = select_queries(name, 15)
    queries.append(" ".join(floored[:2]))

    doc_ids, _ = read_corpus(name)
    searcher = build_searcher(name, variant="okapi", k1=1.5)

    for query in queries:
        oracle_scores = oracle.get_scores(analyze(query))
        expected = np.maximum(oracle_scores, 0)
        actual = score_documents(searcher, query, doc_ids)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6, err_msg=query)


@pytest.mark.parametrize("name", ["msrd", "esci_small"])
def test_scores_of_bm25s(name):
    """Every test query: all of its scores, the documents not found included."""
    import bm25s

    oracle = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    oracle.index(analyze_corpus(name), show_progress=False)

    searcher = build_searcher(name)
    doc_ids, _ = read_corpus(name)
    row_of_doc = [searcher.doc_ids.find(doc_id) for doc_id in doc_ids]
    queries = read_test_queries(name)
    rankings, scores = searcher.search(queries, len(doc_ids))

    for i, query in enumerate(queries):
        hits = rankings[i] >= 0
        score_of_row = np.zeros(len(doc_ids))
        score_of_row[rankings[i, hits]] = scores[i, hits]
        actual = score_of_row[row_of_doc]

        expected = np.zeros(len(doc_ids))
        tokens = analyze(query)
        if tokens:  # bm25s takes no empty query
            expected = oracle.get_scores(tokens)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4, err_msg=query)


# ------------------------------------------------------------------------------------------ by hand

IDS = ["d3", "d1", "d2", "d4"]
TEXTS = ["red fox", "red red dog", "blue fox fox and a cat", "the"]  # the last has no token at all


def score_term_by_hand(tf: int, df: int, length: int) -> float:
    """Score one term of TEXTS by the formula of Lucene, with k1 = 1.2 and b = 0.75."""
    num_documents = 3  # d4 counts nowhere
    average_length = (2 + 3 + 4) / 3
    idf = math.log(1 + (num_documents - df + 0.5) / (df + 0.5))
    norm = 1.2 * (0.25 + 0.75 * length / average_length)
    return idf * tf / (tf + norm)


def test_lucene_formula_by_hand():
    score_d1 = 2 * score_term_by_hand(tf=2, df=2, length=3)
    score_d2 = score_term_by_hand(tf=2, df=2, length=4)
    red_of_d3 = score_term_by_hand(tf=1, df=2, length=2)
    fox_of_d3 = score_term_by_hand(tf=1, df=2, length=2)
    score_d3 = 2 * red_of_d3 + fox_of_d3
    expected = {"d1": score_d1, "d2": score_d2, "d3": score_d3}
    searcher = BM25Searcher.build(IDS, TEXTS)

    rankings, scores = searcher.search(["a red red Fox"], 10)

    expected_ids = sorted(expected, key=expected.get, reverse=True)
    expected_scores = sorted(expected.values(), reverse=True)
    assert list_ids(searcher, rankings[0]) == expected_ids
    np.testing.assert_allclose(scores[0, :3], expected_scores, rtol=1e-6)

    row_of_d3 = searcher.doc_ids.find("d3")
    terms = searcher.explain("a red red Fox purple", row_of_d3)
    tokens = [token for token, _ in terms]
    assert tokens == ["red", "fox"]
    total = sum(score for _, score in terms)
    assert total == pytest.approx(score_d3, rel=1e-6)

    row_of_d2 = searcher.doc_ids.find("d2")
    assert searcher.explain("red", row_of_d2) == []


def compute_impacts(ids, texts, **options) -> np.ndarray:
    return BM25Searcher.build(ids, texts, **options).index.impacts


def test_parameters_matter():
    default_impacts = compute_impacts(IDS, TEXTS)
    more_saturation = compute_impacts(IDS, TEXTS, k1=2.0)
    no_lengths = compute_impacts(IDS, TEXTS, b=0.0)
    okapi = compute_impacts(IDS, TEXTS, variant="okapi")
    assert not np.array_equal(more_saturation, default_impacts)
    assert not np.array_equal(no_lengths, default_impacts)
    assert not np.array_equal(okapi, default_impacts)

    # k1 = 0: only whether the term is there
    flat = BM25Searcher.build(IDS, TEXTS, k1=0.0).index
    first = flat.offsets[flat.terms.find("fox")]
    impacts_of_fox = flat.impacts[first : first + 2]
    assert len(impacts_of_fox) == 2
    assert len(set(impacts_of_fox)) == 1

    words = "word " * 50
    long_texts = [words + "w0", words + "w1", words + "w2"]
    rounded = compute_impacts("abc", long_texts, length="lucene")
    exact = compute_impacts("abc", long_texts)
    assert not np.array_equal(rounded, exact)


def test_okapi_drops_scores_that_are_not_positive():
    ids = ["a", "b", "c", "d"]
    texts = ["red x", "red y", "z u", "v w"]
    searcher = BM25Searcher.build(ids, texts, variant="okapi")

    rankings, _ = searcher.search(["red", "x"], 4)

    # a term in exactly half of the documents: idf 0
    assert (rankings[0] == -1).all()
    assert list_ids(searcher, rankings[1]) == ["a"]


def test_ties_are_ranked_by_id_as_string_also_at_the_cut():
    ids = ["9", "10", "b", "a", "é", "z", "1"]
    texts = ["same words"] * 6 + ["same same other"]
    searcher = BM25Searcher.build(ids, texts)
    assert list(searcher.doc_ids) == ["1", "10", "9", "a", "b", "z", "é"]

    rankings, scores = searcher.search(["words"], 4)
    assert list_ids(searcher, rankings[0]) == ["10", "9", "a", "b"]
    assert len(set(scores[0])) == 1

    rankings, _ = searcher.search(["same words"], 3)
    assert list_ids(searcher, rankings[0]) == ["10", "9", "a"]


def test_rankings_nest():
    """Top k is the head of top K, whatever the ties at k: true of all k only if the cut obeys the
    order.
    """
    queries = select_queries("titles", 20)
    searcher = build_lucene_searcher("titles")

    rankings, scores = searcher.search(queries, 400)
    is_tie = scores[:, 1:] == scores[:, :-1]
    assert is_tie.mean() > 0.2

    for k in (1, 2, 7, 50, 399):
        top_rankings, top_scores = searcher.search(queries, k)
        assert np.array_equal(top_rankings, rankings[:, :k])
        assert np.array_equal(top_scores, scores[:, :k])


def test_nothing_found():
    searcher = BM25Searcher.build(IDS, TEXTS)
    queries = ["", "the and", "purple", "!?", "cat"]

    rankings, scores = searcher.search(queries, 6)

    assert (rankings[:4] == -1).all()
    assert (scores[:4] == -np.inf).all()
    is_hit = rankings[4] >= 0
    assert is_hit.tolist() == [True] + [False] * 5  # k above the corpus: the rest is empty
    assert rankings.dtype == np.int64
    assert scores.dtype == np.float32
    no_rankings, _ = searcher.search([], 3)
    assert no_rankings.shape == (0, 3)


def test_a_query_does_not_depend_on_its_batch():
    queries = select_queries("msrd", 40)
    searcher = build_searcher("msrd")
    rankings, scores = searcher.search(queries, 100)

    for i in (0, 17, 39):
        ranking_alone, score_alone = searcher.search([queries[i]], 100)
        assert np.array_equal(ranking_alone[0], rankings[i])
        assert np.array_equal(score_alone[0], scores[i])

    reversed_rankings, reversed_scores = searcher.search(queries[::-1], 100)
    assert np.array_equal(reversed_rankings[::-1], rankings)
    assert np.array_equal(reversed_scores[::-1], scores)

    words = queries[0].split()
    shuffled_words = random.Random(0).sample(words, len(words))
    shuffled_rankings, _ = searcher.search([" ".join(shuffled_words)], 100)
    assert np.array_equal(shuffled_rankings[0], rankings[0])


def test_order_of_documents_does_not_matter():
    ids_reversed = IDS[::-1]
    texts_reversed = TEXTS[::-1]

    index = BM25Searcher.build(IDS, TEXTS).index
    other = BM25Searcher.build(ids_reversed, texts_reversed).index

    assert list(index.doc_ids) == sorted(IDS)
    assert list(other.doc_ids) == sorted(IDS)
    assert list(index.terms) == sorted(index.terms)
    assert list(other.terms) == list(index.terms)
    assert np.array_equal(index.impacts, other.impacts)


BAD_ARGUMENTS = [
    (["a", "b", "a"], ["x", "y", "z"], {}, "'a' stands there twice"),
    ([], [], {}, "empty"),
    (["a"], ["the"], {}, "no document has a token"),
    (["a", "b"], ["x"], {}, "same length"),
    (["a"], ["x"], dict(variant="plus"), "variant"),
    (["a"], ["x"], dict(length="short"), "length"),
    (["a"], ["x"], dict(k1=-1), "k1"),
    (["a"], ["x"], dict(scorer="jax"), "scorer: must be one of torch, numba"),
    (["a"], ["x"], dict(repeat_terms="never"), "repeat_terms: must be one of count, once"),
    (["a"], ["x"], dict(b=1.5), "b between"),
]


@pytest.mark.parametrize("ids, texts, options, message", BAD_ARGUMENTS)
def test_bad_arguments(ids, texts, options, message):
    with pytest.raises(ValueError, match=message):
        BM25Searcher.build(ids, texts, **options)


@pytest.mark.parametrize("k", [0, -1])
def test_k_must_be_positive(k):
    searcher = BM25Searcher.build(IDS, TEXTS)
    with pytest.raises(ValueError, match="k: must be at least 1"):
        searcher.search(["red"], k)


def test_numba_that_is_absent_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    message = r"numba, which is not installed here: pip install 'recr1\[fast\]'; scorer torch"
    with pytest.raises(ValueError, match=message):
        BM25Searcher.build(IDS, TEXTS, scorer="numba")


# ---------------------------------------------------------------------------------- the two scorers


@pytest.fixture
def set_threads():
    """Set torch's threads, one setting for both scorers; restore them after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("k", [1, 20, 1000, 17_000])
def test_both_scorers_rank_the_same(k, set_threads):
    """Scores to 1e-6; documents change places only where scores are that close. Threads change
    nothing.
    """
    ten_queries = " ".join(select_queries("titles", 10))
    queries = [*select_queries("titles", 40), "", "the", "zyxt", ten_queries]
    num_documents = len(build_index("titles").doc_ids)
    torch_searcher = build_searcher("titles", "torch")
    numba_searcher = build_searcher("titles", "numba")

    rows, scores = torch_searcher.search(queries, k)
    numba_rows, numba_scores = numba_searcher.search(queries, k)
    all_rows, all_scores = numba_searcher.search(queries, num_documents)

    np.testing.assert_allclose(scores, numba_scores, rtol=1e-6)
    assert rows.shape == (44, k)
    num_with_hits = (rows[:40, 0] >= 0).sum()
    assert num_with_hits > 30
    assert (rows[40:43] == -1).all()
    assert np.array_equal(rows >= 0, numba_rows >= 0)

    for i in range(len(queries)):
        score_of_row = np.zeros(num_documents + 1, np.float32)
        score_of_row[all_rows[i]] = all_scores[i]  # of row -1: the last place
        hits = rows[i] >= 0
        numba_score = score_of_row[rows[i, hits]]
        np.testing.assert_allclose(numba_score, numba_scores[i, hits], rtol=1e-6)

    set_threads(2)
    rows_2, scores_2 = torch_searcher.search(queries, k)
    numba_rows_2, numba_scores_2 = numba_searcher.search(queries, k)
    assert np.array_equal(rows, rows_2)
    assert np.array_equal(scores, scores_2)
    assert np.array_equal(numba_rows, numba_rows_2)
    assert np.array_equal(numba_scores, numba_scores_2)
    assert torch.get_num_threads() == 2


# ------------------------------------------------------------------------------ upstream's wrapping


def search_as_set(searcher: BM25Searcher, query: str) -> set[str]:
    rankings, _ = searcher.search([query], 4)
    return set(list_ids(searcher, rankings[0]))


def test_upstream_wrapping_loses_the_first_word():
    """REC_R1.md, 0.1: the published code's query, and what Lucene's tokenizer makes of it. Off
    unless it is named.
    """
    ids = ["a", "b", "c", "d"]
    texts = ["oculus rift", "rift valley", "gta", "contents of a box"]
    plain = BM25Searcher.build(ids, texts, reproduce_upstream_query_bug=False)
    wrapped = BM25Searcher.build(ids, texts, reproduce_upstream_query_bug=True)

    assert analyze("(contents:oculus rift s)") == ["contents:oculu", "rift", "s"]

    assert search_as_set(plain, "oculus rift") == {"a", "b"}
    assert search_as_set(plain, "gta") == {"c"}
    assert search_as_set(plain, '"gta"') == {"c"}

    terms = [token for token, _ in wrapped.explain("oculus rift", 0)]
    assert terms == ["rift"]  # `oculus` is gone
    assert search_as_set(wrapped, "gta") == set()  # a query of one word has no hit
    assert search_as_set(wrapped, '"gta"') == {"c", "d"}  # kept, and `content` comes in

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
    once = BM25Searcher(build_index("msrd"), scorer, repeat_terms="once")
    count = build_searcher("msrd", scorer)

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
    texts = []
    for text in read_test_queries("msrd"):
        terms = analyze(text)
        if len(set(terms)) == len(terms):
            texts.append(text)
    assert len(texts) > 1000

    once = BM25Searcher(build_index("msrd"), "numba", repeat_terms="once")
    rows, scores = once.search(texts, 100)
    want_rows, want_scores = build_searcher("msrd", "numba").search(texts, 100)
    assert np.array_equal(rows, want_rows)
    assert np.array_equal(scores, want_scores)


def test_what_a_term_adds_is_shown_once_too():
    texts = ["star wars", "star trek", "war"]
    count = BM25Searcher.build(IDS[:3], texts)
    once = BM25Searcher.build(IDS[:3], texts, repeat_terms="once")

    single = count.explain("star", 0)
    double = count.explain("star star", 0)
    assert once.explain("star star", 0) == single
    assert double[0][1] == 2 * single[0][1]


def test_the_description_says_that_terms_count_once():
    once = BM25Searcher.build(IDS, TEXTS, repeat_terms="once")
    count = BM25Searcher.build(IDS, TEXTS)
    assert "repeated terms count once" in once.description
    assert "repeated" not in count.description
