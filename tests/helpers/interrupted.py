"""A training run that something happens to: python tests/helpers/interrupted.py WHAT CONFIG
[a.b=value ...], also on the ranks of a torchrun job.

WHAT is WORD@N or WORD@N:RANK: at the N-th moment of that kind (counted from 1, on that rank or on
all) a signal, a value that is not finite, or no memory.
"""

import os
import signal
import sys

import torch

from recr1 import sft, train
from recr1.evaluation import evaluate
from recr1.retrieval.bm25 import searcher as bm25
from recr1.tracking import run_log
from recr1.training import checkpoint, launch, teacher
from recr1.utils.interrupts import signal_handlers

MOMENTS = {
    "sample": (train, "generate"),
    "batch": (train, "compute_policy_loss"),
    "teach": (teacher, "generate"),
    "lesson": (sft, "compute_cross_entropy"),
    "evaluate": (evaluate, "prepare_sampler"),  # of each evaluation
    "save": (checkpoint, "save_file"),
    "log": (run_log.RunLog, "write_metrics"),
    "index": (bm25, "load_or_build_bm25"),
}


def at(what: str, act, patch=setattr) -> None:
    """Patch the moment so that its N-th call returns act(result) in place of its result."""
    word, _, rest = what.partition("@")
    number, _, rank = rest.partition(":")
    if rank and os.environ.get("RANK", "0") != rank:
        return
    owner, name = MOMENTS[word]
    function = getattr(owner, name)
    target_call = int(number or 1)
    calls = 0

    def call_and_act(*args, **kwargs):
        nonlocal calls
        calls += 1
        result = function(*args, **kwargs)
        if calls == target_call:
            return act(result)
        return result

    patch(owner, name, call_and_act)


def sigterm(result):
    """Send this process SIGTERM, which its handler sees; the call goes on."""
    own_id = os.getpid()
    os.kill(own_id, signal.SIGTERM)
    return result


def sigkill(result):
    """End this process as the kernel does when memory is over."""
    own_id = os.getpid()
    os.kill(own_id, signal.SIGKILL)


def nan(result):
    """Make the loss, and with it its gradient, not a number."""
    value, *rest = result
    return value * float("nan"), *rest


def infinite(result):
    """Make only the loss infinite, its gradient stays as it is."""
    value, *rest = result
    return value + float("inf"), *rest


# what torch raises, shortened at its end
GPU_IS_FULL = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.72 GiB of "
    "which 10.50 GiB is free. Including non-PyTorch memory, this process has 129.21 GiB in use."
)


def exhaust(result):
    """Fail as an allocation does on a GPU that is full."""
    raise torch.OutOfMemoryError(GPU_IS_FULL)


ACTIONS = dict(sigterm=sigterm, sigkill=sigkill, nan=nan, infinite=infinite, exhaust=exhaust)

if __name__ == "__main__":
    action, moment = sys.argv[1].split("-")
    at(moment, ACTIONS[action])
    with signal_handlers():
        launch.run_command(train.main, sys.argv[2:])
