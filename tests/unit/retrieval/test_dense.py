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


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("roberta"), "roberta")


@pytest.fixture(scope="module")
def encode(bert):
    return Encoder(bert, "mean", 64)


def plain(folder: str, texts: list[str], pooling: str, most: int) -> np.ndarray:
    """One text at a time, without padding, by transformers alone."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    vectors = []
    with torch.no_grad():
        for text in texts:
            hidden = model(
                **tokenizer(text, return_tensors="pt", truncation=True, max_length=most)
            ).last_hidden_state[0]
            vector = hidden[0] if pooling == "cls" else hidden.mean(0)
            vectors.append((vector / vector.norm()).numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(
    "family, most", [("bert", 64), ("bert", 23), ("roberta", 64), ("roberta", 23)]
)
def test_vectors_are_transformers_own_whatever_the_batch(
    family, most, pooling, request, monkeypatch
):
    folder = request.getfixturevalue(family)
    texts = ["", "lamp", *some_texts(70, 1)]
    monkeypatch.setitem(encoder.TOKENS, "cpu", 1024)
    # 72 texts: two windows, several lengths, several batches of a length
    monkeypatch.setattr(encoder, "WINDOW", 50)
    mine = Encoder(folder, pooling, most)
    vectors = mine(texts)
    assert vectors.dtype == np.float32
    assert np.abs(vectors - plain(folder, texts, pooling, most)).max() < 1e-5
    assert np.array_equal(np.concatenate([mine([text]) for text in texts]), vectors)  # to the bit
    assert np.array_equal(mine(texts[::-1]), vectors[::-1])
    assert mine([]).shape == (0, 48)


def test_text_of_the_data_holds_no_control_tokens(bert, roberta):
    for folder, control in ((bert, "[SEP]"), (roberta, "</s>")):
        mine = Encoder(folder, "mean", 64)
        ids = mine.tokenizer(f"lamp{control}chair", split_special_tokens=True)["input_ids"]
        assert ids.count(mine.tokenizer.sep_token_id) == 1
        assert np.abs(mine([f"lamp {control}"]) - mine(["lamp "])).max() > 1e-3
        # as in the line above, the special tokens of the tokenizer itself stand there once
        assert (
            np.abs(
                mine([f"lamp{control}chair"]) - plain(folder, [f"lamp{control}chair"], "mean", 64)
            ).max()
            > 1e-4
        )


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
def test_exact_search_ranks_as_float64_does(n):
    rng = np.random.default_rng(n)
    vectors, asked = (rng.standard_normal((m, 40)) for m in (n, 25))
    vectors, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors, asked))
    true = asked @ vectors.T
    vectors = vectors.astype(np.float32)
    asked = asked.astype(np.float32)
    for nearest in (
        dense.make_exact_search(vectors, torch.device("cpu"))[0],
        dense.make_torch_search(vectors, torch.device("cpu")),
    ):
        for k in {1, min(7, n), n}:
            scores, rows = nearest(asked, k)
            assert scores.shape == rows.shape == (25, k)
            assert rows.dtype == np.int64
            assert scores.dtype == np.float32
            best = -np.sort(-true, 1)[:, :k]
            assert np.abs(scores - best).max() < 1e-6
            assert np.abs(np.take_along_axis(true, rows, 1) - best).max() < 1e-6
            assert all(len(set(row)) == k for row in rows.tolist())


def test_two_level_top_k_with_ties_and_chunks(monkeypatch):
    monkeypatch.setattr(dense, "SCORES", 3 * 256)  # three queries at a time
    rng = np.random.default_rng(0)
    # 200 documents, 20 of each kind
    vectors = np.repeat(rng.standard_normal((10, 8), dtype=np.float32), 20, 0)
    asked = rng.standard_normal((8, 8), dtype=np.float32)
    for k in (1, 5, 30, 200):
        scores, rows = dense.make_torch_search(vectors, torch.device("cpu"))(asked, k)
        assert np.allclose(scores, -np.sort(-(asked @ vectors.T), 1)[:, :k], atol=1e-5)
        assert rows.max() < 200
        assert all(len(set(row)) == k for row in rows.tolist())


def test_search_is_the_brute_force_of_its_vectors(encode, tmp_path):
    ids, texts = corpus()
    texts[200:220] = ["red lamp"] * 20  # equal scores
    queries = [
        "red lamp",
        "",
        "blue chair for my house",
        "   ",
        "red lamp",
        "x" * 500,
        " ".join(WORDS * 20),
    ]
    index = load_or_build_dense(encode, ids, texts, tmp_path / "i")
    rows, scores = index.search(queries, 50)
    assert rows.shape == scores.shape == (7, 50)
    assert rows.dtype == np.int64
    assert scores.dtype == np.float32
    assert index.doc_ids == ids
    for i in (1, 3):  # nothing asked, nothing found
        assert (rows[i] == -1).all()
        assert (scores[i] == -np.inf).all()
    true = encode(queries).astype(np.float64) @ encode(texts).astype(np.float64).T
    for i in (0, 2, 4, 5, 6):
        assert np.abs(scores[i] - -np.sort(-true[i])[:50]).max() < 1e-6
        assert np.abs(true[i, rows[i]] - scores[i]).max() < 1e-6
    assert rows[0, :20].tolist() == list(range(200, 220))  # in the corpus' order
    for i, query in enumerate(queries):  # whoever else asks
        alone = index.search([query], 50)
        assert np.array_equal(alone[0][0], rows[i])
        assert np.array_equal(alone[1][0], scores[i])
    # faiss itself, over the same vectors
    flat = faiss.IndexFlatIP(48)
    flat.add(encode(texts))
    theirs = flat.search(encode(queries), 50)
    for i in (2, 5, 6):
        assert np.array_equal(scores[i], theirs[0][i])
        assert np.array_equal(rows[i], theirs[1][i])


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_k_beyond_the_corpus_and_below_1(encode, index):
    found = load_or_build_dense(encode, *corpus(5), None, index=index)
    rows, scores = found.search(["lamp", "chair"], 8)
    assert (rows[:, 5:] == -1).all()
    assert (scores[:, 5:] == -np.inf).all()
    assert sorted(rows[0, :5]) == list(range(5))
    assert np.isfinite(scores[:, :5]).all()
    with pytest.raises(ValueError, match="k: must be at least 1"):
        found.search(["lamp"], 0)
    assert found.search([], 3)[0].shape == (0, 3)


def test_prefixes_stand_before_queries_and_documents(encode, bert):
    ids, texts = corpus(20)
    plain_one = load_or_build_dense(encode, ids, texts, None)
    e5 = load_or_build_dense(encode, ids, texts, None, prefixes=("my ", "old "))
    by_hand = encode(["my lamp"]) @ encode(["old " + text for text in texts]).T
    assert np.allclose(e5.search(["lamp"], 20)[1][0], -np.sort(-by_hand[0]), atol=1e-6)
    assert not np.allclose(e5.search(["lamp"], 20)[1], plain_one.search(["lamp"], 20)[1], atol=1e-4)


def test_hnsw_finds_what_exact_search_finds(tmp_path):
    """4,000 x 96 without any structure: the hardest for a graph, a short search misses much."""
    rng = np.random.default_rng(0)
    vectors, asked = (rng.standard_normal((n, 96), np.float32) for n in (4000, 100))
    vectors, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors, asked))
    true = np.argsort(-(asked @ vectors.T), 1)[:, :10]
    graph = dense._build_graph(vectors)

    def recall(ef):
        return np.mean(
            [
                len(set(a) & set(b)) / 10
                for a, b in zip(
                    true.tolist(), dense._make_graph_search(graph, ef)(asked, 10)[1].tolist()
                )
            ]
        )

    assert recall(512) >= 0.97 and recall(10) < recall(30) < 0.95, [
        recall(ef) for ef in (10, 30, 512)
    ]


def test_the_graph_on_disk_answers_as_the_one_in_memory(encode, tmp_path):
    torch.set_num_threads(1)  # several threads make another graph each time
    ids, texts = corpus()
    kept, fresh = (
        load_or_build_dense(encode, ids, texts, where, index="hnsw", ef_search=64)
        for where in (tmp_path / "i", None)
    )
    assert all(map(np.array_equal, kept.search(texts[:9], 20), fresh.search(texts[:9], 20)))
    assert "efSearch 64" in kept.description
    assert "efConstruction 200" in kept.description
    assert "M 32" in kept.description


def test_bad_corpora_are_refused(encode):
    for ids, texts, why in (
        ([], [], "corpus is empty"),
        (["a", "a"], ["x", "y"], "'a' stands there twice"),
        (["a"], ["x", "y"], "same length"),
    ):
        with pytest.raises(ValueError, match=why):
            load_or_build_dense(encode, ids, texts, None)


def spoil_weights(folder: Path):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])


def lose_a_weight(folder: Path):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["encoder.layer.1.output.dense.weight"]
    save_file(state, folder / "model.safetensors", metadata=dict(format="pt"))


def another_width(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(hidden_size=32)))


def not_finite(folder: Path):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state["embeddings.LayerNorm.weight"][:] = float("inf")
    save_file(state, folder / "model.safetensors", metadata=dict(format="pt"))


@pytest.mark.parametrize(
    "fault, words",
    [
        (lambda f: (f / "config.json").unlink(), ("config.json", "retriever.encoder")),
        (lambda f: (f / "config.json").write_text("{"), ("config.json", "not JSON")),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            ("no *.safetensors", "save_pretrained"),
        ),
        (spoil_weights, ("no encoder could be loaded",)),
        (lose_a_weight, ("1 are missing", "encoder.layer.1.output.dense.weight")),
        (another_width, ("no encoder could be loaded",)),
        (not_finite, ("is not finite", "retriever.dtype")),
    ],
)
def test_a_bad_encoder_is_one_line_that_names_it(tmp_path, fault, words):
    write_encoder(tmp_path / "e")
    fault(tmp_path / "e")
    with pytest.raises(ModelFolderError) as e:
        Encoder(str(tmp_path / "e"), "cls", 64)(["lamp"])
    assert (
        str(tmp_path / "e") in str(e.value)
        and "\n" not in str(e.value)
        and all(word in str(e.value) for word in words)
    ), str(e.value)


def test_settings_that_the_encoder_cannot_take(bert, roberta, tmp_path):
    # both take 64: one by its positions less the padding's, one by its tokenizer
    for folder in (bert, roberta):
        with pytest.raises(ModelFolderError, match="set retriever.max_length=64"):
            Encoder(folder, "cls", 65)
    with pytest.raises(ModelFolderError, match="retriever.encoder must be"):
        Encoder(str(tmp_path / "nowhere"))


def test_half_precision_is_near(bert):
    texts = some_texts(20)
    assert (
        0
        < np.abs(
            Encoder(bert, "mean", 64, "bfloat16")(texts) - Encoder(bert, "mean", 64)(texts)
        ).max()
        < 0.05
    )


def test_faiss_absent_or_twice_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(interface.RetrieverError, match="pip install faiss-cpu"):
        dense.import_faiss()
    # what an uninstalled one leaves behind
    monkeypatch.setitem(sys.modules, "faiss", type(sys)("faiss"))
    with pytest.raises(interface.RetrieverError, match="pip uninstall -y faiss-cpu faiss-gpu"):
        dense.import_faiss()
    monkeypatch.setattr(dense, "_is_installed", lambda name: True)
    with pytest.raises(interface.RetrieverError, match="both installed"):
        dense.import_faiss()
