"""Where each rank is, in run.dir/heartbeats/rank_00000.json: it says which rank is at fault when a
collective fails.

A rank holds a lock on its file for as long as its process lives. The lock, not the process id, says
who is alive: it works between machines that share the folder, and it keeps a second job out.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as td

GRACE_SECONDS = 3.0  # seconds in which the others say that they give up too, or that they failed

STATE_BYTES = 512  # bytes: every state overwrites the one before

_heartbeat: Heartbeat | None = None


class RunDirBusy(ValueError):
    """Another job is running in this folder."""


class RankLost(RuntimeError):
    """A collective failed or took too long: another rank is gone or hangs. The message says which
    one, on the rank that is to print it; on the others it is empty.
    """


class Heartbeat:
    """The file of one rank.

    `state` has pid, host, step, phase, since (Unix time at which the rank entered the phase), calls
    (number of collectives begun), left (why the rank ends) and gives_up.
    """

    def __init__(self, folder: Path, rank: int, world: int):
        self.folder = folder
        self.rank = rank
        self.world = world
        folder.mkdir(exist_ok=True)
        path = heartbeat_path(folder, rank)
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not self._wait_for_lock():
            other = read_heartbeat(folder, rank)
            os.close(self.file)
            owner = ""  # a job that has the lock and has not written its state yet
            if other is not None:
                owner = f" (pid {other['pid']}, {other['host']})"
            raise RunDirBusy(
                f"run.dir: {folder.parent} is in use by another job{owner}; "
                "wait for it, or name another folder"
            )
        if rank == 0:  # the other ranks come after this one: these files are an earlier job's
            for old_path in folder.glob("rank_*.json"):
                if old_path != path:
                    old_path.unlink()
        self.state: dict[str, Any] = dict(
            pid=os.getpid(),
            host=socket.gethostname(),
            step=0,
            phase="setup",
            since=time.time(),
            calls=0,
            left="",
            gives_up=False,
        )
        self.write()

    def _wait_for_lock(self) -> bool:
        """Return whether this process has the file's lock. A killed job's locks may take a moment
        to go.
        """
        for _ in range(50):
            if self._try_lock():
                return True
            time.sleep(0.1)
        return False

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: there everybody counts as alive
            pass
        return True

    def write(self) -> None:
        """Write the state over the one before."""
        with suppress(OSError):  # no reason to end a run
            text = json.dumps(self.state).ljust(STATE_BYTES - 1) + "\n"
            os.pwrite(self.file, text.encode(), 0)


def heartbeat_path(folder: Path, rank: int) -> Path:
    """Return the path of a rank's file."""
    return folder / f"rank_{rank:05d}.json"


def read_heartbeat(folder: Path, rank: int) -> dict[str, Any] | None:
    """Return a rank's state and `alive`; None if it has no state yet."""
    path = heartbeat_path(folder, rank)
    try:
        with open(path, encoding="utf-8") as f:
            state = json.loads(f.read())
            state["alive"] = _is_locked(f.fileno())
            return state
    except (OSError, ValueError):
        return None


def _is_locked(file: int) -> bool:
    """Return whether another process holds the file's lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def start_heartbeat(folder: Path, rank: int, world: int) -> None:
    """Open this rank's file in `folder`. Rank 0 calls first, before any other rank. Raises
    RunDirBusy.
    """
    global _heartbeat
    stop_heartbeat()
    _heartbeat = Heartbeat(folder, rank, world)


def stop_heartbeat() -> None:
    """Close this rank's file, which releases its lock."""
    global _heartbeat
    if _heartbeat:
        os.close(_heartbeat.file)
    _heartbeat = None


def enter_phase(phase: str, step: int | None = None) -> None:
    """Write that this rank enters a phase. Takes microseconds; does nothing before
    `start_heartbeat`.
    """
    if not _heartbeat:
        return
    state = _heartbeat.state
    state["phase"] = phase
    state["since"] = time.time()
    if step is not None:
        state["step"] = step
    _heartbeat.write()


def describe_place() -> str:
    """Return which phase of which step this rank is in; "" before `start_heartbeat`."""
    if not _heartbeat:
        return ""
    return _format_place(_heartbeat.state)


def count_collective() -> None:
    """Count a collective that begins: a rank that hangs has begun fewer than those that wait for
    it.
    """
    if _heartbeat:
        _heartbeat.state["calls"] += 1
        _heartbeat.write()


