"""What the program asks of the GPU, counted: launches, bytes, and where the host waits."""

import threading
from collections import Counter

from gpu.standin.places import name_place


class HostWait(RuntimeError):
    """The host waits where it must not: inside a capture, or under set_sync_debug_mode("error")."""


class Activity:
    """What was asked since the last `clear`, on all threads.

    Attributes:
        launches: place -> kernels and copies that a GPU would be given.
        kernels: name of an operation -> how many of the launches were its.
        waits: (place, kind) -> how often the host waited for the GPU there. Kinds are names of
            operations, and D2H and H2D, the copies to and from the host.
        async_copies: (place, kind) -> copies that the host did not wait for.
        host_numbers: (place, operation) -> how often a number in host memory was an operand.
        races: what was used or given away too early -> how often.
        captured: of each CUDA graph, name of an operation -> how many of its launches were its.
        num_replays: of all CUDA graphs.
    """

    def __init__(self):
        # reentrant: the collector may free memory, and find a race, while a count is being made
        self.lock = threading.RLock()
        self.sync_debug_mode = "default"
        self.clear()

    def clear(self) -> None:
        self.launches: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.num_bytes = 0
        self.waits: Counter[tuple[str, str]] = Counter()
        self.async_copies: Counter[tuple[str, str]] = Counter()
        self.host_numbers: Counter[tuple[str, str]] = Counter()
        self.races: Counter[str] = Counter()
        self.captured: list[Counter[str]] = []
        self.num_replays = 0

    def add_launch(self, kernel: str, num_bytes: int = 0) -> None:
        place = name_place()
        with self.lock:
            self.launches[place] += 1
            self.kernels[kernel] += 1
            self.num_bytes += num_bytes

    def add_wait(self, kind: str) -> None:
        """Count a wait of the host for the GPU. Raises HostWait where that was forbidden."""
        place = name_place()
        if self.sync_debug_mode == "error":
            raise HostWait(f"{place} waits for the GPU: {kind}")
        with self.lock:
            self.waits[place, kind] += 1

    def add_async_copy(self, kind: str) -> None:
        place = name_place()
        with self.lock:
            self.async_copies[place, kind] += 1

    def add_host_number(self, operation: str) -> None:
        place = name_place()
        with self.lock:
            self.host_numbers[place, operation] += 1

    def add_race(self, what: str) -> None:
        with self.lock:
            self.races[what] += 1

    def count_launches(self) -> int:
        return self.launches.total()

    def sum_waits_by_place(self) -> Counter[str]:
        """Return place -> how often the host waited there."""
        sums: Counter[str] = Counter()
        for (place, _), count in self.waits.items():
            sums[place] += count
        return sums


activity = Activity()
