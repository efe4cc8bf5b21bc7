"""Model folder <-> sharded policy: where weights.py's names and tensors meet fsdp.py's shards."""
from __future__ import annotations

import torch

from . import dist
from .fsdp import Sharded
from .weights import Tensors, empty_model, save_model

COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compute_type(name: str) -> torch.dtype:
    """model.compute -> the type of the gathered weights on this machine."""
    return COMPUTE[("bfloat16" if dist.device().type == "cuda" else "float32") if name == "auto" else name]


def load_policy(folder: str, reachable: int, compute: torch.dtype, checkpointing: bool = False) -> Sharded:
    """The folder's model, float32 masters; each rank reads what it owns. Raises ModelFolderError."""
    return _load(folder, reachable, compute=compute, checkpointing=checkpointing)


def load_reference(folder: str, reachable: int, compute: torch.dtype) -> Sharded:
    """The same, frozen and kept in the compute type: the policy before training."""
    return _load(folder, reachable, master=compute, compute=compute, frozen=("*",))


def _load(folder: str, reachable: int, **how) -> Sharded:
    model, tensors = empty_model(folder, reachable), Tensors(folder)
    tensors.check(model)
    return Sharded(model, tensors.__getitem__, device=dist.device(), **how)


def save_policy(policy: Sharded, tokenizer, stops: frozenset[int], folder: str) -> None:
    """A Hugging Face folder, written by rank 0; a collective."""
    if dist.rank() == 0:
        save_model(policy.config, policy.tensors(), tokenizer, stops, folder)
    else:
        for _ in policy.tensors():
            pass
