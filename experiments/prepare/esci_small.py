"""Prepare the bundled part of Amazon ESCI for search and for re-ranking.

It has 6,764 products, 150 test queries with complete E/S/C/I grades 3/2/1/0, and 419 train queries
-> DIR/search and DIR/rerank. rerank: the queries with the first 8 products of a BM25 search each,
as rerank.py makes them.
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from bundled import read_bundled
from checks import Split, list_relevant
from rerank import write_lists
from writing import run_command_line, write_data_set

BUNDLED = Path(__file__).resolve().parents[1] / "data/esci_small"
CANDIDATES = 8


def add_categories(corpus: list[dict], splits: dict[str, Split]) -> list[dict]:
    """Keep of each category path the first name, the shop's department.

    It also goes to the queries whose first relevant product has one.
    """
    rows = []
    categories = {}
    for document in corpus:
        row = dict(document)
        path = row.pop("category", None)
        if path:
            row["category"] = path[0]
            categories[row["id"]] = path[0]
        rows.append(row)
    for split in splits.values():
        for row in split.rows:
            relevant = list_relevant(split.targets[row["id"]])
            if relevant and relevant[0] in categories:
                row["category"] = categories[relevant[0]]
    return rows


def prepare(args: Namespace, out: Path) -> None:
    """Write both data sets into `folder`."""
    corpus, splits, source = read_bundled(args.source)
    corpus = add_categories(corpus, splits)
    write_data_set(out / "search", corpus, splits, source=source, options={})
    write_lists(out / "rerank", corpus, splits, CANDIDATES, source)


def add_options(parser: ArgumentParser) -> None:
    """Add the script's own options."""
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        default=BUNDLED,
        metavar="FOLDER",
        help="a copy of experiments/data/esci_small (default: that one)",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_command_line(__file__, __doc__, prepare, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
