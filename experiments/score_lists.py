"""Scores Rec-R1's released result lists: python experiments/score_lists.py FILE [--metrics
ndcg@10,recall@100] [--json]

FILE (JSON, plain or .gz) is one object: "<n>_<query>" -> {"id", "retrieved", "target", "ndcg@10",
..., "recall@100"}, where `retrieved` (best first) and `target` are lists of document ids, or
strings that hold Python lists. Every target gains 1. What each convention makes of a list that
repeats itself:

    ours        recr1.metrics: a target that stands twice is one; a document retrieved twice counts
    at its first place. trec_eval's figures. upstream's  the ideal DCG counts each repeat of a
    target, which no ranking can earn, and a document retrieved twice gains twice
                (src/eval_search/utils.py of linjc16/Rec-R1); recall divides by the distinct
                targets, as the released figures do.

Metrics that FILE stores are compared with both, never used.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import re
import sys
import zlib
from math import log2

import numpy as np

from recr1.data.readers import DataError
from recr1.distributed.printing import print_rank0
from recr1.evaluation.bootstrap import compute_bootstrap_ci
from recr1.tasks.ranking_metrics import compute_ndcg, compute_recall
from recr1.training.launch import run_command

DEFAULT = "ndcg@10,ndcg@100,recall@10,recall@100"
TOLERANCE = 1e-9  # the released figures are float64, written in full


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="score_lists.py", description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE")
    parser.add_argument(
        "--metrics",
        type=metric_names,
        default=DEFAULT,
        metavar="M",
        help=f"of ndcg@K, recall@K, beside those stored in FILE; default {DEFAULT}",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = parser.parse_args(argv)
    result = score(read_lists(args.file), args.metrics)
    print_rank0(table(args.file, result))
    if args.json:
        print_rank0(json.dumps(result))


def metric_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not split(name):
            raise argparse.ArgumentTypeError(
                f"{name!r} is no metric here; write ndcg@K or recall@K, K from 1"
            )
    return names


def split(name: str) -> tuple[str, int] | None:
    """ "ndcg@10" -> ("ndcg", 10); None for what is not scored here."""
    match = re.fullmatch(r"(ndcg|recall)@([1-9]\d{0,8})", name)
    return (match[1], int(match[2])) if match else None


def read_lists(path: str) -> dict[str, dict]:
    """{key: {"retrieved": [id], "target": [id], "stored": {metric: value}, "other": [name]}}.
    Raises DataError with file and key.
    """
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            rows = json.loads(
                file.read().decode("utf-8-sig"), object_pairs_hook=lambda pairs: _once(pairs, path)
            )
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(f"{path}: torn, or not gzip ({e}); download it again") from None
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e})") from None
    except (ValueError, RecursionError) as e:
        raise DataError(
            f"{path}: not JSON in UTF-8 ({e or type(e).__name__}); download it again, whole"
        ) from None
    if not isinstance(rows, dict) or not rows:
        raise DataError(
            f"{path}: {'an empty object' if rows == {} else f'a {type(rows).__name__}'}; "
            'want one object, "<n>_<query>" -> '
            '{"retrieved", "target", ...}'
        )
    return {key: _row(row, f"{path}: key {key[:60]!a}") for key, row in rows.items()}


def _once(pairs: list[tuple], path: str) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(
            f"{path}: key {twice[:60]!a} stands twice in one object; keep one of the two"
        )
    return found


def _row(row: object, where: str) -> dict:
    if not isinstance(row, dict):
        raise DataError(
            f'{where}: holds a {type(row).__name__}, not an object with "retrieved" and "target"'
        )
    lists = {name: _ids(row, name, where) for name in ("retrieved", "target")}
    if not lists["target"]:
        raise DataError(
            f"{where}: 'target' is empty: no metric is defined for it; take the query out"
        )
    stored = {name: value for name, value in row.items() if "@" in name}
    for name, value in stored.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
            raise DataError(
                f"{where}: {name!r} is {str(value)[:40]!a}, a {type(value).__name__}, "
                "not a metric's value"
            )
    return lists | dict(
        stored={name: value for name, value in stored.items() if split(name)},
        other=[name for name in stored if not split(name)],
    )


def _ids(row: dict, name: str, where: str) -> list[str]:
    if name not in row:
        raise DataError(
            f"{where}: no {name!r}; its keys are {', '.join(map(repr, list(row)[:6])) or 'none'}"
        )
    found = row[name]
    if isinstance(found, str):
        try:
            found = ast.literal_eval(found)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise DataError(
                f"{where}: {name!r} is a string that holds no Python list: {row[name][:40]!a}"
            ) from None
    if not isinstance(found, list):
        raise DataError(f"{where}: {name!r} holds a {type(found).__name__}, not a list")
    for id in found:
        if not isinstance(id, str):
            raise DataError(
                f"{where}: {name!r} holds {str(id)[:40]}, a {type(id).__name__}; "
                "document ids are strings"
            )
    return found


def upstream_ndcg(retrieved: list[str], target: list[str], k: int) -> float:
    """NDCG@k as upstream computes it; `target` is not empty."""
    wanted = set(target)
    dcg = sum(1 / log2(rank + 1) for rank, doc in enumerate(retrieved[:k], 1) if doc in wanted)
    return dcg / sum(1 / log2(rank + 1) for rank in range(1, min(k, len(target)) + 1))


def upstream_recall(retrieved: list[str], target: list[str], k: int) -> float:
    return len(set(retrieved[:k]) & set(target)) / len(set(target))


def score(rows: dict[str, dict], names: list[str]) -> dict:
    """Means under both conventions, 95% intervals of ours and of the paired difference, and how the
    stored figures compare. JSON-ready.
    """
    stored_names = {name for row in rows.values() for name in row["stored"]}
    names = sorted({*names, *stored_names}, key=split)
    repeats = {
        name: sum(len(set(row[name])) < len(row[name]) for row in rows.values())
        for name in ("target", "retrieved")
    }
    result = dict(
        n=len(rows),
        repeated_target=repeats["target"],
        repeated_retrieved=repeats["retrieved"],
        longest=max(len(row["retrieved"]) for row in rows.values()),
        not_compared=sorted({name for row in rows.values() for name in row["other"]}),
        metrics={},
    )
    for name in names:
        kind, k = split(name)
        metric, theirs = (
            (compute_ndcg, upstream_ndcg) if kind == "ndcg" else (compute_recall, upstream_recall)
        )
        ours = np.array(
            [
                metric(row["retrieved"], dict.fromkeys(row["target"], 1.0), k)
                for row in rows.values()
            ]
        )
        upstream = np.array([theirs(row["retrieved"], row["target"], k) for row in rows.values()])
        entry = dict(
            ours=float(ours.mean()),
            ci95=list(compute_bootstrap_ci(ours)),
            upstream=float(upstream.mean()),
            difference=float((ours - upstream).mean()),
            difference_ci95=list(compute_bootstrap_ci(ours - upstream)),
        )
        if name in stored_names:
            entry["stored"] = compare(rows, name, dict(upstream=upstream, ours=ours))
        result["metrics"][name] = entry
    return result


def compare(rows: dict[str, dict], name: str, computed: dict[str, np.ndarray]) -> dict:
    """Stored figures of one metric: their number and mean, and for each convention how many differ,
    by how much at most, and for which key.
    """
    at = [i for i, row in enumerate(rows.values()) if name in row["stored"]]
    keys = list(rows)
    stored = np.array(
        [row["stored"][name] for row in rows.values() if name in row["stored"]], dtype=np.float64
    )
    found = dict(n=len(at), mean=float(stored.mean()) if np.isfinite(stored).all() else None)
    for convention, values in computed.items():
        gap = np.abs(stored - values[at])
        gap[~np.isfinite(gap)] = np.inf  # a stored NaN differs from everything
        worst = int(gap.argmax())
        found[f"differ_from_{convention}"] = dict(
            n=int((gap > TOLERANCE).sum()),
            largest=float(gap[worst]) if np.isfinite(gap[worst]) else None,
            key=keys[at[worst]] if gap[worst] > TOLERANCE else None,
        )
    return found


def table(path: str, result: dict) -> str:
    n = result["n"]
    lines = [
        f"{path}: {n} queries; {result['repeated_target']} repeat a target, "
        f"{result['repeated_retrieved']} a retrieved document; "
        f"the longest list has {result['longest']}",
        f"{'':<12}{'ours':>8}   {'95% interval':<18}{'upstream':>9}   "
        f"{'ours - upstream':<30}stored figures that differ from",
    ]
    for name, m in result["metrics"].items():
        line = (
            f"{name:<12}{m['ours']:8.4f}   "
            f"{'[{:.4f}, {:.4f}]'.format(*m['ci95']):<18}{m['upstream']:9.4f}   "
            f"{'{:+.4f} [{:+.4f}, {:+.4f}]'.format(m['difference'], *m['difference_ci95']):<30}"
        )
        if stored := m.get("stored"):
            line += (
                f"upstream's {stored['differ_from_upstream']['n']}, "
                f"ours {stored['differ_from_ours']['n']} of {stored['n']}"
            )
        lines.append(
            (
                line + ("" if split(name)[1] <= result["longest"] else "   (no list is that long)")
            ).rstrip()
        )
    for name, m in result["metrics"].items():
        wrong = m.get("stored", {}).get("differ_from_upstream", {})
        if wrong.get("n"):
            by = "not a number" if wrong["largest"] is None else f"by {wrong['largest']:.4g}"
            lines.append(
                f"stored {name} is not what its lists give, by upstream's formula: "
                f"{wrong['n']} of {m['stored']['n']}, "
                f"most {by} at key {wrong['key'][:60]!a}"
            )
        if 0 < m.get("stored", {}).get("n", 0) < n:
            lines.append(f"stored {name} is there for {m['stored']['n']} of {n} queries")
    if result["not_compared"]:
        lines.append(f"stored and not compared: {', '.join(result['not_compared'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
