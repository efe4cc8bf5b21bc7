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


def counted(monkeypatch) -> list:
    calls = []
    whole = Encoder.windows
    monkeypatch.setattr(
        Encoder,
        "windows",
        lambda self, texts, *more: calls.append(len(texts)) or whole(self, texts, *more),
    )
    return calls


def test_the_directory_is_used_while_it_is_of_this_corpus_and_encoder(bert, tmp_path, monkeypatch):
    """Each change of what decides a vector makes it anew, aloud; a change of what does not, does
    not.
    """
    where, (ids, texts), calls, said = tmp_path / "i", corpus(40), counted(monkeypatch), []

    def build(encode=None, texts=texts, **more):
        calls.clear(), said.clear()
        return load_or_build_dense(
            encode or Encoder(bert, "mean", 64), ids, texts, where, say=said.append, **more
        )

    build()
    assert calls == [40]
    assert not said
    first = build()
    assert not calls
    assert not said
    assert np.array_equal(
        first.search(["lamp"], 5)[0], build(prefixes=("", "")).search(["lamp"], 5)[0]
    )
    build(index="hnsw", ef_search=9)
    build(index="hnsw", ef_search=99)
    build(prefixes=("query: ", ""))
    assert not calls
    assert not said
    other = write_encoder(tmp_path / "other", seed=1)
    wider = write_encoder(tmp_path / "wider", hidden_size=32)
    for change, word in (
        (dict(texts=[*texts[:-1], "lamp"]), "texts"),
        (dict(encode=Encoder(bert, "cls", 64)), "pooling"),
        (dict(encode=Encoder(bert, "cls", 32)), "max_length"),
        (dict(encode=Encoder(other, "cls", 32)), "encoder"),
        (dict(encode=Encoder(wider, "cls", 32)), "encoder"),
        (dict(prefixes=("", "passage: ")), "prefix"),
        (dict(encode=Encoder(bert, "mean", 64, "bfloat16")), "dtype"),
        (dict(encode=Encoder(other, "mean", 64), index="hnsw"), "embeddings"),
    ):
        build(**change)
        assert (
            len(said) == (2 if change.get("index") else 1)
            and word in said[-1]
            and "made anew" in said[0]
            and str(where) in said[0]
        ), (change, said)
    assert load_or_build_dense(
        Encoder(bert, "mean", 64), ids, texts, where, say=said.append
    ).search(["lamp"], 1)[0].shape == (1, 1)


DAMAGE = dict(
    cut=lambda p: p.write_bytes(p.read_bytes()[:-7]),
    flipped=lambda p: p.write_bytes(p.read_bytes()[:-9] + b"\x55" + p.read_bytes()[-8:]),
    empty=lambda p: p.write_bytes(b""),
    gone=lambda p: p.unlink(),
    link=lambda p: (p.rename(p.parent.parent.parent / "away"), p.symlink_to("../../away")),
)


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(
    "name",
    [
        "embeddings/embeddings.npy",
        "embeddings/facts.json",
        "embeddings/manifest.json",
        "hnsw/hnsw.faiss",
        "hnsw/facts.json",
    ],
)
def test_a_torn_directory_is_named_and_made_anew(encode, tmp_path, name, how):
    said, (ids, texts) = [], corpus(30)
    whole = load_or_build_dense(encode, ids, texts, tmp_path / "i", index="hnsw").search(texts, 10)
    DAMAGE[how](tmp_path / "i" / name)
    again = load_or_build_dense(
        encode, ids, texts, tmp_path / "i", index="hnsw", say=said.append
    ).search(texts, 10)
    assert (
        len(said) == 1
        and "is damaged" in said[0]
        and Path(name).name in said[0]
        or "manifest.json" in said[0]
    )
    assert all(map(np.array_equal, whole, again))
    load_or_build_dense(
        encode, ids, texts, tmp_path / "i", index="hnsw", say=lambda text: pytest.fail(text)
    )


