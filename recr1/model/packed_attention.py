"""Attention over a packed layout.

Prompts read themselves causally, once per group. Completions read their prompt's keys and their
own. The gradient of a prompt's keys is the sum over its siblings, as with padded rows, but its rows
are computed once. A prompt `a b` with two completions that begin with c and d:

    row               0   1 |  2 |  3
    token             a   b |  c |  d

    row 0 reads       a               keys of the prompt:        rows 0 1 . .
    row 1 reads       a   b           (padded to SLOT_MULTIPLE)
    row 2 reads       a   b    c      keys of completion c:      rows 0 1 2 .
    row 3 reads       a   b        d  keys of completion d:      rows 0 1 3 .

Legend: M packed tokens, P prompts, R rollouts, H query heads, K kv heads, D head dim, B sequences,
T queries of a sequence, S key slots of a sequence.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F

from recr1.model.varlen_attention import AttentionBackend

# Query rows and key slots are padded to these, and keys are in one order, so that sampler and
# trainer sum alike: on CPU in float32 the mean |sampler - trainer| log-prob falls from 1.4e-7 to
# 3e-9, the 99.9th percentile from 9e-6 to 1e-6, at no measurable cost.
ROW_MULTIPLE = 4

SLOT_MULTIPLE = 16

# Slots that an exact product sums at once: MKL cuts longer sums by their length, in which masked
# slots are counted.
EXACT_BLOCK_SLOTS = 128

# Queries x keys of a row below which a plain product is faster than SDPA's blocks on CPU (4.6x at
# 12 x 24, 1.3x at 128 x 256).
SHORT_ROWS = 64 * 128

# Types whose scores would be rounded: their products are summed in float32 and kept so.
HALF_DTYPES = (torch.bfloat16, torch.float16)

SDPA = AttentionBackend()


class PackedAttention:
    """Compute softmax(q k^T / sqrt(D)) v for the rows of one layout (data_types.py).

    Call it as (layer, q, k, v): q (M, H, D), k and v (M, K, D) -> (M, H, D). Index tensors are made
    once and serve all layers. SDPA needs padded rows: padding exists only inside the call, at the
    end of a row, where causality or the mask hides it. `backend.varlen` (model/varlen_attention.py)
    needs none.

    Args:
        prompt_lengths: (P,); completion_lengths: (R,); prompt_of: (R,). Those of a PackedLayout, on
            the CPU.
    """

    def __init__(
        self,
        prompt_lengths: torch.Tensor,
        completion_lengths: torch.Tensor,
        prompt_of: torch.Tensor,
        device: torch.device | str | None = None,
        backend: AttentionBackend = SDPA,
    ):
        self.varlen = backend.varlen and backend.varlen(
            prompt_lengths, completion_lengths, prompt_of, device
        )
        self.exact = backend.exact

        # Numbers that the host needs: read here, on the CPU, nobody waits for a GPU.
        max_prompt_len = _max_length(prompt_lengths)
        max_completion_len = _max_length(completion_lengths)
        max_total_len = _max_length(prompt_lengths[prompt_of] + completion_lengths)

        # All prompts come first, then all completions.
        prompt_lengths = prompt_lengths.to(device, non_blocking=True)
        completion_len = completion_lengths.to(device, non_blocking=True)
        prompt_of = prompt_of.to(device, non_blocking=True)
        prompt_start = prompt_lengths.cumsum(0) - prompt_lengths  # (P,)
        completion_start = prompt_lengths.sum() + completion_len.cumsum(0) - completion_len  # (R,)
        prompt_len = prompt_lengths[prompt_of]  # (R,)
        total_len = prompt_len + completion_len  # (R,)

        # Keys of a sequence as the sampler's cache holds them: a completion's are its prompt's,
        # then its own, without a gap.
        num_slots = _round_up(max_prompt_len, SLOT_MULTIPLE)
        self.keys_p, _ = _pad_rows(prompt_start, prompt_lengths, num_slots)  # (P, S)
        slot = torch.arange(_round_up(max_total_len, SLOT_MULTIPLE), device=device)
        is_prompt_key = slot < prompt_len[:, None]  # (R, S)
        is_key = slot < total_len[:, None]
        prompt_row = prompt_start[prompt_of, None] + slot
        completion_row = (completion_start - prompt_len)[:, None] + slot
        completion_row = torch.where(is_key, completion_row, 0)
        self.keys_c = torch.where(is_prompt_key, prompt_row, completion_row)  # (R, S)
        if self.varlen:
            return

        # Queries, and where the real ones are among the padded.
        num_rows = _round_up(max_prompt_len, ROW_MULTIPLE)
        self.queries_p, is_real = _pad_rows(prompt_start, prompt_lengths, num_rows)  # (P, T)
        self.unpad_p = is_real.flatten().nonzero()[:, 0]
        num_rows = _round_up(max_completion_len, ROW_MULTIPLE)
        self.queries_c, is_real = _pad_rows(completion_start, completion_len, num_rows)  # (R, T)
        self.unpad_c = is_real.flatten().nonzero()[:, 0]

        nothing_before = torch.zeros_like(prompt_lengths[:1])
        self.mask_p = _make_causal_mask(
            nothing_before, self.queries_p.shape[1], self.keys_p.shape[1]
        )
        self.mask_c = _make_causal_mask(prompt_len, self.queries_c.shape[1], len(slot))

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        if self.varlen:
            return self.varlen(q, k, v)
        prompts = _attend(
            _gather_rows(q, self.queries_p),
            _gather_rows(k, self.keys_p),
            _gather_rows(v, self.keys_p),
            self.mask_p,
            self.exact,
        )
        prompts = _unpad_rows(prompts, self.unpad_p)
        if not len(self.unpad_c):
            return prompts
        completions = _attend(
            _gather_rows(q, self.queries_c),
            _gather_rows(k, self.keys_c),
            _gather_rows(v, self.keys_c),
            self.mask_c,
            self.exact,
        )
        completions = _unpad_rows(completions, self.unpad_c)
        return torch.cat([prompts, completions])


def attend_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decode_bias: torch.Tensor,
    exact: bool = False,
) -> torch.Tensor:
    """Attend from one query per row, for decoding.

    The H/K query heads of a kv head are the rows of one small product: heads are never repeated.

    Args:
        q: (B, H, D); k, v: (B, K, S, D), S a multiple of SLOT_MULTIPLE.
        decode_bias: (B, 1, 1, 1, S) of `make_decode_bias`.

    Returns:
        (B, H, D)
    """
    B, H, D = q.shape
    q = q.view(B, k.shape[1], -1, D)  # (B, K, H/K, D)
    heads_per_kv = q.shape[2]
    if heads_per_kv % ROW_MULTIPLE:
        q = F.pad(q, (0, 0, 0, -heads_per_kv % ROW_MULTIPLE))
    out = _eager_attention(q[:, :, None], k, v, decode_bias, exact)
    return out[:, :, 0, :heads_per_kv].reshape(B, H, D)


def make_decode_bias(last: torch.Tensor, num_slots: int, dtype: torch.dtype) -> torch.Tensor:
    """Make what is added to scores so that row b reads slots 0 .. last[b] only.

    Returns 0 or -inf, (B, 1, 1, 1, num_slots).
    """
    is_beyond = torch.arange(num_slots, device=last.device) > last[:, None]
    zeros = torch.zeros(is_beyond.shape, dtype=dtype, device=last.device)
    decode_bias = zeros.masked_fill_(is_beyond, float("-inf"))
    return decode_bias[:, None, None, None]


def _make_causal_mask(num_before: torch.Tensor, num_queries: int, num_slots: int) -> torch.Tensor:
    """Make the mask by which query t of sequence b reads slots 0 .. num_before[b] + t.

    num_before (B,) -> bool (B, 1, num_queries, num_slots).
    """
    query = torch.arange(num_queries, device=num_before.device)
    last = num_before[:, None] + query  # (B, T)
    slot = torch.arange(num_slots, device=num_before.device)
    causal_mask = slot <= last[..., None]  # (B, T, S)
    return causal_mask[:, None]


def _max_length(lengths: torch.Tensor) -> int:
    """Return the longest of `lengths`; 0 when there is none."""
    return int(lengths.max()) if len(lengths) else 0


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _pad_rows(
    start: torch.Tensor, lengths: torch.Tensor, padded_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the packed rows (B, padded_len) of each sequence, and which are real.

    Padding points at row 0 and is masked or dropped.
    """
    slot = torch.arange(padded_len, device=start.device)
    is_real = slot < lengths[:, None]
    rows = torch.where(is_real, start[:, None] + slot, 0)
    return rows, is_real


