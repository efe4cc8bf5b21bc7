"""A retriever of a user's own, `retriever.kind: shaky:overlap`, and what may go wrong in one: `fault` = (step, name in WAYS), set in a forked rank."""
import asyncio
import sys
import time

import numpy as np

from recr1 import heartbeat

fault: tuple[int, str] | None = None


def overlap(doc_ids, texts):
    words = [set(text.split()) for text in texts]

    def search(queries, k):
        scores = np.array([[len(set(query.split()) & w) for w in words] for query in queries], np.float32)
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(scores, rows, 1)
        if fault and heartbeat._own.state["step"] >= fault[0]:
            return WAYS[fault[1]][0](rows, scores, queries)
        return np.where(scores > 0, rows, -1), scores
    return search


def raising(error):
    def way(rows, scores, queries):
        raise error
    return way


def deep(*found):
    return deep(*found)


def changed(array, value):
    array[-1, 0] = value
    return array


WAYS = {     # name: (what the call does, what the run's one line says of it)
    "ValueError": (raising(ValueError("the server\nsays \x1b[31mno\x1b[0m")), "raised ValueError: the server says"),
    "ConnectionError": (raising(ConnectionResetError(104, "reset by peer")), "raised ConnectionResetError"),
    "KeyError": (raising(KeyError("hits")), "raised KeyError: 'hits'"),
    "MemoryError": (raising(MemoryError()), "raised MemoryError"),
    "StopIteration": (raising(StopIteration()), "raised StopIteration"),
    "no end of calls": (deep, "raised RecursionError"),
    "sys.exit": (lambda *found: sys.exit("bye"), "raised SystemExit: bye"),
    "cancelled": (raising(asyncio.CancelledError()), "raised CancelledError"),
    "None": (lambda *found: None, "must return two arrays"),
    "text": (lambda *found: "ok", "must return two arrays"),
    "three": (lambda rows, scores, queries: (rows, scores, queries), "must return two arrays"),
    "scores NaN": (lambda rows, scores, queries: (rows, changed(scores, np.nan)), "the score nan"),
    "scores infinite": (lambda rows, scores, queries: (rows, changed(scores, np.inf)), "the score inf"),
    "scores of 400 digits": (lambda rows, scores, queries: (rows, [[10 ** 400] * rows.shape[1]] * len(rows)), "raised|must return two arrays"),
    "rows as text": (lambda rows, scores, queries: (rows.astype(str), scores), "must be whole numbers"),
    "rows as floats": (lambda rows, scores, queries: (rows + 0.5, scores), "must be whole numbers"),
    "a query less": (lambda rows, scores, queries: (rows[1:], scores[1:]), r"returned rows \("),
    "one dimension": (lambda rows, scores, queries: (rows[0], scores[0]), r"returned rows \("),
    "ragged": (lambda rows, scores, queries: ([[0, 1], *([0] for _ in queries)], scores), "must return two arrays"),
    "a row beyond": (lambda rows, scores, queries: (changed(rows, 10 ** 6), scores), "row 1000000, must be"),
    "worst first": (lambda rows, scores, queries: (rows[:, ::-1], np.arange(rows.size, dtype=float).reshape(rows.shape)), "scores that rise"),
    "a row twice": (lambda rows, scores, queries: (rows * 0, scores), "a row twice"),
    "takes the queries away": (lambda rows, scores, queries: queries.clear() or (rows[:0], scores[:0]), r"returned rows \("),
    "sleeps": (lambda *found: time.sleep(86_400), "took longer than retriever.timeout"),
}
