"""The decode step as CUDA graphs: forward over the cache, head, choice, and the chosen ids back
into the next step, without the host.

A graph is one launch of fixed kernels on fixed addresses, so there is one for each pair of a number
of rows (`rung`) and of key slots (multiples of SLOTS), and everything it reads or writes stays
where it is: the cache at its full size, `ids`, `uniforms`, `logp`, `cut`. Rows beyond the live ones
write into cache rows that are nobody's; slots beyond a row's length are masked. A pair's first step
runs without a graph, on the stream that captures, and is the warm-up that torch asks for: kernels
compile, cuBLAS takes its workspace. Its second step is captured, and replayed from then on.

The graphs live as long as one generate(): the next step's gathered weights lie elsewhere. What that
costs, for Qwen2.5-0.5B, 384 rows, prompt 256, 512 new tokens (arithmetic, not measured here): a
step is 20 ms of launches without a graph and 1.8 ms of reading with one (PERFORMANCE.md, sections 1
and 8); a pair costs one such 20 ms step and a capture, 30 ms each at 67 sizes of a 28-layer 0.6B
(vLLM, pull request 21146): it has paid after three replays. Rows only fall and lengths only grow
while nothing enters, so a call passes 12 rungs and 5 widths at most, 17 pairs, 0.85 s, beside 0.9 s
of replays (a tenth more with padding) and 10 s of steps without graphs. Keeping them for the next
step would save the 0.85 s and cost fixed addresses for the weights, in training too.
Legend: B live rows, C width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

DEVICES = ("cuda",)  # where there are graphs

SLOTS = 128


class DecodeGraphs:
    """One decode step: (ids (B,), uniforms (B, 1) or None) -> what `choice` returns for the live
    rows: ids and log-probs (B, 1), mass cut off (B,).

    `choice(hidden (B, C), uniforms=...)` is the eager step's. The KVCache stands at its full size
    and no row is shared. None of it waits for the GPU, but for the capture. All of a generate()
    draws, or all of it is greedy.
    """

    def __init__(self, model: Callable, cache, choice: Callable):
        self.model = model
        self.cache = cache
        self.choice = choice
        rows = cache.store.shape[1]
        device = cache.lengths.device
        wide = torch.promote_types(cache.store.dtype, torch.float32)
        # what the step reads, and then what it chose
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.uniforms = torch.full((rows, 1), 0.5, dtype=torch.float64, device=device)
        self.logp = torch.zeros(rows, 1, dtype=wide, device=device)
        self.cut = torch.zeros(rows, dtype=wide, device=device)
        # None: warm, not captured
        self.graphs: dict[tuple[int, int, bool], torch.cuda.CUDAGraph | None] = {}
        # One pool: no graph leaves anything in it that another one reads. It wants one stream.
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, ids: torch.Tensor, uniforms: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        B = len(ids)
        pair = self.pair(len(ids), uniforms is not None)
        self.ids[:B, 0] = ids
        if uniforms is not None:
            self.uniforms[:B] = uniforms
        if pair not in self.graphs:
            self.graphs[pair] = None
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self._step(*pair)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            if self.graphs[pair] is None:
                self.graphs[pair] = torch.cuda.CUDAGraph()
                # thread_local: what other threads do, NCCL's watchdog say, does not spoil the
                # capture
                with torch.cuda.graph(
                    self.graphs[pair],
                    pool=self.pool,
                    stream=self.stream,
                    capture_error_mode="thread_local",
                ):
                    self._step(*pair)
            self.graphs[pair].replay()
        self.cache.width += 1  # on the host: no part of the graph
        return self.ids[:B].clone(), self.logp[:B].clone(), self.cut[:B].clone()

    def pair(self, rows: int, sampled: bool) -> tuple[int, int, bool]:
        """Rows and slots of the graph for a step of so many rows from here."""
        _, most, _, room, _ = self.cache.store.shape
        return (
            round_to_rung(rows, most),
            min(-(-(self.cache.width + 1) // SLOTS) * SLOTS, room),
            sampled,
        )

    def _step(self, rows: int, width: int, sampled: bool) -> None:
        """What is captured. Whatever it takes from the host, its shapes above all, stays as it was
        then.
        """
        # (rows, C)
        hidden = self.model(self.ids[:rows, 0], self.cache.next(rows, width), self.cache)
        chosen = self.choice(hidden, uniforms=self.uniforms[:rows] if sampled else None)
        self.cache.lengths[:rows] += 1
        for kept, new in zip((self.ids, self.logp, self.cut), chosen):
            kept[:rows] = new


def round_to_rung(rows: int, most: int) -> int:
    """The smallest of 8, 12, 16, 24, 32, 48, ... that is not below `rows`, or `most` where that is
    less.
    """
    power = max(8, 1 << (rows - 1).bit_length())
    return min(3 * power // 4 if 8 < power and rows <= 3 * power // 4 else power, most)
