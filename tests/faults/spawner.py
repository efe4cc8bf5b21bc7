"""python tests/faults/spawner.py: starts jobs of several ranks, one after the other, without each
rank's seconds of imports.

Reads a job as a line of JSON on stdin, {"ranks": N, "argv": ["-m", "recr1.train", ...], "output":
FILE}, and answers with the ranks' exit codes. A rank is forked from this process, which has
imported everything, but ends as every Python program does: it comes back out of all calls to the
last line of this file and leaves through the interpreter's own end. (jobs.py's ranks end by
os._exit.)
"""

import json
import os
import runpy
import sys

# what a run imports where it needs it
import nltk.stem.porter  # noqa: F401
import torch.distributed.distributed_c10d  # noqa: F401
import transformers.models.auto.tokenization_auto  # noqa: F401
from jobs import die_with_parent, find_free_port, join_job


def serve_jobs() -> list[str]:
    """Start the jobs that come on stdin. Return in the ranks alone: what a rank is to run."""
    for line in sys.stdin:
        job = json.loads(line)
        port = find_free_port()
        pids = []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                become_rank(rank, job["ranks"], port, job["output"])
                return job["argv"]
            pids.append(pid)
        codes = [wait_for_code(pid) for pid in pids]
        print(json.dumps(codes), flush=True)
    sys.exit(0)


def wait_for_code(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def become_rank(rank: int, ranks: int, port: int, output: str) -> None:
    die_with_parent()
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    join_job(rank, ranks, port)


if __name__ == "__main__":
    arguments = serve_jobs()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
