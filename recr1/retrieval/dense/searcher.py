"""Dense retrieval: the documents whose vectors have the largest inner product with the query's,
exactly or by FAISS's HNSW graph.

A directory keeps what is dear: `embeddings/` (embeddings.npy, memory-mapped on load: the ranks of a
machine share one copy) and `hnsw/` (the graph with the vectors, mapped too), each sealed by a
manifest and by facts.json, which says what it was made from.

Legend: D documents, C width, Q queries.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from recr1.retrieval.dense.encoder import Encoder
from recr1.retrieval.interface import RetrieverError, check_corpus, make_empty_result
from recr1.utils import files

# of the graph: edges of a node, candidates while it is built
M = 32

EF_CONSTRUCTION = 200

BLOCK = 64  # documents whose best score stands for them in the first pass of a top-k on a GPU

SCORES = 2**28  # scores in memory at once there

# vectors (Q, C), k <= D -> scores (Q, k), rows (Q, k)
Nearest = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


class DenseSearcher:
    """A Retriever. Rows are the documents in the order in which they came. `how`: what searches, in
    words.
    """

    def __init__(
        self,
        doc_ids: Sequence[str],
        encoder: Encoder,
        query_prefix: str,
        nearest: Nearest,
        how: str,
    ):
        self.doc_ids = doc_ids
        self.encoder = encoder
        self.query_prefix = query_prefix
        self._nearest = nearest
        self.description = how

    def search(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Q texts -> rows (Q, k) int64 and cosines (Q, k) float32, best first; past the last
        document row -1, score -inf.

        Equal scores stand in the corpus' order. A query without any text has no hits. Raises
        ValueError for k < 1.
        """
        rows, scores = make_empty_result(len(queries), k)
        asked = [i for i, query in enumerate(queries) if query.strip()]
        if asked:
            texts = {self.query_prefix + queries[i]: None for i in asked}  # each text once
            place = {text: n for n, text in enumerate(texts)}
            vectors = self.encoder(list(texts))[
                [place[self.query_prefix + queries[i]] for i in asked]
            ]
            found_rows, found_scores = self.nearest(vectors, k)
            rows[asked, : found_rows.shape[1]], scores[asked, : found_rows.shape[1]] = (
                found_rows,
                found_scores,
            )
        return rows, scores

    def nearest(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors (Q, C) -> rows and cosines (Q, min(k, D)); a graph that finds fewer ends in
        row -1, score -inf.
        """
        scores, rows = self._nearest(vectors, min(k, len(self.doc_ids)))
        for i in np.flatnonzero((scores[:, 1:] == scores[:, :-1]).any(1)):
            order = np.lexsort((rows[i] % len(self.doc_ids), rows[i] < 0, -scores[i]))
            rows[i], scores[i] = rows[i, order], scores[i, order]
        scores[rows < 0] = -np.inf
        return rows, scores


def load_or_build_dense(
    encoder: Encoder,
    doc_ids: Sequence[str],
    texts: Sequence[str],
    directory: str | Path | None = None,
    say: Callable[[str], None] = print,
    *,
    prefixes: tuple[str, str] = ("", ""),
    index: str = "exact",
    ef_search: int = 512,
) -> DenseSearcher:
    """The dense index of D texts. What lies in the directory is used if it is whole and made of
    exactly these texts, encoder and settings; what is not is named (`say`), made anew and replaced.
    None: nothing is kept. Raises ValueError, RetrieverError, files.WriteError.
    """
    check_corpus(doc_ids, texts)
    on_gpu = encoder.device.type == "cuda"
    if index == "hnsw" or not on_gpu:
        import_faiss().omp_set_num_threads(torch.get_num_threads())
    facts = dict(
        format=1,
        texts=_hash_texts(texts),
        encoder=encoder.digest,
        pooling=encoder.pooling,
        max_length=encoder.max_length,
        dtype=encoder.dtype,
        prefix=prefixes[1],
    )
    if directory is None:
        embeddings = np.concatenate(list(_embed_texts(encoder, texts, prefixes[1])))
        graph = _build_graph(embeddings) if index == "hnsw" else None
    else:
        with _locked_directory(Path(directory), say) as place:
            made = _open_or_make(
                place / "embeddings",
                facts,
                say,
                lambda folder: _write_embeddings(
                    folder / "embeddings.npy", encoder, texts, prefixes[1]
                ),
            )
            embeddings = np.load(place / "embeddings/embeddings.npy", mmap_mode="r")
            graph = None
            if index == "hnsw":
                _open_or_make(
                    place / "hnsw",
                    dict(
                        format=1,
                        embeddings=made["embeddings.npy"]["sha256"],
                        M=M,
                        ef_construction=EF_CONSTRUCTION,
                    ),
                    say,
                    lambda folder: _write_graph(folder / "hnsw.faiss", embeddings),
                )
                graph = import_faiss().read_index(
                    str(place / "hnsw/hnsw.faiss"), import_faiss().IO_FLAG_MMAP_IFC
                )
    if graph is not None:
        nearest = _make_graph_search(graph, ef_search)
        how = f"faiss HNSW, M {M}, efConstruction {EF_CONSTRUCTION}, efSearch {ef_search}"
    else:
        nearest, how = make_exact_search(embeddings, encoder.device)
    return DenseSearcher(
        doc_ids,
        encoder,
        prefixes[0],
        nearest,
        f"{encoder.path} ({encoder.pooling}), {len(doc_ids)} x {encoder.width}, {how}",
    )


def make_exact_search(embeddings: np.ndarray, device: torch.device) -> tuple[Nearest, str]:
    """Every inner product, and what computes them: faiss on the CPU or on its GPU, torch on a GPU
    that faiss does not see.
    """
    if device.type == "cpu":
        metric = import_faiss().METRIC_INNER_PRODUCT
        # what IndexFlatIP.search calls, on the mapped file itself: the index would copy it
        return lambda vectors, k: import_faiss().knn(
            vectors, embeddings, k, metric=metric
        ), "exact, faiss"
    if not _has_faiss_gpu():
        return make_torch_search(embeddings, device), f"exact, torch on {device}"
    where = import_faiss().GpuIndexFlatConfig()
    where.device = device.index or 0
    index = import_faiss().GpuIndexFlatIP(
        import_faiss().StandardGpuResources(), embeddings.shape[1], where
    )
    for start in range(0, len(embeddings), 2**18):  # a slice at a time through host memory
        index.add(np.ascontiguousarray(embeddings[start : start + 2**18]))
    most = 2048  # faiss' limit of k on a GPU
    beyond = make_torch_search(embeddings, device) if len(embeddings) > most else None
    return (
        lambda vectors, k: index.search(vectors, k) if k <= most else beyond(vectors, k),
        f"exact, faiss on {device}",
    )


def make_torch_search(embeddings: np.ndarray, device: torch.device) -> Nearest:
    """Every inner product by one product of matrices per chunk of queries; a two-level top-k,
    exact: the k best documents lie in the k blocks with the best maxima, so only those are ranked.
    """
    D = len(embeddings)
    padded = torch.zeros(-(-D // BLOCK) * BLOCK, embeddings.shape[1], device=device)  # whole blocks
    for start in range(0, D, 2**18):
        padded[start : start + 2**18][: len(embeddings[start : start + 2**18])] = torch.tensor(
            embeddings[start : start + 2**18], device=device
        )

    @torch.inference_mode()
    def nearest(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for part in torch.from_numpy(vectors).split(max(1, SCORES // len(padded))):
            scores = part.to(device) @ padded.T  # (q, D padded)
            scores[:, D:] = -torch.inf
            blocks = scores.view(len(part), -1, BLOCK)  # (q, B, 64)
            # (q, up to k)
            best = blocks.amax(2).topk(min(k, blocks.shape[1]), sorted=False).indices
            # (q, up to k * 64)
            inside = blocks.gather(1, best[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
            values, at = inside.topk(k)
            found.append(
                (
                    values.cpu().numpy(),
                    (best.gather(1, at // BLOCK) * BLOCK + at % BLOCK).cpu().numpy(),
                )
            )
        return tuple(np.concatenate(column) for column in zip(*found))

    return nearest


def import_faiss():
    """The module. Raises RetrieverError with the command that mends it."""
    clash = [name for name in ("faiss-cpu", "faiss-gpu") if _is_installed(name)]
    if len(clash) == 2:
        raise RetrieverError(
            "faiss-cpu and faiss-gpu are both installed and spoil each other: pip uninstall -y faiss-cpu faiss-gpu, then pip install one of them"
        )
    try:
        import faiss as module

        module.IndexHNSWFlat  # what is left of an uninstalled one imports as an empty package
    except (ImportError, AttributeError) as e:
        raise RetrieverError(
            f"retriever.kind=dense needs faiss ({e}): pip install faiss-cpu (or 'recr1[dense]'); "
            "if it is installed, pip uninstall -y faiss-cpu faiss-gpu first"
        ) from None
    return module


def _is_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def _has_faiss_gpu() -> bool:
    return _is_installed("faiss-gpu") and import_faiss().get_num_gpus() > 0


def _make_graph_search(graph, ef_search: int) -> Nearest:
    parameters = import_faiss().SearchParametersHNSW(efSearch=ef_search)
    return lambda vectors, k: graph.search(vectors, k, params=parameters)


def _build_graph(embeddings: np.ndarray):
    """HNSW over (D, C): Malkov and Yashunin, arXiv 1603.09320."""
    graph = import_faiss().IndexHNSWFlat(
        embeddings.shape[1], M, import_faiss().METRIC_INNER_PRODUCT
    )
    graph.hnsw.efConstruction = EF_CONSTRUCTION
    step = max(4096, len(embeddings) // 100)
    for start in tqdm(range(0, len(embeddings), step), "hnsw", disable=None, leave=False):
        graph.add(np.ascontiguousarray(embeddings[start : start + step]))
    return graph


def _write_graph(path: Path, embeddings: np.ndarray) -> None:
    graph = _build_graph(embeddings)
    try:
        import_faiss().write_index(graph, str(path))
    except RuntimeError as e:  # faiss says so when a disk is full
        raise files.WriteError(f"cannot write {path}: {' '.join(str(e).split())[:200]}") from None


def _embed_texts(encoder: Encoder, texts: Sequence[str], prefix: str) -> Iterator[np.ndarray]:
    with tqdm(total=len(texts), desc="encode", unit=" documents", disable=None, leave=False) as bar:
        yield from encoder.windows(
            [prefix + text for text in texts] if prefix else texts, bar.update
        )


def _write_embeddings(path: Path, encoder: Encoder, texts: Sequence[str], prefix: str) -> None:
    """Written in order, not through a map: a full disk is then an error and not a SIGBUS."""
    with open(path, "wb") as f:
        np.lib.format.write_array_header_1_0(
            f, dict(descr="<f4", fortran_order=False, shape=(len(texts), encoder.width))
        )
        for vectors in _embed_texts(encoder, texts, prefix):
            f.write(vectors.tobytes())


def _hash_texts(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


@contextmanager
def _locked_directory(directory: Path, say: Callable[[str], None]):
    """The directory, with no other process building in it. Raises ValueError if it holds files of
    something else.
    """
    with files.report_write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    ours = {
        name + end
        for name in ("embeddings", "hnsw")
        for end in ("", files.PARTIAL, ".old" + files.PARTIAL)
    } | {".lock"}
    for name in sorted(p.name for p in directory.iterdir() if p.name not in ours):
        raise ValueError(
            f"{directory}: {name} is not part of a dense index; give the index a directory of its own (retriever.index_dir)"
        )
    with files.report_write_errors(directory), open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"recr1: {directory}: another process is at it; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory


def _open_or_make(
    folder: Path, facts: dict, say: Callable[[str], None], make: Callable[[Path], None]
) -> dict[str, dict]:
    """The manifest of `folder`, which is whole and of these facts: it was, or `make` fills it anew,
    and `say` hears why.
    """
    if folder.exists() or folder.is_symlink():
        try:
            found = files.read_manifest(folder)
            for name, entry in found.items():
                files.check_file(folder, name, entry)
            stored = files.read_json(folder / "facts.json")
            other = sorted(
                key for key in facts.keys() | stored.keys() if facts.get(key) != stored.get(key)
            )
            if not other:
                return found
            why = "was made with " + ", ".join(
                f"another {key}"
                if len(str(stored.get(key))) > 40
                else f"{key} {stored.get(key)!r}, not {facts.get(key)!r}"
                for key in other
            )
        except (files.Damaged, AttributeError, OSError) as e:
            why = f"is damaged: {e}"
        say(f"recr1: {folder} {why}; it is made anew")
    partial = folder.with_name(folder.name + files.PARTIAL)
    with files.report_write_errors(folder):
        if partial.exists():
            files.remove_path(partial)
        partial.mkdir()
        make(partial)
        (partial / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        files.write_manifest(partial, {}, folder)
    return files.read_manifest(folder)
