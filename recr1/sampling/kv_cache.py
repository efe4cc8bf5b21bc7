"""The KV cache of the sampler. It owns its rows' lengths; the model never sees them (DESIGN: cache
passed in, no globals).

Legend: B live rows, S slots, K kv heads, D head dim. Rows 0..B-1 are live: no row that is finished
is computed again.
"""

from __future__ import annotations

import numpy as np
import torch

from recr1.model.packed_attention import (
    SLOT_MULTIPLE,
    PackedAttention,
    attend_decode,
    make_decode_bias,
)


class KVCache:
    """Keys and values by layer, (rows, K, S, D). As a callable (layer, q, k, v) it is the attention
    of one decode step.

    `lengths` (rows,) counts the tokens a row holds; `live` is B. Slots beyond a row's length are
    masked. Room grows as needed, to twice that, but not past `most`.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, dtype, device, exact: bool = False
    ):
        # keys, then values, by layer
        self.store = torch.zeros(2 * layers, 0, kv_heads, 0, head_dim, dtype=dtype, device=device)
        self.layers = layers
        self.live = 0
        self.exact = exact
        self.lengths = torch.zeros(0, dtype=torch.int64, device=device)
        self.width = 0  # the longest live row, in tokens

    def clear(self, rows: int, room: int, at_once: bool = False) -> None:
        """No row is live any more; the texts to come need at most so many rows of so many slots.
        `at_once`: these are there from now on.
        """
        self.live = 0
        self.width = 0
        self.most = (rows, room)
        if at_once:
            self._reserve(rows, room)

    def prefill(self, packed: PackedAttention, lengths: torch.Tensor):
        """The attention callable of the prompts' packed forward: it writes their keys and values
        into the next rows on the way.
        """
        # rows of k and v, for each sequence that samples
        kept = packed.keys_c if len(packed.keys_c) else packed.keys_p
        start = self.live
        width = kept.shape[1]
        self._reserve(start + len(lengths), max(width, self._slots()))
        self.live = start + len(lengths)
        self.width = max(self.width, int(lengths.max()))
        self.lengths[start : self.live] = lengths.to(self.lengths.device)

        def attention(layer, q, k, v):
            for at, new in ((layer, k), (self.layers + layer, v)):
                padded = new.index_select(0, kept.flatten()).view(-1, width, *new.shape[1:])
                self.store[at, start : self.live, :, :width] = padded.transpose(1, 2)
            return packed(layer, q, k, v)

        return attention

    def next(self, rows: int = 0, width: int = 0) -> torch.Tensor:
        """Positions (B,) of the live rows' next tokens, for which a decode step begins. A graph
        takes `rows` and `width`, both may be more.
        """
        rows = rows or self.live
        self.reading = width or self._slots()
        self.row = torch.arange(rows, device=self.lengths.device)
        self.at = self.lengths[:rows].clamp(max=self.reading - 1)
        self.mask = make_decode_bias(self.at, self.reading, self.store.dtype)
        return self.at

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        # (B, K, S, D)
        keys, values = (
            self.store[at, : len(self.row), :, : self.reading]
            for at in (layer, self.layers + layer)
        )
        keys[self.row, :, self.at], values[self.row, :, self.at] = k, v
        return attend_decode(q, keys, values, self.mask, self.exact)

    def advance(self) -> None:
        """After a decode step through all layers: every live row holds one token more."""
        self.lengths[: self.live] += 1
        self.width += 1

    def rearrange(self, parents: np.ndarray) -> np.ndarray:
        """Row i to come continues row parents[i] (ascending): copied where a row continues as
        several, others stay, and fill places that became free. Returns where each now stands; rows
        0..n-1 are the live ones.
        """
        n = len(parents)
        stays = (parents < n) & np.diff(parents, prepend=-1).astype(bool)
        place = parents.copy()
        place[~stays] = np.setdiff1d(np.arange(n), parents[stays])
        self._reserve(n, self._slots())
        if not stays.all():
            src, dst = (
                torch.from_numpy(x[~stays]).to(self.lengths.device) for x in (parents, place)
            )
            self.lengths[dst] = self.lengths[src]
            self.store[:, dst, :, : self.width] = self.store[:, src, :, : self.width]
        self.live = n
        self.width = int(self.lengths[:n].max()) if n else 0
        return place

    def _slots(self) -> int:
        """Key slots that the next decode step reads: room for one token more, rounded up."""
        return count_slots(self.width + 1)

    def _reserve(self, rows: int, room: int) -> None:
        """Place for `rows` rows of `room` slots, with as much again to grow into, up to `most`.
        Zeros, not empty: 0 * NaN in a masked slot is NaN.
        """
        _, have_rows, heads, have_slots, dim = self.store.shape
        if rows <= have_rows and room <= have_slots:
            return
        rows = have_rows if rows <= have_rows else max(rows, min(2 * rows, self.most[0]))
        room = have_slots if room <= have_slots else max(room, min(2 * room, self.most[1]))
        bigger = self.store.new_zeros(2 * self.layers, rows, heads, room, dim)
        bigger[:, : self.live, :, : self.width] = self.store[:, : self.live, :, : self.width]
        lengths = self.lengths.new_zeros(rows)
        lengths[: self.live] = self.lengths[: self.live]
        self.store = bigger
        self.lengths = lengths


def count_slots(tokens: int) -> int:
    """Slots of a row that holds so many tokens."""
    return -(-tokens // SLOT_MULTIPLE) * SLOT_MULTIPLE
