"""The index on disk: made from a corpus file, mapped, shared, refused; and what happens with broken
corpora, files and processes.
"""

import gzip
import json
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from recr1.data.readers import DataError
from recr1.retrieval.bm25 import corpus_tokenizer, index as module
from recr1.retrieval.bm25.analyzer import analyze
from recr1.retrieval.bm25.impacts import BM25Parameters
from recr1.retrieval.bm25.index import FILES, BM25Index, IndexRefused
from recr1.retrieval.bm25.searcher import BM25Searcher, load_or_build_bm25
from recr1.retrieval.bm25.string_table import StringTable

DATA = Path(__file__).parents[3] / "experiments" / "data"
MSRD = DATA / "msrd" / "corpus.jsonl.gz"
# the last has no token at all
DOCS = {"d3": "red fox", "d1": "red red dog", "d2": "blue fox fox and a cat", "d4": "the"}


def write(path: Path, docs: dict[str, str], *more: bytes) -> Path:
    lines = [json.dumps(dict(id=doc_id, title=text)).encode() for doc_id, text in docs.items()]
    data = b"".join(line + b"\n" for line in (*lines, *more))
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write(tmp_path / "corpus.jsonl", DOCS)


def same(one: BM25Index, other: BM25Index) -> bool:
    return (list(one.doc_ids), list(one.terms)) == (list(other.doc_ids), list(other.terms)) and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("offsets", "docs", "impacts")
    )


def ids(index: BM25Searcher, query: str, k: int = 10) -> list[str]:
    return [index.doc_ids[row] for row in index.search([query], k)[0][0] if row >= 0]


# -------------------------------------------------------------------------------------------- built


def test_file_plain_or_packed_gives_the_index_of_its_texts(tmp_path, corpus):
    want = BM25Index.of_texts(list(DOCS), list(DOCS.values()), BM25Parameters())
    packed = write(tmp_path / "corpus.jsonl.gz", DOCS)
    for path in (corpus, packed):
        for numba in (False, True):
            assert same(BM25Index.of_file(path, BM25Parameters(), numba=numba), want)
    meta = BM25Index.of_file(packed, BM25Parameters(b=0.5)).meta
    assert (meta["documents"], meta["tokens"], meta["b"], meta["dropped"]) == (4, 9, 0.5, [0])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_worker_processes_give_the_same_in_the_same_order(processes):
    rng = random.Random(processes)
    chunks = [
        [
            " ".join(
                rng.choices(
                    ["red", "running", "İstanbul", "the", "x" * 300, "\ud800"], k=rng.randint(0, 9)
                )
            )
            for _ in range(rng.randint(0, 5))
        ]
        for _ in range(30)
    ]
    found = list(corpus_tokenizer.tokenize_chunks(iter(chunks), processes))
    assert [[terms[i] for i in numbers] for terms, numbers, _ in found] == [
        [t for text in chunk for t in analyze(text)] for chunk in chunks
    ]
    assert [list(lengths) for _, _, lengths in found] == [
        [len(analyze(text)) for text in chunk] for chunk in chunks
    ]


def test_worker_that_is_killed_is_one_clear_error():
    others = children()  # of tests before this one

    def chunks():
        for i in range(1000):
            if i == 20:
                for pid in set(children()) - set(others):
                    os.kill(pid, signal.SIGKILL)
            yield ["red fox"]

    with pytest.raises(corpus_tokenizer.WorkerLost, match="analyses the corpus has ended"):
        list(corpus_tokenizer.tokenize_chunks(chunks(), 2))
    assert set(children()) <= set(others)


def children() -> list[int]:
    return [
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]


def test_strings():
    words = sorted(["", "a", "aé", "z", "\ud800", "😀", "ﬀ"])
    strings = StringTable.of(words)
    assert list(strings) == words
    assert strings[-1] == words[-1]
    assert strings[1:3] == words[1:3]
    assert len(strings) == 7
    assert [strings.find(word) for word in words] == list(range(7))
    assert strings.find("b") == strings.find("\U0010ffff") == -1
    with pytest.raises(IndexError):
        strings[7]


# ------------------------------------------------------------------------------------------- faults


