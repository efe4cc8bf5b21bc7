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


def write_corpus(path: Path, docs: dict[str, str], *more_lines: bytes) -> Path:
    lines = []
    for doc_id, text in docs.items():
        doc = dict(id=doc_id, title=text)
        lines.append(json.dumps(doc).encode())
    lines.extend(more_lines)
    data = b"".join(line + b"\n" for line in lines)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    path.write_bytes(data)
    return path


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", DOCS)


@pytest.fixture
def index_dir(tmp_path) -> Path:
    return tmp_path / "index"


def is_same_index(one: BM25Index, other: BM25Index) -> bool:
    return (
        list(one.doc_ids) == list(other.doc_ids)
        and list(one.terms) == list(other.terms)
        and np.array_equal(one.offsets, other.offsets)
        and np.array_equal(one.docs, other.docs)
        and np.array_equal(one.impacts, other.impacts)
    )


def search_ids(searcher: BM25Searcher, query: str) -> list[str]:
    rankings, _ = searcher.search([query], 10)
    return [searcher.doc_ids[row] for row in rankings[0] if row >= 0]


# -------------------------------------------------------------------------------------------- built


def test_file_plain_or_packed_gives_the_index_of_its_texts(tmp_path, corpus):
    ids = list(DOCS.keys())
    texts = list(DOCS.values())
    expected = BM25Index.of_texts(ids, texts, BM25Parameters())
    packed = write_corpus(tmp_path / "corpus.jsonl.gz", DOCS)

    for path in (corpus, packed):
        for numba in (False, True):
            index = BM25Index.of_file(path, BM25Parameters(), numba=numba)
            assert is_same_index(index, expected)

    meta = BM25Index.of_file(packed, BM25Parameters(b=0.5)).meta
    assert meta["documents"] == 4
    assert meta["tokens"] == 9
    assert meta["b"] == 0.5
    assert meta["dropped"] == [0]


ODD_WORDS = ["red", "running", "İstanbul", "the", "x" * 300, "\ud800"]


def draw_chunk(rng: random.Random) -> list[str]:
    chunk = []
    for _ in range(rng.randint(0, 5)):
        num_words = rng.randint(0, 9)
        words = rng.choices(ODD_WORDS, k=num_words)
        chunk.append(" ".join(words))
    return chunk


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_worker_processes_give_the_same_in_the_same_order(processes):
    rng = random.Random(processes)
    chunks = [draw_chunk(rng) for _ in range(30)]

    results = list(corpus_tokenizer.tokenize_chunks(iter(chunks), processes))

    assert len(results) == len(chunks)
    for chunk, (terms, numbers, lengths) in zip(chunks, results):
        expected_tokens = []
        expected_lengths = []
        for text in chunk:
            tokens = analyze(text)
            expected_tokens.extend(tokens)
            expected_lengths.append(len(tokens))
        assert [terms[number] for number in numbers] == expected_tokens
        assert list(lengths) == expected_lengths


def list_child_pids() -> set[int]:
    pids = set()
    for task in Path("/proc/self/task").iterdir():
        children = (task / "children").read_text()
        pids.update(int(pid) for pid in children.split())
    return pids


def test_worker_that_is_killed_is_one_clear_error():
    earlier_pids = list_child_pids()  # of tests before this one

    def yield_chunks():
        for i in range(1000):
            if i == 20:
                for pid in list_child_pids() - earlier_pids:
                    os.kill(pid, signal.SIGKILL)
            yield ["red fox"]

    with pytest.raises(corpus_tokenizer.WorkerLost, match="analyses the corpus has ended"):
        list(corpus_tokenizer.tokenize_chunks(yield_chunks(), 2))
    assert list_child_pids() <= earlier_pids


def test_strings():
    words = sorted(["", "a", "aé", "z", "\ud800", "😀", "ﬀ"])

    strings = StringTable.of(words)

    assert list(strings) == words
    assert strings[-1] == words[-1]
    assert strings[1:3] == words[1:3]
    assert len(strings) == 7
    for i, word in enumerate(words):
        assert strings.find(word) == i
    assert strings.find("b") == -1
    assert strings.find("\U0010ffff") == -1
    with pytest.raises(IndexError):
        strings[7]


