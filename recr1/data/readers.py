"""Read corpus, queries and judgements from files, and decide which query is for validation.

Formats, UTF-8, plain or gzip (a name that ends in .gz):

    corpus   JSONL {"id", "title", "text"}: either of title and text may be absent; for some tasks
             and rewards "category" (string), "genres" (strings), "popularity" (number >= 0); other
             keys are ignored
    queries  JSONL {"id", "text"}; for some tasks "history" (document ids, oldest first, or pairs of
             id and date), "candidates" (distinct document ids), "profile" (string); other keys are
             ignored, unless a task of yours needs them
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
from contextlib import contextmanager, nullcontext
from typing import Any

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GZIP_MAGIC = b"\x1f\x8b"


class DataError(ValueError):
    """A data file cannot be used; the message names the file and, where there is one, the line."""


class _RepeatedLine(DataError):
    """A line that repeats an earlier one, or says nothing: left out and listed, but never a reason
    to stop.
    """


class _HeldOutLeak(DataError):
    """A line that would teach what is held out: always a reason to stop."""


# --- readers ----------------------------------------------------------------------------------


def read_corpus(
    path: str | os.PathLike, on_bad_line: str = "stop"
) -> tuple[list[str], list[str], list[str]]:
    """Return (ids, contents, dropped), in file order.

    A document's contents are title + " " + text, or the one of them that is not empty.
    """
    dropped: list[str] = []
    contents_by_id = dict(iterate_documents(path, on_bad_line, dropped))
    return list(contents_by_id), list(contents_by_id.values()), dropped


def check_readable(path: str | os.PathLike) -> None:
    """Raise DataError for a file that cannot be opened."""
    try:
        open(path, "rb").close()
    except OSError as e:
        reason = f"cannot be read ({e.strerror or e})"
        if isinstance(e, FileNotFoundError):
            reason = "no such file"
        raise DataError(
            f"{os.fspath(path)}: {reason}; check the path, or prepare the data set first"
        ) from None


def iterate_documents(
    path: str | os.PathLike,
    on_bad_line: str,
    dropped: list[str],
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield (id, contents) of one document of the corpus after the other.

    `dropped` grows meanwhile. on_progress(bytes of the file read so far) is called now and then.
    """
    seen: set[str] = set()

    def parse(line: str) -> tuple[str, str]:
        row = _parse_row(line)
        doc_id = _get_new_id(row, seen)
        fields = [_get_string(row, name) for name in ("title", "text") if name in row]
        contents = " ".join(field for field in fields if field)
        if not contents.strip():
            raise DataError(
                "neither 'title' nor 'text' says anything; give one of them or delete the line"
            )
        seen.add(doc_id)
        return doc_id, contents

    return _parse_lines(path, on_bad_line, parse, dropped, on_progress)


def read_queries(
    path: str | os.PathLike, on_bad_line: str = "stop"
) -> tuple[dict[str, str], list[str]]:
    """Return ({query id: text}, dropped), in file order."""
    rows, dropped = read_rows(path, on_bad_line)
    return {query_id: row["text"] for query_id, row in rows.items()}, dropped


def read_rows(
    path: str | os.PathLike, on_bad_line: str = "stop", needs: Iterable[str] = ()
) -> tuple[dict[str, dict], list[str]]:
    """Return ({query id: {"text": ..., and each key of `needs`}}, dropped), in file order.

    `needs` may name keys of the user's own: their values are not checked.
    """
    rows: dict[str, dict] = {}

    def parse(line: str) -> None:
        row = _parse_row(line)
        query_id = _get_new_id(row, rows)
        text = _get_string(row, "text")
        if not text.strip():
            raise DataError("'text' is empty; write the query or delete the line")
        fields = {name: _get_field(row, name) for name in needs}
        rows[query_id] = {"text": text} | fields

    dropped = _read_lines(path, on_bad_line, parse)
    return rows, dropped


