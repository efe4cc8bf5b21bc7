"""A retriever and a reward of a user's own, `shaky:overlap` and `shaky:part`, and what may go wrong in them.

`fault`, set in a forked rank: (step from which on it happens, name in SEARCHES or PARTS).
"""
import asyncio
import sys
import time

import numpy as np

from recr1 import heartbeat

fault: tuple[int, str] | None = None


def due(ways: dict) -> bool:
    return bool(fault) and fault[1] in ways and heartbeat._own.state["step"] >= fault[0]


def part(answer, ranked, gains, row):
    return PARTS[fault[1]][0](answer) if due(PARTS) else len(answer) % 5 / 5


def overlap(doc_ids, texts):
    words = [set(text.split()) for text in texts]

    def search(queries, k):
        scores = np.array([[len(set(query.split()) & w) for w in words] for query in queries], np.float32)
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(scores, rows, 1)
        if due(SEARCHES):
            return SEARCHES[fault[1]][0](rows, scores, queries)
        return np.where(scores > 0, rows, -1), scores
    return search


def raising(error):
    def way(*found):
        raise error
    return way


def deep(*found):
    return deep(*found)


def changed(array, value):
    array[-1, 0] = value
    return array


SEARCHES = {     # name: (what the call does, what the run's one line says of it)
    "ValueError": (raising(ValueError("the server\nsays \x1b[31mno\x1b[0m")), "raised ValueError: the server says"),
    "ConnectionError": (raising(ConnectionResetError(104, "reset by peer")), "raised ConnectionResetError"),
    "no end of calls": (deep, "raised RecursionError"),
    "sys.exit": (lambda *found: sys.exit("bye"), "raised SystemExit: bye"),
    "cancelled": (raising(asyncio.CancelledError()), "raised CancelledError"),
    "None": (lambda *found: None, "must return two arrays"),
    "scores NaN": (lambda rows, scores, queries: (rows, changed(scores, np.nan)), "the score nan"),
    "scores of 400 digits": (lambda rows, scores, queries: (rows, [[10 ** 400] * rows.shape[1]] * len(rows)), "raised|must return two arrays"),
    "rows as text": (lambda rows, scores, queries: (rows.astype(str), scores), "must be whole numbers"),
    "a query less": (lambda rows, scores, queries: (rows[1:], scores[1:]), r"returned rows \("),
    "ragged": (lambda rows, scores, queries: ([[0, 1], *([0] for _ in queries)], scores), "must return two arrays"),
    "a row beyond": (lambda rows, scores, queries: (changed(rows, 10 ** 6), scores), "row 1000000, must be"),
    "a row twice": (lambda rows, scores, queries: (rows * 0, scores), "a row twice"),
    "takes the queries away": (lambda rows, scores, queries: queries.clear() or (rows[:0], scores[:0]), r"returned rows \("),
    "sleeps": (lambda *found: time.sleep(86_400), "took longer than retriever.timeout"),
}

PARTS = {
    "reward: ValueError": (raising(ValueError("the judge\nsays \x1b[2Jno")), "raised ValueError: the judge says"),
    "reward: KeyError": (raising(KeyError("hits")), "raised KeyError: 'hits'"),
    "reward: no end of calls": (deep, "raised RecursionError"),
    "reward: sys.exit": (lambda answer: sys.exit(0), "raised SystemExit: 0"),
    "reward: cancelled": (raising(asyncio.CancelledError()), "raised CancelledError"),
    "reward: None": (lambda answer: None, "raised TypeError"),
    "reward: text": (lambda answer: f"{len(answer)} points", "raised ValueError"),
    "reward: one per letter": (lambda answer: [1.0] * len(answer), "raised TypeError"),
    "reward: NaN": (lambda answer: np.float32("nan"), "returned nan"),
}
