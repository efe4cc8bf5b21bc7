"""CUDA graphs: a capture notes operations without effect, a replay runs them on the very memory
they were captured with.

A replay reads nothing from the host: shapes, Python numbers and addresses are those of the capture.
What the capture made lies in the graph's pool. The next graph may use the pool too, so after a
replay it holds garbage here. Memory from outside must still be there: a graph keeps nothing alive.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from gpu.standin.activity import HostWait, activity
from gpu.standin.kernels import get_name, run_on_cpu
from gpu.standin.places import name_place
from gpu.standin.streams import (
    Allocation,
    Stream,
    record_launch,
    synchronize,
    thread_state,
    use_stream,
)
from torch.utils._pytree import tree_leaves


class GraphError(RuntimeError):
    """A graph was used as CUDA forbids, or reads memory that is gone."""


class Operation(NamedTuple):
    """An operation that was captured."""

    func: Callable
    args: tuple
    kwargs: dict
    outputs: list[torch.Tensor]
    is_new: list[bool]  # whether the output has memory of its own, in the pool
    reads: list["weakref.ref[Allocation]"]
    writes: list["weakref.ref[Allocation]"]


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph: bool = False):
        self.operations: list[Operation] = []
        # what the capture has made
        self.pool_memory: dict[int, torch.Tensor] = {}  # by address
        self.pool_allocations: weakref.WeakSet[Allocation] = weakref.WeakSet()
        # what the capture has overwritten: address -> a tensor there, and the bytes it had
        self.overwritten: dict[int, tuple[torch.Tensor, torch.UntypedStorage]] = {}
        self.is_captured = False

    def capture_operation(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Run an operation on CPU tensors and note it. `end_capture` undoes what it wrote."""
        inputs = list_tensors((args, kwargs))
        for x in list_written(func, args, kwargs):
            address = get_address(x)
            if address not in self.pool_memory and address not in self.overwritten:
                self.overwritten[address] = (x, x.untyped_storage().clone())

        result = run_on_cpu(func, args, kwargs)

        input_addresses = {get_address(x) for x in inputs}
        outputs = list_tensors(result)
        is_new = [get_address(x) not in input_addresses for x in outputs]
        self.operations.append(Operation(func, args, kwargs, outputs, is_new, [], []))
        return result

    def note_uses(self, reads: set[Allocation], writes: set[Allocation]) -> None:
        """Note which memory the last operation reads and writes.

        That of the pool is left out: all operations of a replay run one after the other.
        """
        operation = self.operations[-1]
        for uses, noted in ((reads, operation.reads), (writes, operation.writes)):
            for allocation in uses:
                if allocation not in self.pool_allocations:
                    noted.append(weakref.ref(allocation))

    def add_to_pool(self, inner: torch.Tensor, allocation: Allocation) -> None:
        """Note memory that is made inside the capture. It stays: replays use its address."""
        self.pool_memory[get_address(inner)] = inner
        self.pool_allocations.add(allocation)

    def refuse_waits(self, kinds: list[str]) -> None:
        """Raise HostWait where the host would wait inside the capture."""
        if kinds:
            raise HostWait(f"{name_place()} waits for the GPU inside a capture: {kinds[0]}")

    def end_capture(self) -> None:
        """Undo what the capture wrote: it was to have no effect."""
        for x, saved in self.overwritten.values():
            x.untyped_storage().copy_(saved)
        self.overwritten.clear()
        self.spoil_pool()
        self.is_captured = True

    def replay(self) -> None:
        """Run the operations on the current stream, as one launch."""
        if not self.is_captured:
            raise GraphError("replayed before it was captured")
        activity.add_launch("graph replay")
        activity.num_replays += 1
        for operation in self.operations:
            reads = list_alive(operation.reads, operation.func)
            writes = list_alive(operation.writes, operation.func)
            record_launch(reads, writes, f"replayed {get_name(operation.func)}")
            result = run_on_cpu(operation.func, operation.args, operation.kwargs)
            values = list_tensors(result)
            for x, value, new in zip(operation.outputs, values, operation.is_new):
                if new:
                    x.copy_(value)
        self.spoil_pool()

    def spoil_pool(self) -> None:
        for x in self.pool_memory.values():
            x.fill_(choose_garbage(x.dtype))


def list_tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def list_written(func: Callable, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """List the tensors among an operation's arguments that it writes."""
    written = []
    for index, argument in enumerate(func._schema.arguments):
        if not argument.alias_info or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        written += list_tensors(value)
    return written


def list_alive(uses: list["weakref.ref[Allocation]"], func: Callable) -> list[Allocation]:
    """Return the allocations. Raises GraphError where one is gone."""
    alive = []
    for use in uses:
        allocation = use()
        if allocation is None:
            raise GraphError(f"a replayed {get_name(func)} uses memory that was given away")
        alive.append(allocation)
    return alive


def get_address(x: torch.Tensor) -> int:
    """Return where a tensor's memory begins: views share it."""
    return x.untyped_storage().data_ptr()


def choose_garbage(dtype: torch.dtype) -> float | bool | int:
    """Choose a value that no result survives: as an index it is out of bounds."""
    if dtype.is_floating_point:
        return float("nan")
    if dtype == torch.bool:
        return True
    return torch.iinfo(dtype).max


@contextlib.contextmanager
def capture(
    graph: Graph,
    pool: object = None,
    stream: Stream | None = None,
    capture_error_mode: str = "global",
) -> Iterator[None]:
    """In the place of torch.cuda.graph."""
    synchronize()  # as torch.cuda.graph does
    stream = stream or Stream()
    if graph.is_captured:
        raise GraphError("this graph is captured already")
    thread_state.graph = graph
    before = activity.kernels.copy()
    try:
        with use_stream(stream):
            yield
        activity.captured.append(activity.kernels - before)
    finally:
        thread_state.graph = None
        graph.end_capture()
