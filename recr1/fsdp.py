"""Fully sharded data parallelism, ZeRO-3 (Rajbhandari et al. 2020, section 5), by hand (DESIGN decision 5).

A unit is one block, or the root: embedding, last norm and head. Its weights lie in one flat vector, cut into W equal shards; a rank
owns one, the master copy that the optimizer updates, and nothing else of the unit between its uses. To run a unit is to gather its
shards into the compute type and hang views of them on its modules. The gather is one autograd function: its backward is the
reduce-scatter (SUM, in the master's type) of the gradient. With one rank, gather and reduce-scatter are the identity.

Legend: W ranks, n numbers of a shard, P weights of a unit.
"""
from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Callable, Iterator, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import dist
from .model import Decoder

ALIGN = 64         # numbers: every weight starts on a boundary that matrix kernels like


class Weight(NamedTuple):
    """One tensor of a unit and its place in the flat vector."""
    name: str                  # Hugging Face's
    module: nn.Module
    attribute: str
    shape: torch.Size
    start: int


class Unit(nn.Module):
    """The shard of some modules' weights. Between uses the modules have no weights at all: a forgotten gather is an error, not a stale value."""

    def __init__(self, named_modules: dict[str, nn.Module], read: Callable[[str], torch.Tensor], master: torch.dtype, compute: torch.dtype,
                 device: torch.device, trainable: bool):
        super().__init__()
        self.weights, size = [], 0
        for prefix, module in named_modules.items():
            for attribute, p in list(module.named_parameters(recurse=False)):
                self.weights.append(Weight(f"{prefix}.{attribute}", module, attribute, p.shape, size))
                size += -(-p.numel() // ALIGN) * ALIGN
                delattr(module, attribute)
        n = -(-size // dist.world())
        first = dist.rank() * n                                    # this rank owns [first, first + n)
        shard = torch.zeros(n, dtype=master, device=device)
        for w in self.weights:
            low, high = max(first, w.start), min(first + n, w.start + w.shape.numel())
            if low < high:                                         # other ranks' weights are not even read
                shard[low - first:high - first] = read(w.name).flatten()[low - w.start:high - w.start].to(shard)
        self.shard, self.compute, self.bound = nn.Parameter(shard, requires_grad=trainable), compute, False
        self.again: torch.Tensor | None = None                     # gathered once more, for the unit's backward

    def gather(self, dtype: torch.dtype) -> torch.Tensor:
        """(W n,) of all ranks' shards; the shard itself where it is the whole and has the type."""
        return dist.all_gather(self.shard.detach().to(dtype))

    def views(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [whole[w.start:w.start + w.shape.numel()].view(w.shape) for w in self.weights]

    @contextmanager
    def whole(self, keep: bool):
        """For the block, the modules have their weights. `keep`: autograd may hold on to them (a checkpoint frees them by itself).

        Else what autograd would save of them is (unit, place), and the backward gathers once more: two units' weights at most are alive.
        """
        if self.bound:
            yield
            return
        views = _Gather.apply(self.shard, self)
        hooks = ExitStack()
        if not keep and torch.is_grad_enabled() and views[0].untyped_storage().data_ptr() != self.shard.untyped_storage().data_ptr():
            hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack(views[0].untyped_storage().data_ptr()), _unpack))
        for w, view in zip(self.weights, views):
            w.module.__dict__[w.attribute] = view
        self.bound = True
        try:
            with hooks:
                yield
        finally:
            self.bound = False
            for w in self.weights:
                del w.module.__dict__[w.attribute]

    def _pack(self, storage: int):
        def pack(t: torch.Tensor):
            return (self, t.shape, t.stride(), t.storage_offset()) if t.untyped_storage().data_ptr() == storage else t
        return pack


def _unpack(saved):
    if isinstance(saved, torch.Tensor):
        return saved
    unit, shape, stride, offset = saved
    if unit.again is None:
        unit.again = unit.gather(unit.compute)
    return unit.again.as_strided(shape, stride, offset)


class _Gather(torch.autograd.Function):
    """shard (n,) -> the unit's P weights, views of one gathered vector; backward: their gradients -> the shard's (n,), summed over ranks."""

    @staticmethod
    def forward(ctx, shard, unit):
        ctx.unit = unit
        return tuple(unit.views(unit.gather(unit.compute)))

    @staticmethod
    def backward(ctx, *grads):
        unit = ctx.unit
        unit.again = None
        whole = unit.shard.new_zeros(dist.world() * len(unit.shard))
        for part, grad in zip(unit.views(whole), grads):
            if grad is not None:
                part.copy_(grad)
        return dist.reduce_scatter(whole), None


class Sharded(nn.Module):
    """A Decoder whose parameters are shards; call it as a Decoder, with the head inside `root()`.

    `read(name)` gives each weight once. master: the type of the shards, their gradients and the optimizer's state; compute: that of
    the gathered weights. checkpointing: a block keeps its input only and is computed again in the backward.
    """

    def __init__(self, decoder: Decoder, read: Callable[[str], torch.Tensor], *, device: torch.device, master: torch.dtype = torch.float32,
                 compute: torch.dtype = torch.float32, checkpointing: bool = False, trainable: bool = True):
        super().__init__()
        self.decoder, self.config, self.checkpointing = decoder, decoder.config, checkpointing
        named = dict(decoder.named_modules())
        blocks = [f"model.layers.{i}" for i in range(len(decoder.model.layers))]

        def unit(inside: Callable[[str], bool]) -> Unit:
            return Unit({name: module for name, module in named.items() if inside(name)}, read, master, compute, device, trainable)
        self.root_unit = unit(lambda name: not name.startswith("model.layers."))
        self.units = nn.ModuleList(unit(lambda name: name == block or name.startswith(f"{block}.")) for block in blocks)
        self.size = sum(w.shape.numel() for unit in (self.root_unit, *self.units) for w in unit.weights)       # weights in all
        for block, own in zip(decoder.model.layers, self.units):
            block.forward = self._runner(own, block.forward)

    def _runner(self, unit: Unit, forward):
        def run(*inputs):
            with unit.whole(keep=self.checkpointing):
                return forward(*inputs)

        def run_checkpointed(*inputs):
            if not self.checkpointing or unit.bound or not torch.is_grad_enabled():
                return run(*inputs)
            return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
        return run_checkpointed

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attention) -> torch.Tensor:
        """As Decoder's: tokens (M,), positions (M,) -> hidden (M, C)."""
        with self.root():
            return self.decoder(tokens, positions, attention)

    def root(self):
        """Embedding, last norm and head, gathered once for the block; their gradients meet in one reduce-scatter."""
        return self.root_unit.whole(keep=True)

    @property
    def head_weight(self) -> torch.Tensor:
        return self.decoder.head_weight

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight by name, whole, in the master's type: one unit at a time, on all ranks (a collective)."""
        for unit in (self.root_unit, *self.units):
            yield from zip((w.name for w in unit.weights), unit.views(unit.gather(unit.shard.dtype)))


@contextmanager
def gathered(model: nn.Module):
    """All of a Sharded model's weights, gathered once, for sampling: no gradient. Another module passes as it is."""
    with torch.no_grad(), ExitStack() as stack:
        if isinstance(model, Sharded):
            for unit in (model.root_unit, *model.units):
                stack.enter_context(unit.whole(keep=True))
        yield model
