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
        return self.vectors[[int(text) for text in texts]]

    def windows(self, texts, done):
        for start in range(0, len(texts), 8192):
            yield self(texts[start : start + 8192])
            done(len(texts[start : start + 8192]))


def draw_mixture(n: int, seed: int) -> np.ndarray:
    """Draw n points (n, 384); the mixture is the same for every seed."""
    centers = SPREAD * np.random.default_rng(0).standard_normal((CENTERS, WIDTH // 2), np.float32)
    turn = np.random.default_rng(1).standard_normal((WIDTH // 2, WIDTH), np.float32) / np.float32(
        (WIDTH // 2) ** 0.5
    )
    rng = np.random.default_rng(seed)
    points = (
        centers[rng.integers(0, CENTERS, n)] + rng.standard_normal((n, WIDTH // 2), np.float32)
    ) @ turn
    points += np.float32(NOISE) * rng.standard_normal((n, WIDTH), np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def main() -> None:
    """Run the comparisons and print the bars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--ef", type=int, nargs="+", default=[100, 200, 400, RetrieverConfig.ef_search, 800]
    )
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        args.documents = 3000
        args.pairs = 2
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    bars = []
    vectors = draw_mixture(args.documents, 2)
    asked = draw_mixture(3 * BATCH, 3)
    ids = [str(i) for i in range(args.documents)]
    queries = [str(args.documents + i) for i in range(len(asked))]
    encoder = Lookup(np.concatenate([vectors, asked]))
    print(
        f"{args.documents:,} x {WIDTH}, top-{K}, {args.threads} threads, faiss {faiss.__version__}"
    )

    with tempfile.TemporaryDirectory() as folder:
        ours = load_or_build_dense(encoder, ids, ids, folder)
        ratio, rate, single = compare_with_faiss(ours, vectors, asked, queries, args.pairs)
        print(
            f"exact, {ours.description}: {rate:,.0f} queries/s in batches of {BATCH}, "
            f"{single:,.0f} one by one; time over IndexFlatIP's own {ratio:.3f}"
        )
        bars.append(
            dict(
                name="exact search on the CPU: time over IndexFlatIP's",
                value=ratio,
                bar=1.05,
                ok=ratio <= 1.05,
            )
        )
        bars += [
            *check_torch_on_cpu(vectors, asked, ours, queries),
            *measure_hnsw(folder, ids, encoder, ours, queries, args),
        ]
    if torch.cuda.is_available():
        bars += measure_on_gpu()
    print(json.dumps({"bars": bars}))


def compare_with_faiss(
    ours: DenseSearcher, vectors: np.ndarray, asked: np.ndarray, queries: list[str], pairs: int
) -> tuple[float, float, float]:
    """Return the ratio of times, and our queries/s in batches and one by one.

    The ratio is the median over interleaved pairs. The results must be equal.
    """
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(vectors)
    scores, rows = flat.search(asked[:BATCH], K)
    found = ours.search(queries[:BATCH], K)
    assert np.array_equal(found[1], scores) and np.array_equal(np.sort(found[0]), np.sort(rows))
    ratios = []
    times = []
    for i in range(pairs):
        part = slice(i % 3 * BATCH, (i % 3 + 1) * BATCH)
        runs = {
            "theirs": lambda: flat.search(asked[part], K),
            "ours": lambda: ours.search(queries[part], K),
        }
        took = {
            name: time_call(runs[name])
            for name in (sorted(runs) if i % 2 else sorted(runs, reverse=True))
        }
        ratios.append(took["ours"] / took["theirs"])
        times.append(took["ours"])
    one = np.median([time_call(lambda: ours.search([query], K)) for query in queries[:20]])
    return float(np.median(ratios)), BATCH / float(np.median(times)), 1 / float(one)


def check_torch_on_cpu(
    vectors: np.ndarray, asked: np.ndarray, ours: DenseSearcher, queries: list[str]
) -> list[dict]:
    """Run on the CPU what a GPU without faiss-gpu runs: it must rank the same."""
    nearest = make_torch_search(vectors, torch.device("cpu"))
    scores, _ = nearest(asked[:BATCH], K)
    off = float(np.abs(scores - ours.search(queries[:BATCH], K)[1]).max())
    print(
        "exact, torch (two-level top-k) on the CPU: "
        f"{BATCH / time_call(lambda: nearest(asked[:BATCH], K)):,.0f} queries/s in batches; "
        f"scores off by {off:.1e}"
    )
    return [
        dict(
            name="torch's two-level top-k: scores off exact search's",
            value=off,
            bar=1e-5,
            ok=off <= 1e-5,
        )
    ]


def measure_hnsw(
    folder: str, ids: list[str], encoder: Lookup, truth: DenseSearcher, queries: list[str], args
) -> list[dict]:
    """Measure HNSW: recall and rates at each efSearch."""
    started = time.perf_counter()
    bars = []
    true = truth.search(queries, K)[0].tolist()
    for n, ef in enumerate(sorted(set(args.ef) | {RetrieverConfig.ef_search})):
        graph = load_or_build_dense(encoder, ids, ids, folder, index="hnsw", ef_search=ef)
        if not n:
            size = (Path(folder) / "hnsw/hnsw.faiss").stat().st_size / 2**20
            print(
                f"HNSW, M {M}, efConstruction {EF_CONSTRUCTION}: built in "
                f"{time.perf_counter() - started:.0f} s, {size:.0f} MiB with the vectors"
            )
        found = graph.search(queries, K)[0].tolist()
        recall = float(np.mean([len(set(a) & set(b)) / K for a, b in zip(true, found)]))
        rate = BATCH / np.median(
            [
                time_call(lambda: graph.search(queries[i * BATCH : (i + 1) * BATCH], K))
                for i in range(3)
            ]
        )
        single = 1 / np.median(
            [time_call(lambda: graph.search([query], K)) for query in queries[:50]]
        )
        print(
            f"  efSearch {ef:<5} recall@{K} {recall:.4f}   {rate:8,.0f} queries/s in batches, "
            f"{single:7,.0f} one by one"
        )
        if ef == RetrieverConfig.ef_search:
            bars.append(
                dict(
                    name=f"HNSW recall@{K} of exact at the default efSearch {ef}",
                    value=recall,
                    bar=BAR,
                    ok=recall >= BAR,
                )
            )
    return bars


def measure_on_gpu() -> list[dict]:
    """Time a batch over 1M documents on this GPU, top-1000.

    The transfer of queries and results is included.
    """
    device = dist.device()
    bars = []
    vectors = draw_mixture(1_000_000, 2)
    asked = draw_mixture(BATCH, 3)
    searchers = {"torch": make_torch_search(vectors, device)}
    nearest, how = make_exact_search(vectors, device)
    if "faiss" in how:
        searchers["faiss"] = nearest
    for name, search in searchers.items():
        search(asked, 1000)
        ms = 1000 * float(np.median([time_call(lambda: search(asked, 1000)) for _ in range(10)]))
        print(
            f"exact, {name} on {torch.cuda.get_device_name()}, 1,000,000 documents, top-1000: "
            f"{ms:.1f} ms per batch of {BATCH}"
        )
        bars.append(
            dict(
                name=f"exact batch over 1M documents on a GPU, {name}, ms",
                value=ms,
                bar=20,
                ok=ms <= 20,
            )
        )
    return bars


def time_call(run) -> float:
    """Return the seconds of a call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
