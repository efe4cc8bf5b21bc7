"""How a command starts and ends: python -m recr1.train, python -m recr1.sft and the others."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from recr1.config import loader as configs
from recr1.config.schema import Config, ConfigError
from recr1.data.chat_template import ChatError
from recr1.data.readers import DataError
from recr1.distributed import collectives as dist, heartbeat
from recr1.distributed.printing import print_rank0
from recr1.distributed.process_group import TooFewGpus, process_group
from recr1.memory.out_of_memory import OutOfMemory, describe_allocation, is_out_of_memory
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

# What a user can mend: one line on stderr and exit code 2.
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

EXPECTED_ERROR_EXIT_CODE = 2
RANK_LOST_EXIT_CODE = 3


def launch_loop(argv: list[str], module: str, loop: Callable[[Config], None]) -> None:
    """Run loop(config) for the arguments CONFIG.yaml [a.b=value ...] [--dry-run].

    With --dry-run everything of the config is made small. Raises ConfigError.
    """
    is_dry_run = "--dry-run" in argv
    arguments = [argument for argument in argv if argument != "--dry-run"]
    path, *overrides = arguments or [""]
    if not path or path.startswith("-"):
        raise ConfigError(
            f"usage: python -m {module} CONFIG.yaml [a.b=value ...] [--dry-run], "
            f"or torchrun --nproc-per-node N -m {module} ..."
        )
    cfg = configs.load_config(path, overrides)
    if not is_dry_run:
        loop(cfg)
        return
    with shrunk_config(cfg, path) as small_cfg:
        loop(small_cfg)
    print_rank0(f"dry run passed: {path}")


def run_command(main: Callable[[list[str]], None], argv: list[str]) -> NoReturn:
    """Run main(argv) as `run_guarded` does and end the process with its exit code.

    The last line of every program that is started by its own name.
    """
    end_process(lambda: run_guarded(main, argv))


def run_guarded(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run main(argv) on every rank and return the exit code of this one.

    0: finished, or asked to stop.
    2: what a user can mend; rank 0 prints one line on stderr, never a traceback. Memory may run out
        on one rank alone: that one prints the line.
    3: another rank is gone or hangs; a single rank prints one line that says which.

    Anything else that is raised leaves this function. `end_process` prints its traceback and ends
    with 1, a bug, or 130 after a second Ctrl-C. torchrun --max-restarts starts all ranks anew after
    any of 1 to 3; when it gives up it ends with 1 itself, whatever the ranks ended with.
    """
    is_rank0 = os.environ.get("RANK", "0") == "0"
    try:
        with process_group():
            try:
                main(argv)
            except Stopped as e:
                print_rank0(f"recr1: {e}")
            except (RuntimeError, MemoryError) as e:
                if isinstance(e, OutOfMemory) or not is_out_of_memory(e):
                    raise
                # Outside of a run's steps, where there is no advice.
                message = f"out of memory: {describe_allocation(e)}"
                raise OutOfMemory(message, dist.is_common_error(e)) from None
        return 0
    except EXPECTED_ERRORS as e:  # on all ranks at once: see collectives.fail_together
        if is_rank0:
            _print_error(e)
        return EXPECTED_ERROR_EXIT_CODE
    except TooFewGpus as e:
        if os.environ["LOCAL_RANK"] == "0":  # of the machine that has too few
            _print_error(e)
        return EXPECTED_ERROR_EXIT_CODE
    except OutOfMemory as e:
        if is_rank0 or not e.is_common:
            _print_error(e)
        return EXPECTED_ERROR_EXIT_CODE
    except heartbeat.RankLost as e:
        if str(e):
            _print_error(e)
        return RANK_LOST_EXIT_CODE
    finally:
        heartbeat.stop_heartbeat()


def _print_error(error: BaseException) -> None:
    print(f"recr1: {make_printable(str(error))}", file=sys.stderr)
