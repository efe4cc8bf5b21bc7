"""Model folder <-> sharded policy, and the checkpoints of a run.

    checkpoints/step_000123/rank_00000-of-00002.safetensors   a rank's shards: masters and AdamW's
    moments
                            model/                            the policy as a Hugging Face folder
                            state.json                        what else the run needs to go on
                            manifest.json                     size and sha256 of each file, written
                            last
    checkpoints/LATEST, BEST                                  names of folders

A folder is made as step_000123.partial and renamed when all of it is on the disk. All ranks see one
disk. No pickle is written or read.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Callable

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


def save_checkpoint(
    root: Path,
    step: int,
    state: Callable[[], dict],
    policy: Sharded,
    optimizer: Optimizer,
    tokenizer,
    stops: frozenset[int],
    recipe: str,
) -> Path:
    """Writes root/step_N; a collective. state() is called on rank 0. When it fails, on whatever
    rank, all raise and the older ones stand.
    """
    final = root / f"step_{step:06d}"
    folder = final.with_name(final.name + PARTIAL)
    own = _format_shard_name(dist.rank(), dist.world_size())
    with dist.fail_together(), report_write_errors(root):
        if dist.rank() == 0:
            remove_partial(root)
            folder.mkdir(parents=True)
    with dist.fail_together(), report_write_errors(folder):
        shards = {name: t.detach().cpu() for name, t in _collect_tensors(policy, optimizer).items()}
        try:
            save_file(shards, folder / own)
        except SafetensorError as e:
            raise WriteError(f"cannot write {folder / own}: {e}") from None
        written = {own: fingerprint_file(folder / own)}
    save_policy(policy, tokenizer, stops, folder / "model", recipe)
    parts = dist.gather_to_rank0(written)
    with dist.fail_together(), report_write_errors(folder):
        if parts is not None:
            (folder / "state.json").write_text(
                json.dumps(state() | _describe_setting(policy, optimizer)) + "\n", encoding="utf-8"
            )
            write_manifest(
                folder, {name: entry for part in parts for name, entry in part.items()}, final
            )
            write_text(root / "LATEST", final.name + "\n")
    return final


def prune_checkpoints(root: Path, keep: int, best: list | None) -> None:
    """Names the best (value, step) in BEST if it stands, and leaves the last `keep` checkpoints and
    those that LATEST and BEST name. Rank 0.
    """
    names = _list_checkpoint_names(root)
    if best and (name := f"step_{best[1]:06d}") in names:
        write_text(root / "BEST", name + "\n")
    for name in set(names[:-keep]) - {_read_pointer(root, "LATEST"), _read_pointer(root, "BEST")}:
        remove_path(root / name)


def settle_on_checkpoint(root: Path, folder: Path, best: list | None) -> list | None:
    """Goes on from `folder`: newer ones, which were refused, are set aside as step_N.refused,
    LATEST and BEST put right. Returns the best that stands. Rank 0.
    """
    names = _list_checkpoint_names(root)
    for name in names[names.index(folder.name) + 1 :]:
        aside = root / f"{name}.refused"
        if aside.exists():
            remove_path(aside)
        os.replace(root / name, aside)
    write_text(root / "LATEST", folder.name + "\n")
    best = best if best and f"step_{best[1]:06d}" in names else None
    if best:
        write_text(root / "BEST", f"step_{best[1]:06d}\n")
    else:
        (root / "BEST").unlink(missing_ok=True)
    return best


def remove_partial(root: Path) -> None:
    """What a run that died was writing."""
    for path in root.glob(f"*{PARTIAL}"):
        remove_path(path)


def find_newest_checkpoint(
    root: Path, policy: Sharded, optimizer: Optimizer, fits: Callable[[dict], None]
) -> tuple[Path | None, dict, list[str]]:
    """The newest checkpoint that is whole and fits this run, its state, and why each newer one was
    refused; a collective, rank 0 decides.

    fits(state) raises ValueError for a checkpoint that is another run's. All bytes are hashed, each
    rank its share of the files.
    """
    names, latest, refused = (
        *dist.broadcast_from_rank0((_list_checkpoint_names(root), _read_pointer(root, "LATEST"))),
        [],
    )
    if latest and latest not in names:
        refused.append(
            f"LATEST names {latest!r}: "
            + (
                "it is not there"
                if STEP_NAME.fullmatch(latest)
                else "no checkpoint's name, not followed"
            )
        )
    for name in reversed(names):
        folder = root / name
        files = {}
        state = {}
        why = None
        if dist.rank() == 0:
            try:
                files = read_manifest(folder)
                state = _read_state(folder, files, policy, optimizer)
                fits(state)
            except (ValueError, OSError, KeyError, TypeError, AttributeError) as e:
                why = _describe_error(e)
        files, state, why = dist.broadcast_from_rank0((files, state, why))
        if not why:
            why = next(
                filter(
                    None,
                    dist.broadcast_from_rank0(
                        dist.gather_to_rank0(
                            _check_share(folder, files, state, _collect_tensors(policy, optimizer))
                        )
                    ),
                ),
                None,
            )
        if not why:
            return folder, state, refused
        refused.append(f"{name}: {why}")
    return None, {}, refused


def load_checkpoint(folder: Path, state: dict, policy: Sharded, optimizer: Optimizer) -> None:
    """Masters, moments and counters of a checkpoint that `newest` has found good. Saved by another
    number of ranks, the shards are dealt anew.
    """
    files = [
        safe_open(folder / _format_shard_name(q, state["world"]), framework="pt", device="cpu")
        for q in range(state["world"])
    ]

    def read(name: str, like: torch.Tensor) -> torch.Tensor:
        slices = [file.get_slice(name) for file in files]
        if not like.ndim:
            return files[0].get_tensor(name)
        [theirs], n = slices[0].get_shape(), len(like)
        # only the end of the last shards is no weight: zeros
        first = dist.rank() * n
        out = torch.zeros(n, dtype=like.dtype)
        for q, part in enumerate(slices):
            low = max(first, q * theirs)
            high = min(first + n, (q + 1) * theirs)
            if low < high:
                out[low - first : high - first] = part[low - q * theirs : high - q * theirs]
        return out

    with torch.no_grad():
        for name, unit in _get_groups(policy).items():
            unit.shard.copy_(read(f"{name}.shard", unit.shard))
    restore_optimizer(
        optimizer,
        {name: read(name, t) for name, t in get_moments(optimizer).items()},
        state["taken"],
        state["skipped"],
    )


def get_moments(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state by name: "exp_avg.NAME", "exp_avg_sq.NAME" and the updates made, "step.NAME"
    (), of each trained parameter; at first zeros.

    The state itself: `step` is not taken - skipped, for a step without any gradient makes no
    update.
    """
    [(_, adamw)], found = optimizer.optimizers, {}
    for p, name in optimizer.names.items():
        state = adamw.state[p]
        if not state:
            state |= dict(
                step=torch.zeros((), device=p.device),
                exp_avg=torch.zeros_like(p),
                exp_avg_sq=torch.zeros_like(p),
            )
        found |= {f"{key}.{name}": t for key, t in state.items()}
    return found


