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
Judged = tuple[str, str, str, str, str]  # split, query id, query, product id, label E, S, C or I


def read_examples(path: Path) -> list[Judged]:
    """Read the judgements of the US small version, in file order."""
    columns = (
        "query",
        "query_id",
        "product_id",
        "product_locale",
        "esci_label",
        "small_version",
        "split",
    )
    judged = []
    labels = set()
    for row in iterate_parquet(path, columns):
        labels.add(row["esci_label"])
        if row["product_locale"] == "us" and row["small_version"] == 1:
            # few distinct ones
            judged.append(
                tuple(
                    map(
                        sys.intern,
                        (
                            row["split"],
                            str(row["query_id"]),
                            row["query"],
                            row["product_id"],
                            row["esci_label"],
                        ),
                    )
                )
            )
    if not labels <= set("ESCI") or {row[0] for row in judged} != {"train", "test"}:
        raise PrepareError(
            f"{path}: labels {sorted(map(str, labels))}, splits "
            f"{sorted({row[0] for row in judged})}; want E, S, C, I and train, test: "
            "its format has changed"
        )
    return judged


def collect_queries(
    judged: list[Judged], split: str, category: dict[str, str]
) -> tuple[Split, int]:
    """Collect the split's queries with Exact products that have a category.

    Returns also how many judgements said the same again.
    """
    ids: dict[str, dict] = {}
    targets: dict[str, dict[str, float]] = defaultdict(dict)
    repeats = 0
    for of, id, query, product, label in judged:
        if of == split and label == "E" and product in category:
            row = dict(id=f"esci-{id}", text=to_one_line(query), category=category[product])
            row = ids.setdefault(by_text(row, []), row)
            repeats += product in targets[row["id"]]
            targets[row["id"]][product] = 1.0
    return Split(
        list(ids.values()), {id: list(found.items()) for id, found in targets.items()}
    ), repeats


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
    for n, product in enumerate(
        product
        for of, _, _, product, label in judged
        if of == "test" and label == "E" and product in category
    ):
        choice = by_category[category[product]]
        picks = draw_uniforms(0, 0, np.array([n]), 1, NEGATIVES)[0, 0] * len(choice)
        pool |= {product, *(choice[int(pick)] for pick in picks)}
    return pool


def prepare(args: Namespace, out: Path) -> None:
    """Download the files and write the data set into `folder`."""
    upstreams = args.target_pool is not None and args.target_pool is not DRAW
    paths, source = download.fetch_files(
        [EXAMPLES] if upstreams else [EXAMPLES, PRODUCTS, CATEGORIES], args
    )
    judged = read_examples(paths[0])
    if upstreams:
        source.append(dict(name=args.target_pool.name, **fingerprint_file(args.target_pool)))
        category = known(
            {row["id"]: row["category"] for row in iterate_upstream_pool(args.target_pool)}
        )
        corpus = iterate_upstream_pool(args.target_pool)
    else:
        small = {product for _, _, _, product, _ in judged}
        pool = {
            row["product_id"]
            for row in iterate_us_products(paths[1])
            if args.target_pool is DRAW or row["product_id"] in small
        }
        category = known(read_categories(paths[2], pool))
        if args.target_pool is DRAW:
            pool = draw_pool(judged, category)
            category = {product: name for product, name in category.items() if product in pool}
        corpus = (
            dict(
                id=row["product_id"],
                title=clean_product_text(row["product_title"]),
                text=clean_product_text(row["product_description"] or ""),
            )
            | (dict(category=category[row["product_id"]]) if row["product_id"] in category else {})
            for row in iterate_us_products(paths[1], ("product_description",))
            if row["product_id"] in pool
        )
    train, again = collect_queries(judged, "train", category)
    asked, again_test = collect_queries(judged, "test", category)
    test = Split()
    domains = {f"test_{domain.lower()}": Split() for domain in TEST_DOMAINS}
    for row in asked.rows:
        if row["category"] in TEST_DOMAINS:
            for split in (test, domains[f"test_{row['category'].lower()}"]):
                split.add(row, asked.targets[row["id"]])
    tests = dict(test=test, **{name: split for name, split in domains.items() if split.rows})
    train, left = drop_repeats(train, tests)
    in_train = {doc for targets in train.targets.values() for doc, _ in targets}
    shared = sum(any(doc in in_train for doc, _ in targets) for targets in test.targets.values())
    write_data_set(
        out,
        corpus,
        dict(train=train, **tests),
        source=source,
        options=dict(
            target_pool="file" if upstreams else "drawn" if args.target_pool is DRAW else None,
            negatives=NEGATIVES if args.target_pool is DRAW else None,
        ),
        counts=dict(
            targets=sum(map(len, train.targets.values())),
            train_left_out_as_repeats=left,
            judgements_given_twice=again + again_test,
            test_queries_that_share_a_target_with_train=shared,
            test_queries_of_other_categories=len(asked.rows) - len(test.rows),
        ),
    )


def iterate_upstream_pool(path: Path) -> Iterator[dict]:
    """Yield the corpus rows of sampled_item_metadata_esci.jsonl; its id is item or item_id."""
    for line, row in iterate_json(path, ("category", "metadata")):
        id = "item_id" if "item_id" in row else "item"
        require_strings(path, line, row, (id, "category", "metadata"))
        yield dict(
            id=row[id],
            text=to_one_line(row["metadata"]),
            category=row["category"].replace(" ", "_"),
        )


def known(category: dict[str, str]) -> dict[str, str]:
    return {product: name for product, name in category.items() if "Unknown" not in name}


DRAW = Path("")  # --target-pool without a file


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