def test_an_interrupted_build_leaves_nothing_that_looks_whole(encode, tmp_path, monkeypatch):
    ids, texts = corpus(30)
    monkeypatch.setattr(encoder, "WINDOW", 10)
    real = Encoder._embed
    n = []
    monkeypatch.setattr(
        Encoder,
        "_embed",
        lambda self, *a: n.append(1) or (real(self, *a) if len(n) < 4 else sys.exit("killed")),
    )
    with pytest.raises(SystemExit):
        load_or_build_dense(encode, ids, texts, tmp_path / "i")
    assert [p.name for p in (tmp_path / "i").iterdir() if not p.name.startswith(".")] == [
        "embeddings.partial"
    ]
    monkeypatch.setattr(Encoder, "_embed", real)
    assert (
        len(load_or_build_dense(encode, ids, texts, tmp_path / "i").search(["lamp"], 30)[0][0])
        == 30
    )
    assert sorted(p.name for p in (tmp_path / "i").iterdir()) == [".lock", "embeddings"]


def test_a_full_disk_is_one_line(encode, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = load_or_build_dense(encode, *corpus(200), tmp_path / "k").search(["lamp"], 5)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(WriteError, match="cannot write .*embeddings.*: File too large"):
            load_or_build_dense(encode, *corpus(200), tmp_path / "i")
        with pytest.raises(WriteError, match="cannot write .*hnsw"):
            load_or_build_dense(encode, *corpus(200), tmp_path / "k", index="hnsw")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for where in ("i", "k"):
        assert np.array_equal(
            load_or_build_dense(
                encode, *corpus(200), tmp_path / where, index="hnsw", say=pytest.fail
            ).search(["lamp"], 5)[0],
            kept[0],
        )


def test_a_directory_of_something_else_is_left_alone(encode, tmp_path):
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match="index.json is not part of a dense index; give the index a directory of its own",
    ):
        load_or_build_dense(encode, *corpus(3), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["index.json"]


def _build_there(folder, where, queue):
    torch.set_num_threads(1)
    said = []
    index = load_or_build_dense(
        Encoder(folder, "mean", 64), *corpus(60), where, index="hnsw", say=said.append
    )
    queue.put(
        (
            index.search(["lamp", "red chair"], 5)[0].tolist(),
            said,
            os.stat(Path(where) / "embeddings/embeddings.npy").st_ino,
        )
    )


def test_processes_that_start_together_build_once(bert, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [
        context.Process(target=_build_there, args=(bert, tmp_path / "i", queue)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=240) for _ in workers]
    for worker in workers:
        worker.join()
    assert len({inode for *_, inode in found}) == 1
    assert all(rows == found[0][0] for rows, *_ in found)
    assert all("waiting" in line for _, said, _ in found for line in said)


def dense_yaml(folder, **overrides) -> str:
    settings = {
        "retriever.kind": "dense",
        "retriever.encoder": write_encoder(Path(folder) / "encoder"),
        "retriever.pooling": "mean",
        "retriever.max_length": 32,
    }
    return write_yaml(folder, **settings | overrides)


def test_a_run_trains_on_it_and_goes_on_to_the_bit(tmp_path, capsys):
    path = dense_yaml(tmp_path, **{"train.steps": 4, "save.every": 2})
    assert run_guarded(train.main, [path]) == 0
    out = capsys.readouterr().out
    assert "40 x 48, exact, faiss" in out
    rows = jsonl(tmp_path / "run/metrics.jsonl")
    assert any(row["reward_std"] > 0 for row in rows)
    # from the checkpoint of step 2: other queries are asked together, the rewards stay what they
    # were
    assert (
        run_guarded(
            train.main,
            [
                path,
                f"run.dir={tmp_path}/again",
                "retriever.index=hnsw",
                f"retriever.index_dir={tmp_path}/hnsw",
            ],
        )
        == 0
    )
    assert "efSearch 512" in capsys.readouterr().out
    kept = tmp_path / "run"
    for name in ("summary.json", "eval_after.jsonl"):
        (kept / name).unlink()
    shutil.rmtree(kept / "checkpoints/step_000004"), shutil.rmtree(kept / "model")
    assert run_guarded(train.main, [path]) == 0
    assert "goes on after step 2" in capsys.readouterr().out

    def values(rows):
        return [{k: row[k] for k in ("step", "reward", "ndcg", "grad_norm")} for row in rows]

    assert values(jsonl(kept / "metrics.jsonl")) == values(rows)


def test_what_is_wrong_with_it_ends_a_run_in_one_line(tmp_path, capsys, monkeypatch):
    path = dense_yaml(tmp_path)
    assert "retriever.encoder" in refused([path, "retriever.encoder=''"], capsys)
    assert "retriever.max_length=64" in refused([path, "retriever.max_length=512"], capsys)
    assert "nowhere" in refused([path, "retriever.encoder=nowhere"], capsys)
    assert "retriever.index" in refused([path, "retriever.index=ivf"], capsys)
    assert "retriever.timeout" in refused([path, "retriever.timeout=5"], capsys)
    assert "retriever.kind" in refused(
        [path, "retriever.kind=sparse", "retriever.encoder=''"], capsys
    )
    monkeypatch.setattr(dense, "_is_installed", lambda name: True)
    assert "both installed" in refused([path], capsys)


def test_two_ranks_make_one_index_and_train_as_one_process(tmp_path):
    path = dense_yaml(tmp_path, **{"train.steps": 2, "train.eval_every": 0})
    out = {}
    for n in (1, 2):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={n}",
                "-m",
                "recr1.train",
                path,
                f"run.dir={tmp_path}/run{n}",
                f"retriever.index_dir={tmp_path}/index{n}",
            ],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        out[n] = [row["reward"] for row in jsonl(tmp_path / f"run{n}/metrics.jsonl")]
    assert out[1] == pytest.approx(out[2], abs=1e-9)
    assert len(out[1]) == 2


def test_the_commands_take_any_retriever(bert, tmp_path, capsys):
    world = configs.load_config(write_yaml(tmp_path), []).data

    def run(*argv):
        capsys.readouterr()
        code = run_guarded(cli.main, [str(a) for a in argv])
        found = capsys.readouterr()
        return found.out if not code else found.err

    flags = [
        "--corpus",
        world.corpus,
        "--retriever",
        "dense",
        "--encoder",
        bert,
        "--max-length",
        32,
        "--index-dir",
        tmp_path / "i",
    ]
    said = run("index", *flags, "--index", "hnsw", "--ef-search", 77)
    assert said.startswith(f"{tmp_path}/i: 40 documents, ")
    assert "efSearch 77" in said
    assert (tmp_path / "i/hnsw/hnsw.faiss").exists()
    hits = run("search", *flags, "red lamp", "-k", 3).splitlines()
    assert len(hits) == 3
    assert float(hits[0].split()[1]) >= float(hits[2].split()[1])
    assert "retriever.pooling" not in hits[0]
    judged = [
        "--queries",
        world.test_queries,
        "--qrels",
        world.test_qrels,
        "--metrics",
        "ndcg@10",
        "--json",
    ]
    assert (
        0
        <= json.loads(run("eval-queries", *flags, *judged).splitlines()[-1])["metrics"]["ndcg@10"]
        <= 1
    )
    two = [
        json.loads(
            run(
                "eval-queries",
                "--corpus",
                world.corpus,
                "--retriever",
                kind,
                "--k1",
                1.5,
                "--variant",
                "okapi",
                *judged,
            ).splitlines()[-1]
        )["metrics"]
        for kind in ("bm25", "rank_bm25")
    ]
    assert two[0]["ndcg@10"] == pytest.approx(two[1]["ndcg@10"], abs=0.05)
    assert two[0]["ndcg@10"] > 0.3
    assert "made with another texts" not in run("search", *flags, "lamp")
    assert "made anew" in run("search", *flags, "--pooling", "mean", "lamp")
    for argv, why in (
        (("index", "--corpus", world.corpus), "--index-dir"),
        (
            ("index", "--corpus", world.corpus, "--retriever", "rank_bm25", "--index-dir", "x"),
            "keeps an index",
        ),
        (("search", "--corpus", world.corpus, "--retriever", "dense", "x"), "retriever.encoder"),
        (("search", "--corpus", world.corpus, "--retriever", "splade", "x"), "retriever.kind"),
    ):
        said = run(*argv)
        assert said.startswith("recr1: ") and said.count("\n") == 1 and why in said, said
