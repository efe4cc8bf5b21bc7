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
GROUP_NAMES = [name for name, _ in GROUPS]

# The boundaries of ASCII text, written a second time: letter by letter, with the rules as
# look-around.
ASCII_WORD = re.compile(
    r"_*[A-Za-z0-9](?:[A-Za-z0-9_]|(?<=[A-Za-z])[.':](?=[A-Za-z])|(?<=[0-9])[.',;](?=[0-9]))*"
)
ASCII_LETTERS = "kKzZ059._,;:'- \n#*\""

WIDE_LETTER = "\U00010428"  # two UTF-16 units
LONG_PIECES = ["a", "_", "1", WIDE_LETTER, "k\u0301", " ", "."]
LONG_PIECES += ["1.", "-", '\u05d0"', "_\u0301"]
LONG_REPEATS = [1, 2, 100, 254, 256, 1100]

LONG_TEXTS = [
    "_" * 200_000,
    "a_" * 50_000,
    "1,2;" * 50_000,
    '\u05d0"' * 50_000,
    "\U0001f469\u200d" * 50_000,
]


def read_table(name: str) -> list[list[str]]:
    lines = (LUCENE / name).read_text().split("\n")
    rows = lines[1:-1]
    return [row.split("\t") for row in rows]


def read_corpus(name: str) -> list[dict]:
    path = DATA / name / "corpus.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("group", range(len(GROUPS)), ids=GROUP_NAMES)
def test_tokens_of_lucene(group):
    table = read_table("analyzer.tsv")
    _, last = GROUPS[group]
    first = 0
    if group > 0:
        _, first = GROUPS[group - 1]
    rows = table[first:last]

    wrong = []
    for text_json, tokens_json in rows:
        text = json.loads(text_json)
        expected = json.loads(tokens_json)
        tokens = analyze(text)
        if tokens != expected:
            wrong.append((text, tokens, expected))

    _, end = GROUPS[-1]
    assert len(table) == end
    assert rows
    assert not wrong, f"{len(wrong)} of {len(rows)} differ, {wrong[:5]}"


def read_corpora() -> dict[str, list[tuple[str, str]]]:
    """Read the ids and texts that each row of corpora.tsv was computed from."""
    texts = {"msrd": [], "esci_small": [], "titles": []}
    for name in ("msrd", "esci_small"):
        for doc in read_corpus(name):
            text = doc["title"] + " " + doc["text"]
            texts[name].append((doc["id"], text))
            texts["titles"].append((doc["id"], doc["title"]))
    return texts


def test_tokens_of_whole_corpora():
    """One hash over the tokens of each corpus: a single other token in 2.1 million changes it."""
    texts = read_corpora()

    for name, documents, with_tokens, tokens, distinct, _, digest in read_table("corpora.tsv"):
        num_with_tokens = 0
        num_tokens = 0
        vocabulary = set()
        lines = hashlib.sha256()
        for doc_id, text in texts[name]:
            analyzed = analyze(text)
            num_with_tokens += bool(analyzed)
            num_tokens += len(analyzed)
            vocabulary.update(analyzed)
            line = f"{doc_id}\t{' '.join(analyzed)}\n"
            lines.update(line.encode())

        assert len(texts[name]) == int(documents)
        assert num_with_tokens == int(with_tokens)
        assert num_tokens == int(tokens)
        assert len(vocabulary) == int(distinct)
        assert lines.hexdigest() == digest, name


def test_word_boundaries_of_random_ascii():
    rng = random.Random(0)
    for _ in range(5000):
        length = rng.randint(1, 24)
        text = "".join(rng.choices(ASCII_LETTERS, k=length))
        words = ASCII_WORD.findall(text)

        assert analyze(text) == [word.lower() for word in words], text


def test_filters_stand_in_lucenes_order():
    # possessive, lower case, stop words, then the stemmer
    assert analyze("It's its THE The's") == ["it"]
    assert analyze("beings innings") == ["be", "in"]  # so a stem may be a stop word
    for word in STOP_WORDS:
        assert analyze(word) == []
    assert len(STOP_WORDS) == 33
    assert analyze("") == []
    assert analyze(" \n _ -- ") == []


def test_long_tokens_are_cut_at_utf16_units():
    lengths = [len(token) for token in analyze("k" * 600)]
    assert lengths == [MAX_LENGTH, MAX_LENGTH, 600 - 2 * MAX_LENGTH]

    wide_lengths = [len(token) for token in analyze(WIDE_LETTER * 130)]
    assert wide_lengths == [127, 3]

    # the letter after the quote lies outside the window
    edge = "k" * 254
    assert analyze(edge + "'s") == [edge, "s"]

    underscores = "_" * 300
    assert analyze(underscores) == []
    assert len(analyze(underscores + "k")) == 1


def find_window_end(text: str, start: int) -> int:
    """Return the end of the longest piece from start that has no more than 255 UTF-16 units."""
    end = start
    units = 0
    while end < len(text):
        units += 1
        if text[end] > "\uffff":
            units += 1
        if units > MAX_LENGTH:
            break
        end += 1
    return end


def cut_words_by_definition(text: str) -> list[str]:
    """Cut by Lucene's definition: from every place where no token was, the longest in 255 units."""
    words = []
    start = 0
    while start < len(text):
        end = find_window_end(text, start)
        match = analyzer._TOKEN.match(text, start, end)
        if match:
            words.append(match[0])
            start = match.end()
        else:
            start += 1
    return words


def test_cut_is_as_defined():
    rng = random.Random(1)
    for _ in range(60):
        text = ""
        for _ in range(8):
            piece = rng.choice(LONG_PIECES)
            text += piece * rng.choice(LONG_REPEATS)

        assert analyzer._cut_words(text) == cut_words_by_definition(text), ascii(text)


def test_time_is_linear():
    start = time.perf_counter()
    for text in LONG_TEXTS:
        analyze(text)
    seconds = time.perf_counter() - start

    assert seconds < 10  # quadratic: minutes
