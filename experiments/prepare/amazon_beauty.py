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
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import download
from checks import PrepareError, Split, by_interaction, check_inductive, count_popularity
from download import Remote
from upstream import iterate_csv, iterate_json, make_example_id, to_one_line
from writing import run_command_line, write_data_set

HUB = "https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/d01bb542fc8c234534c064a3ee1fa9529dfe7a41"
INTERACTIONS = f"{HUB}/benchmark/0core/timestamp_w_his"
FILES = [
    Remote("All_Beauty.train.csv", f"{INTERACTIONS}/All_Beauty.train.csv"),
    Remote("All_Beauty.valid.csv", f"{INTERACTIONS}/All_Beauty.valid.csv"),
    Remote("All_Beauty.test.csv", f"{INTERACTIONS}/All_Beauty.test.csv"),
    Remote("meta_All_Beauty.jsonl", f"{HUB}/raw/meta_categories/meta_All_Beauty.jsonl"),
]
HISTORY = 10
MOST_TRAIN = 100_000
MOST_TEST = 1_000
FIELDS = ("title", "features", "categories", "description")


class Interaction(NamedTuple):
    """Hold a row of upstream: what a user had before, and what came next."""

    user: str
    history: list[str]
    target: str


def iterate_products(path: Path) -> Iterator[dict]:
    """Yield the corpus rows of the metadata, one at a time.

    The text is features, categories and description.
    """
    for line, row in iterate_json(path, ("parent_asin", *FIELDS)):
        texts = {}
        for name in FIELDS:
            texts[name] = list_texts(f"{path}:{line}", row[name])
        sentences = []
        for name in FIELDS[1:]:
            phrases = map(clean_text, texts[name])
            sentence = ", ".join(filter(None, phrases))
            if sentence:
                sentences.append(f"{sentence}.")
        title = to_one_line(" ".join(texts["title"]))
        yield dict(id=row["parent_asin"], title=title, text=" ".join(sentences))


def list_texts(where: str, value: object) -> list[str]:
    """Return the texts of a field, a text or a list of texts, without empty ones."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str | None) for text in values):
        raise PrepareError(
            f"{where}: one of {', '.join(FIELDS)} is neither text nor a list of texts; "
            "its format has changed"
        )
    return [text for text in values if text]


def clean_text(text: str) -> str:
    """Return a text without HTML tags and characters outside ASCII, on one line."""
    untagged = re.sub(r"<[^>]+>", " ", to_one_line(text))
    ascii_text = re.sub(r"[^\x00-\x7F]", " ", untagged)
    return to_one_line(ascii_text)


def iterate_interactions(path: Path, known: set[str]) -> Iterator[Interaction]:
    """Yield each row that keeps a history."""
    for _, row in iterate_csv(path, ("user_id", "parent_asin", "history")):
        past = [item for item in row["history"].split() if item in known]
        if past and row["parent_asin"] in known:
            yield Interaction(row["user_id"], past[-HISTORY:], row["parent_asin"])


def read_titles(path: Path) -> dict[str, str]:
    """Return {product: its title, or the begin of its text}, of the products that have either."""
    titles = {}
    for row in iterate_products(path):
        title = row["title"] or row["text"][:100]
        if title:
            titles[row["id"]] = title
    return titles


def add_example(split: Split, name: str, interaction: Interaction, titles: dict[str, str]) -> None:
    """Add an interaction as a query with one target."""
    user, history, target = interaction
    id = make_example_id(user, name)
    row = dict(id=id, text=titles[history[-1]], history=history, user=user)
    split.add(row, [(target, 1.0)])


def make_train(path: Path, titles: dict[str, str], max_train: int) -> tuple[Split, int]:
    """Return the train split, and how many rows were left out as repeats."""
    train = Split()
    num_repeats = 0
    asked: set[tuple[str, str]] = set()
    interactions = iterate_interactions(path, titles.keys())
    for number, interaction in enumerate(islice(interactions, max_train)):
        user, history, target = interaction
        if target in history or (user, target) in asked:
            num_repeats += 1
            continue
        asked.add((user, target))
        add_example(train, f"w{number}", interaction, titles)
    return train, num_repeats


def make_tests(
    path: Path, titles: dict[str, str], train: Split, max_test: int
) -> tuple[Split, Split, int]:
    """Return the two tests, transductive and inductive, and the number of repeats left out."""
    shown: dict[str, set[str]] = defaultdict(set)  # by user: what the train rows hold
    for row in train.rows:
        shown[row["user"]].update(list_items(train, row))
    in_train = set().union(*shown.values())
    transductive = Split()
    inductive = Split()
    num_repeats = 0
    for number, interaction in enumerate(iterate_interactions(path, titles.keys())):
        user, history, target = interaction
        items = {*history, target}
        if target in history or target in shown.get(user, ()):
            num_repeats += 1
        elif items <= in_train:
            add_example(transductive, f"t{number}", interaction, titles)
        elif items & in_train or user in shown:
            continue
        elif len(inductive.rows) < max_test:
            add_example(inductive, f"i{number}", interaction, titles)
    return transductive, inductive, num_repeats


def list_items(split: Split, row: dict) -> list[str]:
    """Return the products of a row's history, then its target."""
    [(target, _)] = split.targets[row["id"]]
    return [*row["history"], target]


def collect_named_products(paths: list[Path], known: set[str]) -> set[str]:
    """Return every product that a row of the files names."""
    named = set()
    for path in paths:
        for _, history, target in iterate_interactions(path, known):
            named.update(history)
            named.add(target)
    return named


def iterate_corpus(path: Path, named: set[str], popularity: Counter) -> Iterator[dict]:
    """Yield the corpus rows of the named products, with their popularity."""
    for row in iterate_products(path):
        if row["id"] in named:
            yield row | dict(popularity=popularity[row["id"]])


def prepare(args: Namespace, out: Path) -> None:
    """Download the files and write the data set into `folder`."""
    (*paths, meta), source = download.fetch_files(FILES, args)
    titles = read_titles(meta)
    train, train_repeats = make_train(paths[0], titles, args.max_train)
    named = collect_named_products(paths, titles.keys())
    transductive, inductive, test_repeats = make_tests(paths[2], titles, train, args.max_test)
    write_data_set(
        out,
        iterate_corpus(meta, named, count_popularity(train)),
        dict(train=train, test_transductive=transductive, test_inductive=inductive),
        source=source,
        key=by_interaction,
        options=dict(max_train=args.max_train, max_test=args.max_test),
        counts=dict(rows_left_out_as_repeats=train_repeats + test_repeats),
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
