"""experiments/prepare/plots.py on a catalog of the test's own, and on the bundled one, whose raw
scores were first measured with another BM25 (bm25s).
"""

import gzip
import hashlib
import json
import re

import pytest
from helpers.prepared import corpus, counts, prepare, read, refused, rows

from recr1.data.readers import is_validation, read_teacher
from recr1.retrieval.bm25.analyzer import analyze
from recr1.retrieval.bm25.searcher import BM25Searcher
from recr1.tasks.answer_parser import parse_query
from recr1.tasks.ranking_metrics import compute_ndcg

NUM_FILMS = 120
WORDS = [f"{letter}{vowel}{other}o" for letter in "bdfgk" for vowel in "aeiou" for other in "lmnrt"]


def make_plot(i: int, num_words: int) -> str:
    """Words of a film's own order; the tenth has a capital and stands in no other plot."""
    words = [WORDS[(7 * i + 3 * place) % len(WORDS)] for place in range(num_words)]
    words[9:10] = [f"Zanzi{i}"]
    return " ".join(words)


def write_catalog(folder, **change) -> None:
    """Films 0 to NUM_FILMS - 1, {id: text} of `change` in place of some."""
    folder.mkdir()
    with gzip.open(folder / "corpus.jsonl.gz", "wt", encoding="utf-8") as file:
        for i in range(NUM_FILMS):
            overview = make_plot(i, 8 if i == 3 else 30 + i % 30)
            text = f"{overview} Director: Ann Lee{i} Actors: Bo Genres: drama Tags: 19{i:02}"
            row = dict(id=f"f{i}", title=f"The Lost {WORDS[i % 9].title()}", text=text)
            row["text"] = change.get(row["id"], row["text"])
            file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plots") / "catalog"
    write_catalog(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(catalog):
    return prepare("plots", catalog.parent / "out", "--from", catalog)


def test_the_corpus_has_no_overviews(prepared):
    documents = corpus(prepared)
    assert len(documents) == NUM_FILMS
    assert documents["f7"]["text"] == "Director: Ann Lee7 Actors: Bo Genres: drama Tags: 1907"


def test_a_query_is_the_first_40_words(prepared):
    queries = read(prepared, "train")[0] | read(prepared, "test")[0]
    assert "plot-f3" not in queries  # eight words are too few
    assert len(queries) == NUM_FILMS - 1
    for i in (12, 29):
        expected = make_plot(i, 30 + i % 30).split()[:40]
        assert queries[f"plot-f{i}"]["text"].split() == expected


def test_the_only_relevant_document_is_the_film(prepared):
    for name in ("train", "test"):
        for query_id, gains in read(prepared, name)[1].items():
            assert gains == {query_id.removeprefix("plot-"): 1.0}


def test_the_test_split_is_a_hash_twentieth_of_the_films(prepared):
    expected = set()
    for i in range(NUM_FILMS):
        number = int.from_bytes(hashlib.sha256(f"plotf{i}".encode()).digest())
        if number % 20 == 0 and i != 3:
            expected.add(f"plot-f{i}")
    assert read(prepared, "test")[0].keys() == expected
    assert 0 < len(expected) < NUM_FILMS / 5


def test_the_teacher_has_a_text_for_each_train_query_without_validation(prepared):
    learned = {id for id in read(prepared, "train")[0] if not is_validation(id)}
    held_out = set(read(prepared, "test")[0])
    texts, dropped = read_teacher(
        prepared / "teacher.jsonl", learned, held_out, lambda text, ids: [1]
    )
    assert not dropped
    assert {id for id, *_ in texts} == learned
    assert counts(prepared)["teacher"] == len(texts)


def test_a_teachers_answer_is_the_rare_words_of_the_plot(prepared):
    """Parsed as in training; the word that no other plot has is among them."""
    train = read(prepared, "train")[0]
    for row in rows(prepared / "teacher.jsonl"):
        query, error = parse_query("</think>" + row["text"])
        assert error is None
        words = query.split()
        plot = train[row["id"]]["text"].split()
        assert len(words) <= 12
        assert len(words) >= min(8, len({word for word in plot if len(word) > 2}))
        assert "Zanzi" + row["id"].removeprefix("plot-f") in words
        assert words == sorted(words, key=plot.index)


def test_a_title_can_be_masked(tmp_path):
    """No term of it is left, inflected or not; every other word stays where it was."""
    plot = (
        "Losing a fortune, the losses of Bela's rich house grow while the old man sleeps well today"
    )
    write_catalog(tmp_path / "catalog", f0=f"{plot} Director: Ann")
    out = prepare("plots", tmp_path / "out", "--from", tmp_path / "catalog", "--mask-title")
    queries = read(out, "train")[0] | read(out, "test")[0]
    documents = corpus(out)
    for query_id, row in queries.items():
        title = documents[query_id.removeprefix("plot-")]["title"]
        assert not set(analyze(title)) & set(analyze(row["text"]))
    # "The Lost Balo": neither `the` nor `losing` is a term of it
    assert documents["f0"]["title"] == "The Lost Balo"
    assert queries["plot-f0"]["text"] == plot


def test_a_masked_title_may_stand_in_the_plot(tmp_path):
    plot = "Nobody saw Balo's ship again after the war until one day balo was found at sea in June"
    write_catalog(tmp_path / "catalog", f0=f"{plot} Director: Ann")
    out = prepare("plots", tmp_path / "out", "--from", tmp_path / "catalog", "--mask-title")
    query = (read(out, "train")[0] | read(out, "test")[0])["plot-f0"]["text"]
    assert query == re.sub(r"(Balo's|balo) ", "", plot)


def test_a_plot_that_comes_twice_is_one_query(tmp_path):
    """The second of two equal plots of train goes, and train's where the test has it too."""
    write_catalog(tmp_path / "one")
    first = prepare("plots", tmp_path / "out1", "--from", tmp_path / "one")
    train, test = (list(read(first, name)[0]) for name in ("train", "test"))
    documents = {row["id"]: row["text"] for row in rows(tmp_path / "one/corpus.jsonl.gz")}

    def film(query_id):
        return query_id.removeprefix("plot-")

    change = {film(train[5]): documents[film(train[4])], film(train[9]): documents[film(test[0])]}
    write_catalog(tmp_path / "two", **change)
    second = prepare("plots", tmp_path / "out2", "--from", tmp_path / "two")
    assert list(read(second, "test")[0]) == test
    assert set(train) - set(read(second, "train")[0]) == {train[5], train[9]}
    assert counts(second)["dropped_repeats"] == 2


def test_the_same_command_keeps_the_folder(catalog, prepared):
    before = (prepared / "prepared.json").stat().st_mtime_ns
    prepare("plots", prepared, "--from", catalog)
    assert (prepared / "prepared.json").stat().st_mtime_ns == before


def test_a_file_that_was_touched_is_made_anew(tmp_path, catalog):
    out = prepare("plots", tmp_path / "out", "--from", catalog)
    text = (out / "test.qrels.tsv").read_text()
    (out / "test.qrels.tsv").write_text(text.replace("\t1", "\t2"))
    prepare("plots", out, "--from", catalog)
    assert (out / "test.qrels.tsv").read_text() == text


def test_a_text_without_the_mark_is_refused(tmp_path, capsys):
    write_catalog(tmp_path / "catalog", f7="a text that was changed")
    said = refused(capsys, "plots", tmp_path / "out", "--from", tmp_path / "catalog")
    assert "'f7'" in said
    assert "'Director:'" in said


def test_the_bundled_films(tmp_path):
    out = prepare("plots", tmp_path / "out")
    assert counts(out) == dict(
        documents=9750, train=8201, validation=955, test=458, dropped_repeats=5, teacher=8201
    )
    documents = corpus(out)
    texts = [row["title"] + " " + row["text"] for row in documents.values()]
    searcher = BM25Searcher.build(list(documents), texts)
    queries, qrels = read(out, "test")
    found, _ = searcher.search([row["text"] for row in queries.values()], 100)
    total = 0.0
    for query_id, doc_rows in zip(queries, found):
        ranked = [searcher.doc_ids[row] for row in doc_rows if row >= 0]
        total += compute_ndcg(ranked, qrels[query_id], 100)
    assert total / len(queries) == pytest.approx(0.430, abs=0.001)
