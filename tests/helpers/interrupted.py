"""A training run that something happens to: python tests/helpers/interrupted.py WHAT CONFIG
[a.b=value ...], also on the ranks of a torchrun job.

WHAT is WORD@N or WORD@N:RANK: at the N-th moment of that kind (counted from 1, on that rank or on
all) a signal, or a value that is not finite.
"""

import os
import signal
import sys

from recr1 import sft, train
from recr1.evaluation import evaluate
from recr1.retrieval.bm25 import searcher as bm25
from recr1.tracking import run_log
from recr1.training import checkpoint, launch, teacher
from recr1.utils.interrupts import signal_handlers


def at(what: str, act, patch=setattr) -> None:
    """Patch the moment so that its N-th call returns act(result) in place of its result."""
    word, _, rest = what.partition("@")
    number, _, rank = rest.partition(":")
    if rank and os.environ.get("RANK", "0") != rank:
        return
    owner, name = {
        "sample": (train, "generate"),
        "batch": (train, "compute_policy_loss"),
        "teach": (teacher, "generate"),
        "lesson": (sft, "compute_cross_entropy"),
        "evaluate": (evaluate, "generate"),
        "save": (checkpoint, "save_file"),
        "log": (run_log.RunLog, "write_metrics"),
        "index": (bm25, "load_or_build_bm25"),
    }[word]
    inner = getattr(owner, name)
    calls = []

    def outer(*args, **kwargs):
        calls.append(None)
        result = inner(*args, **kwargs)
        return act(result) if len(calls) == int(number or 1) else result

    patch(owner, name, outer)


def sigterm(result):
    os.kill(os.getpid(), signal.SIGTERM)
    return result


def sigkill(result):
    os.kill(os.getpid(), signal.SIGKILL)


def nan(result):
    value, *rest = result
    return value * float("nan"), *rest


def infinite(result):
    """Only the loss, its gradient stays as it is."""
    value, *rest = result
    return value + float("inf"), *rest


if __name__ == "__main__":
    act, what = sys.argv[1].split("-")
    at(what, dict(sigterm=sigterm, sigkill=sigkill, nan=nan, infinite=infinite)[act])
    with signal_handlers():
        launch.run_command(train.main, sys.argv[2:])
