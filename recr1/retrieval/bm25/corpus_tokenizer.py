"""Tokenize a corpus on all cores.

Each `python -m recr1.retrieval.bm25.corpus_tokenizer` is one worker, fed through its pipes. They
are processes of their own and not multiprocessing's: those import the training script again (torch,
seconds each), or fork a process that has threads.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from queue import SimpleQueue
from typing import NamedTuple

from recr1.retrieval.bm25.analyzer import analyze

CHUNK_CHARS = 1 << 20  # characters that a worker is given at once

# little text: workers would still be starting when it is tokenized
MIN_CHUNKS_FOR_WORKERS = 4


class WorkerLost(ValueError):
    """Report that a worker ended before it had answered."""


class TokenizedTexts(NamedTuple):
    """The tokens of some texts."""

    terms: list[str]  # the distinct tokens
    tokens: array  # int32, all tokens of all texts, as indices of `terms`
    lengths: array  # int32, how many tokens each text has


def tokenize_texts(texts: list[str]) -> TokenizedTexts:
    """Tokenize texts; terms are numbered in the order in which they first occur."""
    term_ids: dict[str, int] = {}
    tokens = array("i")
    lengths = array("i")
    for text in texts:
        text_tokens = [term_ids.setdefault(token, len(term_ids)) for token in analyze(text)]
        tokens.extend(text_tokens)
        lengths.append(len(text_tokens))
    return TokenizedTexts(list(term_ids), tokens, lengths)


def tokenize_chunks(chunks: Iterable[list[str]], num_workers: int) -> Iterator[TokenizedTexts]:
    """Yield `tokenize_texts` of every chunk, in order.

    Few chunks are in flight, however long the corpus is. Raises WorkerLost.
    """
    chunks = iter(chunks)
    first_chunks = list(islice(chunks, MIN_CHUNKS_FOR_WORKERS))
    if len(first_chunks) < MIN_CHUNKS_FOR_WORKERS or num_workers == 1:
        yield from map(tokenize_texts, chain(first_chunks, chunks))
        return

    workers = _Workers(num_workers)
    try:
        workers.start()
        pending = deque(workers.submit(chunk) for chunk in first_chunks)
        for chunk in chunks:
            pending.append(workers.submit(chunk))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        workers.close()


class _Workers:
    """Run worker processes, with one thread per process that waits for its answers."""

    def __init__(self, num_workers: int):
        self.num_workers = num_workers
        self.processes: list[subprocess.Popen] = []
        self.idle: SimpleQueue[subprocess.Popen] = SimpleQueue()
        self.threads = ThreadPoolExecutor(num_workers)

    def start(self) -> None:
        import_path = [folder for folder in sys.path if folder]
        environment = os.environ | dict(PYTHONPATH=os.pathsep.join(import_path))
        for _ in range(self.num_workers):
            process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            self.processes.append(process)
            self.idle.put(process)

    def submit(self, texts: list[str]) -> Future[TokenizedTexts]:
        return self.threads.submit(self._tokenize, texts)

    def close(self) -> None:
        """End all processes and threads, whatever they are at."""
        for process in self.processes:
            process.kill()  # a thread that still waits for an answer gets none
            process.wait()
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            assert process.stdout is not None and process.stdin is not None  # pipes
            process.stdout.close()
            try:
                process.stdin.close()
            except OSError:  # the process ended before it had read all of its input
                pass

    def _tokenize(self, texts: list[str]) -> TokenizedTexts:
        """Let an idle worker tokenize the texts. Raises WorkerLost."""
        process = self.idle.get()
        assert process.stdout is not None and process.stdin is not None  # pipes
        try:
            pickle.dump(texts, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            return TokenizedTexts(*pickle.load(process.stdout))
        except (EOFError, OSError, pickle.UnpicklingError):
            raise WorkerLost(
                "a process that analyses the corpus has ended, perhaps for lack of memory; "
                "run the same command again"
            ) from None
        finally:
            self.idle.put(process)


def main() -> None:
    """Work: read lists of texts from standard input, write their tokens to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the parent decides
    while True:
        try:
            texts = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        # a plain tuple: here TokenizedTexts is __main__'s, which the parent could not unpickle
        tokenized = tuple(tokenize_texts(texts))
        pickle.dump(tokenized, sys.stdout.buffer, pickle.HIGHEST_PROTOCOL)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
