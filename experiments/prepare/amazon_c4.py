"""Prepare Amazon-C4 with Rec-R1's splits.

It is Hugging Face McAuley-Lab/Amazon-C4 (21,223 long queries, 1,058,417 products) -> DIR.

  test            queries whose product is in Sports, Office, Baby or Games (1,722), and one setting
                  for each of the four: test_sports, ...
  train           the others but the last 1,000 (18,501)
  test_in_domain  those last 1,000, upstream's validation; ours is the hash tenth of train
A train query whose words are a test's or an earlier train query's is left out and counted.
ori_review, the text that a query was written from, is never read.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import download
from checks import PrepareError, Split, drop_repeats
from download import Remote
from upstream import iterate_csv, iterate_json, require_strings, to_one_line
from writing import run_command_line, write_data_set

HUB = "https://huggingface.co/datasets/McAuley-Lab/Amazon-C4/resolve/01dd016aa4f5c3c0be77387e0efef1e88681d1f2"
FILES = [
    Remote("test.csv", f"{HUB}/test.csv"),
    Remote("sampled_item_metadata_1M.jsonl", f"{HUB}/sampled_item_metadata_1M.jsonl"),
]
TEST_DOMAINS = ("Sports", "Office", "Baby", "Games")
LAST = 1000


def iterate_products(path: Path) -> Iterator[dict]:
    """Yield the corpus rows, one at a time: the metadata is title and description in one text
    already.
    """
    for line, row in iterate_json(path, ("item_id", "category", "metadata")):
        require_strings(path, line, row, ("item_id", "category", "metadata"))
        yield dict(id=row["item_id"], text=to_one_line(row["metadata"]), category=row["category"])


def read_queries(path: Path) -> list[tuple[str, str, str]]:
    """Return (query id, text, product) of every query, in file order."""
    queries = []
    for _, row in iterate_csv(path, ("qid", "query", "item_id")):
        queries.append((row["qid"], to_one_line(row["query"]), row["item_id"]))
    return queries


def read_categories(path: Path, products: set[str]) -> dict[str, str]:
    """Return {product: category} of the products that the metadata has."""
    category = {}
    for row in iterate_products(path):
        if row["id"] in products:
            category[row["id"]] = row["category"]
    return category


def make_splits(queries: Path, items: Path, last: int) -> tuple[dict[str, Split], int]:
    """Make Rec-R1's splits. Returns also how many train queries were left out as repeats."""
    rows = read_queries(queries)
    category = read_categories(items, {item for _, _, item in rows})
    test = Split()
    others = Split()
    by_domain = {domain: Split() for domain in TEST_DOMAINS}
    for qid, text, item in rows:
        if item not in category:
            raise PrepareError(
                f"{queries}: query {qid} asks for {item!r}, which {items.name} does not have; "
                "take both files from one release"
            )
        domain = category[item]
        row = dict(id=f"c4-{qid}", text=text, category=domain)
        targets = [(item, 1.0)]
        if domain in TEST_DOMAINS:
            test.add(row, targets)
            by_domain[domain].add(row, targets)
        else:
            others.add(row, targets)

    end = max(0, len(others.rows) - last)
    tests = dict(test=test)
    for domain, split in by_domain.items():
        if split.rows:
            tests[f"test_{domain.lower()}"] = split
    tests["test_in_domain"] = select_rows(others, others.rows[end:])
    all_train = select_rows(others, others.rows[:end])
    train, num_dropped = drop_repeats(all_train, tests)
    return dict(train=train, **tests), num_dropped


def select_rows(split: Split, rows: list[dict]) -> Split:
    """Return the split of some rows, with their judgements."""
    return Split(rows, {row["id"]: split.targets[row["id"]] for row in rows})


def prepare(args: Namespace, out: Path) -> None:
    """Download the files and write the data set into `folder`."""
    (queries, items), source = download.fetch_files(FILES, args)
    splits, num_dropped = make_splits(queries, items, args.last)
    write_data_set(
        out,
        iterate_products(items),
        splits,
        source=source,
        options=dict(last=args.last),
        counts=dict(train_left_out_as_repeats=num_dropped),
    )


def add_options(parser: ArgumentParser) -> None:
    """Add the script's own options."""
    download.add_options(parser)
    parser.add_argument(
        "--last",
        type=int,
        default=LAST,
        metavar="N",
        help="size of test_in_domain (default: %(default)s, as upstream)",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_command_line(__file__, __doc__, prepare, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
