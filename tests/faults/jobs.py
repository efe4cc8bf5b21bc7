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
        folders = [setting for setting in argv if setting.startswith("run.dir=")]
        self.folder = Path(folders[-1].removeprefix("run.dir="))
        # a pipe: a limit on the size of files does not touch what the ranks say
        self.output, out = os.pipe()
        os.set_blocking(self.output, False)
        self.heard = b""
        self.codes: dict[int, int | None] = dict.fromkeys(range(ranks))
        port = find_free_port()
        self.pids = []
        for rank in range(ranks):
            pid = os.fork() or run_rank(rank, ranks, port, argv, out, prepare)
            self.pids.append(pid)
        os.close(out)

    def is_running(self) -> bool:
        self._listen()
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                ended_pid, status = os.waitpid(pid, os.WNOHANG)
                if ended_pid:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return None in self.codes.values()

    def kill(self, how: int = signal.SIGKILL, ranks=None) -> None:
        """Send a signal to those of `ranks` (all) that still run."""
        if ranks is None:
            ranks = range(len(self.pids))
        for rank in ranks:
            if self.is_running() and self.codes[rank] is None:
                os.kill(self.pids[rank], how)

    def wait(self, limit: float) -> list[int] | None:
        """Return the exit codes by rank; None if it still ran after `limit` seconds and had to be
        killed.
        """
        deadline = time.monotonic() + limit
        while self.is_running():
            if time.monotonic() > deadline:
                self.kill()
                while self.is_running():
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

    def read_output(self) -> str:
        """Return all that the ranks have written to stdout and stderr."""
        return self.heard.decode(errors="replace")

    def read_lines(self) -> list[str]:
        """Return what the ranks said in lines of ours."""
        return [line for line in self.read_output().splitlines() if line.startswith("recr1: ")]

    def read_state(self, rank: int) -> dict | None:
        """Read this job's heartbeat of a rank, not an earlier one's."""
        state = heartbeat.read_heartbeat(self.folder / "heartbeats", rank)
        if state and state["pid"] == self.pids[rank]:
            return state
        return None

    def wait_for_phase(self, rank: int, phase: str, step: int) -> bool:
        """Wait until the rank is in this phase of this step or has passed the step; False if the
        job ends first.
        """
        deadline = time.monotonic() + 60 * self.slow
        while self.is_running() and time.monotonic() < deadline:
            state = self.read_state(rank)
            if state and has_reached(state, phase, step):
                return True
            time.sleep(0.0005)
        return False


def has_reached(state: dict, phase: str, step: int) -> bool:
    """Say whether a rank is in this phase of this step, or has passed the step."""
    if state["step"] != step:
        return state["step"] > step
    return first_word(state["phase"]) == phase


def first_word(phase: str) -> str:
    """Return the phase without what it counts."""
    word, *_ = phase.split()
    return word


def find_free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def join_job(rank: int, ranks: int, port: int) -> None:
    """Set what torchrun tells this process."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def run_rank(rank: int, ranks: int, port: int, argv: list[str], out: int, prepare) -> None:
    code = 1
    try:
        die_with_parent()
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = open_lines(1)
        sys.stderr = open_lines(2)
        join_job(rank, ranks, port)
        if prepare:
            prepare(rank)
        with signal_handlers():
            code = run_guarded(train.main, argv)
    except SystemExit as exit:
        code = exit.code
        if not isinstance(code, int):
            code = int(code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def open_lines(descriptor: int):
    """Open it for writing line by line."""
    return open(descriptor, "w", buffering=1, closefd=False, encoding="utf-8")


def run_forked(work) -> None:
    """Run work() in a process of its own: what this one must not do."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            die_with_parent()
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert status == 0, "a helper process failed"


def watch_events(rank: int, act, step: int = 2) -> None:
    """In this process, call act(k, name) before the k-th file of this step's save is forced onto
    the disk or gets its name.
    """
    count = 0

    def watch(function, describe):
        def call(*args, **kwargs):
            nonlocal count
            if is_saving(step):
                count += 1
                act(count - 1, describe(*args))
            return function(*args, **kwargs)

        return call

    os.fsync = watch(os.fsync, describe_fsync)
    os.replace = watch(os.replace, describe_rename)


def is_saving(step: int) -> bool:
    """Say whether this process is in the save of this step."""
    if not heartbeat._heartbeat:
        return False
    state = heartbeat._heartbeat.state
    return state["phase"] == "save" and state["step"] == step


def describe_fsync(descriptor: int) -> str:
    path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    return f"fsync {path.name}"


def describe_rename(source, target) -> str:
    return f"rename to {Path(target).name}"


# --- leaving no process behind ---

# of prctl(2)
PARENTS_DEATH = 1
SUBREAPER = 36


def die_with_parent() -> None:
    """Let this forked process be killed when the one that forked it ends, however that ends; a
    Ctrl-C in the terminal is that one's matter.
    """
    ctypes.CDLL(None).prctl(PARENTS_DEATH, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_all() -> None:
    """Kill every process that this one has started, and what those have."""
    while True:
        for children in Path("/proc/self/task").glob("*/children"):
            for pid in children.read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        try:
            ended_pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not ended_pid:
            time.sleep(0.01)


@contextmanager
def none_left():
    """Run a block that leaves no process behind; SIGTERM ends it as Ctrl-C does."""
    # what torchrun has started is this process's child once torchrun is gone
    ctypes.CDLL(None).prctl(SUBREAPER, 1)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        end_all()
        signal.signal(signal.SIGTERM, before)
