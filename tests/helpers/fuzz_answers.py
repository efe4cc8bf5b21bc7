"""Hostile completions for the answer parser: one generator, for the tests and for
experiments/benchmarks/parser_fuzz.py.
"""

import json
import random

MB = 1_000_000
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
SCRAPS = TAGS + [
    '{"query": "',
    '"}',
    '{"query":',
    '"query"',
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    ":",
    ",",
    " ",
    "\n",
    "\x00",
    "\ud800",
    "\\ud800",
    "\\u0000",
    "\ufeff",
    "null",
    "true",
    "NaN",
    "-Infinity",
    "1e999",
    "0" * 5_000,
    "9" * 5_000,
    "Assistant:",
    "<|im_end|>",
    "```json",
    "</script>",
    "<ans",
    "wer>",
    "star wars",
    "é",
    "星",
    "🎬",
    "\x1b[31m",
]
VALUES = [
    "null",
    "7",
    "NaN",
    "-1e999",
    "9" * 5_000,
    '"x"',
    '["query"]',
    "[]",
    "{}",
    '{"query": null}',
    '{"query": ["a"]}',
    '{"query": ""}',
    '{"query": " \\n"}',
    '{"query": "\\ud800"}',
    '{"query": "a", "query": "b"}',
    '{"query": "a", "n": NaN}',
    '{"Query": "a"}',
    '{"query": "a", "x": {"b": 1, "b": 2}}',
    '{"query": "\ud83d"}',
    '{"query": "a"} {"query": "b"}',
    "{'query': 'a'}",
    "",
]
# without the tags and the first pieces of an answer
SCRAPS_OF_A_QUERY = SCRAPS[10:]
MORE_SCRAPS = ["<answer", '{"a":', '\\"', '"a":1,', "[]", '"",', "<", "</think", "1.", "0."]
# what opens a level of nesting, and what closes it
BRACKETS = [
    ("[", "]"),
    ('{"a":', "}"),
    ('[{"query":', "}]"),
    ("[[],", "]"),
]


def wrap(answer: str, thought: str = "so") -> str:
    return f"{thought}</think>\n<answer>{answer}</answer>"


def completions(n: int, seed: int):
    """Yield n strings: scraps in random order, broken valid answers, JSON oddities, deep nesting;
    one in 50 near 1 MB.
    """
    rng = random.Random(seed)
    for i in range(n):
        if i % 50 == 0:
            yield huge(rng)
        else:
            write = rng.choice([soup, broken, broken, odd, nested])
            yield write(rng)


def soup(rng):
    """Join up to 40 scraps."""
    count = rng.randint(0, 40)
    scraps = rng.choices(SCRAPS, k=count)
    return "".join(scraps)


def broken(rng):
    """Write a valid answer, and damage it by 0 to 4 deletions, repeats, insertions or cuts."""
    count = rng.randint(0, 6)
    scraps = rng.choices(SCRAPS_OF_A_QUERY, k=count)
    query = "".join(scraps)
    is_ascii = rng.random() < 0.5
    answer = json.dumps({"query": query}, ensure_ascii=is_ascii)
    thought = "why " * rng.randint(0, 50)
    text = wrap(answer, thought=thought)

    for _ in range(rng.randint(0, 4)):
        positions = range(len(text) + 1)
        start, end = sorted(rng.choices(positions, k=2))
        end = min(end, start + 12)
        scrap = rng.choice(SCRAPS)
        deletion = text[:start] + text[end:]
        repeat = text[:end] + text[start:]
        insertion = text[:start] + scrap + text[start:]
        cut = text[:end] + text[end:].rstrip(">")
        text = rng.choice([deletion, repeat, insertion, cut])
    return text


def odd(rng):
    """Write an answer of JSON that is valid or nearly so, and seldom the contract's."""
    before = rng.choice(["", " ", "\n", "\u2003"])
    value = rng.choice(VALUES)
    after = rng.choice(["", " ", "}", ",", "\x00"])
    return wrap(before + value + after)


def nested(rng):
    """Write an answer whose second value is nested deeply, and is closed wholly, nearly or not."""
    depth = rng.choice([3, 30, 400, 600, 3_000, 15_000])
    opening, closing = rng.choice(BRACKETS)
    closed = rng.choice([depth, depth - 1, 0])
    value = opening * depth + "1" + closing * closed
    return wrap('{"query": "x", "y": ' + value + "}")


def huge(rng):
    """Write up to 1 MB of one thing: where a lazy regular expression, a recursion or a backtracking
    one takes seconds.
    """
    scrap = rng.choice(SCRAPS + MORE_SCRAPS)
    size = rng.choice([30_000, MB // 2, MB])
    text = scrap * (size // len(scrap))
    answer = wrap('{"query": "x"}')
    texts = [
        text,
        wrap(text),
        wrap('{"query": "' + text + '"}'),
        wrap('{"query": "x", "y": ' + text),
        wrap('"' + text),
        wrap('{"query": "x"}', thought=text),
        answer + text,
        "</think><answer>" + text,
        text + "</answer>",
    ]
    return rng.choice(texts)
