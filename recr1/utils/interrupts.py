"""SIGTERM and SIGINT. A signal is noted, and the run stops where all ranks can agree on it. Long
work of one rank alone ends at once.

    with signal_handlers():
        # no collective inside: ends at once, and then on every rank
        with dist.fail_together(), raise_on_signal(): ...
        # between collectives
        if dist.all_reduce_max(stop_requested()): ...
"""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from types import FrameType
from typing import Any, Iterator

# seconds after the signal in which a step that has begun to move weights may still be finished
GRACE_SECONDS = 12.0

NOTHING_NEW = (
    "stopped before training went on; there is nothing new to save, run the same command again"
)


_signal_time = 0.0  # when the first signal came; 0: none has come

_raises_at_once = False  # whether a signal raises Stopped where it comes


class Stopped(Exception):
    """The run was asked to stop, and does on every rank."""


def stop_requested() -> int:
    """Return 1 if this process was asked to stop, 2 if that was more than GRACE_SECONDS ago, else
    0.
    """
    if not _signal_time:
        return 0
    seconds = time.monotonic() - _signal_time
    return 1 if seconds < GRACE_SECONDS else 2


@contextmanager
def signal_handlers() -> Iterator[None]:
    """Make SIGTERM and SIGINT ask to stop. A second Ctrl-C ends the process as usual. Main thread
    only.
    """
    global _signal_time
    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, _note_signal)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _signal_time = 0.0


class raise_on_signal:
    """Raise Stopped inside a block when the signal comes. Enter it after dist.fail_together, which
    tells the other ranks.
    """

    def __enter__(self) -> None:
        global _raises_at_once
        _raises_at_once = True
        _raise_if_requested()

    def __exit__(self, *error: Any) -> None:
        global _raises_at_once
        _raises_at_once = False
        _raise_if_requested()  # somebody's `except` may have caught the one that was raised


def _raise_if_requested() -> None:
    """Raise Stopped if a signal has come."""
    if _signal_time:
        raise Stopped(NOTHING_NEW)


def _note_signal(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM and SIGINT."""
    global _signal_time
    if _signal_time:
        # torchrun passes on the Ctrl-C that a terminal has already sent to every process
        if number == signal.SIGINT and time.monotonic() - _signal_time > 2:
            raise KeyboardInterrupt
        return
    _signal_time = time.monotonic()
    if _raises_at_once:
        raise Stopped(NOTHING_NEW)
