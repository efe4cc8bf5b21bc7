"""SIGTERM and SIGINT: the signal is noted, and taken where all ranks can agree on it; long
stretches of one rank's own work end at once.

with listening():                           # the process's handlers
    with dist.together(), at_once(): ...    # no collective inside: ends here, and then on every
    rank if dist.largest(asked()): ...           # between collectives
"""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager

# seconds after the signal in which a step that has begun to move weights may still be finished
GRACE = 12.0

EARLY = "stopped before training went on; there is nothing new to save, run the same command again"

# when the signal came; whether it is raised where it comes
_since = 0.0
_raising = False


class Stopped(Exception):
    """The run was asked to stop, and does on every rank."""


def asked() -> int:
    """0: no. 1: this process was asked to stop. 2: long ago."""
    return 0 if not _since else 1 if time.monotonic() - _since < GRACE else 2


@contextmanager
def listening():
    """SIGTERM and SIGINT ask to stop; a second Ctrl-C ends the process as ever. Main thread only."""
    global _since
    before = {number: signal.signal(number, _note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _since = 0.0


class at_once:
    """A block that the signal ends: Stopped is raised inside. To be entered after dist.together, by
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
        if _since:
            raise Stopped(EARLY)


def _note(number: int, frame) -> None:
    global _since
    if _since:
        # torchrun passes on the Ctrl-C that a terminal has already sent to every process
        if number == signal.SIGINT and time.monotonic() - _since > 2:
            raise KeyboardInterrupt
        return
    _since = time.monotonic()
    if _raising:
        raise Stopped(EARLY)
