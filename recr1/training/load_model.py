"""Loads a Hugging Face folder as a sharded policy or reference, and saves it again."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from safetensors import SafetensorError

from recr1.config.schema import Config, ConfigError
from recr1.distributed import collectives as dist
from recr1.distributed.fsdp import Sharded
from recr1.kernels.availability import choose_backend
from recr1.kernels.cpu_linear import explain_inexact
from recr1.model.adapter_folder import AdapterFolder, save_adapter
from recr1.model.decoder import Decoder
from recr1.model.hf_weights import SafetensorsFolder, make_empty_model, save_model
from recr1.model.lora import (
    AdapterSource,
    add_adapters,
    compute_scale,
    draw_adapter_weight,
    is_adapter_weight,
    list_block_linears,
    merge_adapters,
)
from recr1.model.rope import DecoderConfig
from recr1.model.varlen_attention import AttentionBackend, AttentionUnavailable, choose_attention
from recr1.utils.files import WriteError, report_write_errors

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

NamedTensors = Iterator[tuple[str, torch.Tensor]]


def resolve_compute_dtype(name: str) -> torch.dtype:
    """Return the type of the gathered weights on this machine, for a value of model.compute."""
    if name == "auto":
        has_gpu = dist.device().type == "cuda"
        name = "bfloat16" if has_gpu else "float32"
    return COMPUTE_DTYPES[name]


def load_policy(
    folder: str,
    vocab_size: int,
    compute: torch.dtype,
    gradient_checkpointing: bool = False,
    frozen: str = "",
    attention: str = "auto",
    exact: bool = False,
    float32_head: bool = False,
    kernels: str = "torch",
    adapter: AdapterSource | None = None,
) -> Sharded:
    """Load the folder's model with float32 masters; each rank reads what it owns. Raises
    ModelFolderError, ConfigError.

    With an adapter the model's own weights are frozen and stored in the compute type.

    Args:
        vocab_size: number of ids that the tokenizer can give.
        gradient_checkpointing, frozen: train.gradient_checkpointing and train.frozen of the config.
        attention, exact, float32_head, kernels: model.attention, model.batch_invariant,
            model.head_float32 and model.kernels of the config.
        adapter: LoRA's, beside the model; None: its weights themselves are trained.
    """
    stripped = [pattern.strip() for pattern in frozen.split(",")]
    patterns = tuple(pattern for pattern in stripped if pattern)
    model, tensors = _open_model(
        folder, vocab_size, compute, attention, exact, float32_head, kernels
    )
    read = tensors.__getitem__
    frozen_master = None
    if adapter:
        frozen_master = compute
        patterns = tuple(model.state_dict())
        read = _add_adapter(model, tensors, adapter)
    _check_frozen(patterns, list(model.state_dict()))
    return Sharded(
        model,
        read,
        device=dist.device(),
        frozen_master=frozen_master,
        compute=compute,
        gradient_checkpointing=gradient_checkpointing,
        frozen=patterns,
    )


def _add_adapter(
    model: Decoder, tensors: SafetensorsFolder, source: AdapterSource
) -> Callable[[str], torch.Tensor]:
    """Put LoRA's adapters beside the model's weights; return what reads a weight of either by name.
    Raises ConfigError, ModelFolderError.
    """
    add_adapters(model, source.config)
    model.adapter = source
    shapes = {}
    for name, weight in model.named_parameters():
        if is_adapter_weight(name):
            shapes[name] = weight.shape
    folder = None
    if source.folder:
        folder = AdapterFolder(source.folder)
        folder.check(source, {name: tuple(shape) for name, shape in shapes.items()})

    def read(name: str) -> torch.Tensor:
        if name not in shapes:
            return tensors[name]
        if folder is not None:
            return folder[name]
        return draw_adapter_weight(name, shapes[name], source.seed)

    return read


def make_adapter_source(cfg: Config, folder: str = "") -> AdapterSource | None:
    """Return what the config says of LoRA; None without it.

    folder: of an adapter; "": the config's model.adapter.
    """
    if not cfg.lora.rank:
        return None
    return AdapterSource(cfg.lora, cfg.model.path, folder or cfg.model.adapter, cfg.run.seed)


def _check_frozen(patterns: tuple[str, ...], names: list[str]) -> None:
    """Raise ConfigError if a pattern fits no name of a weight, or if no weight is left to train."""
    frozen_names = set()
    for pattern in patterns:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise ConfigError(
                f"train.frozen: {pattern!r} fits the name of no weight; "
                f"they are called {names[0]} and the like"
            )
        frozen_names.update(matches)
    if len(frozen_names) == len(names):
        raise ConfigError("train.frozen: every weight is frozen, nothing is left to train")


def load_reference(
    folder: str,
    vocab_size: int,
    compute: torch.dtype,
    on_host: bool = False,
    attention: str = "auto",
    exact: bool = False,
    float32_head: bool = False,
    kernels: str = "torch",
) -> Sharded:
    """Load the reference, the policy before training: as load_policy, but frozen and stored in the
    compute type, in host memory if `on_host`.
    """
    model, tensors = _open_model(
        folder, vocab_size, compute, attention, exact, float32_head, kernels
    )
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
    vocab_size: int,
    compute: torch.dtype,
    attention: str,
    exact: bool,
    float32_head: bool,
    kernels: str,
) -> tuple[Decoder, SafetensorsFolder]:
    """Return a model without weights and the folder that has them, checked against each other."""
    model = make_empty_model(folder, vocab_size)
    tensors = SafetensorsFolder(folder)
    tensors.check(model)
    device = dist.device()
    try:
        backend = choose_model_backend(model.config, attention, compute, device, kernels)
    except AttentionUnavailable as e:
        raise ConfigError(f"model.attention: {e}; sdpa runs everywhere") from None
    if exact:
        why_inexact = explain_inexact(compute, device)
        if why_inexact:
            raise ConfigError(f"model.batch_invariant: {why_inexact}")
    model.set_backend(backend._replace(exact=exact, float32_head=float32_head))
    return model, tensors


def choose_model_backend(
    config: DecoderConfig,
    attention: str,
    compute: torch.dtype,
    device: torch.device,
    kernels: str = "torch",
) -> AttentionBackend:
    """Choose how a model's attention and the small passes of its layers are computed, for values of
    model.attention and model.kernels. Raises AttentionUnavailable.
    """
    is_grouped = config.num_attention_heads > config.num_key_value_heads
    backend = choose_attention(attention, is_grouped, config.head_dim, compute, device)
    return backend._replace(fused_layers=choose_backend(kernels, device) == "triton")


def save_policy(
    policy: Sharded, tokenizer: Any, stops: frozenset[int], folder: Path, recipe: str
) -> None:
    """Write a Hugging Face folder with `recipe` as its recr1.yaml. Rank 0 writes it, reads it again
    and compares. A collective. Raises WriteError.

    An adapter is merged into the folder's weights, and written by itself into the folder "adapter"
    beside it.
    """
    source: AdapterSource | None = policy.decoder.adapter

    def merge(tensors: NamedTensors) -> NamedTensors:
        if source is None:
            return tensors
        return merge_adapters(tensors, compute_scale(source.config))

    def write(tensors: NamedTensors) -> None:
        save_model(policy.config, merge(tensors), tokenizer, stops, str(folder))
        (folder / "recr1.yaml").write_text(recipe, encoding="utf-8")

    def compare(tensors: NamedTensors) -> None:
        written = SafetensorsFolder(str(folder))
        for name, tensor in merge(tensors):
            _compare_tensor(folder, name, written[name], tensor)

    for work in (write, compare):
        _give_tensors_to_rank0(policy.tensors(), folder, work)
    if source is not None:
        _save_adapter(policy, source, folder.with_name("adapter"))


def _save_adapter(policy: Sharded, source: AdapterSource, folder: Path) -> None:
    """Write the policy's adapter as PEFT does, and compare. A collective. Raises WriteError."""
    linears = list(list_block_linears(policy.decoder))

    def write(tensors: NamedTensors) -> None:
        save_adapter(folder, tensors, source, linears)

    def compare(tensors: NamedTensors) -> None:
        written = AdapterFolder(str(folder))
        for name, tensor in tensors:
            _compare_tensor(folder, name, written[name], tensor)

    for work in (write, compare):
        _give_tensors_to_rank0(policy.tensors(trained_only=True), folder, work)


def _compare_tensor(folder: Path, name: str, written: torch.Tensor, tensor: torch.Tensor) -> None:
    """Raise WriteError unless a tensor was written as it is."""
    if not torch.equal(_view_bytes(written), _view_bytes(tensor.detach().cpu())):
        raise WriteError(
            f"{folder}: {name} reads back otherwise than it was written; the disk is failing"
        )


def _view_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes: NaN, too, is equal to itself."""
    return tensor.contiguous().view(torch.uint8)


def _give_tensors_to_rank0(
    tensors: NamedTensors, folder: Path, work: Callable[[NamedTensors], None]
) -> None:
    """Call work(tensors) on rank 0 while all ranks gather the policy's tensors. If it fails, all
    ranks raise its exception.
    """
    error = None
    if dist.rank() == 0:
        try:
            with report_write_errors(folder):
                work(tensors)
        except Exception as e:
            error = e
    # The other ranks do their part of the collectives, rank 0 the rest of its own after a failure.
    for _ in tensors:
        pass
    with dist.fail_together():
        if isinstance(error, SafetensorError):
            raise WriteError(f"cannot write {folder}: {error}")
        if error is not None:
            raise error
