"""The decode step as CUDA graphs: the forward over the cache, the head, the choice, and the chosen
ids back into the next step, without the host.

A graph is one launch of fixed kernels on fixed addresses. So there is one for each pair of a number
of rows (a rung of `round_to_rung`) and a number of slots to read (a multiple of
GRAPH_SLOT_MULTIPLE), and everything it reads or writes stays where it is: the cache at its full
size, `ids`, `uniforms`, `logp`, `truncated_mass`. Rows beyond the running ones write into cache
rows that belong to nobody; slots beyond a row's length are masked. A pair's first step runs without
a graph, on the stream that captures. It is the warm-up that torch asks for: kernels compile, cuBLAS
takes its workspace. The second step is captured, and replayed from then on.

The graphs live as long as the Sampler (sampling/generate.py): one call of generate() in training,
where the next step's gathered weights have other addresses, or all calls of an evaluation. What a
call costs, for Qwen2.5-0.5B, 384 rows, prompt 256, 512 new tokens (arithmetic, not measured
here): a step is 20 ms of launches without a graph and 1.8 ms of reading with one; a pair costs one
such 20 ms step and a capture, 30 ms each at 67 sizes of a 28-layer 0.6B (vLLM, pull request 21146),
so it has paid after three replays. The number of rows only falls and lengths only grow while
nothing enters, so a call passes at most 12 rungs and 5 numbers of slots, 17 pairs: 0.85 s, beside
0.9 s of replays (a tenth more with padding) and 10 s of steps without graphs. Keeping the graphs
for the next step would save the 0.85 s and cost fixed addresses for the weights, in training too.

Legend: B running rows, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from recr1.sampling.kv_cache import KVCache

GRAPH_DEVICES = ("cuda",)  # device types that have graphs

GRAPH_SLOT_MULTIPLE = 128


class GraphKey(NamedTuple):
    """Name a graph: each is captured for one of these."""

    rows: int
    slots: int
    sampled: bool  # False: greedy


class DecodeGraphs:
    """Run decode steps as CUDA graphs.

    A call (ids (B,), uniforms (B, 1) or None) returns what `sample_tokens` returns for the running
    rows: ids and log-probs (B, 1), truncated mass (B,). The KVCache is at its full size and no row
    is shared. Nothing waits for the GPU, except the capture.
    """

    def __init__(self, model: Callable, cache: KVCache, sample_tokens: Callable):
        """`sample_tokens(hidden (B, C), uniforms=...)` is the one of the step without a graph."""
        self.model = model
        self.cache = cache
        self.num_cache_moves = cache.num_moves
        self.sample_tokens = sample_tokens

        # The fixed addresses: what a step reads, and what it chose.
        max_rows = cache.kv.shape[1]
        device = cache.lengths.device
        dtype = torch.promote_types(cache.kv.dtype, torch.float32)
        self.ids = torch.zeros(max_rows, 1, dtype=torch.int64, device=device)
        self.uniforms = torch.full((max_rows, 1), 0.5, dtype=torch.float64, device=device)
        self.logp = torch.zeros(max_rows, 1, dtype=dtype, device=device)
        self.truncated_mass = torch.zeros(max_rows, dtype=dtype, device=device)

        # None: warmed up, not captured.
        self.graphs: dict[GraphKey, torch.cuda.CUDAGraph | None] = {}
        # One pool: no graph leaves anything in it that another one reads. It wants one stream.
        self.stream = get_graph_stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, ids: torch.Tensor, uniforms: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run one decode step: warm up, or capture and replay, or replay."""
        B = len(ids)
        key = self.choose_graph(B, uniforms is not None)
        self.ids[:B, 0] = ids
        if uniforms is not None:
            self.uniforms[:B] = uniforms

        if key not in self.graphs:
            self.graphs[key] = None
            self._warm_up(key)
        else:
            graph = self.graphs[key]
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                self.graphs[key] = graph
                self._capture(key)
            graph.replay()
        self.cache.host_lengths += 1  # on the host, so not in the graph
        return self.ids[:B].clone(), self.logp[:B].clone(), self.truncated_mass[:B].clone()

    def has_cache_moved(self) -> bool:
        """Return whether the cache has got other memory: then the graphs are of no use."""
        return self.cache.num_moves != self.num_cache_moves

    def choose_graph(self, rows: int, sampled: bool) -> GraphKey:
        """Return the key of the graph for the next step of so many rows."""
        _, max_rows, _, max_slots, _ = self.cache.kv.shape
        needed_slots = self.cache.max_len + 1
        slots = -(-needed_slots // GRAPH_SLOT_MULTIPLE) * GRAPH_SLOT_MULTIPLE
        return GraphKey(round_to_rung(rows, max_rows), min(slots, max_slots), sampled)

    def _warm_up(self, key: GraphKey) -> None:
        """Run the step without a graph, on the stream that captures."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._step(*key)
        torch.cuda.current_stream().wait_stream(self.stream)

    def _capture(self, key: GraphKey) -> None:
        graph = self.graphs[key]
        assert graph is not None
        # thread_local: what other threads do, say NCCL's watchdog, does not spoil the capture.
        with torch.cuda.graph(
            graph,
            pool=self.pool,
            stream=self.stream,
            capture_error_mode="thread_local",
        ):
            self._step(*key)

    def _step(self, rows: int, slots: int, sampled: bool) -> None:
        """Compute what is captured.

        Whatever it takes from the host, its shapes above all, stays as it was at the capture.
        """
        positions = self.cache.begin_decode_step(rows, slots)
        hidden = self.model(self.ids[:rows, 0], positions, self.cache)  # (rows, C)
        uniforms = self.uniforms[:rows] if sampled else None
        ids, logp, truncated_mass = self.sample_tokens(hidden, uniforms=uniforms)
        self.cache.lengths[:rows] += 1
        self.ids[:rows] = ids
        self.logp[:rows] = logp
        self.truncated_mass[:rows] = truncated_mass


@lru_cache
def get_graph_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which a device's decode steps are captured, the same at every call.

    torch keeps a cuBLAS workspace for each stream that has had a product, 32 MiB on a Hopper GPU
    (its CublasHandlePool.cpp). It may clear them when a graph of that stream is destroyed (pull
    request 193402): of the DecodeGraphs on one stream only one may be alive.
    """
    return torch.cuda.Stream(device)


def round_to_rung(rows: int, max_rows: int) -> int:
    """Return the smallest of 8, 12, 16, 24, 32, 48, ... that is not below `rows`, or `max_rows` if
    that is smaller.
    """
    power = max(8, 1 << (rows - 1).bit_length())
    between = 3 * power // 4
    if power > 8 and rows <= between:
        return min(between, max_rows)
    return min(power, max_rows)
