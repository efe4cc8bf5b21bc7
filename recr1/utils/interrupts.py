"""SIGTERM and SIGINT: the signal is noted, and taken where all ranks can agree on it; long
stretches of one rank's own work end at once.

with listening():                           # the process's handlers
    with dist.fail_together(), at_once(): ...    # no collective inside: ends here, and then on every
    rank if dist.all_reduce_max(asked()): ...           # between collectives
"""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager

# seconds after the signal in which a step that has begun to move weights may still be finished
GRACE_SECONDS = 12.0


NOTHING_NEW = (
    "stopped before training went on; there is nothing new to save, run the same command again"
)


# when the signal came; whether it is raised where it comes
_signal_time = 0.0

_raising = False


class Stopped(Exception):
    """The run was asked to stop, and does on every rank."""


def stop_requested() -> int:
    """0: no. 1: this process was asked to stop. 2: long ago."""
    return 0 if not _signal_time else 1 if time.monotonic() - _signal_time < GRACE_SECONDS else 2


@contextmanager
def signal_handlers():
    """SIGTERM and SIGINT ask to stop; a second Ctrl-C ends the process as ever. Main thread only."""
    global _signal_time
    before = {
        number: signal.signal(number, _note_signal) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _signal_time = 0.0


class raise_on_signal:
    """A block that the signal ends: Stopped is raised inside. To be entered after dist.fail_together, by
    which the other ranks hear of it.
    """

    def __enter__(self):
        global _raising
        _raising = True
        self._meet()

    def __exit__(self, *error):
        global _raising
        _raising = False
        self._meet()  # somebody's `except` may have taken the one that was raised

    def _meet(self):
        if _signal_time:
            raise Stopped(NOTHING_NEW)


def _note_signal(number: int, frame) -> None:
    global _signal_time
    if _signal_time:
        # torchrun passes on the Ctrl-C that a terminal has already sent to every process
        if number == signal.SIGINT and time.monotonic() - _signal_time > 2:
            raise KeyboardInterrupt
        return
    _signal_time = time.monotonic()
    if _raising:
        raise Stopped(NOTHING_NEW)
