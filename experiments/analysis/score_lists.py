"""Score Rec-R1's released result lists.

python experiments/analysis/score_lists.py FILE [--metrics ndcg@10,recall@100] [--json]

FILE (JSON, plain or .gz) is one object: "<n>_<query>" -> {"id", "retrieved", "target", "ndcg@10",
..., "recall@100"}, where `retrieved` (best first) and `target` are lists of document ids, or
strings that hold Python lists. Every target gains 1. What each convention makes of a list that
repeats itself:

    ours        recr1.tasks.ranking_metrics: a target that is listed twice is one; a document
                retrieved twice counts at its first place. trec_eval's figures.
    upstream's  the ideal DCG counts each repeat of a target, which no ranking can earn, and a
                document retrieved twice gains twice (src/eval_search/utils.py of
                linjc16/Rec-R1); recall divides by the distinct targets, as the released figures
                do.

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

DEFAULT_METRICS = "ndcg@10,ndcg@100,recall@10,recall@100"
TOLERANCE = 1e-9  # the released figures are float64, written in full


def main(argv: list[str]) -> None:
    """Score the file's lists and print the table."""
    parser = argparse.ArgumentParser(prog="score_lists.py", description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE")
    parser.add_argument(
        "--metrics",
        type=parse_metrics,
        default=DEFAULT_METRICS,
        metavar="M",
        help=f"of ndcg@K, recall@K, beside those stored in FILE; default {DEFAULT_METRICS}",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = parser.parse_args(argv)
    result = score_lists(read_lists(args.file), args.metrics)
    print_rank0(format_table(args.file, result))
    if args.json:
        print_rank0(json.dumps(result))


def parse_metrics(text: str) -> list[str]:
    """Split a list of metrics. Raises ArgumentTypeError for one that is not computed here."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not split_metric(name):
            raise argparse.ArgumentTypeError(
                f"{name!r} is no metric here; write ndcg@K or recall@K, K from 1"
            )
    return names


def split_metric(name: str) -> tuple[str, int] | None:
    """Split "ndcg@10" into ("ndcg", 10); return None for what is not scored here."""
    match = re.fullmatch(r"(ndcg|recall)@([1-9]\d{0,8})", name)
    return (match[1], int(match[2])) if match else None


def read_lists(path: str) -> dict[str, dict]:
    """Read the file.

    Returns:
        {key: {"retrieved": [id], "target": [id], "stored": {metric: value}, "other": [name]}}

    Raises:
        DataError: with file and key.
    """
    open_file = gzip.open if path.endswith(".gz") else open
    try:
        with open_file(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
        rows = json.loads(text, object_pairs_hook=lambda pairs: _make_object(pairs, path))
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
        content = "an empty object" if rows == {} else f"a {type(rows).__name__}"
        raise DataError(
            f'{path}: {content}; want one object, "<n>_<query>" -> {{"retrieved", "target", ...}}'
        )
    return {key: _check_row(row, f"{path}: key {key[:60]!a}") for key, row in rows.items()}


def _make_object(pairs: list[tuple], path: str) -> dict:
    """Make a JSON object. Raises DataError where a key is repeated."""
    names = set()
    for name, _ in pairs:
        if name in names:
            raise DataError(
                f"{path}: key {name[:60]!a} stands twice in one object; keep one of the two"
            )
        names.add(name)
    return dict(pairs)


def _check_row(row: object, where: str) -> dict:
    """Return a query's lists and its stored metrics. Raises DataError."""
    if not isinstance(row, dict):
        raise DataError(
            f'{where}: holds a {type(row).__name__}, not an object with "retrieved" and "target"'
        )
    retrieved = _read_ids(row, "retrieved", where)
    target = _read_ids(row, "target", where)
    if not target:
        raise DataError(
            f"{where}: 'target' is empty: no metric is defined for it; take the query out"
        )
    stored = {}
    other = []
    for name, value in row.items():
        if "@" not in name:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
            raise DataError(
                f"{where}: {name!r} is {str(value)[:40]!a}, a {type(value).__name__}, "
                "not a metric's value"
            )
        if split_metric(name):
            stored[name] = value
        else:
            other.append(name)
    return dict(retrieved=retrieved, target=target, stored=stored, other=other)


def _read_ids(row: dict, name: str, where: str) -> list[str]:
    """Return a list of document ids, which may be a string that holds a Python list."""
    if name not in row:
        keys = ", ".join(map(repr, list(row)[:6])) or "none"
        raise DataError(f"{where}: no {name!r}; its keys are {keys}")
    ids = row[name]
    if isinstance(ids, str):
        try:
            ids = ast.literal_eval(ids)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise DataError(
                f"{where}: {name!r} is a string that holds no Python list: {row[name][:40]!a}"
            ) from None
    if not isinstance(ids, list):
        raise DataError(f"{where}: {name!r} holds a {type(ids).__name__}, not a list")
    for id in ids:
        if not isinstance(id, str):
            raise DataError(
                f"{where}: {name!r} holds {str(id)[:40]}, a {type(id).__name__}; "
                "document ids are strings"
            )
    return ids


def compute_upstream_ndcg(retrieved: list[str], target: list[str], k: int) -> float:
    """Compute NDCG@k as upstream does; `target` is not empty."""
    targets = set(target)
    dcg = sum(1 / log2(rank + 1) for rank, doc in enumerate(retrieved[:k], 1) if doc in targets)
    ideal_dcg = sum(1 / log2(rank + 1) for rank in range(1, min(k, len(target)) + 1))
    return dcg / ideal_dcg


def compute_upstream_recall(retrieved: list[str], target: list[str], k: int) -> float:
    """Compute recall@k as the released figures do; `target` is not empty."""
    targets = set(target)
    return len(set(retrieved[:k]) & targets) / len(targets)


# kind -> (by our convention, by upstream's)
METRICS = {
    "ndcg": (compute_ndcg, compute_upstream_ndcg),
    "recall": (compute_recall, compute_upstream_recall),
}


def score_lists(rows: dict[str, dict], names: list[str]) -> dict:
    """Return the means under both conventions and how the stored figures compare.

    With 95% intervals of ours and of the paired difference; ready for JSON.
    """
    stored_names: set[str] = set()
    other_names: set[str] = set()
    for row in rows.values():
        stored_names.update(row["stored"])
        other_names.update(row["other"])
    result = dict(
        n=len(rows),
        repeated_target=_count_repeats(rows, "target"),
        repeated_retrieved=_count_repeats(rows, "retrieved"),
        longest=max(len(row["retrieved"]) for row in rows.values()),
        not_compared=sorted(other_names),
        metrics={},
    )
    for name in sorted({*names, *stored_names}, key=split_metric):
        kind, k = split_metric(name)
        compute_ours, compute_upstream = METRICS[kind]
        our_scores = []
        upstream_scores = []
        for row in rows.values():
            relevance = dict.fromkeys(row["target"], 1.0)
            our_scores.append(compute_ours(row["retrieved"], relevance, k))
            upstream_scores.append(compute_upstream(row["retrieved"], row["target"], k))
        ours = np.array(our_scores)
        upstream = np.array(upstream_scores)
        difference = ours - upstream
        entry = dict(
            ours=float(ours.mean()),
            ci95=list(compute_bootstrap_ci(ours)),
            upstream=float(upstream.mean()),
            difference=float(difference.mean()),
            difference_ci95=list(compute_bootstrap_ci(difference)),
        )
        if name in stored_names:
            entry["stored"] = compare_stored(rows, name, dict(upstream=upstream, ours=ours))
        result["metrics"][name] = entry
    return result


def _count_repeats(rows: dict[str, dict], name: str) -> int:
    """Count the queries whose list `name` has a document twice."""
    return sum(len(set(row[name])) < len(row[name]) for row in rows.values())


def compare_stored(rows: dict[str, dict], name: str, computed: dict[str, np.ndarray]) -> dict:
    """Compare the stored figures of one metric with those that were computed.

    Returns their number and mean, and for each convention how many differ, by how much at most, and
    for which key.
    """
    keys = []
    indices = []
    values = []
    for index, (key, row) in enumerate(rows.items()):
        if name in row["stored"]:
            keys.append(key)
            indices.append(index)
            values.append(row["stored"][name])
    stored = np.array(values, dtype=np.float64)
    mean = float(stored.mean()) if np.isfinite(stored).all() else None
    comparison = dict(n=len(stored), mean=mean)
    for convention, scores in computed.items():
        gap = np.abs(stored - scores[indices])
        gap[~np.isfinite(gap)] = np.inf  # a stored NaN differs from everything
        worst = int(gap.argmax())
        comparison[f"differ_from_{convention}"] = dict(
            n=int((gap > TOLERANCE).sum()),
            largest=float(gap[worst]) if np.isfinite(gap[worst]) else None,
            key=keys[worst] if gap[worst] > TOLERANCE else None,
        )
    return comparison


def format_table(path: str, result: dict) -> str:
    """Format a line per metric, then what is wrong with the stored figures."""
    lines = [
        f"{path}: {result['n']} queries; {result['repeated_target']} repeat a target, "
        f"{result['repeated_retrieved']} a retrieved document; "
        f"the longest list has {result['longest']}",
        f"{'':<12}{'ours':>8}   {'95% interval':<18}{'upstream':>9}   {'ours - upstream':<30}"
        "stored figures that differ from",
    ]
    for name, figures in result["metrics"].items():
        lines.append(_format_metric(name, figures, result["longest"]))
    for name, figures in result["metrics"].items():
        if "stored" in figures:
            lines += _describe_stored(name, figures["stored"], result["n"])
    if result["not_compared"]:
        lines.append(f"stored and not compared: {', '.join(result['not_compared'])}")
    return "\n".join(lines)


def _format_metric(name: str, figures: dict, longest: int) -> str:
    """Format the table's line of a metric."""
    interval = "[{:.4f}, {:.4f}]".format(*figures["ci95"])
    difference = "{:+.4f} [{:+.4f}, {:+.4f}]".format(
        figures["difference"], *figures["difference_ci95"]
    )
    line = (
        f"{name:<12}{figures['ours']:8.4f}   {interval:<18}{figures['upstream']:9.4f}   "
        f"{difference:<30}"
    )
    stored = figures.get("stored")
    if stored:
        line += (
            f"upstream's {stored['differ_from_upstream']['n']}, "
            f"ours {stored['differ_from_ours']['n']} of {stored['n']}"
        )
    _, k = split_metric(name)
    if k > longest:
        line += "   (no list is that long)"
    return line.rstrip()


def _describe_stored(name: str, stored: dict, num_queries: int) -> list[str]:
    """Say where stored figures are wrong, and where they are missing."""
    lines = []
    wrong = stored["differ_from_upstream"]
    if wrong["n"]:
        by = "not a number" if wrong["largest"] is None else f"by {wrong['largest']:.4g}"
        lines.append(
            f"stored {name} is not what its lists give, by upstream's formula: "
            f"{wrong['n']} of {stored['n']}, most {by} at key {wrong['key'][:60]!a}"
        )
    if 0 < stored["n"] < num_queries:
        lines.append(f"stored {name} is there for {stored['n']} of {num_queries} queries")
    return lines


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
