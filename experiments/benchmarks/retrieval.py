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
from dataclasses import dataclass, field
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
SLOW = 24  # queries of a slow side
EVERY_TURN = sys.maxsize
NAN = float("nan")
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
        used = np.unique(tokens)
        # only what the corpus has, in the order of spelling
        spellings = np.array(terms)[used]
        number = np.full(len(terms), -1, np.int32)
        number[used] = np.argsort(np.argsort(spellings))
        self.terms = sorted(terms[i] for i in used.tolist())
        self.tokens = number[tokens]
        self.queries = []
        for query in queries:
            numbers = number[query].tolist()
            self.queries.append(sorted(n for n in numbers if n >= 0))

    def split_documents(self) -> list[list[int]]:
        ends = np.cumsum(self.lengths)[:-1]
        return [document.tolist() for document in np.split(self.tokens, ends)]

    def get_depth(self) -> int:
        return min(DEPTH, len(self.lengths))


def generate_corpus(documents: int, queries: int) -> Corpus:
    """Return a generated corpus of n documents."""
    zipf = Zipf()
    tokens, lengths = zipf.draw_corpus(documents)
    terms = [f"w{word}" for word in range(zipf.words)]
    return Corpus(f"generated {documents:,}", tokens, lengths, terms, zipf.draw_queries(queries))


def read_bundled(name: str, queries: int) -> Corpus:
    """Return a bundled catalog with queries."""
    numbers = {}
    documents = []
    for text in read_texts(HERE / "data" / name / "corpus.jsonl.gz"):
        document = [numbers.setdefault(token, len(numbers)) for token in analyze(text)]
        documents.append(document)
    tokens = np.concatenate([np.array(document, np.int32) for document in documents])
    lengths = np.array([len(document) for document in documents])
    drawn = draw_queries(documents, tokens, queries)
    return Corpus(name, tokens, lengths, list(numbers), drawn)


def read_texts(path: Path) -> list[str]:
    """Read a catalog's texts: title and description."""
    texts = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            texts.append(f"{row['title']} {row['text']}")
    return texts


def draw_queries(documents: list[list[int]], tokens: np.ndarray, count: int) -> list[list[int]]:
    """Draw queries of distinct terms.

    Half of a query's terms come from one document, half from the whole catalog, as often as they
    are there.
    """
    random = np.random.default_rng(0)
    queries = []
    for size in random.integers(10, 41, count):
        document = documents[random.integers(len(documents))]
        query = {}
        for turn in range(1000):
            source = document if turn % 2 else tokens
            query[int(random.choice(source))] = None
            if len(query) == size:
                break
        queries.append(list(query))
    return queries


class Ours:
    """Run our BM25."""

    def __init__(self, scorer: str, corpus: Corpus):
        self.name = f"ours, {scorer}"
        self.scorer = scorer
        self.corpus = corpus
        self.query_count = QUERIES
        self.turns = EVERY_TURN
        self.build_turns = EVERY_TURN
        self.queries = [dict.fromkeys(query, 1) for query in corpus.queries]

    def prepare(self) -> None:
        """Compile: what is compiled once is no index time."""
        one = np.zeros(1, np.int64)
        build_postings(one.astype(np.int32), one + 1, one, 1, self.scorer == "numba")

    def build_index(self) -> None:
        c = self.corpus
        order = np.arange(len(c.lengths))
        postings = build_postings(c.tokens, c.lengths, order, len(c.terms), self.scorer == "numba")
        impacts = compute_impacts(BM25Parameters(), *postings, c.lengths)
        self.arrays = (*postings[:2], impacts)

    def load_index(self) -> None:
        meta = dict(format=FORMAT, dropped=[0], k1=1.2, b=0.75, variant="lucene", length="exact")
        ids = StringTable.of(f"{row:09}" for row in range(len(self.corpus.lengths)))
        terms = StringTable.of(self.corpus.terms)
        self.index = BM25Index(meta, ids, terms, *self.arrays)
        self.bm25 = BM25Searcher(self.index, self.scorer)

    def count_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def save(self, folder: str) -> None:
        self.index.save(folder)

    def search(self, count: int, threads: int) -> np.ndarray:
        torch.set_num_threads(threads)
        return self.bm25.rank(self.queries[:count], self.corpus.get_depth())[0]


