"""The KV cache of the sampler. It owns its rows' lengths; the model never sees them (DESIGN: cache passed in, no globals).

Legend: B live rows, S slots, K kv heads, D head dim. Rows 0..B-1 are live: no row that is finished is computed again.
"""
from __future__ import annotations

import torch

from .attention import SLOTS, PackedAttention, attend_rows


class KVCache:
    """Keys and values by layer, (rows, K, S, D). As a callable (layer, q, k, v) it is the attention of one decode step.

    `lengths` (rows,) counts the tokens a row holds; `live` is B. Slots beyond a row's length are masked. Room grows as needed, to twice
    that, but not past `most`.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype, device):
        self.store = torch.zeros(2 * layers, 0, kv_heads, 0, head_dim, dtype=dtype, device=device)   # keys, then values, by layer
        self.layers, self.live = layers, 0
        self.lengths = torch.zeros(0, dtype=torch.int64, device=device)
        self.width = 0                                   # the longest live row, in tokens
        self.most = 1 << 62, 1 << 62                     # rows, slots that the texts under way can come to: set by generate()

    def prefill(self, packed: PackedAttention, lengths: torch.Tensor):
        """The attention callable of the prompts' packed forward: it writes prompt p into row p on the way."""
        n, width = packed.rows_p.shape
        self._reserve(n, width)
        self.live, self.width = n, int(lengths.max())
        self.lengths[:n] = lengths.to(self.lengths.device)

        def attention(layer, q, k, v):
            for at, new in ((layer, k), (self.layers + layer, v)):
                padded = new.index_select(0, packed.rows_p.flatten()).view(n, width, *new.shape[1:])
                self.store[at, :n, :, :width] = padded.transpose(1, 2)
            return packed(layer, q, k, v)
        return attention

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n, at = self.live, self.lengths[:self.live]
        keys, values = self.store[layer, :n], self.store[self.layers + layer, :n]            # (B, K, S, D)
        row = torch.arange(n, device=q.device)
        keys[row, :, at], values[row, :, at] = k, v
        width = self._slots()
        return attend_rows(q, keys[:, :, :width], values[:, :, :width], at + 1)

    def advance(self) -> None:
        """After a decode step through all layers: every live row holds one token more."""
        self.lengths[:self.live] += 1
        self.width += 1

    def rearrange(self, sources: list[int], targets: list[int], live: int) -> None:
        """Copies row sources[i] to row targets[i] (all read before any is written); rows 0..live-1 are then the live ones."""
        self._reserve(live, self._slots())
        if sources:
            src, dst = (torch.tensor(x, device=self.lengths.device) for x in (sources, targets))
            self.lengths[dst] = self.lengths[src]
            self.store[:, dst, :, :self.width] = self.store[:, src, :, :self.width]
        self.live = live
        self.width = int(self.lengths[:live].max())

    def _slots(self) -> int:
        """Key slots that the next decode step reads: room for one token more, rounded up."""
        return slots(self.width + 1)

    def _reserve(self, rows: int, room: int) -> None:
        """Place for `rows` rows of `room` slots, with as much again to grow into, up to `most`. Zeros, not empty: 0 * NaN in a masked slot is NaN."""
        _, have_rows, heads, have_slots, dim = self.store.shape
        if rows <= have_rows and room <= have_slots:
            return
        rows = have_rows if rows <= have_rows else max(rows, min(2 * rows, self.most[0]))
        room = have_slots if room <= have_slots else max(room, min(2 * room, self.most[1]))
        bigger = self.store.new_zeros(2 * self.layers, rows, heads, room, dim)
        bigger[:, :self.live, :, :self.width] = self.store[:, :self.live, :, :self.width]
        lengths = self.lengths.new_zeros(rows)
        lengths[:self.live] = self.lengths[:self.live]
        self.store, self.lengths = bigger, lengths


def slots(tokens: int) -> int:
    """Slots of a row that holds so many tokens."""
    return -(-tokens // SLOTS) * SLOTS
