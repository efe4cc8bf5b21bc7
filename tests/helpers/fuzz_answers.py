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


def wrap(answer: str, thought: str = "so") -> str:
    return f"{thought}</think>\n<answer>{answer}</answer>"


def completions(n: int, seed: int):
    """Yields n strings: scraps in random order, broken valid answers, JSON oddities, deep nesting;
    one in 50 near 1 MB.
    """
    rng = random.Random(seed)
    for i in range(n):
        if i % 50 == 0:
            yield huge(rng)
        else:
            yield rng.choice([soup, broken, broken, odd, nested])(rng)


def soup(rng):
    return "".join(rng.choices(SCRAPS, k=rng.randint(0, 40)))


def broken(rng):
    """A valid answer after 0 to 4 deletions, repeats, insertions or cuts."""
    text = "".join(rng.choices(SCRAPS[10:], k=rng.randint(0, 6)))
    text = wrap(
        json.dumps({"query": text}, ensure_ascii=rng.random() < 0.5),
        thought="why " * rng.randint(0, 50),
    )
    for _ in range(rng.randint(0, 4)):
        a, b = sorted(rng.choices(range(len(text) + 1), k=2))
        b = min(b, a + 12)
        text = rng.choice(
            [
                text[:a] + text[b:],
                text[:b] + text[a:],
                text[:a] + rng.choice(SCRAPS) + text[a:],
                text[:b] + text[b:].rstrip(">"),
            ]
        )
    return text


def odd(rng):
    return wrap(
        rng.choice(["", " ", "\n", "\u2003"])
        + rng.choice(VALUES)
        + rng.choice(["", " ", "}", ",", "\x00"])
    )


def nested(rng):
    depth = rng.choice([3, 30, 400, 600, 3_000, 15_000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}"), ('[{"query":', "}]"), ("[[],", "]")])
    return wrap(
        '{"query": "x", "y": '
        + opening * depth
        + "1"
        + closing * rng.choice([depth, depth - 1, 0])
        + "}"
    )


def huge(rng):
    """Up to 1 MB of one thing: where a lazy regular expression, a recursion or a backtracking one
    takes seconds.
    """
    piece = rng.choice(
        SCRAPS + ["<answer", '{"a":', '\\"', '"a":1,', "[]", '"",', "<", "</think", "1.", "0."]
    )
    many = piece * (rng.choice([30_000, MB // 2, MB]) // len(piece))
    return rng.choice(
        [
            many,
            wrap(many),
            wrap('{"query": "' + many + '"}'),
            wrap('{"query": "x", "y": ' + many),
            wrap('"' + many),
            wrap('{"query": "x"}', thought=many),
            wrap('{"query": "x"}') + many,
            "</think><answer>" + many,
            many + "</answer>",
        ]
    )
