"""The layout of some modules' weights in one flat vector that is cut into W equal shards. When the
shards move is decided in distributed/fsdp.py.

The layout does not depend on W; only the number of zeros at the end does. The shards of one W can
be joined and cut again for another W (training/checkpoint.py).

Legend: W ranks, n numbers of a shard.
"""

from fnmatch import fnmatchcase
from typing import Any, Callable, NamedTuple

import torch
from torch import nn

from recr1.distributed import collectives as dist

ALIGNMENT = 64  # numbers: every weight starts on a boundary that matrix kernels like


class ModuleParam(NamedTuple):
    """A weight and the module that uses it."""

    name: str  # Hugging Face's
    module: nn.Module
    attribute: str


class BlockParams(NamedTuple):
    """The weights of one block, or of the root."""

    trained: list[ModuleParam]
    frozen: list[ModuleParam]


class ParamView(NamedTuple):
    """A weight and its place in the flat vector."""

    name: str  # Hugging Face's
    module: nn.Module
    attribute: str
    shape: torch.Size
    start: int

    def view(self, full: torch.Tensor) -> torch.Tensor:
        """Return the weight as a view of a flat vector (W n,)."""
        end = self.start + self.shape.numel()
        return full[self.start : end].view(self.shape)


def params_by_block(decoder: nn.Module, frozen: tuple[str, ...]) -> list[BlockParams]:
    """Return the weights of the root and then of each block. A weight is frozen if its name fits a
    pattern of `frozen`.
    """
    body: Any = decoder.model  # a later room's: model/decoder.py
    num_blocks = len(body.layers)
    params = [BlockParams([], []) for _ in range(1 + num_blocks)]
    for name, _ in decoder.named_parameters():
        index = 0  # of the root
        if name.startswith("model.layers."):
            index = 1 + int(name.split(".")[2])
        module_name, _, attribute = name.rpartition(".")
        param = ModuleParam(name, decoder.get_submodule(module_name), attribute)
        if any(fnmatchcase(name, pattern) for pattern in frozen):
            params[index].frozen.append(param)
        else:
            params[index].trained.append(param)
    return params


class FlatParam:
    """The layout of some weights. It removes them from their modules; `attach` and `detach` put
    views of the full vector in their places and remove them again.
    """

    def __init__(self, params: list[ModuleParam]):
        self.weights: list[ParamView] = []
        self.size = 0  # numbers, without the zeros at the end
        self.is_unsharded = False  # whether the modules have views
        for name, module, attribute in params:
            shape = getattr(module, attribute).shape
            self.weights.append(ParamView(name, module, attribute, shape, start=self.size))
            self.size += -(-shape.numel() // ALIGNMENT) * ALIGNMENT
            delattr(module, attribute)
        self.shard_size = -(-self.size // dist.world_size())

    def numel(self) -> int:
        """Return the number of numbers in the weights, without the gaps between them."""
        return sum(weight.shape.numel() for weight in self.weights)

    def fill(self, shard: torch.Tensor, read: Callable[[str], torch.Tensor]) -> None:
        """Write this rank's numbers into a shard (n,) of zeros.

        `read(name)` gives a weight. A weight that has no number in this shard is not read.
        """
        shard_start = dist.rank() * self.shard_size
        shard_end = shard_start + self.shard_size
        for weight in self.weights:
            weight_end = weight.start + weight.shape.numel()
            start = max(shard_start, weight.start)
            end = min(shard_end, weight_end)
            if start < end:
                source = slice(start - weight.start, end - weight.start)
                target = slice(start - shard_start, end - shard_start)
                # Without a name: a weight is not to stay in memory while the next one is read.
                shard[target] = read(weight.name).flatten()[source].to(shard)

    def attach(self, views: tuple[torch.Tensor, ...]) -> None:
        """Give the modules their weights."""
        for weight, view in zip(self.weights, views):
            weight.module.__dict__[weight.attribute] = view
        self.is_unsharded = True

    def detach(self) -> None:
        """Take the weights away from the modules."""
        for weight in self.weights:
            del weight.module.__dict__[weight.attribute]
        self.is_unsharded = False
