"""Fully sharded data parallelism, ZeRO-3 (Rajbhandari et al. 2020, section 5), by hand (DESIGN
decision 5).

A unit is one block, or the root: embedding, last norm and head. Its weights lie in one flat vector
(distributed/flat_param.py), cut into W equal shards; a rank owns one, the master copy that the optimizer updates, and
nothing else of the unit between its uses. To run a unit is to gather its shards into the compute
type and hang views of them on its modules; meanwhile the next unit's gather is under way, in the
backward the previous one's. The gather is an autograd function: its backward is the reduce-scatter
(SUM, in the master's type) of the gradient, under way while the unit before computes its own. One
rank: both are the identity. n: numbers of a shard.
"""

from contextlib import ExitStack, contextmanager, nullcontext
from typing import Callable, Iterator

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from recr1.distributed import collectives as dist, cpu_offload
from recr1.distributed.flat_param import FlatParam, params_by_block

# of the backward that is running
queue_backward_callback = torch.autograd.Variable._execution_engine.queue_callback


class ParamGroup(nn.Module):
    """The shard of some weights. Between uses their modules have no weights at all: a forgotten
    gather is an error, not a stale value.
    """

    def __init__(
        self,
        weights: list,
        read: Callable[[str], torch.Tensor],
        trainable: bool,
        master: torch.dtype,
        compute: torch.dtype,
        device: torch.device,
        on_host: bool,
        reduce: Callable[["ParamGroup"], None],
    ):
        super().__init__()
        self.flat = FlatParam(weights)
        self.compute = compute
        self.device = device
        self.reduce = reduce
        shard = (
            cpu_offload.host_zeros(self.flat.n, master)
            if on_host
            else torch.zeros(self.flat.n, dtype=master, device=device)
        )
        self.shard = nn.Parameter(self.flat.fill(shard, read), requires_grad=trainable)
        # the units of the blocks on either side
        self.before = []
        self.after = []
        # a gather under way: of which version of the shard, how to wait for it
        self.coming: tuple[int, Callable] | None = None
        self.again: torch.Tensor | None = None  # gathered once more, for the backward
        self.grads: torch.Tensor | None = None  # (W n,) not yet summed over ranks

    def start(self) -> None:
        """Begins to gather, unless that is under way."""
        if self.coming is None or self.coming[0] != self.shard._version:
            self.coming = (
                self.shard._version,
                cpu_offload.start_all_gather_from_host(
                    self.shard.detach(), self.compute, self.device
                ),
            )

    def take(self) -> torch.Tensor:
        """(W n,) of all ranks' shards in the compute type; the shard itself where it is the whole
        and has the type.
        """
        self.start()
        (_, wait), self.coming = self.coming, None
        return wait()

    def retake(self) -> torch.Tensor:
        """The same for what autograd saved, until the unit's backward is over."""
        if self.again is None:
            self.again = self.take()
            queue_backward_callback(lambda: setattr(self, "again", None))
            for unit in self.before:
                unit.start()
            for unit in self.after:  # a frozen one has no backward of its own
                unit.again = None
        return self.again


@contextmanager
def unsharded_groups(units: list[ParamGroup], ahead: list[ParamGroup], keep: bool = True):
    """Inside, the units' modules have their weights, and those of `ahead` are on their way. `keep`:
    autograd may hold on to the weights (a checkpoint lets go by itself). Else what it would save of
    them is (unit, place), and the backward gathers again.
    """
    if units[0].flat.hung:
        yield
        return
    views = [_AllGather.apply(unit.shard, unit) for unit in units]
    for unit in ahead:
        unit.start()
    owner = {mine[0].untyped_storage().data_ptr(): unit for unit, mine in zip(units, views)}
    # the shard itself stays anyway
    keep |= not torch.is_grad_enabled() or units[0].shard.untyped_storage().data_ptr() in owner

    def pack(t: torch.Tensor):
        unit = owner.get(t.untyped_storage().data_ptr())
        return t if unit is None else (unit, t.shape, t.stride(), t.storage_offset())

    def unpack(saved):
        return (
            saved if isinstance(saved, torch.Tensor) else saved[0].retake().as_strided(*saved[1:])
        )

    for unit, mine in zip(units, views):
        unit.flat.hang(mine)
    try:
        with nullcontext() if keep else saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for unit in units:
            unit.flat.strip()


