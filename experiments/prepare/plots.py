"""Prepare plot search: find the film by its plot. Made of the bundled MSRD's catalog alone.

A query is the first 40 words of a film's overview. The corpus is MSRD's without the overviews:
title, director, actors, characters, genres, tags, year. The only relevant document is the film. A
hash twentieth of the films is the test split.

DIR/teacher.jsonl is a teacher's file for SFT: for each train film some ten words of its plot, names
and rare words, as the answer to it. It teaches the form of an answer, and needs no label: it knows
neither the film nor what a retriever says of the words.
"""

import hashlib
import json
import random
import re
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from bundled import BUNDLED_MSRD, read_catalog
from checks import PrepareError, Split, drop_repeats
from upstream import find_file
from writing import run_command_line, write_data_set

from recr1.data.readers import is_validation
from recr1.retrieval.bm25.analyzer import analyze
from recr1.utils.files import fingerprint_file

MARK = "Director:"  # ends the overview
QUERY_WORDS = 40
LEAST_WORDS = 12  # films whose overview is shorter are no queries
TEST_SHARE = 20  # one of so many films
TEACHER = "teacher.jsonl"

# The teacher's answers: how many of a plot's rarest words, and how much a capital counts: as much
# as being in so many fewer plots. Chosen on the validation plots: NDCG@100 with terms counted once
# .463 of the whole plot, .484 of its words with a capital, .495 of the 14 rarest, .505 of these.
FEWEST_WORDS = 8
MOST_WORDS = 12
CAPITAL_BONUS = 200


class Film(NamedTuple):
    """A film whose plot is a query."""

    id: str
    query: str

    @property
    def query_id(self) -> str:
        """Return the id of its query."""
        return f"plot-{self.id}"


def prepare(args: Namespace, out: Path) -> None:
    """Write the data set and the teacher's file into `out`."""
    catalog, source = read_catalog(args.source)
    corpus = []
    films = []
    for row in catalog:
        overview, rest = split_text(row)
        corpus.append(row | dict(text=rest))
        query = make_query(overview, row["title"] if args.mask_title else "")
        if query:
            films.append(Film(row["id"], query))

    train, test = Split(), Split()
    for film in films:
        split = test if is_test_film(film.id) else train
        split.add(dict(id=film.query_id, text=film.query), [(film.id, 1.0)])
    train, num_dropped = drop_repeats(train, dict(test=test))
    train_films = [film for film in films if is_learned(film, train)]
    write_teacher(out, train_films)
    write_data_set(
        out,
        corpus,
        dict(train=train, test=test),
        source=source,
        options=list_options(args),
        counts=dict(dropped_repeats=num_dropped, teacher=len(train_films)),
    )


def split_text(row: dict) -> tuple[str, str]:
    """Split a document's text in (overview, the rest). Raises PrepareError without the rest."""
    overview, mark, rest = row["text"].partition(MARK)
    if not mark:
        raise PrepareError(
            f"document {row['id']!r} has no {MARK!r} in its text, which ends the overview in MSRD; "
            "take the bundled corpus"
        )
    return overview.strip(), mark + rest


def make_query(overview: str, masked_title: str) -> str:
    """Return the first words of an overview, "" for one that is too short.

    masked_title: words that share a term with it, as BM25's analyzer makes terms, are left out.
    """
    words = overview.split()
    if len(words) < LEAST_WORDS:
        return ""
    title_terms = set(analyze(masked_title))
    kept_words = []
    for word in words[:QUERY_WORDS]:
        if not title_terms.intersection(analyze(word)):
            kept_words.append(word)
    return " ".join(kept_words)


def is_test_film(id: str) -> bool:
    """Return whether the film's plot is a query of the test split, by a hash of its id."""
    digest = hashlib.sha256(f"plot{id}".encode()).hexdigest()
    return int(digest, 16) % TEST_SHARE == 0


def is_learned(film: Film, train: Split) -> bool:
    """Return whether the film's query is a train query that is not of validation."""
    return film.query_id in train.targets and not is_validation(film.query_id)


def write_teacher(folder: Path, films: list[Film]) -> None:
    """Write the teacher's file: a query of each film, as a completion behind a closed thought."""
    num_plots: Counter[str] = Counter()
    for film in films:
        num_plots.update({word.lower() for word in find_words(film.query)})
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / TEACHER, "w", encoding="utf-8", newline="\n") as file:
        for film in films:
            answer = dict(query=make_answer(film, num_plots))
            text = f"<answer>{json.dumps(answer, ensure_ascii=False)}</answer>"
            line = json.dumps(dict(id=film.query_id, text=text), ensure_ascii=False)
            file.write(line + "\n")


def make_answer(film: Film, num_plots: Counter[str]) -> str:
    """Return the rarest words of the film's query, in the query's order, as they stand there: a
    name in lower case is other tokens, which a small model copies less well.

    num_plots: in how many queries a word stands, in lower case.
    """
    words = [word for word in dict.fromkeys(find_words(film.query)) if len(word) > 2]

    def count_plots(word: str) -> int:
        bonus = CAPITAL_BONUS if word[0].isupper() else 0
        return num_plots[word.lower()] - bonus

    num_words = random.Random(film.query_id).randint(FEWEST_WORDS, MOST_WORDS)
    rarest = set(sorted(words, key=count_plots)[:num_words])
    rare_words = [word for word in words if word in rarest]
    return " ".join(rare_words)


def find_words(text: str) -> list[str]:
    """Return the words of a text, without punctuation around them."""
    return re.findall(r"[\w'’-]+", text)


def add_options(parser: ArgumentParser) -> None:
    """Add the script's own options."""
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        default=BUNDLED_MSRD,
        metavar="FOLDER",
        help="a copy of experiments/data/msrd (default: that one)",
    )
    parser.add_argument(
        "--mask-title",
        action="store_true",
        help="leave the words of the film's title out of its query",
    )


def describe_wanted(args: Namespace) -> dict:
    """Return what the finished folder of these arguments says of itself."""
    corpus_path = find_file(args.source, "corpus.jsonl")
    return dict(sha256=[fingerprint_file(corpus_path)["sha256"]], options=list_options(args))


def list_options(args: Namespace) -> dict:
    """Return what decides what is written, for prepared.json: data of an earlier version, whose
    teacher wrote in lower case, is made anew.
    """
    return dict(mask_title=args.mask_title, teacher="as it stands in the plot")


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_command_line(
        __file__, __doc__, prepare, add_options, argv, describe_wanted=describe_wanted
    )


if __name__ == "__main__":
    sys.exit(main())
