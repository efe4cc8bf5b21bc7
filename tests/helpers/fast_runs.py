"""Several runs of recr1.train in one job: torchrun ... tests/helpers/fast_runs.py RUNS.json

RUNS.json holds a list of argument lists. A job for each would import torch anew.
"""

import json
import sys

from recr1 import train
from recr1.distributed import heartbeat
from recr1.distributed.process_group import process_group
from recr1.utils.exits import end_process


def work() -> int:
    with open(sys.argv[1], encoding="utf-8") as file:
        runs = json.load(file)
    with process_group():
        for arguments in runs:
            train.main(arguments)
            heartbeat.stop_heartbeat()
    return 0


if __name__ == "__main__":
    end_process(work)
