"""The checkpoints of a run: the sharded policy and its Hugging Face folder, written and read.

    checkpoints/step_000123/rank_00000-of-00002.safetensors  a rank's masters and AdamW's moments
                            model/                           the policy as a Hugging Face folder
                            state.json                       what else the run needs to continue
                            manifest.json                    size and sha256 of each file, the last
    checkpoints/LATEST, BEST                                 names of folders

A folder is made as step_000123.partial and renamed when all of it is on the disk. All ranks see one
disk. No pickle is written or read.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recr1.distributed import collectives as dist
from recr1.distributed.fsdp import ParamGroup, Sharded
from recr1.training.load_model import save_policy
from recr1.training.optimizer import Optimizer
from recr1.utils.files import (
    PARTIAL,
    Damaged,
    WriteError,
    check_file,
    fingerprint_file,
    read_json,
    read_manifest,
    remove_path,
    report_write_errors,
    write_manifest,
    write_text,
)

STEP_NAME = re.compile(r"step_\d{6,}")

# pickles and programs: never opened, whatever the manifest says
FORBIDDEN_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py")


class FoundCheckpoint(NamedTuple):
    """What find_newest_checkpoint returns."""

    folder: Path | None  # None: no checkpoint fits
    state: dict[str, Any]  # its state.json
    refused: list[str]  # why each newer one was refused


def format_checkpoint_name(step: int) -> str:
    """Return the name of a step's folder."""
    return f"step_{step:06d}"


def save_checkpoint(
    root: Path,
    step: int,
    state: Callable[[], dict],
    policy: Sharded,
    optimizer: Optimizer,
    tokenizer: Any,
    stops: frozenset[int],
    recipe: str,
) -> Path:
    """Write root/step_N and return it; a collective. If it fails on one rank, all raise, and the
    older checkpoints stay as they are.

    Args:
        state: returns what else the run needs to continue; called on rank 0.
        stops: ids that end a text, for the Hugging Face folder.
        recipe: text of the Hugging Face folder's recr1.yaml.
    """
    final = root / format_checkpoint_name(step)
    folder = final.with_name(final.name + PARTIAL)
    shard_name = _format_shard_name(dist.rank(), dist.world_size())
    with dist.fail_together(), report_write_errors(root):
        if dist.rank() == 0:
            remove_partial(root)
            folder.mkdir(parents=True)

    # Every rank writes its shards, and all write the Hugging Face folder together.
    with dist.fail_together(), report_write_errors(folder):
        _write_shards(folder / shard_name, policy, optimizer)
        fingerprint = fingerprint_file(folder / shard_name)
    save_policy(policy, tokenizer, stops, folder / "model", recipe)
    fingerprints = dist.gather_to_rank0((shard_name, fingerprint))

    # The manifest is last: a folder with its final name is complete.
    with dist.fail_together(), report_write_errors(folder):
        if fingerprints is not None:
            full_state = state() | _describe_setting(policy, optimizer)
            text = json.dumps(full_state) + "\n"
            (folder / "state.json").write_text(text, encoding="utf-8")
            write_manifest(folder, dict(fingerprints), final)
            write_text(root / "LATEST", final.name + "\n")
    return final


def _write_shards(path: Path, policy: Sharded, optimizer: Optimizer) -> None:
    """Write this rank's tensors. Raises WriteError."""
    tensors = _collect_tensors(policy, optimizer)
    shards = {name: t.detach().cpu() for name, t in tensors.items()}
    try:
        save_file(shards, path)
    except SafetensorError as e:
        raise WriteError(f"cannot write {path}: {e}") from None


def prune_checkpoints(root: Path, keep: int, best: list | None) -> None:
    """Remove all but the last `keep` checkpoints and those that LATEST and BEST name. Rank 0.

    best: value and step of the best checkpoint; if it exists, BEST gets its name first.
    """
    names = _list_checkpoint_names(root)
    if best:
        best_name = format_checkpoint_name(best[1])
        if best_name in names:
            write_text(root / "BEST", best_name + "\n")
    named = {_read_pointer(root, "LATEST"), _read_pointer(root, "BEST")}
    for name in names[:-keep]:
        if name not in named:
            remove_path(root / name)


