"""What the command of a loop does with its arguments: python -m recr1.train and python -m
recr1.sft.
"""

from __future__ import annotations

from typing import Callable

from . import config_file as configs
from .config import Config, ConfigError
from .dryrun import shrunk
from .log import say


def launch(argv: list[str], module: str, loop: Callable[[Config], None]) -> None:
    """CONFIG.yaml [a.b=value ...] [--dry-run] -> loop(config), with --dry-run on everything in
    small. Raises ConfigError.
    """
    config, *overrides = [a for a in argv if a != "--dry-run"] or [""]
    if not config or config.startswith("-"):
        raise ConfigError(
            f"usage: python -m {module} CONFIG.yaml [a.b=value ...] [--dry-run], or torchrun --nproc-per-node N -m {module} ..."
        )
    cfg = configs.load(config, overrides)
    if "--dry-run" not in argv:
        return loop(cfg)
    with shrunk(cfg, config) as tiny:
        loop(tiny)
    say(f"dry run passed: {config}")