def test_bad_line(tmp_path):
    path = write(tmp_path / "corpus.jsonl", DOCS, b'{"id": "d5"', b'{"id": "d6", "title": "green"}')
    with pytest.raises(DataError, match=r"corpus.jsonl:5: not JSON"):
        load_or_build_bm25(tmp_path / "index", path)
    assert not (tmp_path / "index").exists()
    index = load_or_build_bm25(tmp_path / "index", path, on_bad_line="drop")
    assert ids(index, "green") == ["d6"]
    assert index.index.meta["dropped"][0] == 1
    assert ":5: not JSON" in index.index.meta["dropped"][1]
    with pytest.raises(
        IndexRefused,
        match=r"1 bad lines were left out of this index, first: .*:5: not JSON.*mend the corpus",
    ):
        load_or_build_bm25(tmp_path / "index", path)  # it was made under another rule


def test_id_twice(tmp_path):
    path = write(tmp_path / "corpus.jsonl", DOCS, b'{"id": "d1", "title": "green"}')
    with pytest.raises(DataError, match="corpus.jsonl:5: id 'd1' came before"):
        load_or_build_bm25(tmp_path / "index", path)
    assert ids(load_or_build_bm25(tmp_path / "index", path, on_bad_line="drop"), "dog green") == [
        "d1"
    ]


def test_document_without_text_and_without_tokens(tmp_path, corpus):
    path = write(tmp_path / "empty.jsonl", DOCS, b'{"id": "d5", "title": "", "text": " "}')
    with pytest.raises(DataError, match="empty.jsonl:5: neither 'title' nor 'text' says anything"):
        load_or_build_bm25(tmp_path / "index", path)
    index = load_or_build_bm25(tmp_path / "index", corpus)  # d4 is "the": kept, never found
    assert "d4" in list(index.doc_ids)
    assert "d4" not in ids(index, "the red fox dog blue cat")


def test_line_of_ten_megabytes(tmp_path):
    path = write(tmp_path / "corpus.jsonl", DOCS | {"long": "verylong " * 1_200_000})
    index = load_or_build_bm25(tmp_path / "index", path)
    assert ids(index, "verylong") == ["long"]
    assert ids(index, "fox") == ["d2", "d3"]


@pytest.mark.parametrize(
    "docs, says",
    [({}, "the file is empty"), ({"a": "the", "b": "and of"}, "no document has a token")],
)
def test_empty_corpus(tmp_path, docs, says):
    with pytest.raises(ValueError, match=says):
        load_or_build_bm25(tmp_path / "index", write(tmp_path / "corpus.jsonl", docs))
    with pytest.raises(DataError, match="nowhere.jsonl: no such file"):
        load_or_build_bm25(tmp_path / "index", tmp_path / "nowhere.jsonl")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("scorer", ["torch", "numba"])
def test_odd_queries(corpus, tmp_path, scorer):
    index = load_or_build_bm25(tmp_path / "index", corpus, scorer=scorer)
    long = " ".join(f"w{i}" for i in range(9_997)) + " red fox fox"
    rows, scores = index.search(["", "zyxt", "the", long, "red fox fox"], 6)
    assert rows.shape == (5, 6)
    assert (rows[:3] == -1).all()
    assert (scores[:3] == -np.inf).all()
    assert np.array_equal(rows[3], rows[4])
    assert np.array_equal(scores[3], scores[4])
    # k above the corpus: the rest is empty
    assert (rows[4] >= 0).tolist() == [True] * 3 + [False] * 3
    everything = " ".join(f"w{i} " * 2 for i in range(10_000))
    many = load_or_build_bm25(
        tmp_path / "many",
        write(tmp_path / "many.jsonl", {f"d{i}": f"w{i}" for i in range(10_000)}),
        scorer=scorer,
    )
    assert (many.search([everything], 10_000)[0] >= 0).all()  # 10,000 terms, each in the index
    with pytest.raises(ValueError, match="k: must be at least 1, got 0"):
        index.search(["red"], 0)


# --------------------------------------------------------------------------------- kept and refused


def test_saved_and_loaded_index_is_the_same(tmp_path):
    built = load_or_build_bm25(tmp_path / "deep" / "index", MSRD)
    memory = BM25Searcher(BM25Index.of_file(MSRD, BM25Parameters()))
    assert same(built.index, memory.index)
    assert built.index.meta == memory.index.meta
    texts = ["star wars", "the lord of the rings full movie", "amélie"]
    for one, other in zip(built.search(texts, 50), memory.search(texts, 50)):
        assert np.array_equal(one, other)
    # nothing temporary stays
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["index"]


