"""The texts on which abilities.py measures a model. All are in the repository or come with Python.

  plots     overviews of films, of the test split of plot search (experiments/prepare/plots.py): no
            training on plots has seen them. The bundled policy has: its cold start read the
            catalog.
  products  titles and texts of the bundled Amazon products (ESCI). No training shows a policy
            their texts; esci_rerank shows titles.
  neutral   paragraphs of the Python language reference, as pydoc has it (pydoc_data.topics, PSF
            license version 2): English about neither films nor products.

MovieLens has titles alone, which are no texts. The neutral paragraphs are those of the Python that
runs this: other versions have others. Everything else is the same everywhere.
"""

from __future__ import annotations

import hashlib
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

EXPERIMENTS = Path(__file__).resolve().parents[1]
sys.path.append(str(EXPERIMENTS / "prepare"))
from bundled import BUNDLED_MSRD, read_catalog  # noqa: E402
from plots import is_test_film, split_text  # noqa: E402

from recr1.data.readers import read_corpus  # noqa: E402

PRODUCTS = EXPERIMENTS / "data/esci_small/corpus.jsonl.gz"
NEUTRAL_PROMPTS = EXPERIMENTS / "data/neutral_prompts.txt"

# A passage has at most so many characters: of similar lengths they weigh alike.
PASSAGE_LENGTH = 400
SHORTEST_PASSAGE = 150

# A question's context and its choices are sentences of such lengths.
SENTENCE_LENGTHS = range(40, 200)
NUM_CHOICES = 4

SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z])")


class Question(NamedTuple):
    """Which of the sentences comes next?"""

    context: str
    choices: list[str]
    answer: int  # index of the right one


def read_texts(source: str) -> list[str]:
    """Return the texts of a source, each in one line, in an order that says nothing."""
    texts = READERS[source]()
    one_line_texts = dict.fromkeys(" ".join(text.split()) for text in texts)  # each once
    return sorted(one_line_texts, key=hash_text)


def read_plots() -> list[str]:
    """Return the overviews of the test split's films."""
    catalog, _ = read_catalog(BUNDLED_MSRD)
    overviews = []
    for row in catalog:
        if is_test_film(row["id"]):
            overview, _ = split_text(row)
            overviews.append(overview)
    return overviews


def read_products() -> list[str]:
    """Return titles and texts of the bundled products."""
    _, contents, _ = read_corpus(PRODUCTS)
    return contents


def read_neutral() -> list[str]:
    """Return the paragraphs of Python's language reference that are prose."""
    paragraphs = []
    for text in topics.values():
        for paragraph in text.split("\n\n"):
            if is_prose(paragraph):
                paragraphs.append(paragraph)
    return paragraphs


READERS = dict(plots=read_plots, products=read_products, neutral=read_neutral)


def is_prose(paragraph: str) -> bool:
    """Return whether a paragraph of pydoc is sentences: not code, a list, a heading, a table."""
    has_indent = re.search(r"^\s", paragraph, re.MULTILINE)
    begins_well = re.match(r"[A-Z]", paragraph)
    return bool(begins_well) and not has_indent and paragraph.endswith((".", ".\n"))


def hash_text(text: str) -> str:
    """Return the SHA-256 of a text: by it texts are put into an order that says nothing."""
    return hashlib.sha256(text.encode()).hexdigest()


def make_passages(source: str, count: int) -> list[str]:
    """Return at most `count` passages of a source, cut at a word."""
    long_texts = (text for text in read_texts(source) if len(text) >= SHORTEST_PASSAGE)
    passages = []
    for text in islice(long_texts, count):
        passages.append(textwrap.shorten(text, PASSAGE_LENGTH, placeholder=""))
    return passages


def make_questions(source: str, count: int) -> list[Question]:
    """Make at most `count` questions: the first sentence of a text, and the second ones of four.

    A sentence is the right choice of one question and a wrong choice of three others: a model that
    scores sentences without their context has one quarter right on average.
    """
    pairs = list(islice(find_sentence_pairs(read_texts(source)), count))
    questions = []
    for number, (context, following) in enumerate(pairs):
        choices = []
        for step in range(1, NUM_CHOICES):
            _, other = pairs[(number + step) % len(pairs)]
            choices.append(other)
        answer = number % NUM_CHOICES
        choices.insert(answer, following)
        questions.append(Question(context, choices, answer))
    return questions


def find_sentence_pairs(texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the first two sentences of each text that has two of a fitting length.

    An abbreviation may end a sentence here ("Dr."): what follows follows it all the same.
    """
    seen = set()
    for text in texts:
        sentences = SENTENCE_END.split(text, maxsplit=2)
        if len(sentences) < 2:
            continue
        context, following, *_ = sentences
        has_lengths = len(context) in SENTENCE_LENGTHS and len(following) in SENTENCE_LENGTHS
        if has_lengths and following not in seen:
            seen.add(following)
            yield context, following


def read_neutral_prompts() -> list[str]:
    """Return the neutral instructions, one of each line of the file."""
    return NEUTRAL_PROMPTS.read_text(encoding="utf-8").splitlines()
