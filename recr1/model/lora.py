"""LoRA: two narrow matrices learn beside each frozen weight (Hu et al. 2021, arXiv 2106.09685).

    y = x W^T + s (x A^T) B^T,    s = alpha / r    (section 4.1)

W (N, K) stays as it is. A (r, K) and B (N, r) are the adapter: with r far below N and K it has a
hundredth of W's numbers, and only it has float32 masters, gradients and moments. B begins as zeros,
so the policy begins as the model itself.

Nothing else of the program changes: an adapted Linear is a Linear, its weights have names, and
distributed/fsdp.py keeps trained and frozen weights of a block in two groups. Sampler and trainer
compute the same three products, so their log-probs differ by no more than without adapters. The
policy before training is the same weights with the adapters switched off (`FrozenReference`).

Legend: M tokens, K inputs, N outputs, r rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, ContextManager, NamedTuple

import torch
from torch import nn

from recr1.config.schema import ConfigError, LoraConfig
from recr1.kernels.cpu_linear import Linear

NamedTensors = Iterable[tuple[str, torch.Tensor]]

# What a weight is called beside "NAME.weight"; PEFT's names, behind "base_model.model.".
A_NAME = "lora_A.weight"
B_NAME = "lora_B.weight"


class AdapterSource(NamedTuple):
    """What a policy's adapters are, and what they begin as."""

    config: LoraConfig  # its rank is above 0
    base_model: str  # what model.path names
    folder: str = ""  # where they are read; empty: they are drawn
    seed: int = 0


class LoraLinear(Linear):
    """Compute x W^T + b + s (x A^T) B^T: x (M, K) -> (M, N).

    It takes over the weight W and the bias of a Linear.
    """

    enabled = True  # False: the model without the adapter

    def __init__(self, base: Linear, rank: int, scale: float):
        nn.Module.__init__(self)  # not Linear's: it would make another weight
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight = base.weight
        self.bias = base.bias
        self.scale = scale
        device = base.weight.device
        self.lora_A = Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = Linear(rank, base.out_features, bias=False, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if not self.enabled:
            return y
        return torch.add(y, self.lora_B(self.lora_A(x)), alpha=self.scale)


def compute_scale(config: LoraConfig) -> float:
    """Return s: alpha / r, or alpha / sqrt(r) where it is to stay stable for large r (rsLoRA,
    Kalajdzievski 2023, arXiv 2312.03732).
    """
    return config.alpha / (config.rank**0.5 if config.rslora else config.rank)


def add_adapters(decoder: nn.Module, config: LoraConfig) -> None:
    """Put an adapter beside each weight of a block that `config.targets` names; rank 0: none.

    A target is a pattern of modules' names, whole ones ("model.layers.3.mlp.*") or their ends
    ("q_proj"). Raises ConfigError for a target that fits none, and for a rank above a weight's
    width.
    """
    if not config.rank:
        return
    scale = compute_scale(config)
    linears = list_block_linears(decoder)
    for name in choose_targets(list(linears), config.targets):
        linear = linears[name]
        if config.rank > min(linear.weight.shape):
            raise ConfigError(
                f"lora.rank: {config.rank} is more than {name} has: its weight is "
                f"{tuple(linear.weight.shape)}; train it whole (leave lora out), or take a "
                "smaller rank"
            )
        parent_name, _, attribute = name.rpartition(".")
        parent = decoder.get_submodule(parent_name)
        setattr(parent, attribute, LoraLinear(linear, config.rank, scale))


def list_block_linears(decoder: nn.Module) -> dict[str, Linear]:
    """Return name -> Linear of all blocks: embedding and head are not among them."""
    linears = {}
    for name, module in decoder.named_modules():
        if isinstance(module, Linear) and name.startswith("model.layers."):
            linears[name] = module
    return linears


def choose_targets(names: list[str], targets: str) -> list[str]:
    """Return the names that a comma-separated list of patterns fits. Raises ConfigError."""
    patterns = [pattern.strip() for pattern in targets.split(",") if pattern.strip()]
    chosen = set()
    for pattern in patterns:
        fitting = [name for name in names if fits_target(name, pattern)]
        if not fitting:
            ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
            raise ConfigError(
                f"lora.targets: {pattern!r} fits no weight of a block; they are called "
                f"{', '.join(ends)} ({names[0]} and so on)"
            )
        chosen.update(fitting)
    if not chosen:
        raise ConfigError(
            "lora.targets: is empty, nothing would be trained; lora.rank=0 is no LoRA"
        )
    return [name for name in names if name in chosen]


def fits_target(name: str, pattern: str) -> bool:
    """Return whether a pattern fits a module's name, or the end of it behind a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def is_adapter_weight(name: str) -> bool:
    """Return whether a weight of this name is an adapter's A or B."""
    return name.endswith((f".{A_NAME}", f".{B_NAME}"))


def draw_adapter_weight(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Return what an adapter's weight begins as: A uniform in +-1/sqrt(K), B zeros.

    The paper draws A from a Gaussian and leaves its width open; this is the bound of a new
    nn.Linear, which PEFT draws from too. A function of (seed, name): the same on any number of
    ranks.
    """
    if name.endswith(B_NAME):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def merge_adapters(tensors: NamedTensors, scale: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of the model alone, W + s B A in place of an adapted W, in float32.

    `tensors`: (name, weight), a weight's adapter before it, as Sharded.tensors() gives a block's
    trained weights first.
    """
    adapters: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if is_adapter_weight(name):
            adapters[name] = _to_float32(tensor)
            continue
        stem = name.removesuffix("weight")
        merged = _to_float32(tensor)
        if stem + A_NAME in adapters:
            A = adapters.pop(stem + A_NAME)  # (r, K)
            B = adapters.pop(stem + B_NAME)  # (N, r)
            merged = torch.addmm(merged, B, A, alpha=scale)
        yield name, merged
    if adapters:
        raise ValueError(f"adapters without a weight behind them: {sorted(adapters)[:3]}")


def _to_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32; float64 stays."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Compute the model without its adapters for the duration of the block."""
    adapted = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for module in adapted:
        module.enabled = False
    try:
        yield
    finally:
        for module in adapted:
            module.enabled = True


class FrozenReference:
    """The policy before training, of the policy's own weights: its adapters are off in `forward`.

    Use it as the policy (model/log_probs.py), without gradient.
    """

    def __init__(self, policy: Any):
        self.policy = policy
        self.config = policy.config
        self.backend = policy.backend

    def __call__(self, *inputs: Any) -> torch.Tensor:
        """Return what the model does: tokens (M,), positions (M,) -> hidden (M, C)."""
        with torch.no_grad(), adapters_off(self.policy):
            return self.policy(*inputs)

    def root(self) -> ContextManager[None]:
        return self.policy.root()

    @property
    def head_weight(self) -> torch.Tensor:
        return self.policy.head_weight
