"""Prepare Rec-R1's subset of Amazon ESCI: US, small version, Exact judgements, gain 1.

It is amazon-science/esci-data (parquet: needs pyarrow) -> DIR. A product's category is that of
Amazon Reviews 2023 (asin2category.json); judgements of products without one or in Unknown are left
out, as upstream does. A query's category is its first target's. Queries with the same words are
one, their targets joined.
  test   ESCI's test queries in Video_Games, Baby_Products, Office_Products, Sports_and_Outdoors,
         and one setting for each: test_video_games, ...
  train  ESCI's train queries of every category; one whose words are a test's is left out
Products: without --target-pool every US product that the small version judges. With --target-pool
the targets of all of ESCI's test queries and 50 products of the same category drawn for each, and
train keeps only targets among them (the paper's rule; its own draw had no seed and went over all of
Amazon). With --target-pool FILE, upstream's sampled_item_metadata_esci.jsonl, exactly its products
and texts.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import download
import numpy as np
from checks import PrepareError, Split, by_text, drop_repeats
from download import Remote
from parquet import iterate_parquet, read_categories
from upstream import clean_product_text, iterate_json, require_strings, to_one_line
from writing import run_command_line, write_data_set

from recr1.utils.counter_rng import draw_uniforms
from recr1.utils.files import fingerprint_file

GITHUB = "https://github.com/amazon-science/esci-data/raw/main/shopping_queries_dataset"
EXAMPLES = Remote(
    "shopping_queries_dataset_examples.parquet",
    f"{GITHUB}/shopping_queries_dataset_examples.parquet",
    51_286_808,
    "4a735b693b4a424a6fc67f5be6e4c811495c488bbf66d02a602d308b2744263a",
)
PRODUCTS = Remote(
    "shopping_queries_dataset_products.parquet",
    f"{GITHUB}/shopping_queries_dataset_products.parquet",
    1_108_857_465,
    "25124442d064d64b26f74082d6fa09438d679efc0c183cf28d19064a2b65a265",
)
CATEGORIES = Remote(
    "asin2category.json",
    "https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/"
    "d01bb542fc8c234534c064a3ee1fa9529dfe7a41/asin2category.json",
)
TEST_DOMAINS = ("Video_Games", "Baby_Products", "Office_Products", "Sports_and_Outdoors")
NEGATIVES = 50
DRAW = Path("")  # --target-pool without a file
COLUMNS = (
    "query",
    "query_id",
    "product_id",
    "product_locale",
    "esci_label",
    "small_version",
    "split",
)


class Judged(NamedTuple):
    """Hold one judgement of a product for a query."""

    split: str
    query_id: str
    query: str
    product: str
    label: str  # E, S, C or I


def read_examples(path: Path) -> list[Judged]:
    """Read the judgements of the US small version, in file order."""
    judged = []
    labels = set()
    for row in iterate_parquet(path, COLUMNS):
        labels.add(row["esci_label"])
        if row["product_locale"] == "us" and row["small_version"] == 1:
            values = (
                row["split"],
                str(row["query_id"]),
                row["query"],
                row["product_id"],
                row["esci_label"],
            )
            # few distinct ones
            judged.append(Judged(*map(sys.intern, values)))
    splits = {judgement.split for judgement in judged}
    if not labels <= set("ESCI") or splits != {"train", "test"}:
        label_names = sorted(map(str, labels))
        raise PrepareError(
            f"{path}: labels {label_names}, splits {sorted(splits)}; "
            "want E, S, C, I and train, test: its format has changed"
        )
    return judged


def iterate_targets(judged: list[Judged], split: str, category: dict[str, str]) -> Iterator[Judged]:
    """Yield the split's Exact judgements of products that have a category."""
    for judgement in judged:
        is_exact = judgement.split == split and judgement.label == "E"
        if is_exact and judgement.product in category:
            yield judgement


def collect_queries(
    judged: list[Judged], split: str, category: dict[str, str]
) -> tuple[Split, int]:
    """Collect the split's queries with Exact products that have a category.

    Returns also how many judgements said the same again.
    """
    rows: dict[str, dict] = {}  # by the query's words
    gains: dict[str, dict[str, float]] = defaultdict(dict)
    repeats = 0
    for _, query_id, query, product, _ in iterate_targets(judged, split, category):
        new_row = dict(id=f"esci-{query_id}", text=to_one_line(query), category=category[product])
        row = rows.setdefault(by_text(new_row, []), new_row)
        query_gains = gains[row["id"]]
        if product in query_gains:
            repeats += 1
        query_gains[product] = 1.0
    queries = Split()
    for row in rows.values():
        queries.add(row, list(gains[row["id"]].items()))
    return queries, repeats


def iterate_us_products(path: Path, columns: tuple[str, ...] = ()) -> Iterator[dict]:
    """Yield the US products with a title."""
    for row in iterate_parquet(path, ("product_id", "product_locale", "product_title", *columns)):
        if row["product_locale"] == "us" and clean_product_text(row["product_title"] or ""):
            yield row


def draw_pool(judged: list[Judged], category: dict[str, str]) -> set[str]:
    """Draw the ids of the pool.

    They are the Exact products of ESCI's test queries, and for each such judgement 50 products of
    its category (the same one may be drawn twice).
    """
    by_category = defaultdict(list)
    for product in sorted(category):
        by_category[category[product]].append(product)
    pool = set()
    for number, judgement in enumerate(iterate_targets(judged, "test", category)):
        products = by_category[category[judgement.product]]
        uniforms = draw_uniforms(0, 0, np.array([number]), 1, NEGATIVES)[0, 0]
        pool.add(judgement.product)
        for pick in uniforms * len(products):
            pool.add(products[int(pick)])
    return pool


