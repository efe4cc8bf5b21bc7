"""Build the BM25 index from a corpus, save it in a directory, map it from there.

A directory is written under another name and renamed last: what has the name is complete.
index.json says what the index was made from and has a checksum of every file; an index of something
else, or a torn one, is refused with the command that makes it anew.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from recr1.data import readers
from recr1.retrieval.bm25 import analyzer
from recr1.retrieval.bm25.corpus_tokenizer import CHUNK_CHARS, TokenizedTexts, tokenize_chunks
from recr1.retrieval.bm25.impacts import BM25Parameters, build_postings, compute_impacts
from recr1.retrieval.bm25.string_table import StringTable
from recr1.utils.files import sync_to_disk

FORMAT = 2

ARRAYS = ("doc_ids", "doc_id_offsets", "terms", "term_offsets", "offsets", "docs", "impacts")

FILES = ("index.json", *(f"{name}.npy" for name in ARRAYS))

ARRAY_FILES = FILES[1:]

# files of an index in format 1, which `save` replaces as well
FILES_OF_FORMAT_1 = ("doc_ids.json", "terms.json")


class IndexRefused(ValueError):
    """Report that the directory holds an index that is torn, or was made from something else.

    The message says how to make it anew.
    """


@dataclass
class BM25Index:
    """Hold D documents, V terms, P postings.

    Rows are the documents in ascending order of their ids, terms ascend too.

    meta      what the index was made from
    doc_ids   D strings: equal scores are ranked by id (Lucene's rule), and that is the row order
    terms     V strings
    offsets   (V + 1,) int64; the postings of term t are offsets[t]:offsets[t + 1]
    docs      (P,) int32 rows, ascending within a term
    impacts   (P,) float32, what one occurrence of the term in a query adds to the document's score
    """

    meta: dict[str, Any]
    doc_ids: StringTable
    terms: StringTable
    offsets: np.ndarray
    docs: np.ndarray
    impacts: np.ndarray

    @classmethod
    def of_texts(
        cls,
        doc_ids: Sequence[str],
        texts: Sequence[str],
        parameters: BM25Parameters,
        numba: bool = False,
    ) -> BM25Index:
        """Build the index of texts in memory.

        Raises ValueError for ids that repeat, an empty corpus, or no token in all of it.
        """
        if len(doc_ids) != len(texts):
            raise ValueError(
                f"doc_ids and texts must be of the same length, got {len(doc_ids)} and {len(texts)}"
            )
        if not len(doc_ids):
            raise ValueError("doc_ids: the corpus is empty; BM25 needs at least one document")
        if len(set(doc_ids)) < len(doc_ids):
            ordered = sorted(doc_ids)
            duplicate = next(a for a, b in zip(ordered, ordered[1:]) if a == b)
            raise ValueError(
                f"doc_ids: {duplicate!r} stands there twice; every document needs its own id"
            )
        tokenized = tokenize_chunks([list(texts)], 1)
        return _assemble_index(_make_meta(parameters), list(doc_ids), tokenized, numba)

    @classmethod
    def of_file(
        cls,
        corpus: str | os.PathLike,
        parameters: BM25Parameters,
        on_bad_line: str = "stop",
        numba: bool = False,
    ) -> BM25Index:
        """Stream the corpus, JSONL[.gz], and analyze it on all cores.

        Raises DataError for what cannot be read, ValueError for no token in all of it.
        """
        doc_ids: list[str] = []
        dropped: list[str] = []
        num_bytes = os.path.getsize(corpus) if os.path.exists(corpus) else None
        with tqdm(
            total=num_bytes, desc="index", unit="B", unit_scale=True, disable=None, leave=False
        ) as bar:

            def show_progress(position: int) -> None:
                bar.update(position - bar.n)

            meta = _make_meta(parameters, hash_file(corpus))
            documents = readers.iterate_documents(corpus, on_bad_line, dropped, show_progress)
            chunks = _chunk_texts(documents, doc_ids)
            num_workers = len(os.sched_getaffinity(0))
            tokenized = tokenize_chunks(chunks, num_workers)
            index = _assemble_index(meta, doc_ids, tokenized, numba, os.fspath(corpus))
        meta["dropped"] = [len(dropped), *dropped[:1]]
        return index

    def save(self, directory: str | Path) -> None:
        """Write the index and put it in the directory's place at once, an older index's too.

        Raises ValueError if the directory holds files of something else, OSError.
        """
        directory = Path(directory).resolve()
        _refuse_foreign_files(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            arrays = self._get_arrays()
            for name, values in arrays.items():
                np.save(temporary / name, values, allow_pickle=False)
                sync_to_disk(temporary / name)

            # numpy's stubs say that arrays are buffers from Python 3.12 on
            crc32 = {
                name: zlib.crc32(values)  # type: ignore[arg-type]
                for name, values in arrays.items()
            }
            crc32["index.json"] = _compute_crc32(self.meta)
            meta = {**self.meta, "crc32": crc32}
            (temporary / "index.json").write_text(json.dumps(meta, indent=1))
            sync_to_disk(temporary / "index.json")

            os.chmod(temporary, 0o755)  # mkdtemp's 0o700 would hide the cache
            _replace_directory(directory, temporary)
            sync_to_disk(directory.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def load(cls, directory: str | Path) -> BM25Index:
        """Map the arrays from their files: processes share one copy.

        Raises FileNotFoundError if there is no index, IndexRefused.
        """
        directory = Path(directory)
        while True:
            number = _get_inode(directory)
            try:
                return cls._map(directory)
            except (FileNotFoundError, IndexRefused):
                # Another process that built the same index may have replaced it meanwhile.
                if _get_inode(directory) == number:
                    raise

    @classmethod
    def _map(cls, directory: Path) -> BM25Index:
        meta, crc32 = _read_meta(directory)
        arrays = [_map_array(directory / name, crc32) for name in ARRAY_FILES]
        doc_ids = StringTable(*arrays[:2])
        terms = StringTable(*arrays[2:4])
        return cls(meta, doc_ids, terms, *arrays[4:])

    def _get_arrays(self) -> dict[str, np.ndarray]:
        """Return {file name: array}, in the order of ARRAY_FILES."""
        arrays = (
            self.doc_ids.text,
            self.doc_ids.offsets,
            self.terms.text,
            self.terms.offsets,
            self.offsets,
            self.docs,
            self.impacts,
        )
        return dict(zip(ARRAY_FILES, arrays))


def open_or_build(
    directory: str | Path,
    corpus: str | os.PathLike,
    parameters: BM25Parameters,
    on_bad_line: str = "stop",
    numba: bool = False,
) -> BM25Index:
    """Return the index of this corpus in this directory; build and save it where there is none.

    Raises IndexRefused, DataError, ValueError, OSError.
    """
    command = _format_command(directory, corpus, parameters, on_bad_line)
    try:
        index = BM25Index.load(directory)
    except FileNotFoundError:
        BM25Index.of_file(corpus, parameters, on_bad_line, numba).save(directory)
        index = BM25Index.load(directory)
    except IndexRefused as e:
        raise IndexRefused(f"{e}; make the index anew: {command}") from None

    # The index must be of this corpus, this analyzer and these parameters.
    for key, wanted in _make_meta(parameters, hash_file(corpus)).items():
        stored = index.meta[key]
        if stored == wanted:
            continue
        if key == "corpus":
            difference = "has changed since the index was made, or is another one"
        else:
            difference = f"is {wanted} here, {stored} in the index"
        raise IndexRefused(f"{directory}: {key} {difference}; make the index anew: {command}")

    num_dropped, *messages = index.meta["dropped"]
    if num_dropped and on_bad_line == "stop":
        raise IndexRefused(
            f"{directory}: {num_dropped} bad lines were left out of this index, "
            f"first: {messages[0]}; mend the corpus, then make the index anew: {command}"
        )
    return index


def hash_file(path: str | os.PathLike) -> str:
    """Return the sha256 of a file's bytes. Raises DataError."""
    readers.check_readable(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compute_crc32(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _make_meta(parameters: BM25Parameters, corpus_hash: str = "") -> dict[str, Any]:
    return dict(
        format=FORMAT, analyzer=analyzer.ANALYZER_VERSION, **asdict(parameters), corpus=corpus_hash
    )


def _get_parameters(meta: dict[str, Any]) -> BM25Parameters:
    values = {field.name: meta[field.name] for field in fields(BM25Parameters)}
    return BM25Parameters(**values)


def _format_command(
    directory: str | Path,
    corpus: str | os.PathLike,
    parameters: BM25Parameters,
    on_bad_line: str,
) -> str:
    """Return the command line that makes this index anew; defaults are left out."""
    words = [
        "recr1 index --corpus",
        shlex.quote(os.fspath(corpus)),
        "--index-dir",
        shlex.quote(str(directory)),
    ]
    for field in fields(BM25Parameters):
        value = getattr(parameters, field.name)
        if value != field.default:
            words.append(f"--{field.name} {value}")
    if on_bad_line == "drop":
        words.append("--on-bad-line drop")
    return " ".join(words)


def _chunk_texts(documents: Iterable[tuple[str, str]], doc_ids: list[str]) -> Iterator[list[str]]:
    """Yield the texts in chunks of about CHUNK_CHARS characters; append the ids to doc_ids."""
    texts: list[str] = []
    num_chars = 0
    for doc_id, text in documents:
        doc_ids.append(doc_id)
        texts.append(text)
        num_chars += len(text)
        if num_chars >= CHUNK_CHARS:
            yield texts
            texts = []
            num_chars = 0
    yield texts


class _CorpusTokens(NamedTuple):
    """The tokens of the corpus, terms in ascending order."""

    terms: list[str]  # V
    tokens: np.ndarray  # (N,) int32, term ids
    lengths: np.ndarray  # (D,) int64, tokens of each document


def _assemble_index(
    meta: dict[str, Any],
    doc_ids: list[str],
    chunks: Iterable[TokenizedTexts],
    numba: bool,
    source: str = "texts",
) -> BM25Index:
    """Build the index of tokenized chunks; doc_ids may still grow while the chunks are read."""
    corpus = _merge_chunks(chunks, source)
    row_order = sorted(range(len(doc_ids)), key=doc_ids.__getitem__)
    order = np.array(row_order)
    offsets, docs, tf = build_postings(
        corpus.tokens, corpus.lengths, order, len(corpus.terms), numba
    )
    meta.update(documents=len(doc_ids), tokens=len(corpus.tokens), dropped=[0])
    impacts = compute_impacts(_get_parameters(meta), offsets, docs, tf, corpus.lengths[order])
    return BM25Index(
        meta=meta,
        doc_ids=StringTable.of(doc_ids[i] for i in row_order),
        terms=StringTable.of(corpus.terms),
        offsets=offsets,
        docs=docs,
        impacts=impacts,
    )


def _merge_chunks(chunks: Iterable[TokenizedTexts], source: str) -> _CorpusTokens:
    """Give the chunks' tokens one numbering. Raises ValueError where there is no token at all."""
    first_seen: dict[str, int] = {}  # terms in the order in which they occur first
    token_chunks = []
    length_chunks = []
    for chunk in chunks:
        term_ids = [first_seen.setdefault(term, len(first_seen)) for term in chunk.terms]
        chunk_tokens = np.frombuffer(chunk.tokens, np.int32)
        token_chunks.append(np.array(term_ids, np.int32)[chunk_tokens])
        length_chunks.append(np.frombuffer(chunk.lengths, np.int32))
    tokens = np.concatenate(token_chunks)
    token_chunks.clear()  # a large corpus need not be in memory three times
    lengths = np.concatenate(length_chunks).astype(np.int64)
    if not len(tokens):
        raise ValueError(
            f"{source}: no document has a token (stop words are none), "
            "so there is nothing to search"
        )

    # Renumber the terms in ascending order; str order is UTF-8 byte order.
    terms = sorted(first_seen)
    old_ids = [first_seen[term] for term in terms]
    new_id = np.empty(len(terms), np.int32)
    new_id[old_ids] = np.arange(len(terms))
    return _CorpusTokens(terms, new_id[tokens], lengths)


def _get_inode(directory: Path) -> int | None:
    """Return the number that the file system has for a directory; None: there is none."""
    try:
        return directory.stat().st_ino
    except FileNotFoundError:
        return None


def _read_meta(directory: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return index.json and its checksums. Raises FileNotFoundError, IndexRefused."""
    try:
        meta = json.loads((directory / "index.json").read_text())
        crc32 = meta.pop("crc32")
        version = meta["format"]
        if version == FORMAT and crc32["index.json"] != _compute_crc32(meta):
            raise ValueError
    except FileNotFoundError:
        raise FileNotFoundError(f"{directory}: holds no BM25 index (no index.json)") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise IndexRefused(f"{directory / 'index.json'} is torn") from None
    if version != FORMAT:
        raise IndexRefused(
            f"{directory} holds an index in format {version}; this version reads {FORMAT}"
        )
    return meta, crc32


def _map_array(path: Path, crc32: dict[str, int]) -> np.ndarray:
    """Map an array from its file. Raises IndexRefused for one that is not as it was written."""
    # The checksum is of what was opened: another process may be replacing the directory.
    # Mode "c" is private and writable, as torch wants its memory; nobody writes, so all share the
    # file's pages.
    try:
        values = np.load(path, mmap_mode="c", allow_pickle=False)
        is_intact = zlib.crc32(values) == crc32[path.name]
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        is_intact = False
    if not is_intact:
        raise IndexRefused(f"{path} is not as it was written")
    return np.asarray(values)


def _refuse_foreign_files(directory: Path) -> None:
    """Raise ValueError where the directory holds more than the files of an index."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:  # none yet, or another process is just replacing it
        return
    foreign = set(names) - {*FILES, *FILES_OF_FORMAT_1}
    if foreign:
        raise ValueError(
            f"{directory}: {min(foreign)} is not part of an index; "
            "give the index a directory of its own"
        )


def _replace_directory(directory: Path, temporary: Path) -> None:
    """Rename temporary to directory, after moving an older index out of the way.

    Another process may be doing the same.
    """
    while True:
        try:
            os.rename(temporary, directory)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent)
        try:
            os.rename(directory, old)  # a directory may be renamed onto an empty one
        except FileNotFoundError:  # the other process moved it first
            pass
        shutil.rmtree(old)
