"""Dense retrieval against transformers, float64 numpy and faiss itself; bad encoders; no faiss."""

import json
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from helpers.encoders import WORDS, corpus, some_texts, write_encoder

from recr1.retrieval import interface
from recr1.retrieval.dense import encoder, searcher as dense
from recr1.retrieval.dense.encoder import Encoder
from recr1.retrieval.dense.searcher import load_or_build_dense
from recr1.utils.hf_hub import ModelFolderError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("roberta"), "roberta")


@pytest.fixture(scope="module")
def encode(bert):
    return Encoder(bert, "mean", 64)


def encode_by_transformers(
    folder: str, texts: list[str], pooling: str, max_length: int
) -> np.ndarray:
    """Encode one text at a time, without padding, by transformers alone."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    vectors = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length)
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state[0]
        if pooling == "cls":
            vector = hidden[0]
        else:
            vector = hidden.mean(0)
        vector = vector / vector.norm()
        vectors.append(vector.numpy())
    return np.stack(vectors)


def draw_unit_vectors(rng, n: int, width: int, dtype=np.float64) -> np.ndarray:
    vectors = rng.standard_normal((n, width), dtype)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / norms


def sort_descending(scores: np.ndarray) -> np.ndarray:
    """Sort each row of scores, the highest first."""
    return -np.sort(-scores, axis=-1)


FAMILIES = [
    ("bert", 64),
    ("bert", 23),
    ("roberta", 64),
    ("roberta", 23),
]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family, max_length", FAMILIES)
def test_vectors_are_transformers_own_whatever_the_batch(
    family, max_length, pooling, request, monkeypatch
):
    folder = request.getfixturevalue(family)
    # 72 texts: two windows, several lengths, several batches of a length
    texts = ["", "lamp", *some_texts(70, 1)]
    monkeypatch.setitem(encoder.TOKENS, "cpu", 1024)
    monkeypatch.setattr(encoder, "WINDOW", 50)
    encode = Encoder(folder, pooling, max_length)

    vectors = encode(texts)

    assert vectors.dtype == np.float32
    expected = encode_by_transformers(folder, texts, pooling, max_length)
    assert np.abs(vectors - expected).max() < 1e-5

    # to the bit
    vectors_alone = [encode([text]) for text in texts]
    assert np.array_equal(np.concatenate(vectors_alone), vectors)
    reversed_vectors = encode(texts[::-1])
    assert np.array_equal(reversed_vectors, vectors[::-1])

    assert encode([]).shape == (0, 48)


def test_text_of_the_data_holds_no_control_tokens(bert, roberta):
    for folder, control in ((bert, "[SEP]"), (roberta, "</s>")):
        encode = Encoder(folder, "mean", 64)
        text = f"lamp{control}chair"

        ids = encode.tokenizer(text, split_special_tokens=True)["input_ids"]
        assert ids.count(encode.tokenizer.sep_token_id) == 1

        with_control = encode([f"lamp {control}"])
        without_control = encode(["lamp "])
        assert np.abs(with_control - without_control).max() > 1e-3

        # as in the line above, the special tokens of the tokenizer itself stand there once
        as_control = encode_by_transformers(folder, [text], "mean", 64)
        assert np.abs(encode([text]) - as_control).max() > 1e-4


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
def test_exact_search_ranks_as_float64_does(n):
    rng = np.random.default_rng(n)
    vectors = draw_unit_vectors(rng, n, 40)
    queries = draw_unit_vectors(rng, 25, 40)
    true_scores = queries @ vectors.T
    vectors = vectors.astype(np.float32)
    queries = queries.astype(np.float32)
    exact_search, _ = dense.make_exact_search(vectors, CPU)
    torch_search = dense.make_torch_search(vectors, CPU)

    for search in (exact_search, torch_search):
        for k in {1, min(7, n), n}:
            scores, rows = search(queries, k)

            assert scores.shape == (25, k)
            assert rows.shape == (25, k)
            assert rows.dtype == np.int64
            assert scores.dtype == np.float32
            best_scores = sort_descending(true_scores)[:, :k]
            assert np.abs(scores - best_scores).max() < 1e-6
            scores_of_rows = np.take_along_axis(true_scores, rows, 1)
            assert np.abs(scores_of_rows - best_scores).max() < 1e-6
            for row in rows.tolist():
                assert len(set(row)) == k


def test_two_level_top_k_with_ties_and_chunks(monkeypatch):
    monkeypatch.setattr(dense, "SCORES", 3 * 256)  # three queries at a time
    rng = np.random.default_rng(0)
    # 200 documents, 20 of each kind
    kinds = rng.standard_normal((10, 8), dtype=np.float32)
    vectors = np.repeat(kinds, 20, axis=0)
    queries = rng.standard_normal((8, 8), dtype=np.float32)
    sorted_scores = sort_descending(queries @ vectors.T)
    search = dense.make_torch_search(vectors, CPU)

    for k in (1, 5, 30, 200):
        scores, rows = search(queries, k)

        assert np.allclose(scores, sorted_scores[:, :k], atol=1e-5)
        assert rows.max() < 200
        for row in rows.tolist():
            assert len(set(row)) == k


def test_search_is_the_brute_force_of_its_vectors(encode, tmp_path):
    ids, texts = corpus()
    texts[200:220] = ["red lamp"] * 20  # equal scores
    long_query = " ".join(WORDS * 20)
    # 1 and 3 ask nothing
    queries = ["red lamp", "", "blue chair for my house", "   ", "red lamp", "x" * 500, long_query]
    index = load_or_build_dense(encode, ids, texts, tmp_path / "i")

    rows, scores = index.search(queries, 50)

    assert rows.shape == (7, 50)
    assert scores.shape == (7, 50)
    assert rows.dtype == np.int64
    assert scores.dtype == np.float32
    assert index.doc_ids == ids
    for i in (1, 3):
        assert (rows[i] == -1).all()
        assert (scores[i] == -np.inf).all()

    document_vectors = encode(texts)
    query_vectors = encode(queries)
    wide_queries = query_vectors.astype(np.float64)
    wide_documents = document_vectors.astype(np.float64)
    true_scores = wide_queries @ wide_documents.T
    for i in (0, 2, 4, 5, 6):
        best_scores = sort_descending(true_scores[i])[:50]
        assert np.abs(scores[i] - best_scores).max() < 1e-6
        scores_of_rows = true_scores[i, rows[i]]
        assert np.abs(scores_of_rows - scores[i]).max() < 1e-6
    first_rows = rows[0, :20].tolist()
    assert first_rows == list(range(200, 220))  # in the corpus' order

    # whoever else asks
    for i, query in enumerate(queries):
        rows_alone, scores_alone = index.search([query], 50)
        assert np.array_equal(rows_alone[0], rows[i])
        assert np.array_equal(scores_alone[0], scores[i])

    # faiss itself, over the same vectors
    flat = faiss.IndexFlatIP(48)
    flat.add(document_vectors)
    faiss_scores, faiss_rows = flat.search(query_vectors, 50)
    for i in (2, 5, 6):
        assert np.array_equal(scores[i], faiss_scores[i])
        assert np.array_equal(rows[i], faiss_rows[i])


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_k_beyond_the_corpus_and_below_1(encode, index):
    ids, texts = corpus(5)
    searcher = load_or_build_dense(encode, ids, texts, None, index=index)

    rows, scores = searcher.search(["lamp", "chair"], 8)

    assert (rows[:, 5:] == -1).all()
    assert (scores[:, 5:] == -np.inf).all()
    assert sorted(rows[0, :5]) == list(range(5))
    assert np.isfinite(scores[:, :5]).all()
    with pytest.raises(ValueError, match="k: must be at least 1"):
        searcher.search(["lamp"], 0)
    no_rows, _ = searcher.search([], 3)
    assert no_rows.shape == (0, 3)


def test_prefixes_stand_before_queries_and_documents(encode, bert):
    ids, texts = corpus(20)
    plain = load_or_build_dense(encode, ids, texts, None)
    prefixed = load_or_build_dense(encode, ids, texts, None, prefixes=("my ", "old "))

    _, plain_scores = plain.search(["lamp"], 20)
    _, prefixed_scores = prefixed.search(["lamp"], 20)

    prefixed_texts = ["old " + text for text in texts]
    scores_by_hand = encode(["my lamp"]) @ encode(prefixed_texts).T
    assert np.allclose(prefixed_scores, sort_descending(scores_by_hand), atol=1e-6)
    assert not np.allclose(prefixed_scores, plain_scores, atol=1e-4)


def measure_recall(rows: np.ndarray, true_rows: np.ndarray) -> float:
    """Return the mean share of true_rows (Q, k) that are among rows (Q, k), whatever the order."""
    k = true_rows.shape[1]
    recalls = []
    for row, true_row in zip(rows.tolist(), true_rows.tolist()):
        hits = set(row) & set(true_row)
        recalls.append(len(hits) / k)
    return np.mean(recalls)


def test_hnsw_finds_what_exact_search_finds(tmp_path):
    """4,000 x 96 without any structure: the hardest for a graph, a short search misses much."""
    rng = np.random.default_rng(0)
    vectors = draw_unit_vectors(rng, 4000, 96, np.float32)
    queries = draw_unit_vectors(rng, 100, 96, np.float32)
    scores = queries @ vectors.T
    true_rows = np.argsort(-scores, axis=1)[:, :10]
    graph = dense._build_graph(vectors)

    recall = {}
    for ef in (10, 30, 512):
        search = dense._make_graph_search(graph, ef)
        _, rows = search(queries, 10)
        recall[ef] = measure_recall(rows, true_rows)

    assert recall[512] >= 0.97, recall
    assert recall[30] < 0.95, recall
    assert recall[10] < recall[30], recall


def test_the_graph_on_disk_answers_as_the_one_in_memory(encode, tmp_path):
    torch.set_num_threads(1)  # several threads make another graph each time
    ids, texts = corpus()
    settings = dict(index="hnsw", ef_search=64)
    on_disk = load_or_build_dense(encode, ids, texts, tmp_path / "i", **settings)
    in_memory = load_or_build_dense(encode, ids, texts, None, **settings)

    rows, scores = on_disk.search(texts[:9], 20)
    expected_rows, expected_scores = in_memory.search(texts[:9], 20)

    assert np.array_equal(rows, expected_rows)
    assert np.array_equal(scores, expected_scores)
    assert "efSearch 64" in on_disk.description
    assert "efConstruction 200" in on_disk.description
    assert "M 32" in on_disk.description


BAD_CORPORA = [
    ([], [], "corpus is empty"),
    (["a", "a"], ["x", "y"], "'a' stands there twice"),
    (["a"], ["x", "y"], "same length"),
]


def test_bad_corpora_are_refused(encode):
    for ids, texts, message in BAD_CORPORA:
        with pytest.raises(ValueError, match=message):
            load_or_build_dense(encode, ids, texts, None)


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def rename_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-100])


def remove_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    state = load_file(path)
    del state["encoder.layer.1.output.dense.weight"]
    save_file(state, path, metadata=dict(format="pt"))


def change_width(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["hidden_size"] = 32
    path.write_text(json.dumps(config))


def set_infinite_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    state = load_file(path)
    state["embeddings.LayerNorm.weight"][:] = float("inf")
    save_file(state, path, metadata=dict(format="pt"))


BAD_ENCODERS = [
    (remove_config, ("config.json", "retriever.encoder")),
    (break_config, ("config.json", "not JSON")),
    (rename_weights, ("no *.safetensors", "save_pretrained")),
    (cut_weights, ("no encoder could be loaded",)),
    (remove_a_weight, ("1 are missing", "encoder.layer.1.output.dense.weight")),
    (change_width, ("no encoder could be loaded",)),
    (set_infinite_weights, ("is not finite", "retriever.dtype")),
]


@pytest.mark.parametrize("damage, phrases", BAD_ENCODERS)
def test_a_bad_encoder_is_one_line_that_names_it(tmp_path, damage, phrases):
    folder = tmp_path / "e"
    write_encoder(folder)
    damage(folder)

    with pytest.raises(ModelFolderError) as error:
        Encoder(str(folder), "cls", 64)(["lamp"])

    message = str(error.value)
    assert str(folder) in message
    assert "\n" not in message
    for phrase in phrases:
        assert phrase in message


def test_settings_that_the_encoder_cannot_take(bert, roberta, tmp_path):
    # both take 64: one by its positions less the padding's, one by its tokenizer
    for folder in (bert, roberta):
        with pytest.raises(ModelFolderError, match="set retriever.max_length=64"):
            Encoder(folder, "cls", 65)
    with pytest.raises(ModelFolderError, match="retriever.encoder must be"):
        Encoder(str(tmp_path / "nowhere"))


def test_half_precision_is_near(bert):
    texts = some_texts(20)
    half_vectors = Encoder(bert, "mean", 64, "bfloat16")(texts)
    vectors = Encoder(bert, "mean", 64)(texts)

    largest_difference = np.abs(half_vectors - vectors).max()

    assert 0 < largest_difference < 0.05


def test_faiss_absent_or_twice_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(interface.RetrieverError, match="pip install faiss-cpu"):
        dense.import_faiss()

    # what an uninstalled one leaves behind
    empty_module = type(sys)("faiss")
    monkeypatch.setitem(sys.modules, "faiss", empty_module)
    with pytest.raises(interface.RetrieverError, match="pip uninstall -y faiss-cpu faiss-gpu"):
        dense.import_faiss()

    monkeypatch.setattr(dense, "_is_installed", lambda name: True)
    with pytest.raises(interface.RetrieverError, match="both installed"):
        dense.import_faiss()
