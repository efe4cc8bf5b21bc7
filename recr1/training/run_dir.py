"""Checks whose folder run.dir is: a new one, or that of an unfinished run of the same config."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from recr1.config import loader as configs
from recr1.config.schema import Config
from recr1.utils.files import PARTIAL

# What a run needs less memory by: all that the plan advises, and the cache. The numbers stay the
# same, by the first three to the bit, by the others but for rounding.
EXACT_MEMORY_KEYS = (
    "train.gradient_checkpointing",
    "optimizer.cpu_offload",
    "loss.reference_cpu_offload",
)
ROUNDING_MEMORY_KEYS = (
    "train.tokens_per_micro_batch",
    "train.gradient_sync",
    "sampling.kv_cache_gib",
)

# what may differ in a run that continues
CHANGEABLE_KEYS = (
    "run.dir",
    "run.threads",
    "run.collective_timeout",
    "run.deterministic",
    "retriever.timeout",
    "log.",
    "save.",
    *EXACT_MEMORY_KEYS,
    *ROUNDING_MEMORY_KEYS,
)


class RunError(ValueError):
    """The run cannot start as configured. The message says what to change."""


def claim_run_dir(folder: Path, cfg: Config) -> bool:
    """Return True if `folder` holds an unfinished run of this config, False if it is new or empty.
    Raises RunError for anything else.
    """
    if not folder.exists():
        return False
    config_path = folder / "config.yaml"
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        if names <= {f"config.yaml{PARTIAL}"}:
            return False
    if not config_path.is_file():
        raise RunError(
            f"run.dir: {folder} exists, is not empty and holds no run's config.yaml; "
            "name a new folder, or move it away"
        )
    if (folder / "summary.json").exists():
        raise RunError(
            f"run.dir: the run in {folder} is finished; name a new folder, or move it away"
        )
    config_of_run = configs.load_config(str(config_path), [])
    difference = find_difference(dataclasses.asdict(config_of_run), cfg)
    if difference:
        raise RunError(
            f"run.dir: the run in {folder} has another config: {difference}; "
            "set it back, or name a new folder"
        )
    return True


def find_difference(other: dict[str, Any], cfg: Config) -> str:
    """Return the first key in which a config, as a dict, differs from `cfg`, with both values; ""
    if there is none. What CHANGEABLE_KEYS names does not count.
    """
    other_values = _flatten(other)
    values = _flatten(dataclasses.asdict(cfg))
    for key in sorted(other_values.keys() | values.keys()):
        other_value = other_values.get(key)
        value = values.get(key)
        if other_value != value and not key.startswith(CHANGEABLE_KEYS):
            return f"{key} was {other_value!r}, is {value!r}"
    return ""


def list_rounding_changes(other: dict[str, Any], cfg: Config) -> list[str]:
    """Return the changes from a config, as a dict, to `cfg` that change how numbers are rounded."""
    other_values = _flatten(other)
    values = _flatten(dataclasses.asdict(cfg))
    changes = []
    for key in ROUNDING_MEMORY_KEYS:
        if other_values.get(key) != values[key]:
            changes.append(f"{key} {other_values.get(key)} -> {values[key]}")
    return changes


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dict's values by dotted key, tuples as lists: JSON has no tuples."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            values |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, tuple):
            values[prefix + key] = list(value)
        else:
            values[prefix + key] = value
    return values
