"""Compare exact search and HNSW behind the retriever's interface with faiss itself.

python experiments/benchmarks/dense.py [--threads 1]

The hard set: 100,000 x 384, a Gaussian mixture in 192 dimensions (CENTERS centers, their spread
SPREAD of the points' own) turned into 384, with noise, normalized; seeded. Queries come from the
same mixture. On easier data (a few dimensions, tight clusters) any graph finds everything. Texts
are numbers and the encoder is a stand-in that looks the vector up, so what is timed is the search
as a run calls it, without encoding.

Exact: batches of 384, top-100, in turn with faiss.IndexFlatIP.search, median of the pairs' ratios.
HNSW: M 32, efConstruction 200; recall@100 of exact at each efSearch, queries/s in batches and one
by one. On a GPU also exact search over 1M documents, by torch and by faiss-gpu where it is
installed. `--dry-run`: a tiny size; it shows that the bench works, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from recr1.config.schema import RetrieverConfig
from recr1.distributed import collectives as dist
from recr1.retrieval.dense.searcher import (
    EF_CONSTRUCTION,
    DenseSearcher,
    M,
    load_or_build_dense,
    make_exact_search,
    make_torch_search,
)

CENTERS = 1000
SPREAD = 0.5
NOISE = 0.1
WIDTH = 384
K = 100
BATCH = 384
BAR = 0.95


class Lookup:
    """Take an encoder's place: the text "17" is the 17th vector."""

    pooling = "none"
    max_length = 0
    dtype = "float32"
    path = "vectors looked up"
    digest = ""
    device = torch.device("cpu")

    def __init__(self, vectors: np.ndarray):
        self.vectors = vectors
        self.width = vectors.shape[1]

    def __call__(self, texts) -> np.ndarray:
        rows = [int(text) for text in texts]
        return self.vectors[rows]

    def windows(self, texts, on_progress):
        for start in range(0, len(texts), 8192):
            window = texts[start : start + 8192]
            yield self(window)
            on_progress(len(window))


