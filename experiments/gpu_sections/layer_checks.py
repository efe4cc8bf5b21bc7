"""The passes of a decoder layer between its products, RMSNorm, rope and SwiGLU, against their
formulas in float64, with gradients.

The oracle is written here, in plain torch, and shares no code with what it checks.

Legend: M rows, C width, H heads, D head dim, F width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from gpu_sections.report import Report
from gpu_sections.setting import Setting, relative_error
from torch.nn import functional

from recr1.kernels.decoder_layer import apply_fused_rms_norm, apply_fused_rope, apply_fused_swiglu
from recr1.model.decoder import RMSNorm
from recr1.model.rope import apply_rotary_emb

EPS = 1e-6
ERROR_BAR = 1e-2  # relative: bfloat16 rounds by up to 2^-9, at most three times in a row here


class LayerPass(NamedTuple):
    """One pass: the inputs that have gradients, and its functions of them."""

    inputs: dict[str, torch.Tensor]
    d_out: torch.Tensor  # the gradient of its output
    formula: Callable[..., torch.Tensor]
    by_kernels: dict[str, Callable[..., torch.Tensor]]  # torch, triton


def check_layer(report: Report, setting: Setting) -> None:
    """RMSNorm, rope and SwiGLU, in torch and Triton, against float64, with gradients."""
    passes = dict(norm=make_norm(setting), rope=make_rope(setting), SwiGLU=make_swiglu(setting))
    for name, layer_pass in passes.items():
        want = run_in_float64(layer_pass)
        for kernels in setting.kernels:
            run = layer_pass.by_kernels[kernels]
            actual = differentiate(run, layer_pass.inputs, layer_pass.d_out)
            for key, tensor in actual.items():
                error = relative_error(tensor, want[key])
                report.at_most(f"{name}, {kernels}: {key}", error, ERROR_BAR)
    if "triton" not in setting.kernels:
        report.skip("Triton's passes", "Triton cannot run here")


def run_in_float64(layer_pass: LayerPass) -> dict[str, torch.Tensor]:
    inputs = {key: value.double() for key, value in layer_pass.inputs.items()}
    return differentiate(layer_pass.formula, inputs, layer_pass.d_out.double())


def differentiate(
    run: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor], d_out: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the output of `run`, and the gradient of each input under its name."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs.values()]
    out = run(*leaves)
    gradients = torch.autograd.grad(out, leaves, d_out)
    named = {f"d {key}": gradient for key, gradient in zip(inputs, gradients)}
    return dict(output=out.detach(), **named)


def make_norm(setting: Setting) -> LayerPass:
    """Make an RMSNorm of rows of a 3B's width."""
    M = setting.pick(4096, 12)
    C = setting.pick(2048, 64)
    inputs = dict(x=setting.draw(M, C), weight=1 + setting.draw(C, std=0.1))
    module = RMSNorm(C, EPS)

    def compute_exactly(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()

    def run_torch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(weight=weight), (x,))

    def run_triton(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return apply_fused_rms_norm(x, weight, EPS)

    by_kernels = dict(torch=run_torch, triton=run_triton)
    return LayerPass(inputs, setting.draw(M, C), compute_exactly, by_kernels)


def make_rope(setting: Setting) -> LayerPass:
    """Turn the heads of a 3B's queries by angles as they come at positions up to 4,096."""
    M = setting.pick(4096, 12)
    H = setting.pick(16, 4)
    D = setting.pick(128, 16)
    positions = torch.arange(M, dtype=torch.float64)[:, None]
    frequencies = 1e6 ** (-torch.arange(D // 2, dtype=torch.float64) / (D // 2))
    angles = (positions * frequencies).repeat(1, 2)[:, None]  # (M, 1, D)
    cos = angles.cos().to(torch.bfloat16).to(setting.device)
    sin = angles.sin().to(torch.bfloat16).to(setting.device)

    def compute_exactly(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        c, _ = cos.double().chunk(2, dim=-1)
        s, _ = sin.double().chunk(2, dim=-1)
        return torch.cat([a * c - b * s, b * c + a * s], dim=-1)

    by_kernels = dict(
        torch=lambda x: apply_rotary_emb(x, (cos, sin)),
        triton=lambda x: apply_fused_rope(x, cos, sin),
    )
    inputs = dict(x=setting.draw(M, H, D))
    return LayerPass(inputs, setting.draw(M, H, D), compute_exactly, by_kernels)


def make_swiglu(setting: Setting) -> LayerPass:
    """Make the gated product of a 3B's MLP."""
    M = setting.pick(2048, 12)
    F = setting.pick(11_008, 96)

    def compute_exactly(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gate / (1 + (-gate).exp()) * up

    by_kernels = dict(torch=lambda gate, up: functional.silu(gate) * up, triton=apply_fused_swiglu)
    inputs = dict(gate=setting.draw(M, F), up=setting.draw(M, F))
    return LayerPass(inputs, setting.draw(M, F), compute_exactly, by_kernels)