def restore_optimizer(
    optimizer: Optimizer, tensors: dict[str, torch.Tensor], taken: int, skipped: int
) -> None:
    """Goes on from what moments() gave, and from the steps taken and skipped until then."""
    optimizer.num_steps, optimizer.num_skipped = taken, skipped
    for name, t in get_moments(optimizer).items():
        t.copy_(tensors[name])


def _get_groups(policy: Sharded) -> dict[str, ParamGroup]:
    return {
        name: module for name, module in policy.named_modules() if isinstance(module, ParamGroup)
    }


def _collect_tensors(policy: Sharded, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """All that a rank must not lose, by name."""
    return {
        f"{name}.shard": unit.shard for name, unit in _get_groups(policy).items()
    } | get_moments(optimizer)


def _describe_setting(policy: Sharded, optimizer: Optimizer) -> dict:
    """What a resumed run compares itself with: counters, versions, how each unit's weights lie in
    its flat vector, the shapes of a rank's tensors.
    """
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
        shapes={name: list(t.shape) for name, t in _collect_tensors(policy, optimizer).items()},
    )


def list_differences(state: dict, policy: Sharded, optimizer: Optimizer) -> str:
    """In what this process differs from the one that saved `state`: a resumed run is bit-exact only
    where this is empty.
    """
    now = _describe_setting(policy, optimizer)
    return ", ".join(
        f"{key} {state[key]} -> {now[key]}"
        for key in ("world", "threads", "torch", "device", "cpu")
        if state.get(key) != now[key]
    )


