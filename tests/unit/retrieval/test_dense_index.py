"""What a dense index's directory survives, runs that train on one, and the commands over any
retriever.
"""

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.encoders import corpus, write_encoder
from helpers.tiny_world import jsonl, refused, write_yaml

from recr1 import cli, train
from recr1.config import loader as configs
from recr1.retrieval.dense import encoder, searcher as dense
from recr1.retrieval.dense.encoder import Encoder
from recr1.retrieval.dense.searcher import load_or_build_dense
from recr1.training.launch import run_guarded
from recr1.utils.files import WriteError


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def encode(bert):
    return Encoder(bert, "mean", 64)


def record_encoded_texts(monkeypatch) -> list[int]:
    """Return a list that gets the number of texts of each call of Encoder.windows."""
    counts = []
    encode_windows = Encoder.windows

    def record(self, texts, *more):
        counts.append(len(texts))
        return encode_windows(self, texts, *more)

    monkeypatch.setattr(Encoder, "windows", record)
    return counts


def test_the_directory_is_used_while_it_is_of_this_corpus_and_encoder(bert, tmp_path, monkeypatch):
    """Each change of what decides a vector makes it anew, aloud; a change of what does not, does
    not.
    """
    folder = tmp_path / "i"
    ids, texts = corpus(40)
    counts = record_encoded_texts(monkeypatch)
    messages = []

    def build(encode=None, texts=texts, **settings):
        counts.clear()
        messages.clear()
        if encode is None:
            encode = Encoder(bert, "mean", 64)
        return load_or_build_dense(encode, ids, texts, folder, say=messages.append, **settings)

    build()
    assert counts == [40]
    assert not messages

    second = build()
    assert not counts
    assert not messages

    third = build(prefixes=("", ""))
    second_rows, _ = second.search(["lamp"], 5)
    third_rows, _ = third.search(["lamp"], 5)
    assert np.array_equal(second_rows, third_rows)

    build(index="hnsw", ef_search=9)
    build(index="hnsw", ef_search=99)
    build(prefixes=("query: ", ""))
    assert not counts
    assert not messages

    other = write_encoder(tmp_path / "other", seed=1)
    wider = write_encoder(tmp_path / "wider", hidden_size=32)
    changes = [
        (dict(texts=[*texts[:-1], "lamp"]), "texts"),
        (dict(encode=Encoder(bert, "cls", 64)), "pooling"),
        (dict(encode=Encoder(bert, "cls", 32)), "max_length"),
        (dict(encode=Encoder(other, "cls", 32)), "encoder"),
        (dict(encode=Encoder(wider, "cls", 32)), "encoder"),
        (dict(prefixes=("", "passage: ")), "prefix"),
        (dict(encode=Encoder(bert, "mean", 64, "bfloat16")), "dtype"),
        (dict(encode=Encoder(other, "mean", 64), index="hnsw"), "embeddings"),
    ]
    for change, word in changes:
        build(**change)
        num_built = 2 if "index" in change else 1
        assert len(messages) == num_built, change
        assert "made anew" in messages[0]
        assert str(folder) in messages[0]
        assert word in messages[-1]

    rows, _ = build().search(["lamp"], 1)
    assert rows.shape == (1, 1)


def cut_file(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-7])


def flip_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-9] + b"\x55" + data[-8:])


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def remove_file(path: Path) -> None:
    path.unlink()


def replace_by_link(path: Path) -> None:
    top_folder = path.parent.parent.parent
    path.rename(top_folder / "away")
    path.symlink_to("../../away")


DAMAGE = {
    "cut": cut_file,
    "flipped": flip_byte,
    "empty": empty_file,
    "gone": remove_file,
    "link": replace_by_link,
}

DAMAGED_FILES = [
    "embeddings/embeddings.npy",
    "embeddings/facts.json",
    "embeddings/manifest.json",
    "hnsw/hnsw.faiss",
    "hnsw/facts.json",
]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_a_torn_directory_is_named_and_made_anew(encode, tmp_path, name, damage):
    folder = tmp_path / "i"
    ids, texts = corpus(30)
    intact = load_or_build_dense(encode, ids, texts, folder, index="hnsw")
    expected_rows, expected_scores = intact.search(texts, 10)
    damage_file = DAMAGE[damage]
    damage_file(folder / name)

    messages = []
    rebuilt = load_or_build_dense(encode, ids, texts, folder, index="hnsw", say=messages.append)
    rows, scores = rebuilt.search(texts, 10)

    if "manifest.json" not in messages[0]:
        assert len(messages) == 1
        assert "is damaged" in messages[0]
        assert Path(name).name in messages[0]
    assert np.array_equal(rows, expected_rows)
    assert np.array_equal(scores, expected_scores)

    # once is enough: nothing is said any more
    load_or_build_dense(encode, ids, texts, folder, index="hnsw", say=pytest.fail)


