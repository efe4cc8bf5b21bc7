"""BM25 (Robertson and Zaragoza 2009) over an inverted index that holds every term's finished contribution to a score.

A score is one sum per document: for each token of the query, add that token's impacts. What BM25 needs to know (tf,
idf, lengths) goes into the impacts when the index is built, so searching knows no formula.

Legend: D documents, V terms, P postings (pairs of a term and a document that has it), Q queries.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from recr1.retrieval import analyzer

_ARRAYS = ("offsets.npy", "docs.npy", "impacts.npy")
_FILES = ("index.json", "doc_ids.json", "terms.json", *_ARRAYS)


class BM25:
    """A Retriever. Rows are the documents in ascending order of their ids as strings, whatever order they came in.

    doc_ids   D strings, ascending: equal scores are ranked by id (Lucene's rule), and that is then the row order
    terms     token -> its number t
    offsets   (V + 1,) int64; the postings of term t are offsets[t]:offsets[t + 1]
    docs      (P,) int32 rows, ascending within a term
    impacts   (P,) float32, what one occurrence of the term in a query adds to the document's score
    meta      parameters and checksum: what the index was made from
    """

    def __init__(self, meta: dict, doc_ids: list[str], terms: dict[str, int], offsets: np.ndarray, docs: np.ndarray,
                 impacts: np.ndarray):
        self.meta, self.doc_ids, self.terms = meta, doc_ids, terms
        self.offsets, self.docs, self.impacts = offsets, docs, impacts

    @classmethod
    def build(cls, doc_ids: Sequence[str], texts: Sequence[str], *, k1: float = 1.2, b: float = 0.75,
              variant: str = "lucene", length: str = "exact",
              progress: Callable[[Iterable], Iterable] | None = None) -> "BM25":
        """The index of D texts.

        variant: "lucene", the formula of Lucene 8 and later in its own float32 arithmetic; or "okapi", that of
            rank_bm25.BM25Okapi (whose own k1 is 1.5), where a term in exactly half of the documents has impact 0.
        length: "exact", or "lucene": rounded as in Lucene's one stored byte (exact up to 40 tokens, then down to 1/8).
        progress: wraps the iteration over the documents, such as tqdm.
        Raises ValueError for ids that repeat, an empty corpus, no token in all of it, or parameters out of range.
        """
        meta = _describe(doc_ids, texts, k1, b, variant, length)
        order = sorted(range(len(doc_ids)), key=doc_ids.__getitem__)          # str order is UTF-8 byte order
        terms, tokens, lengths = {}, array("i"), []
        for i in progress(order) if progress else order:
            found = [terms.setdefault(token, len(terms)) for token in analyzer.analyze(texts[i])]
            tokens.extend(found)
            lengths.append(len(found))
        if not tokens:
            raise ValueError("texts: no document has a token (stop words are none), so there is nothing to search")

        D, V, lengths = len(order), len(terms), np.array(lengths)                                     # (D,)
        pairs = np.frombuffer(tokens, np.int32) * np.int64(D) + np.repeat(np.arange(D), lengths)      # one a token
        pairs, tf = np.unique(pairs, return_counts=True)                      # by term, then document        (P,)
        term, docs = np.divmod(pairs, D)                                                              # (P,), (P,)
        df = np.bincount(term, minlength=V)                                                           # (V,)
        formula = _lucene_impacts if variant == "lucene" else _okapi_impacts
        impacts = formula(tf, df, term, lengths, _stored(lengths) if length == "lucene" else lengths, docs, k1, b)
        offsets = np.concatenate([[0], np.cumsum(df)])                                                # (V + 1,)
        return cls(meta, [doc_ids[i] for i in order], terms, offsets, docs.astype(np.int32), impacts)

    def search(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Q texts -> rows (Q, k) int64 and scores (Q, k) float32, best first; past the last hit row -1, score -inf.

        A hit has at least one token of the query and a score above 0 (in "okapi" a common term may have 0 or less).
        A token that the query repeats counts as often as it stands there. Equal scores are ranked by document id,
        which also decides which of them are among the k. Raises ValueError for k < 1.
        """
        if k < 1:
            raise ValueError(f"k: must be at least 1, got {k}")
        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for i, query in enumerate(queries):
            hits, found = self._top(query, k)
            rows[i, :len(hits)], scores[i, :len(hits)] = hits, found
        return rows, scores

    def explain(self, query: str, row: int) -> list[tuple[str, float]]:
        """What each distinct token of the query adds to the score of this row, largest first; only tokens it has."""
        parts = []
        for token, count, postings in self._postings(query):
            at = postings.start + np.searchsorted(self.docs[postings], row)
            if at < postings.stop and self.docs[at] == row:
                parts.append((token, float(count * self.impacts[at])))
        return sorted(parts, key=lambda part: -part[1])

    def _postings(self, query: str) -> list[tuple[str, int, slice]]:
        """(token, its count, where its postings stand) for every distinct token of the query that the index has."""
        counts = Counter(analyzer.analyze(query))
        numbers = [(token, count, self.terms[token]) for token, count in counts.items() if token in self.terms]
        return [(token, count, slice(int(self.offsets[t]), int(self.offsets[t + 1]))) for token, count, t in numbers]

    def _top(self, query: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores of at most k hits, best first."""
        found = self._postings(query)
        if not found:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        docs = np.concatenate([self.docs[postings] for _, _, postings in found])
        impacts = np.concatenate([count * self.impacts[postings] for _, count, postings in found])
        # Added in float64 and rounded once, as Lucene does: a float32 sum splits ties by the order of the terms.
        scores = np.bincount(docs, impacts, len(self.doc_ids)).astype(np.float32)                     # (D,)
        rows = np.flatnonzero(scores > 0)                                                             # ascending
        scores = scores[rows]
        if len(rows) > k:
            best = scores >= np.partition(scores, -k)[-k]                     # the k-th score and all equal to it
            rows, scores = rows[best], scores[best]
        ranking = np.argsort(-scores, kind="stable")[:k]                      # stable: ties stay in row order
        return rows[ranking], scores[ranking]

    def save(self, directory: str | Path) -> None:
        """Write the index to a new directory and rename it to this name: at no moment is there half an index.

        An older index there is replaced. Raises ValueError if the directory holds files of something else.
        """
        directory = Path(directory).resolve()
        try:
            there = os.listdir(directory)
        except FileNotFoundError:
            there = []
        for name in sorted(set(there) - set(_FILES)):
            raise ValueError(f"{directory}: {name} is not part of an index; give the index a directory of its own")
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            files = {name: json.dumps(list(values)).encode()
                     for name, values in (("doc_ids.json", self.doc_ids), ("terms.json", self.terms))}
            for name, data in files.items():
                (temporary / name).write_bytes(data)
            for name, values in zip(_ARRAYS, (self.offsets, self.docs, self.impacts)):
                np.save(temporary / name, values, allow_pickle=False)
                files[name] = values
            crc32 = {name: zlib.crc32(data) for name, data in files.items()}
            (temporary / "index.json").write_text(json.dumps({**self.meta, "crc32": crc32}, indent=1))
            os.chmod(temporary, 0o755)                                        # mkdtemp's 0o700 would hide the cache
            _replace(directory, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def load(cls, directory: str | Path) -> "BM25":
        """The index saved in a directory; its arrays stay on disk and are read on demand.

        Raises FileNotFoundError if there is none, ValueError naming the file that is not as it was written.
        """
        directory = Path(directory)
        try:
            meta = json.loads((directory / "index.json").read_text())
            crc32 = meta.pop("crc32")
        except FileNotFoundError:
            raise FileNotFoundError(f"{directory}: holds no BM25 index (no index.json); build one") from None
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{directory / 'index.json'}: is not of a BM25 index; delete it and build again") from None
        files = []
        for name in _FILES[1:]:
            path = directory / name
            try:              # the checksum is of what was opened: another process may be replacing the directory
                data = np.load(path, mmap_mode="r", allow_pickle=False) if name in _ARRAYS else path.read_bytes()
                whole = zlib.crc32(data) == crc32[name]
            except (OSError, EOFError, ValueError, KeyError):
                whole = False
            if not whole:
                raise ValueError(f"{path}: is not as it was written; delete the directory and build the index again")
            files.append(np.asarray(data) if name in _ARRAYS else json.loads(data))
        doc_ids, terms, offsets, docs, impacts = files
        return cls(meta, doc_ids, {token: t for t, token in enumerate(terms)}, offsets, docs, impacts)


def load_or_build(directory: str | Path, doc_ids: Sequence[str], texts: Sequence[str], *, k1: float = 1.2,
                  b: float = 0.75, variant: str = "lucene", length: str = "exact",
                  progress: Callable[[Iterable], Iterable] | None = None) -> BM25:
    """BM25.build with a directory as its cache: what lies there is used if it is whole and of exactly these arguments
    (checksum over ids, texts, parameters, analyzer), else built again and replaced. Raises as `build` and `save` do."""
    meta = _describe(doc_ids, texts, k1, b, variant, length)
    try:
        index = BM25.load(directory)
        if index.meta == meta:
            return index
    except (FileNotFoundError, ValueError):
        pass
    index = BM25.build(doc_ids, texts, k1=k1, b=b, variant=variant, length=length, progress=progress)
    index.save(directory)
    return index


def _describe(doc_ids: Sequence[str], texts: Sequence[str], k1: float, b: float, variant: str, length: str) -> dict:
    """Check the arguments of an index; the facts that decide all of its contents."""
    if variant not in ("lucene", "okapi"):
        raise ValueError(f'variant: must be "lucene" or "okapi", got {variant!r}')
    if length not in ("exact", "lucene"):
        raise ValueError(f'length: must be "exact" or "lucene", got {length!r}')
    if not (0 <= k1 < float("inf") and 0 <= b <= 1):
        raise ValueError(f"k1 must be at least 0 and b between 0 and 1, got k1 {k1} and b {b}")
    if len(doc_ids) != len(texts):
        raise ValueError(f"doc_ids and texts must be of the same length, got {len(doc_ids)} and {len(texts)}")
    if not len(doc_ids):
        raise ValueError("doc_ids: the corpus is empty; BM25 needs at least one document")
    seen, digest = set(), hashlib.sha256()
    for doc_id, text in zip(doc_ids, texts):
        if doc_id in seen:
            raise ValueError(f"doc_ids: {doc_id!r} stands there twice; every document needs its own id")
        seen.add(doc_id)
        digest.update(f"{len(doc_id)} {len(text)} {doc_id}{text}".encode("utf-8", "surrogatepass"))
    return {"format": 1, "analyzer": analyzer.VERSION, "variant": variant, "k1": float(k1), "b": float(b),
            "length": length, "corpus": digest.hexdigest()}


def _lucene_impacts(tf, df, term, lengths, stored, docs, k1, b):
    """tf (P,), df (V,), term (P,), true and stored lengths (D,), docs (P,) -> impacts (P,) float32.

        idf * tf / (tf + k1 * (1 - b + b * length / average)),   idf = ln(1 + (N - df + .5) / (df + .5))

    N and the average count only documents that have a token. Written as Lucene's BM25Similarity computes it, each
    step in float32, so that scores agree to the bit and ties are Lucene's ties.
    """
    N = np.count_nonzero(lengths)
    average, k1, b = np.float32(lengths.sum() / N), np.float32(k1), np.float32(b)
    weight = np.log(1 + (N - df + 0.5) / (df + 0.5)).astype(np.float32)[term]                         # (P,)
    with np.errstate(divide="ignore"):            # k1 = 0, or b = 1 and no token: the inverse is inf, as it should
        inverse = 1 / (k1 * ((1 - b) + b * stored.astype(np.float32) / average))                      # (D,)
    return weight - weight / (1 + tf.astype(np.float32) * inverse[docs])


def _okapi_impacts(tf, df, term, lengths, stored, docs, k1, b):
    """As _lucene_impacts, the formula of rank_bm25.BM25Okapi (epsilon .25), over all documents:

        idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length / average)),   idf = ln((N - df + .5) / (df + .5))

    A negative idf, that of a term in more than half of the documents, becomes epsilon * the mean idf of all terms.
    """
    N = len(lengths)
    idf = np.log(N - df + 0.5) - np.log(df + 0.5)                                                     # (V,)
    idf[idf < 0] = 0.25 * idf.mean()              # the mean is taken before, over the negative ones too
    norm = k1 * (1 - b + b * stored / lengths.mean())                                                 # (D,)
    return (idf[term] * tf * (k1 + 1) / (tf + norm[docs])).astype(np.float32)


def _stored(lengths: np.ndarray) -> np.ndarray:
    """Lengths as the byte that Lucene stores gives them back (SmallFloat.intToByte4): 24 + the rest's top 4 bits."""
    rest = np.maximum(lengths - 24, 0)
    shift = np.maximum(np.frexp(rest)[1] - 4, 0)                              # frexp's exponent: the number of bits
    return np.minimum(lengths, 24) + (rest >> shift << shift)


def _replace(directory: Path, temporary: Path) -> None:
    """Rename temporary to directory, moving what is there out of the way; another process may be doing the same."""
    while True:
        try:
            return os.rename(temporary, directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent)
        try:
            os.rename(directory, old)                                         # an empty directory may be renamed onto
        except FileNotFoundError:                                             # the other process moved it first
            pass
        shutil.rmtree(old)
