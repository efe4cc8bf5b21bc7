"""Run every operation on GPU tensors by CUDA's rules: what is refused, where the host waits, what
is launched and which memory it uses.
"""

from collections.abc import Callable
from typing import Any

import torch
from gpu.standin.activity import activity
from gpu.standin.graphs import list_tensors, list_written
from gpu.standin.kernels import get_name, run_on_cpu
from gpu.standin.streams import (
    get_current_graph,
    get_current_stream,
    keep_host_memory,
    record_launch,
    wait_on_host,
)
from gpu.standin.tensor import GpuTensor
from torch.utils._pytree import tree_map

# The result's shape, or a Python number, depends on values in the GPU's memory.
WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}

# Nothing is launched: the result is a view, or memory that nobody has written yet.
NOT_LAUNCHED = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "diagonal",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "is_pinned",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "permute",
    "select",
    "set_",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unfold",
    "unsqueeze",
    "view",
}

INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"copy_", "_to_copy"}

# x[0] = 1.0 comes here as a fill by a CPU tensor.
TAKING_NUMBERS = {"fill_"}


class DeviceMismatch(RuntimeError):
    """An operation has operands on the GPU and on the CPU."""


def run_operation(func: Callable, args: tuple, kwargs: dict) -> Any:
    """Run an operation that has a GPU tensor among its arguments."""
    name = get_name(func)
    if name in COPIES and crosses_devices(name, args, kwargs):
        return copy_across(name, args, kwargs)
    operands = list_tensors((args, kwargs))
    check_devices(func, operands)

    inner_args, inner_kwargs = unwrap((args, kwargs))
    if kwargs.get("device") is not None:
        inner_kwargs["device"] = torch.device("cpu")
    waits = list_waits(name, args, kwargs)
    graph = get_current_graph()
    if graph:
        graph.refuse_waits(waits)
        inner_result = graph.capture_operation(func, inner_args, inner_kwargs)
    else:
        inner_result = run_on_cpu(func, inner_args, inner_kwargs)

    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "cpu":
        return inner_result  # say, x.new_zeros(3, device="cpu")
    result = wrap(inner_result, operands)
    if name not in NOT_LAUNCHED:
        account(func, name, args, kwargs, result)
    for kind in waits:
        wait_on_host(kind, [get_current_stream()])
    return result


def check_devices(func: Callable, operands: list[torch.Tensor]) -> None:
    """Refuse CPU operands, but numbers, which CUDA takes, and indices, which it copies."""
    on_cpu = [x for x in operands if not isinstance(x, GpuTensor)]
    shapes = [tuple(x.shape) for x in on_cpu if x.dim() > 0]
    name = get_name(func)
    if shapes and name not in INDEXING:
        raise DeviceMismatch(
            f"{func}: expected all tensors to be on the GPU, found on the CPU: {shapes}"
        )
    if on_cpu and not shapes and name not in TAKING_NUMBERS:
        activity.add_host_number(name)


def list_waits(name: str, args: tuple, kwargs: dict) -> list[str]:
    """List why the host waits for an operation."""
    waits = []
    has_output_size = kwargs.get("output_size") is not None
    if name in WAITING and not (name == "repeat_interleave" and has_output_size):
        waits.append(name)
    if name in INDEXING:
        indices = list_tensors(args[1])
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            waits.append("index by a mask")
        if not all(isinstance(index, GpuTensor) for index in indices):
            waits.append("H2D of an index")
    return waits


def unwrap(tree: Any) -> Any:
    return tree_map(lambda x: x.inner if isinstance(x, GpuTensor) else x, tree)


