"""Fully sharded data parallelism: ZeRO-3 (Rajbhandari et al. 2020, section 5), written by hand.

A parameter group holds the trained or the frozen weights of one block, or of the root: embedding,
last norm and head. They form one flat vector (distributed/flat_param.py) that is cut into W equal
shards. A rank owns one shard: the master copy that the optimizer updates. Between uses it holds
nothing else of the group but the shard's gradient and the optimizer's moments, of the same length.

To use a group of block i is to all-gather its shards in the compute type and to attach views of the
result to the modules. Meanwhile the all-gather of block i + 1 runs; in the backward, that of block
i - 1, which comes next there. The all-gather is an autograd function. Its backward is the
reduce-scatter (SUM, in the master type) of the gradient, which runs while block i - 1 computes its
own gradient. With one rank both are the identity.

Legend: W ranks, n numbers of a shard.
"""

from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Callable, ContextManager, Iterator, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from recr1.distributed import collectives as dist, cpu_offload
from recr1.distributed.flat_param import BlockParams, FlatParam, params_by_block

# calls a function at the end of the backward that is running
queue_backward_callback = torch.autograd.Variable._execution_engine.queue_callback


class PendingAllGather(NamedTuple):
    """An all-gather that was started."""

    version: int  # of the shard that it reads; an optimizer step increases it
    wait: Callable[[], torch.Tensor]  # -> (W n,)


class PendingReduceScatter(NamedTuple):
    """A reduce-scatter that was started."""

    group: "ParamGroup"
    wait: Callable[[], torch.Tensor]  # -> (n,)


class SavedWeight(NamedTuple):
    """What autograd saves in place of a weight: where the weight lies in the full vector."""

    group: "ParamGroup"
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class ParamGroup(nn.Module):
    """The shard of some weights. Between uses their modules have no weights at all: a forgotten
    all-gather is an error, not a stale value.

    Args:
        shard: (n,), this rank's numbers.
    """

    def __init__(
        self,
        flat_param: FlatParam,
        shard: torch.Tensor,
        *,
        trainable: bool,
        compute: torch.dtype,
        device: torch.device,
        on_gradient_ready: Callable[["ParamGroup"], None],
    ):
        super().__init__()
        self.flat_param = flat_param
        self.shard = nn.Parameter(shard, requires_grad=trainable)
        self.compute = compute
        self.device = device
        self.on_gradient_ready = on_gradient_ready

        # the groups of the blocks on either side
        self.previous_groups: list[ParamGroup] = []
        self.next_groups: list[ParamGroup] = []

        self.pending: PendingAllGather | None = None
        # Gathered a second time, in the backward.
        self.regathered: torch.Tensor | None = None  # (W n,)
        # This rank's gradient, not yet summed over ranks.
        self.full_grad: torch.Tensor | None = None  # (W n,)

    def start_all_gather(self) -> PendingAllGather:
        """Start to gather the shards, unless an all-gather of their present values is running."""
        version = self.shard._version
        if self.pending is None or self.pending.version != version:
            wait = cpu_offload.start_all_gather_from_host(
                self.shard.detach(), self.compute, self.device
            )
            self.pending = PendingAllGather(version, wait)
        return self.pending

    def wait_for_all_gather(self) -> torch.Tensor:
        """Return all ranks' shards (W n,) in the compute type.

        With one rank and one type this is the shard itself, not a copy.
        """
        pending = self.start_all_gather()
        self.pending = None
        return pending.wait()

    def all_gather_for_backward(self) -> torch.Tensor:
        """Return the same (W n,) for a weight that autograd saved; keep it until the group's
        backward is over.
        """
        if self.regathered is None:
            self.regathered = self.wait_for_all_gather()
            queue_backward_callback(self.release_regathered)
            for group in self.previous_groups:
                group.start_all_gather()
            # A frozen group has no backward of its own that would release it.
            for group in self.next_groups:
                group.release_regathered()
        return self.regathered

    def release_regathered(self) -> None:
        """Drop what was gathered for the backward."""
        self.regathered = None

    def add_gradients(self, weight_grads: tuple[torch.Tensor | None, ...]) -> None:
        """Add this rank's gradients of the weights to `full_grad`.

        With one rank that is the shard's own gradient, as far as there is one.
        """
        if self.full_grad is None and dist.world_size() == 1:
            self.full_grad = self.shard.grad
        if self.full_grad is None:
            size = dist.world_size() * self.flat_param.shard_size
            self.full_grad = torch.zeros(size, dtype=self.shard.dtype, device=self.device)
        for weight, grad in zip(self.flat_param.weights, weight_grads):
            if grad is not None:
                weight.view(self.full_grad).add_(grad)


