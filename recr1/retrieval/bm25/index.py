"""The BM25 index: its arrays, how they are made from a corpus, and the directory that they are
mapped from.

A directory is written under another name and renamed last: what has the name is whole. index.json
says what the index was made from and has a checksum of every file; an index of something else, or a
torn one, is refused with the command that makes it anew.
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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from recr1.data import readers
from recr1.retrieval.bm25 import analyzer
from recr1.retrieval.bm25.corpus_tokenizer import CHUNK_CHARS, tokenize_chunks
from recr1.retrieval.bm25.impacts import BM25Parameters, build_postings, compute_impacts
from recr1.retrieval.bm25.string_table import StringTable
from recr1.utils.files import sync_to_disk

FORMAT = 2

ARRAYS = ("doc_ids", "doc_id_offsets", "terms", "term_offsets", "offsets", "docs", "impacts")

FILES = ("index.json", *(f"{name}.npy" for name in ARRAYS))


class IndexRefused(ValueError):
    """The directory holds an index that is torn, or was made from something else. The message says
    how to make it anew.
    """


@dataclass
class BM25Index:
    """D documents, V terms, P postings. Rows are the documents in ascending order of their ids,
    terms ascend too.

    meta      what the index was made from
    doc_ids   D strings: equal scores are ranked by id (Lucene's rule), and that is the row order
    terms     V strings
    offsets   (V + 1,) int64; the postings of term t are offsets[t]:offsets[t + 1]
    docs      (P,) int32 rows, ascending within a term
    impacts   (P,) float32, what one occurrence of the term in a query adds to the document's score
    """

    meta: dict
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
    ) -> "BM25Index":
        """Raises ValueError for ids that repeat, an empty corpus, or no token in all of it."""
        if len(doc_ids) != len(texts):
            raise ValueError(
                f"doc_ids and texts must be of the same length, got {len(doc_ids)} and {len(texts)}"
            )
        if not len(doc_ids):
            raise ValueError("doc_ids: the corpus is empty; BM25 needs at least one document")
        if len(set(doc_ids)) < len(doc_ids):
            ordered = sorted(doc_ids)
            twice = next(a for a, b in zip(ordered, ordered[1:]) if a == b)
            raise ValueError(
                f"doc_ids: {twice!r} stands there twice; every document needs its own id"
            )
        return _assemble_index(
            _make_meta(parameters), list(doc_ids), tokenize_chunks([list(texts)], 1), numba
        )

    @classmethod
    def of_file(
        cls,
        corpus: str | os.PathLike,
        parameters: BM25Parameters,
        on_bad_line: str = "stop",
        numba: bool = False,
    ) -> "BM25Index":
        """Streams the corpus, JSONL[.gz], and analyses it on all cores. Raises DataError for what
        cannot be read, ValueError for no token in it all.
        """
        doc_ids = []
        dropped = []
        with tqdm(
            total=os.path.getsize(corpus) if os.path.exists(corpus) else None,
            desc="index",
            unit="B",
            unit_scale=True,
            disable=None,
            leave=False,
        ) as bar:

            def chunks():
                texts = []
                characters = 0
                for doc_id, text in readers.iterate_documents(
                    corpus, on_bad_line, dropped, lambda place: bar.update(place - bar.n)
                ):
                    doc_ids.append(doc_id)
                    texts.append(text)
                    characters += len(text)
                    if characters >= CHUNK_CHARS:
                        yield texts
                        texts = []
                        characters = 0
                yield texts

            meta = _make_meta(parameters, hash_file(corpus))
            index = _assemble_index(
                meta,
                doc_ids,
                tokenize_chunks(chunks(), len(os.sched_getaffinity(0))),
                numba,
                os.fspath(corpus),
            )
        meta["dropped"] = [len(dropped), *dropped[:1]]
        return index

    def save(self, directory: str | Path) -> None:
        """Takes the directory's place at once, an older index's too. Raises ValueError if the
        directory holds files of something else, OSError.
        """
        directory = Path(directory).resolve()
        try:
            there = os.listdir(directory)
        except FileNotFoundError:  # none yet, or another process is just replacing it
            there = []
        # of an index in this or an earlier format: its files and nothing else
        for name in sorted(set(there) - {*FILES, "doc_ids.json", "terms.json"}):
            raise ValueError(
                f"{directory}: {name} is not part of an index; give the index a directory of its own"
            )
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            arrays = (
                self.doc_ids.text,
                self.doc_ids.offsets,
                self.terms.text,
                self.terms.offsets,
                self.offsets,
                self.docs,
                self.impacts,
            )
            for name, values in zip(FILES[1:], arrays):
                np.save(temporary / name, values, allow_pickle=False)
                sync_to_disk(temporary / name)
            crc32 = {name: zlib.crc32(values) for name, values in zip(FILES[1:], arrays)} | {
                "index.json": _compute_crc32(self.meta)
            }
            (temporary / "index.json").write_text(
                json.dumps({**self.meta, "crc32": crc32}, indent=1)
            )
            sync_to_disk(temporary / "index.json")
            os.chmod(temporary, 0o755)  # mkdtemp's 0o700 would hide the cache
            _replace_directory(directory, temporary)
            sync_to_disk(directory.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def load(cls, directory: str | Path) -> "BM25Index":
        """The arrays stay in their files and are mapped: processes share one copy. Raises
        FileNotFoundError if there is no index, IndexRefused.
        """
        directory = Path(directory)
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
        arrays = []
        for name in FILES[1:]:
            # the checksum is of what was opened: another process may be replacing the directory
            try:
                # "c": private and writable, as torch wants its memory; nobody writes, so all share
                # the file's pages
                values = np.load(directory / name, mmap_mode="c", allow_pickle=False)
                whole = zlib.crc32(values) == crc32[name]
            except (OSError, EOFError, ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                raise IndexRefused(f"{directory / name} is not as it was written")
            arrays.append(np.asarray(values))
        return cls(meta, StringTable(*arrays[:2]), StringTable(*arrays[2:4]), *arrays[4:])


def open_or_build(
    directory: str | Path,
    corpus: str | os.PathLike,
    parameters: BM25Parameters,
    on_bad_line: str = "stop",
    numba: bool = False,
) -> BM25Index:
    """The index of this corpus in this directory; made and saved first where there is none. Raises
    IndexRefused, DataError, ValueError, OSError.
    """
    command = " ".join(
        [
            "recr1 index --corpus",
            shlex.quote(os.fspath(corpus)),
            "--index-dir",
            shlex.quote(str(directory)),
            *(
                f"--{f.name} {getattr(parameters, f.name)}"
                for f in fields(BM25Parameters)
                if getattr(parameters, f.name) != f.default
            ),
            *["--on-bad-line drop"] * (on_bad_line == "drop"),
        ]
    )
    try:
        index = BM25Index.load(directory)
    except FileNotFoundError:
        BM25Index.of_file(corpus, parameters, on_bad_line, numba).save(directory)
        index = BM25Index.load(directory)
    except IndexRefused as e:
        raise IndexRefused(f"{e}; make the index anew: {command}") from None
    dropped = index.meta["dropped"]
    for key, wanted in _make_meta(parameters, hash_file(corpus)).items():
        if (found := index.meta[key]) != wanted:
            other = (
                "has changed since the index was made, or is another one"
                if key == "corpus"
                else f"is {wanted} here, {found} in the index"
            )
            raise IndexRefused(f"{directory}: {key} {other}; make the index anew: {command}")
    if dropped[0] and on_bad_line == "stop":
        raise IndexRefused(
            f"{directory}: {dropped[0]} bad lines were left out of this index, first: {dropped[1]}; "
            f"mend the corpus, then make the index anew: {command}"
        )
    return index


def hash_file(path: str | os.PathLike) -> str:
    """sha256 of a file's bytes. Raises DataError."""
    readers.check_readable(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compute_crc32(meta: dict) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _make_meta(parameters: BM25Parameters, corpus: str = "") -> dict:
    return dict(
        format=FORMAT, analyzer=analyzer.ANALYZER_VERSION, **asdict(parameters), corpus=corpus
    )


def _assemble_index(
    meta: dict, doc_ids: list[str], chunks: Iterable, numba: bool, what: str = "texts"
) -> BM25Index:
    """doc_ids may still grow while the chunks are read."""
    numbers = {}
    tokens = []
    lengths = []
    for terms, ids, counts in chunks:
        number = np.array([numbers.setdefault(term, len(numbers)) for term in terms], np.int32)
        tokens.append(number[np.frombuffer(ids, np.int32)])
        lengths.append(np.frombuffer(counts, np.int32))
    tokens = np.concatenate(tokens)
    lengths = np.concatenate(lengths).astype(np.int64)
    if not len(tokens):
        raise ValueError(
            f"{what}: no document has a token (stop words are none), so there is nothing to search"
        )
    terms = sorted(numbers)  # str order is UTF-8 byte order
    number = np.empty(len(terms), np.int32)
    number[[numbers[term] for term in terms]] = np.arange(len(terms))
    order = np.array(sorted(range(len(doc_ids)), key=doc_ids.__getitem__))
    offsets, docs, tf = build_postings(number[tokens], lengths, order, len(terms), numba)
    meta.update(documents=len(doc_ids), tokens=len(tokens), dropped=[0])
    parameters = BM25Parameters(**{f.name: meta[f.name] for f in fields(BM25Parameters)})
    return BM25Index(
        meta,
        StringTable.of(doc_ids[i] for i in order),
        StringTable.of(terms),
        offsets,
        docs,
        compute_impacts(parameters, offsets, docs, tf, lengths[order]),
    )


def _replace_directory(directory: Path, temporary: Path) -> None:
    """Rename temporary to directory, moving what is there out of the way; another process may be
    doing the same.
    """
    while True:
        try:
            return os.rename(temporary, directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent)
        try:
            os.rename(directory, old)  # an empty directory may be renamed onto
        except FileNotFoundError:  # the other process moved it first
            pass
        shutil.rmtree(old)