def draw_mixture(n: int, seed: int) -> np.ndarray:
    """Draw n points (n, 384); the mixture is the same for every seed."""
    half = WIDTH // 2
    centers = np.random.default_rng(0).standard_normal((CENTERS, half), np.float32)
    centers = SPREAD * centers
    turn = np.random.default_rng(1).standard_normal((half, WIDTH), np.float32)
    turn = turn / np.float32(half**0.5)

    rng = np.random.default_rng(seed)
    points = centers[rng.integers(0, CENTERS, n)]
    points = points + rng.standard_normal((n, half), np.float32)
    points = points @ turn
    points += np.float32(NOISE) * rng.standard_normal((n, WIDTH), np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; a dry run has sizes of its own."""
    default_ef = [100, 200, 400, RetrieverConfig.ef_search, 800]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--ef", type=int, nargs="+", default=default_ef)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        args.documents = 3000
        args.pairs = 2
    return args


def main() -> None:
    """Run the comparisons and print the bars."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    vectors = draw_mixture(args.documents, 2)
    query_vectors = draw_mixture(3 * BATCH, 3)
    encoder = Lookup(np.concatenate([vectors, query_vectors]))
    ids = [str(row) for row in range(args.documents)]
    queries = [str(row) for row in range(args.documents, len(encoder.vectors))]
    print(
        f"{args.documents:,} x {WIDTH}, top-{K}, {args.threads} threads, faiss {faiss.__version__}"
    )

    with tempfile.TemporaryDirectory() as folder:
        exact = load_or_build_dense(encoder, ids, ids, folder)
        bars = compare_with_faiss(exact, vectors, query_vectors, queries, args.pairs)
        bars += check_torch_on_cpu(vectors, query_vectors, exact, queries)
        bars += measure_hnsw(folder, ids, encoder, exact, queries, args.ef)
    if torch.cuda.is_available():
        bars += measure_on_gpu()
    print(json.dumps({"bars": bars}))


def compare_with_faiss(
    ours: DenseSearcher,
    vectors: np.ndarray,
    query_vectors: np.ndarray,
    queries: list[str],
    pairs: int,
) -> list[dict]:
    """Measure the ratio of times, and our queries/s in batches and one by one.

    The ratio is the median over interleaved pairs. The results must be equal.
    """
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(vectors)
    check_equal_results(ours, flat, query_vectors, queries)

    ratios = []
    our_times = []
    for i in range(pairs):
        start = i % 3 * BATCH
        batch = slice(start, start + BATCH)
        sides = {
            "theirs": lambda: flat.search(query_vectors[batch], K),
            "ours": lambda: ours.search(queries[batch], K),
        }
        seconds = {}
        for name in sorted(sides, reverse=i % 2 == 0):
            seconds[name] = time_call(sides[name])
        ratios.append(seconds["ours"] / seconds["theirs"])
        our_times.append(seconds["ours"])

    ratio = float(np.median(ratios))
    rate = BATCH / float(np.median(our_times))
    single_rate = 1 / float(time_single_queries(ours, queries[:20]))
    print(
        f"exact, {ours.description}: {rate:,.0f} queries/s in batches of {BATCH}, "
        f"{single_rate:,.0f} one by one; time over IndexFlatIP's own {ratio:.3f}"
    )
    return [make_bar("exact search on the CPU: time over IndexFlatIP's", ratio, 1.05)]


def check_equal_results(
    ours: DenseSearcher, flat: faiss.IndexFlatIP, query_vectors: np.ndarray, queries: list[str]
) -> None:
    """Assert that one batch gives faiss' own scores and rows."""
    want_scores, want_rows = flat.search(query_vectors[:BATCH], K)
    rows, scores = ours.search(queries[:BATCH], K)
    assert np.array_equal(scores, want_scores)
    assert np.array_equal(np.sort(rows), np.sort(want_rows))


def time_single_queries(searcher: DenseSearcher, queries: list[str]) -> float:
    """Return the median seconds of a search for one query."""
    times = []
    for query in queries:
        seconds = time_call(lambda: searcher.search([query], K))
        times.append(seconds)
    return np.median(times)


def check_torch_on_cpu(
    vectors: np.ndarray, query_vectors: np.ndarray, ours: DenseSearcher, queries: list[str]
) -> list[dict]:
    """Run on the CPU what a GPU without faiss-gpu runs: it must rank the same."""
    search = make_torch_search(vectors, torch.device("cpu"))
    scores, _ = search(query_vectors[:BATCH], K)
    _, want = ours.search(queries[:BATCH], K)
    error = float(np.abs(scores - want).max())
    seconds = time_call(lambda: search(query_vectors[:BATCH], K))
    print(
        "exact, torch (two-level top-k) on the CPU: "
        f"{BATCH / seconds:,.0f} queries/s in batches; "
        f"scores off by {error:.1e}"
    )
    return [make_bar("torch's two-level top-k: scores off exact search's", error, 1e-5)]


def measure_hnsw(
    folder: str,
    ids: list[str],
    encoder: Lookup,
    exact: DenseSearcher,
    queries: list[str],
    ef_values: list[int],
) -> list[dict]:
    """Measure HNSW: recall and rates at each efSearch."""
    bars = []
    default_ef = RetrieverConfig.ef_search
    started = time.perf_counter()
    true_rows = exact.search(queries, K)[0].tolist()
    for number, ef in enumerate(sorted({*ef_values, default_ef})):
        graph = load_or_build_dense(encoder, ids, ids, folder, index="hnsw", ef_search=ef)
        if number == 0:
            print_build(folder, time.perf_counter() - started)

        rows = graph.search(queries, K)[0].tolist()
        recall = compute_recall(rows, true_rows)
        rate = BATCH / time_batches(graph, queries)
        single_rate = 1 / time_single_queries(graph, queries[:50])
        print(
            f"  efSearch {ef:<5} recall@{K} {recall:.4f}   {rate:8,.0f} queries/s in batches, "
            f"{single_rate:7,.0f} one by one"
        )
        if ef == default_ef:
            name = f"HNSW recall@{K} of exact at the default efSearch {ef}"
            bars.append(dict(name=name, value=recall, bar=BAR, ok=recall >= BAR))
    return bars


def print_build(folder: str, seconds: float) -> None:
    """Print how long the graph took to build, and its size."""
    file = Path(folder) / "hnsw/hnsw.faiss"
    size = file.stat().st_size / 2**20
    print(
        f"HNSW, M {M}, efConstruction {EF_CONSTRUCTION}: built in "
        f"{seconds:.0f} s, {size:.0f} MiB with the vectors"
    )


def compute_recall(rows: list[list[int]], true_rows: list[list[int]]) -> float:
    """Return the mean share of the true rows that were found."""
    shares = []
    for true, actual in zip(true_rows, rows):
        common = set(true) & set(actual)
        shares.append(len(common) / K)
    return float(np.mean(shares))


def time_batches(searcher: DenseSearcher, queries: list[str]) -> float:
    """Return the median seconds of a search for one batch, of three."""
    times = []
    for i in range(3):
        seconds = time_call(lambda: searcher.search(queries[i * BATCH : (i + 1) * BATCH], K))
        times.append(seconds)
    return np.median(times)


def measure_on_gpu() -> list[dict]:
    """Time a batch over 1M documents on this GPU, top-1000.

    The transfer of queries and results is included.
    """
    device = dist.device()
    vectors = draw_mixture(1_000_000, 2)
    query_vectors = draw_mixture(BATCH, 3)
    searches = {"torch": make_torch_search(vectors, device)}
    search, description = make_exact_search(vectors, device)
    if "faiss" in description:
        searches["faiss"] = search

    bars = []
    for name, search in searches.items():
        search(query_vectors, 1000)
        times = []
        for _ in range(10):
            times.append(time_call(lambda: search(query_vectors, 1000)))
        ms = 1000 * float(np.median(times))
        print(
            f"exact, {name} on {torch.cuda.get_device_name()}, 1,000,000 documents, top-1000: "
            f"{ms:.1f} ms per batch of {BATCH}"
        )
        bar = make_bar(f"exact batch over 1M documents on a GPU, {name}, ms", ms, 20)
        bars.append(bar)
    return bars


def time_call(call) -> float:
    """Return the seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def make_bar(name: str, value: float, most: float) -> dict:
    """Return a bar for the line of JSON."""
    return dict(name=name, value=value, bar=most, ok=value <= most)


if __name__ == "__main__":
    main()