def settle_on_checkpoint(root: Path, folder: Path, best: list | None) -> list | None:
    """Make `folder` the newest checkpoint: rename newer ones, which were refused, to
    step_N.refused, and correct LATEST and BEST. Return `best` if its checkpoint exists, else None.
    Rank 0.
    """
    names = _list_checkpoint_names(root)
    newer = names[names.index(folder.name) + 1 :]
    for name in newer:
        aside = root / f"{name}.refused"
        if aside.exists():
            remove_path(aside)
        os.replace(root / name, aside)
    write_text(root / "LATEST", folder.name + "\n")

    if best:
        best_name = format_checkpoint_name(best[1])
        if best_name in names:
            write_text(root / "BEST", best_name + "\n")
            return best
    (root / "BEST").unlink(missing_ok=True)
    return None


def remove_partial(root: Path) -> None:
    """Remove what a run that died was writing."""
    for path in root.glob(f"*{PARTIAL}"):
        remove_path(path)


def find_newest_checkpoint(
    root: Path, policy: Sharded, optimizer: Optimizer, fits: Callable[[dict], None]
) -> FoundCheckpoint:
    """Return the newest checkpoint that is complete and fits this run; a collective, rank 0
    decides.

    fits(state) raises ValueError for a checkpoint that is another run's. All bytes are hashed; each
    rank hashes its share of the files.
    """
    names, latest = dist.broadcast_from_rank0(
        (_list_checkpoint_names(root), _read_pointer(root, "LATEST"))
    )
    refused = []
    if latest and latest not in names:
        is_name = STEP_NAME.fullmatch(latest)
        why_latest = "it is not there" if is_name else "no checkpoint's name, not followed"
        refused.append(f"LATEST names {latest!r}: {why_latest}")
    for name in reversed(names):
        state, reason = _examine_checkpoint(root / name, policy, optimizer, fits)
        if not reason:
            return FoundCheckpoint(root / name, state, refused)
        refused.append(f"{name}: {reason}")
    return FoundCheckpoint(None, {}, refused)


def _examine_checkpoint(
    folder: Path, policy: Sharded, optimizer: Optimizer, fits: Callable[[dict], None]
) -> tuple[dict, str | None]:
    """Return a checkpoint's state and, on all ranks the same, why it is refused; a collective."""
    files = {}
    state = {}
    reason = None
    if dist.rank() == 0:
        try:
            files = read_manifest(folder)
            state = _read_state(folder, files, policy, optimizer)
            fits(state)
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as e:
            reason = _describe_error(e)
    files, state, reason = dist.broadcast_from_rank0((files, state, reason))
    if reason:
        return state, reason

    tensors = _collect_tensors(policy, optimizer)
    reason_of_rank = _check_share(folder, files, state, tensors)
    reasons = dist.broadcast_from_rank0(dist.gather_to_rank0(reason_of_rank))
    return state, next(filter(None, reasons), None)


def load_checkpoint(folder: Path, state: dict, policy: Sharded, optimizer: Optimizer) -> None:
    """Load masters, moments and counters of a checkpoint that `find_newest_checkpoint` returned.

    Shards that another number of ranks saved are cut anew.
    """
    files = []
    for rank in range(state["world"]):
        path = folder / _format_shard_name(rank, state["world"])
        files.append(safe_open(path, framework="pt", device="cpu"))
    with torch.no_grad():
        for name, group in _get_groups(policy).items():
            group.shard.copy_(_read_own_numbers(files, f"{name}.shard", group.shard))
    moments = {
        name: _read_own_numbers(files, name, t) for name, t in get_moments(optimizer).items()
    }
    restore_optimizer(optimizer, moments, state["taken"], state["skipped"])