# ------------------------------------------------------------------------------------------- faults


def test_bad_line(tmp_path, index_dir):
    bad_line = b'{"id": "d5"'
    good_line = b'{"id": "d6", "title": "green"}'
    path = write_corpus(tmp_path / "corpus.jsonl", DOCS, bad_line, good_line)

    with pytest.raises(DataError, match=r"corpus.jsonl:5: not JSON"):
        load_or_build_bm25(index_dir, path)
    assert not index_dir.exists()

    searcher = load_or_build_bm25(index_dir, path, on_bad_line="drop")
    assert search_ids(searcher, "green") == ["d6"]
    num_dropped, first_error = searcher.index.meta["dropped"]
    assert num_dropped == 1
    assert ":5: not JSON" in first_error

    # it was made under another rule
    message = r"1 bad lines were left out of this index, first: .*:5: not JSON.*mend the corpus"
    with pytest.raises(IndexRefused, match=message):
        load_or_build_bm25(index_dir, path)


def test_id_twice(tmp_path, index_dir):
    second_d1 = b'{"id": "d1", "title": "green"}'
    path = write_corpus(tmp_path / "corpus.jsonl", DOCS, second_d1)

    with pytest.raises(DataError, match="corpus.jsonl:5: id 'd1' came before"):
        load_or_build_bm25(index_dir, path)

    searcher = load_or_build_bm25(index_dir, path, on_bad_line="drop")
    assert search_ids(searcher, "dog green") == ["d1"]


def test_document_without_text_and_without_tokens(tmp_path, index_dir, corpus):
    no_text = b'{"id": "d5", "title": "", "text": " "}'
    path = write_corpus(tmp_path / "empty.jsonl", DOCS, no_text)

    with pytest.raises(DataError, match="empty.jsonl:5: neither 'title' nor 'text' says anything"):
        load_or_build_bm25(index_dir, path)

    searcher = load_or_build_bm25(index_dir, corpus)
    assert "d4" in list(searcher.doc_ids)  # "the"
    assert "d4" not in search_ids(searcher, "the red fox dog blue cat")


def test_line_of_ten_megabytes(tmp_path, index_dir):
    docs = DOCS | {"long": "verylong " * 1_200_000}
    path = write_corpus(tmp_path / "corpus.jsonl", docs)

    searcher = load_or_build_bm25(index_dir, path)

    assert search_ids(searcher, "verylong") == ["long"]
    assert search_ids(searcher, "fox") == ["d2", "d3"]


EMPTY_CORPORA = [
    ({}, "the file is empty"),
    ({"a": "the", "b": "and of"}, "no document has a token"),
]


@pytest.mark.parametrize("docs, message", EMPTY_CORPORA)
def test_empty_corpus(tmp_path, index_dir, docs, message):
    path = write_corpus(tmp_path / "corpus.jsonl", docs)

    with pytest.raises(ValueError, match=message):
        load_or_build_bm25(index_dir, path)
    with pytest.raises(DataError, match="nowhere.jsonl: no such file"):
        load_or_build_bm25(index_dir, tmp_path / "nowhere.jsonl")

    assert not index_dir.exists()


