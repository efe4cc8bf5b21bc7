"""Numbers of tokens -> postings by term, each with its finished contribution to a score. The
formulas stand here and nowhere else.

Legend: D documents in the order of their rows, V terms, P postings (pairs of a term and a document
that has it), N tokens of the corpus.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recr1.retrieval.bm25 import numba_scorer

CHUNK = 1 << 16  # postings whose impacts are computed together: they stay in the cache


@dataclass(frozen=True)
class BM25Parameters:
    """variant: "lucene", the formula of Lucene 8 and later in its own float32 arithmetic; or
    "okapi", that of rank_bm25.BM25Okapi (whose own k1 is 1.5), where a term in exactly half of the
    documents has impact 0. length: "exact", or "lucene": rounded as in Lucene's one stored byte
    (exact up to 40 tokens, then down to 1/8). Raises ValueError for what is out of range.
    """

    k1: float = 1.2
    b: float = 0.75
    variant: str = "lucene"
    length: str = "exact"

    def __post_init__(self):
        if self.variant not in ("lucene", "okapi"):
            raise ValueError(f'variant: must be "lucene" or "okapi", got {self.variant!r}')
        if self.length not in ("exact", "lucene"):
            raise ValueError(f'length: must be "exact" or "lucene", got {self.length!r}')
        if not (0 <= self.k1 < float("inf") and 0 <= self.b <= 1):
            raise ValueError(
                f"k1 must be at least 0 and b between 0 and 1, got k1 {self.k1} and b {self.b}"
            )


def build_postings(
    tokens: np.ndarray, lengths: np.ndarray, order: np.ndarray, V: int, numba: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens (N,) int32, lengths (D,) -> offsets (V + 1,) int64, docs (P,) int32, tf (P,) int32:
    the postings of term t are offsets[t]:offsets[t + 1], rows ascending. Row r is document
    order[r], whose tokens follow those of the documents before it.

    numba: count and fill; else: sort. Both give the same arrays.
    """
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    if numba:
        return numba_scorer.compile_postings()(tokens, starts, order, V)
    D = len(order)
    row = np.empty(D, np.int64)
    row[order] = np.arange(D)
    # by term, then row  (P,)
    pairs, tf = np.unique(tokens * np.int64(D) + np.repeat(row, lengths), return_counts=True)
    term, docs = np.divmod(pairs, D)
    offsets = np.zeros(V + 1, np.int64)
    np.cumsum(np.bincount(term, minlength=V), out=offsets[1:])
    return offsets, docs.astype(np.int32), tf.astype(np.int32)


def compute_impacts(
    p: BM25Parameters, offsets: np.ndarray, docs: np.ndarray, tf: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """(P,) float32: what one occurrence of the term in a query adds to the document's score.
    lengths (D,) by row.

    lucene   idf * tf / (tf + k1 * (1 - b + b * length / average)),              idf = ln(1 + (N -
    df + .5) / (df + .5))
             N and the average count only documents that have a token. Written as Lucene's
             BM25Similarity computes it, each step in float32, so that scores agree to the bit and
             ties are Lucene's ties.
    okapi    idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length / average)),   idf = ln((N - df +
    .5) / (df + .5))
             over all documents. A negative idf, that of a term in more than half of them, becomes
             .25 * the mean idf of all terms (BM25Okapi's epsilon).
    """
    df = np.diff(offsets)
    stored = round_to_stored_lengths(lengths) if p.length == "lucene" else lengths
    if p.variant == "lucene":
        N = np.count_nonzero(lengths)
        average = np.float32(lengths.sum() / N)
        k1 = np.float32(p.k1)
        b = np.float32(p.b)
        weight = np.log(1 + (N - df + 0.5) / (df + 0.5)).astype(np.float32)  # (V,)
        # k1 = 0, or b = 1 and no token: the inverse is inf, as it should
        with np.errstate(divide="ignore"):
            norm = 1 / (k1 * ((1 - b) + b * stored.astype(np.float32) / average))  # (D,)
    else:
        N = len(lengths)
        idf = np.log(N - df + 0.5) - np.log(df + 0.5)  # (V,)
        idf[idf < 0] = 0.25 * idf.mean()  # the mean is taken before, over the negative ones too
        weight = idf * (p.k1 + 1)
        norm = p.k1 * (1 - p.b + p.b * stored / lengths.mean())
    found = np.empty(len(docs), np.float32)
    for start in range(0, len(docs), CHUNK):
        part = slice(start, start + CHUNK)
        # the terms of this part
        t = np.searchsorted(offsets, [start, min(start + CHUNK, len(docs)) - 1], "right") - 1
        counts = np.diff(np.clip(offsets[t[0] : t[1] + 2], start, start + CHUNK))
        w = np.repeat(weight[t[0] : t[1] + 1], counts)
        f = tf[part].astype(norm.dtype)
        n = norm.take(docs[part])
        found[part] = w - w / (1 + f * n) if p.variant == "lucene" else w * f / (f + n)
    return found


def round_to_stored_lengths(lengths: np.ndarray) -> np.ndarray:
    """Lengths as the byte that Lucene stores gives them back (SmallFloat.intToByte4): 24 + the
    rest's top 4 bits.
    """
    rest = np.maximum(lengths - 24, 0)
    shift = np.maximum(np.frexp(rest)[1] - 4, 0)  # frexp's exponent: the number of bits
    return np.minimum(lengths, 24) + (rest >> shift << shift)