def _read_own_numbers(files: list, name: str, like: torch.Tensor) -> torch.Tensor:
    """Return this rank's numbers of a tensor that lies in one shard in each of `files`; of a scalar
    the first file's.
    """
    if not like.ndim:
        return files[0].get_tensor(name)
    saved_shards = [file.get_slice(name) for file in files]
    [saved_size] = saved_shards[0].get_shape()
    size = len(like)
    start = dist.rank() * size
    # What no file has is no weight: the zeros at the end of the last shards.
    shard = torch.zeros(size, dtype=like.dtype)
    for i, saved_shard in enumerate(saved_shards):
        saved_start = i * saved_size
        low = max(start, saved_start)
        high = min(start + size, saved_start + saved_size)
        if low < high:
            numbers = saved_shard[low - saved_start : high - saved_start]
            shard[low - start : high - start] = numbers
    return shard


def get_moments(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Return AdamW's state by name: "exp_avg.NAME", "exp_avg_sq.NAME" and the number of updates,
    "step.NAME" (), of each trained parameter. Before the first update they are zeros.

    These are the tensors themselves, not copies. `step` is not taken - skipped: a step without any
    gradient makes no update.
    """
    [(_, adamw)] = optimizer.optimizers
    moments = {}
    for p, name in optimizer.names.items():
        for key, t in adamw.state[p].items():
            moments[f"{key}.{name}"] = t
    return moments


def restore_optimizer(
    optimizer: Optimizer, tensors: dict[str, torch.Tensor], taken: int, skipped: int
) -> None:
    """Set the moments, as get_moments names them, and the number of steps taken and skipped."""
    optimizer.num_steps = taken
    optimizer.num_skipped = skipped
    for name, t in get_moments(optimizer).items():
        t.copy_(tensors[name])


def _get_groups(policy: Sharded) -> dict[str, ParamGroup]:
    """Return the policy's parameter groups by name: "units.0", "units.1", ..."""
    return {
        name: module for name, module in policy.named_modules() if isinstance(module, ParamGroup)
    }


def _collect_tensors(policy: Sharded, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Return all tensors that a rank saves, by name."""
    shards = {f"{name}.shard": group.shard for name, group in _get_groups(policy).items()}
    return shards | get_moments(optimizer)


def _describe_setting(policy: Sharded, optimizer: Optimizer) -> dict[str, Any]:
    """Return what a resumed run compares with its own: counters, versions, the layout of each
    group's flat vector, the shapes of a rank's tensors.
    """
    tensors = _collect_tensors(policy, optimizer)
    return dict(
        version=1,
        taken=optimizer.num_steps,
        skipped=optimizer.num_skipped,
        world=dist.world_size(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        device=dist.device().type,
        cpu=torch.backends.cpu.get_cpu_capability(),
        units=_describe_layout(policy),
        shapes={name: list(t.shape) for name, t in tensors.items()},
    )


def list_differences(state: dict, policy: Sharded, optimizer: Optimizer) -> list[str]:
    """Return in what this process differs from the one that saved `state`, and whether its GPU
    would repeat a sum: a resumed run is bit-exact only if this is empty.
    """
    now = _describe_setting(policy, optimizer)
    differences = []
    for key in ("world", "threads", "torch", "device", "cpu"):
        if state.get(key) != now[key]:
            differences.append(f"{key} {state[key]} -> {now[key]}")
    if now["device"] == "cuda" and not torch.are_deterministic_algorithms_enabled():
        differences.append("a GPU adds in any order, with run.deterministic=true in one")
    return differences


def _describe_layout(policy: Sharded) -> dict[str, dict]:
    """Return, for each group, the length of its flat vector up to the end of its last weight (the
    rest fills the last shards) and the weights in it.
    """
    layout = {}
    for name, group in _get_groups(policy).items():
        flat_param = group.flat_param
        weights = [[w.name, list(w.shape), w.start] for w in flat_param.weights]
        layout[name] = dict(size=flat_param.size, weights=weights)
    return layout


def _read_state(
    folder: Path, files: dict[str, dict], policy: Sharded, optimizer: Optimizer
) -> dict[str, Any]:
    """Return state.json if it belongs to this model and to the shards beside it. Raises Damaged."""
    if "state.json" not in files:
        raise Damaged("state.json is missing")
    check_file(folder, "state.json", files["state.json"])
    state = read_json(folder / "state.json")
    if (
        state["version"] != 1
        or folder.name != format_checkpoint_name(state["step"])
        or not 1 <= state["world"] <= 10**5
    ):
        raise Damaged("state.json is of another step or version")
    _check_names(files, state["world"])
    tensors = _collect_tensors(policy, optimizer)
    if state["units"] != _describe_layout(policy) or state["shapes"].keys() != tensors.keys():
        raise Damaged(
            "state.json: its weights lie otherwise than this policy's; "
            "it is another model's, or another version's"
        )
    _check_shapes(state)
    for key in ("world", "taken", "skipped"):
        if type(state[key]) is not int:
            raise Damaged("state.json: a counter is no whole number")
    return state


def _check_names(files: dict[str, dict], world: int) -> None:
    """Raise Damaged unless a checkpoint has all its shards and no file that does not belong to
    it.
    """
    shard_names = {_format_shard_name(rank, world) for rank in range(world)}
    for name in sorted(files.keys() ^ shard_names):
        if name in shard_names:
            raise Damaged(f"{name} is missing")
        is_of_model = name.startswith(("model/", "adapter/")) and not name.endswith(
            FORBIDDEN_ENDINGS
        )
        if name != "state.json" and not is_of_model:
            raise Damaged(f"{name!r} is no file of a checkpoint: not opened")


def _check_shapes(state: dict[str, Any]) -> None:
    """Raise Damaged unless the shards of each group, joined, hold all its weights."""
    shapes = state["shapes"]
    for group_name, layout in state["units"].items():
        [length] = shapes[f"{group_name}.shard"]
        is_complete = length * state["world"] >= layout["size"]
        for name, shape in shapes.items():
            if name.endswith(f".{group_name}.shard") and shape not in ([], [length]):
                is_complete = False  # a moment of another length than its shard
        if not is_complete:
            raise Damaged(f"state.json: the shards of {group_name} are not all of it")


def _check_share(
    folder: Path, files: dict[str, dict], state: dict, tensors: dict[str, torch.Tensor]
) -> str | None:
    """Check this rank's share of the files. Return what is wrong with the first bad one, or
    None.
    """
    share = sorted(files)[dist.rank() :: dist.world_size()]
    try:
        for name in share:
            check_file(folder, name, files[name])
            if name.startswith("rank_"):
                _check_tensors(folder, name, state["shapes"], tensors)
    except (ValueError, OSError, SafetensorError) as e:
        return _describe_error(e)
    return None


def _check_tensors(
    folder: Path, name: str, shapes: dict[str, list[int]], tensors: dict[str, torch.Tensor]
) -> None:
    """Raise Damaged unless a file of shards has the given shapes and the types of `tensors`."""
    file = safe_open(folder / name, framework="pt", device="cpu")
    is_good = {key: file.get_slice(key).get_shape() for key in file.keys()} == shapes
    if is_good:
        for key, like in tensors.items():
            # of a vector no numbers, only the type
            saved = file.get_slice(key)[:0] if like.ndim else file.get_tensor(key)
            is_good = is_good and saved.dtype == like.dtype
    if not is_good:
        raise Damaged(f"{name}: its tensors are not those of state.json")


def _format_shard_name(rank: int, world: int) -> str:
    """Return the name of a rank's file."""
    return f"rank_{rank:05d}-of-{world:05d}.safetensors"


def _list_checkpoint_names(root: Path) -> list[str]:
    """Return the names of all checkpoints, by step, whatever their state."""
    if not root.is_dir():
        return []
    names = [path.name for path in root.iterdir() if STEP_NAME.fullmatch(path.name)]
    return sorted(names, key=lambda name: int(name.removeprefix("step_")))


def _read_pointer(root: Path, name: str) -> str:
    """Return the text of LATEST or BEST, "" if there is none. It is never followed as a path."""
    path = root / name
    if path.is_symlink() or not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text[:200].strip()


def _describe_error(e: Exception) -> str:
    """Return an error as one line; our own messages without their type."""
    if isinstance(e, (ValueError, SafetensorError)):
        return str(e)
    return f"{type(e).__name__}: {e}"