@pytest.mark.parametrize("scorer", ["torch", "numba"])
def test_odd_queries(tmp_path, corpus, index_dir, scorer):
    searcher = load_or_build_bm25(index_dir, corpus, scorer=scorer)
    unknown_words = [f"w{i}" for i in range(9_997)]
    long_query = " ".join(unknown_words) + " red fox fox"
    queries = ["", "zyxt", "the", long_query, "red fox fox"]

    rankings, scores = searcher.search(queries, 6)

    assert rankings.shape == (5, 6)
    assert (rankings[:3] == -1).all()
    assert (scores[:3] == -np.inf).all()
    assert np.array_equal(rankings[3], rankings[4])
    assert np.array_equal(scores[3], scores[4])
    # k above the corpus: the rest is empty
    is_hit = rankings[4] >= 0
    assert is_hit.tolist() == [True] * 3 + [False] * 3
    with pytest.raises(ValueError, match="k: must be at least 1, got 0"):
        searcher.search(["red"], 0)

    # 10,000 terms, each in the index
    docs = {f"d{i}": f"w{i}" for i in range(10_000)}
    every_term_twice = " ".join(f"w{i} " * 2 for i in range(10_000))
    large_corpus = write_corpus(tmp_path / "many.jsonl", docs)
    large_searcher = load_or_build_bm25(tmp_path / "many", large_corpus, scorer=scorer)
    rankings, _ = large_searcher.search([every_term_twice], 10_000)
    assert (rankings >= 0).all()


# --------------------------------------------------------------------------------- kept and refused


def test_saved_and_loaded_index_is_the_same(tmp_path):
    on_disk = load_or_build_bm25(tmp_path / "deep" / "index", MSRD)
    in_memory = BM25Searcher(BM25Index.of_file(MSRD, BM25Parameters()))

    assert is_same_index(on_disk.index, in_memory.index)
    assert on_disk.index.meta == in_memory.index.meta

    queries = ["star wars", "the lord of the rings full movie", "amélie"]
    rankings, scores = on_disk.search(queries, 50)
    expected_rankings, expected_scores = in_memory.search(queries, 50)
    assert np.array_equal(rankings, expected_rankings)
    assert np.array_equal(scores, expected_scores)

    # nothing temporary stays
    assert os.listdir(tmp_path / "deep") == ["index"]


def test_index_there_is_used_and_not_made_again(index_dir, corpus, monkeypatch):
    load_or_build_bm25(index_dir, corpus)
    monkeypatch.setattr(BM25Index, "of_file", None)

    searcher = load_or_build_bm25(index_dir, corpus)

    assert search_ids(searcher, "dog") == ["d1"]


CHANGES = [
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
]


@pytest.mark.parametrize("change, message", CHANGES)
def test_stale_index_is_refused_with_the_command_that_makes_it_anew(
    tmp_path, index_dir, corpus, monkeypatch, change, message
):
    load_or_build_bm25(index_dir, corpus)
    parameters = {}
    if change == "corpus":
        write_corpus(corpus, DOCS | {"d1": "red red cat"})
    elif change == "analyzer":
        monkeypatch.setattr(module.analyzer, "ANALYZER_VERSION", "another")
    else:
        parameters = change

    with pytest.raises(IndexRefused) as refused:
        load_or_build_bm25(index_dir, corpus, **parameters)

    assert message.format(tmp_path) in str(refused.value)


def damage_file(path: Path, damage: str) -> None:
    data = path.read_bytes()
    path.unlink()
    if damage == "gone":
        return
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "empty":
        data = b""
    elif damage == "one byte":
        data = bytearray(data)
        data[-9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "one byte"])
def test_torn_index_is_refused(index_dir, corpus, name, damage):
    load_or_build_bm25(index_dir, corpus)
    damage_file(index_dir / name, damage)

    if name == "index.json" and damage == "gone":
        # no index was finished there: it is made
        searcher = load_or_build_bm25(index_dir, corpus)
        assert search_ids(searcher, "dog") == ["d1"]
        return

    message = f"{name} is (torn|not as it was written); make the index anew: recr1 index --corpus"
    with pytest.raises(IndexRefused, match=message):
        load_or_build_bm25(index_dir, corpus)

    BM25Index.of_file(corpus, BM25Parameters()).save(index_dir)  # what that command does
    searcher = load_or_build_bm25(index_dir, corpus)
    assert search_ids(searcher, "dog") == ["d1"]