def test_index_there_is_used_and_not_made_again(tmp_path, corpus, monkeypatch):
    load_or_build_bm25(tmp_path / "index", corpus)
    monkeypatch.setattr(BM25Index, "of_file", None)
    assert ids(load_or_build_bm25(tmp_path / "index", corpus), "dog") == ["d1"]


@pytest.mark.parametrize(
    "change, says",
    [
        (
            dict(b=0.5),
            "b is 0.5 here, 0.75 in the index; make the index anew: "
            "recr1 index --corpus {0}/corpus.jsonl --index-dir {0}/index --b 0.5",
        ),
        (dict(k1=0.5), "k1 is 0.5 here, 1.2 in the index"),
        (dict(variant="okapi"), "variant is okapi here, lucene in the index"),
        (dict(length="lucene"), "length is lucene here, exact in the index"),
        ("analyzer", "analyzer is another here"),
        (
            "corpus",
            "corpus has changed since the index was made, or is another one; "
            "make the index anew: recr1 index --corpus",
        ),
    ],
)
def test_stale_index_is_refused_with_the_command_that_makes_it_anew(
    tmp_path, corpus, monkeypatch, change, says
):
    load_or_build_bm25(tmp_path / "index", corpus)
    if change == "corpus":
        write(corpus, DOCS | {"d1": "red red cat"})
    elif change == "analyzer":
        monkeypatch.setattr(module.analyzer, "ANALYZER_VERSION", "another")
    with pytest.raises(IndexRefused) as refused:
        load_or_build_bm25(
            tmp_path / "index", corpus, **(change if isinstance(change, dict) else {})
        )
    assert says.format(tmp_path) in str(refused.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "one byte"])
def test_torn_index_is_refused(tmp_path, corpus, name, damage):
    load_or_build_bm25(tmp_path / "index", corpus)
    path = tmp_path / "index" / name
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.unlink()
    if damage != "gone":
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "one byte": data}[damage])
    if (name, damage) == ("index.json", "gone"):
        # no index was finished there: it is made
        assert ids(load_or_build_bm25(tmp_path / "index", corpus), "dog") == ["d1"]
        return
    with pytest.raises(
        IndexRefused,
        match=f"{name} is (torn|not as it was written); make the index anew: recr1 index --corpus",
    ):
        load_or_build_bm25(tmp_path / "index", corpus)
    BM25Index.of_file(corpus, BM25Parameters()).save(tmp_path / "index")  # what that command does
    assert ids(load_or_build_bm25(tmp_path / "index", corpus), "dog") == ["d1"]


def test_index_of_the_earlier_format(tmp_path, corpus):
    (tmp_path / "index").mkdir()
    (tmp_path / "index/index.json").write_text(json.dumps(dict(format=1, crc32={})))
    (tmp_path / "index/terms.json").write_text("[]")
    with pytest.raises(IndexRefused, match="format 1; this version reads 2; make the index anew"):
        load_or_build_bm25(tmp_path / "index", corpus)
    BM25Index.of_file(corpus, BM25Parameters()).save(tmp_path / "index")
    assert load_or_build_bm25(tmp_path / "index", corpus).doc_ids[0] == "d1"


def test_full_disk_leaves_the_old_index(tmp_path, corpus, monkeypatch):
    load_or_build_bm25(tmp_path / "index", corpus)
    new = BM25Index.of_texts(["a"], ["green"], BM25Parameters())

    def full_disk(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full_disk)
        with pytest.raises(OSError, match="no space"):
            new.save(tmp_path / "index")
    assert ids(load_or_build_bm25(tmp_path / "index", corpus), "dog") == ["d1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "index"]


KILLED = """
import os, signal, sys, numpy
from recr1.retrieval.bm25.searcher import load_or_build_bm25
save, left = numpy.save, [int(sys.argv[3])]
def last(*a, **o):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*a, **o)
numpy.save = last
load_or_build_bm25(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("file", [1, 7])
def test_kill_while_the_index_is_written(tmp_path, corpus, file):
    """Nothing has the index's name, so the next start makes it."""
    dead = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "index", corpus, str(file)],
        env=os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path)),
    )
    assert dead.returncode == -signal.SIGKILL
    assert not (tmp_path / "index").exists()
    assert ids(load_or_build_bm25(tmp_path / "index", corpus), "dog") == ["d1"]