def explain_exit(e: BaseException) -> BaseException:
    """Return the exception with which a rank ends that `e` ends: RankLost, if `e` is a collective's
    own; else `e`, which is noted for the others to read.

    This does not cover nccl (untested, from its documentation). Its collectives hold the host not
    in a call of ours but where the host next waits for the GPU, and no error is raised there: when
    the time limit is over its watchdog ends the process by SIGABRT, the default of
    TORCH_NCCL_ASYNC_ERROR_HANDLING, and names the collective, or torchrun ends it before that. The
    files here still say which rank had begun fewer collectives.
    """
    if _is_collective_error(e):
        message = str(e).splitlines()[0]
        return RankLost(name_lost_ranks(message) or "")
    if _heartbeat:
        first_line = (str(e).splitlines() or [""])[0]
        _heartbeat.state["left"] = f"{type(e).__name__}: {first_line[:160]}"
        _heartbeat.write()
    return e


def _is_collective_error(e: BaseException) -> bool:
    """Return whether a collective raised `e`."""
    if isinstance(e, td.DistError):
        return True
    if not isinstance(e, RuntimeError):
        return False
    # gloo has no type for it
    return re.search(r"gloo/transport|pair closure", str(e)) is not None


class _Answers(NamedTuple):
    """What the other ranks have written once this one has given up."""

    states: dict[int, dict | None]  # by rank
    waited_for: list[int]  # ranks that have not given up
    ended: list[int]  # those of them that failed or are gone


def name_lost_ranks(error: str) -> str | None:
    """Return, after a failed collective, the line that names the rank at fault and its phase. One
    rank is to print it, the first that is not at fault; the others return None.
    """
    if not _heartbeat:
        return f"the ranks lost each other while the run was set up: {error}"
    others = [rank for rank in range(_heartbeat.world) if rank != _heartbeat.rank]
    states_before = {rank: read_heartbeat(_heartbeat.folder, rank) for rank in others}
    _heartbeat.state["gives_up"] = True
    _heartbeat.write()
    answers = _wait_for_answers(_heartbeat.folder, others)

    # Who has begun the fewest collectives? If all gave up, of all others.
    states = {rank: states_before[rank] or answers.states[rank] for rank in others}
    silent = [rank for rank in answers.waited_for if states[rank] is None]
    calls = {}
    for rank in answers.waited_for or others:
        state = states[rank]
        if state is not None:
            calls[rank] = state["calls"]
    fewest_calls = min(calls.values(), default=0)
    if not answers.waited_for and fewest_calls >= _heartbeat.state["calls"]:
        return f"the ranks lost each other: {error}"

    behind = [rank for rank in calls if calls[rank] == fewest_calls]
    guilty = answers.ended or silent or behind
    innocent = [rank for rank in range(_heartbeat.world) if rank not in guilty]
    if _heartbeat.rank != min(innocent):
        return None
    states |= {rank: answers.states[rank] for rank in answers.ended}
    return "; ".join(_describe_rank(rank, states[rank]) for rank in guilty)


def _wait_for_answers(folder: Path, others: list[int]) -> _Answers:
    """Read the other ranks' states until one has ended or all have given up, GRACE_SECONDS at
    most.
    """
    deadline = time.monotonic() + GRACE_SECONDS
    while True:
        states = {rank: read_heartbeat(folder, rank) for rank in others}
        waited_for = []
        ended = []
        for rank, state in states.items():
            if state is None:
                waited_for.append(rank)
            elif not state["gives_up"]:
                waited_for.append(rank)
                if state["left"] or not state["alive"]:
                    ended.append(rank)
        if ended or not waited_for or time.monotonic() > deadline:
            return _Answers(states, waited_for, ended)
        time.sleep(0.02)


def _describe_rank(rank: int, state: dict | None) -> str:
    """Return the line on a rank at fault; its state is None if it has not yet written one.

    "has not moved" counts from the entry into the phase: such a rank may hang, or be busy in one
    long phase.
    """
    if state is None:
        return f"rank {rank} is gone; it had not yet opened run.dir"
    who = f"rank {rank} (pid {state['pid']}, {state['host']})"
    where = _format_place(state)
    if state["left"]:
        return f"{who} failed in {where}: {state['left']}"
    if not state["alive"]:
        return f"{who} is gone; it was in {where}"
    seconds = time.time() - state["since"]
    return f"{who} has not moved for {seconds:.0f} s: {where}"


def _format_place(state: dict) -> str:
    return f"phase {state['phase']} of step {state['step']}"
