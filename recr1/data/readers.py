"""Files -> corpus, queries and judgements; which query is validation.

Formats, UTF-8, plain or gzip (a name that ends in .gz):
    corpus   JSONL {"id", "title", "text"}: either of title and text may be absent; for some tasks
    and rewards "category" (string),
             "genres" (strings), "popularity" (number >= 0); other keys are ignored
    queries  JSONL {"id", "text"}; for some tasks "history" (document ids, oldest first, or pairs of
    id and date), "candidates" (distinct
             document ids), "profile" (string); other keys are ignored, unless a task of yours needs
             them
    qrels    tab-separated query id, document id, gain (finite, >= 0); no header

`on_bad_line="stop"` raises DataError at the first bad line: `path:line: what is wrong; what to do`.
"drop" leaves bad lines out. Every reader returns, last, `dropped`: one such message for each line
that was left out. An empty line is a bad line; a byte order mark is not. A missing, empty or torn
file, or one without a single good line, always raises DataError.
"""

import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import nullcontext
from typing import Any


class DataError(ValueError):
    """A data file cannot be used; the message names the file and, where there is one, the line."""


class _RepeatedLine(DataError):
    """A line that says again what an earlier one said, or nothing: left out and listed, but never a
    reason to stop.
    """


class _HeldOutLeak(DataError):
    """A line that would teach what is held out: always a reason to stop."""


def read_corpus(
    path: str | os.PathLike, on_bad_line: str = "stop"
) -> tuple[list[str], list[str], list[str]]:
    """(ids, contents, dropped), in file order; contents are title + " " + text, or the one that is
    not empty.
    """
    dropped: list[str] = []
    docs = dict(iterate_documents(path, on_bad_line, dropped))
    return list(docs), list(docs.values()), dropped


def check_readable(path: str | os.PathLike) -> None:
    """Raises DataError for a file that cannot be opened."""
    try:
        open(path, "rb").close()
    except OSError as e:
        why = (
            "no such file"
            if isinstance(e, FileNotFoundError)
            else f"cannot be read ({e.strerror or e})"
        )
        raise DataError(
            f"{os.fspath(path)}: {why}; check the path, or prepare the data set first"
        ) from None


def iterate_documents(
    path: str | os.PathLike,
    on_bad_line: str,
    dropped: list[str],
    place: Callable[[int], None] | None = None,
) -> Iterator[tuple[str, str]]:
    """read_corpus one document after the other: (id, contents). `dropped` grows meanwhile;
    place(bytes of the file read so far) is called at times.
    """
    seen: set[str] = set()

    def parse(line):
        row = _parse_row(line)
        key = _get_new_id(row, seen)
        parts = [_get_string(row, name) for name in ("title", "text") if name in row]
        contents = " ".join(part for part in parts if part)
        if not contents.strip():
            raise DataError(
                "neither 'title' nor 'text' says anything; give one of them or delete the line"
            )
        seen.add(key)
        return key, contents

    return _parse_lines(path, on_bad_line, parse, dropped, place)


def read_queries(
    path: str | os.PathLike, on_bad_line: str = "stop"
) -> tuple[dict[str, str], list[str]]:
    """({query id: text}, dropped), in file order."""
    rows, dropped = read_rows(path, on_bad_line)
    return {id: row["text"] for id, row in rows.items()}, dropped


def read_rows(
    path: str | os.PathLike, on_bad_line: str = "stop", needs: Iterable[str] = ()
) -> tuple[dict[str, dict], list[str]]:
    """({query id: {"text": ..., and each key of `needs`}}, dropped), in file order. `needs` may
    name keys of a user's own: taken as they are.
    """
    rows: dict[str, dict] = {}

    def parse(line):
        row = _parse_row(line)
        key = _get_new_id(row, rows)
        text = _get_string(row, "text")
        if not text.strip():
            raise DataError("'text' is empty; write the query or delete the line")
        rows[key] = dict(text=text) | {name: _get_field(row, name) for name in needs}

    dropped = _read_lines(path, on_bad_line, parse)
    return rows, dropped


def read_completions(
    path: str | os.PathLike, on_bad_line: str = "stop"
) -> tuple[list[tuple[str, str]], list[str]]:
    """([(query id, completion)], dropped) of JSONL {"id", "text"}: an id may come many times, a
    text be empty, other keys are ignored.
    """
    found: list[tuple[str, str]] = []

    def parse(line):
        row = _parse_row(line)
        found.append((_check_id(_get_string(row, "id")), _get_string(row, "text")))

    dropped = _read_lines(path, on_bad_line, parse)
    return found, dropped


