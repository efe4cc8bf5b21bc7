"""What a policy learnt with one retriever is worth on another: python
experiments/cross_retriever.py RUN RUN [...] [--json]

Takes finished runs on the same test queries and searches each one's rewrites (its eval_after.jsonl)
with every run's retriever, as its config.yaml names it. Nothing is taken over from the runs but the
rewrites: what a run scored on its own retriever is computed again, and must be what it wrote down.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from recr1.config import loader as configs
from recr1.data import readers
from recr1.evaluation.evaluate import compute_mean_ci
from recr1.retrieval.factory import build_retriever, get_index_dir
from recr1.tasks.ranking_metrics import compute_ndcg


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("runs", nargs="+", metavar="RUN", type=Path)
    p.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = p.parse_args()
    cfgs = [configs.load_config(str(run / "config.yaml"), []) for run in args.runs]
    rows = [
        [json.loads(line) for line in (run / "eval_after.jsonl").read_bytes().split(b"\n")[:-1]]
        for run in args.runs
    ]
    first = cfgs[0]
    for run, cfg, mine in zip(args.runs, cfgs, rows):
        if (cfg.data.corpus, cfg.reward.k_eval, [r["id"] for r in mine]) != (
            first.data.corpus,
            first.reward.k_eval,
            [r["id"] for r in rows[0]],
        ):
            raise SystemExit(
                f"{run}: another corpus, reward.k_eval or other test queries than {args.runs[0]}"
            )
    qrels = readers.read_qrels(
        first.data.test_qrels or first.data.train_qrels, first.data.on_bad_line
    )[0]
    k = first.reward.k_eval
    gains = [qrels.get(row["id"], {}) for row in rows[0]]

    result = []
    lines = []
    for run, cfg, own in zip(args.runs, cfgs, rows):
        # sums of an encoder are rounded by it
        torch.set_num_threads(json.loads((run / "summary.json").read_text())["threads"])
        retriever, _ = build_retriever(cfg.retriever)(
            cfg.data.corpus, cfg.data.on_bad_line, get_index_dir(cfg.retriever, run), print
        )
        raw = scored(retriever, [row["raw"] for row in own], gains, k)
        agree(run, "ndcg_raw", own, raw)
        lines.append(f"\nsearched with {retriever.description}{origin(cfg.retriever.encoder)}")
        lines.append(f"  {'raw query':<44}{raw.mean():8.4f}")
        for writer, its, theirs in zip(args.runs, cfgs, rows):
            values = scored(retriever, [row["rewrite"] for row in theirs], gains, k)
            if writer == run:
                agree(run, "ndcg", own, values)
            gain, (low, high) = compute_mean_ci(values - raw)
            name = f"rewritten, trained with {its.retriever.kind} ({writer.name})"
            lines.append(
                f"  {name:<44}{values.mean():8.4f}   gain {gain:+.4f} [{low:+.4f}, {high:+.4f}]"
            )
            result.append(
                dict(
                    searched_with=cfg.retriever.kind,
                    encoder=cfg.retriever.encoder,
                    trained_with=its.retriever.kind,
                    run=str(writer),
                    raw=raw.mean(),
                    rewritten=values.mean(),
                    gain=gain,
                    gain_ci95=[low, high],
                )
            )
    print(
        f"NDCG@{k} on {len(gains)} test queries, mean and 95% paired bootstrap interval of the "
        "gain over the raw query" + "\n".join(lines)
    )
    if args.json:
        print(json.dumps(result))


def scored(
    retriever, queries: list[str | None], gains: list[dict[str, float]], k: int
) -> np.ndarray:
    """NDCG@k (Q,) of each query; no query (an unparsable answer) scores 0."""
    found = retriever.search([query or "" for query in queries], k)[0]
    ranked = [[retriever.doc_ids[r] for r in row if r >= 0] for row in found.tolist()]
    return np.array(
        [
            compute_ndcg(names, judged, k) if query is not None else 0.0
            for names, judged, query in zip(ranked, gains, queries)
        ]
    )


def agree(run: Path, column: str, rows: list[dict], values: np.ndarray) -> None:
    off = np.abs(np.array([row[column] for row in rows]) - values)
    if off.max() > 1e-9:
        i = int(off.argmax())
        raise SystemExit(
            f"{run}: query {rows[i]['id']!r} has {column} {rows[i][column]} in eval_after.jsonl, "
            f"searched again {values[i]}; "
            "the corpus, the encoder or the code has changed since the run"
        )


def origin(encoder: str) -> str:
    note = Path(encoder) / "ORIGIN.json"
    return (
        f"; weights: {json.loads(note.read_text())['weights']}" if encoder and note.exists() else ""
    )


if __name__ == "__main__":
    main()
