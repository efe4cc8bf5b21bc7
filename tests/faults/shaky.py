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


def is_due(ways: dict) -> bool:
    if not fault:
        return False
    step, name = fault
    return name in ways and heartbeat._heartbeat.state["step"] >= step


def fail_by(ways: dict, *arguments):
    """Do what the fault does in place of a call with these arguments."""
    act, _ = ways[fault[1]]
    return act(*arguments)


# --- the retriever, the reward and the task ---


def part(answer, ranked, gains, row):
    if is_due(PARTS):
        return fail_by(PARTS, answer)
    return len(answer) % 5 / 5


class Task(ProductSearch):
    """Query -> query, as the built-in one."""

    def parse(self, completion, row):
        if is_due(TASKS) and "rank" not in fault[1]:
            return fail_by(TASKS, completion)
        return super().parse(completion, row)

    def rank(self, queries, rows, k, search):
        if is_due(TASKS) and "rank" in fault[1]:
            return fail_by(TASKS, queries)
        return super().rank(queries, rows, k, search)


def overlap(doc_ids, texts):
    doc_words = [set(text.split()) for text in texts]

    def search(queries, k):
        counts = [count_shared(query, doc_words) for query in queries]
        scores = np.array(counts, np.float32)
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(scores, rows, 1)
        if is_due(SEARCHES):
            return fail_by(SEARCHES, rows, scores, queries)
        return np.where(scores > 0, rows, -1), scores

    return search


def count_shared(query: str, doc_words: list[set[str]]) -> list[int]:
    """Count the words that a query shares with each document."""
    query_words = set(query.split())
    return [len(query_words & words) for words in doc_words]


# --- what may go wrong in several of them ---


def raise_error(error):
    def fail(*arguments):
        raise error

    return fail


def exit_saying(status):
    def leave(*arguments):
        sys.exit(status)

    return leave


def return_none(*arguments):
    return None


def call_itself(*arguments):
    return call_itself(*arguments)


# --- in a search ---


def put_value(array, value):
    array[-1, 0] = value
    return array


def score_nan(rows, scores, queries):
    return rows, put_value(scores, np.nan)


def score_hugely(rows, scores, queries):
    row_scores = [10**400] * rows.shape[1]
    return rows, [row_scores] * len(rows)


def skip_query(rows, scores, queries):
    return rows[1:], scores[1:]


def find_beyond(rows, scores, queries):
    return put_value(rows, 10**6), scores


def find_twice(rows, scores, queries):
    return rows * 0, scores


def clear_queries(rows, scores, queries):
    queries.clear()
    return rows[:0], scores[:0]


def sleep_long(*arguments):
    time.sleep(86_400)


SEARCHES = {  # name: (what the call does, what the run's one line says of it)
    "ValueError": (
        raise_error(ValueError("the server\nsays \x1b[31mno\x1b[0m")),
        "raised ValueError: the server says",
    ),
    "ConnectionError": (
        raise_error(ConnectionResetError(104, "reset by peer")),
        "raised ConnectionResetError",
    ),
    "sys.exit": (exit_saying("bye"), "raised SystemExit: bye"),
    "None": (return_none, "must return two arrays"),
    "scores NaN": (score_nan, "the score nan"),
    "scores of 400 digits": (score_hugely, "raised|must return two arrays"),
    "a query less": (skip_query, r"returned rows \("),
    "a row beyond": (find_beyond, "row 1000000, must be"),
    "a row twice": (find_twice, "a row twice"),
    "takes the queries away": (clear_queries, r"returned rows \("),
    "sleeps": (sleep_long, "took longer than retriever.timeout"),
}

# --- in a reward ---


def return_text(answer):
    return f"{len(answer)} points"


def return_letters(answer):
    return [1.0] * len(answer)


def return_nan(answer):
    return np.float32("nan")


PARTS = {
    "reward: ValueError": (
        raise_error(ValueError("the judge\nsays \x1b[2Jno")),
        "raised ValueError: the judge says",
    ),
    "reward: KeyError": (raise_error(KeyError("hits")), "raised KeyError: 'hits'"),
    "reward: no end of calls": (call_itself, "raised RecursionError"),
    "reward: cancelled": (raise_error(asyncio.CancelledError()), "raised CancelledError"),
    "reward: None": (return_none, "raised TypeError"),
    "reward: text": (return_text, "raised ValueError"),
    "reward: one per letter": (return_letters, "raised TypeError"),
    "reward: NaN": (return_nan, "returned nan"),
}

# --- in a task ---


def parse_into_set(completion):
    return {completion}, None


def rank_one_less(queries):
    return [[] for _ in queries[1:]]


TASKS = {
    "task: parse, LookupError": (
        raise_error(LookupError("no such\x1b[2J list")),
        "parse raised LookupError: no such",
    ),
    "task: parse, None": (return_none, "parse returned None, must be"),
    "task: parse, no JSON": (
        parse_into_set,
        "parse returned .*, which cannot be written as JSON",
    ),
    "task: rank, sys.exit": (exit_saying(0), "rank raised SystemExit: 0"),
    "task: rank, one less": (
        rank_one_less,
        "rank returned .*, must be a list of document ids for each",
    ),
}