def _describe_layout(policy: Sharded) -> dict:
    """Unit by unit, the flat vector's length up to the end of its last weight (what follows fills
    the last shards) and the weights in it.
    """
    return {
        name: dict(
            size=unit.flat_param.size,
            weights=[[w.name, list(w.shape), w.start] for w in unit.flat_param.weights],
        )
        for name, unit in _get_groups(policy).items()
    }


def _read_state(
    folder: Path, files: dict[str, dict], policy: Sharded, optimizer: Optimizer
) -> dict:
    """state.json, if it belongs to this model and to the shards beside it. Raises Damaged."""
    if "state.json" not in files:
        raise Damaged("state.json is missing")
    check_file(folder, "state.json", files["state.json"])
    state = read_json(folder / "state.json")
    if (
        state["version"] != 1
        or folder.name != f"step_{state['step']:06d}"
        or not 1 <= state["world"] <= 10**5
    ):
        raise Damaged("state.json is of another step or version")
    shards = {_format_shard_name(q, state["world"]) for q in range(state["world"])}
    for name in sorted(files.keys() ^ shards):
        if name in shards:
            raise Damaged(f"{name} is missing")
        if name != "state.json" and (
            not name.startswith("model/")
            or name.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py"))
        ):
            raise Damaged(f"{name!r} is no file of a checkpoint: not opened")
    shapes = state["shapes"]
    if (
        state["units"] != _describe_layout(policy)
        or shapes.keys() != _collect_tensors(policy, optimizer).keys()
    ):
        raise Damaged(
            "state.json: its weights lie otherwise than this policy's; it is another model's, or another version's"
        )
    for name, unit in state["units"].items():
        [length] = shapes[f"{name}.shard"]
        if length * state["world"] < unit["size"] or any(
            shape not in ([], [length])
            for key, shape in shapes.items()
            if key.endswith(f".{name}.shard")
        ):
            raise Damaged(f"state.json: the shards of {name} are not all of it")
    if not all(type(state[key]) is int for key in ("world", "taken", "skipped")):
        raise Damaged("state.json: a counter is no whole number")
    return state


def _check_share(
    folder: Path, files: dict[str, dict], state: dict, tensors: dict[str, torch.Tensor]
) -> str | None:
    """Why one of this rank's share of the files is not what it should be."""
    try:
        for i, name in enumerate(sorted(files)):
            if i % dist.world_size() == dist.rank():
                check_file(folder, name, files[name])
                if name.startswith("rank_"):
                    file = safe_open(folder / name, framework="pt", device="cpu")
                    if {t: file.get_slice(t).get_shape() for t in file.keys()} != state[
                        "shapes"
                    ] or any(
                        (file.get_slice(t)[:0] if like.ndim else file.get_tensor(t)).dtype
                        != like.dtype
                        for t, like in tensors.items()
                    ):
                        raise Damaged(f"{name}: its tensors are not those of state.json")
    except (ValueError, OSError, SafetensorError) as e:
        return _describe_error(e)
    return None


def _format_shard_name(rank: int, world: int) -> str:
    return f"rank_{rank:05d}-of-{world:05d}.safetensors"


def _list_checkpoint_names(root: Path) -> list[str]:
    """Checkpoints by step, whatever their state."""
    found = [p.name for p in root.iterdir() if STEP_NAME.fullmatch(p.name)] if root.is_dir() else []
    return sorted(found, key=lambda name: int(name.removeprefix("step_")))


def _read_pointer(root: Path, name: str) -> str:
    """What LATEST or BEST says: looked at, never followed."""
    path = root / name
    return (
        path.read_text(encoding="utf-8", errors="replace")[:200].strip()
        if path.is_file() and not path.is_symlink()
        else ""
    )


def _describe_error(e: Exception) -> str:
    return str(e) if isinstance(e, (ValueError, SafetensorError)) else f"{type(e).__name__}: {e}"