def iterate_attributes(
    path: str | os.PathLike, on_bad_line: str, dropped: list[str]
) -> Iterator[tuple[str, dict]]:
    """The corpus again, one document after the other: (id, row), its known keys checked as far as
    they are there. Ids may repeat.
    """

    def parse(line):
        row = _parse_row(line)
        for name in row.keys() & _FIELD_CHECKS.keys():
            _get_field(row, name)
        for name in row.keys() & {"title", "text", "category"}:
            _get_string(row, name)
        return _check_id(_get_string(row, "id")), row

    return _parse_lines(path, on_bad_line, parse, dropped)


def read_qrels(
    path: str | os.PathLike, on_bad_line: str = "stop"
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """({query id: {document id: gain}}, dropped), in file order.

    A judgement given twice would distort the ideal DCG. Twice with the same gain: the repeat is
    left out and listed in `dropped`, also under "stop". With another gain: a bad line; under "drop"
    the first one stands.
    """
    qrels: dict[str, dict[str, float]] = {}

    def parse(line):
        columns = line.split("\t")
        if len(columns) != 3:
            raise DataError(
                f"{len(columns)} tab-separated columns; want 3: query id, document id, gain"
            )
        query, doc = (_check_id(column) for column in columns[:2])
        try:
            gain = float(columns[2])
        except ValueError:
            raise DataError(
                f"gain {columns[2][:40]!r} is not a number; a header line must be deleted"
            ) from None
        if not (math.isfinite(gain) and gain >= 0):
            raise DataError(
                f"gain {gain} is not a finite number >= 0; correct it or delete the line"
            )
        judged = qrels.setdefault(query, {})
        if doc not in judged:
            judged[doc] = gain
        elif judged[doc] == gain:
            raise _RepeatedLine(
                f"{query!r}, {doc!r} was judged the same before; delete one of the two lines"
            )
        else:
            raise DataError(
                f"{query!r}, {doc!r} was judged {judged[doc]} before, now {gain}; keep one of the two lines"
            )

    dropped = _read_lines(path, on_bad_line, parse)
    return qrels, dropped


def read_teacher(
    path: str | os.PathLike,
    known: Container[str],
    held_out: Container[str],
    encode: Callable[[str, Any], list[int]],
    on_bad_line: str = "stop",
) -> tuple[list[tuple[str, str, list[int]]], list[str]]:
    """([(query id, completion, its token ids)], dropped), in file order. An id may come with
    several texts. `encode(text, the line's "ids")` may refuse a text as parse functions do. A line
    whose "error" is not null, as a run writes it, has no text to learn: left out and listed.

    An id of `held_out` raises DataError also under "drop": learnt answers to validation or test
    queries are a leak.
    """
    rows: list[tuple[str, str, list[int]]] = []
    seen: set[tuple[str, str]] = set()

    def parse(line):
        row = _parse_row(line)
        key = _check_id(_get_string(row, "id"))
        text = _get_string(row, "text")
        if key in held_out:
            raise _HeldOutLeak(
                f"{key!r} is a validation or test query: learning its answer would be a leak; delete all such lines"
            )
        if key not in known:
            raise DataError(
                f"{key!r} is no train query of this run; correct the id or delete the line"
            )
        if row.get("error") is not None:
            raise _RepeatedLine(f"its 'error' is {str(row['error'])[:40]!r}: nothing to learn")
        if (key, text) in seen:
            raise _RepeatedLine(f"{key!r} had the same text before; delete one of the two lines")
        seen.add((key, text))
        rows.append((key, text, encode(text, row.get("ids"))))

    dropped = _read_lines(path, on_bad_line, parse)
    return rows, dropped


def is_validation(query_id: str) -> bool:
    """Whether a query of the train split belongs to validation: sha256 of its id, as an integer, is
    0 modulo 10.
    """
    return _hash_to_tenth(query_id) == 0


def is_test(query_id: str) -> bool:
    """Whether it belongs to test where the data come without a test split: the same number is 1
    modulo 10.
    """
    return _hash_to_tenth(query_id) == 1


def _hash_to_tenth(query_id):
    return int(hashlib.sha256(query_id.encode()).hexdigest(), 16) % 10


def _read_lines(
    path: str | os.PathLike, on_bad_line: str, parse: Callable[[str], None]
) -> list[str]:
    """Calls parse(line) for every line, which stores it or raises DataError without a place;
    returns `dropped`.
    """
    dropped: list[str] = []
    for _ in _parse_lines(path, on_bad_line, parse, dropped):
        pass
    return dropped


def _parse_lines(path, on_bad_line, parse, dropped, place=None):
    """Yields parse(line) of every good line, with a message in `dropped` for each other one."""
    if on_bad_line not in ("stop", "drop"):
        raise ValueError(f"on_bad_line is {on_bad_line!r}; want 'stop' or 'drop'")
    name = os.fspath(path)
    number = 0
    try:
        # Binary: only \n ends a line, so the number is the one an editor shows; text mode would
        # also split at \r.
        with (
            open(name, "rb") as raw_file,
            gzip.open(raw_file) if name.endswith(".gz") else nullcontext(raw_file) as file,
        ):
            for number, raw in enumerate(file, 1):
                if number == 1 and raw.startswith(b"\x1f\x8b"):
                    raise DataError(f"{name}: compressed by gzip; give it a name that ends in .gz")
                if place and number % 1000 == 0:
                    place(raw_file.tell())
                try:
                    parsed = parse(
                        _decode_line(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)
                    )
                except DataError as error:
                    message = f"{name}:{number}: {error}"
                    if (
                        isinstance(error, _HeldOutLeak)
                        or on_bad_line == "stop"
                        and not isinstance(error, _RepeatedLine)
                    ):
                        raise DataError(message) from None
                    dropped.append(message)
                    continue
                yield parsed
    except FileNotFoundError:
        raise DataError(
            f"{name}: no such file; check the path, or prepare the data set first"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{name}: torn, or not gzip ({error}); download or write it again"
        ) from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from None
    if number == 0:
        raise DataError(f"{name}: the file is empty; download or write it again")
    if number == len(dropped):
        raise DataError(f"{name}: none of its {number} lines is good; the first: {dropped[0]}")


def _decode_line(raw):
    try:
        line = raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start + 1}; convert the file to UTF-8") from None
    if not line.strip():
        raise DataError("empty line; delete it")
    return line.rstrip("\r\n")


