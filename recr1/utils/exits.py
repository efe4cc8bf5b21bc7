"""How a command's process ends: by `leave`, not by the interpreter's own end."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import Callable, NoReturn


def end_process(work: Callable[[], int]) -> NoReturn:
    """Calls `work`, then ends the process with the exit code that it returns, or that an exception
    stands for.
    """
    try:
        code = work()
    except SystemExit as e:
        code = get_exit_code(e)
    except BaseException as e:
        sys.excepthook(type(e), e, e.__traceback__)
        code = 130 if isinstance(e, KeyboardInterrupt) else 1
    leave_process(code)


def get_exit_code(e: SystemExit) -> int:
    """The number that Python ends with; a text is printed, and means 1."""
    if e.code is None:
        return 0
    if isinstance(e.code, int):
        return e.code
    print(e.code, file=sys.stderr)
    return 1


def leave_process(code: int) -> NoReturn:
    """Ends the process: waits for threads that are no daemons, runs what is registered for the
    exit, flushes, then stops at once.

    This is all that the interpreter's own end does for a program, without its last part, in which a
    finished job aborts at times (SIGABRT, "terminate called without an active exception"): when a
    thread asks for the interpreter's lock by then, CPython ends that thread where it stands, and
    its unwinding meets C++ frames that may not be unwound. Threads that ask: gloo's workers, which
    drop the last reference to a finished collective and so to its tensors; rewards made beside
    sampling and a user's search past its time, which a stopped run leaves behind; trackers.
    torchrun would then report a run that is done as failed, and --max-restarts start it again.
    """
    threading._shutdown()  # no public name for either; multiprocessing ends its children so
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (
            OSError,
            ValueError,
            AttributeError,
        ):  # its reader is gone, it is closed, there is none
            code = code or 120  # as Python has it
    os._exit(code)
