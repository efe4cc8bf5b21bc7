"""Read what others publish: CSV and JSON lines with the columns they must have.

Their texts are brought to one line.
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


def find_file(folder: Path, name: str) -> Path:
    """Find the file of that name in the folder, plain or with .gz. Raises PrepareError."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise PrepareError(f"{folder / name}: no such file (nor {name}.gz); check the folder")


def iterate_csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (last line, {column: value}) of every row of a CSV[.gz] with a header.

    Further columns are ignored. Raises PrepareError.
    """
    with _open_plain_or_gzip(path) as file:
        reader = csv.reader(_decode_lines(path, file))
        header = next(reader, None)
        if header is None:
            raise PrepareError(f"{path}: the file is empty; fetch it again")
        require_columns(path, columns, header)
        for values in reader:
            if len(values) != len(header):
                raise PrepareError(
                    f"{path}:{reader.line_num}: {len(values)} values, "
                    f"the header has {len(header)}; the file is torn or its format has changed"
                )
            row = dict(zip(header, values))
            yield reader.line_num, {column: row[column] for column in columns}


def iterate_json(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    """Yield (line, object) of every line of a JSON-lines file, plain or .gz.

    Raises PrepareError for a line without one of the keys.
    """
    number = 0
    with _open_plain_or_gzip(path) as file:
        for number, line in enumerate(_decode_lines(path, file), 1):
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
            require_columns(f"{path}:{number}", keys, row)
            yield number, row
    if not number:
        raise PrepareError(f"{path}: the file is empty; fetch it again")


def require_columns(where: object, columns: tuple[str, ...], there) -> None:
    """Raise PrepareError unless every column is there."""
    for column in columns:
        if column not in there:
            raise PrepareError(
                f"{where}: no column {column!r} (it has {', '.join(map(str, there))[:200]}); "
                "this is another file, or its format has changed"
            )


def require_strings(path: Path, line: int, row: dict, keys: tuple[str, ...]) -> None:
    """Raise PrepareError unless the row has these keys and their values are strings."""
    require_columns(f"{path}:{line}", keys, row)
    for key in keys:
        if not isinstance(row[key], str):
            raise PrepareError(
                f"{path}:{line}: {key!r} is a {type(row[key]).__name__}, not a string; "
                "its format has changed"
            )


def parse_number(path: Path, line: int, column: str, value: str, kind=float):
    """Parse a number of a CSV. Raises PrepareError."""
    try:
        return kind(value)
    except ValueError:
        raise PrepareError(
            f"{path}:{line}: {column} is {value[:40]!r}, not a number; "
            "the file is torn or its format has changed"
        ) from None


def to_one_line(text: str) -> str:
    """Resolve entities, and make every run of white space one space."""
    return " ".join(html.unescape(text).split())


def clean_product_text(text: str) -> str:
    """Return BLaIR's text of a product, which Rec-R1 uses.

    Entities resolved, no double quotes, one line, ends in one full stop. Empty stays empty.
    """
    unquoted = html.unescape(text).replace('"', "")
    sentence = to_one_line(unquoted).rstrip(".")
    if not sentence:
        return ""
    return sentence + "."


def make_example_id(user: str, name: str) -> str:
    """Return an id for an example of `user` that is on the user's side of the validation hash.

    A user's windows overlap, so they must not be divided.
    """
    id = f"{user}-{name}"
    tries = 0
    while is_validation(id) != is_validation(user):
        tries += 1
        id = f"{user}-{name}.{tries}"
    return id


def _open_plain_or_gzip(path: Path):
    """Open a file for reading bytes, plain or gzip."""
    return (gzip.open if path.suffix == ".gz" else open)(path, "rb")


def _decode_lines(path: Path, file) -> Iterator[str]:
    """Yield decoded lines, with a progress bar."""
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
