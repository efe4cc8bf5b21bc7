"""Search documents by the inner product of their vectors with the query's.

The search is exact, or by FAISS's HNSW graph. A directory keeps what is expensive: `embeddings/`
(embeddings.npy, memory-mapped on load: the ranks of a machine share one copy) and `hnsw/` (the
graph with the vectors, mapped too), each sealed by a manifest and by facts.json, which says what it
was made from.

Legend: D documents, C width, Q queries, B blocks of documents.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from recr1.retrieval.dense.encoder import Encoder
from recr1.retrieval.interface import (
    RetrieverError,
    check_corpus,
    make_empty_result,
    select_nonempty,
)
from recr1.utils import files

# of the graph: edges of a node, candidates while it is built
M = 32

EF_CONSTRUCTION = 200

BLOCK = 64  # documents whose best score stands for them in the first pass of a top-k on a GPU

SCORES = 2**28  # scores in memory at once there

COPY_ROWS = 2**18  # vectors that are copied to a GPU at once, through host memory

MAX_FAISS_GPU_K = 2048

# vectors (Q, C), k <= D -> scores (Q, k), rows (Q, k)
VectorSearch = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]

Say = Callable[[str], object]


class DenseSearcher:
    """Implement the Retriever interface; rows are the documents in the order of the corpus."""

    def __init__(
        self,
        doc_ids: Sequence[str],
        encoder: Encoder,
        query_prefix: str,
        search_vectors: VectorSearch,
        description: str,
    ):
        self.doc_ids = doc_ids
        self.encoder = encoder
        self.query_prefix = query_prefix
        self._search_vectors = search_vectors
        self.description = description

    def search(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows (Q, k) int64 and cosines (Q, k) float32, best first.

        Past the last document the row is -1, the score -inf. Equal scores are ranked in the corpus'
        order. A query without any text has no hits. Raises ValueError for k < 1.
        """
        doc_rows, scores = make_empty_result(len(queries), k)
        nonempty = select_nonempty(queries)
        if nonempty:
            vectors = self._encode_queries([queries[index] for index in nonempty])
            hit_rows, hit_scores = self.nearest(vectors, k)
            num_places = hit_rows.shape[1]
            doc_rows[nonempty, :num_places] = hit_rows
            scores[nonempty, :num_places] = hit_scores
        return doc_rows, scores

    def nearest(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and cosines (Q, min(k, D)) of unit vectors (Q, C).

        A graph that finds fewer documents ends in row -1, score -inf.
        """
        num_docs = len(self.doc_ids)
        scores, doc_rows = self._search_vectors(vectors, min(k, num_docs))
        has_ties = (scores[:, 1:] == scores[:, :-1]).any(1)
        for query in np.flatnonzero(has_ties):
            # by score, then hits before -1, then row
            query_rows = doc_rows[query]
            order = np.lexsort((query_rows % num_docs, query_rows < 0, -scores[query]))
            doc_rows[query] = query_rows[order]
            scores[query] = scores[query, order]
        scores[doc_rows < 0] = -np.inf
        return doc_rows, scores

    def _encode_queries(self, queries: list[str]) -> np.ndarray:
        """Return (Q, C); a query that repeats is encoded once."""
        texts = [self.query_prefix + query for query in queries]
        unique_texts = list(dict.fromkeys(texts))
        position = {text: index for index, text in enumerate(unique_texts)}
        unique_vectors = self.encoder(unique_texts)
        return unique_vectors[[position[text] for text in texts]]


def load_or_build_dense(
    encoder: Encoder,
    doc_ids: Sequence[str],
    texts: Sequence[str],
    directory: str | Path | None = None,
    say: Say = print,
    *,
    prefixes: tuple[str, str] = ("", ""),
    index: str = "exact",
    ef_search: int = 512,
) -> DenseSearcher:
    """Return the dense index of D texts.

    What the directory holds is used if it is complete and made of exactly these texts, encoder and
    settings; what is not is named (`say`), made anew and replaced. A directory of None: nothing is
    kept. Raises ValueError, RetrieverError, files.WriteError.

    Args:
        prefixes: what is put before each query and before each document.
        index: "exact" or "hnsw".
        ef_search: candidates that a search of the graph keeps.
    """
    check_corpus(doc_ids, texts)
    if index == "hnsw" or encoder.device.type != "cuda":
        import_faiss().omp_set_num_threads(torch.get_num_threads())

    query_prefix, doc_prefix = prefixes
    graph = None
    if directory is None:
        embeddings = np.concatenate(list(_embed_texts(encoder, texts, doc_prefix)))
        if index == "hnsw":
            graph = _build_graph(embeddings)
    else:
        with _locked_directory(Path(directory), say):
            embeddings_folder = Path(directory) / "embeddings"
            manifest = _keep_embeddings(embeddings_folder, encoder, texts, doc_prefix, say)
            embeddings = np.load(embeddings_folder / "embeddings.npy", mmap_mode="r")
            if index == "hnsw":
                embeddings_hash = manifest["embeddings.npy"]["sha256"]
                graph = _keep_graph(Path(directory) / "hnsw", embeddings, embeddings_hash, say)

    if graph is not None:
        search_vectors = _make_graph_search(graph, ef_search)
        method = f"faiss HNSW, M {M}, efConstruction {EF_CONSTRUCTION}, efSearch {ef_search}"
    else:
        search_vectors, method = make_exact_search(embeddings, encoder.device)
    size = f"{len(doc_ids)} x {encoder.width}"
    description = f"{encoder.path} ({encoder.pooling}), {size}, {method}"
    return DenseSearcher(doc_ids, encoder, query_prefix, search_vectors, description)


def make_exact_search(embeddings: np.ndarray, device: torch.device) -> tuple[VectorSearch, str]:
    """Return a search by every inner product, and in words what computes them.

    That is faiss on the CPU or on its GPU, torch on a GPU that faiss does not see.
    """
    if device.type == "cpu":
        faiss = import_faiss()

        def search_mapped(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            # what IndexFlatIP.search calls, on the mapped file itself: the index would copy it
            return faiss.knn(vectors, embeddings, k, metric=faiss.METRIC_INNER_PRODUCT)

        return search_mapped, "exact, faiss"
    if not _has_faiss_gpu():
        return make_torch_search(embeddings, device), f"exact, torch on {device}"
    return _make_faiss_gpu_search(embeddings, device), f"exact, faiss on {device}"


def _make_faiss_gpu_search(embeddings: np.ndarray, device: torch.device) -> VectorSearch:
    """Search with faiss up to its limit of k, beyond it with torch."""
    faiss = import_faiss()
    config = faiss.GpuIndexFlatConfig()
    config.device = device.index or 0
    resources = faiss.StandardGpuResources()
    index = faiss.GpuIndexFlatIP(resources, embeddings.shape[1], config)
    for start in range(0, len(embeddings), COPY_ROWS):
        index.add(np.ascontiguousarray(embeddings[start : start + COPY_ROWS]))
    if len(embeddings) <= MAX_FAISS_GPU_K:
        return lambda vectors, k: index.search(vectors, k)

    search_beyond_limit = make_torch_search(embeddings, device)

    def search(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if k <= MAX_FAISS_GPU_K:
            return index.search(vectors, k)
        return search_beyond_limit(vectors, k)

    return search


def make_torch_search(embeddings: np.ndarray, device: torch.device) -> VectorSearch:
    """Return a search that computes every inner product, one matrix product per chunk of queries.

    The top-k has two levels and is exact: the k best documents lie in the k blocks with the best
    maxima, so only those are ranked.
    """
    num_docs, width = embeddings.shape
    padded_docs = -(-num_docs // BLOCK) * BLOCK  # full blocks
    padded = torch.zeros(padded_docs, width, device=device)
    for start in range(0, num_docs, COPY_ROWS):
        end = min(start + COPY_ROWS, num_docs)
        padded[start:end] = torch.tensor(embeddings[start:end], device=device)

    @torch.inference_mode()
    def search(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        score_chunks = []
        row_chunks = []
        chunk_size = max(1, SCORES // padded_docs)
        for chunk in torch.from_numpy(vectors).split(chunk_size):
            scores = chunk.to(device) @ padded.T  # (q, B * 64)
            scores[:, num_docs:] = -torch.inf
            best_scores, best_rows = _select_top_k(scores, k)
            score_chunks.append(best_scores.cpu().numpy())
            row_chunks.append(best_rows.cpu().numpy())
        return np.concatenate(score_chunks), np.concatenate(row_chunks)

    return search


def _select_top_k(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best k of scores (q, B * 64) and their columns, (q, k) each."""
    block_scores = scores.view(len(scores), -1, BLOCK)  # (q, B, 64)
    num_best = min(k, block_scores.shape[1])
    block_maxima = block_scores.amax(2)  # (q, B)
    best_blocks = block_maxima.topk(num_best, sorted=False).indices  # (q, up to k)

    gather_index = best_blocks[:, :, None].expand(-1, -1, BLOCK)
    candidates = block_scores.gather(1, gather_index).flatten(1)  # (q, up to k * 64)
    values, candidate = candidates.topk(k)
    block = best_blocks.gather(1, candidate // BLOCK)
    return values, block * BLOCK + candidate % BLOCK


def import_faiss() -> Any:
    """Return the module. Raises RetrieverError with the command that mends it."""
    packages = [name for name in ("faiss-cpu", "faiss-gpu") if _is_installed(name)]
    if len(packages) == 2:
        raise RetrieverError(
            "faiss-cpu and faiss-gpu are both installed and spoil each other: "
            "pip uninstall -y faiss-cpu faiss-gpu, then pip install one of them"
        )
    try:
        import faiss

        # what is left of an uninstalled one imports as an empty package
        _ = faiss.IndexHNSWFlat
    except (ImportError, AttributeError) as e:
        raise RetrieverError(
            f"retriever.kind=dense needs faiss ({e}): pip install faiss-cpu (or 'recr1[dense]'); "
            "if it is installed, pip uninstall -y faiss-cpu faiss-gpu first"
        ) from None
    return faiss


def _is_installed(name: str) -> bool:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return bool(version)


def _has_faiss_gpu() -> bool:
    return _is_installed("faiss-gpu") and import_faiss().get_num_gpus() > 0


def _make_graph_search(graph: Any, ef_search: int) -> VectorSearch:
    parameters = import_faiss().SearchParametersHNSW(efSearch=ef_search)
    return lambda vectors, k: graph.search(vectors, k, params=parameters)


def _build_graph(embeddings: np.ndarray) -> Any:
    """Build the HNSW graph over (D, C): Malkov and Yashunin, arXiv 1603.09320."""
    faiss = import_faiss()
    num_docs, width = embeddings.shape
    graph = faiss.IndexHNSWFlat(width, M, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = EF_CONSTRUCTION
    step = max(4096, num_docs // 100)
    for start in tqdm(range(0, num_docs, step), "hnsw", disable=None, leave=False):
        graph.add(np.ascontiguousarray(embeddings[start : start + step]))
    return graph


def _keep_graph(folder: Path, embeddings: np.ndarray, embeddings_hash: str, say: Say) -> Any:
    """Return the graph of the folder, mapped; build it where it is not of these embeddings."""
    facts = dict(format=1, embeddings=embeddings_hash, M=M, ef_construction=EF_CONSTRUCTION)

    def write(partial: Path) -> None:
        _write_graph(partial / "hnsw.faiss", embeddings)

    _open_or_make(folder, facts, say, write)
    faiss = import_faiss()
    return faiss.read_index(str(folder / "hnsw.faiss"), faiss.IO_FLAG_MMAP_IFC)


def _write_graph(path: Path, embeddings: np.ndarray) -> None:
    graph = _build_graph(embeddings)
    try:
        import_faiss().write_index(graph, str(path))
    except RuntimeError as e:  # faiss says so when a disk is full
        message = " ".join(str(e).split())
        raise files.WriteError(f"cannot write {path}: {message[:200]}") from None


def _keep_embeddings(
    folder: Path, encoder: Encoder, texts: Sequence[str], doc_prefix: str, say: Say
) -> dict[str, dict]:
    """Return the manifest of the folder; write it where it is not of these texts and encoder."""
    facts = dict(
        format=1,
        texts=_hash_texts(texts),
        encoder=encoder.digest,
        pooling=encoder.pooling,
        max_length=encoder.max_length,
        dtype=encoder.dtype,
        prefix=doc_prefix,
    )

    def write(partial: Path) -> None:
        _write_embeddings(partial / "embeddings.npy", encoder, texts, doc_prefix)

    return _open_or_make(folder, facts, say, write)


def _embed_texts(encoder: Encoder, texts: Sequence[str], prefix: str) -> Iterator[np.ndarray]:
    """Yield the vectors of the documents window by window."""
    documents = [prefix + text for text in texts] if prefix else texts
    with tqdm(total=len(texts), desc="encode", unit=" documents", disable=None, leave=False) as bar:
        yield from encoder.windows(documents, bar.update)


def _write_embeddings(path: Path, encoder: Encoder, texts: Sequence[str], prefix: str) -> None:
    """Write the vectors in order, not through a map: a full disk is then an error, not a SIGBUS."""
    header = dict(descr="<f4", fortran_order=False, shape=(len(texts), encoder.width))
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for vectors in _embed_texts(encoder, texts, prefix):
            file.write(vectors.tobytes())


def _hash_texts(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


@contextmanager
def _locked_directory(directory: Path, say: Say) -> Iterator[None]:
    """Keep other processes from building in the directory, which is made where it is missing.

    Raises ValueError if it holds files of something else.
    """
    with files.report_write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    _refuse_foreign_files(directory)
    with files.report_write_errors(directory), open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"recr1: {directory}: another process is at it; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _refuse_foreign_files(directory: Path) -> None:
    """Raise ValueError where the directory holds more than a dense index."""
    known = {".lock"}
    for name in ("embeddings", "hnsw"):
        known |= {name, name + files.PARTIAL, name + ".old" + files.PARTIAL}
    names = {path.name for path in directory.iterdir()}
    foreign = names - known
    if foreign:
        raise ValueError(
            f"{directory}: {min(foreign)} is not part of a dense index; "
            "give the index a directory of its own (retriever.index_dir)"
        )


def _open_or_make(
    folder: Path, facts: dict[str, Any], say: Say, write: Callable[[Path], None]
) -> dict[str, dict]:
    """Return the manifest of `folder`, once it is complete and of these facts.

    Where it is not, `say` is told why and `write` fills it anew.
    """
    if folder.exists() or folder.is_symlink():
        try:
            manifest = files.read_manifest(folder)
            for name, entry in manifest.items():
                files.check_file(folder, name, entry)
            stored = files.read_json(folder / "facts.json")
            differences = _describe_differences(stored, facts)
            if not differences:
                return manifest
            reason = "was made with " + ", ".join(differences)
        except (files.Damaged, AttributeError, OSError) as e:
            reason = f"is damaged: {e}"
        say(f"recr1: {folder} {reason}; it is made anew")

    partial = folder.with_name(folder.name + files.PARTIAL)
    with files.report_write_errors(folder):
        if partial.exists():
            files.remove_path(partial)
        partial.mkdir()
        write(partial)
        facts_text = json.dumps(facts, indent=1) + "\n"
        (partial / "facts.json").write_text(facts_text, encoding="utf-8")
        files.write_manifest(partial, {}, folder)
    return files.read_manifest(folder)


def _describe_differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Say for each fact that differs what was stored; long ones (hashes) are only named."""
    descriptions = []
    for key in sorted(wanted.keys() | stored.keys()):
        stored_value = stored.get(key)
        wanted_value = wanted.get(key)
        if stored_value == wanted_value:
            continue
        if len(str(stored_value)) > 40:
            descriptions.append(f"another {key}")
        else:
            descriptions.append(f"{key} {stored_value!r}, not {wanted_value!r}")
    return descriptions