def test_directory_of_something_else(tmp_path, corpus):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.tex is not part of an index"):
        load_or_build_bm25(tmp_path / "thesis", corpus)
    assert (tmp_path / "thesis/thesis.tex").read_text() == "years of work"


def test_command_of_a_refusal_quotes_its_paths(tmp_path):
    path = write(tmp_path / "a corpus.jsonl", DOCS)
    load_or_build_bm25(tmp_path / "index", path)
    with pytest.raises(IndexRefused) as refused:
        load_or_build_bm25(tmp_path / "index", path, k1=0.9)
    assert shlex.split(str(refused.value).split("anew: ")[1])[:4] == [
        "recr1",
        "index",
        "--corpus",
        str(path),
    ]


def test_many_at_once_never_see_a_mixed_index(tmp_path):
    """Four threads fight over one directory with two corpora; each always loads a whole one."""
    made = {
        word: BM25Index.of_texts(list(DOCS), [f"{word} w{i}" for i in range(4)], BM25Parameters())
        for word in ("red", "blue")
    }

    def work(seed):
        for turn in range(25):
            made[random.Random(seed + turn).choice(["red", "blue"])].save(tmp_path / "index")
            try:
                found = BM25Index.load(tmp_path / "index")  # once: two loads may well see two
                assert any(same(found, index) for index in made.values())
            except (
                FileNotFoundError,
                IndexRefused,
            ):  # somebody is just taking it away: never half of it, never two mixed
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert any(same(BM25Index.load(tmp_path / "index"), index) for index in made.values())


# ------------------------------------------------------------------------------------------- shared


def pss() -> int:
    """Bytes of this process without its libraries, each page divided by the processes that map it.
    A library's share also moves when processes that are none of ours start or end.
    """
    total = 0
    counts = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        # of a mapping: addresses, permissions, ..., a path
        if not line.split(maxsplit=1)[0].endswith(":"):
            counts = ".so" not in line
        elif counts and line.startswith("Pss:"):
            total += 1024 * int(line.split()[1])
    return total


def hold(directory: str, scorer: str, pipe) -> None:
    """Says by how much this process grew from when it could search to when it has searched the
    index, in step with the others.
    """
    # what is imported and compiled is no index
    BM25Searcher.build(["a"], ["a0"], scorer=scorer).search(["a0"], 1)
    BM25Index.load(directory)
    pipe.send("ready")
    pipe.recv()
    before = pss()
    index = BM25Searcher(BM25Index.load(directory), scorer)
    rows, _ = index.search(["a0 a1 a2"], 10)
    pipe.send(rows.min() >= 0)
    pipe.recv()
    pipe.send(pss() - before)
    pipe.recv()


@pytest.mark.parametrize("scorer", ["torch", "numba"])
def test_four_processes_share_one_copy(tmp_path, scorer):
    """The sum of their PSS rises by the index once."""
    P = 5_000_000
    rng = np.random.default_rng(0)
    terms = sorted(f"a{i}" for i in range(1000))
    index = BM25Index(
        dict(format=module.FORMAT, dropped=[0], **module.asdict(BM25Parameters())),
        StringTable.of(f"{i:09}" for i in range(200_000)),
        StringTable.of(terms),
        np.arange(1001) * (P // 1000),
        np.sort(rng.integers(0, 200_000, (1000, P // 1000), np.int32), 1).ravel(),
        rng.random(P, np.float32),
    )
    index.save(tmp_path / "index")
    size = sum(path.stat().st_size for path in (tmp_path / "index").iterdir())
    spawn = multiprocessing.get_context("spawn")
    pipes = []
    processes = []
    for _ in range(4):
        here, there = spawn.Pipe()
        processes.append(spawn.Process(target=hold, args=(str(tmp_path / "index"), scorer, there)))
        processes[-1].start()
        pipes.append(here)
    try:
        said = []
        for _ in range(3):
            said.append([pipe.recv() for pipe in pipes])
            for pipe in pipes:
                pipe.send("go on")
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    rise = sum(said[2])
    print(f"the index has {size / 1e6:.1f} MB, the sum rises by {rise / 1e6:.1f} MB")
    assert (
        said[:2] == [["ready"] * 4, [True] * 4]
        and size > 40_000_000
        and 0.5 * size < rise < 1.5 * size
    ), (size, rise)