def _parse_row(line):
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON ({error.msg} at character {error.pos + 1}); want one whole object on the line"
        ) from None
    except (ValueError, RecursionError):  # Python's limits on the digits of an int and on nesting
        raise DataError(
            "JSON with an integer too long or brackets too deep to read; delete the line"
        ) from None
    if not isinstance(row, dict):
        raise DataError(
            f'JSON, but a {type(row).__name__} and not an object; want {{"id": ..., "text": ...}}'
        )
    return row


def _get_string(row, key):
    if key not in row:
        raise DataError(f"no key {key!r}; add it or delete the line")
    if not isinstance(row[key], str):
        raise DataError(
            f"{key!r} is a {type(row[key]).__name__}, not a string; put it in quotes or delete the line"
        )
    try:
        row[key].encode()
    except (
        UnicodeEncodeError
    ):  # JSON may spell half of a UTF-16 pair, "\ud800"; it would break hashing and writing later
        raise DataError(
            f"{key!r} holds a lone surrogate, which is no character; remove it"
        ) from None
    return row[key]


def _check_id(text):
    if not text or text != text.strip():
        raise DataError(
            f"id {text[:40]!r} is empty or has white space around it; correct it or delete the line"
        )
    return text


def _get_new_id(row, seen):
    key = _check_id(_get_string(row, "id"))
    if key in seen:
        raise DataError(f"id {key[:40]!r} came before; ids are unique, delete one of the lines")
    return key


def _check_ids(value):
    return isinstance(value, list) and all(isinstance(id, str) and id for id in value)


def _check_history(value):
    return isinstance(value, list) and all(
        _check_ids([item]) or _check_ids(item) and len(item) == 2 for item in value
    )


_FIELD_CHECKS = {  # key of a row -> (whether a value will do, what is wanted)
    "history": (_check_history, "a list of document ids, or of pairs of id and date"),
    "candidates": (
        lambda v: _check_ids(v) and 0 < len(v) == len(set(v)),
        "a list of distinct document ids, at least one",
    ),
    "genres": (
        lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
        "a list of strings",
    ),
    "popularity": (
        lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v < math.inf,
        "a finite number >= 0",
    ),
}


def _get_field(row, key):
    """row[key], checked. Raises DataError."""
    if key in ("profile", "category"):
        return _get_string(row, key)
    if key not in row:
        raise DataError(f"no key {key!r}, which this task reads; add it or delete the line")
    good, wanted = _FIELD_CHECKS.get(key, (lambda value: True, ""))
    if not good(row[key]):
        raise DataError(f"{key!r} is {str(row[key])[:60]}; want {wanted}")
    return row[key]
