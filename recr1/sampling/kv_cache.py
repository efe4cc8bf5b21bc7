"""The KV cache of the sampler. It owns the lengths of its rows; the model never sees them.
The cache is passed in: there are no globals.

Legend: B running rows, S slots, K kv heads, D head dim. A slot holds the key and the value of one
token. Rows 0..B-1 are the running ones: a row that is finished is never computed again.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from recr1.model.packed_attention import (
    SLOT_MULTIPLE,
    PackedAttention,
    attend_decode,
    make_decode_bias,
)


class KVCache:
    """Store keys and values by layer. Called with (layer, q, k, v), attend for one decode step.

    Slots beyond a row's length are masked. The memory grows as needed, to twice what is needed, but
    never past `max_shape`.

    Attributes:
        kv: (2 * layers, rows, K, S, D), the keys of all layers, then their values.
        lengths: (rows,), how many tokens each row holds.
        host_lengths: (B,), those of the running rows once more: the host never waits for them.
        max_shape: (rows, slots) that the sequences of this call need at most.
        num_moves: how often `kv` and `lengths` have got other memory.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        exact: bool = False,
    ):
        self.kv = torch.zeros(2 * layers, 0, kv_heads, 0, head_dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(0, dtype=torch.int64, device=device)
        self.host_lengths = np.zeros(0, np.int64)
        self.layers = layers
        self.exact = exact
        self.num_moves = 0

    @property
    def num_rows(self) -> int:
        """Return B, how many rows are running."""
        return len(self.host_lengths)

    @property
    def max_len(self) -> int:
        """Return the length of the longest running row, in tokens; 0 when there is none."""
        return int(self.host_lengths.max(initial=0))

    def reset(self, rows: int, slots: int, reserve: bool = False) -> None:
        """Drop all running rows and set what the coming sequences need at most.

        `reserve`: allocate all of it now, so that it never moves (CUDA graphs).
        """
        self.host_lengths = self.host_lengths[:0]
        self.max_shape = (rows, slots)
        if reserve:
            self._reserve(rows, slots)

    def prefill(
        self, packed: PackedAttention, lengths: torch.Tensor
    ) -> Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """Add rows for prompts of `lengths`. Return the attention of their packed forward.

        It is a callable (layer, q, k, v) that also writes the prompts' keys and values into the
        new rows.
        """
        # For each prompt, which packed tokens it reads, padded: its own, and the shared ones.
        token_index = packed.keys_c if len(packed.keys_c) else packed.keys_p  # (P, S)
        slots = token_index.shape[1]

        # The prompts take the next rows.
        first_row = self.num_rows
        end_row = first_row + len(lengths)
        self._reserve(end_row, max(slots, self._count_slots_to_read()))
        self.host_lengths = np.append(self.host_lengths, lengths.numpy())
        self.lengths[first_row:end_row] = lengths.to(self.lengths.device, non_blocking=True)

        def attention(layer, q, k, v):
            for index, packed_kv in ((layer, k), (self.layers + layer, v)):
                flat = packed_kv.index_select(0, token_index.flatten())
                padded = flat.view(-1, slots, *packed_kv.shape[1:])  # (P, S, K, D)
                self.kv[index, first_row:end_row, :, :slots] = padded.transpose(1, 2)
            return packed(layer, q, k, v)

        return attention

    def begin_decode_step(self, rows: int = 0, slots: int = 0) -> torch.Tensor:
        """Prepare one decode step. Return the positions (B,) of the running rows' next tokens.

        A CUDA graph passes `rows` and `slots`, which may be more than the step needs.
        """
        rows = rows or self.num_rows
        self.slots_to_read = slots or self._count_slots_to_read()
        self.row = torch.arange(rows, device=self.lengths.device)
        self.slot = self.lengths[:rows].clamp(max=self.slots_to_read - 1)
        self.attention_bias = make_decode_bias(self.slot, self.slots_to_read, self.kv.dtype)
        return self.slot

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Write this step's keys and values of one layer, and attend to all that the rows hold."""
        rows = len(self.row)
        keys = self.kv[layer, :rows, :, : self.slots_to_read]  # (B, K, S, D)
        values = self.kv[self.layers + layer, :rows, :, : self.slots_to_read]
        keys[self.row, :, self.slot] = k
        values[self.row, :, self.slot] = v
        return attend_decode(q, keys, values, self.attention_bias, self.exact)

    def advance(self) -> None:
        """Count one token more in every running row, after a decode step through all layers."""
        self.lengths[: self.num_rows] += 1
        self.host_lengths += 1

    def reorder(self, parents: np.ndarray) -> np.ndarray:
        """Let child i continue row parents[i]. Return the row that each child is in.

        `parents` (n,) ascends. A row that continues as several is copied, a row that no child
        continues is overwritten, every other one stays where it is, so that rows 0..n-1 are the
        running ones. Example: parents [0, 0, 3] -> rows [0, 1, 2]: row 1 becomes a copy of row 0,
        row 2 of row 3.
        """
        n = len(parents)

        # A parent's first child stays in its row, if that is one of the n rows to come.
        is_first_child = np.diff(parents, prepend=-1).astype(bool)
        stays = (parents < n) & is_first_child

        # The others fill the rows that nobody stays in.
        rows = parents.copy()
        rows[~stays] = np.setdiff1d(np.arange(n), parents[stays])

        self._reserve(n, self._count_slots_to_read())
        if not stays.all():
            copies = torch.from_numpy(np.stack([parents[~stays], rows[~stays]]))
            source, target = copies.to(self.lengths.device, non_blocking=True)
            self.lengths[target] = self.lengths[source]
            self.kv[:, target, :, : self.max_len] = self.kv[:, source, :, : self.max_len]
        parent_lengths = self.host_lengths[parents]
        self.host_lengths = np.empty(n, np.int64)
        self.host_lengths[rows] = parent_lengths
        return rows

    def _count_slots_to_read(self) -> int:
        """Return the slots that the next decode step reads: one token more, rounded up."""
        return count_slots(self.max_len + 1)

    def _reserve(self, rows: int, slots: int) -> None:
        """Make sure that there are `rows` rows of `slots` slots.

        The new memory is zeros, not empty: 0 * NaN in a masked slot is NaN.
        """
        _, allocated_rows, heads, allocated_slots, dim = self.kv.shape
        if rows <= allocated_rows and slots <= allocated_slots:
            return
        max_rows, max_slots = self.max_shape
        rows = grow(allocated_rows, rows, max_rows)
        slots = grow(allocated_slots, slots, max_slots)

        if self.num_rows == 0:
            # Nothing to keep: the old memory goes before the new one is taken.
            self.kv = self.kv.new_zeros(2 * self.layers, 0, heads, 0, dim)
        kv = self.kv.new_zeros(2 * self.layers, rows, heads, slots, dim)
        lengths = self.lengths.new_zeros(rows)
        old_kv = self.kv[:, : self.num_rows, :, : self.max_len]
        kv[:, : self.num_rows, :, : self.max_len] = old_kv
        lengths[: self.num_rows] = self.lengths[: self.num_rows]
        self.kv = kv
        self.lengths = lengths
        self.num_moves += 1


def grow(allocated: int, needed: int, maximum: int) -> int:
    """Return what to allocate: enough, and as much again to grow into, up to `maximum`."""
    if needed <= allocated:
        return allocated
    return max(needed, min(2 * needed, maximum))


def count_slots(tokens: int) -> int:
    """Return the slots of a row that holds so many tokens: the next multiple of SLOT_MULTIPLE."""
    return -(-tokens // SLOT_MULTIPLE) * SLOT_MULTIPLE