class Bm25s:
    """Run bm25s."""

    def __init__(self, backend: str, corpus: Corpus):
        self.name = f"bm25s, {backend}"
        self.backend = backend
        self.corpus = corpus
        self.documents = corpus.split_documents()
        self.query_count = QUERIES if backend == "numba" else SLOW
        self.turns = EVERY_TURN if backend == "numba" else 2
        self.build_turns = 2

    def prepare(self) -> None:
        self.model = bm25s.BM25(method="lucene", k1=1.2, b=0.75, backend=self.backend)
        if self.backend == "numba":
            self.model.warmup_numba_csc()

    def build_index(self) -> None:
        vocabulary = {term: number for number, term in enumerate(self.corpus.terms)}
        tokenized = Tokenized(ids=self.documents, vocab=vocabulary)
        self.model.index(tokenized, show_progress=False)

    def load_index(self) -> None:
        self.documents = None

    def count_bytes(self) -> int:
        return sum(self.model.scores[name].nbytes for name in ("data", "indices", "indptr"))

    def save(self, folder: str) -> None:
        self.model.save(folder, show_progress=False)

    def search(self, count: int, threads: int) -> np.ndarray:
        result = self.model.retrieve(
            self.corpus.queries[:count],
            k=self.corpus.get_depth(),
            n_threads=0 if threads == 1 else threads,
            show_progress=False,
            backend_selection=self.backend,
        )
        return result.documents


class RankBm25:
    """Run rank_bm25."""

    def __init__(self, corpus: Corpus):
        self.name = "rank_bm25 (Okapi)"
        self.corpus = corpus
        self.documents = corpus.split_documents()
        self.query_count = 4
        self.turns = 1
        self.build_turns = 1

    def prepare(self) -> None:
        pass

    def build_index(self) -> None:
        self.model = BM25Okapi(self.documents, k1=1.5, b=0.75)

    def load_index(self) -> None:
        self.documents = None

    def count_bytes(self) -> None:
        return None

    def search(self, count: int, threads: int) -> np.ndarray:
        rankings = []
        for query in self.corpus.queries[:count]:
            scores = self.model.get_scores(query)
            ranking = np.argsort(-scores, kind="stable")
            rankings.append(ranking[:DEPTH])
        return np.array(rankings)


def time_call(call, *args) -> float:
    """Return the seconds of a call."""
    start = perf_counter()
    call(*args)
    return perf_counter() - start