def read_completions(
    path: str | os.PathLike, on_bad_line: str = "stop"
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return ([(query id, completion)], dropped) of JSONL {"id", "text"}.

    An id may come many times, a text may be empty, other keys are ignored.
    """
    completions: list[tuple[str, str]] = []

    def parse(line: str) -> None:
        row = _parse_row(line)
        query_id = _check_id(_get_string(row, "id"))
        completions.append((query_id, _get_string(row, "text")))

    dropped = _read_lines(path, on_bad_line, parse)
    return completions, dropped


def iterate_attributes(
    path: str | os.PathLike, on_bad_line: str, dropped: list[str]
) -> Iterator[tuple[str, dict]]:
    """Yield (id, row) of one document of the corpus after the other, with all keys of its line.

    The known keys are checked, as far as they are there. Ids may repeat.
    """

    def parse(line: str) -> tuple[str, dict]:
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
    """Return ({query id: {document id: gain}}, dropped), in file order.

    A judgement given twice would distort the ideal DCG. Twice with the same gain: the repeat is
    left out and listed in `dropped`, also under "stop". With another gain: a bad line; under "drop"
    the first one is used.
    """
    qrels: dict[str, dict[str, float]] = {}

    def parse(line: str) -> None:
        columns = line.split("\t")
        if len(columns) != 3:
            raise DataError(
                f"{len(columns)} tab-separated columns; want 3: query id, document id, gain"
            )
        query_id = _check_id(columns[0])
        doc_id = _check_id(columns[1])
        gain = _parse_gain(columns[2])

        gains = qrels.setdefault(query_id, {})
        if doc_id not in gains:
            gains[doc_id] = gain
            return
        if gains[doc_id] == gain:
            raise _RepeatedLine(
                f"{query_id!r}, {doc_id!r} was judged the same before; delete one of the two lines"
            )
        raise DataError(
            f"{query_id!r}, {doc_id!r} was judged {gains[doc_id]} before, now {gain}; "
            "keep one of the two lines"
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
    """Return ([(query id, completion, its token ids)], dropped), in file order.

    An id may come with several texts. A line whose "error" is not null, as a run writes it, has no
    text to learn: it is left out and listed.

    Args:
        known: the ids of the train queries.
        held_out: the ids of validation and test queries. Such an id raises DataError also under
            "drop": learned answers to them are a leak.
        encode: encode(text, the line's "ids") returns the token ids, and may refuse a text by
            raising DataError.
    """
    completions: list[tuple[str, str, list[int]]] = []
    seen: set[tuple[str, str]] = set()

    def parse(line: str) -> None:
        row = _parse_row(line)
        query_id = _check_id(_get_string(row, "id"))
        text = _get_string(row, "text")
        if query_id in held_out:
            raise _HeldOutLeak(
                f"{query_id!r} is a validation or test query: "
                "learning its answer would be a leak; delete all such lines"
            )
        if query_id not in known:
            raise DataError(
                f"{query_id!r} is no train query of this run; correct the id or delete the line"
            )
        error = row.get("error")
        if error is not None:
            raise _RepeatedLine(f"its 'error' is {str(error)[:40]!r}: nothing to learn")
        if (query_id, text) in seen:
            raise _RepeatedLine(
                f"{query_id!r} had the same text before; delete one of the two lines"
            )
        seen.add((query_id, text))
        completions.append((query_id, text, encode(text, row.get("ids"))))

    dropped = _read_lines(path, on_bad_line, parse)
    return completions, dropped


# --- the splits -------------------------------------------------------------------------------


def is_validation(query_id: str) -> bool:
    """Return whether a query of the train split is for validation: the sha256 of its id, as an
    integer, is 0 modulo 10.
    """
    return _hash_to_tenth(query_id) == 0


def is_test(query_id: str) -> bool:
    """Return whether it is for test where the data have no test split: the same number is 1 modulo
    10.
    """
    return _hash_to_tenth(query_id) == 1


def _hash_to_tenth(query_id: str) -> int:
    digest = hashlib.sha256(query_id.encode()).hexdigest()
    return int(digest, 16) % 10


# --- lines ------------------------------------------------------------------------------------


def _read_lines(
    path: str | os.PathLike, on_bad_line: str, parse: Callable[[str], None]
) -> list[str]:
    """Call parse(line) for every line, which stores it or raises DataError without a place. Return
    `dropped`.
    """
    dropped: list[str] = []
    for _ in _parse_lines(path, on_bad_line, parse, dropped):
        pass
    return dropped


def _parse_lines(
    path: str | os.PathLike,
    on_bad_line: str,
    parse: Callable[[str], Any],
    dropped: list[str],
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Any]:
    """Yield parse(line) of every good line, and add a message to `dropped` for each other one."""
    if on_bad_line not in ("stop", "drop"):
        raise ValueError(f"on_bad_line is {on_bad_line!r}; want 'stop' or 'drop'")
    name = os.fspath(path)
    number = 0
    with _describe_read_errors(name), open(name, "rb") as raw_file:
        # Binary: only \n ends a line, so the number is the one an editor shows; text mode would
        # also split at \r.
        file_context = gzip.open(raw_file) if name.endswith(".gz") else nullcontext(raw_file)
        with file_context as file:
            for number, raw in enumerate(file, 1):
                if number == 1:
                    raw = _strip_byte_order_mark(raw, name)
                if on_progress and number % 1000 == 0:
                    on_progress(raw_file.tell())
                try:
                    parsed = parse(_decode_line(raw))
                except DataError as error:
                    message = f"{name}:{number}: {error}"
                    if _stops_reading(error, on_bad_line):
                        raise DataError(message) from None
                    dropped.append(message)
                    continue
                yield parsed
    if number == 0:
        raise DataError(f"{name}: the file is empty; download or write it again")
    if number == len(dropped):
        raise DataError(f"{name}: none of its {number} lines is good; the first: {dropped[0]}")


@contextmanager
def _describe_read_errors(name: str) -> Iterator[None]:
    """Turn the errors of reading a file into DataErrors that name it and say what to do."""
    try:
        yield
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


def _strip_byte_order_mark(first_line: bytes, name: str) -> bytes:
    """Return the first line without a byte order mark. Raises DataError where it begins a gzip
    file.
    """
    if first_line.startswith(GZIP_MAGIC):
        raise DataError(f"{name}: compressed by gzip; give it a name that ends in .gz")
    return first_line.removeprefix(BYTE_ORDER_MARK)


def _stops_reading(error: DataError, on_bad_line: str) -> bool:
    """Return whether a bad line is a reason to stop, not only to leave it out."""
    if isinstance(error, _HeldOutLeak):
        return True
    return on_bad_line == "stop" and not isinstance(error, _RepeatedLine)


def _decode_line(raw: bytes) -> str:
    try:
        line = raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start + 1}; convert the file to UTF-8") from None
    if not line.strip():
        raise DataError("empty line; delete it")
    return line.rstrip("\r\n")


def _parse_row(line: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON ({error.msg} at character {error.pos + 1}); "
            "want one whole object on the line"
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


# --- values -----------------------------------------------------------------------------------


def _parse_gain(text: str) -> float:
    try:
        gain = float(text)
    except ValueError:
        raise DataError(
            f"gain {text[:40]!r} is not a number; a header line must be deleted"
        ) from None
    if not (math.isfinite(gain) and gain >= 0):
        raise DataError(f"gain {gain} is not a finite number >= 0; correct it or delete the line")
    return gain


def _get_string(row: dict, key: str) -> str:
    """Return row[key]. Raises DataError unless it is a string that can be written as UTF-8."""
    if key not in row:
        raise DataError(f"no key {key!r}; add it or delete the line")
    value = row[key]
    if not isinstance(value, str):
        raise DataError(
            f"{key!r} is a {type(value).__name__}, not a string; "
            "put it in quotes or delete the line"
        )
    try:
        # JSON may spell half of a UTF-16 pair, "\ud800". It would break hashing and writing later.
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{key!r} holds a lone surrogate, which is no character; remove it"
        ) from None
    return value


def _check_id(text: str) -> str:
    if not text or text != text.strip():
        raise DataError(
            f"id {text[:40]!r} is empty or has white space around it; correct it or delete the line"
        )
    return text


def _get_new_id(row: dict, seen: Container[str]) -> str:
    """Return the row's id. Raises DataError where an earlier line has it."""
    new_id = _check_id(_get_string(row, "id"))
    if new_id in seen:
        raise DataError(f"id {new_id[:40]!r} came before; ids are unique, delete one of the lines")
    return new_id


def _is_id_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _is_history(value: Any) -> bool:
    """Return whether it is a list of ids, or of pairs of id and date."""

    def is_visit(item: Any) -> bool:
        is_id = _is_id_list([item])
        is_pair = _is_id_list(item) and len(item) == 2
        return is_id or is_pair

    return isinstance(value, list) and all(map(is_visit, value))


def _is_candidates(value: Any) -> bool:
    return _is_id_list(value) and 0 < len(value) == len(set(value))


def _is_string_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_popularity(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value < math.inf


# {key of a row: (whether a value is good, what is wanted)}
_FIELD_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "history": (_is_history, "a list of document ids, or of pairs of id and date"),
    "candidates": (_is_candidates, "a list of distinct document ids, at least one"),
    "genres": (_is_string_list, "a list of strings"),
    "popularity": (_is_popularity, "a finite number >= 0"),
}


def _get_field(row: dict, key: str) -> Any:
    """Return row[key]. Raises DataError unless it is there and, for a known key, good."""
    if key in ("profile", "category"):
        return _get_string(row, key)
    if key not in row:
        raise DataError(f"no key {key!r}, which this task reads; add it or delete the line")
    value = row[key]
    if key in _FIELD_CHECKS:
        is_good, wanted = _FIELD_CHECKS[key]
        if not is_good(value):
            raise DataError(f"{key!r} is {str(value)[:60]}; want {wanted}")
    return value