class _AllGather(torch.autograd.Function):
    """shard (n,) -> the unit's weights, views of one gathered vector. backward: their gradients,
    summed over ranks, join shard.grad.
    """

    @staticmethod
    def forward(ctx, shard, unit):
        ctx.unit, gathered = unit, unit.take()
        return tuple(w.view(gathered) for w in unit.flat.weights)

    @staticmethod
    def backward(ctx, *grads):
        unit = ctx.unit
        unit.again = None
        if unit.grads is None:
            unit.grads = torch.zeros(
                dist.world_size() * unit.flat.n, dtype=unit.shard.dtype, device=unit.device
            )
        for w, grad in zip(unit.flat.weights, grads):
            if grad is not None:
                w.view(unit.grads).add_(grad)
        unit.reduce(unit)
        return None, None


class Sharded(nn.Module):
    """A Decoder whose parameters are shards; call it as a Decoder, with the head inside `root()`. A
    backward adds to its shards' .grad. `read(name)` gives each weight once. master: type of the
    shards, their gradients and the optimizer's state; compute: of the gathered weights.
    checkpointing: a block keeps its input only and is computed again in the backward. frozen:
    patterns of names that are not trained. on_host: the shards lie in host memory. While `hold`,
    gradients stay whole, for the next backward.
    """

    def __init__(
        self,
        decoder: nn.Module,
        read: Callable[[str], torch.Tensor],
        *,
        device: torch.device,
        master: torch.dtype = torch.float32,
        compute: torch.dtype = torch.float32,
        checkpointing: bool = False,
        frozen: tuple[str, ...] = (),
        on_host: bool = False,
    ):
        super().__init__()
        self.decoder = decoder
        self.config = decoder.config
        self.backend = decoder.backend
        self.checkpointing = checkpointing
        self.hold = False
        self.summing = None
        self.root_units, *blocks = [
            [
                ParamGroup(
                    some, read, some is both[0], master, compute, device, on_host, self._reduce
                )
                for some in both
                if some
            ]
            for both in params_by_block(decoder, frozen)
        ]
        self.units = nn.ModuleList(sum(blocks, self.root_units))
        self.size = sum(w.shape.numel() for unit in self.units for w in unit.flat.weights)
        self.blocks = [[], *blocks, []]
        for layer, before, own, after in zip(
            decoder.model.layers, self.blocks, self.blocks[1:], self.blocks[2:]
        ):
            for unit in own:
                unit.before, unit.after = before, after
            layer.forward = self._runner(layer.forward, before, own, after)

    def _runner(
        self, forward, before: list[ParamGroup], own: list[ParamGroup], after: list[ParamGroup]
    ):
        def run(*inputs):
            if self.checkpointing and torch.is_grad_enabled() and not own[0].flat.hung:
                return checkpoint(
                    forward,
                    *inputs,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    # forward, recomputation
                    context_fn=lambda: (
                        unsharded_groups(own, after),
                        unsharded_groups(own, before),
                    ),
                )
            with unsharded_groups(own, after, keep=False):
                return forward(*inputs)

        return run

    def _reduce(self, unit: ParamGroup | None = None) -> None:
        """The sum over ranks of a unit's gradient begins; that of the unit before ends."""
        if self.summing:
            (done, wait), self.summing = self.summing, None
            grad = wait()
            done.shard.grad = grad if done.shard.grad is None else done.shard.grad.add_(grad)
        if unit and not self.hold:
            self.summing = (unit, dist.start_reduce_scatter(unit.grads))
            unit.grads = None
            queue_backward_callback(self._reduce)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attention) -> torch.Tensor:
        """As Decoder's: tokens (M,), positions (M,) -> hidden (M, C)."""
        with self.root():
            return self.decoder(tokens, positions, attention)

    def root(self):
        """Embedding, last norm and head, gathered once for the block; their gradients meet in one
        reduce-scatter.
        """
        return unsharded_groups(self.root_units, ahead=self.blocks[1])

    @property
    def head_weight(self) -> torch.Tensor:
        return self.decoder.head_weight

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight by name, whole, in the master's type: one unit at a time, on all ranks (a
        collective).
        """
        for unit in self.units:
            gathered = cpu_offload.start_all_gather_from_host(
                unit.shard.detach(), unit.shard.dtype, unit.device
            )()
            yield from ((w.name, w.view(gathered)) for w in unit.flat.weights)


@contextmanager
def unsharded(model: nn.Module):
    """All of a Sharded model's weights, gathered once, for sampling: no gradient. Another module
    passes as it is.
    """
    with torch.no_grad(), ExitStack() as stack:
        if isinstance(model, Sharded):
            for group in (model.root_units, *model.blocks[1:-1]):
                stack.enter_context(unsharded_groups(group, ahead=[]))
        yield model
