"""attend() over a packed layout. Legend: M packed tokens, P prompts, R rollouts, H query heads, K
kv heads, D head dim.

Prompts read themselves causally, once per group; completions read their prompt's keys and their
own. The gradient of a prompt's keys is the sum over its siblings, as in the padded way, but its
rows are computed once (DESIGN decision 14).
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F

from recr1.model.varlen_attention import AttentionBackend

# Query rows and key slots are padded to these, and keys stand in one order, so that sampler and
# trainer sum alike: on CPU in float32
# the mean |sampler - trainer| log-prob falls from 1.4e-7 to 3e-9, the 99.9th percentile from 9e-6
# to 1e-6, at no measurable cost.
ROW_MULTIPLE = 4

SLOT_MULTIPLE = 16

# slots that an exact product sums at once: MKL cuts longer sums by their length, of which masked
# slots are part
BLOCK_BYTES = 128

# queries x keys of a row below which a plain product beats SDPA's blocks on CPU (4.6x at 12 x 24,
# 1.3x at 128 x 256)
SHORT_ROWS = 64 * 128


class PackedAttention:
    """softmax(q k^T / sqrt(D)) v for the rows of one layout (data_types.py); call it as (layer, q, k,
    v).

    q (M, H, D), k and v (M, K, D) -> (M, H, D). Index tensors are made once and serve all layers.
    SDPA needs padded rows: padding lives only inside the call, at the end of a row, where causality
    or the mask hides it. `varlen` (model/varlen_attention.py) needs none.
    """

    def __init__(
        self,
        prompt_lengths: torch.Tensor,
        completion_lengths: torch.Tensor,
        prompt_of: torch.Tensor,
        device=None,
        backend: AttentionBackend = AttentionBackend(),
    ):
        self.varlen = backend.varlen and backend.varlen(
            prompt_lengths, completion_lengths, prompt_of, device
        )
        self.exact = backend.exact
        # (P,), (R,), (R,)
        lengths, own, prompt_of = (
            t.to(device) for t in (prompt_lengths, completion_lengths, prompt_of)
        )
        start = lengths.cumsum(0) - lengths
        own_start = lengths.sum() + own.cumsum(0) - own
        # keys of sequence i as the sampler's cache holds them: a completion's prompt's, then its
        # own, without a gap
        # (R,)
        before = lengths[prompt_of]
        whole = lengths[prompt_of] + own
        slot = torch.arange(round_up(whole, SLOT_MULTIPLE), device=device)
        self.keys_p, _ = _pad_rows(start, lengths, round_up(lengths, SLOT_MULTIPLE))  # (P, S)
        self.keys_c = torch.where(
            slot < before[:, None],
            start[prompt_of, None] + slot,
            # (R, S')
            torch.where(slot < whole[:, None], (own_start - before)[:, None] + slot, 0),
        )
        if self.varlen:
            return
        self.rows_p, real_p = _pad_rows(start, lengths, round_up(lengths, ROW_MULTIPLE))  # (P, L)
        self.rows_c, real_c = _pad_rows(own_start, own, round_up(own, ROW_MULTIPLE))  # (R, T)
        self.unpad_p = real_p.flatten().nonzero()[:, 0]
        self.unpad_c = real_c.flatten().nonzero()[:, 0]
        self.mask_p = _make_causal_mask(
            torch.zeros_like(lengths[:1]), self.rows_p.shape[1], self.keys_p.shape[1]
        )
        self.mask_c = _make_causal_mask(before, self.rows_c.shape[1], len(slot))

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        if self.varlen:
            return self.varlen(q, k, v)
        out = _attend(
            _gather_rows(q, self.rows_p),
            _gather_rows(k, self.keys_p),
            _gather_rows(v, self.keys_p),
            self.mask_p,
            self.exact,
        )
        out = out.transpose(1, 2).flatten(0, 1).index_select(0, self.unpad_p)
        if not len(self.unpad_c):
            return out
        completions = _attend(
            _gather_rows(q, self.rows_c),
            _gather_rows(k, self.keys_c),
            _gather_rows(v, self.keys_c),
            self.mask_c,
            self.exact,
        )
        return torch.cat(
            [out, completions.transpose(1, 2).flatten(0, 1).index_select(0, self.unpad_c)]
        )


def round_up(lengths: torch.Tensor, multiple: int) -> int:
    """The longest of `lengths`, rounded up to a multiple."""
    return -(-int(lengths.max()) // multiple) * multiple if len(lengths) else 0


def attend_decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, exact: bool = False
) -> torch.Tensor:
    """Decode: one query per row. q (B, H, D), k and v (B, K, S, D), mask of `reads` (B, 1, 1, 1, S)
    -> (B, H, D).

    The H/K query heads of a kv head stand as rows of one small product: heads are never repeated. S
    is a multiple of SLOTS.
    """
    B, H, D = q.shape
    q = q.view(B, k.shape[1], -1, D)
    per_head = q.shape[2]
    return _eager_attention(
        F.pad(q, (0, 0, 0, -per_head % ROW_MULTIPLE))[:, :, None], k, v, mask, exact
    )[:, :, 0, :per_head].reshape(B, H, D)


def make_decode_bias(last: torch.Tensor, slots: int, dtype) -> torch.Tensor:
    """What is added to scores so that row b reads slots 0 .. last[b]: 0 or -inf, (B, 1, 1, 1,
    slots).
    """
    beyond = torch.arange(slots, device=last.device) > last[:, None]
    return torch.zeros(beyond.shape, dtype=dtype, device=last.device).masked_fill_(
        beyond, float("-inf")
    )[:, None, None, None]


def _make_causal_mask(before: torch.Tensor, width: int, keys: int) -> torch.Tensor:
    """Query t of row b reads slots 0 .. before[b] + t. before (B,) -> (B, 1, width, keys)."""
    last = before[:, None] + torch.arange(width, device=before.device)  # (B, width)
    return (torch.arange(keys, device=before.device) <= last[..., None])[:, None]


def _pad_rows(
    start: torch.Tensor, lengths: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers (B, width) of each sequence and which are real; padding points at row 0 and is
    masked or dropped.
    """
    slot = torch.arange(width, device=start.device)
    real = slot < lengths[:, None]
    return torch.where(real, start[:, None] + slot, 0), real


