"""Jobs of several ranks, forked from this process: it has imported everything once, so that a job
starts in a second.

The parent only imports and waits: it must not compute with torch, whose threads a fork does not
take along.
"""

import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

# what a run imports where it needs it
import nltk.stem.porter  # noqa: F401
import transformers.models.auto.tokenization_auto  # noqa: F401

from recr1 import train
from recr1.distributed import heartbeat
from recr1.training.launch import run_guarded
from recr1.utils.interrupts import signal_handlers


class Job:
    """`argv` of recr1.train on `ranks` processes, as torchrun would start them. prepare(rank) runs
    in each before it starts.

    slow: how many times as long as on a machine of its own everything may take.
    """

    def __init__(self, argv: list[str], ranks: int = 2, prepare=None, slow: float = 1.0):
        self.slow = slow
        self.folder = Path(
            next(a for a in reversed(argv) if a.startswith("run.dir=")).removeprefix("run.dir=")
        )
        # a pipe: a limit on the size of files does not touch what the ranks say
        self.output, out = os.pipe()
        os.set_blocking(self.output, False)
        self.heard = b""
        self.codes: dict[int, int | None] = dict.fromkeys(range(ranks))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.pids = [
            os.fork() or _rank(rank, ranks, port, argv, out, prepare) for rank in range(ranks)
        ]
        os.close(out)

    def running(self) -> bool:
        self._listen()
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return None in self.codes.values()

    def kill(self, how: int = signal.SIGKILL, ranks=None) -> None:
        """Sends a signal to those of `ranks` (all) that still run."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if self.running() and self.codes[rank] is None:
                os.kill(self.pids[rank], how)

    def wait(self, limit: float) -> list[int] | None:
        """Exit codes by rank; None if it still ran after `limit` seconds and had to be killed."""
        deadline = time.monotonic() + limit
        while self.running():
            if time.monotonic() > deadline:
                self.kill()
                while self.running():
                    time.sleep(0.01)
                return None
            time.sleep(0.005)
        self._listen()
        if self.output is not None:
            os.close(self.output)
            self.output = None
        return list(self.codes.values())

    def _listen(self) -> None:
        try:
            while self.output is not None and (more := os.read(self.output, 1 << 16)):
                self.heard += more
        except BlockingIOError:
            pass

    def said(self) -> str:
        """All that the ranks have written to stdout and stderr."""
        return self.heard.decode(errors="replace")

    def lines(self) -> list[str]:
        """What the ranks said in lines of ours."""
        return [line for line in self.said().splitlines() if line.startswith("recr1: ")]

    def state(self, rank: int) -> dict | None:
        """This job's heartbeat of a rank, not an earlier one's."""
        state = heartbeat.read_heartbeat(self.folder / "heartbeats", rank)
        return state if state and state["pid"] == self.pids[rank] else None

    def reached(self, rank: int, phase: str, step: int) -> bool:
        """Waits until the rank is in this phase of this step or has passed the step; False if the
        job ends first.
        """
        deadline = time.monotonic() + 60 * self.slow
        while self.running() and time.monotonic() < deadline:
            state = self.state(rank)
            if state and (
                state["step"] > step or state["step"] == step and state["phase"].split()[0] == phase
            ):
                return True
            time.sleep(0.0005)
        return False


def _rank(rank: int, ranks: int, port: int, argv: list[str], out: int, prepare) -> None:
    code = 1
    try:
        dies_with_parent()
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (
            open(n, "w", buffering=1, closefd=False, encoding="utf-8") for n in (1, 2)
        )
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        if prepare:
            prepare(rank)
        with signal_handlers():
            code = run_guarded(train.main, argv)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def forked(work) -> None:
    """Runs work() in a process of its own: what this one must not do."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            dies_with_parent()
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0, "a helper process failed"


def at_events(rank: int, act, step: int = 2) -> None:
    """In this process, calls act(k, name) before the k-th file of this step's save is forced onto
    the disk or gets its name.
    """
    seen = [0]

    def watched(function, describe):
        def call(*args, **kwargs):
            state = heartbeat._heartbeat and heartbeat._heartbeat.state
            if state and state["phase"] == "save" and state["step"] == step:
                seen[0] += 1
                act(seen[0] - 1, describe(*args))
            return function(*args, **kwargs)

        return call

    os.fsync = watched(
        os.fsync, lambda file: f"fsync {Path(os.readlink(f'/proc/self/fd/{file}')).name}"
    )
    os.replace = watched(os.replace, lambda a, b: f"rename to {Path(b).name}")


# --- leaving no process behind ---

# of prctl(2)
PARENTS_DEATH = 1
SUBREAPER = 36


def dies_with_parent() -> None:
    """This forked process is killed when the one that forked it ends, however that ends; a Ctrl-C
    in the terminal is that one's matter.
    """
    ctypes.CDLL(None).prctl(PARENTS_DEATH, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_all() -> None:
    """Kills every process that this one has started, and what those have."""
    while True:
        for children in Path("/proc/self/task").glob("*/children"):
            for pid in map(int, children.read_text().split()):
                os.kill(pid, signal.SIGKILL)
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.01)
        except ChildProcessError:
            return


@contextmanager
def none_left():
    """A block that leaves no process behind; SIGTERM ends it as Ctrl-C does."""
    # what torchrun has started is this process's child once torchrun is gone
    ctypes.CDLL(None).prctl(SUBREAPER, 1)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        end_all()
        signal.signal(signal.SIGTERM, before)
