"""The passes of a decoder layer between its products, as one kernel each: RMSNorm, rope, SwiGLU.

    RMSNorm   y = weight * x / sqrt(mean(x^2) + eps)       Zhang and Sennrich, arXiv 1910.07467
    rope      a' = a cos - b sin,  b' = b cos + a sin      RoFormer, arXiv 2104.09864; halves a, b
    SwiGLU    y = silu(gate) * up                          Shazeer, arXiv 2002.05202

In torch they are 4, 5 and 2 launches, each of which reads and writes all rows: 3.6 GB a layer and
12,800 tokens of a 3B model, a quarter of the forward's time on an H200 (arithmetic, not measured).
The torch functions that they equal are recr1/model/decoder.py's RMSNorm and MLP and
recr1/model/rope.py's apply_rotary_emb. A kernel computes in float32 and rounds its result once;
RMSNorm's rounds before the weight too, as Hugging Face's modules do. A row is computed by itself.

Backward: RMSNorm keeps the inverse root of each row, rope turns back, SwiGLU computes the sigmoid
again from its inputs, where torch would keep silu(gate).

Legend: M rows, C width of a norm, H heads, D head dim, F width of the MLP.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch

SWIGLU_TILE = 1024  # numbers of a program of the SwiGLU's kernels

# Programs of the norm's backward at most. Each adds up its rows' gradient of the weight.
NORM_PROGRAMS = 512


def apply_fused_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute RMSNorm of x (..., C) with weight (C,), with gradient."""
    return _RMSNorm.apply(x, weight, eps)


def apply_fused_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_{i+D/2}) by its angle, with gradient.

    x (M, H, D); cos and sin (M, 1, D), whose halves are equal.
    """
    return _RotaryEmb.apply(x, cos, sin)


def apply_fused_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute silu(gate) * up, both (M, F), with gradient."""
    return _SwiGLU.apply(gate, up)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        C = x.shape[-1]
        rows = x.reshape(-1, C).contiguous()  # (M, C)
        out = torch.empty_like(rows)
        inverse_rms = rows.new_empty(len(rows), dtype=torch.float32)  # (M,)
        if len(rows):
            get_kernels().rms_norm_kernel[len(rows),](
                rows, weight, out, inverse_rms, eps, **_choose_row_tile(C)
            )
        ctx.save_for_backward(rows, weight, inverse_rms)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, inverse_rms = ctx.saved_tensors
        M, C = rows.shape
        assert rows.numel() < 2**31, f"{M} rows of {C}: the kernel counts numbers in 32 bits"
        d_rows = torch.empty_like(rows)
        num_programs = min(M, NORM_PROGRAMS)
        d_weight = rows.new_zeros(num_programs, C, dtype=torch.float32)
        if M:
            get_kernels().rms_norm_grad_kernel[num_programs,](
                grad.reshape(-1, C).contiguous(),
                rows,
                weight,
                inverse_rms,
                d_rows,
                d_weight,
                M,
                **_choose_row_tile(C),
            )
        return d_rows.view(grad.shape), d_weight.sum(0).to(weight.dtype), None