def wrap(inner_result: Any, operands: list[torch.Tensor]) -> Any:
    """Wrap new tensors; what an operation returns of its operands stays the operand."""
    operand_of = {}
    for x in operands:
        if isinstance(x, GpuTensor):
            assert x.shape == x.inner.shape, "an operation has resized its operand"
            operand_of[id(x.inner)] = x

    def wrap_leaf(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return operand_of[id(x)] if id(x) in operand_of else GpuTensor(x)

    return tree_map(wrap_leaf, inner_result)


def account(func: Callable, name: str, args: tuple, kwargs: dict, result: Any) -> None:
    """Count a launch, and note which memory it uses."""
    operands = [x for x in list_tensors((args, kwargs)) if isinstance(x, GpuTensor)]
    outputs = [x for x in list_tensors(result) if isinstance(x, GpuTensor)]
    used = {id(x): x for x in operands + outputs}
    num_bytes = sum(x.inner.numel() * x.inner.element_size() for x in used.values())
    activity.add_launch(name, num_bytes)

    operand_memory = {x.allocation for x in operands}
    output_memory = {x.allocation for x in outputs}
    written = list_written(func, args, kwargs)
    if func.namespace == "c10d":  # collectives do not declare what they write
        written = operands
    writes = {x.allocation for x in written if isinstance(x, GpuTensor)}
    writes |= output_memory - operand_memory
    reads = operand_memory - writes
    graph = get_current_graph()
    if graph:
        graph.note_uses(reads, writes)
    else:
        record_launch(reads, writes, name)


# --- Copies between the host and the GPU ----------------------------------------------------------


def crosses_devices(name: str, args: tuple, kwargs: dict) -> bool:
    if name == "copy_":
        target, source, *_ = args
        return isinstance(target, GpuTensor) != isinstance(source, GpuTensor)
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"


def copy_across(name: str, args: tuple, kwargs: dict) -> torch.Tensor:
    """Copy to or from the host. The host waits for it, unless it is non_blocking."""
    if name == "copy_":
        target, source, *rest = args
        non_blocking = rest[0] if rest else kwargs.get("non_blocking", False)
    else:
        # to the host; to the GPU a tensor comes by `empty` and copy_
        [source] = args
        non_blocking = kwargs.get("non_blocking", False)
        dtype = kwargs.get("dtype") or source.dtype
        target = torch.empty_like(source.inner, dtype=dtype)

    to_gpu = isinstance(target, GpuTensor)
    kind = "H2D" if to_gpu else "D2H"
    graph = get_current_graph()
    if graph:
        graph.refuse_waits([kind])
    unwrap(target).copy_(unwrap(source))
    activity.add_launch(kind, source.numel() * source.element_size())

    # Host memory is used by the copy alone, unless the host goes on meanwhile.
    gpu_memory = target.allocation if to_gpu else source.allocation
    host_memory = set()
    if non_blocking:
        host_memory = {keep_host_memory(source if to_gpu else target)}
    if to_gpu:
        record_launch(reads=host_memory, writes={gpu_memory}, operation=kind)
    else:
        record_launch(reads={gpu_memory}, writes=host_memory, operation=kind)
    if non_blocking:
        activity.add_async_copy(kind)
    else:
        wait_on_host(kind, [get_current_stream()])
    return target


# --- Tensors that begin on the GPU ----------------------------------------------------------------


def make_empty(
    size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None
) -> GpuTensor:
    return GpuTensor(torch.empty(size, dtype=dtype, device="cpu"))


def make_empty_strided(
    size, stride, *, dtype=None, layout=None, device=None, pin_memory=None
) -> GpuTensor:
    return GpuTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def make_range(*bounds, dtype=None, layout=None, device=None, pin_memory=None) -> GpuTensor:
    """Write a range into new memory by an operation, which a graph can capture."""
    numbers = torch.arange(*bounds, dtype=dtype, device="cpu")
    start, end, step = 0, bounds[0], 1
    if len(bounds) > 1:
        start, end, *steps = bounds
        step = steps[0] if steps else 1
    result = GpuTensor(torch.empty_like(numbers))
    return torch.ops.aten.arange.start_out(start, end, step, out=result)


library = torch.library.Library("aten", "IMPL")


def register_operations() -> None:
    """Let torch call the functions of this file."""
    GpuTensor.run_operation = staticmethod(run_operation)
    library.impl("empty.memory_format", make_empty, "CUDA")
    library.impl("empty_strided", make_empty_strided, "CUDA")
    for overload in ("arange", "arange.start", "arange.start_step"):
        library.impl(overload, make_range, "CUDA")
