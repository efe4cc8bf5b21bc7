"""Whose folder run.dir is: a new one, or an unfinished run of the same config."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from recr1.config import loader as configs
from recr1.config.schema import Config
from recr1.utils.files import PARTIAL

# what a run that goes on may have otherwise
CHANGEABLE_KEYS = ("run.dir", "run.threads", "run.patience", "retriever.timeout", "log.", "save.")


class RunError(ValueError):
    """The run cannot start as configured. The message says what to change."""


def claim_run_dir(folder: Path, cfg: Config) -> bool:
    """Whether `folder` holds a run of this config that is not finished; False: nothing. Raises
    RunError for anything else.
    """
    if (
        not folder.exists()
        or folder.is_dir()
        and {p.name for p in folder.iterdir()} <= {f"config.yaml{PARTIAL}"}
    ):
        return False
    if not (folder / "config.yaml").is_file():
        raise RunError(
            f"run.dir: {folder} exists, is not empty and holds no run's config.yaml; name a new folder, or move it away"
        )
    if (folder / "summary.json").exists():
        raise RunError(
            f"run.dir: the run in {folder} is finished; name a new folder, or move it away"
        )
    if difference := find_difference(
        dataclasses.asdict(configs.load_config(str(folder / "config.yaml"), [])), cfg
    ):
        raise RunError(
            f"run.dir: the run in {folder} has another config: {difference}; set it back, or name a new folder"
        )
    return True


def find_difference(other: dict, cfg: Config) -> str:
    """The first key in which a config, as a dict, is not `cfg`, with both values; "" for none. What
    FREE names does not count.
    """

    def flat(tree: dict, where: str = "") -> dict:
        parts = (
            flat(v, f"{where}{k}.")
            if isinstance(v, dict)
            else {where + k: list(v) if isinstance(v, tuple) else v}
            for k, v in tree.items()
        )
        return {k: v for part in parts for k, v in part.items()}

    theirs = flat(other)
    ours = flat(dataclasses.asdict(cfg))
    return next(
        (
            f"{key} was {theirs.get(key)!r}, is {ours.get(key)!r}"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key) and not key.startswith(CHANGEABLE_KEYS)
        ),
        "",
    )
