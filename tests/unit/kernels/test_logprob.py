"""Compare linear_log_probs and fused_linear_loss in torch with the full float64 log-softmax.

Values, gradients, entropy, at odd sizes and across chunks.
"""

import pytest
import torch

from recr1.kernels import logprob
from recr1.kernels.logprob import fused_linear_loss, linear_log_probs, make_token_loss
from recr1.model.log_probs import make_distribution

# N, C, V
SIZES = [
    (1, 1, 2),
    (1, 7, 33),
    (4, 5, 9),
    (37, 13, 101),
    (64, 3, 130),
]
SMALL_LIMITS = [
    ("WORKSPACE_BYTES", 4096),
    ("BLOCK_BYTES", 512),
    ("SLICE_BYTES", 2048),
]
ERROR_PATHS = ("recompute", "fused")


@pytest.fixture(params=["whole", "in pieces"], autouse=True)
def pieces(request, monkeypatch):
    """All rows and columns at once, as at these sizes by default; or chunks of 4 to 8 rows, blocks
    of 4 and slices of 16 columns.
    """
    if request.param == "whole":
        return
    for name, size in SMALL_LIMITS:
        limits = getattr(logprob, name)
        monkeypatch.setitem(limits, "cpu", size)


def make_inputs(N, C, V, dtype=torch.float64, seed=0):
    """Draw hidden (N, C), weight (V, C), target (N,) and grad_logp (N,)."""
    g = torch.Generator().manual_seed(N * 1000 + V + seed)
    hidden = torch.randn(N, C, generator=g, dtype=torch.float64)
    weight = torch.randn(V, C, generator=g, dtype=torch.float64)
    target = torch.randint(V, (N,), generator=g)
    grad_logp = torch.randn(N, generator=g, dtype=torch.float64)

    hidden = hidden.to(dtype).requires_grad_()
    weight = weight.to(dtype).requires_grad_()
    grad_dtype = torch.promote_types(dtype, torch.float32)
    return hidden, weight, target, grad_logp.to(grad_dtype)


def copy_to_float64(*leaves):
    """Copy leaves to float64 leaves of their own."""
    copies = []
    for leaf in leaves:
        copies.append(leaf.detach().double().requires_grad_())
    return copies


def full(hidden, weight, target, temperature):
    """Compute log-probs and entropy of the full log-softmax: the oracle."""
    logits = hidden @ weight.T / temperature
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    rows = torch.arange(len(target))
    return logp[rows, target], entropy


def make_weighted_loss(grad_logp):
    """Make a loss whose derivative by logp depends on logp, and the same on a chunk."""

    def weighted_loss(logp, rows=slice(None)):
        curved = logp + 0.1 * logp**2
        return (grad_logp[rows] * curved).sum() / len(grad_logp)

    return weighted_loss


