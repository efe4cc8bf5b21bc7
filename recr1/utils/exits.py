"""How a command's process ends: by `leave_process`, not by the interpreter's own end."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import Callable, NoReturn


def end_process(work: Callable[[], int]) -> NoReturn:
    """Call `work`, then end the process with the exit code that it returns, or that its exception
    stands for.
    """
    try:
        code = work()
    except SystemExit as e:
        code = get_exit_code(e)
    except BaseException as e:
        sys.excepthook(type(e), e, e.__traceback__)
        is_interrupted = isinstance(e, KeyboardInterrupt)
        code = 130 if is_interrupted else 1
    leave_process(code)


def get_exit_code(e: SystemExit) -> int:
    """Return the number with which Python would end; print a text, which means 1."""
    if e.code is None:
        return 0
    if isinstance(e.code, int):
        return e.code
    print(e.code, file=sys.stderr)
    return 1


def leave_process(code: int) -> NoReturn:
    """End the process: wait for threads that are no daemons, run what is registered for the exit,
    flush, then stop at once.

    This is all that the interpreter's own end does for a program, without its last part. In that
    part a finished job sometimes aborts (SIGABRT, "terminate called without an active exception"):
    when a thread asks for the interpreter's lock by then, CPython ends that thread where it stands,
    and its unwinding meets C++ frames that may not be unwound.

    Threads that ask: gloo's workers, which drop the last reference to a finished collective and so
    to its tensors; rewards computed beside sampling and a user's search past its time, which a
    stopped run leaves behind; trackers. torchrun would then report a run that has finished as
    failed, and --max-restarts would start it again.
    """
    # Neither has a public name; multiprocessing ends its children in this way.
    threading._shutdown()  # type: ignore[attr-defined]  # private: not in typeshed
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        # Its reader is gone; it is closed; there is none.
        except (OSError, ValueError, AttributeError):
            code = code or 120  # as Python has it
    os._exit(code)