def _gather_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(M, heads, D) -> (B, heads, S, D). index_select, not x[rows]: its backward is deterministic
    and fast on CPU.
    """
    return x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:]).transpose(1, 2)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, exact: bool
) -> torch.Tensor:
    """q (B, H, T, D), k and v (B, K, S, D), mask (B or 1, 1, T, S) of which keys are read -> (B, H,
    T, D).
    """
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    if T * S > SHORT_ROWS and not exact:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=H != K)
    hidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(
        ~mask, float("-inf")
    )
    return _eager_attention(q.unflatten(1, (K, -1)), k, v, hidden[:, :, None], exact).flatten(1, 2)


def _eager_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, exact: bool
) -> torch.Tensor:
    """q (B, K, H/K, T, D), k and v (B, K, S, D), hidden (B or 1, 1, 1, T, S), -inf where not read
    -> (B, K, H/K, T, D): heads are not repeated.

    `exact` (CPU, float32): a query's result is a function of itself and the keys it reads, bit for
    bit, whatever B, T and S are.
    """
    weights = ((q * q.shape[-1] ** -0.5) @ k[:, :, None].mT + hidden).softmax(-1)
    if not exact:
        return weights @ v[:, :, None]
    return reduce(
        torch.add,
        (
            w @ x
            for w, x in zip(weights.split(BLOCK_BYTES, -1), v[:, :, None].split(BLOCK_BYTES, -2))
        ),
    )