def test_an_index_that_another_process_replaces_is_read_again(index_dir, corpus, monkeypatch):
    """Two runs begin together without an index: each makes it, and one renames while one reads."""
    index = BM25Index.of_file(corpus, BM25Parameters())
    index.save(index_dir)
    map_array = module._map_array
    saves = []

    def map_array_while_it_is_replaced(path, crc32):
        if not saves:
            saves.append(path)
            index.save(index_dir)
            raise IndexRefused(f"{path} is not as it was written")
        return map_array(path, crc32)

    monkeypatch.setattr(module, "_map_array", map_array_while_it_is_replaced)

    assert is_same_index(BM25Index.load(index_dir), index)


def test_index_of_the_earlier_format(index_dir, corpus):
    index_dir.mkdir()
    meta = dict(format=1, crc32={})
    (index_dir / "index.json").write_text(json.dumps(meta))
    (index_dir / "terms.json").write_text("[]")

    with pytest.raises(IndexRefused, match="format 1; this version reads 2; make the index anew"):
        load_or_build_bm25(index_dir, corpus)

    BM25Index.of_file(corpus, BM25Parameters()).save(index_dir)
    searcher = load_or_build_bm25(index_dir, corpus)
    assert searcher.doc_ids[0] == "d1"


def test_full_disk_leaves_the_old_index(tmp_path, index_dir, corpus, monkeypatch):
    load_or_build_bm25(index_dir, corpus)
    new_index = BM25Index.of_texts(["a"], ["green"], BM25Parameters())

    def raise_full_disk(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", raise_full_disk)
        with pytest.raises(OSError, match="no space"):
            new_index.save(index_dir)

    searcher = load_or_build_bm25(index_dir, corpus)
    assert search_ids(searcher, "dog") == ["d1"]
    assert sorted(os.listdir(tmp_path)) == ["corpus.jsonl", "index"]


# Builds an index at argv[1] of the corpus argv[2]; kills itself before file number argv[3].
KILLED = """
import os, signal, sys, numpy
from recr1.retrieval.bm25.searcher import load_or_build_bm25

save = numpy.save
files_left = int(sys.argv[3])

def save_or_die(*args, **options):
    global files_left
    files_left -= 1
    if files_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*args, **options)

numpy.save = save_or_die
load_or_build_bm25(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("file", [1, 7])
def test_kill_while_the_index_is_written(index_dir, corpus, file):
    """Nothing has the index's name, so the next start makes it."""
    command = [sys.executable, "-c", KILLED, index_dir, corpus, str(file)]
    search_path = os.pathsep.join(sys.path)
    environment = os.environ | {"PYTHONPATH": search_path}

    killed = subprocess.run(command, env=environment)

    assert killed.returncode == -signal.SIGKILL
    assert not index_dir.exists()
    searcher = load_or_build_bm25(index_dir, corpus)
    assert search_ids(searcher, "dog") == ["d1"]


def test_directory_of_something_else(tmp_path, corpus):
    thesis = tmp_path / "thesis" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")

    with pytest.raises(ValueError, match="thesis.tex is not part of an index"):
        load_or_build_bm25(thesis.parent, corpus)

    assert thesis.read_text() == "years of work"


def test_command_of_a_refusal_quotes_its_paths(tmp_path, index_dir):
    path = write_corpus(tmp_path / "a corpus.jsonl", DOCS)
    load_or_build_bm25(index_dir, path)

    with pytest.raises(IndexRefused) as refused:
        load_or_build_bm25(index_dir, path, k1=0.9)

    _, command = str(refused.value).split("anew: ")
    words = shlex.split(command)
    assert words[:4] == ["recr1", "index", "--corpus", str(path)]


def build_colored_index(color: str) -> BM25Index:
    texts = [f"{color} w{i}" for i in range(4)]
    return BM25Index.of_texts(list(DOCS), texts, BM25Parameters())


def test_many_at_once_never_see_a_mixed_index(index_dir):
    """Four threads fight over one directory with two corpora; each always loads a whole one."""
    red = build_colored_index("red")
    blue = build_colored_index("blue")

    def save_and_load(seed):
        for turn in range(25):
            index = random.Random(seed + turn).choice([red, blue])
            index.save(index_dir)
            try:
                loaded = BM25Index.load(index_dir)  # once: two loads may well see two
                assert is_same_index(loaded, red) or is_same_index(loaded, blue)
            except (FileNotFoundError, IndexRefused):
                # somebody is just taking it away: never half of it, never two mixed
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save_and_load, range(4)))

    assert os.listdir(index_dir.parent) == ["index"]
    loaded = BM25Index.load(index_dir)
    assert is_same_index(loaded, red) or is_same_index(loaded, blue)


