"""Score Rec-R1's released result lists.

python experiments/analysis/score_lists.py FILE [--metrics ndcg@10,recall@100] [--json]

FILE (JSON, plain or .gz) is one object: "<n>_<query>" -> {"id", "retrieved", "target", "ndcg@10",
..., "recall@100"}, where `retrieved` (best first) and `target` are lists of document ids, or
strings that hold Python lists. `target` may also be one bare id, as in the Amazon Beauty files.
Every target gains 1. What each convention makes of a list that repeats itself:

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
from functools import partial
from math import log2

import numpy as np

from recr1.data.readers import DataError
from recr1.distributed.printing import print_rank0
from recr1.evaluation.bootstrap import compute_bootstrap_ci
from recr1.tasks.ranking_metrics import compute_ndcg, compute_recall
from recr1.training.launch import run_command

DEFAULT_METRICS = "ndcg@10,ndcg@100,recall@10,recall@100"
TOLERANCE = 1e-9  # the released figures are float64, written in full
HEAD = (
    f"{'':<12}{'ours':>8}   {'95% interval':<18}{'upstream':>9}   {'ours - upstream':<30}"
    "stored figures that differ from"
)


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
    rows = read_lists(args.file)
    result = score_lists(rows, args.metrics)
    table = format_table(args.file, result)
    print_rank0(table)
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
    if match is None:
        return None
    kind, k = match.groups()
    return kind, int(k)


def read_lists(path: str) -> dict[str, dict]:
    """Read the file.

    Returns:
        {key: {"retrieved": [id], "target": [id], "stored": {metric: value}, "other": [name]}}

    Raises:
        DataError: with file and key.
    """
    open_file = gzip.open if path.endswith(".gz") else open
    make_object = partial(_make_object, path=path)
    try:
        with open_file(path, "rb") as file:
            content = file.read()
        text = content.decode("utf-8-sig")
        rows = json.loads(text, object_pairs_hook=make_object)
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
        kind = "an empty object" if rows == {} else f"a {type(rows).__name__}"
        raise DataError(
            f'{path}: {kind}; want one object, "<n>_<query>" -> {{"retrieved", "target", ...}}'
        )
    lists = {}
    for key, row in rows.items():
        lists[key] = _check_row(row, f"{path}: key {key[:60]!a}")
    return lists


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
    target = _read_ids(row, "target", where, may_be_bare=True)
    if not target:
        raise DataError(
            f"{where}: 'target' is empty: no metric is defined for it; take the query out"
        )
    stored = {}
    other = []
    for name, value in row.items():
        if "@" not in name:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or abs(value) > 1e300:
            raise DataError(
                f"{where}: {name!r} is {str(value)[:40]!a}, a {type(value).__name__}, "
                "not a metric's value"
            )
        if split_metric(name):
            stored[name] = value
        else:
            other.append(name)
    return dict(retrieved=retrieved, target=target, stored=stored, other=other)


def _read_ids(row: dict, name: str, where: str, may_be_bare: bool = False) -> list[str]:
    """Return a list of document ids, which may be a string that holds a Python list.

    may_be_bare: the string may also be one id itself: letters, digits, - and _, as ASINs are.
    """
    if name not in row:
        keys = [repr(key) for key in row]
        first_keys = ", ".join(keys[:6]) or "none"
        raise DataError(f"{where}: no {name!r}; its keys are {first_keys}")
    ids = row[name]
    if isinstance(ids, str):
        if may_be_bare and re.fullmatch(r"[\w-]+", ids):
            return [ids]
        try:
            ids = ast.literal_eval(ids)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            text = row[name][:40]
            no_id = " and is no id" if may_be_bare else ""
            raise DataError(
                f"{where}: {name!r} is a string that holds no Python list{no_id}: {text!a}"
            ) from None
    if not isinstance(ids, list):
        raise DataError(f"{where}: {name!r} holds a {type(ids).__name__}, not a list")
    for id in ids:
        if not isinstance(id, str):
            text = str(id)[:40]
            kind = type(id).__name__
            raise DataError(f"{where}: {name!r} holds {text}, a {kind}; document ids are strings")
    return ids


def compute_upstream_ndcg(retrieved: list[str], target: list[str], k: int) -> float:
    """Compute NDCG@k as upstream does; `target` is not empty."""
    targets = set(target)
    dcg = 0.0
    for rank, doc in enumerate(retrieved[:k], 1):
        if doc in targets:
            dcg += 1 / log2(rank + 1)
    ideal_dcg = 0.0
    for rank, _ in enumerate(target[:k], 1):
        ideal_dcg += 1 / log2(rank + 1)
    return dcg / ideal_dcg


def compute_upstream_recall(retrieved: list[str], target: list[str], k: int) -> float:
    """Compute recall@k as the released figures do; `target` is not empty."""
    targets = set(target)
    hits = targets.intersection(retrieved[:k])
    return len(hits) / len(targets)


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
    lengths = [len(row["retrieved"]) for row in rows.values()]
    metrics = {}
    for name in sorted({*names, *stored_names}, key=split_metric):
        ours, upstream = _score_metric(rows, name)
        difference = ours - upstream
        ours_interval = compute_bootstrap_ci(ours)
        difference_interval = compute_bootstrap_ci(difference)
        figures = dict(
            ours=float(ours.mean()),
            ci95=list(ours_interval),
            upstream=float(upstream.mean()),
            difference=float(difference.mean()),
            difference_ci95=list(difference_interval),
        )
        if name in stored_names:
            computed = dict(upstream=upstream, ours=ours)
            figures["stored"] = compare_stored(rows, name, computed)
        metrics[name] = figures
    return dict(
        n=len(rows),
        repeated_target=_count_repeats(rows, "target"),
        repeated_retrieved=_count_repeats(rows, "retrieved"),
        longest=max(lengths),
        not_compared=sorted(other_names),
        metrics=metrics,
    )


def _score_metric(rows: dict[str, dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a metric of every query under our convention and under upstream's, (Q,) each."""
    kind, k = split_metric(name)
    compute_ours, compute_upstream = METRICS[kind]
    ours = []
    upstream = []
    for row in rows.values():
        retrieved = row["retrieved"]
        target = row["target"]
        relevance = dict.fromkeys(target, 1.0)
        our_score = compute_ours(retrieved, relevance, k)
        upstream_score = compute_upstream(retrieved, target, k)
        ours.append(our_score)
        upstream.append(upstream_score)
    return np.array(ours), np.array(upstream)


