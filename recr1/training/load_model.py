"""A Hugging Face folder to a sharded policy or reference, and back."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError

from recr1.config.schema import ConfigError
from recr1.distributed import collectives as dist
from recr1.distributed.fsdp import Sharded
from recr1.kernels.cpu_linear import explain_inexact
from recr1.model.decoder import Decoder
from recr1.model.hf_weights import SafetensorsFolder, make_empty_model, save_model
from recr1.model.varlen_attention import AttentionUnavailable, choose_attention
from recr1.utils.files import WriteError, report_write_errors

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_compute_dtype(name: str) -> torch.dtype:
    """model.compute -> the type of the gathered weights on this machine."""
    return COMPUTE_DTYPES[
        ("bfloat16" if dist.device().type == "cuda" else "float32") if name == "auto" else name
    ]


def load_policy(
    folder: str,
    reachable: int,
    compute: torch.dtype,
    checkpointing: bool = False,
    frozen: str = "",
    attention: str = "auto",
    exact: bool = False,
    float32_head: bool = False,
) -> Sharded:
    """The folder's model, float32 masters; each rank reads what it owns. `frozen`, `attention`,
    `exact` (model.batch_invariant), `float32_head`: as in the config. Raises ModelFolderError,
    ConfigError.
    """
    patterns = tuple(p.strip() for p in frozen.split(",") if p.strip())
    model, tensors = _open_model(folder, reachable, compute, attention, exact, float32_head)
    names = model.state_dict().keys()
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"train.frozen: {pattern!r} fits the name of no weight; they are called {next(iter(names))} and the like"
            )
    if all(any(fnmatchcase(name, pattern) for pattern in patterns) for name in names):
        raise ConfigError("train.frozen: every weight is frozen, nothing is left to train")
    return Sharded(
        model,
        tensors.__getitem__,
        device=dist.device(),
        compute=compute,
        checkpointing=checkpointing,
        frozen=patterns,
    )


def load_reference(
    folder: str,
    reachable: int,
    compute: torch.dtype,
    on_host: bool = False,
    attention: str = "auto",
    exact: bool = False,
    float32_head: bool = False,
) -> Sharded:
    """The same, frozen and kept in the compute type, in host memory if asked: the policy before
    training.
    """
    model, tensors = _open_model(folder, reachable, compute, attention, exact, float32_head)
    return Sharded(
        model,
        tensors.__getitem__,
        device=dist.device(),
        master=compute,
        compute=compute,
        frozen=("*",),
        on_host=on_host,
    )


def _open_model(
    folder: str,
    reachable: int,
    compute: torch.dtype,
    attention: str,
    exact: bool,
    float32_head: bool,
) -> tuple[Decoder, SafetensorsFolder]:
    model = make_empty_model(folder, reachable)
    tensors = SafetensorsFolder(folder)
    tensors.check(model)
    c = model.config
    try:
        backend = choose_attention(
            attention,
            c.num_attention_heads > c.num_key_value_heads,
            c.head_dim,
            compute,
            dist.device(),
        )
    except AttentionUnavailable as e:
        raise ConfigError(f"model.attention: {e}; sdpa runs everywhere") from None
    if exact and (why := explain_inexact(compute, dist.device())):
        raise ConfigError(f"model.batch_invariant: {why}")
    model.set_backend(backend._replace(exact=exact, float32_head=float32_head))
    return model, tensors


def save_policy(
    policy: Sharded, tokenizer, stops: frozenset[int], folder: Path, recipe: str
) -> None:
    """A Hugging Face folder with `recipe` as its recr1.yaml, written by rank 0, read again and
    compared; a collective. Raises WriteError.
    """

    def write(tensors):
        save_model(policy.config, tensors, tokenizer, stops, str(folder))
        (folder / "recr1.yaml").write_text(recipe, encoding="utf-8")

    def compare(tensors):
        written = SafetensorsFolder(str(folder))
        for name, t in tensors:
            if not torch.equal(
                written[name].view(torch.uint8), t.detach().cpu().contiguous().view(torch.uint8)
            ):
                raise WriteError(
                    f"{folder}: {name} reads back otherwise than it was written; the disk is failing"
                )

    for work in (write, compare):
        tensors = policy.tensors()
        error = None
        if dist.rank() == 0:
            try:
                with report_write_errors(folder):
                    work(tensors)
            except Exception as e:  # the other ranks are in the collectives of tensors()
                error = e
        for _ in tensors:
            pass
        with dist.fail_together():
            if error:
                raise (
                    error
                    if not isinstance(error, SafetensorError)
                    else WriteError(f"cannot write {folder}: {error}")
                )