class GroupLayout(NamedTuple):
    """What a parameter group is made of."""

    flat_param: FlatParam
    trainable: bool


def list_layouts(params: BlockParams) -> list[GroupLayout]:
    """Lay out the trained and the frozen weights of a block, as far as it has both."""
    layouts = []
    if params.trained:
        layouts.append(GroupLayout(FlatParam(params.trained), trainable=True))
    if params.frozen:
        layouts.append(GroupLayout(FlatParam(params.frozen), trainable=False))
    return layouts


def iterate_shards(
    layouts: list[GroupLayout],
    read: Callable[[str], torch.Tensor],
    master: torch.dtype,
    frozen_master: torch.dtype,
    device: torch.device,
    on_host: bool,
) -> Iterator[torch.Tensor]:
    """Yield this rank's numbers (n,) of each group, read, on the device or the host."""
    sizes = [torch.Size([layout.flat_param.shard_size]) for layout in layouts]
    dtypes = [master if layout.trainable else frozen_master for layout in layouts]
    zeros: Iterator[torch.Tensor]
    if on_host:  # all at once, of a reference: they share pieces of pinned memory
        zeros = iter(cpu_offload.make_host_zeros(sizes, frozen_master))
    else:
        zeros = (
            torch.zeros(size, dtype=dtype, device=device) for size, dtype in zip(sizes, dtypes)
        )
    for layout, shard in zip(layouts, zeros):
        layout.flat_param.fill(shard, read)
        yield shard


@contextmanager
def unsharded_groups(
    groups: list[ParamGroup], prefetch: list[ParamGroup], keep_for_backward: bool = True
) -> Iterator[None]:
    """Attach the full weights of `groups` to their modules for the duration of the block.

    Args:
        groups: the parameter groups of one block, or of the root: the trained and the frozen one.
        prefetch: the groups of the block that is used next. Their all-gathers start here and
            overlap with this block's computation.
        keep_for_backward: autograd may hold the full weights until the backward. True inside
            torch.utils.checkpoint, which releases them itself. If False, autograd saves a
            `SavedWeight`, and the backward gathers the group again.
    """
    if groups[0].flat_param.is_unsharded:  # by an enclosing block: sampling unshards all groups
        yield
        return

    weights = [_AllGather.apply(group.shard, group) for group in groups]
    for group in prefetch:
        group.start_all_gather()

    # With one rank and one type the full vector is the shard itself, which stays in memory anyway.
    group_by_storage = {storage_id(views[0]): group for group, views in zip(groups, weights)}
    is_own_shard = storage_id(groups[0].shard) in group_by_storage
    keep_for_backward = keep_for_backward or is_own_shard or not torch.is_grad_enabled()

    for group, views in zip(groups, weights):
        group.flat_param.attach(views)
    try:
        with nullcontext() if keep_for_backward else regather_in_backward(group_by_storage):
            yield
    finally:
        for group in groups:
            group.flat_param.detach()


