"""Where each rank is, in run.dir/heartbeats/rank_00000.json: who can be named when a collective
fails.

A rank holds a lock on its file for as long as its process lives. The lock, not the process id, says
who is alive: it reaches over machines that share the folder, and it keeps a second job out of it.
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

import torch.distributed as td

GRACE_SECONDS = 3.0  # seconds in which the others say that they give up too, or that they failed

STATE_BYTES = 512  # bytes: every state overwrites the one before

_heartbeat: Heartbeat | None = None


class RunDirBusy(ValueError):
    """Another job is running in this folder."""


class RankLost(RuntimeError):
    """A collective failed or took too long: another rank is gone or hangs. The message, where this
    rank is to print one, says which.
    """


class Heartbeat:
    """One rank's file: `state` has pid, host, step, phase, since (Unix time), calls (collectives
    begun), left (why it ends) and gives_up.
    """

    def __init__(self, folder: Path, rank: int, world: int):
        self.folder = folder
        self.rank = rank
        self.world = world
        folder.mkdir(exist_ok=True)
        self.file = os.open(heartbeat_path(folder, rank), os.O_RDWR | os.O_CREAT, 0o644)
        for _ in range(50):  # a killed job's locks may take a moment to go
            if self._locked():
                break
            time.sleep(0.1)
        else:
            other = read_heartbeat(folder, rank)
            os.close(self.file)
            raise RunDirBusy(
                f"run.dir: {folder.parent} is in use by another job (pid {other['pid']}, {other['host']}); wait for it, or name another folder"
            )
        if rank == 0:  # the other ranks come after this one: what is here is an earlier job's
            for old in folder.glob("rank_*.json"):
                if old != heartbeat_path(folder, 0):
                    old.unlink()
        self.state = dict(
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

    def _locked(self) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: there everybody counts as alive
            pass
        return True

    def write(self) -> None:
        with suppress(OSError):  # no reason to end a run
            os.pwrite(self.file, json.dumps(self.state).ljust(STATE_BYTES - 1).encode() + b"\n", 0)


def heartbeat_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"


def read_heartbeat(folder: Path, rank: int) -> dict | None:
    """A rank's state, with `alive`; None where it has none yet."""
    try:
        with open(heartbeat_path(folder, rank), encoding="utf-8") as f:
            state = json.loads(f.read())
            try:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return state | dict(alive=False)
            except OSError:
                return state | dict(alive=True)
    except (OSError, ValueError):
        return None


def start_heartbeat(folder: Path, rank: int, world: int) -> None:
    """Opens this rank's file in `folder`; rank 0 first, before any other rank calls. Raises Busy."""
    global _heartbeat
    stop_heartbeat()
    _heartbeat = Heartbeat(folder, rank, world)


def stop_heartbeat() -> None:
    """Gives the file's lock back."""
    global _heartbeat
    if _heartbeat:
        os.close(_heartbeat.file)
    _heartbeat = None


def enter_phase(phase: str, step: int | None = None) -> None:
    """This rank enters a phase. Microseconds; nothing before `start`."""
    if _heartbeat:
        _heartbeat.state.update(
            phase=phase, since=time.time(), step=_heartbeat.state["step"] if step is None else step
        )
        _heartbeat.write()


def count_collective() -> None:
    """Counts: a rank that hangs has begun fewer than those that wait for it."""
    if _heartbeat:
        _heartbeat.state["calls"] += 1
        _heartbeat.write()


def explain_exit(e: BaseException) -> BaseException:
    """What a rank ends with that an exception ends: the exception, noted for the others to read; or
    RankLost, when it is a collective's own.

    Not of nccl's time limit (untested, from its documentation): its watchdog ends the process by
    SIGABRT, the default of TORCH_NCCL_ASYNC_ERROR_HANDLING, and names the collective; the files
    here still say which rank had begun fewer.
    """
    # gloo has no type for it
    if (
        isinstance(e, td.DistError)
        or isinstance(e, RuntimeError)
        and re.search(r"gloo/transport|pair closure", str(e))
    ):
        return RankLost(name_lost_ranks(str(e).splitlines()[0]) or "")
    if _heartbeat:
        _heartbeat.state["left"] = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:160]}"
        _heartbeat.write()
    return e


def name_lost_ranks(error: str) -> str | None:
    """After a failed collective: the line that names the rank at fault and its phase, None on all
    but the first of the others.
    """
    if not _heartbeat:
        return f"the ranks lost each other while the run was set up: {error}"
    others = [rank for rank in range(_heartbeat.world) if rank != _heartbeat.rank]
    before = {rank: read_heartbeat(_heartbeat.folder, rank) for rank in others}
    _heartbeat.state["gives_up"] = True
    _heartbeat.write()
    deadline = time.monotonic() + GRACE_SECONDS
    while True:
        now = {rank: read_heartbeat(_heartbeat.folder, rank) for rank in others}
        wait = [rank for rank, state in now.items() if state is None or not state["gives_up"]]
        ended = [
            rank for rank in wait if now[rank] and (now[rank]["left"] or not now[rank]["alive"])
        ]
        if ended or not wait or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    seen = {rank: before[rank] or now[rank] for rank in others}
    silent = [rank for rank in wait if seen[rank] is None]
    behind = [rank for rank in wait or others if seen[rank]]  # if all gave up: who was behind?
    least = min((seen[rank]["calls"] for rank in behind), default=0)
    if not wait and least >= _heartbeat.state["calls"]:
        return f"the ranks lost each other: {error}"
    guilty = ended or silent or [rank for rank in behind if seen[rank]["calls"] == least]
    if _heartbeat.rank != min(rank for rank in range(_heartbeat.world) if rank not in guilty):
        return None
    return "; ".join(
        _describe_rank(rank, now[rank] if rank in ended else seen[rank]) for rank in guilty
    )


def _describe_rank(rank: int, state: dict | None) -> str:
    if state is None:
        return f"rank {rank} is gone; it had not yet opened run.dir"
    who = f"rank {rank} (pid {state['pid']}, {state['host']})"
    where = f"phase {state['phase']} of step {state['step']}"
    if state["left"]:
        return f"{who} failed in {where}: {state['left']}"
    if not state["alive"]:
        return f"{who} is gone; it was in {where}"
    return f"{who} has not moved for {time.time() - state['since']:.0f} s: {where}"
