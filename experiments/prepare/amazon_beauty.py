"""Prepare Amazon Reviews 2023, All_Beauty, for history -> next product.

It is Hugging Face McAuley-Lab/Amazon-Reviews-2023, benchmark 0core_timestamp_w_his -> DIR. Products
without metadata leave histories, and rows whose target has none or whose history gets empty are
left out (as BLaIR's script does); history <= 10.
  train              the first 100,000 such rows of the train file
  test_transductive  rows of the test file, split off by time, with every product of history and
                     target in train
  test_inductive     the first 1,000 with neither user, history nor target in train
The corpus is every product that a kept row of any of the three files names. Popularity counts train
without validation. The user of a train row who is also a transductive test's is no leak: what that
user bought later is; a test target that one of the user's own train rows shows leaves the row out,
counted.
"""

import re
import sys
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import download
from checks import PrepareError, Split, by_interaction, check_inductive, count_popularity
from download import Remote
from upstream import iterate_csv, iterate_json, make_example_id, to_one_line
from writing import run_command_line, write_data_set

HUB = "https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/d01bb542fc8c234534c064a3ee1fa9529dfe7a41"
FILES = [
    *(
        Remote(
            f"All_Beauty.{part}.csv", f"{HUB}/benchmark/0core/timestamp_w_his/All_Beauty.{part}.csv"
        )
        for part in ("train", "valid", "test")
    ),
    Remote("meta_All_Beauty.jsonl", f"{HUB}/raw/meta_categories/meta_All_Beauty.jsonl"),
]
HISTORY = 10
MOST_TRAIN = 100_000
MOST_TEST = 1_000
FIELDS = ("title", "features", "categories", "description")


def iterate_products(path: Path) -> Iterator[dict]:
    """Yield the corpus rows of the metadata, one at a time.

    The text is features, categories and description.
    """
    for line, row in iterate_json(path, ("parent_asin", *FIELDS)):
        values = {
            name: row[name] if isinstance(row[name], list) else [row[name]] for name in FIELDS
        }
        if not all(isinstance(value, str | None) for name in FIELDS for value in values[name]):
            raise PrepareError(
                f"{path}:{line}: one of {', '.join(FIELDS)} is neither text nor a list of texts; "
                "its format has changed"
            )
        parts = (
            ", ".join(filter(None, (plain(value or "") for value in values[name])))
            for name in FIELDS[1:]
        )
        yield dict(
            id=row["parent_asin"],
            title=to_one_line(" ".join(filter(None, values["title"]))),
            text=" ".join(f"{part}." for part in parts if part),
        )


def plain(text: str) -> str:
    return to_one_line(re.sub(r"[^\x00-\x7F]", " ", re.sub(r"<[^>]+>", " ", to_one_line(text))))


def iterate_interactions(path: Path, known: set[str]) -> Iterator[tuple[str, list[str], str]]:
    """Yield (user, history, target) of each row that keeps a history."""
    for _, row in iterate_csv(path, ("user_id", "parent_asin", "history")):
        past = [item for item in row["history"].split() if item in known]
        if past and row["parent_asin"] in known:
            yield row["user_id"], past[-HISTORY:], row["parent_asin"]


def prepare(args: Namespace, out: Path) -> None:
    """Download the files and write the data set into `folder`."""
    (*paths, meta), source = download.fetch_files(FILES, args)
    titles = {
        row["id"]: row["title"] or row["text"][:100]
        for row in iterate_products(meta)
        if row["title"] or row["text"]
    }

    def add(split: Split, n: int, user: str, past: list[str], target: str, name: str) -> None:
        split.add(
            dict(
                id=make_example_id(user, f"{name}{n}"),
                text=titles[past[-1]],
                history=past,
                user=user,
            ),
            [(target, 1.0)],
        )

    train = Split()
    transductive = Split()
    inductive = Split()
    named = set()
    repeats = 0
    asked: set[tuple[str, str]] = set()
    shown: dict[str, set[str]] = defaultdict(set)  # by user: what the train rows hold
    for n, (user, past, target) in enumerate(
        islice(iterate_interactions(paths[0], titles.keys()), args.max_train)
    ):
        if target in past or (user, target) in asked:
            repeats += 1
            continue
        asked.add((user, target))
        add(train, n, user, past, target, "w")
        shown[user].update(past, [target])
    in_train = set().union(*shown.values())
    for path in paths:
        for n, (user, past, target) in enumerate(iterate_interactions(path, titles.keys())):
            named.update(past, [target])
            if path is not paths[2]:
                continue
            items = {*past, target}
            if target in past or target in shown.get(user, ()):
                repeats += 1
            elif items <= in_train:
                add(transductive, n, user, past, target, "t")
            elif not items & in_train and user not in shown and len(inductive.rows) < args.max_test:
                add(inductive, n, user, past, target, "i")
    seen = count_popularity(train)
    corpus = (
        row | dict(popularity=seen[row["id"]])
        for row in iterate_products(meta)
        if row["id"] in named
    )
    write_data_set(
        out,
        corpus,
        dict(train=train, test_transductive=transductive, test_inductive=inductive),
        source=source,
        key=by_interaction,
        options=dict(max_train=args.max_train, max_test=args.max_test),
        counts=dict(rows_left_out_as_repeats=repeats),
        also=lambda: check_inductive(train, inductive, "test_inductive"),
    )


def add_options(parser: ArgumentParser) -> None:
    """Add the script's own options."""
    download.add_options(parser)
    parser.add_argument(
        "--max-train",
        type=int,
        default=MOST_TRAIN,
        metavar="N",
        help="rows of the train file (default: %(default)s, as upstream)",
    )
    parser.add_argument(
        "--max-test",
        type=int,
        default=MOST_TEST,
        metavar="N",
        help="inductive test rows (default: %(default)s, as upstream)",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_command_line(__file__, __doc__, prepare, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
