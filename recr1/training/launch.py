"""What the command of a loop does with its arguments: python -m recr1.train and python -m
recr1.sft.
"""

from __future__ import annotations

import os
import sys
from typing import Callable, NoReturn

from recr1.config import loader as configs
from recr1.config.schema import Config, ConfigError
from recr1.data.chat_template import ChatError
from recr1.data.readers import DataError
from recr1.distributed import heartbeat
from recr1.distributed.printing import print_rank0
from recr1.distributed.process_group import process_group
from recr1.retrieval.interface import RetrieverError
from recr1.rl.replay import ReplayError
from recr1.training.dry_run import shrunk_config
from recr1.training.optimizer import NonFiniteGradient
from recr1.training.run_dir import RunError
from recr1.utils.exits import end_process
from recr1.utils.files import WriteError
from recr1.utils.hf_hub import ModelFolderError
from recr1.utils.interrupts import Stopped
from recr1.utils.terminal import make_printable


def launch_loop(argv: list[str], module: str, loop: Callable[[Config], None]) -> None:
    """CONFIG.yaml [a.b=value ...] [--dry-run] -> loop(config), with --dry-run on everything in
    small. Raises ConfigError.
    """
    config, *overrides = [a for a in argv if a != "--dry-run"] or [""]
    if not config or config.startswith("-"):
        raise ConfigError(
            f"usage: python -m {module} CONFIG.yaml [a.b=value ...] [--dry-run], or torchrun --nproc-per-node N -m {module} ..."
        )
    cfg = configs.load_config(config, overrides)
    if "--dry-run" not in argv:
        return loop(cfg)
    with shrunk_config(cfg, config) as tiny:
        loop(tiny)
    print_rank0(f"dry run passed: {config}")


EXPECTED_ERRORS = (
    ConfigError,
    DataError,
    ChatError,
    ModelFolderError,
    ReplayError,
    RunError,
    NonFiniteGradient,
    WriteError,
    RetrieverError,
    heartbeat.RunDirBusy,
)

RANK_LOST_EXIT_CODE = 3


def run_command(main, argv: list[str]) -> NoReturn:
    """Runs main(argv) as `guarded` does and ends the process with its exit code: the last line of
    every program that is started by its own name.
    """
    end_process(lambda: run_guarded(main, argv))


def run_guarded(main, argv: list[str]) -> int:
    """Runs main(argv) on every rank; what a user can mend is one line on stderr and exit code 2,
    never a traceback. Asked to stop: 0.

    3, with one line of one of the others, when a rank is gone or hangs: torchrun --max-restarts
    then starts all of them anew.
    """
    first = os.environ.get("RANK", "0") == "0"
    try:
        with process_group():
            try:
                main(argv)
            except Stopped as e:
                print_rank0(f"recr1: {e}")
        return 0
    except EXPECTED_ERRORS as e:  # on all ranks at once: see dist.fail_together
        if first:
            print(f"recr1: {make_printable(str(e))}", file=sys.stderr)
        return 2
    except heartbeat.RankLost as e:
        if str(e):
            print(f"recr1: {make_printable(str(e))}", file=sys.stderr)
        return RANK_LOST_EXIT_CODE
    finally:
        heartbeat.stop_heartbeat()
