"""Dense retrieval against transformers, float64 numpy and faiss itself; what its directory survives; what a bad encoder or disk is answered with."""
import json
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import BertConfig, BertModel, BertTokenizerFast, RobertaConfig, RobertaModel, RobertaTokenizerFast

from recr1 import train
from recr1.files import WriteError
from recr1.hub import ModelFolderError
from recr1.retrieval import base, dense, encoder
from recr1.retrieval.dense import load_or_build
from recr1.retrieval.encoder import Encoder
from recr1.run import guarded
from tiny import jsonl, refused, write_yaml

WORDS = "red green blue black white lamp chair table shirt kettle guitar camera bicycle for my house and with old new".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def write_encoder(folder, family: str = "bert", seed: int = 0, **overrides) -> str:
    """A tiny encoder with random weights, biases and norms; RoBERTa counts positions from its padding id."""
    shape = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=66) | overrides
    torch.manual_seed(seed)
    if family == "bert":
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS, *("##" + c for c in LETTERS)]
        tokenizer = BertTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=64)
        model = BertModel(BertConfig(vocab_size=len(pieces), **shape))
    else:
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        vocab = {piece: i for i, piece in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
        tokenizer = RobertaTokenizerFast(vocab=vocab, merges=[], model_max_length=64)
        model = RobertaModel(RobertaConfig(vocab_size=len(vocab), pad_token_id=1, **shape))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def some_texts(n: int, seed: int = 0, most: int = 90) -> list[str]:
    """Of 1 to `most` words: some are cut."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, most))) for _ in range(n)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("roberta"), "roberta")


@pytest.fixture(scope="module")
def encode(bert):
    return Encoder(bert, "mean", 64)


def corpus(n: int = 300, seed: int = 0):
    return [f"d{i}" for i in range(n)], some_texts(n, seed)


def plain(folder: str, texts: list[str], pooling: str, most: int) -> np.ndarray:
    """One text at a time, without padding, by transformers alone."""
    from transformers import AutoModel, AutoTokenizer
    tokenizer, model, vectors = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval(), []
    with torch.no_grad():
        for text in texts:
            hidden = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=most)).last_hidden_state[0]
            vector = hidden[0] if pooling == "cls" else hidden.mean(0)
            vectors.append((vector / vector.norm()).numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family, most", [("bert", 64), ("bert", 23), ("roberta", 64), ("roberta", 23)])
def test_vectors_are_transformers_own_whatever_the_batch(family, most, pooling, request, monkeypatch):
    folder, texts = request.getfixturevalue(family), ["", "lamp", *some_texts(70, 1)]
    monkeypatch.setitem(encoder.TOKENS, "cpu", 1024)
    monkeypatch.setattr(encoder, "WINDOW", 50)                     # 72 texts: two windows, several lengths, several batches of a length
    mine = Encoder(folder, pooling, most)
    vectors = mine(texts)
    assert vectors.dtype == np.float32 and np.abs(vectors - plain(folder, texts, pooling, most)).max() < 1e-5
    assert np.array_equal(np.concatenate([mine([text]) for text in texts]), vectors)                  # to the bit
    assert np.array_equal(mine(texts[::-1]), vectors[::-1]) and mine([]).shape == (0, 48)


def test_text_of_the_data_holds_no_control_tokens(bert, roberta):
    for folder, control in ((bert, "[SEP]"), (roberta, "</s>")):
        mine = Encoder(folder, "mean", 64)
        ids = mine.tokenizer(f"lamp{control}chair", split_special_tokens=True)["input_ids"]
        assert ids.count(mine.tokenizer.sep_token_id) == 1
        assert np.abs(mine([f"lamp {control}"]) - mine(["lamp "])).max() > 1e-3
        # as in the line above, the special tokens of the tokenizer itself stand there once
        assert np.abs(mine([f"lamp{control}chair"]) - plain(folder, [f"lamp{control}chair"], "mean", 64)).max() > 1e-4


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
def test_exact_search_ranks_as_float64_does(n):
    rng = np.random.default_rng(n)
    vectors, asked = (rng.standard_normal((m, 40)) for m in (n, 25))
    vectors, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors, asked))
    true = asked @ vectors.T
    vectors, asked = vectors.astype(np.float32), asked.astype(np.float32)
    for nearest in (dense.exact(vectors, torch.device("cpu"))[0], dense.by_torch(vectors, torch.device("cpu"))):
        for k in {1, min(7, n), n}:
            scores, rows = nearest(asked, k)
            assert scores.shape == rows.shape == (25, k) and rows.dtype == np.int64 and scores.dtype == np.float32
            best = -np.sort(-true, 1)[:, :k]
            assert np.abs(scores - best).max() < 1e-6 and np.abs(np.take_along_axis(true, rows, 1) - best).max() < 1e-6
            assert all(len(set(row)) == k for row in rows.tolist())


def test_two_level_top_k_with_ties_and_chunks(monkeypatch):
    monkeypatch.setattr(dense, "SCORES", 3 * 256)                  # three queries at a time
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.standard_normal((10, 8), dtype=np.float32), 20, 0)                        # 200 documents, 20 of each kind
    asked = rng.standard_normal((8, 8), dtype=np.float32)
    for k in (1, 5, 30, 200):
        scores, rows = dense.by_torch(vectors, torch.device("cpu"))(asked, k)
        assert np.allclose(scores, -np.sort(-(asked @ vectors.T), 1)[:, :k], atol=1e-5) and rows.max() < 200
        assert all(len(set(row)) == k for row in rows.tolist())


def test_search_is_the_brute_force_of_its_vectors(encode, tmp_path):
    ids, texts = corpus()
    texts[200:220] = ["red lamp"] * 20                             # equal scores
    queries = ["red lamp", "", "blue chair for my house", "   ", "red lamp", "x" * 500, " ".join(WORDS * 20)]
    index = load_or_build(tmp_path / "i", ids, texts, encode)
    rows, scores = index.search(queries, 50)
    assert rows.shape == scores.shape == (7, 50) and rows.dtype == np.int64 and scores.dtype == np.float32 and index.doc_ids == ids
    for i in (1, 3):                                               # nothing asked, nothing found
        assert (rows[i] == -1).all() and (scores[i] == -np.inf).all()
    true = encode(queries).astype(np.float64) @ encode(texts).astype(np.float64).T
    for i in (0, 2, 4, 5, 6):
        assert np.abs(scores[i] - -np.sort(-true[i])[:50]).max() < 1e-6 and np.abs(true[i, rows[i]] - scores[i]).max() < 1e-6
    assert rows[0, :20].tolist() == list(range(200, 220))          # in the corpus' order
    for i, query in enumerate(queries):                            # whoever else asks
        alone = index.search([query], 50)
        assert np.array_equal(alone[0][0], rows[i]) and np.array_equal(alone[1][0], scores[i])
    # faiss itself, over the same vectors
    flat = faiss.IndexFlatIP(48)
    flat.add(encode(texts))
    theirs = flat.search(encode(queries), 50)
    for i in (2, 5, 6):
        assert np.array_equal(scores[i], theirs[0][i]) and np.array_equal(rows[i], theirs[1][i])


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_k_beyond_the_corpus_and_below_1(encode, index):
    found = load_or_build(None, *corpus(5), encode, index=index)
    rows, scores = found.search(["lamp", "chair"], 8)
    assert (rows[:, 5:] == -1).all() and (scores[:, 5:] == -np.inf).all() and sorted(rows[0, :5]) == list(range(5)) and np.isfinite(scores[:, :5]).all()
    with pytest.raises(ValueError, match="k: must be at least 1"):
        found.search(["lamp"], 0)
    assert found.search([], 3)[0].shape == (0, 3)


def test_prefixes_stand_before_queries_and_documents(encode, bert):
    ids, texts = corpus(20)
    plain_one, e5 = load_or_build(None, ids, texts, encode), load_or_build(None, ids, texts, encode, prefixes=("my ", "old "))
    by_hand = encode(["my lamp"]) @ encode(["old " + text for text in texts]).T
    assert np.allclose(e5.search(["lamp"], 20)[1][0], -np.sort(-by_hand[0]), atol=1e-6)
    assert not np.allclose(e5.search(["lamp"], 20)[1], plain_one.search(["lamp"], 20)[1], atol=1e-4)


def test_hnsw_finds_what_exact_search_finds(tmp_path):
    """4,000 x 96 of a 48-d mixture with noise: hard enough that a short search misses."""
    rng = np.random.default_rng(0)
    centres, to = rng.standard_normal((100, 48)), rng.standard_normal((48, 96))
    vectors, asked = ((centres[rng.integers(0, 100, n)] + rng.standard_normal((n, 48))) @ to + 0.1 * rng.standard_normal((n, 96)) for n in (4000, 100))
    vectors, asked = ((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (vectors, asked))
    true = np.argsort(-(asked @ vectors.T), 1)[:, :100]
    graph = dense._build_graph(vectors)

    def recall(ef):
        return np.mean([len(set(a) & set(b)) / 100 for a, b in zip(true.tolist(), dense._by_graph(graph, ef)(asked, 100)[1].tolist())])
    assert recall(512) >= 0.99 > 0.95 > recall(100)


def test_the_graph_on_disk_answers_as_the_one_in_memory(encode, tmp_path):
    torch.set_num_threads(1)                                       # several threads make another graph each time
    ids, texts = corpus()
    kept, fresh = (load_or_build(where, ids, texts, encode, index="hnsw", ef_search=64) for where in (tmp_path / "i", None))
    assert all(map(np.array_equal, kept.search(texts[:9], 20), fresh.search(texts[:9], 20)))
    assert "efSearch 64" in kept.how and "efConstruction 200" in kept.how and "M 32" in kept.how


def counted(monkeypatch) -> list:
    calls, whole = [], Encoder.windows
    monkeypatch.setattr(Encoder, "windows", lambda self, texts, *more: calls.append(len(texts)) or whole(self, texts, *more))
    return calls


def test_the_directory_is_used_while_it_is_of_this_corpus_and_encoder(bert, tmp_path, monkeypatch):
    """Each change of what decides a vector makes it anew, aloud; a change of what does not, does not."""
    where, (ids, texts), calls, said = tmp_path / "i", corpus(40), counted(monkeypatch), []

    def build(encode=None, texts=texts, **more):
        calls.clear(), said.clear()
        return load_or_build(where, ids, texts, encode or Encoder(bert, "mean", 64), say=said.append, **more)
    build()
    assert calls == [40] and not said
    first = build()
    assert not calls and not said and np.array_equal(first.search(["lamp"], 5)[0], build(prefixes=("", "")).search(["lamp"], 5)[0])
    build(index="hnsw", ef_search=9)
    build(index="hnsw", ef_search=99)
    build(prefixes=("query: ", ""))
    assert not calls and not said
    other = write_encoder(tmp_path / "other", seed=1)
    wider = write_encoder(tmp_path / "wider", hidden_size=32)
    for change, word in ((dict(texts=[*texts[:-1], "lamp"]), "texts"), (dict(encode=Encoder(bert, "cls", 64)), "pooling"), (dict(encode=Encoder(bert, "cls", 32)), "max_length"),
                         (dict(encode=Encoder(other, "cls", 32)), "encoder"), (dict(encode=Encoder(wider, "cls", 32)), "encoder"),
                         (dict(prefixes=("", "passage: ")), "prefix"), (dict(dtype="float16"), "dtype"), (dict(index="hnsw"), "embeddings")):
        build(**change)
        assert len(said) == (2 if change.get("index") else 1) and word in said[-1] and "made anew" in said[0] and str(where) in said[0], (change, said)
    assert load_or_build(where, ids, texts, Encoder(bert, "mean", 64), say=said.append).search(["lamp"], 1)[0].shape == (1, 1)


DAMAGE = dict(cut=lambda p: p.write_bytes(p.read_bytes()[:-7]), flipped=lambda p: p.write_bytes(p.read_bytes()[:-9] + b"\x55" + p.read_bytes()[-8:]),
              empty=lambda p: p.write_bytes(b""), gone=lambda p: p.unlink(), link=lambda p: (p.rename(p.parent.parent.parent / "away"), p.symlink_to("../../away")))


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["embeddings/embeddings.npy", "embeddings/facts.json", "embeddings/manifest.json", "hnsw/hnsw.faiss", "hnsw/facts.json"])
def test_a_torn_directory_is_named_and_made_anew(encode, tmp_path, name, how):
    said, (ids, texts) = [], corpus(30)
    whole = load_or_build(tmp_path / "i", ids, texts, encode, index="hnsw").search(texts, 10)
    DAMAGE[how](tmp_path / "i" / name)
    again = load_or_build(tmp_path / "i", ids, texts, encode, index="hnsw", say=said.append).search(texts, 10)
    assert len(said) == 1 and "is damaged" in said[0] and Path(name).name in said[0] or "manifest.json" in said[0]
    assert all(map(np.array_equal, whole, again))
    load_or_build(tmp_path / "i", ids, texts, encode, index="hnsw", say=lambda text: pytest.fail(text))


def test_an_interrupted_build_leaves_nothing_that_looks_whole(encode, tmp_path, monkeypatch):
    ids, texts = corpus(30)
    monkeypatch.setattr(encoder, "WINDOW", 10)
    real, n = Encoder._embed, []
    monkeypatch.setattr(Encoder, "_embed", lambda self, *a: n.append(1) or (real(self, *a) if len(n) < 4 else sys.exit("killed")))
    with pytest.raises(SystemExit):
        load_or_build(tmp_path / "i", ids, texts, encode)
    assert [p.name for p in (tmp_path / "i").iterdir() if not p.name.startswith(".")] == ["embeddings.partial"]
    monkeypatch.setattr(Encoder, "_embed", real)
    assert len(load_or_build(tmp_path / "i", ids, texts, encode).search(["lamp"], 30)[0][0]) == 30
    assert sorted(p.name for p in (tmp_path / "i").iterdir()) == [".lock", "embeddings"]


def test_a_full_disk_is_one_line(encode, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = load_or_build(tmp_path / "k", *corpus(200), encode).search(["lamp"], 5)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(WriteError, match="cannot write .*embeddings.*: File too large"):
            load_or_build(tmp_path / "i", *corpus(200), encode)
        with pytest.raises(WriteError, match="cannot write .*hnsw"):
            load_or_build(tmp_path / "k", *corpus(200), encode, index="hnsw")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for where in ("i", "k"):
        assert np.array_equal(load_or_build(tmp_path / where, *corpus(200), encode, index="hnsw", say=pytest.fail).search(["lamp"], 5)[0], kept[0])


def test_a_directory_of_something_else_is_left_alone(encode, tmp_path):
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json is not part of a dense index; give the index a directory of its own"):
        load_or_build(tmp_path, *corpus(3), encode)
    assert [p.name for p in tmp_path.iterdir()] == ["index.json"]


def _build_there(folder, where, queue):
    torch.set_num_threads(1)
    said = []
    index = load_or_build(where, *corpus(60), Encoder(folder, "mean", 64), index="hnsw", say=said.append)
    queue.put((index.search(["lamp", "red chair"], 5)[0].tolist(), said, os.stat(Path(where) / "embeddings/embeddings.npy").st_ino))


def test_processes_that_start_together_build_once(bert, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_build_there, args=(bert, tmp_path / "i", queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=240) for _ in workers]
    for worker in workers:
        worker.join()
    assert len({inode for *_, inode in found}) == 1 and all(rows == found[0][0] for rows, *_ in found)
    assert all("waiting" in line for _, said, _ in found for line in said)


def test_bad_corpora_are_refused(encode):
    for ids, texts, why in (([], [], "corpus is empty"), (["a", "a"], ["x", "y"], "'a' stands there twice"), (["a"], ["x", "y"], "same length")):
        with pytest.raises(ValueError, match=why):
            load_or_build(None, ids, texts, encode)


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


@pytest.mark.parametrize("fault, words", [
    (lambda f: (f / "config.json").unlink(), ("config.json", "retriever.encoder")), (lambda f: (f / "config.json").write_text("{"), ("config.json", "not JSON")),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ("no *.safetensors", "save_pretrained")),
    (spoil_weights, ("no encoder could be loaded",)), (lose_a_weight, ("1 are missing", "encoder.layer.1.output.dense.weight")),
    (another_width, ("no encoder could be loaded",)), (not_finite, ("is not finite", "retriever.dtype"))])
def test_a_bad_encoder_is_one_line_that_names_it(tmp_path, fault, words):
    write_encoder(tmp_path / "e")
    fault(tmp_path / "e")
    with pytest.raises(ModelFolderError) as e:
        Encoder(str(tmp_path / "e"), "cls", 64)(["lamp"])
    assert str(tmp_path / "e") in str(e.value) and "\n" not in str(e.value) and all(word in str(e.value) for word in words), str(e.value)


def test_settings_that_the_encoder_cannot_take(bert, roberta, tmp_path):
    for folder in (bert, roberta):                                 # both take 64: one by its positions less the padding's, one by its tokenizer
        with pytest.raises(ModelFolderError, match="set retriever.max_length=64"):
            Encoder(folder, "cls", 65)
    with pytest.raises(ModelFolderError, match="retriever.encoder must be"):
        Encoder(str(tmp_path / "nowhere"))


def test_half_precision_is_near(bert):
    texts = some_texts(20)
    assert 0 < np.abs(Encoder(bert, "mean", 64, "bfloat16")(texts) - Encoder(bert, "mean", 64)(texts)).max() < 0.05


def test_faiss_absent_or_twice_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(base.RetrieverError, match="pip install faiss-cpu"):
        dense.faiss()
    monkeypatch.setitem(sys.modules, "faiss", type(sys)("faiss"))  # what an uninstalled one leaves behind
    with pytest.raises(base.RetrieverError, match="pip uninstall -y faiss-cpu faiss-gpu"):
        dense.faiss()
    monkeypatch.setattr(dense, "_installed", lambda name: True)
    with pytest.raises(base.RetrieverError, match="both installed"):
        dense.faiss()


def dense_yaml(folder, **overrides) -> str:
    settings = {"retriever.kind": "dense", "retriever.encoder": write_encoder(Path(folder) / "encoder"), "retriever.pooling": "mean", "retriever.max_length": 32}
    return write_yaml(folder, **settings | overrides)


def test_a_run_trains_on_it_and_goes_on_to_the_bit(tmp_path, capsys):
    path = dense_yaml(tmp_path, **{"train.steps": 4, "save.every": 2})
    assert guarded(train.main, [path]) == 0
    out = capsys.readouterr().out
    assert "40 x 48, exact, faiss" in out
    rows = jsonl(tmp_path / "run/metrics.jsonl")
    assert any(row["reward_spread"] > 0 for row in rows)
    # from the checkpoint of step 2: other queries are asked together, the rewards stay what they were
    assert guarded(train.main, [path, f"run.dir={tmp_path}/again", "retriever.index=hnsw", f"retriever.index_dir={tmp_path}/hnsw"]) == 0
    assert "efSearch 512" in capsys.readouterr().out
    kept = tmp_path / "run"
    for name in ("summary.json", "eval_after.jsonl"):
        (kept / name).unlink()
    import shutil
    shutil.rmtree(kept / "checkpoints/step_000004"), shutil.rmtree(kept / "model")
    assert guarded(train.main, [path]) == 0
    assert "goes on after step 2" in capsys.readouterr().out

    def values(rows):
        return [{k: row[k] for k in ("step", "reward", "ndcg", "grad_norm")} for row in rows]
    assert values(jsonl(kept / "metrics.jsonl")) == values(rows)


def test_what_is_wrong_with_it_ends_a_run_in_one_line(tmp_path, capsys, monkeypatch):
    path = dense_yaml(tmp_path)
    assert "retriever.encoder" in refused([path, "retriever.encoder=''"], capsys)
    assert "retriever.max_length=64" in refused([path, "retriever.max_length=512"], capsys)
    assert "nowhere" in refused([path, "retriever.encoder=nowhere"], capsys)
    assert "retriever.index" in refused([path, "retriever.index=ivf"], capsys) and "retriever.timeout" in refused([path, "retriever.timeout=5"], capsys)
    assert "retriever.kind" in refused([path, "retriever.kind=sparse", "retriever.encoder=''"], capsys)
    monkeypatch.setattr(dense, "_installed", lambda name: True)
    assert "both installed" in refused([path], capsys)