def _gather_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Gather padded sequences: x (M, heads, D), rows (B, S) -> (B, heads, S, D).

    By index_select, not by x[rows]: its backward is deterministic and fast on CPU.
    """
    gathered = x.index_select(0, rows.flatten())
    return gathered.view(*rows.shape, *x.shape[1:]).transpose(1, 2)


def _unpad_rows(x: torch.Tensor, real_rows: torch.Tensor) -> torch.Tensor:
    """Drop the padding of x (B, H, T, D) -> (number of real rows, H, D)."""
    return x.transpose(1, 2).flatten(0, 1).index_select(0, real_rows)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, exact: bool
) -> torch.Tensor:
    """Attend over padded sequences, by SDPA or, for short rows, by a plain product.

    Args:
        q: (B, H, T, D); k, v: (B, K, S, D).
        mask: bool (B or 1, 1, T, S), True where a key is read.

    Returns:
        (B, H, T, D)
    """
    H, T = q.shape[1:3]
    K, S = k.shape[1:3]
    if T * S > SHORT_ROWS and not exact:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=H != K)
    zeros = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
    attention_bias = zeros.masked_fill_(~mask, float("-inf"))
    grouped_q = q.unflatten(1, (K, -1))  # (B, K, H/K, T, D)
    out = _eager_attention(grouped_q, k, v, attention_bias[:, :, None], exact)
    return out.flatten(1, 2)


def _eager_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_bias: torch.Tensor,
    exact: bool,
) -> torch.Tensor:
    """Compute attention by plain products; heads are not repeated. Scores are float32 at least.

    Args:
        q: (B, K, H/K, T, D); k, v: (B, K, S, D).
        attention_bias: (B or 1, 1, 1, T, S), -inf where a key is not read.
        exact: on CPU in float32 a query's result is a function of itself and the keys that it
            reads, bit for bit, whatever B, T and S are.

    Returns:
        (B, K, H/K, T, D)
    """
    scale = q.shape[-1] ** -0.5
    # In one expression: a name would hold the scores, (.., T, S), in memory beside the weights.
    if q.dtype in HALF_DTYPES:
        weights = torch.add(attention_bias, _float32_scores(q, k), alpha=scale).softmax(-1)
        weights = weights.to(v.dtype)
    else:
        weights = ((q * scale) @ k[:, :, None].mT + attention_bias).softmax(-1)
    v = v[:, :, None]
    if not exact:
        return weights @ v
    blocks = zip(weights.split(EXACT_BLOCK_SLOTS, -1), v.split(EXACT_BLOCK_SLOTS, -2))
    products = (block_weights @ block_v for block_weights, block_v in blocks)
    return reduce(torch.add, products)


def _float32_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Compute q k^T of 16-bit operands in float32, as FlashAttention does.

    Rounded to bfloat16, a score of 16 to 32 would be off by up to .06, its weight by 6%, and the
    sampler no longer the policy that the trainer differentiates.

    Args:
        q: (B, K, H/K, T, D); k: (B, K, S, D).

    Returns:
        (B, K, H/K, T, S)
    """
    if q.is_cuda and not torch.is_grad_enabled():
        # A GPU sums in float32 anyway. Keys are a view of the cache, nothing is copied.
        rows = q.flatten(0, 1).flatten(1, 2)  # (B K, H/K T, D)
        scores = torch.bmm(rows, k.flatten(0, 1).mT, out_dtype=torch.float32)
        return scores.view(*q.shape[:4], -1)
    # A CPU has no such product, and this one has no gradient.
    return q.float() @ k[:, :, None].float().mT