def test_an_interrupted_build_leaves_nothing_that_looks_whole(encode, tmp_path, monkeypatch):
    folder = tmp_path / "i"
    ids, texts = corpus(30)
    monkeypatch.setattr(encoder, "WINDOW", 10)
    embed = Encoder._embed
    calls = []

    def embed_or_exit(self, *args):
        calls.append(args)
        if len(calls) == 4:
            sys.exit("killed")
        return embed(self, *args)

    monkeypatch.setattr(Encoder, "_embed", embed_or_exit)
    with pytest.raises(SystemExit):
        load_or_build_dense(encode, ids, texts, folder)
    visible_paths = list(folder.glob("[!.]*"))
    assert visible_paths == [folder / "embeddings.partial"]

    monkeypatch.setattr(Encoder, "_embed", embed)
    searcher = load_or_build_dense(encode, ids, texts, folder)
    rows, _ = searcher.search(["lamp"], 30)
    assert len(rows[0]) == 30
    assert sorted(os.listdir(folder)) == [".lock", "embeddings"]


def test_a_full_disk_is_one_line(encode, tmp_path):
    ids, texts = corpus(200)
    exact = load_or_build_dense(encode, ids, texts, tmp_path / "k")
    expected_rows, _ = exact.search(["lamp"], 5)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(WriteError, match="cannot write .*embeddings.*: File too large"):
            load_or_build_dense(encode, ids, texts, tmp_path / "i")
        with pytest.raises(WriteError, match="cannot write .*hnsw"):
            load_or_build_dense(encode, ids, texts, tmp_path / "k", index="hnsw")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    for name in ("i", "k"):
        folder = tmp_path / name
        graph = load_or_build_dense(encode, ids, texts, folder, index="hnsw", say=pytest.fail)
        rows, _ = graph.search(["lamp"], 5)
        assert np.array_equal(rows, expected_rows)


def test_a_directory_of_something_else_is_left_alone(encode, tmp_path):
    (tmp_path / "index.json").write_text("{}")
    ids, texts = corpus(3)

    message = "index.json is not part of a dense index; give the index a directory of its own"
    with pytest.raises(ValueError, match=message):
        load_or_build_dense(encode, ids, texts, tmp_path)

    assert os.listdir(tmp_path) == ["index.json"]


def build_in_process(encoder_folder, index_folder, queue):
    torch.set_num_threads(1)
    encode = Encoder(encoder_folder, "mean", 64)
    ids, texts = corpus(60)
    messages = []
    searcher = load_or_build_dense(
        encode, ids, texts, index_folder, index="hnsw", say=messages.append
    )
    rows, _ = searcher.search(["lamp", "red chair"], 5)
    inode = os.stat(index_folder / "embeddings/embeddings.npy").st_ino
    queue.put((rows.tolist(), messages, inode))