def _count_repeats(rows: dict[str, dict], name: str) -> int:
    """Count the queries whose list `name` has a document twice."""
    num_queries = 0
    for row in rows.values():
        distinct_ids = set(row[name])
        if len(distinct_ids) < len(row[name]):
            num_queries += 1
    return num_queries


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
    is_finite = np.isfinite(stored).all()
    mean = float(stored.mean()) if is_finite else None
    comparison = dict(n=len(stored), mean=mean)
    for convention, scores in computed.items():
        gap = np.abs(stored - scores[indices])
        gap[~np.isfinite(gap)] = np.inf  # a stored NaN differs from everything
        comparison[f"differ_from_{convention}"] = _summarize_gap(gap, keys)
    return comparison


def _summarize_gap(gap: np.ndarray, keys: list[str]) -> dict:
    """Return how many figures differ, the largest gap (None where infinite) and its key."""
    worst = int(gap.argmax())
    largest = float(gap[worst])
    differs = gap > TOLERANCE
    return dict(
        n=int(differs.sum()),
        largest=largest if np.isfinite(largest) else None,
        key=keys[worst] if differs[worst] else None,
    )


def format_table(path: str, result: dict) -> str:
    """Format a line per metric, then what is wrong with the stored figures."""
    num_queries = result["n"]
    longest = result["longest"]
    counts = (
        f"{path}: {num_queries} queries; {result['repeated_target']} repeat a target, "
        f"{result['repeated_retrieved']} a retrieved document; the longest list has {longest}"
    )
    lines = [counts, HEAD]
    for name, figures in result["metrics"].items():
        line = _format_metric(name, figures, longest)
        lines.append(line)
    for name, figures in result["metrics"].items():
        if "stored" in figures:
            lines += _describe_stored(name, figures["stored"], num_queries)
    if result["not_compared"]:
        not_compared = ", ".join(result["not_compared"])
        lines.append(f"stored and not compared: {not_compared}")
    return "\n".join(lines)


def _format_metric(name: str, figures: dict, longest: int) -> str:
    """Format the table's line of a metric."""
    low, high = figures["ci95"]
    ours = f"{figures['ours']:8.4f}"
    interval = f"[{low:.4f}, {high:.4f}]"
    upstream = f"{figures['upstream']:9.4f}"
    low, high = figures["difference_ci95"]
    difference = f"{figures['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
    line = f"{name:<12}{ours}   {interval:<18}{upstream}   {difference:<30}"
    stored = figures.get("stored")
    if stored:
        from_upstream = stored["differ_from_upstream"]["n"]
        from_ours = stored["differ_from_ours"]["n"]
        line += f"upstream's {from_upstream}, ours {from_ours} of {stored['n']}"
    _, k = split_metric(name)
    if k > longest:
        line += "   (no list is that long)"
    return line.rstrip()


def _describe_stored(name: str, stored: dict, num_queries: int) -> list[str]:
    """Say where stored figures are wrong, and where they are missing."""
    lines = []
    wrong = stored["differ_from_upstream"]
    if wrong["n"]:
        largest = wrong["largest"]
        gap = "not a number" if largest is None else f"by {largest:.4g}"
        key = wrong["key"][:60]
        lines.append(
            f"stored {name} is not what its lists give, by upstream's formula: "
            f"{wrong['n']} of {stored['n']}, most {gap} at key {key!a}"
        )
    if 0 < stored["n"] < num_queries:
        lines.append(f"stored {name} is there for {stored['n']} of {num_queries} queries")
    return lines


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
