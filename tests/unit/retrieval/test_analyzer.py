"""The analyzer against what Lucene 9.5 recorded (tests/data/lucene/README.md says how)."""

import gzip
import hashlib
import json
import random
import re
import time
from pathlib import Path

import pytest

from recr1.retrieval.bm25 import analyzer
from recr1.retrieval.bm25.analyzer import MAX_LENGTH, STOP_WORDS, analyze

LUCENE = Path(__file__).parents[2] / "data" / "lucene"
DATA = Path(__file__).parents[3] / "experiments" / "data"

# The last row of each group of analyzer.tsv. Every row agrees: there is no exception to list.
GROUPS = [
    ("stop words", 67),
    ("Porter", 551),
    ("possessives", 645),
    ("numbers", 759),
    ("dots, hyphens, slashes, symbols", 929),
    ("addresses", 942),
    ("emoji", 1067),
    ("CJK", 1130),
    ("other scripts", 1211),
    ("combining marks, full width, case", 1304),
    ("white space, controls, invisible", 1420),
    ("long tokens", 1457),
    ("sentences", 1480),
    ("queries", 1661),
    ("titles", 1751),
]


def rows(name: str) -> list[list[str]]:
    return [line.split("\t") for line in (LUCENE / name).read_text().split("\n")[1:-1]]


def corpus(name: str) -> list[dict]:
    with gzip.open(DATA / name / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("group", range(len(GROUPS)), ids=[name for name, _ in GROUPS])
def test_tokens_of_lucene(group):
    name, last = GROUPS[group]
    table = [(json.loads(text), json.loads(tokens)) for text, tokens in rows("analyzer.tsv")]
    part = table[GROUPS[group - 1][1] if group else 0 : last]
    wrong = [(text, analyze(text), tokens) for text, tokens in part if analyze(text) != tokens]
    assert len(table) == GROUPS[-1][1] and part and not wrong, (
        f"{name}: {len(wrong)} of {len(part)} differ, {wrong[:5]}"
    )


def test_tokens_of_whole_corpora():
    """One hash over the tokens of each corpus: a single other token in 2.1 million changes it."""
    msrd = corpus("msrd")
    esci = corpus("esci_small")
    texts = {
        "msrd": [(doc["id"], doc["title"] + " " + doc["text"]) for doc in msrd],
        "esci_small": [(doc["id"], doc["title"] + " " + doc["text"]) for doc in esci],
        "titles": [(doc["id"], doc["title"]) for doc in msrd + esci],
    }
    for name, documents, with_tokens, tokens, distinct, _, digest in rows("corpora.tsv"):
        found = [(doc_id, analyze(text)) for doc_id, text in texts[name]]
        everything = [token for _, part in found for token in part]
        assert (len(found), sum(bool(part) for _, part in found)) == (
            int(documents),
            int(with_tokens),
        )
        assert (len(everything), len(set(everything))) == (int(tokens), int(distinct))
        lines = "".join(f"{doc_id}\t{' '.join(part)}\n" for doc_id, part in found)
        assert hashlib.sha256(lines.encode()).hexdigest() == digest, name


def test_word_boundaries_of_random_ascii():
    """The boundaries of ASCII text, written a second time: letter by letter, with the rules as
    look-around.
    """
    word = re.compile(
        r"_*[A-Za-z0-9](?:[A-Za-z0-9_]|(?<=[A-Za-z])[.':](?=[A-Za-z])|(?<=[0-9])[.',;](?=[0-9]))*"
    )
    draw = random.Random(0)
    for _ in range(5000):
        text = "".join(draw.choices("kKzZ059._,;:'- \n#*\"", k=draw.randint(1, 24)))
        assert analyze(text) == [w.lower() for w in word.findall(text)], text


def test_filters_stand_in_lucenes_order():
    # possessive, lower case, stop words, then the stemmer
    assert analyze("It's its THE The's") == ["it"]
    assert analyze("beings innings") == ["be", "in"]  # so a stem may be a stop word
    assert all(analyze(word) == [] for word in STOP_WORDS)
    assert len(STOP_WORDS) == 33
    assert analyze("") == analyze(" \n _ -- ") == []


def test_long_tokens_are_cut_at_utf16_units():
    wide = "\U00010428"  # a letter of two units
    assert [len(token) for token in analyze("k" * 600)] == [
        MAX_LENGTH,
        MAX_LENGTH,
        600 - 2 * MAX_LENGTH,
    ]
    assert [len(token) for token in analyze(wide * 130)] == [127, 3]
    # the letter after the quote lies outside the window
    assert analyze("k" * 254 + "'s") == ["k" * 254, "s"]
    assert analyze("_" * 300) == []
    assert len(analyze("_" * 300 + "k")) == 1


def test_cut_is_as_defined():
    """Long tokens by Lucene's definition: from every place where no token was, the longest one in
    255 units.
    """

    def slow(text):
        found = []
        place = 0
        while place < len(text):
            end = place
            units = 0
            while end < len(text) and (units := units + 1 + (text[end] > "\uffff")) <= MAX_LENGTH:
                end += 1
            match = analyzer._TOKEN.match(text, place, end)
            found += [match[0]] if match else []
            place = match.end() if match else place + 1
        return found

    draw = random.Random(1)
    parts = ["a", "_", "1", "\U00010428", "k\u0301", " ", ".", "1.", "-", '\u05d0"', "_\u0301"]
    for _ in range(60):
        text = "".join(
            draw.choice(parts) * draw.choice([1, 2, 100, 254, 256, 1100]) for _ in range(8)
        )
        assert analyzer._cut_words(text) == slow(text), ascii(text)


def test_time_is_linear():
    start = time.perf_counter()
    for text in (
        "_" * 200_000,
        "a_" * 50_000,
        "1,2;" * 50_000,
        '\u05d0"' * 50_000,
        "\U0001f469\u200d" * 50_000,
    ):
        analyze(text)
    assert time.perf_counter() - start < 10  # quadratic: minutes
