"""Compare the kernels of kernels/decoder_layer.py with float64 in Triton's interpreter.

Run by test_kernels.py, as interpret_kernels.py is.
"""

import copy
import os

import numpy as np
import pytest
import torch
from helpers.tiny_world import FAMILIES, tiny_model

from recr1.data_types import Prompt
from recr1.kernels import decoder_layer
from recr1.model.decoder import RMSNorm
from recr1.model.log_probs import compute_log_probs
from recr1.model.rope import apply_rotary_emb, compute_rope_cos_sin
from recr1.model.varlen_attention import AttentionBackend
from recr1.rl.packing import pack_rollouts
from recr1.sampling.generate import generate

SEED = int(os.environ["RECR1_SEED"])
DTYPES = [torch.float32, torch.bfloat16]
# of the norm of a result. The interpreter cuts to bfloat16, where a GPU rounds: a result is too
# small by up to 2^-7 of itself.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def draw(*shape):
    """Draw a tensor of the shape's own."""
    generator = torch.Generator().manual_seed(hash((SEED, *shape)) % 2**63)
    return torch.randn(*shape, generator=generator)


def cut(x, dtype):
    """Cut float64 numbers to the type as the interpreter does: what does not fit is dropped."""
    if dtype != torch.bfloat16:
        return x
    bits = x.float().view(torch.int32) & ~0xFFFF
    return bits.view(torch.float32).double()


def check(ours, formula, inputs, dtype, list_terms=None):
    """Compare ours(*inputs) and its gradients with those of formula(*inputs) in float64.

    list_terms: list_terms(*inputs, toward) returns what the first input's gradient is a difference
    of. Where its terms nearly cancel, as they do in a row of two numbers, rounding is a share of
    them and not of what is left.
    """
    inputs = [x.to(dtype) for x in inputs]
    leaves = [x.clone().requires_grad_() for x in inputs]
    exact_leaves = [x.double().requires_grad_() for x in inputs]

    out = ours(*leaves)
    exact = formula(*exact_leaves)
    toward = draw(*exact.shape).to(dtype)
    grads = torch.autograd.grad(out, leaves, toward)
    exact_grads = torch.autograd.grad(exact, exact_leaves, toward.double())

    sizes = [want.norm() for want in (exact, *exact_grads)]
    if list_terms is not None:
        terms = list_terms(*(x.double() for x in inputs), toward.double())
        sizes[1] = torch.maximum(sizes[1], terms.norm())

    assert out.dtype == dtype
    for result, want, size in zip((out, *grads), (exact, *exact_grads), sizes):
        assert result.shape == want.shape
        error = (result.double() - want).norm()
        assert error <= BOUNDS[dtype] * size + 1e-30, f"seed {SEED}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (5, 96), (600, 16), (7, 3, 24)])
def test_rms_norm(shape, dtype):
    """More rows than programs, an odd width, and heads."""
    norm = RMSNorm(shape[-1], 1e-3).double()

    def normalize(x, weight):
        normalized = torch.func.functional_call(norm, dict(weight=torch.ones_like(weight)), (x,))
        # The kernel rounds before the weight too; the gradient is that of the formula.
        return weight * (normalized + (cut(normalized, dtype) - normalized).detach())

    def normalize_fused(x, weight):
        return decoder_layer.apply_fused_rms_norm(x, weight, 1e-3)

    def list_terms(x, weight, toward):
        return toward * weight / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()

    inputs = [3 * draw(*shape), 1 + draw(shape[-1])]
    check(normalize_fused, normalize, inputs, dtype, list_terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 24), (4, 8, 64)])
def test_rotary_emb(shape, dtype):
    config = tiny_model(head_dim=shape[2]).config
    positions = torch.arange(shape[0]) * 37
    rope = compute_rope_cos_sin(positions, config, dtype)
    exact_rope = tuple(x.double() for x in rope)

    def turn(x):
        return apply_rotary_emb(x, exact_rope)

    def turn_fused(x):
        return decoder_layer.apply_fused_rope(x, *rope)

    check(turn_fused, turn, [draw(*shape)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1000), (2, 1024)])
def test_swiglu(shape, dtype):
    def multiply_gated(gate, up):
        return torch.nn.functional.silu(gate) * up

    def list_terms(gate, up, toward):
        return toward * up * gate.sigmoid()

    inputs = [4 * draw(*shape), draw(*shape) + 1]
    check(decoder_layer.apply_fused_swiglu, multiply_gated, inputs, dtype, list_terms)


def test_no_rows():
    weight = torch.ones(8).requires_grad_()
    x = torch.empty(0, 8).requires_grad_()
    heads = torch.empty(0, 2, 8)
    angles = torch.empty(0, 1, 8)

    out = decoder_layer.apply_fused_rms_norm(x, weight, 1e-6)
    out = decoder_layer.apply_fused_swiglu(out, out)
    out.sum().backward()

    assert weight.grad.tolist() == [0] * 8
    assert decoder_layer.apply_fused_rope(heads, angles, angles).shape == (0, 2, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_the_same_with_fused_layers(family):
    """Log-probs and gradients of one micro-batch, and greedy texts."""
    model = tiny_model(3, std=0.1, **FAMILIES[family])
    fused = copy.deepcopy(model)
    fused.set_backend(AttentionBackend(fused_layers=True))
    prompts = [Prompt("a", 0, "", (5, 8, 100)), Prompt("b", 1, "", (17, 3, 250, 88, 9))]
    stops = frozenset([7])

    rollouts = generate(model, prompts, 1, 1.0, 6, stops, None)
    fused_rollouts = generate(fused, prompts, 1, 1.0, 6, stops, None)

    assert [r.ids for r in fused_rollouts] == [r.ids for r in rollouts]
    for ours, theirs in zip(fused_rollouts, rollouts):
        assert np.abs(np.subtract(ours.sampler_logp, theirs.sampler_logp)).max() < 1e-4

    [batch] = pack_rollouts(rollouts, 1000)
    for some_model in (model, fused):
        logp, _ = compute_log_probs(some_model, batch, 1.0)
        logp.sum().backward()
    for (name, ours), theirs in zip(fused.named_parameters(), model.parameters()):
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm(), name