def assert_close_in_norm(ours, theirs, rtol, atol=0.0):
    """Compare the norm of each difference with that of what it should be."""
    for a, b in zip(ours, theirs):
        assert (a - b).norm() <= rtol * b.norm() + atol


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("N, C, V", SIZES)
def test_equals_the_full_log_softmax(N, C, V, temperature):
    hidden, weight, target, grad_logp = make_inputs(N, C, V)
    leaves = (hidden, weight)
    want, want_entropy = full(hidden, weight, target, temperature)

    logp, entropy = linear_log_probs(hidden, weight, target, temperature, make_distribution)

    assert logp.dtype == torch.float64
    assert logp.shape == (N,)
    assert entropy.shape == (N,)
    torch.testing.assert_close(logp, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(logp, leaves, grad_logp)
    theirs = torch.autograd.grad(want, leaves, grad_logp)
    assert_close_in_norm(ours, theirs, rtol=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("N, C, V", SIZES)
def test_entropy_has_its_gradient_in_both_heads(N, C, V, temperature):
    """Of a loss with both, of one with the entropy alone, and where some rows have neither."""
    hidden, weight, target, grad_logp = make_inputs(N, C, V)
    leaves = (hidden, weight)
    index = torch.arange(N)
    every_other = grad_logp * (index % 2)
    nothing = torch.zeros(N, dtype=grad_logp.dtype)
    grad_entropy = grad_logp.flip(0) * (index % 3 > 0)

    for g in (every_other, nothing):

        def token_loss(logp, entropy, rows):
            loss = (logp * g[rows]).sum() + (entropy * grad_entropy[rows]).sum()
            return loss, g[rows], grad_entropy[rows]

        want_logp, want_entropy = full(hidden, weight, target, temperature)
        want = (want_logp * g).sum() + (want_entropy * grad_entropy).sum()
        logp, entropy = linear_log_probs(hidden, weight, target, temperature, make_distribution)
        loss = (logp * g).sum() + (entropy * grad_entropy).sum()
        fused, _, _ = fused_linear_loss(
            hidden, weight, target, temperature, make_distribution, token_loss
        )

        torch.testing.assert_close(fused, want, rtol=1e-12, atol=1e-13)
        theirs = torch.autograd.grad(want, leaves)
        for ours in (loss, fused):
            grads = torch.autograd.grad(ours, leaves)
            assert_close_in_norm(grads, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("N, C, V", SIZES)
def test_fused_equals_the_full_log_softmax(N, C, V, temperature):
    hidden, weight, target, grad_logp = make_inputs(N, C, V)
    leaves = (hidden, weight)
    weighted_loss = make_weighted_loss(grad_logp)
    token_loss = make_token_loss(weighted_loss)
    want, want_entropy = full(hidden, weight, target, temperature)
    want_loss = weighted_loss(want)

    loss, logp, entropy = fused_linear_loss(
        hidden, weight, target, temperature, make_distribution, token_loss
    )

    assert not logp.requires_grad
    assert not entropy.requires_grad
    torch.testing.assert_close(logp, want.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(entropy, want_entropy.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=1e-13)
    # the backward multiplies what the forward made, and may run twice
    for scale in (1.0, -2.5):
        ours = torch.autograd.grad(loss * scale, leaves, retain_graph=True)
        theirs = torch.autograd.grad(want_loss * scale, leaves, retain_graph=True)
        assert_close_in_norm(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("dead", ["some", "all"])
def test_rows_of_gradient_zero_are_left_out(dead):
    hidden, weight, target, grad_logp = make_inputs(37, 13, 101)
    leaves = (hidden, weight)
    if dead == "all":
        grad_logp = grad_logp * 0
    else:
        grad_logp = grad_logp * (torch.arange(37) % 3 > 0)
    is_dead = grad_logp == 0
    weighted_loss = make_weighted_loss(grad_logp)
    want_logp, _ = full(hidden, weight, target, 0.7)
    want_loss = weighted_loss(want_logp)
    want = torch.autograd.grad(want_loss, leaves)

    def formula(logp, rows):
        live = torch.where(is_dead[rows], 0.0, logp)
        return weighted_loss(live, rows)

    with torch.no_grad():
        hidden[is_dead] = float("inf")  # whatever stands there, it must not be touched
    logp, _ = linear_log_probs(hidden, weight, target, 0.7, make_distribution)
    live = torch.where(is_dead, 0.0, logp)
    loss = weighted_loss(live)
    fused, *_ = fused_linear_loss(
        hidden, weight, target, 0.7, make_distribution, make_token_loss(formula)
    )

    for ours in (loss, fused):
        grads = torch.autograd.grad(ours, leaves)
        assert_close_in_norm(grads, want, rtol=1e-12)


def test_a_plain_sum():
    """Its derivative comes from autograd as one number, expanded."""
    hidden, weight, target, _ = make_inputs(37, 13, 101)
    leaves = (hidden, weight)

    def formula(logp, rows):
        return -logp.sum()

    loss, *_ = fused_linear_loss(
        hidden, weight, target, 1.0, make_distribution, make_token_loss(formula)
    )
    want_logp, _ = full(hidden, weight, target, 1.0)
    want = -want_logp.sum()

    ours = torch.autograd.grad(loss, leaves)
    theirs = torch.autograd.grad(want, leaves)
    torch.testing.assert_close(ours, theirs)


def test_gradcheck():
    hidden, weight, target, grad_logp = make_inputs(5, 3, 7)
    token_loss = make_token_loss(make_weighted_loss(grad_logp))

    def compute_logp(h, w):
        logp, _ = linear_log_probs(h, w, target, 1.3, make_distribution)
        return logp

    def compute_loss(h, w):
        loss, *_ = fused_linear_loss(h, w, target, 1.3, make_distribution, token_loss)
        return loss

    assert torch.autograd.gradcheck(compute_logp, (hidden, weight))
    assert torch.autograd.gradcheck(compute_loss, (hidden, weight))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both", "no_grad"])
def test_gradients_nobody_needs_are_not_made(frozen):
    hidden, weight, target, grad_logp = make_inputs(6, 4, 11)
    hidden.requires_grad_(frozen in ("weight", "no_grad"))
    weight.requires_grad_(frozen in ("hidden", "no_grad"))
    weighted_loss = make_weighted_loss(grad_logp)
    token_loss = make_token_loss(weighted_loss)

    with torch.set_grad_enabled(frozen != "no_grad"):
        loss, *_ = fused_linear_loss(hidden, weight, target, 1.0, make_distribution, token_loss)
        logp, _ = linear_log_probs(hidden, weight, target, 1.0, make_distribution)

    if frozen in ("both", "no_grad"):
        assert not loss.requires_grad
        assert not logp.requires_grad
        return
    leaf = weight if frozen == "hidden" else hidden
    assert leaf.requires_grad
    saved = [x.shape for x in loss.grad_fn.saved_tensors if x is not None]
    assert saved == [leaf.shape]
    want_logp, _ = full(hidden, weight, target, 1.0)
    want_loss = weighted_loss(want_logp)
    for ours, want in ((loss, want_loss), (logp.sum(), want_logp.sum())):
        [grad] = torch.autograd.grad(ours, leaf, retain_graph=True)
        [want_grad] = torch.autograd.grad(want, leaf, retain_graph=True)
        torch.testing.assert_close(grad, want_grad)


def test_float32_is_as_good_as_float32_can_be():
    hidden, weight, target, grad_logp = make_inputs(300, 64, 1001, torch.float32)
    leaves = (hidden, weight)
    exact = copy_to_float64(hidden, weight)
    want, _ = full(*exact, target, 1.3)
    theirs = torch.autograd.grad(want, exact, grad_logp.double())

    def formula(logp, rows):
        return (logp * grad_logp[rows]).sum()

    logp, _ = linear_log_probs(hidden, weight, target, 1.3, make_distribution)
    loss, again, _ = fused_linear_loss(
        hidden, weight, target, 1.3, make_distribution, make_token_loss(formula)
    )

    assert logp.dtype == torch.float32
    assert (logp - want).norm() < 1e-6 * want.norm()
    assert torch.equal(logp, again)
    recomputed = torch.autograd.grad(logp, leaves, grad_logp)
    fused = torch.autograd.grad(loss, leaves)
    for ours in (recomputed, fused):
        for a, b in zip(ours, theirs):
            assert a.dtype == torch.float32
            assert (a - b).norm() < 1e-5 * b.norm()


def compute_bf16_results(backend: str, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Compute logp, d_hidden and d_weight of one draw by each path, from the same bf16 numbers."""
    hidden, weight, target, grad_logp = make_inputs(50, 33, 301, torch.bfloat16, seed)
    hidden = (hidden.detach() * 0.5).requires_grad_()
    weight = (weight.detach() * 0.5).requires_grad_()
    leaves = (hidden, weight)
    exact = copy_to_float64(hidden, weight)
    results = {}

    def record(path, logp, grads):
        d_hidden, d_weight = grads
        results[path] = dict(logp=logp.detach(), d_hidden=d_hidden, d_weight=d_weight)

    def record_with_gradients(path, logp, leaves):
        grads = torch.autograd.grad(logp, leaves, grad_logp.to(logp.dtype))
        record(path, logp, grads)

    def formula(logp, rows):
        return (logp * grad_logp[rows]).sum()

    want, _ = full(*exact, target, 0.7)
    record_with_gradients("exact", want, exact)

    logits = (hidden @ weight.T).float() / 0.7
    chosen = logits.gather(-1, target[:, None])[:, 0]
    their_logp = chosen - logits.logsumexp(-1)
    record_with_gradients("theirs", their_logp, leaves)

    logp, _ = linear_log_probs(hidden, weight, target, 0.7, make_distribution, backend)
    record_with_gradients("recompute", logp, leaves)

    loss, logp, _ = fused_linear_loss(
        hidden, weight, target, 0.7, make_distribution, make_token_loss(formula), backend
    )
    grads = torch.autograd.grad(loss, leaves)
    record("fused", logp, grads)
    return results


def measure_error(tensor: torch.Tensor, want: torch.Tensor) -> float:
    """Return the norm of the difference, in float64."""
    difference = tensor.double() - want
    return difference.norm().item()


def errors_in_bf16(backend: str) -> dict[str, float]:
    """Mean over 20 draws of (our error) / (error of torch's own bf16 path), both against float64 on
    the same bf16 numbers.
    """
    draws = 20
    totals: dict[str, float] = {}
    for seed in range(draws):
        results = compute_bf16_results(backend, seed)
        for what, want in results["exact"].items():
            their_error = measure_error(results["theirs"][what], want)
            for path in ERROR_PATHS:
                error = measure_error(results[path][what], want)
                name = f"{path} {what}"
                totals[name] = totals.get(name, 0.0) + error / their_error
    return {name: total / draws for name, total in totals.items()}


def test_bfloat16_is_as_good_as_torchs_own(request):
    means = errors_in_bf16("torch")

    assert max(means.values()) <= 1.25, means


def test_large_logits_stay_finite():
    hidden, weight, target, grad_logp = make_inputs(9, 4, 11)

    logp, entropy = linear_log_probs(hidden * 1e4, weight, target, 1.0, make_distribution)
    d_hidden, d_weight = torch.autograd.grad(logp, (hidden, weight), grad_logp)

    for tensor in (logp, entropy, d_hidden, d_weight):
        assert tensor.isfinite().all()
    assert (logp <= 0).all()
    assert (entropy >= 0).all()


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hidden, weight, target, grad_logp = make_inputs(6, 4, 11, torch.float32)
    token_loss = make_token_loss(make_weighted_loss(grad_logp))

    with pytest.raises(RuntimeError, match="kernels: triton needs"):
        linear_log_probs(hidden, weight, target, 1.0, make_distribution, "triton")
    with pytest.raises(RuntimeError, match="kernels: 'cuda' is none of auto, torch, triton"):
        fused_linear_loss(hidden, weight, target, 1.0, make_distribution, token_loss, "cuda")


def test_fused_equals_liger():
    """The clipped loss with k3 KL, token mean (dapo), from hidden states: value and gradients."""
    chunked = pytest.importorskip(
        "liger_kernel.chunked_loss",
        reason="the package liger-kernel is not installed: not compared with it",
    )
    B = 3
    T = 11
    C = 8
    V = 67
    hidden, weight, target, noise = make_inputs(B * T, C, V)
    leaves = (hidden, weight)
    with torch.no_grad():
        logp, _ = full(hidden, weight, target, 0.7)
    old = logp + 0.3 * noise
    ref = logp - 0.2 * noise.roll(1)
    advantage = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    token_advantage = advantage.repeat_interleave(T)

    def formula(logp, rows):
        ratio = (logp - old[rows]).exp()
        a = token_advantage[rows]
        d = ref[rows] - logp
        kl = 0.04 * (torch.expm1(d) - d)
        clipped = ratio.clamp(0.8, 1.28)
        gain = torch.minimum(ratio * a, clipped * a)
        return (kl - gain).sum() / (B * T)

    ours, *_ = fused_linear_loss(
        hidden, weight, target, 0.7, make_distribution, make_token_loss(formula)
    )
    liger = chunked.LigerFusedLinearGRPOLoss(
        beta=0.04,
        epsilon_high=0.28,
        compiled=False,
        use_ref_model=True,
        loss_type="dapo",
        temperature=0.7,
    )
    theirs, _ = liger(
        hidden.view(B, T, C),
        weight,
        target.view(B, T),
        torch.ones(B, T),
        advantage,
        ref_per_token_logps=ref.view(B, T),
        old_per_token_logps=old.view(B, T),
    )

    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    grads = torch.autograd.grad(ours, leaves)
    want = torch.autograd.grad(theirs, leaves)
    assert_close_in_norm(grads, want, rtol=1e-6)