def read_resident(entry: str) -> int:
    """Return the resident memory of this process, Rss or Pss, in bytes."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            kib = line.split()[1]
            return 1024 * int(kib)
    raise RuntimeError(f"/proc/self/smaps_rollup has no line {entry}")


def measure_growth_here(
    kind: str, folder: str, queries: list[list[int]], pipe, entry: str = "Rss"
) -> None:
    """Send by how much loading and searching makes this fresh process grow.

    It keeps in step with others where there are any.
    """
    engine, backend = kind.split(", ")
    if engine == "bm25s":
        warm = bm25s.BM25(backend=backend)
        warm.index([[0, 1], [1, 2]], show_progress=False)
        warm.retrieve([[0]], k=1, show_progress=False)
    else:
        BM25Searcher.build(["a"], ["a0"], scorer=backend).search(["a0"], 1)
    pipe.send(None)
    pipe.recv()
    before = read_resident(entry)
    if engine == "bm25s":
        model = bm25s.BM25.load(folder)
        depth = min(DEPTH, model.scores["num_docs"])
        model.retrieve(queries, k=depth, show_progress=False)
    else:
        model = BM25Searcher(BM25Index.load(folder), backend)
        model.rank([dict.fromkeys(query, 1) for query in queries], DEPTH)
    pipe.send(None)
    pipe.recv()
    pipe.send(read_resident(entry) - before)
    pipe.recv()


def measure_growth(
    kind: str, folder: str, queries: list[list[int]], processes: int = 1, entry: str = "Rss"
) -> int:
    """Return the bytes by which fresh processes grow, summed over them."""
    spawn = multiprocessing.get_context("spawn")
    pipes = []
    running = []
    for _ in range(processes):
        pipe, far_end = spawn.Pipe()
        arguments = (kind, folder, queries, far_end, entry)
        process = spawn.Process(target=measure_growth_here, args=arguments)
        process.start()
        running.append(process)
        pipes.append(pipe)
    for _ in range(3):
        messages = [pipe.recv() for pipe in pipes]
        for pipe in pipes:
            pipe.send(None)
    for process in running:
        process.join()
    return sum(messages)


@dataclass
class Figures:
    """Hold what was measured of one engine; seconds, and rates by number of threads."""

    builds: list[float] = field(default_factory=list)
    rates: dict[int, list[float]] = field(default_factory=lambda: {1: [], 2: []})
    bytes_per_posting: float = NAN
    growth_mb: float = NAN
    top_10: float = NAN
    top: float = NAN

    @property
    def build_seconds(self) -> float:
        return median(self.builds)

    def compute_rate(self, threads: int) -> float:
        rates = self.rates[threads]
        return median(rates) if rates else NAN


def measure_engines(corpus: Corpus, pairs: int, slow: bool) -> tuple[dict[str, Figures], Ours]:
    """Return {engine: figures}, printed as rows of the table, and ours with numba."""
    with_torch = Ours("torch", corpus)
    with_numba = Ours("numba", corpus)
    reference = Bm25s("numpy", corpus)
    sides = [with_torch, with_numba, Bm25s("numba", corpus), reference]
    if slow:
        sides.append(RankBm25(corpus))
    figures = {side.name: Figures() for side in sides}

    time_builds(sides, figures, pairs)
    for side in sides:
        side.load_index()
    gc.collect()
    print_corpus(corpus, with_torch)
    compare_rankings(sides, figures, find_reference(reference))
    time_queries(sides, figures, pairs)
    postings = len(with_torch.arrays[1])
    for side in sides:
        size = side.count_bytes()
        if size:
            figures[side.name].bytes_per_posting = size / postings
        if hasattr(side, "save"):
            figures[side.name].growth_mb = measure_saved_growth(side) / 1e6
        print_row(side, figures[side.name])
    return figures, with_numba


def time_builds(sides: list, figures: dict[str, Figures], pairs: int) -> None:
    """Time the sides' indexing in turn."""
    for turn in range(pairs):
        for side in sides:
            if turn < side.build_turns:
                side.prepare()
                seconds = time_call(side.build_index)
                figures[side.name].builds.append(seconds)


def print_corpus(corpus: Corpus, ours: Ours) -> None:
    """Print the corpus' size and how many postings a query touches."""
    postings_per_term = np.diff(ours.arrays[0])
    touched = []
    for query in corpus.queries[:CHECKED]:
        touched.append(sum(postings_per_term[query]))
    documents = len(corpus.lengths)
    tokens = len(corpus.tokens)
    terms = len(corpus.terms)
    postings = len(ours.arrays[1])
    print(
        f"{corpus.name}: {documents:,} documents, {tokens:,} tokens, "
        f"{terms:,} terms, {postings:,} postings, "
        f"{np.mean(touched):,.0f} of them touched by a query"
    )


def find_reference(side: Bm25s) -> list[np.ndarray]:
    """Return the documents that bm25s' numpy path finds for the queries that are checked."""
    result = side.model.retrieve(
        side.corpus.queries[:CHECKED],
        k=side.corpus.get_depth(),
        show_progress=False,
        backend_selection="numpy",
    )
    rankings = []
    for documents, scores in zip(result.documents, result.scores):
        rankings.append(documents[scores > 0])
    return rankings


def compare_rankings(sides: list, figures: dict[str, Figures], reference: list[np.ndarray]) -> None:
    """Compute each side's overlap with the reference; it warms the sides up, too."""
    for side in sides:
        count = min(side.query_count, CHECKED)
        # compiles, too
        rankings = side.search(count, 1)
        figures[side.name].top_10 = compute_overlap(rankings, reference[:count], 10)
        figures[side.name].top = compute_overlap(rankings, reference[:count], DEPTH)
        if side.turns > 1:
            side.search(2, 2)


