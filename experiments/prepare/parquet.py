"""Read the two formats of ESCI that the standard library does not read a piece at a time.

They are parquet, and one JSON object of a gigabyte.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from checks import PrepareError
from tqdm import tqdm
from upstream import require_columns

CHUNK = 2**24  # bytes
_PAIR = re.compile(rb'\s*"((?:[^"\\]|\\.)*)"\s*:\s*"((?:[^"\\]|\\.)*)"\s*([,}])')


def iterate_parquet(path: Path, columns: tuple[str, ...], batch: int = 16_384) -> Iterator[dict]:
    """Yield {column: value} of every row.

    A batch of rows and a MiB of each column's bytes are in memory, not a row group. Raises
    PrepareError.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise PrepareError(
            "parquet files need pyarrow, which is not installed: pip install pyarrow"
        ) from None
    try:
        with (
            parquet.ParquetFile(path, buffer_size=2**20) as file,
            tqdm(
                total=file.metadata.num_rows,
                desc=path.name,
                unit=" rows",
                disable=None,
                leave=False,
            ) as bar,
        ):
            require_columns(path, columns, file.schema_arrow.names)
            for part in file.iter_batches(batch, columns=list(columns)):
                yield from part.to_pylist()
                bar.update(len(part))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as e:
        raise PrepareError(
            f"{path}: torn, or not parquet ({str(e).splitlines()[0][:120]}); fetch it again"
        ) from None
    except OSError as e:  # pyarrow's word for damaged pages
        raise PrepareError(
            f"{path}: cannot be read ({str(e).splitlines()[0][:120]}); fetch it again"
        ) from None


def read_categories(path: Path, wanted: set[str]) -> dict[str, str]:
    """Read the categories of the wanted products out of {"product": "category", ...}, by pieces.

    Returns {product: category}; spaces in a category become _. Raises PrepareError.
    """
    found: dict[str, str] = {}
    # bytes before `rest`, bytes not understood yet, the mark after the last pair
    at = 0
    rest = b""
    end = b""
    with (
        open(path, "rb") as file,
        tqdm(
            total=path.stat().st_size,
            desc=path.name,
            unit="B",
            unit_scale=True,
            disable=None,
            leave=False,
        ) as bar,
    ):
        while chunk := file.read(CHUNK):
            bar.update(len(chunk))
            rest += chunk
            place = 0
            if at == 0:
                place = len(rest) - len(rest.lstrip())
                if rest[place : place + 1] != b"{":
                    raise PrepareError(
                        f"{path}: does not begin with {{; want one JSON object of product: category"
                    )
                place += 1
            while end != b"}" and (pair := _PAIR.match(rest, place)):
                place = pair.end()
                end = pair[3]
                if (product := pair[1].decode(errors="replace")) in wanted:
                    found[product] = sys.intern(pair[2].decode(errors="replace").replace(" ", "_"))
            at = at + place
            rest = rest[place:]
            if end != b"}" and len(rest) > 2**20:
                break
    if end != b"}" or rest.strip():
        raise PrepareError(
            f'{path}: no "product": "category" after byte {at:,}; '
            "the file is torn or its format has changed: fetch it again"
        )
    return found
