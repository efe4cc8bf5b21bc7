"""A retriever, a reward and a task of a user's own, `shaky:overlap`, `shaky:part` and `shaky:Task`,
and what may go wrong in them.

`fault`, set in a forked rank: (step from which on it happens, name in SEARCHES, PARTS or TASKS).
"""

import asyncio
import sys
import time

import numpy as np

from recr1.distributed import heartbeat
from recr1.tasks.product_search import ProductSearch

fault: tuple[int, str] | None = None


def due(ways: dict) -> bool:
    return bool(fault) and fault[1] in ways and heartbeat._heartbeat.state["step"] >= fault[0]


def part(answer, ranked, gains, row):
    return PARTS[fault[1]][0](answer) if due(PARTS) else len(answer) % 5 / 5


class Task(ProductSearch):
    """Query -> query, as the built-in one."""

    def parse(self, completion, row):
        return (
            TASKS[fault[1]][0](completion)
            if due(TASKS) and "rank" not in fault[1]
            else super().parse(completion, row)
        )

    def rank(self, queries, rows, k, search):
        return (
            TASKS[fault[1]][0](queries)
            if due(TASKS) and "rank" in fault[1]
            else super().rank(queries, rows, k, search)
        )


def overlap(doc_ids, texts):
    words = [set(text.split()) for text in texts]

    def search(queries, k):
        scores = np.array(
            [[len(set(query.split()) & w) for w in words] for query in queries], np.float32
        )
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


SEARCHES = {  # name: (what the call does, what the run's one line says of it)
    "ValueError": (
        raising(ValueError("the server\nsays \x1b[31mno\x1b[0m")),
        "raised ValueError: the server says",
    ),
    "ConnectionError": (
        raising(ConnectionResetError(104, "reset by peer")),
        "raised ConnectionResetError",
    ),
    "sys.exit": (lambda *found: sys.exit("bye"), "raised SystemExit: bye"),
    "None": (lambda *found: None, "must return two arrays"),
    "scores NaN": (lambda rows, scores, queries: (rows, changed(scores, np.nan)), "the score nan"),
    "scores of 400 digits": (
        lambda rows, scores, queries: (rows, [[10**400] * rows.shape[1]] * len(rows)),
        "raised|must return two arrays",
    ),
    "a query less": (lambda rows, scores, queries: (rows[1:], scores[1:]), r"returned rows \("),
    "a row beyond": (
        lambda rows, scores, queries: (changed(rows, 10**6), scores),
        "row 1000000, must be",
    ),
    "a row twice": (lambda rows, scores, queries: (rows * 0, scores), "a row twice"),
    "takes the queries away": (
        lambda rows, scores, queries: queries.clear() or (rows[:0], scores[:0]),
        r"returned rows \(",
    ),
    "sleeps": (lambda *found: time.sleep(86_400), "took longer than retriever.timeout"),
}

PARTS = {
    "reward: ValueError": (
        raising(ValueError("the judge\nsays \x1b[2Jno")),
        "raised ValueError: the judge says",
    ),
    "reward: KeyError": (raising(KeyError("hits")), "raised KeyError: 'hits'"),
    "reward: no end of calls": (deep, "raised RecursionError"),
    "reward: cancelled": (raising(asyncio.CancelledError()), "raised CancelledError"),
    "reward: None": (lambda answer: None, "raised TypeError"),
    "reward: text": (lambda answer: f"{len(answer)} points", "raised ValueError"),
    "reward: one per letter": (lambda answer: [1.0] * len(answer), "raised TypeError"),
    "reward: NaN": (lambda answer: np.float32("nan"), "returned nan"),
}

TASKS = {
    "task: parse, LookupError": (
        raising(LookupError("no such\x1b[2J list")),
        "parse raised LookupError: no such",
    ),
    "task: parse, None": (lambda completion: None, "parse returned None, must be"),
    "task: parse, no JSON": (
        lambda completion: ({completion}, None),
        "parse returned .*, which cannot be written as JSON",
    ),
    "task: rank, sys.exit": (lambda queries: sys.exit(0), "rank raised SystemExit: 0"),
    "task: rank, one less": (
        lambda queries: [[] for _ in queries[1:]],
        "rank returned .*, must be a list of document ids for each",
    ),
}