def prepare(args: Namespace, out: Path) -> None:
    """Download the files and write the data set into `folder`."""
    is_drawn = args.target_pool is DRAW
    has_pool_file = args.target_pool is not None and not is_drawn
    files = [EXAMPLES] if has_pool_file else [EXAMPLES, PRODUCTS, CATEGORIES]
    paths, source = download.fetch_files(files, args)
    judged = read_examples(paths[0])
    if has_pool_file:
        source.append(dict(name=args.target_pool.name, **fingerprint_file(args.target_pool)))
        category = read_pool_categories(args.target_pool)
        corpus = iterate_upstream_pool(args.target_pool)
    else:
        pool, category = choose_products(judged, paths[1], paths[2], is_drawn)
        corpus = iterate_corpus(paths[1], pool, category)

    all_train, train_repeats = collect_queries(judged, "train", category)
    all_test, test_repeats = collect_queries(judged, "test", category)
    tests = split_by_domain(all_test)
    test = tests["test"]
    train, num_dropped = drop_repeats(all_train, tests)
    pool_name = None
    if has_pool_file:
        pool_name = "file"
    elif is_drawn:
        pool_name = "drawn"
    write_data_set(
        out,
        corpus,
        dict(train=train, **tests),
        source=source,
        options=dict(target_pool=pool_name, negatives=NEGATIVES if is_drawn else None),
        counts=dict(
            targets=sum(map(len, train.targets.values())),
            train_left_out_as_repeats=num_dropped,
            judgements_given_twice=train_repeats + test_repeats,
            test_queries_that_share_a_target_with_train=count_shared_targets(train, test),
            test_queries_of_other_categories=len(all_test.rows) - len(test.rows),
        ),
    )


def choose_products(
    judged: list[Judged], products: Path, categories: Path, is_drawn: bool
) -> tuple[set[str], dict[str, str]]:
    """Return the ids of the corpus and {product: category} of those that may be targets.

    is_drawn: from all US products a pool is drawn; else they are those that the small version
    judges.
    """
    judged_products = {judgement.product for judgement in judged}
    pool = set()
    for row in iterate_us_products(products):
        if is_drawn or row["product_id"] in judged_products:
            pool.add(row["product_id"])
    category = drop_unknown(read_categories(categories, pool))
    if is_drawn:
        pool = draw_pool(judged, category)
        category = {product: name for product, name in category.items() if product in pool}
    return pool, category


def iterate_corpus(products: Path, pool: set[str], category: dict[str, str]) -> Iterator[dict]:
    """Yield the corpus rows of the products in the pool."""
    for product in iterate_us_products(products, ("product_description",)):
        id = product["product_id"]
        if id not in pool:
            continue
        row = dict(
            id=id,
            title=clean_product_text(product["product_title"]),
            text=clean_product_text(product["product_description"] or ""),
        )
        if id in category:
            row["category"] = category[id]
        yield row


def split_by_domain(queries: Split) -> dict[str, Split]:
    """Return {"test": the queries of all test domains, then one split for each that has any}."""
    test = Split()
    by_domain = {domain: Split() for domain in TEST_DOMAINS}
    for row in queries.rows:
        domain = row["category"]
        if domain in by_domain:
            targets = queries.targets[row["id"]]
            test.add(row, targets)
            by_domain[domain].add(row, targets)
    tests = dict(test=test)
    for domain, split in by_domain.items():
        if split.rows:
            tests[f"test_{domain.lower()}"] = split
    return tests


def count_shared_targets(train: Split, test: Split) -> int:
    """Count the test queries with a target that a train query has too."""
    train_docs = set()
    for targets in train.targets.values():
        train_docs.update(doc for doc, _ in targets)
    num_shared = 0
    for targets in test.targets.values():
        if any(doc in train_docs for doc, _ in targets):
            num_shared += 1
    return num_shared


def iterate_upstream_pool(path: Path) -> Iterator[dict]:
    """Yield the corpus rows of sampled_item_metadata_esci.jsonl; its id is item or item_id."""
    for line, row in iterate_json(path, ("category", "metadata")):
        id_key = "item_id" if "item_id" in row else "item"
        require_strings(path, line, row, (id_key, "category", "metadata"))
        text = to_one_line(row["metadata"])
        category = row["category"].replace(" ", "_")
        yield dict(id=row[id_key], text=text, category=category)


def read_pool_categories(path: Path) -> dict[str, str]:
    """Return {product: category} of upstream's pool, without those of Unknown."""
    category = {}
    for row in iterate_upstream_pool(path):
        category[row["id"]] = row["category"]
    return drop_unknown(category)


def drop_unknown(category: dict[str, str]) -> dict[str, str]:
    """Return {product: category} without the products of an Unknown category."""
    return {product: name for product, name in category.items() if "Unknown" not in name}


def add_options(parser: ArgumentParser) -> None:
    """Add the script's own options."""
    download.add_options(parser)
    parser.add_argument(
        "--target-pool",
        nargs="?",
        const=DRAW,
        type=Path,
        metavar="FILE",
        help="products and train targets only from the test queries' pool, "
        "drawn anew or upstream's FILE",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_command_line(__file__, __doc__, prepare, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
