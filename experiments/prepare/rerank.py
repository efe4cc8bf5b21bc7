"""Make a re-ranking set of a prepared search set (esci.py's, amazon_c4.py's).

DIR has the same queries with the N products to re-rank. Candidates are the first N of a BM25 search
with the query as it is (k1 1.2, b 0.75, Lucene's lengths), in that order; queries with fewer, or
with no relevant product among them, are left out, and counted. Judgements are all of the query's,
so that they include relevant products outside the N.
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from bundled import read_bundled
from checks import PrepareError, Split, list_relevant
from writing import run_command_line, write_data_set

from recr1.retrieval.bm25.searcher import BM25Searcher


def write_lists(
    folder: Path, corpus: list[dict], splits: dict[str, Split], candidates: int, source: list[dict]
) -> None:
    """Write the queries that have `candidates` hits, one of them relevant."""
    ids = [row["id"] for row in corpus]
    contents = [f"{row.get('title', '')} {row['text']}" for row in corpus]
    index = BM25Searcher.build(ids, contents, length="lucene")
    lists = {}
    counts = {}
    for name, split in splits.items():
        lists[name] = make_candidate_split(split, index, candidates)
        num_without = len(split.rows) - len(lists[name].rows)
        counts[f"{name}_without_a_relevant_candidate"] = num_without
    write_data_set(
        folder,
        corpus,
        lists,
        source=source,
        options=dict(candidates=candidates, k1=1.2, b=0.75, length="lucene"),
        counts=counts,
    )


def make_candidate_split(split: Split, index: BM25Searcher, candidates: int) -> Split:
    """Return the queries that have enough candidates, one of them relevant."""
    lists = Split()
    texts = [row["text"] for row in split.rows]
    # (Q, N), -1 where there are no more hits
    hits_by_query, _ = index.search(texts, candidates)
    for row, hits in zip(split.rows, hits_by_query.tolist()):
        ids = [index.doc_ids[i] for i in hits if i >= 0]
        targets = split.targets[row["id"]]
        has_relevant = any(doc in ids for doc in list_relevant(targets))
        if len(ids) == candidates and has_relevant:
            lists.add(row | dict(candidates=ids), targets)
    return lists


def prepare(args: Namespace, out: Path) -> None:
    """Write the data set into `folder`."""
    if args.candidates < 2:
        raise PrepareError(
            f"--candidates is {args.candidates}; a list to be re-ranked needs 2 or more"
        )
    names = {path.name.split(".")[0] for path in args.source.glob("*.qrels.tsv")}
    tests = sorted(names - {"train"})
    if not tests:
        tests = ["test"]
    # tidied when it was prepared
    corpus, splits, source = read_bundled(args.source, ("train", *tests), tidy=str)
    write_lists(out, corpus, splits, args.candidates, source)


def add_options(parser: ArgumentParser) -> None:
    """Add the script's own options."""
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a prepared search set",
    )
    parser.add_argument(
        "--candidates",
        type=int,
        default=16,
        metavar="N",
        help="how many products each query gets (default 16, as Rec-R1)",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_command_line(__file__, __doc__, prepare, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
