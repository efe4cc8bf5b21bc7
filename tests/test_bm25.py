"""BM25 against Lucene 9.5's recorded rankings, rank_bm25, bm25s and small corpora worked by hand."""

import gzip
import json
import math
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from recr1.retrieval import bm25 as module
from recr1.retrieval.analyzer import analyze
from recr1.retrieval.bm25 import BM25, load_or_build

LUCENE = Path(__file__).parent / "data" / "lucene"
DATA = Path(__file__).parent.parent / "experiments" / "data"
CORPORA = ["msrd", "esci_small", "titles"]


def rows(name: str) -> list[list[str]]:
    return [line.split("\t") for line in (LUCENE / name).read_text().split("\n")[1:-1]]


@cache
def corpus(name: str) -> tuple[list[str], list[str]]:
    """Ids and texts, in file order."""
    docs = []
    for folder in ("msrd", "esci_small") if name == "titles" else (name,):
        with gzip.open(DATA / folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
            docs += [json.loads(line) for line in lines]
    return ([doc["id"] for doc in docs],
            [doc["title"] if name == "titles" else doc["title"] + " " + doc["text"] for doc in docs])


@cache
def tokens(name: str) -> list[list[str]]:
    return [analyze(text) for text in corpus(name)[1]]


@cache
def index(name: str, **options) -> BM25:
    return BM25.build(*corpus(name), **options)


def lucene_index(name: str) -> BM25:
    return index(name, length="exact" if name == "titles" else "lucene")    # a title is short: both are the same


@cache
def queries() -> dict[str, str]:
    lines = [line for path in DATA.glob("*/*.queries.jsonl") for line in path.read_text(encoding="utf-8").splitlines()]
    return {query["id"]: query["text"] for query in map(json.loads, lines)}


def some_queries(name: str, n: int) -> list[str]:
    """n queries of Lucene's table, those that repeat a word and that hit most first."""
    table = [(json.loads(found), int(hits), queries()[q]) for c, q, found, hits in rows("matches.tsv") if c == name]
    return [text for _, _, text in sorted(table, key=lambda r: (len(r[0]) == len(set(r[0])), -r[1]))[:n]]


def ids(index: BM25, ranking: np.ndarray) -> list[str]:
    return [index.doc_ids[row] for row in ranking if row >= 0]


# ---------------------------------------------------------------------------------------------------- against others

@pytest.mark.parametrize("name", CORPORA)
def test_rankings_of_lucene(name):
    """The same documents in the same order, ties included, with the same scores."""
    want = {}
    for c, query, rank, doc_id, score in rows("ranking.tsv"):
        if c == name:
            want.setdefault(query, []).append((doc_id, float(score)))
    found, scores = lucene_index(name).search([queries()[query] for query in want], 20)
    assert len(want) > 70
    for ranking, score, (query, expected) in zip(found, scores, want.items()):
        n = len(expected)
        np.testing.assert_allclose(score[:n], [s for _, s in expected], rtol=1e-6, err_msg=query)
        assert ids(lucene_index(name), ranking) == [doc_id for doc_id, _ in expected], query
        assert (ranking[n:] == -1).all() and (score[n:] == -np.inf).all()


@pytest.mark.parametrize("name", CORPORA)
def test_matches_of_lucene(name):
    table = [row for row in rows("matches.tsv") if row[0] == name]
    texts = [queries()[query] for _, query, _, _ in table]
    assert [analyze(text) for text in texts] == [json.loads(found) for _, _, found, _ in table]
    found, _ = lucene_index(name).search(texts, len(corpus(name)[0]))
    assert (found >= 0).sum(1).tolist() == [int(hits) for _, _, _, hits in table]


def test_stored_length_of_lucene():
    table = rows("length_byte.tsv")
    stored = module._stored(np.array([int(length) for length, _, _ in table]))
    assert stored.tolist() == [int(decoded) for _, _, decoded in table]


def dense(index: BM25, query: str, doc_ids: list[str]) -> np.ndarray:
    """The score of every document in the order of doc_ids; 0 for those not found."""
    found, scores = index.search([query], len(doc_ids))
    by_id = dict(zip(ids(index, found[0]), scores[0]))
    return np.array([by_id.get(doc_id, 0.0) for doc_id in doc_ids])


@pytest.mark.parametrize("name", ["msrd", "esci_small"])
def test_scores_of_rank_bm25(name):
    from rank_bm25 import BM25Okapi
    oracle = BM25Okapi(tokens(name), k1=1.5, b=0.75)
    floored = [token for token, idf in oracle.idf.items() if idf == oracle.epsilon * oracle.average_idf]
    assert floored                                     # terms in more than half of the documents: the epsilon rule
    for query in some_queries(name, 15) + [" ".join(floored[:2])]:
        want = oracle.get_scores(analyze(query))
        got = dense(index(name, variant="okapi", k1=1.5), query, corpus(name)[0])
        np.testing.assert_allclose(got, np.maximum(want, 0), rtol=1e-4, atol=1e-6, err_msg=query)


@pytest.mark.parametrize("name", ["msrd", "esci_small"])
def test_scores_of_bm25s(name):
    import bm25s
    oracle = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    oracle.index(tokens(name), show_progress=False)
    for query in some_queries(name, 30):
        got = dense(index(name), query, corpus(name)[0])
        np.testing.assert_allclose(got, oracle.get_scores(analyze(query)), rtol=1e-4, atol=1e-5, err_msg=query)


# ---------------------------------------------------------------------------------------------------------- by hand

IDS = ["d3", "d1", "d2", "d4"]
TEXTS = ["red fox", "red red dog", "blue fox fox and a cat", "the"]        # the last has no token at all


def test_lucene_formula_by_hand():
    def term(tf, df, length):
        N, average = 3, (2 + 3 + 4) / 3                # d4 counts nowhere
        return math.log(1 + (N - df + .5) / (df + .5)) * tf / (tf + 1.2 * (.25 + .75 * length / average))
    index = BM25.build(IDS, TEXTS)
    found, scores = index.search(["a red red Fox"], 10)
    want = {"d1": 2 * term(2, 2, 3), "d2": term(2, 2, 4), "d3": 2 * term(1, 2, 2) + term(1, 2, 2)}
    assert ids(index, found[0]) == sorted(want, key=want.get, reverse=True)
    np.testing.assert_allclose(scores[0, :3], sorted(want.values(), reverse=True), rtol=1e-6)
    parts = index.explain("a red red Fox purple", index.doc_ids.index("d3"))
    assert [token for token, _ in parts] == ["red", "fox"]
    assert sum(value for _, value in parts) == pytest.approx(want["d3"], rel=1e-6)
    assert index.explain("red", index.doc_ids.index("d2")) == []


def test_parameters_matter():
    for options in (dict(k1=2.0), dict(b=0.0), dict(variant="okapi")):
        assert not np.array_equal(BM25.build(IDS, TEXTS, **options).impacts, BM25.build(IDS, TEXTS).impacts)
    flat = BM25.build(IDS, TEXTS, k1=0.0)              # k1 = 0: only whether the term is there
    assert len(set(flat.impacts[flat.offsets[flat.terms["fox"]]:][:2])) == 1
    long = ["word " * 50 + f"w{i}" for i in range(3)]
    assert not np.array_equal(BM25.build("abc", long, length="lucene").impacts, BM25.build("abc", long).impacts)


def test_okapi_drops_scores_that_are_not_positive():
    index = BM25.build(["a", "b", "c", "d"], ["red x", "red y", "z u", "v w"], variant="okapi")
    found, _ = index.search(["red", "x"], 4)           # a term in exactly half of the documents: idf 0
    assert (found[0] == -1).all() and ids(index, found[1]) == ["a"]


def test_ties_are_ranked_by_id_as_string_also_at_the_cut():
    index = BM25.build(["9", "10", "b", "a", "é", "z", "1"], ["same words"] * 6 + ["same same other"])
    assert index.doc_ids == ["1", "10", "9", "a", "b", "z", "é"]
    found, scores = index.search(["words"], 4)
    assert ids(index, found[0]) == ["10", "9", "a", "b"] and len(set(scores[0])) == 1
    found, _ = index.search(["same words"], 3)
    assert ids(index, found[0]) == ["10", "9", "a"]


def test_rankings_nest():
    """Top k is the head of top K, whatever the ties at k: true of all k only if the cut obeys the order."""
    texts = some_queries("titles", 20)
    found, scores = lucene_index("titles").search(texts, 400)
    assert (scores[:, 1:] == scores[:, :-1]).mean() > 0.2                    # ties there are
    for k in (1, 2, 7, 50, 399):
        fewer, lower = lucene_index("titles").search(texts, k)
        assert np.array_equal(fewer, found[:, :k]) and np.array_equal(lower, scores[:, :k])


def test_nothing_found():
    found, scores = BM25.build(IDS, TEXTS).search(["", "the and", "purple", "!?", "cat"], 6)
    assert (found[:4] == -1).all() and (scores[:4] == -np.inf).all()
    assert (found[4] >= 0).tolist() == [True] + [False] * 5                  # k above the corpus: the rest is empty
    assert found.dtype == np.int64 and scores.dtype == np.float32
    assert BM25.build(IDS, TEXTS).search([], 3)[0].shape == (0, 3)


def test_a_query_does_not_depend_on_its_batch():
    texts = some_queries("msrd", 40)
    found, scores = index("msrd").search(texts, 100)
    for i in (0, 17, 39):
        alone, score = index("msrd").search([texts[i]], 100)
        assert np.array_equal(alone[0], found[i]) and np.array_equal(score[0], scores[i])
    back, reverse = index("msrd").search(texts[::-1], 100)
    assert np.array_equal(back[::-1], found) and np.array_equal(reverse[::-1], scores)
    words = random.Random(0).sample(texts[0].split(), len(texts[0].split()))
    assert np.array_equal(index("msrd").search([" ".join(words)], 100)[0][0], found[0])


def test_order_of_documents_does_not_matter():
    seen = []
    index = BM25.build(IDS, TEXTS, progress=lambda docs: (seen.append(doc) or doc for doc in docs))
    other = BM25.build(IDS[::-1], TEXTS[::-1])
    assert len(seen) == len(IDS) and index.doc_ids == other.doc_ids == sorted(IDS)
    assert index.terms == other.terms and np.array_equal(index.impacts, other.impacts)


@pytest.mark.parametrize("arguments, options, says", [
    ((["a", "b", "a"], ["x", "y", "z"]), {}, "'a' stands there twice"),
    (([], []), {}, "empty"),
    ((["a"], ["the"]), {}, "no document has a token"),
    ((["a", "b"], ["x"]), {}, "same length"),
    ((["a"], ["x"]), dict(variant="plus"), "variant"),
    ((["a"], ["x"]), dict(length="short"), "length"),
    ((["a"], ["x"]), dict(k1=-1), "k1"),
    ((["a"], ["x"]), dict(b=1.5), "b between"),
])
def test_bad_arguments(arguments, options, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        BM25.build(*arguments, **options)
    with pytest.raises(ValueError, match=says):
        load_or_build(tmp_path / "index", *arguments, **options)
    assert not list(tmp_path.iterdir())


def test_k_must_be_positive():
    with pytest.raises(ValueError, match="k: must be at least 1"):
        BM25.build(IDS, TEXTS).search(["red"], 0)


# --------------------------------------------------------------------------------------------------------- on disk

def test_saved_and_loaded_index_is_the_same(tmp_path):
    index("msrd").save(tmp_path / "deep" / "index")
    loaded = BM25.load(tmp_path / "deep" / "index")
    texts = some_queries("msrd", 30)
    for one, other in zip(index("msrd").search(texts, 50), loaded.search(texts, 50)):
        assert np.array_equal(one, other)
    assert (loaded.doc_ids, loaded.terms) == (index("msrd").doc_ids, index("msrd").terms)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["index"]         # nothing temporary stays


def builds(monkeypatch) -> Counter:
    """Count the calls of BM25.build from here on."""
    count, build = Counter(), BM25.build
    monkeypatch.setattr(BM25, "build", lambda *a, **o: count.update(builds=1) or build(*a, **o))
    return count


def test_cache_is_used_if_and_only_if_it_fits(tmp_path, monkeypatch):
    """One thing changed at a time, and back."""
    def same(index, other):
        return (index.doc_ids == other.doc_ids and index.terms == other.terms
                and np.array_equal(index.impacts, other.impacts))

    long = ["blue " * 51] + TEXTS[1:]
    base = BM25.build(IDS, long)
    for ids_, texts, options in [
            (IDS, ["blue " * 52] + TEXTS[1:], {}), (["d9"] + IDS[1:], long, {}), (IDS + ["d5"], long + ["ant"], {}),
            (IDS, long, dict(b=0.5)), (IDS, long, dict(k1=0.5)), (IDS, long, dict(variant="okapi")),
            (IDS, long, dict(length="lucene"))]:
        fresh = BM25.build(ids_, texts, **options)
        load_or_build(tmp_path / "index", IDS, long)
        with monkeypatch.context() as patch:
            count = builds(patch)
            assert same(load_or_build(tmp_path / "index", IDS, long), base) and count["builds"] == 0
            assert same(load_or_build(tmp_path / "index", ids_, texts, **options), fresh) and count["builds"] == 1
            assert same(load_or_build(tmp_path / "index", ids_, texts, **options), fresh) and count["builds"] == 1
        assert not same(base, fresh)
    load_or_build(tmp_path / "index", IDS, long)
    count = builds(monkeypatch)
    monkeypatch.setattr(module.analyzer, "VERSION", "another")
    load_or_build(tmp_path / "index", IDS, long)
    assert count["builds"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize("name", module._FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "one byte"])
def test_torn_index_is_named_and_built_again(tmp_path, monkeypatch, name, damage):
    whole = load_or_build(tmp_path / "index", IDS, TEXTS)
    path = tmp_path / "index" / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.unlink()
    if damage != "gone":
        path.write_bytes({"cut": data[:len(data) // 2], "empty": b"", "one byte": data}[damage])
    with pytest.raises((ValueError, FileNotFoundError), match="index" if name == "index.json" else name):
        BM25.load(tmp_path / "index")
    count = builds(monkeypatch)
    index = load_or_build(tmp_path / "index", IDS, TEXTS)
    assert count["builds"] == 1 and np.array_equal(index.impacts, whole.impacts)
    assert BM25.load(tmp_path / "index").meta == whole.meta


def test_interrupted_save_leaves_the_old_index(tmp_path, monkeypatch):
    load_or_build(tmp_path / "index", IDS, TEXTS)

    def full_disk(*_, **__):
        raise OSError("no space left on device")
    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        load_or_build(tmp_path / "index", IDS, ["other"] * 4)
    assert BM25.load(tmp_path / "index").terms == BM25.build(IDS, TEXTS).terms
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_no_index_there_and_a_directory_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="index.json"):
        BM25.load(tmp_path / "nowhere")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.tex"):
        load_or_build(tmp_path, IDS, TEXTS)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_many_at_once_never_see_a_mixed_index(tmp_path):
    """Four threads fight over one directory with two corpora; each always gets its own."""
    def work(seed):
        for turn in range(25):
            mine = random.Random(seed + turn).choice(["red", "blue"])
            index = load_or_build(tmp_path / "index", IDS, [f"{mine} w{i}" for i in range(4)])
            found, _ = index.search([mine, "red blue"], 4)
            assert (found >= 0).all() and set(index.terms) == {mine, "w0", "w1", "w2", "w3"}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
