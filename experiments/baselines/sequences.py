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


def load_data_set(folder: str, setting: str) -> Sequential:
    """Reads train and the test of `setting` ("transductive", "inductive") from a prepared folder.
    Raises DataError.
    """
    place = Path(folder)
    ids, contents, _ = readers.read_corpus(_find_file(place, "corpus.jsonl"))
    known = set(ids)
    windows = _iterate_windows(place, "train", known)
    test = _iterate_windows(place, f"test_{setting}", known)
    sequences: dict[str, list[tuple[list[str], list[bool]]]] = {}
    for id, user, _, history, gains in windows:
        _append_window(
            sequences.setdefault(user, []), history, list(gains), not readers.is_validation(id)
        )
    counts = Counter(
        item
        for parts in sequences.values()
        for items, trained in parts
        for item, t in zip(items, trained)
        if t
    )
    order = sorted(range(len(ids)), key=lambda i: (-counts[ids[i]], ids[i]))
    number = {ids[i]: n for n, i in enumerate(order)}
    queries = [
        [
            Query(id, user, text, [number[doc] for doc in history], gains)
            for id, user, text, history, gains in rows
        ]
        for rows in ([w for w in windows if readers.is_validation(w[0])], test)
    ]
    if not queries[0] or not counts:
        raise DataError(
            f"{place}: train has {len(windows)} windows, {len(queries[0])} of them in the "
            "validation tenth; both parts are needed, prepare a larger set"
        )
    return Sequential(
        [ids[i] for i in order],
        [contents[i] for i in order],
        [counts[ids[i]] for i in order],
        {
            user: [Sequence([number[doc] for doc in items], trained) for items, trained in parts]
            for user, parts in sequences.items()
        },
        *queries,
    )


def extend_history(query: Query, sequences: dict[str, list[Sequence]], length: int) -> list[int]:
    """Return the user's last `length` items.

    They are the query's own history, and what came before it where train knows the user.
    """
    for sequence in sequences.get(query.user, ()):
        if joined := _join_items(sequence.items, query.history):
            return joined[-length:]
    return query.history[-length:]


def _append_window(
    parts: list[tuple[list[str], list[bool]]], history: list[str], targets: list[str], trained: bool
) -> None:
    """Add a window to the user's last sequence, or as a new one.

    What an earlier window has given keeps its mark.
    """
    if parts and (items := _join_items(parts[-1][0], history)):
        marks = parts[-1][1] + [trained] * (len(items) - len(parts[-1][0]))
        parts[-1] = items + targets, marks + [trained] * len(targets)
    else:
        parts.append((history + targets, [trained] * (len(history) + len(targets))))


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
    return str(
        next(
            (path for path in (place / name, place / f"{name}.gz") if path.is_file()), place / name
        )
    )


def _iterate_windows(
    place: Path, split: str, known: set[str]
) -> list[tuple[str, str, str, list[str], dict[str, float]]]:
    """Yield (id, user, text, history, relevant documents' gains) of every query.

    Raises DataError with file and line.
    """
    path = _find_file(place, f"{split}.queries.jsonl")
    judged = _find_file(place, f"{split}.qrels.tsv")
    # after this every line is an object with an id and a text
    texts = readers.read_queries(path)[0]
    qrels = readers.read_qrels(judged)[0]
    rows = []
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        for line, (id, text) in zip(file, texts.items()):
            row = json.loads(line.decode("utf-8-sig"))
            where = f"{path}:{len(rows) + 1}"
            user = row.get("user")
            history = row.get("history")
            if not isinstance(user, str):
                raise DataError(
                    f"{where}: 'user' is {'missing' if user is None else 'no string'}; "
                    "prepare the set again"
                )
            is_list = isinstance(history, list) and all(isinstance(doc, str) for doc in history)
            if not is_list or not history:
                fault = "no list of document ids with at least one"
                if history is None:
                    fault = "missing"
                raise DataError(f"{where}: 'history' is {fault}; prepare the set again")
            gains = {doc: gain for doc, gain in qrels.get(id, {}).items() if gain > 0}
            if not gains:
                raise DataError(
                    f"{where}: {id!r} has no relevant document in {judged}; prepare the set again"
                )
            if strange := [doc for doc in (*history, *gains) if doc not in known]:
                raise DataError(
                    f"{where}: {id!r} names document {strange[0]!r}, which the corpus has not; "
                    "prepare the set again"
                )
            rows.append((id, user, text, history, gains))
    return rows
