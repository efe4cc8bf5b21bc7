"""Strings that lie in two arrays, so that an index of a million ids is mapped from its file and
shared, not made again by every process.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np


class StringTable(Sequence):
    """n strings in ascending order (of code points, which is UTF-8's byte order). text (bytes,)
    uint8, offsets (n + 1,) int64.
    """

    def __init__(self, text: np.ndarray, offsets: np.ndarray):
        self.text = text
        self.offsets = offsets
        # an item of these costs a fifth of an array's
        self._text = memoryview(text)
        self._offsets = memoryview(offsets)

    @classmethod
    def of(cls, ordered: Iterable[str]) -> "StringTable":
        """Takes strings that ascend already."""
        encoded = [string.encode("utf-8", "surrogatepass") for string in ordered]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(part) for part in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if i < 0:
            i += len(self)
        if not 0 <= i < len(self):
            raise IndexError(f"{i} of {len(self)} strings")
        return str(self._text[self._offsets[i] : self._offsets[i + 1]], "utf-8", "surrogatepass")

    def find(self, string: str) -> int:
        """Its number, -1 if it is none of them."""
        i = bisect_left(self, string)
        return i if i < len(self) and self[i] == string else -1
