"""torchrun --nproc-per-node N tests/faults/meets.py: ranks that meet in every kind of collective
and leave right after the last one.

The shortest way from a collective to the end of the process, and one on which the main thread keeps
the interpreter's lock wherever it can, as it does by chance on a machine where gloo's workers do
not come to run: what busy.py looks for shows here most often.
"""

import importlib
import sys

import torch

from recr1.distributed import collectives as dist
from recr1.distributed.process_group import process_group
from recr1.utils.exits import end_process


def main() -> int:
    torch.set_num_threads(1)
    sys.setswitchinterval(1000.0)
    with process_group():
        importlib.import_module("torch.distributed.nn.functional")  # as loading a policy does
        for _ in range(20):
            full = dist.start_all_gather(torch.ones(1000, requires_grad=True).detach())()
            part = dist.start_reduce_scatter(full)()
            dist.all_reduce_sum(float(part.sum()))
            dist.gather_to_rank0(dict(rank=dist.rank()))
            with dist.fail_together():
                pass
    print(f"rank {dist.rank()} has met the others", flush=True)
    return 0


if __name__ == "__main__":
    end_process(main)
