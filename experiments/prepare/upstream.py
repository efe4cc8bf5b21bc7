"""Reading what others publish: CSV and JSON lines with the columns they must have, and their texts
on one line.
"""

import csv
import gzip
import html
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from checks import PrepareError
from tqdm import tqdm

from recr1.data.readers import is_validation

csv.field_size_limit(2**30)  # reviews and histories may be longer than the default of 128 KiB


def find(folder: Path, name: str) -> Path:
    """The file of that name in the folder, plain or with .gz behind it. Raises PrepareError."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise PrepareError(f"{folder / name}: no such file (nor {name}.gz); check the folder")


def csv_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(last line, {column: value}) of every row of a CSV[.gz] with a header; further columns are
    ignored. Raises PrepareError.
    """
    with _open(path) as file:
        reader = csv.reader(_lines(path, file))
        header = next(reader, None)
        if header is None:
            raise PrepareError(f"{path}: the file is empty; fetch it again")
        need(path, columns, header)
        for values in reader:
            if len(values) != len(header):
                raise PrepareError(
                    f"{path}:{reader.line_num}: {len(values)} values, "
                    f"the header has {len(header)}; the file is torn or its format has changed"
                )
            row = dict(zip(header, values))
            yield reader.line_num, {column: row[column] for column in columns}


def json_rows(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    """(line, object) of every line of a JSON-lines file, plain or .gz. Raises PrepareError for a
    line without one of the keys.
    """
    number = 0
    with _open(path) as file:
        for number, line in enumerate(_lines(path, file), 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise PrepareError(
                    f"{path}:{number}: not JSON; the file is torn, fetch it again"
                ) from None
            if not isinstance(row, dict):
                raise PrepareError(
                    f"{path}:{number}: a {type(row).__name__}, not an object; "
                    "this is another file, or its format has changed"
                )
            need(f"{path}:{number}", keys, row)
            yield number, row
    if not number:
        raise PrepareError(f"{path}: the file is empty; fetch it again")


def need(where: object, columns: tuple[str, ...], there) -> None:
    """Raises PrepareError unless every column is there."""
    for column in columns:
        if column not in there:
            raise PrepareError(
                f"{where}: no column {column!r} (it has {', '.join(map(str, there))[:200]}); "
                "this is another file, or its format has changed"
            )


def strings(path: Path, line: int, row: dict, keys: tuple[str, ...]) -> None:
    """Raises PrepareError unless the row has these keys and their values are strings."""
    need(f"{path}:{line}", keys, row)
    for key in keys:
        if not isinstance(row[key], str):
            raise PrepareError(
                f"{path}:{line}: {key!r} is a {type(row[key]).__name__}, not a string; "
                "its format has changed"
            )


def number(path: Path, line: int, column: str, value: str, kind=float):
    """A number out of a CSV. Raises PrepareError."""
    try:
        return kind(value)
    except ValueError:
        raise PrepareError(
            f"{path}:{line}: {column} is {value[:40]!r}, not a number; "
            "the file is torn or its format has changed"
        ) from None


def one_line(text: str) -> str:
    """Entities resolved, every run of white space one space."""
    return " ".join(html.unescape(text).split())


def clean(text: str) -> str:
    """BLaIR's text of a product, which Rec-R1 uses: entities resolved, no double quotes, one line,
    ends in one full stop. Empty stays empty.
    """
    text = one_line(html.unescape(text).replace('"', "")).rstrip(".")
    return text + "." if text else ""


def user_id(user: str, name: str) -> str:
    """An id for an example of `user` that lies on the user's side of the validation hash: a user's
    windows overlap, so they must not part.
    """
    id = f"{user}-{name}"
    tries = 0
    while is_validation(id) != is_validation(user):
        tries += 1
        id = f"{user}-{name}.{tries}"
    return id


def _open(path: Path):
    return (gzip.open if path.suffix == ".gz" else open)(path, "rb")


def _lines(path: Path, file) -> Iterator[str]:
    """Decoded lines, with a bar."""
    number = 0
    try:
        for number, raw in enumerate(
            tqdm(file, desc=path.name, unit=" lines", disable=None, leave=False), 1
        ):
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as e:
        raise PrepareError(
            f"{path}:{number}: not UTF-8 at byte {e.start + 1}; fetch the file again"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise PrepareError(f"{path}: torn, or not gzip ({e}); fetch it again") from None