class _RotaryEmb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, backward=False)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, backward=True), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool) -> torch.Tensor:
    """Turn x (M, H, D) by the angles, or back by them."""
    M, H, D = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if M:
        head_tile = _power_of_two(H)
        tile = _power_of_two(D // 2)
        get_kernels().rotary_kernel[M,](
            x.contiguous(),
            cos,
            sin,
            out,
            backward,
            H,
            D // 2,
            head_tile,
            tile,
            num_warps=min(8, max(1, head_tile * tile // 256)),
        )
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate = gate.contiguous()
        up = up.contiguous()
        out = torch.empty_like(gate)
        num_programs = -(-gate.numel() // SWIGLU_TILE)
        if num_programs:
            get_kernels().swiglu_kernel[num_programs,](gate, up, out, *gate.shape, SWIGLU_TILE)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        d_gate = torch.empty_like(gate)
        d_up = torch.empty_like(up)
        num_programs = -(-gate.numel() // SWIGLU_TILE)
        if num_programs:
            get_kernels().swiglu_grad_kernel[num_programs,](
                grad.contiguous(), gate, up, d_gate, d_up, *gate.shape, SWIGLU_TILE
            )
        return d_gate, d_up


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _choose_row_tile(C: int) -> dict[str, int]:
    """Choose the tile that holds a row of C numbers, with 8 to 16 of them to a thread."""
    tile = _power_of_two(C)
    return dict(C=C, TILE=tile, num_warps=min(16, max(1, tile // 256)))


@cache
def get_kernels() -> SimpleNamespace:
    """Make the Triton kernels at first use, as in kernels/logprob.py."""
    # Triton finds `tl` and the helper functions among the globals of the module.
    global triton, tl
    import triton
    import triton.language as tl

    @triton.jit
    def rms_norm_kernel(x, weight, out, inverse_rms, eps, C: tl.constexpr, TILE: tl.constexpr):
        """Normalize one row."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, TILE)
        is_inside = column < C
        value = tl.load(x + row * C + column, mask=is_inside, other=0.0)
        value32 = value.to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(value32 * value32, 0) / C + eps)
        normalized = (value32 * inverse).to(value.dtype).to(tl.float32)
        scale = tl.load(weight + column, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(out + row * C + column, (scale * normalized).to(value.dtype), mask=is_inside)
        tl.store(inverse_rms + row, inverse)

    @triton.jit(do_not_specialize=["M"])
    def rms_norm_grad_kernel(
        grad,
        x,
        weight,
        inverse_rms,
        d_x,
        d_weight,
        M,
        C: tl.constexpr,
        TILE: tl.constexpr,
    ):
        """Compute d_x of every num_programs-th row, and their share of d_weight.

        n = x / rms;  d_n = grad * weight;  d_x = (d_n - n mean(d_n * n)) / rms
        """
        program = tl.program_id(0)
        column = tl.arange(0, TILE)
        is_inside = column < C
        scale = tl.load(weight + column, mask=is_inside, other=0.0).to(tl.float32)
        weight_sum = tl.zeros((TILE,), tl.float32)
        # 32-bit offsets, which spill no register: x has fewer than 2^31 numbers.
        for row in range(program, M, tl.num_programs(0)):
            at = row * C + column
            value = tl.load(x + at, mask=is_inside, other=0.0)
            d_out = tl.load(grad + at, mask=is_inside, other=0.0).to(tl.float32)
            inverse = tl.load(inverse_rms + row)
            normalized = value.to(tl.float32) * inverse
            d_normalized = d_out * scale
            mean = tl.sum(d_normalized * normalized, 0) / C
            d_row = inverse * (d_normalized - normalized * mean)
            tl.store(d_x + at, d_row.to(value.dtype), mask=is_inside)
            weight_sum += d_out * normalized
        tl.store(d_weight + program * C + column, weight_sum, mask=is_inside)

    @triton.jit
    def rotary_kernel(
        x,
        cos,
        sin,
        out,
        BACKWARD: tl.constexpr,
        H: tl.constexpr,
        HALF: tl.constexpr,
        HEAD_TILE: tl.constexpr,
        TILE: tl.constexpr,
    ):
        """Turn all heads of one row."""
        row = tl.program_id(0).to(tl.int64)
        head = tl.arange(0, HEAD_TILE)[:, None]
        pair = tl.arange(0, TILE)[None, :]
        is_pair = pair < HALF
        c = tl.load(cos + row * 2 * HALF + pair, mask=is_pair, other=0.0).to(tl.float32)
        s = tl.load(sin + row * 2 * HALF + pair, mask=is_pair, other=0.0).to(tl.float32)
        if BACKWARD:
            s = -s
        first = (row * H + head) * 2 * HALF + pair
        is_inside = (head < H) & is_pair
        a = tl.load(x + first, mask=is_inside, other=0.0)
        b = tl.load(x + first + HALF, mask=is_inside, other=0.0).to(tl.float32)
        a32 = a.to(tl.float32)
        tl.store(out + first, (a32 * c - b * s).to(a.dtype), mask=is_inside)
        tl.store(out + first + HALF, (b * c + a32 * s).to(a.dtype), mask=is_inside)

    @triton.jit(do_not_specialize=["M"])
    def swiglu_kernel(gate, up, out, M, F: tl.constexpr, TILE: tl.constexpr):
        """Compute a tile of silu(gate) * up."""
        at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        is_inside = at < M.to(tl.int64) * F
        g = tl.load(gate + at, mask=is_inside, other=0.0)
        u = tl.load(up + at, mask=is_inside, other=0.0).to(tl.float32)
        g32 = g.to(tl.float32)
        y = g32 / (1.0 + tl.exp(-g32)) * u
        tl.store(out + at, y.to(g.dtype), mask=is_inside)

    @triton.jit(do_not_specialize=["M"])
    def swiglu_grad_kernel(grad, gate, up, d_gate, d_up, M, F: tl.constexpr, TILE: tl.constexpr):
        """Compute a tile of both gradients: silu'(g) = sigmoid(g) (1 + g (1 - sigmoid(g)))."""
        at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        is_inside = at < M.to(tl.int64) * F
        d_out = tl.load(grad + at, mask=is_inside, other=0.0).to(tl.float32)
        g = tl.load(gate + at, mask=is_inside, other=0.0)
        u = tl.load(up + at, mask=is_inside, other=0.0).to(tl.float32)
        g32 = g.to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-g32))
        slope = sigmoid * (1.0 + g32 * (1.0 - sigmoid))
        tl.store(d_gate + at, (d_out * u * slope).to(g.dtype), mask=is_inside)
        tl.store(d_up + at, (d_out * g32 * sigmoid).to(g.dtype), mask=is_inside)

    return SimpleNamespace(
        rms_norm_kernel=rms_norm_kernel,
        rms_norm_grad_kernel=rms_norm_grad_kernel,
        rotary_kernel=rotary_kernel,
        swiglu_kernel=swiglu_kernel,
        swiglu_grad_kernel=swiglu_grad_kernel,
    )