def compute_overlap(rankings: np.ndarray, reference: list[np.ndarray], depth: int) -> float:
    """Return the mean share of the reference's documents that were ranked, too."""
    shares = []
    for ranking, want in zip(rankings, reference):
        top = set(ranking[:depth].tolist())
        want_top = want[:depth].tolist()
        shares.append(len(top & set(want_top)) / len(want_top))
    return np.mean(shares)


def time_queries(sides: list, figures: dict[str, Figures], pairs: int) -> None:
    """Time the sides' batches in turn, with one thread and with two."""
    for turn in range(pairs):
        for threads in (1, 2):
            for side in sides:
                if turn >= side.turns:
                    continue
                if threads == 2 and side.turns == 1:
                    continue
                seconds = time_call(side.search, side.query_count, threads)
                rate = count_queries(side) / seconds
                figures[side.name].rates[threads].append(rate)


def count_queries(side) -> int:
    """Return how many queries a batch of the side has."""
    return min(side.query_count, len(side.corpus.queries))


def measure_saved_growth(side: Ours | Bm25s) -> int:
    """Return the bytes by which a fresh process grows that loads the side's index."""
    queries = side.corpus.queries[:CHECKED]
    with tempfile.TemporaryDirectory() as folder:
        side.save(f"{folder}/index")
        return measure_growth(side.name, f"{folder}/index", queries)


def print_row(side, figures: Figures) -> None:
    """Print an engine's row of the table."""
    builds = len(figures.builds)
    turns = len(figures.rates[1])
    index = f"{figures.build_seconds:9.3f}{builds:4}"
    memory = f"{figures.bytes_per_posting:11.2f}{figures.growth_mb:8.0f}"
    rates = f"{figures.compute_rate(1):14.1f}{figures.compute_rate(2):11.1f}"
    overlap = f"{figures.top_10:9.3f}{figures.top:9.3f}"
    print(
        f"{side.corpus.name:<20}{side.name:<20}{index}{memory}{rates}"
        f"{count_queries(side):5} x {turns}{overlap}",
        flush=True,
    )


def measure_reward(ours: Ours, pairs: int) -> float:
    """Time a step's reward: 384 sampled completions -> text -> query -> ranking -> NDCG@1000.

    Returns the median over fresh batches, after one.
    """
    torch.set_num_threads(2)
    tokenizer = load_tokenizer(str(HERE / "policy"))
    random = np.random.default_rng(1)

    def decode(ids) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    times = []
    for _ in range(pairs + 1):
        rollouts, qrels = make_rollouts(ours.corpus, tokenizer, random)
        scorer = Scorer(
            ProductSearch(RewardConfig()),
            ours.bm25,
            qrels,
            RewardTerms(RewardConfig(), DEPTH),
            decode,
            limit=512,
        )
        start = perf_counter()
        rewards = scorer.score(rollouts)
        times.append(perf_counter() - start)
        assert not any(reward.error for reward in rewards), rewards[0]
    return median(times[1:])


def make_rollouts(
    corpus: Corpus, tokenizer, random: np.random.Generator
) -> tuple[list[Rollout], dict[str, dict[str, float]]]:
    """Make a completion for each query, its terms shuffled, and judge five documents for each."""
    rollouts = []
    qrels = {}
    for number, query in enumerate(corpus.queries):
        words = [corpus.terms[term] for term in random.permutation(query)]
        text = " ".join(words)
        ids = tokenizer.encode(f'</think><answer>{{"query": "{text}"}}</answer>')
        rows = random.integers(len(corpus.lengths), size=5)
        qrels[f"q{number}"] = {f"{row:09}": 1.0 for row in rows}
        prompt = Prompt(f"q{number}", number, "", ())
        logp = (0.0,) * len(ids)
        rollouts.append(Rollout(prompt, number, 0, tuple(ids), logp, True))
    return rollouts, qrels