def storage_id(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's memory: equal for all views of one vector."""
    return tensor.untyped_storage().data_ptr()


def regather_in_backward(group_by_storage: dict[int, ParamGroup]) -> saved_tensors_hooks:
    """Return autograd hooks that save where a weight lies in its group, not the weight."""

    def pack(tensor: torch.Tensor) -> torch.Tensor | SavedWeight:
        group = group_by_storage.get(storage_id(tensor))
        if group is None:
            return tensor  # an activation
        return SavedWeight(group, tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(saved: torch.Tensor | SavedWeight) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        full = saved.group.all_gather_for_backward()
        return full.as_strided(saved.shape, saved.stride, saved.offset)

    return saved_tensors_hooks(pack, unpack)


class _AllGather(torch.autograd.Function):
    """All-gather a shard (n,) and return the group's weights, views of one vector (W n,). The
    backward sums the weights' gradients over ranks; the sum is added to shard.grad.
    """

    @staticmethod
    def forward(ctx: Any, shard: torch.Tensor, group: ParamGroup) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        full = group.wait_for_all_gather()  # (W n,)
        return tuple(weight.view(full) for weight in group.flat_param.weights)

    @staticmethod
    def backward(ctx: Any, *weight_grads: torch.Tensor | None) -> tuple[None, None]:
        group = ctx.group
        group.release_regathered()
        group.add_gradients(weight_grads)
        group.on_gradient_ready(group)
        return None, None


class Sharded(nn.Module):
    """A Decoder whose parameters are shards. Call it as a Decoder; use the head inside `root()`. A
    backward adds to its shards' .grad.

    While `requires_gradient_sync` is False, a backward adds to the gradients of full size, and the
    next backward with True sums them over ranks.

    Args:
        read: gives a weight by its name; called once for each weight.
        master: type of the shards, of their gradients and of the optimizer's state.
        frozen_master: type of the shards that are not trained; None: master.
        compute: type of the gathered weights.
        gradient_checkpointing: a block keeps its input only and computes its forward again in the
            backward.
        frozen: patterns of the names that are not trained.
        on_host: the shards are stored in host memory.
    """

    def __init__(
        self,
        decoder: nn.Module,
        read: Callable[[str], torch.Tensor],
        *,
        device: torch.device,
        master: torch.dtype = torch.float32,
        frozen_master: torch.dtype | None = None,
        compute: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
        frozen: tuple[str, ...] = (),
        on_host: bool = False,
    ):
        super().__init__()
        # Any: the types of the Decoder and its attributes are a later room's (model/decoder.py).
        self.decoder: Any = decoder
        self.config: Any = decoder.config
        self.backend: Any = decoder.backend
        body: Any = decoder.model
        self.gradient_checkpointing = gradient_checkpointing
        self.requires_gradient_sync = True
        self.pending_reduce_scatter: PendingReduceScatter | None = None

        # The root and every block have a trained and a frozen group, or only one of them.
        layouts_by_block = [list_layouts(params) for params in params_by_block(decoder, frozen)]
        all_layouts = sum(layouts_by_block, [])
        shards = iterate_shards(all_layouts, read, master, frozen_master or master, device, on_host)
        groups_by_block: list[list[ParamGroup]] = []
        for layouts in layouts_by_block:
            groups = []
            for layout in layouts:
                group = ParamGroup(
                    layout.flat_param,
                    next(shards),
                    trainable=layout.trainable,
                    compute=compute,
                    device=device,
                    on_gradient_ready=self.start_reduce_scatter,
                )
                groups.append(group)
            groups_by_block.append(groups)
        self.root_groups = groups_by_block[0]
        all_groups = sum(groups_by_block, [])
        # Checkpoints hold this attribute's name: units.0.shard, units.1.shard, ...
        self.units = nn.ModuleList(all_groups)
        self.size = sum(group.flat_param.numel() for group in all_groups)
        trained_groups = [group for group in all_groups if group.shard.requires_grad]
        self.num_trained = sum(group.flat_param.numel() for group in trained_groups)

        # The first block has no block before it, the last one none behind it.
        self.block_groups = [[], *groups_by_block[1:], []]
        for i, layer in enumerate(body.layers):
            previous_groups, groups, next_groups = self.block_groups[i : i + 3]
            for group in groups:
                group.previous_groups = previous_groups
                group.next_groups = next_groups
            layer.forward = self._unshard_around(
                layer.forward, groups, previous_groups, next_groups
            )

    def _unshard_around(
        self,
        forward: Callable[..., torch.Tensor],
        groups: list[ParamGroup],
        previous_groups: list[ParamGroup],
        next_groups: list[ParamGroup],
    ) -> Callable[..., torch.Tensor]:
        """Return a block's forward that gathers the block's weights for itself."""

        def contexts_of_checkpoint() -> tuple[ContextManager, ContextManager]:
            in_forward = unsharded_groups(groups, prefetch=next_groups)
            in_recomputation = unsharded_groups(groups, prefetch=previous_groups)
            return in_forward, in_recomputation

        def unshard_and_run(*inputs: Any) -> torch.Tensor:
            is_unsharded = groups[0].flat_param.is_unsharded
            if self.gradient_checkpointing and torch.is_grad_enabled() and not is_unsharded:
                return checkpoint(
                    forward,
                    *inputs,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=contexts_of_checkpoint,
                )
            with unsharded_groups(groups, prefetch=next_groups, keep_for_backward=False):
                return forward(*inputs)

        return unshard_and_run

    def start_reduce_scatter(self, group: ParamGroup) -> None:
        """Start to sum a group's gradient over ranks, after the end of the one that is running.

        The sum runs while the backward of block i - 1, which comes next, computes. Without
        `requires_gradient_sync` the gradient stays in `full_grad`, for the next backward.
        """
        self.finish_reduce_scatter()
        if not self.requires_gradient_sync:
            return
        assert group.full_grad is not None  # the backward has just added to it
        wait = dist.start_reduce_scatter(group.full_grad)
        self.pending_reduce_scatter = PendingReduceScatter(group, wait)
        group.full_grad = None
        # The last group of a backward has no next one that would end it.
        queue_backward_callback(self.finish_reduce_scatter)

    def finish_reduce_scatter(self) -> None:
        """Wait for the reduce-scatter that is running, if any, and add the sum to shard.grad."""
        if self.pending_reduce_scatter is None:
            return
        group, wait = self.pending_reduce_scatter
        self.pending_reduce_scatter = None
        grad = wait()  # (n,)
        if group.shard.grad is None:
            group.shard.grad = grad
        elif grad is not group.shard.grad:  # with one rank it was added to in place
            group.shard.grad.add_(grad)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, attention: Any
    ) -> torch.Tensor:
        """Return what the Decoder does: tokens (M,), positions (M,) -> hidden (M, C)."""
        with self.root():
            return self.decoder(tokens, positions, attention)

    def root(self) -> ContextManager[None]:
        """Gather embedding, last norm and head once for the duration of the block. Their gradients
        share one reduce-scatter.
        """
        first_block = self.block_groups[1]  # entry 0 is empty: no block is before the first
        return unsharded_groups(self.root_groups, prefetch=first_block)

    @property
    def head_weight(self) -> torch.Tensor:
        return self.decoder.head_weight

    def tensors(self, trained_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and the full tensor of every weight, in the type of its shard; of a block
        those that are trained come first.

        One group at a time is gathered. A collective: all ranks go through it together, also where
        a wait does not hold the host, as with nccl. There a rank that only takes part would else
        start all gathers at once, and the time limit of the last one would run while rank 0
        writes the whole model.
        """
        for group in self.units:
            assert isinstance(group, ParamGroup)
            if trained_only and not group.shard.requires_grad:
                continue
            wait = cpu_offload.start_all_gather_from_host(
                group.shard.detach(), group.shard.dtype, group.device
            )
            full = wait()  # (W n,)
            cpu_offload.wait_on_host(group.device)
            for weight in group.flat_param.weights:
                yield weight.name, weight.view(full)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[nn.Module]:
    """Gather all weights of a Sharded model once, for sampling, without gradients. Give any other
    module as it is.
    """
    with torch.no_grad(), ExitStack() as stack:
        if isinstance(model, Sharded):
            stack.enter_context(unsharded_groups(model.root_groups, prefetch=[]))
            for groups in model.block_groups[1:-1]:
                stack.enter_context(unsharded_groups(groups, prefetch=[]))
        yield model
