"""Some modules' weights in one flat vector, cut into W equal shards: where each number lies. When
they move is distributed/fsdp.py's matter.

The layout does not depend on W, only the zeros at the end do: shards of one W, joined, are cut anew
for another (training/checkpoint.py). Legend: W ranks, n numbers of a shard.
"""

from fnmatch import fnmatchcase
from typing import Callable, NamedTuple

import torch
from torch import nn

from recr1.distributed import collectives as dist

ALIGNMENT = 64  # numbers: every weight starts on a boundary that matrix kernels like


class ParamView(NamedTuple):
    """One tensor and its place in the flat vector."""

    name: str  # Hugging Face's
    module: nn.Module
    attribute: str
    shape: torch.Size
    start: int

    def view(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[self.start : self.start + self.shape.numel()].view(self.shape)


def params_by_block(decoder: nn.Module, frozen: tuple[str, ...]) -> list[tuple[list, list]]:
    """(name, module, attribute) of every weight: those trained and those whose name fits a pattern
    of `frozen`; of the root, of each block.
    """
    weights = [([], []) for _ in range(1 + len(decoder.model.layers))]
    for name, _ in decoder.named_parameters():
        module, _, attribute = name.rpartition(".")
        block = 1 + int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        weights[block][any(fnmatchcase(name, p) for p in frozen)].append(
            (name, decoder.get_submodule(module), attribute)
        )
    return weights


class FlatParam:
    """The layout of `weights`, (name, module, attribute) each. Takes them off their modules: `hang`
    and `strip` put views there and away.
    """

    def __init__(self, weights: list[tuple[str, nn.Module, str]]):
        self.weights: list[ParamView] = []
        # numbers, without the zeros at the end; whether the modules have views
        self.size = 0
        self.hung = False
        for name, module, attribute in weights:
            shape = getattr(module, attribute).shape
            self.weights.append(ParamView(name, module, attribute, shape, self.size))
            self.size += -(-shape.numel() // ALIGNMENT) * ALIGNMENT
            delattr(module, attribute)
        self.n = -(-self.size // dist.world_size())

    def fill(self, shard: torch.Tensor, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """This rank's numbers, into zeros (n,). `read(name)` gives a weight; those that lie
        elsewhere are not read.
        """
        first = dist.rank() * self.n  # this rank owns [first, first + n)
        for w in self.weights:
            low = max(first, w.start)
            high = min(first + self.n, w.start + w.shape.numel())
            if low < high:
                shard[low - first : high - first] = (
                    read(w.name).flatten()[low - w.start : high - w.start].to(shard)
                )
        return shard

    def hang(self, views: tuple[torch.Tensor, ...]) -> None:
        for w, view in zip(self.weights, views):
            w.module.__dict__[w.attribute] = view
        self.hung = True

    def strip(self) -> None:
        for w in self.weights:
            del w.module.__dict__[w.attribute]
        self.hung = False