# ------------------------------------------------------------------------------------------- shared


def measure_pss() -> int:
    """Return the bytes of this process without its libraries, each page divided by the processes
    that map it. A library's share also moves when processes that are none of ours start or end.
    """
    total = 0
    counts = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key = line.split(maxsplit=1)[0]
        # of a mapping: addresses, permissions, ..., a path
        if not key.endswith(":"):
            counts = ".so" not in line
        elif counts and key == "Pss:":
            kilobytes = line.split()[1]
            total += 1024 * int(kilobytes)
    return total


def search_and_report_growth(directory: str, scorer: str, pipe) -> None:
    """Say by how much this process grew from when it could search to when it has searched the
    index, in step with the others.
    """
    # what is imported and compiled is no index
    warm_up = BM25Searcher.build(["a"], ["a0"], scorer=scorer)
    warm_up.search(["a0"], 1)
    BM25Index.load(directory)
    pipe.send("ready")
    pipe.recv()

    before = measure_pss()
    searcher = BM25Searcher(BM25Index.load(directory), scorer)
    rankings, _ = searcher.search(["a0 a1 a2"], 10)
    all_hits = rankings.min() >= 0
    pipe.send(all_hits)
    pipe.recv()

    pipe.send(measure_pss() - before)
    pipe.recv()


def build_large_index() -> BM25Index:
    """Build an index of 5 million random postings: 1,000 terms with 5,000 documents each."""
    num_terms = 1000
    num_docs = 200_000
    num_postings = 5_000_000
    postings_per_term = num_postings // num_terms
    parameters = module.asdict(BM25Parameters())
    doc_ids = [f"{i:09}" for i in range(num_docs)]
    terms = sorted(f"a{i}" for i in range(num_terms))
    rng = np.random.default_rng(0)
    docs = rng.integers(0, num_docs, (num_terms, postings_per_term), np.int32)
    docs.sort(axis=1)
    return BM25Index(
        dict(format=module.FORMAT, dropped=[0], **parameters),
        StringTable.of(doc_ids),
        StringTable.of(terms),
        np.arange(num_terms + 1) * postings_per_term,
        docs.ravel(),
        rng.random(num_postings, np.float32),
    )


def exchange(pipes: list) -> list:
    """Receive one message from each process, then let all of them go on."""
    messages = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send("go on")
    return messages


@pytest.mark.parametrize("scorer", ["torch", "numba"])
def test_four_processes_share_one_copy(index_dir, scorer):
    """The sum of their PSS rises by the index once."""
    build_large_index().save(index_dir)
    size = sum(path.stat().st_size for path in index_dir.iterdir())
    assert size > 40_000_000

    spawn = multiprocessing.get_context("spawn")
    pipes = []
    processes = []
    for _ in range(4):
        pipe, pipe_of_process = spawn.Pipe()
        arguments = (str(index_dir), scorer, pipe_of_process)
        process = spawn.Process(target=search_and_report_growth, args=arguments)
        process.start()
        pipes.append(pipe)
        processes.append(process)
    try:
        ready = exchange(pipes)
        all_hits = exchange(pipes)
        growth = exchange(pipes)
    finally:
        for process in processes:
            process.join(20)
            process.kill()

    rise = sum(growth)
    print(f"the index has {size / 1e6:.1f} MB, the sum rises by {rise / 1e6:.1f} MB")
    assert ready == ["ready"] * 4
    assert all_hits == [True] * 4
    assert 0.5 * size < rise < 1.5 * size, (size, rise)
