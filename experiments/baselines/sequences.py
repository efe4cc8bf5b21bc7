"""Read a prepared sequential data set as the baselines need it.

Items by number, train sequences by user, the queries of validation and test. Prepared folders hold
windows: {"id", "text", "user", "history": [document ids, oldest first, at most 10]}, whose next
item is the judgement. A user's train windows are in order, so the sequences they were cut from are
put together again: a window joins the sequence when its history overlaps the end of it, else
another sequence of that user begins. Legend: D items, numbered by falling popularity in train
(equal ones: by id).
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from recr1.data import readers
from recr1.data.readers import DataError


@dataclass(frozen=True)
class Query:
    """Hold a user's items so far, oldest first, as numbers; `gains`: document id -> gain of what
    came next.
    """

    id: str
    user: str
    text: str
    history: list[int]
    gains: dict[str, float]


@dataclass
class Sequence:
    """Hold items of one user in order. trained[i]: item i is train data; else it belongs to the
    validation tenth.
    """

    items: list[int]
    trained: list[bool]


@dataclass
class Sequential:
    """Hold a data set: items by number, sequences by user, and the queries."""

    items: list[str]  # D document ids
    contents: list[str]  # (D,) what BM25 indexes
    counts: list[int]  # (D,) interactions in train
    sequences: dict[str, list[Sequence]]  # by user
    validation: list[Query]
    test: list[Query]


class Window(NamedTuple):
    """Hold one row of a prepared split: a query with the documents that answer it."""

    id: str
    user: str
    text: str
    history: list[str]
    gains: dict[str, float]  # of the relevant documents


@dataclass
class DocSequence:
    """Hold a Sequence whose items are document ids still."""

    docs: list[str]
    trained: list[bool]


def load_data_set(folder: str, setting: str) -> Sequential:
    """Reads train and the test of `setting` ("transductive", "inductive") from a prepared folder.
    Raises DataError.
    """
    place = Path(folder)
    ids, contents, _ = readers.read_corpus(_find_file(place, "corpus.jsonl"))
    known = set(ids)
    windows = _read_windows(place, "train", known)
    test = _read_windows(place, f"test_{setting}", known)
    by_user: dict[str, list[DocSequence]] = {}
    for window in windows:
        _append_window(by_user.setdefault(window.user, []), window)
    counts = _count_trained(by_user)
    validation = [window for window in windows if readers.is_validation(window.id)]
    if not validation or not counts:
        raise DataError(
            f"{place}: train has {len(windows)} windows, {len(validation)} of them in the "
            "validation tenth; both parts are needed, prepare a larger set"
        )

    def get_rank(doc: str) -> tuple[int, str]:
        return -counts[doc], doc

    items = sorted(ids, key=get_rank)
    numbers = {doc: number for number, doc in enumerate(items)}
    contents_by_id = dict(zip(ids, contents))
    return Sequential(
        items=items,
        contents=[contents_by_id[doc] for doc in items],
        counts=[counts[doc] for doc in items],
        sequences=_number_sequences(by_user, numbers),
        validation=_number_queries(validation, numbers),
        test=_number_queries(test, numbers),
    )


def _count_trained(by_user: dict[str, list[DocSequence]]) -> Counter:
    """Count the interactions of each document that are train data."""
    counts = Counter()
    for sequences in by_user.values():
        for sequence in sequences:
            for doc, is_train in zip(sequence.docs, sequence.trained):
                if is_train:
                    counts[doc] += 1
    return counts


def _number_sequences(
    by_user: dict[str, list[DocSequence]], numbers: dict[str, int]
) -> dict[str, list[Sequence]]:
    """Return the sequences with item numbers for document ids."""
    numbered: dict[str, list[Sequence]] = {}
    for user, sequences in by_user.items():
        numbered[user] = []
        for sequence in sequences:
            items = [numbers[doc] for doc in sequence.docs]
            numbered[user].append(Sequence(items, sequence.trained))
    return numbered


def _number_queries(windows: list[Window], numbers: dict[str, int]) -> list[Query]:
    """Return the windows as queries, with item numbers for the histories' document ids."""
    queries = []
    for window in windows:
        history = [numbers[doc] for doc in window.history]
        queries.append(Query(window.id, window.user, window.text, history, window.gains))
    return queries


def extend_history(query: Query, sequences: dict[str, list[Sequence]], length: int) -> list[int]:
    """Return the user's last `length` items.

    They are the query's own history, and what came before it where train knows the user.
    """
    for sequence in sequences.get(query.user, ()):
        joined = _join_items(sequence.items, query.history)
        if joined:
            return joined[-length:]
    return query.history[-length:]


def _append_window(sequences: list[DocSequence], window: Window) -> None:
    """Add a window to the user's last sequence, or as a new one.

    What an earlier window has given keeps its mark.
    """
    is_train = not readers.is_validation(window.id)
    targets = list(window.gains)
    joined = None
    if sequences:
        joined = _join_items(sequences[-1].docs, window.history)
    if not joined:
        docs = window.history + targets
        sequences.append(DocSequence(docs, [is_train] * len(docs)))
        return
    last = sequences[-1]
    last.docs = joined + targets
    num_new = len(last.docs) - len(last.trained)
    last.trained = last.trained + [is_train] * num_new


def _join_items(items: list, history: list) -> list | None:
    """Return items with what `history` adds to their end; None where the two do not overlap."""
    for n in range(min(len(items), len(history)), 0, -1):
        if items[-n:] == history[:n]:
            return items + history[n:]
    return None


def _find_file(place: Path, name: str) -> str:
    """Return the file, plain or gzip; the plain name where neither is there, so that the reader
    says so.
    """
    plain = place / name
    packed = place / f"{name}.gz"
    if packed.is_file() and not plain.is_file():
        return str(packed)
    return str(plain)


def _read_windows(place: Path, split: str, known: set[str]) -> list[Window]:
    """Return every query of a split. Raises DataError with file and line."""
    path = _find_file(place, f"{split}.queries.jsonl")
    judged = _find_file(place, f"{split}.qrels.tsv")
    # after this every line is an object with an id and a text
    texts = readers.read_queries(path)[0]
    qrels = readers.read_qrels(judged)[0]
    windows = []
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        for line, (id, text) in zip(file, texts.items()):
            row = json.loads(line.decode("utf-8-sig"))
            where = f"{path}:{len(windows) + 1}"
            user, history = _parse_user_and_history(row, where)
            gains = {doc: gain for doc, gain in qrels.get(id, {}).items() if gain > 0}
            if not gains:
                raise DataError(
                    f"{where}: {id!r} has no relevant document in {judged}; prepare the set again"
                )
            for doc in (*history, *gains):
                if doc not in known:
                    raise DataError(
                        f"{where}: {id!r} names document {doc!r}, which the corpus has not; "
                        "prepare the set again"
                    )
            windows.append(Window(id, user, text, history, gains))
    return windows


def _parse_user_and_history(row: dict, where: str) -> tuple[str, list[str]]:
    """Return a query's user and its history. Raises DataError."""
    user = row.get("user")
    if not isinstance(user, str):
        fault = "missing" if user is None else "no string"
        raise DataError(f"{where}: 'user' is {fault}; prepare the set again")
    history = row.get("history")
    is_list = isinstance(history, list) and all(isinstance(doc, str) for doc in history)
    if not is_list or not history:
        fault = "no list of document ids with at least one"
        if history is None:
            fault = "missing"
        raise DataError(f"{where}: 'history' is {fault}; prepare the set again")
    return user, history
