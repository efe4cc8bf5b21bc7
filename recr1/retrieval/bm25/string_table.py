"""Keep a million strings in two arrays.

The arrays of an index are mapped from its files and shared: no process builds a list of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class StringTable(Sequence[str]):
    """Hold n strings in ascending order (of code points, which is UTF-8's byte order).

    text      (bytes,) uint8, all strings in UTF-8, one after the other
    offsets   (n + 1,) int64; string i is text[offsets[i]:offsets[i + 1]]
    """

    def __init__(self, text: np.ndarray, offsets: np.ndarray):
        self.text = text
        self.offsets = offsets
        # an item of a memoryview costs a fifth of an array's
        # (numpy's stubs say that arrays are buffers from Python 3.12 on)
        self._text_view = memoryview(text)  # type: ignore[arg-type]
        self._offsets_view = memoryview(offsets)  # type: ignore[arg-type]

    @classmethod
    def of(cls, ordered: Iterable[str]) -> StringTable:
        """Build the table of strings that ascend already."""
        encoded = [string.encode("utf-8", "surrogatepass") for string in ordered]
        sizes = [len(string_bytes) for string_bytes in encoded]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum(sizes, out=offsets[1:])
        all_bytes = b"".join(encoded)
        return cls(np.frombuffer(all_bytes, np.uint8), offsets)

    def __len__(self) -> int:
        return len(self._offsets_view) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...

    @overload
    def __getitem__(self, i: slice) -> list[str]: ...

    def __getitem__(self, i):
        if isinstance(i, slice):
            indices = range(*i.indices(len(self)))
            return [self[index] for index in indices]
        if i < 0:
            i += len(self)
        if not 0 <= i < len(self):
            raise IndexError(f"{i} of {len(self)} strings")
        start = self._offsets_view[i]
        end = self._offsets_view[i + 1]
        return str(self._text_view[start:end], "utf-8", "surrogatepass")

    def find(self, string: str) -> int:
        """Return the string's index, -1 if the table does not have it."""
        i = bisect_left(self, string)
        if i < len(self) and self[i] == string:
            return i
        return -1