def test_processes_that_start_together_build_once(bert, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = []
    for _ in range(2):
        arguments = (bert, tmp_path / "i", queue)
        worker = context.Process(target=build_in_process, args=arguments)
        worker.start()
        workers.append(worker)
    results = [queue.get(timeout=240) for _ in workers]
    for worker in workers:
        worker.join()

    first_rows, _, first_inode = results[0]
    for rows, messages, inode in results:
        assert inode == first_inode
        assert rows == first_rows
        for message in messages:
            assert "waiting" in message


def write_dense_yaml(folder, **overrides) -> str:
    settings = {
        "retriever.kind": "dense",
        "retriever.encoder": write_encoder(Path(folder) / "encoder"),
        "retriever.pooling": "mean",
        "retriever.max_length": 32,
    }
    return write_yaml(folder, **settings | overrides)


def select_metrics(rows: list[dict]) -> list[tuple]:
    metrics = []
    for row in rows:
        values = (row["step"], row["reward"], row["ndcg"], row["grad_norm"])
        metrics.append(values)
    return metrics


def test_a_run_trains_on_it_and_goes_on_to_the_bit(tmp_path, capsys):
    path = write_dense_yaml(tmp_path, **{"train.steps": 4, "save.every": 2})
    run_dir = tmp_path / "run"

    assert run_guarded(train.main, [path]) == 0
    assert "40 x 48, exact, faiss" in capsys.readouterr().out
    rows = jsonl(run_dir / "metrics.jsonl")
    assert any(row["reward_std"] > 0 for row in rows)

    hnsw_overrides = ["retriever.index=hnsw", f"retriever.index_dir={tmp_path}/hnsw"]
    assert run_guarded(train.main, [path, f"run.dir={tmp_path}/again", *hnsw_overrides]) == 0
    assert "efSearch 512" in capsys.readouterr().out

    # from the checkpoint of step 2: other queries are asked together, the rewards stay what they
    # were
    (run_dir / "summary.json").unlink()
    (run_dir / "eval_after.jsonl").unlink()
    shutil.rmtree(run_dir / "checkpoints/step_000004")
    shutil.rmtree(run_dir / "model")
    assert run_guarded(train.main, [path]) == 0
    assert "goes on after step 2" in capsys.readouterr().out
    resumed_rows = jsonl(run_dir / "metrics.jsonl")
    assert select_metrics(resumed_rows) == select_metrics(rows)


def test_what_is_wrong_with_it_ends_a_run_in_one_line(tmp_path, capsys, monkeypatch):
    path = write_dense_yaml(tmp_path)

    def refuse(*overrides):
        return refused([path, *overrides], capsys)

    assert "retriever.encoder" in refuse("retriever.encoder=''")
    assert "retriever.max_length=64" in refuse("retriever.max_length=512")
    assert "nowhere" in refuse("retriever.encoder=nowhere")
    assert "retriever.index" in refuse("retriever.index=ivf")
    assert "retriever.timeout" in refuse("retriever.timeout=5")
    assert "retriever.kind" in refuse("retriever.kind=sparse", "retriever.encoder=''")
    monkeypatch.setattr(dense, "_is_installed", lambda name: True)
    assert "both installed" in refuse()


def train_on_ranks(num_ranks: int, config: str, folder: Path) -> list[float]:
    """Train with torchrun on num_ranks processes; return the reward of each step."""
    run_dir = folder / f"run{num_ranks}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_ranks}", "-m", "recr1.train", config]
    command += [f"run.dir={run_dir}", f"retriever.index_dir={folder}/index{num_ranks}"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return [row["reward"] for row in jsonl(run_dir / "metrics.jsonl")]


def test_two_ranks_make_one_index_and_train_as_one_process(tmp_path):
    path = write_dense_yaml(tmp_path, **{"train.steps": 2, "train.eval_every": 0})

    rewards_of_one = train_on_ranks(1, path, tmp_path)
    rewards_of_two = train_on_ranks(2, path, tmp_path)

    assert rewards_of_one == pytest.approx(rewards_of_two, abs=1e-9)
    assert len(rewards_of_one) == 2


def run_command(capsys, *argv) -> str:
    """Return what recr1 prints: stdout where it ends well, else stderr."""
    capsys.readouterr()
    code = run_guarded(cli.main, [str(argument) for argument in argv])
    output = capsys.readouterr()
    if code != 0:
        return output.err
    return output.out


BAD_FLAGS = [
    (["index"], "--index-dir"),
    (["index", "--retriever", "rank_bm25", "--index-dir", "x"], "keeps an index"),
    (["search", "--retriever", "dense", "x"], "retriever.encoder"),
    (["search", "--retriever", "splade", "x"], "retriever.kind"),
]


def test_the_commands_take_any_retriever(bert, tmp_path, capsys):
    data = configs.load_config(write_yaml(tmp_path), []).data
    corpus_flags = ["--corpus", data.corpus]
    dense_flags = [*corpus_flags, "--retriever", "dense", "--encoder", bert]
    dense_flags += ["--max-length", 32, "--index-dir", tmp_path / "i"]

    def run(*argv):
        return run_command(capsys, *argv)

    def evaluate(*flags):
        queries = ["--queries", data.test_queries, "--qrels", data.test_qrels]
        output = run("eval-queries", *flags, *queries, "--metrics", "ndcg@10", "--json")
        last_line = output.splitlines()[-1]
        return json.loads(last_line)["metrics"]["ndcg@10"]

    output = run("index", *dense_flags, "--index", "hnsw", "--ef-search", 77)
    assert output.startswith(f"{tmp_path}/i: 40 documents, ")
    assert "efSearch 77" in output
    assert (tmp_path / "i/hnsw/hnsw.faiss").exists()

    hits = run("search", *dense_flags, "red lamp", "-k", 3).splitlines()
    assert len(hits) == 3
    first_score = float(hits[0].split()[1])
    last_score = float(hits[2].split()[1])
    assert first_score >= last_score
    assert "retriever.pooling" not in hits[0]

    assert 0 <= evaluate(*dense_flags) <= 1
    okapi_flags = ["--k1", 1.5, "--variant", "okapi"]
    bm25_ndcg = evaluate(*corpus_flags, "--retriever", "bm25", *okapi_flags)
    rank_bm25_ndcg = evaluate(*corpus_flags, "--retriever", "rank_bm25", *okapi_flags)
    assert bm25_ndcg == pytest.approx(rank_bm25_ndcg, abs=0.05)
    assert bm25_ndcg > 0.3

    assert "made with another texts" not in run("search", *dense_flags, "lamp")
    assert "made anew" in run("search", *dense_flags, "--pooling", "mean", "lamp")

    for argv, phrase in BAD_FLAGS:
        message = run(*argv, *corpus_flags)
        assert message.startswith("recr1: ")
        assert message.count("\n") == 1
        assert phrase in message