def measure_shared_index(ours: Ours) -> tuple[int, int]:
    """Return the bytes of our saved index, and by how much four processes with it grow (PSS)."""
    queries = ours.corpus.queries[:CHECKED]
    with tempfile.TemporaryDirectory() as folder:
        ours.save(f"{folder}/index")
        size = sum(path.stat().st_size for path in Path(folder, "index").iterdir())
        growth = measure_growth("ours, numba", f"{folder}/index", queries, 4, "Pss")
    return size, growth


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--documents", default="50000,200000,1000000", help="sizes of generated corpora"
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: times mean nothing")
    return parser.parse_args()


def main() -> None:
    """Run the corpora and print the bars."""
    args = parse_arguments()
    if args.dry_run:
        bundled = ()
        sizes = [3000]
        queries = 24
        pairs = 1
    else:
        bundled = ("msrd", "esci_small")
        sizes = [int(size) for size in args.documents.split(",")]
        queries = QUERIES
        pairs = args.pairs
    print("  ".join(COLUMNS))
    for name in bundled:
        measure_engines(read_bundled(name, queries), pairs, True)
    for size in sizes:
        corpus = generate_corpus(size, queries)
        figures, ours = measure_engines(corpus, pairs, size <= 50_000)

    reward = measure_reward(ours, pairs)
    index_bytes, growth = measure_shared_index(ours)
    speedup = figures["bm25s, numba"].build_seconds / figures["ours, torch"].build_seconds
    print(
        f"{corpus.name}: a reward of {queries} completions, 2 threads, {reward:.3f} s; "
        f"four processes with one index of {index_bytes / 1e6:.0f} MB: "
        f"PSS rises by {growth / 1e6:.0f} MB; "
        f"index from token numbers, numpy: {speedup:.1f}x bm25s numba's "
        "speed"
    )
    bars = make_bars(corpus.name, figures, queries, reward, growth / index_bytes)
    print(json.dumps({"bars": bars}))


def make_bars(
    corpus: str, figures: dict[str, Figures], queries: int, reward: float, shared: float
) -> list[dict]:
    """Return the bars of the largest corpus."""
    with_torch = figures["ours, torch"]
    with_numba = figures["ours, numba"]
    theirs = figures["bm25s, numba"]
    torch_rate = with_torch.compute_rate(1)
    numba_rate = with_numba.compute_rate(1)
    their_rate = theirs.compute_rate(1)
    numba_gain = with_numba.compute_rate(2) / numba_rate
    torch_gain = with_torch.compute_rate(2) / torch_rate
    build_ratio = theirs.build_seconds / with_numba.build_seconds
    overlap_10 = min(with_torch.top_10, with_numba.top_10)
    overlap = min(with_torch.top, with_numba.top)
    bars = [
        make_at_least("numba / bm25s numba, 1 thread", numba_rate / their_rate, 1.5),
        make_at_least("torch / bm25s numba, 1 thread", torch_rate / their_rate, 0.85),
        make_at_least("numba, 2 threads / 1", numba_gain, 1.7),
        make_at_least("torch, 2 threads / 1", torch_gain, 1.7),
        make_at_least("index from token numbers, numba / bm25s numba", build_ratio, 20),
        make_at_most("bytes per posting", with_numba.bytes_per_posting, 8.5),
        make_at_most(f"seconds of a reward of {queries} completions", reward, 3),
        make_at_most("PSS of four processes / index", shared, 1.5),
        make_at_least("overlap with bm25s, top 10", overlap_10, 0.98),
        make_at_least(f"overlap with bm25s, top {DEPTH}", overlap, 0.98),
    ]
    for bar in bars:
        bar["name"] = f"{corpus}: {bar['name']}"
    return bars


def make_at_least(name: str, value: float, least: float) -> dict:
    """Return a bar that holds for values from the limit."""
    return dict(name=name, value=round(float(value), 4), bar=least, ok=bool(value >= least))


def make_at_most(name: str, value: float, most: float) -> dict:
    """Return a bar that holds for values up to the limit."""
    return dict(name=name, value=round(float(value), 4), bar=most, ok=bool(value <= most))


if __name__ == "__main__":
    main()
