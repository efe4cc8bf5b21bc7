"""Streams, and the races between them, found by vector clocks (Fidge 1988; Mattern 1989).

Launches are numbered. A stream's clock says, for each stream, up to which launch its work is over
before anything that is launched here from now on begins. `wait_stream` and `wait_event` raise it,
and so does a wait of the host, since the host launches nothing before it is over. A launch that
reads or writes what another stream has written, and whose stream's clock is behind that write, is a
race: on a GPU it may run first. Nothing depends on timing, so a race is found in every run.

Memory is given away when its last tensor is gone. The allocator gives it to the stream it was made
on (CUDACachingAllocator), so what other streams did with it must be over there, unless
`record_stream` told the allocator.
"""

import contextlib
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from gpu.standin.activity import activity
from gpu.standin.places import name_place

lock = threading.RLock()  # of all clocks and allocations
launch_numbers = itertools.count(1)
thread_state = threading.local()


class CallSite(NamedTuple):
    """Where the program calls a method of a stream."""

    file: str
    line: int


# A test that deletes a call to see whether the race is found puts it here: the call does nothing.
deleted_calls: set[CallSite] = set()
reached_calls: set[CallSite] = set()


def is_deleted() -> bool:
    """Say whether the call of the function that asks is deleted; note that it was reached."""
    frame = sys._getframe(2)
    file = os.path.realpath(frame.f_code.co_filename)
    site = CallSite(file, frame.f_lineno)
    reached_calls.add(site)
    return site in deleted_calls


class Clock(dict):
    """Stream -> the number of its last launch that is over."""

    def catch_up(self, other: "Clock") -> None:
        """Know all that the other clock knows."""
        with lock:
            for stream, number in other.items():
                self[stream] = max(self.get(stream, 0), number)

    def knows(self, stream: "Stream", number: int) -> bool:
        return number <= self.get(stream, 0)


class Stream:
    """In the place of torch.cuda.Stream. An event is a copy of its clock."""

    def __init__(self, device: torch.device | None = None, name: str = ""):
        self.clock = Clock()
        self.name = name or f"stream {len(all_streams)}"
        all_streams.append(self)

    def wait_stream(self, other: "Stream") -> None:
        if not is_deleted():
            self.clock.catch_up(other.clock)

    def wait_event(self, event: Clock) -> None:
        if not is_deleted():
            self.clock.catch_up(event)

    def record_event(self) -> Clock:
        with lock:
            return Clock(self.clock)

    def synchronize(self) -> None:
        wait_on_host("synchronize", [self])


all_streams: list[Stream] = []
default_stream = Stream(name="the default stream")
host_clock = Clock()  # what the host has waited for


def get_current_stream() -> Stream:
    return getattr(thread_state, "stream", default_stream)


@contextlib.contextmanager
def use_stream(stream: Stream) -> Iterator[None]:
    """In the place of torch.cuda.stream."""
    before = get_current_stream()
    thread_state.stream = stream
    try:
        yield
    finally:
        thread_state.stream = before


def wait_on_host(kind: str, streams: Iterable[Stream]) -> None:
    """Let the host wait for streams. Raises HostWait inside a capture."""
    graph = get_current_graph()
    if graph:
        graph.refuse_waits([kind])
    activity.add_wait(kind)
    for stream in streams:
        host_clock.catch_up(stream.clock)


def synchronize(device: torch.device | int | None = None) -> None:
    """In the place of torch.cuda.synchronize: the host waits for all streams."""
    wait_on_host("synchronize", all_streams)


def get_current_graph() -> Any:
    """Return the graph (graphs.py) that this thread captures into, or None."""
    return getattr(thread_state, "graph", None)


class Use(NamedTuple):
    """A launch that read or wrote a piece of memory."""

    stream: Stream
    number: int


class Allocation:
    """A piece of memory: on whose stream it was made, who wrote it last, who has read it since."""

    total_bytes = 0  # of the GPU memory that is in use

    def __init__(self, num_bytes: int, on_host: bool = False):
        self.num_bytes = num_bytes
        self.on_host = on_host
        self.stream = get_current_stream()
        self.place = name_place()
        self.last_write: Use | None = None
        self.reads: dict[Stream, Use] = {}  # the last one of each stream
        self.recorded_streams: set[Stream] = set()
        if not on_host:
            Allocation.total_bytes += num_bytes

    def list_uses(self) -> list[Use]:
        uses = list(self.reads.values())
        if self.last_write:
            uses.append(self.last_write)
        return uses

    def __del__(self):
        if self.on_host or lock is None:  # None: the interpreter is ending
            return
        Allocation.total_bytes -= self.num_bytes
        with lock:
            for stream, number in self.list_uses():
                if stream is self.stream or stream in self.recorded_streams:
                    continue
                if self.stream.clock.knows(stream, number) or host_clock.knows(stream, number):
                    continue
                activity.add_race(
                    f"memory of {self.stream.name}, made in {self.place}, is given away "
                    f"while {stream.name} uses it"
                )


# by address; they live while a tensor on them does
allocations: weakref.WeakValueDictionary[int, Allocation] = weakref.WeakValueDictionary()


def find_allocation(inner: torch.Tensor, on_host: bool = False) -> Allocation:
    """Return the allocation of a CPU tensor's memory, a new one at first sight.

    What is first seen inside a capture lies in the graph's pool. Host memory is one piece per
    tensor, not per storage: tensors of their own share a pinned one.
    """
    storage = inner.untyped_storage()
    address = inner.data_ptr() if on_host else storage.data_ptr()
    with lock:
        allocation = allocations.get(address)
        if allocation is None:
            allocation = Allocation(storage.nbytes(), on_host)
            if address:  # an empty tensor has none
                allocations[address] = allocation
            graph = get_current_graph()
            if graph and not on_host:
                graph.add_to_pool(inner, allocation)
    return allocation


def record_launch(
    reads: Iterable[Allocation], writes: Iterable[Allocation], operation: str
) -> None:
    """Note a launch on the current stream, and the races that it is in."""
    stream = get_current_stream()
    reads = set(reads)
    writes = set(writes)
    with lock:
        number = next(launch_numbers)
        stream.clock.catch_up(host_clock)
        stream.clock[stream] = number
        for allocation in reads | writes:
            uses = [allocation.last_write] if allocation.last_write else []
            if allocation in writes:
                uses = allocation.list_uses()
            for other, other_number in uses:
                if not stream.clock.knows(other, other_number):
                    activity.add_race(
                        f"{operation} on {stream.name} in {name_place()} "
                        f"does not wait for {other.name}"
                    )
        use = Use(stream, number)
        for allocation in reads - writes:
            allocation.reads[stream] = use
        for allocation in writes:
            allocation.last_write = use
            allocation.reads = {}


class PendingCopy(NamedTuple):
    """Host memory that an asynchronous copy uses. It stays where it is until the copy is over.

    With CUDA the allocator of pinned memory sees to that (CachingHostAllocator).
    """

    memory: torch.Tensor
    allocation: Allocation


pending_copies: list[PendingCopy] = []


def keep_host_memory(memory: torch.Tensor) -> Allocation:
    """Return the allocation of host memory that an asynchronous copy reads or writes.

    Copies that are over let go of theirs.
    """
    with lock:
        pending_copies[:] = [copy for copy in pending_copies if is_pending(copy)]
        allocation = find_allocation(memory, on_host=True)
        pending_copies.append(PendingCopy(memory, allocation))
    return allocation


def is_pending(copy: PendingCopy) -> bool:
    uses = copy.allocation.list_uses()
    return not all(host_clock.knows(stream, number) for stream, number in uses)
