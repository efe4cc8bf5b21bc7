"""Text -> numbers of tokens, on all cores: each `python -m recr1.retrieval.tokenise` is one worker,
fed through its pipes.

Processes of their own and not multiprocessing's: those import the training script again (torch,
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
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from queue import SimpleQueue

from recr1.retrieval.bm25.analyzer import analyze

CHUNK_CHARS = 1 << 20  # characters that a worker is given at once


class WorkerLost(ValueError):
    """A worker ended before it had answered."""


def tokenize_texts(texts: list[str]) -> tuple[list[str], array, array]:
    """(the distinct tokens of these texts, all their tokens as numbers of that list, how many each
    text has).
    """
    terms = {}
    numbers = array("i")
    lengths = array("i")
    for text in texts:
        found = [terms.setdefault(token, len(terms)) for token in analyze(text)]
        numbers.extend(found)
        lengths.append(len(found))
    return list(terms), numbers, lengths


def tokenize_chunks(
    chunks: Iterable[list[str]], processes: int
) -> Iterator[tuple[list[str], array, array]]:
    """`encode` of every chunk, in order. Few chunks are in flight, however long the corpus is."""
    chunks = iter(chunks)
    first = list(islice(chunks, 4))  # little text: workers would still be starting when it is done
    if len(first) < 4 or processes == 1:
        yield from map(tokenize_texts, chain(first, chunks))
        return
    workers = []
    idle = SimpleQueue()
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, sys.path)))

    def ask(texts):
        worker = idle.get()
        try:
            pickle.dump(texts, worker.stdin, pickle.HIGHEST_PROTOCOL)
            worker.stdin.flush()
            answer = pickle.load(worker.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise WorkerLost(
                "a process that analyses the corpus has ended, perhaps for lack of memory; run the same command again"
            ) from None
        finally:
            idle.put(worker)
        return answer

    pool = ThreadPoolExecutor(processes)
    try:
        for _ in range(processes):
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", __name__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                )
            )
            idle.put(workers[-1])
        waiting = deque(pool.submit(ask, chunk) for chunk in first)
        for chunk in chunks:
            waiting.append(pool.submit(ask, chunk))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for worker in workers:
            worker.kill()  # whoever still waits for an answer gets none
            worker.wait()
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.stdout.close()
            try:
                worker.stdin.close()
            except OSError:  # what it was still to read
                pass


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the parent decides
    while True:
        try:
            texts = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(tokenize_texts(texts), sys.stdout.buffer, pickle.HIGHEST_PROTOCOL)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
