"""A run on the stand-in GPU: PYTHONPATH=.:tests python -m gpu.standin.run train CONFIG.yaml
[a.b=value ...] [--dry-run], or sft in the place of train; also by torchrun.

Prints what it has asked of the GPU. Ends with the run's exit code, or with 1 where that is 0 and
something is wrong: a race, or a number of the host in an operation of the GPU.
"""

import os
import sys

from gpu.standin.install import install


def work() -> int:
    from gpu.standin.activity import activity
    from gpu.standin.report import print_activity

    from recr1 import sft, train
    from recr1.training.launch import run_guarded

    loop, *arguments = sys.argv[1:]
    main = {"train": train.main, "sft": sft.main}[loop]
    code = run_guarded(main, arguments)
    print_activity(activity, title=f"rank {os.environ.get('RANK', '0')}")
    is_wrong = activity.races or activity.host_numbers
    return code or int(bool(is_wrong))


if __name__ == "__main__":
    install()
    from recr1.utils.exits import end_process

    end_process(work)
