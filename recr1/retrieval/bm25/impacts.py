"""Turn token ids into postings by term, each with its finished contribution to a score.

The formulas of BM25 are in this file and nowhere else.

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
    """Choose BM25's formula.

    variant: "lucene", the formula of Lucene 8 and later in its own float32 arithmetic; or "okapi",
    that of rank_bm25.BM25Okapi (whose own k1 is 1.5), where a term in exactly half of the documents
    has impact 0. length: "exact", or "lucene": rounded as in Lucene's one stored byte (exact up to
    40 tokens, then down to 1/8). Raises ValueError for what is out of range.
    """

    k1: float = 1.2
    b: float = 0.75
    variant: str = "lucene"
    length: str = "exact"

    def __post_init__(self) -> None:
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
    """Return offsets (V + 1,) int64, docs (P,) int32 and tf (P,) int32.

    The postings of term t are offsets[t]:offsets[t + 1], rows ascending.

    Args:
        tokens: (N,) int32, the term ids of all documents, in the order of the corpus.
        lengths: (D,), how many tokens each document has, in the order of the corpus.
        order: (D,); row r is document order[r].
        V: number of terms.
        numba: count and fill; else: sort. Both give the same arrays.
    """
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    if numba:
        fill_postings = numba_scorer.compile_postings()
        return fill_postings(tokens, starts, order, V)

    # A posting is a distinct pair (term, row), coded as one integer; its tf is its count.
    D = len(order)
    row_of_doc = np.empty(D, np.int64)
    row_of_doc[order] = np.arange(D)
    pair_codes = np.repeat(row_of_doc, lengths)  # (N,)
    pair_codes += tokens * np.int64(D)  # in place: N is large
    posting_codes, tf = np.unique(pair_codes, return_counts=True)  # (P,) by term, then row
    term_ids, docs = np.divmod(posting_codes, D)

    doc_frequencies = np.bincount(term_ids, minlength=V)
    offsets = np.zeros(V + 1, np.int64)
    np.cumsum(doc_frequencies, out=offsets[1:])
    return offsets, docs.astype(np.int32), tf.astype(np.int32)


def compute_impacts(
    p: BM25Parameters, offsets: np.ndarray, docs: np.ndarray, tf: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """Return (P,) float32: what one occurrence of the term in a query adds to the document's score.

    lengths: (D,) by row.

    lucene   idf * tf / (tf + k1 * (1 - b + b * length / average))
             idf = ln(1 + (N - df + .5) / (df + .5))
             N and the average count only documents that have a token. Written as Lucene's
             BM25Similarity computes it, each step in float32, so that scores agree to the bit and
             ties are Lucene's ties.
    okapi    idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length / average))
             idf = ln((N - df + .5) / (df + .5))
             over all documents. A negative idf, that of a term in more than half of them, becomes
             .25 * the mean idf of all terms (BM25Okapi's epsilon).
    """
    doc_frequencies = np.diff(offsets)  # (V,)
    is_lucene = p.variant == "lucene"
    if is_lucene:
        weights, norms = _compute_lucene_factors(p, doc_frequencies, lengths)
    else:
        weights, norms = _compute_okapi_factors(p, doc_frequencies, lengths)

    num_postings = len(docs)
    impacts = np.empty(num_postings, np.float32)
    for start in range(0, num_postings, CHUNK):
        end = min(start + CHUNK, num_postings)
        # The chunk begins within one term's postings and ends within another's.
        first_term, last_term = np.searchsorted(offsets, [start, end - 1], "right") - 1
        edges = np.clip(offsets[first_term : last_term + 2], start, end)
        num_postings_of_term = np.diff(edges)
        weight = np.repeat(weights[first_term : last_term + 1], num_postings_of_term)
        frequency = tf[start:end].astype(norms.dtype)
        norm = norms.take(docs[start:end])
        if is_lucene:
            impacts[start:end] = weight - weight / (1 + frequency * norm)
        else:
            impacts[start:end] = weight * frequency / (frequency + norm)
    return impacts


def _compute_lucene_factors(
    p: BM25Parameters, doc_frequencies: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return idf (V,) and 1 / (k1 * (1 - b + b * length / average)) (D,), both float32.

    With f and n for tf and this inverse, idf * tf / (tf + k1 * ...) is idf - idf / (1 + f * n).
    """
    N = np.count_nonzero(lengths)
    average = np.float32(lengths.sum() / N)
    k1 = np.float32(p.k1)
    b = np.float32(p.b)
    odds = (N - doc_frequencies + 0.5) / (doc_frequencies + 0.5)
    idf = np.log(1 + odds).astype(np.float32)
    stored_lengths = _round_lengths(p, lengths).astype(np.float32)
    # k1 = 0, or b = 1 and no token: the inverse is inf, as it should be
    with np.errstate(divide="ignore"):
        inverse_norms = 1 / (k1 * ((1 - b) + b * stored_lengths / average))
    return idf, inverse_norms


def _compute_okapi_factors(
    p: BM25Parameters, doc_frequencies: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return idf * (k1 + 1) (V,) and k1 * (1 - b + b * length / average) (D,), both float64."""
    N = len(lengths)
    idf = np.log(N - doc_frequencies + 0.5) - np.log(doc_frequencies + 0.5)
    idf[idf < 0] = 0.25 * idf.mean()  # the mean is taken before, over the negative ones too
    norms = p.k1 * (1 - p.b + p.b * _round_lengths(p, lengths) / lengths.mean())
    return idf * (p.k1 + 1), norms


def _round_lengths(p: BM25Parameters, lengths: np.ndarray) -> np.ndarray:
    if p.length == "lucene":
        return round_to_stored_lengths(lengths)
    return lengths


def round_to_stored_lengths(lengths: np.ndarray) -> np.ndarray:
    """Return the lengths that Lucene reads back from its one byte (SmallFloat.intToByte4).

    A length is stored exactly up to 24; of the rest, the top 4 bits are stored.
    """
    rest = np.maximum(lengths - 24, 0)
    _, num_bits = np.frexp(rest)  # the exponent is the number of bits
    shift = np.maximum(num_bits - 4, 0)
    stored_rest = rest >> shift << shift
    return np.minimum(lengths, 24) + stored_rest
