"""Compare our BM25 (torch, numba) with bm25s (numba, numpy) and rank_bm25.

python experiments/benchmarks/retrieval.py [--documents 50000,200000,1000000] [--pairs 5]

Corpora: generated titles (zipf.py: Zipf-Mandelbrot with topics; no real million is at hand) and the
two bundled catalogs. 384 queries of 10-40 distinct terms, top 1,000, k1 1.2, b .75, Lucene's
formula; all sides begin with token numbers and take the batch in one call. The sides take turns, a
row shows the median of --pairs turns; slow sides take fewer queries or turns (column `of`). Index
seconds are from token numbers too. MB is what a fresh process grows by when it loads the saved
index and answers 16 queries. Overlap is with bm25s' numpy path, 16 queries; what is missing from 1
are ties at the cut. Then, on the largest: the whole reward of 384 completions (decoding, parsing,
analysis, retrieval, NDCG@1000), and four processes with one index.

Ends with one line of JSON: the bars and whether they hold. Needs a quiet machine with 2 cores and 4
GB. `--dry-run` takes tiny sizes: its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch

try:
    import bm25s
    import numba  # noqa: F401
    from bm25s.tokenization import Tokenized
    from rank_bm25 import BM25Okapi
except ImportError as e:
    sys.exit(
        f"retrieval.py: the package {e.name} is not installed: pip install numba bm25s rank-bm25"
    )

from zipf import Zipf

from recr1.config.schema import RewardConfig
from recr1.data_types import Prompt, Rollout
from recr1.retrieval.bm25.analyzer import analyze
from recr1.retrieval.bm25.impacts import BM25Parameters, build_postings, compute_impacts
from recr1.retrieval.bm25.index import FORMAT, BM25Index
from recr1.retrieval.bm25.searcher import BM25Searcher
from recr1.retrieval.bm25.string_table import StringTable
from recr1.tasks.product_search import ProductSearch
from recr1.tasks.rewards import RewardTerms
from recr1.tasks.scorer import Scorer
from recr1.utils.hf_hub import load_tokenizer

HERE = Path(__file__).resolve().parents[1]
DEPTH = 1000
QUERIES = 384
CHECKED = 16
SLOW = 24
COLUMNS = (
    "corpus",
    "engine",
    "index s",
    "of",
    "B/posting",
    "MB",
    "q/s 1 thread",
    "2 threads",
    "of",
    "top 10",
    f"top {DEPTH}",
)


class Corpus:
    """Hold token numbers in rows: tokens (N,), lengths (D,).

    terms[number] spells one; queries are of distinct numbers.
    """

    def __init__(
        self,
        name: str,
        tokens: np.ndarray,
        lengths: np.ndarray,
        terms: list[str],
        queries: list[list[int]],
    ):
        self.name = name
        self.lengths = lengths
        self.terms = terms
        used = np.unique(tokens)
        # only what the corpus has, in the order of spelling
        number = np.full(len(terms), -1, np.int32)
        number[used] = np.argsort(np.argsort(np.array(terms)[used]))
        self.terms = sorted(terms[i] for i in used.tolist())
        self.tokens = number[tokens]
        self.queries = [sorted(n for n in number[query].tolist() if n >= 0) for query in queries]

    def lists(self) -> list[list[int]]:
        return [part.tolist() for part in np.split(self.tokens, np.cumsum(self.lengths)[:-1])]


def generate_corpus(documents: int, queries: int) -> Corpus:
    """Return a generated corpus of n documents."""
    zipf = Zipf()
    tokens, lengths = zipf.corpus(documents)
    return Corpus(
        f"generated {documents:,}",
        tokens,
        lengths,
        [f"w{i}" for i in range(zipf.words)],
        zipf.queries(queries),
    )


def read_bundled(name: str, queries: int) -> Corpus:
    """Return a bundled catalog with queries.

    Half of a query's terms come from one document, half from the whole catalog, as often as they
    are there.
    """
    with gzip.open(HERE / "data" / name / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [f"{row['title']} {row['text']}" for row in map(json.loads, lines)]
    numbers = {}
    random = np.random.default_rng(0)
    docs = [[numbers.setdefault(token, len(numbers)) for token in analyze(text)] for text in texts]
    tokens = np.concatenate([np.array(doc, np.int32) for doc in docs])
    made = []
    for size in random.integers(10, 41, queries):
        mine = docs[random.integers(len(docs))]
        query = {}
        for turn in range(1000):
            query[int(random.choice(mine if turn % 2 else tokens))] = None
            if len(query) == size:
                break
        made.append(list(query))
    return Corpus(name, tokens, np.array([len(doc) for doc in docs]), list(numbers), made)


class Ours:
    """Run our BM25."""

    def __init__(self, scorer: str, corpus: Corpus):
        self.name = f"ours, {scorer}"
        self.scorer = scorer
        self.corpus = corpus
        self.few = QUERIES
        self.turns = 99
        self.queries = [dict.fromkeys(query, 1) for query in corpus.queries]

    def prepare(self) -> None:
        """Compile: what is compiled once is no index time."""
        one = np.zeros(1, np.int64)
        build_postings(one.astype(np.int32), one + 1, one, 1, self.scorer == "numba")

    def build(self) -> None:
        c = self.corpus
        parameters = BM25Parameters()
        order = np.arange(len(c.lengths))
        arrays = build_postings(c.tokens, c.lengths, order, len(c.terms), self.scorer == "numba")
        self.arrays = *arrays[:2], compute_impacts(parameters, *arrays, c.lengths)

    def ready(self) -> None:
        c = self.corpus
        meta = dict(format=FORMAT, dropped=[0], k1=1.2, b=0.75, variant="lucene", length="exact")
        self.index = BM25Index(
            meta,
            StringTable.of(f"{i:09}" for i in range(len(c.lengths))),
            StringTable.of(c.terms),
            *self.arrays,
        )
        self.bm25 = BM25Searcher(self.index, self.scorer)

    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def save(self, folder: str) -> None:
        self.index.save(folder)

    def search(self, n: int, threads: int) -> np.ndarray:
        torch.set_num_threads(threads)
        return self.bm25.rank(self.queries[:n], min(DEPTH, len(self.corpus.lengths)))[0]


class Bm25s:
    """Run bm25s."""

    def __init__(self, backend: str, corpus: Corpus):
        self.name = f"bm25s, {backend}"
        self.backend = backend
        self.corpus = corpus
        self.lists = corpus.lists()
        self.few, self.turns = (QUERIES, 99) if backend == "numba" else (SLOW, 2)
        self.queries = corpus.queries
        self.build_turns = 2

    def prepare(self) -> None:
        self.model = bm25s.BM25(method="lucene", k1=1.2, b=0.75, backend=self.backend)
        if self.backend == "numba":
            self.model.warmup_numba_csc()

    def build(self) -> None:
        self.model.index(
            Tokenized(ids=self.lists, vocab={term: i for i, term in enumerate(self.corpus.terms)}),
            show_progress=False,
        )

    def ready(self) -> None:
        pass

    def bytes(self) -> int:
        return sum(self.model.scores[name].nbytes for name in ("data", "indices", "indptr"))

    def save(self, folder: str) -> None:
        self.model.save(folder, show_progress=False)

    def search(self, n: int, threads: int) -> np.ndarray:
        k = min(DEPTH, len(self.corpus.lengths))
        return self.model.retrieve(
            self.queries[:n],
            k=k,
            n_threads=0 if threads == 1 else threads,
            show_progress=False,
            backend_selection=("numba" if self.backend == "numba" else "numpy"),
        ).documents


class RankBm25:
    """Run rank_bm25."""

    def __init__(self, corpus: Corpus):
        self.name = "rank_bm25 (Okapi)"
        self.corpus = corpus
        self.few = 4
        self.turns = 1
        self.lists = corpus.lists()
        self.build_turns = 1

    def prepare(self) -> None:
        pass

    def build(self) -> None:
        self.model = BM25Okapi(self.lists, k1=1.5, b=0.75)

    def ready(self) -> None:
        pass

    def bytes(self) -> None:
        return None

    def search(self, n: int, threads: int) -> np.ndarray:
        return np.array(
            [
                np.argsort(-self.model.get_scores(query), kind="stable")[:DEPTH]
                for query in self.corpus.queries[:n]
            ]
        )


def time_call(call, *args) -> float:
    """Return the seconds of a call."""
    start = perf_counter()
    call(*args)
    return perf_counter() - start


def measure_rss(what: str) -> int:
    """Return the resident memory of this process."""
    return 1024 * int(
        next(
            line.split()[1]
            for line in Path("/proc/self/smaps_rollup").read_text().splitlines()
            if line.startswith(f"{what}:")
        )
    )


def measure_growth_here(
    kind: str, folder: str, queries: list[list[int]], pipe, what: str = "Rss"
) -> None:
    """Return by how much loading and searching makes this fresh process grow.

    It keeps in step with others where there are any.
    """
    if kind.startswith("bm25s"):
        warm = bm25s.BM25(backend=kind.split(", ")[1])
        warm.index([[0, 1], [1, 2]], show_progress=False)
        warm.retrieve([[0]], k=1, show_progress=False)
    else:
        BM25Searcher.build(["a"], ["a0"], scorer=kind.split(", ")[1]).search(["a0"], 1)
    pipe.send(None)
    pipe.recv()
    before = measure_rss(what)
    if kind.startswith("bm25s"):
        model = bm25s.BM25.load(folder)
        model.retrieve(queries, k=min(DEPTH, model.scores["num_docs"]), show_progress=False)
    else:
        model = BM25Searcher(BM25Index.load(folder), kind.split(", ")[1])
        model.rank([dict.fromkeys(query, 1) for query in queries], DEPTH)
    pipe.send(None)
    pipe.recv()
    pipe.send(measure_rss(what) - before)
    pipe.recv()


def measure_growth(
    kind: str, folder: str, queries: list[list[int]], processes: int = 1, what: str = "Rss"
) -> int:
    """Return the bytes by which fresh processes grow, summed over them."""
    spawn = multiprocessing.get_context("spawn")
    pipes = []
    running = []
    said = []
    for _ in range(processes):
        here, there = spawn.Pipe()
        running.append(
            spawn.Process(target=measure_growth_here, args=(kind, folder, queries, there, what))
        )
        running[-1].start()
        pipes.append(here)
    for _ in range(3):
        said.append([pipe.recv() for pipe in pipes])
        for pipe in pipes:
            pipe.send(None)
    for process in running:
        process.join()
    return sum(said[-1])


def measure_engines(corpus: Corpus, pairs: int, slow: bool) -> tuple[dict[str, dict], Ours]:
    """Return {engine: figures}, printed as rows of the table, and ours with numba."""
    sides = [
        Ours("torch", corpus),
        Ours("numba", corpus),
        Bm25s("numba", corpus),
        Bm25s("numpy", corpus),
    ]
    sides += [RankBm25(corpus)] if slow else []
    found = {side.name: dict(index=[], one=[], two=[]) for side in sides}
    for turn in range(pairs):
        for side in sides:
            if turn < getattr(side, "build_turns", pairs):
                side.prepare()
                found[side.name]["index"].append(time_call(side.build))
    for side in sides:
        side.ready()
        side.lists = None
    gc.collect()
    postings_per_term = np.diff(sides[0].arrays[0])
    touched = [sum(postings_per_term[query]) for query in corpus.queries[:CHECKED]]
    print(
        f"{corpus.name}: {len(corpus.lengths):,} documents, {len(corpus.tokens):,} tokens, "
        f"{len(corpus.terms):,} terms, {len(sides[0].arrays[1]):,} postings, "
        f"{np.mean(touched):,.0f} of them touched by a query"
    )
    oracle = sides[3].model.retrieve(
        corpus.queries[:CHECKED],
        k=min(DEPTH, len(corpus.lengths)),
        show_progress=False,
        backend_selection="numpy",
    )
    want = [docs[scores > 0] for docs, scores in zip(oracle.documents, oracle.scores)]
    for side in sides:
        # compiles, too
        rows = side.search(min(side.few, CHECKED), 1)
        n = min(side.few, CHECKED)
        for key, depth in (("top 10", 10), ("top", DEPTH)):
            found[side.name][key] = np.mean(
                [
                    len(set(a[:depth].tolist()) & set(b[:depth].tolist())) / len(b[:depth])
                    for a, b in zip(rows, want[:n])
                ]
            )
        if side.turns > 1:
            side.search(2, 2)
    for turn in range(pairs):
        for key, threads in (("one", 1), ("two", 2)):
            for side in sides:
                if turn < side.turns and not (key == "two" and side.turns == 1):
                    found[side.name][key].append(
                        min(side.few, len(corpus.queries))
                        / time_call(side.search, side.few, threads)
                    )
    for side in sides:
        figures = found[side.name]
        builds = len(figures["index"])
        turns = len(figures["one"])
        figures["index"] = median(figures["index"])
        figures |= {
            key: median(figures[key]) if figures[key] else float("nan") for key in ("one", "two")
        }
        figures["bytes"] = side.bytes() / len(sides[0].arrays[1]) if side.bytes() else float("nan")
        if hasattr(side, "save"):
            with tempfile.TemporaryDirectory() as folder:
                side.save(f"{folder}/index")
                figures["MB"] = (
                    measure_growth(side.name, f"{folder}/index", corpus.queries[:CHECKED]) / 1e6
                )
        found[side.name] = figures
        print(
            f"{corpus.name:<20}{side.name:<20}{figures['index']:9.3f}{builds:4}"
            f"{figures['bytes']:11.2f}{figures.get('MB', float('nan')):8.0f}{figures['one']:14.1f}"
            f"{figures['two']:11.1f}{min(side.few, len(corpus.queries)):5} x "
            f"{turns}{figures['top 10']:9.3f}{figures['top']:9.3f}",
            flush=True,
        )
    return found, sides[1]


def measure_reward(ours: Ours, pairs: int) -> float:
    """Time a step's reward: 384 sampled completions -> text -> query -> ranking -> NDCG@1000.

    Returns the median over fresh batches, after one.
    """
    torch.set_num_threads(2)
    tokenizer = load_tokenizer(str(HERE / "policy"))
    corpus = ours.corpus
    random = np.random.default_rng(1)
    times = []
    for _ in range(pairs + 1):
        rollouts = []
        qrels = {}
        for q, query in enumerate(corpus.queries):
            words = [corpus.terms[t] for t in random.permutation(query)]
            ids = tokenizer.encode(f'</think><answer>{{"query": "{" ".join(words)}"}}</answer>')
            qrels[f"q{q}"] = {f"{d:09}": 1.0 for d in random.integers(len(corpus.lengths), size=5)}
            rollouts.append(
                Rollout(Prompt(f"q{q}", q, "", ()), q, 0, tuple(ids), (0.0,) * len(ids), True)
            )
        task = Scorer(
            ProductSearch(RewardConfig()),
            ours.bm25,
            qrels,
            RewardTerms(RewardConfig(), DEPTH),
            lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False),
            limit=512,
        )
        start = perf_counter()
        rewards = task.score(rollouts)
        times.append(perf_counter() - start)
        assert not any(reward.error for reward in rewards), rewards[0]
    return median(times[1:])


def main() -> None:
    """Run the corpora and print the bars."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--documents", default="50000,200000,1000000", help="sizes of generated corpora"
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: times mean nothing")
    args = parser.parse_args()
    sizes = [2000, 3000] if args.dry_run else [int(size) for size in args.documents.split(",")]
    queries = 24 if args.dry_run else QUERIES
    pairs = 1 if args.dry_run else args.pairs
    print("  ".join(COLUMNS))
    for name in () if args.dry_run else ("msrd", "esci_small"):
        measure_engines(read_bundled(name, queries), pairs, True)
    for size in sizes:
        figures, ours = measure_engines(generate_corpus(size, queries), pairs, size <= 50_000)
    name = ours.corpus.name
    theirs = figures["bm25s, numba"]
    torch_ = figures["ours, torch"]
    numba_ = figures["ours, numba"]
    reward = measure_reward(ours, pairs)
    with tempfile.TemporaryDirectory() as folder:
        ours.save(f"{folder}/index")
        size = sum(path.stat().st_size for path in Path(folder, "index").iterdir())
        shared = measure_growth(
            "ours, numba", f"{folder}/index", ours.corpus.queries[:CHECKED], 4, "Pss"
        )
    print(
        f"{name}: a reward of {queries} completions, 2 threads, {reward:.3f} s; "
        f"four processes with one index of {size / 1e6:.0f} MB: "
        f"PSS rises by {shared / 1e6:.0f} MB; "
        f"index from token numbers, numpy: {theirs['index'] / torch_['index']:.1f}x bm25s numba's "
        "speed"
    )
    bars = [
        ("numba / bm25s numba, 1 thread", numba_["one"] / theirs["one"], 1.5, 1),
        ("torch / bm25s numba, 1 thread", torch_["one"] / theirs["one"], 0.85, 1),
        ("numba, 2 threads / 1", numba_["two"] / numba_["one"], 1.7, 1),
        ("torch, 2 threads / 1", torch_["two"] / torch_["one"], 1.7, 1),
        ("index from token numbers, numba / bm25s numba", theirs["index"] / numba_["index"], 20, 1),
        ("bytes per posting", numba_["bytes"], 8.5, -1),
        (f"seconds of a reward of {queries} completions", reward, 3, -1),
        ("PSS of four processes / index", shared / size, 1.5, -1),
        ("overlap with bm25s, top 10", min(torch_["top 10"], numba_["top 10"]), 0.98, 1),
        (f"overlap with bm25s, top {DEPTH}", min(torch_["top"], numba_["top"]), 0.98, 1),
    ]
    bars = [
        dict(
            name=f"{name}: {what}",
            value=round(float(value), 4),
            bar=bar,
            ok=bool(value * sign >= bar * sign),
        )
        for what, value, bar, sign in bars
    ]
    print(json.dumps({"bars": bars}))


if __name__ == "__main__":
    main()
