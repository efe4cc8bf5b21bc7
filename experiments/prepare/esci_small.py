"""The bundled part of Amazon ESCI (6,764 products, 150 test queries with complete E/S/C/I grades 3/2/1/0, 419 train queries) -> DIR/search and DIR/rerank.

rerank: for each query the first 8 products of a BM25 search with the query as it stands (k1 1.2, b 0.75, Lucene's lengths), in that order; queries with no relevant product
among them are left out, and counted. Judgements are all of the query's, so that they include relevant products outside the 8.
"""
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from bundled import read_bundled
from checks import Split
from recr1.retrieval.bm25 import BM25
from writing import command, write

BUNDLED = Path(__file__).resolve().parents[1] / "data/esci_small"
CANDIDATES = 8


def with_categories(corpus: list[dict], splits: dict[str, Split]) -> list[dict]:
    """Of each category path the first name, the shop's department; it also goes to the queries whose first relevant product has one."""
    rows = [{key: value for key, value in row.items() if key != "category"} | (dict(category=path[0]) if (path := row.get("category")) else {}) for row in corpus]
    category = {row["id"]: row["category"] for row in rows if "category" in row}
    for split in splits.values():
        for row in split.rows:
            first = next((doc for doc, gain in split.targets[row["id"]] if gain > 0), None)
            row.update(dict(category=category[first]) if first in category else {})
    return rows


def reranked(split: Split, index: BM25) -> Split:
    """The queries with candidates, those with a relevant one."""
    kept, (found, _) = Split(), index.search([row["text"] for row in split.rows], CANDIDATES)       # (Q, 8), -1 where there are no more hits
    for row, hits in zip(split.rows, found.tolist()):
        candidates, targets = [index.doc_ids[i] for i in hits if i >= 0], split.targets[row["id"]]
        if len(candidates) == CANDIDATES and any(gain > 0 and doc in candidates for doc, gain in targets):
            kept.add(row | dict(candidates=candidates), targets)
    return kept


def prepare(args: Namespace, out: Path) -> None:
    corpus, splits, source = read_bundled(args.source)
    corpus = with_categories(corpus, splits)
    write(out / "search", corpus, splits, source=source, options={})

    index = BM25.build([row["id"] for row in corpus], [f"{row['title']} {row['text']}" for row in corpus], length="lucene")
    lists = {name: reranked(split, index) for name, split in splits.items()}
    write(out / "rerank", corpus, lists, source=source, options=dict(candidates=CANDIDATES, k1=1.2, b=0.75, length="lucene"),
          counts={f"{name}_without_a_relevant_candidate": len(splits[name].rows) - len(lists[name].rows) for name in splits})


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", type=Path, default=BUNDLED, metavar="FOLDER", help="a copy of experiments/data/esci_small (default: that one)")


def main(argv: list[str] | None = None) -> int:
    return command(__file__, __doc__, prepare, options, argv)


if __name__ == "__main__":
    sys.exit(main())
