"""What a retriever is: the one thing the rewards know about BM25 or a dense index."""

from typing import Protocol

import numpy as np


class Retriever(Protocol):
    """A fixed black box that turns query texts into ranked documents.

    doc_ids: the id of every row; the row numbers that `search` returns index this list.
    """

    doc_ids: list[str]

    def search(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Q queries -> rows (Q, k) int64 and scores (Q, k) float32, best first.

        A row number stands at most once in a ranking. A query with fewer than k hits ends in row -1, score -inf.
        A query's result does not depend on the other queries of the call. k < 1 raises ValueError.
        """
        ...
