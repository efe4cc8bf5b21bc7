"""Score what a policy learned with one retriever on another.

python experiments/analysis/cross_retriever.py RUN RUN [...] [--json]

It takes finished runs on the same test queries and searches each one's rewrites (its
eval_after.jsonl) with every run's retriever, as its config.yaml names it. Nothing is taken over
from the runs but the rewrites: what a run scored on its own retriever is computed again, and must
be what it wrote down.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from recr1.config import loader as configs
from recr1.config.schema import Config
from recr1.data import readers
from recr1.evaluation.evaluate import compute_mean_ci
from recr1.retrieval.factory import build_retriever, get_index_dir
from recr1.retrieval.interface import Retriever
from recr1.tasks.ranking_metrics import compute_ndcg


@dataclass
class Run:
    """Hold a finished run: its config, and its test queries with their rewrites."""

    folder: Path
    cfg: Config
    rows: list[dict]


def main() -> None:
    """Search every run's rewrites with every run's retriever and print the scores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = parser.parse_args()
    runs = [read_run(folder) for folder in args.runs]
    first = runs[0]
    for run in runs:
        check_comparable(run, first)
    data = first.cfg.data
    qrels, *_ = readers.read_qrels(data.test_qrels or data.train_qrels, data.on_bad_line)
    relevance = [qrels.get(row["id"], {}) for row in first.rows]
    k = first.cfg.reward.k_eval

    result = []
    lines = [
        f"NDCG@{k} on {len(relevance)} test queries, mean and 95% paired bootstrap interval of the "
        "gain over the raw query"
    ]
    for number, searcher in enumerate(runs):
        retriever = open_retriever(searcher)
        raw_queries = [row["raw"] for row in searcher.rows]
        raw = score_queries(retriever, raw_queries, relevance, k)
        check_logged(searcher, "ndcg_raw", raw)
        note = describe_weights(searcher.cfg.retriever.encoder)
        if number > 0:
            lines.append("")
        lines.append(f"searched with {retriever.description}{note}")
        lines.append(f"  {'raw query':<44}{raw.mean():8.4f}")
        for writer in runs:
            rewrites = [row["rewrite"] for row in writer.rows]
            scores = score_queries(retriever, rewrites, relevance, k)
            if writer.folder == searcher.folder:
                check_logged(searcher, "ndcg", scores)
            figures = compare_scores(searcher, writer, raw, scores)
            result.append(figures)
            lines.append(format_gain(writer, figures))
    print("\n".join(lines))
    if args.json:
        print(json.dumps(result))


def compare_scores(searcher: Run, writer: Run, raw: np.ndarray, scores: np.ndarray) -> dict:
    """Return the means of the raw queries and of the writer's rewrites, and the gain."""
    gain, interval = compute_mean_ci(scores - raw)
    return dict(
        searched_with=searcher.cfg.retriever.kind,
        encoder=searcher.cfg.retriever.encoder,
        trained_with=writer.cfg.retriever.kind,
        run=str(writer.folder),
        raw=raw.mean(),
        rewritten=scores.mean(),
        gain=gain,
        gain_ci95=list(interval),
    )


def format_gain(writer: Run, figures: dict) -> str:
    """Format the line of a run's rewrites."""
    name = f"rewritten, trained with {figures['trained_with']} ({writer.folder.name})"
    low, high = figures["gain_ci95"]
    gain = f"{figures['gain']:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"  {name:<44}{figures['rewritten']:8.4f}   gain {gain}"


def read_run(folder: Path) -> Run:
    """Read a run's config and its eval_after.jsonl."""
    cfg = configs.load_run_config(folder)
    content = (folder / "eval_after.jsonl").read_bytes()
    lines = content.split(b"\n")[:-1]
    rows = [json.loads(line) for line in lines]
    return Run(folder, cfg, rows)


def check_comparable(run: Run, first: Run) -> None:
    """Exit where two runs differ in more than their retriever and policy."""
    is_same_corpus = run.cfg.data.corpus == first.cfg.data.corpus
    is_same_depth = run.cfg.reward.k_eval == first.cfg.reward.k_eval
    ids = [row["id"] for row in run.rows]
    first_ids = [row["id"] for row in first.rows]
    if not (is_same_corpus and is_same_depth and ids == first_ids):
        raise SystemExit(
            f"{run.folder}: another corpus, reward.k_eval or other test queries than {first.folder}"
        )


def open_retriever(run: Run) -> Retriever:
    """Load the run's retriever, with the run's number of threads."""
    summary = json.loads((run.folder / "summary.json").read_text())
    # The sums of an encoder are rounded by the number of threads.
    torch.set_num_threads(summary["threads"])
    build = build_retriever(run.cfg.retriever)
    index_dir = get_index_dir(run.cfg.retriever, run.folder)
    retriever, _ = build(run.cfg.data.corpus, run.cfg.data.on_bad_line, index_dir, print)
    return retriever


def score_queries(
    retriever: Retriever, queries: list[str | None], relevance: list[dict[str, float]], k: int
) -> np.ndarray:
    """Return NDCG@k (Q,) of each query; no query (an unparsable answer) scores 0."""
    texts = [query or "" for query in queries]
    hits, *_ = retriever.search(texts, k)
    scores = []
    for query, rows, judged in zip(queries, hits.tolist(), relevance):
        score = 0.0
        if query is not None:
            ids = [retriever.doc_ids[row] for row in rows if row >= 0]
            score = compute_ndcg(ids, judged, k)
        scores.append(score)
    return np.array(scores)


def check_logged(run: Run, column: str, scores: np.ndarray) -> None:
    """Exit where the run logged another score than is computed now."""
    logged = np.array([row[column] for row in run.rows])
    difference = np.abs(logged - scores)
    if difference.max() > 1e-9:
        worst = int(difference.argmax())
        row = run.rows[worst]
        raise SystemExit(
            f"{run.folder}: query {row['id']!r} has {column} {row[column]} in eval_after.jsonl, "
            f"searched again {scores[worst]}; "
            "the corpus, the encoder or the code has changed since the run"
        )


def describe_weights(encoder: str) -> str:
    """Return what the encoder's folder says of its weights (make_encoder.py)."""
    path = Path(encoder) / "ORIGIN.json"
    if not encoder or not path.exists():
        return ""
    origin = json.loads(path.read_text())
    return f"; weights: {origin['weights']}"


if __name__ == "__main__":
    main()
