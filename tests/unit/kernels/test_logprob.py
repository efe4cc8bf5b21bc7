"""Compare linear_log_probs and fused_linear_loss in torch with the full float64 log-softmax.

Values, gradients, entropy, at odd sizes and across chunks.
"""

import pytest
import torch

from recr1.kernels import logprob
from recr1.kernels.logprob import fused_linear_loss, linear_log_probs, make_token_loss
from recr1.model.log_probs import make_distribution

SIZES = [(1, 1, 2), (1, 7, 33), (4, 5, 9), (37, 13, 101), (64, 3, 130)]


@pytest.fixture(params=["whole", "in pieces"], autouse=True)
def pieces(request, monkeypatch):
    """All rows and columns at once, as at these sizes by default; or chunks of 4 to 8 rows, blocks
    of 4 and slices of 16 columns.
    """
    if request.param == "in pieces":
        for name, size in dict(WORKSPACE_BYTES=4096, BLOCK_BYTES=512, SLICE_BYTES=2048).items():
            monkeypatch.setitem(getattr(logprob, name), "cpu", size)


def inputs(N, C, V, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(N * 1000 + V + seed)
    hidden, weight = (
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((N, C), (V, C))
    )
    target = torch.randint(V, (N,), generator=g)
    grad_logp = torch.randn(N, generator=g, dtype=torch.float64)
    return hidden, weight, target, grad_logp.to(torch.promote_types(dtype, torch.float32))


def full(hidden, weight, target, temperature):
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return logp[torch.arange(len(target)), target], -(logp.exp() * logp).sum(-1)


def weighted(grad_logp):
    """A loss whose derivative by logp depends on logp, and the same on a chunk."""
    return lambda logp, rows=slice(None): (
        (grad_logp[rows] * (logp + 0.1 * logp**2)).sum() / len(grad_logp)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("N, C, V", SIZES)
def test_equals_the_full_log_softmax(N, C, V, temperature):
    hidden, weight, target, grad_logp = inputs(N, C, V)
    logp, entropy = linear_log_probs(hidden, weight, target, temperature, make_distribution)
    want, want_entropy = full(hidden, weight, target, temperature)
    assert logp.dtype == torch.float64
    assert logp.shape == entropy.shape == (N,)
    torch.testing.assert_close(logp, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(x, (hidden, weight), grad_logp) for x in (logp, want))
    for a, b in zip(ours, theirs):
        assert (a - b).norm() <= 1e-13 * b.norm()


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("N, C, V", SIZES)
def test_entropy_has_its_gradient_in_both_heads(N, C, V, temperature):
    """Of a loss with both, of one with the entropy alone, and where some rows have neither."""
    hidden, weight, target, grad_logp = inputs(N, C, V)
    grad_entropy = grad_logp.flip(0) * (torch.arange(N) % 3 > 0)
    for g, h in (
        (grad_logp * (torch.arange(N) % 2), grad_entropy),
        (torch.zeros(N, dtype=grad_logp.dtype), grad_entropy),
    ):
        want = sum((x * y).sum() for x, y in zip(full(hidden, weight, target, temperature), (g, h)))
        logp, entropy = linear_log_probs(hidden, weight, target, temperature, make_distribution)
        shot, _, _ = fused_linear_loss(
            hidden,
            weight,
            target,
            temperature,
            make_distribution,
            lambda x, e, rows: ((x * g[rows]).sum() + (e * h[rows]).sum(), g[rows], h[rows]),
        )
        torch.testing.assert_close(shot, want, rtol=1e-12, atol=1e-13)
        theirs = torch.autograd.grad(want, (hidden, weight))
        for loss in ((logp * g).sum() + (entropy * h).sum(), shot):
            for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), theirs):
                assert (a - b).norm() <= 1e-12 * b.norm() + 1e-15


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("N, C, V", SIZES)
def test_fused_equals_the_full_log_softmax(N, C, V, temperature):
    hidden, weight, target, grad_logp = inputs(N, C, V)
    loss, logp, entropy = fused_linear_loss(
        hidden, weight, target, temperature, make_distribution, make_token_loss(weighted(grad_logp))
    )
    want, want_entropy = full(hidden, weight, target, temperature)
    want_loss = weighted(grad_logp)(want)
    assert not logp.requires_grad
    assert not entropy.requires_grad
    torch.testing.assert_close(logp, want.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(entropy, want_entropy.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=1e-13)
    for scale in (1.0, -2.5):  # the backward multiplies what the forward made, and may run twice
        ours, theirs = (
            torch.autograd.grad(x * scale, (hidden, weight), retain_graph=True)
            for x in (loss, want_loss)
        )
        for a, b in zip(ours, theirs):
            assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("dead", ["some", "all"])
def test_rows_of_gradient_zero_are_left_out(dead):
    hidden, weight, target, grad_logp = inputs(37, 13, 101)
    grad_logp = grad_logp * (0 if dead == "all" else (torch.arange(37) % 3 > 0))
    want = torch.autograd.grad(
        weighted(grad_logp)(full(hidden, weight, target, 0.7)[0]), (hidden, weight)
    )
    with torch.no_grad():
        hidden[grad_logp == 0] = float("inf")  # whatever stands there, it must not be touched
    logp, _ = linear_log_probs(hidden, weight, target, 0.7, make_distribution)
    logp = torch.where(grad_logp == 0, 0.0, logp)

    def formula(logp, rows):
        return weighted(grad_logp)(torch.where(grad_logp[rows] == 0, 0.0, logp), rows)

    fused, *_ = fused_linear_loss(
        hidden, weight, target, 0.7, make_distribution, make_token_loss(formula)
    )
    for loss in (weighted(grad_logp)(logp), fused):
        for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), want):
            assert (a - b).norm() <= 1e-12 * b.norm()


def test_a_plain_sum():
    """Its derivative comes from autograd as one number, expanded."""
    hidden, weight, target, _ = inputs(37, 13, 101)
    ours = torch.autograd.grad(
        fused_linear_loss(
            hidden,
            weight,
            target,
            1.0,
            make_distribution,
            make_token_loss(lambda logp, rows: -logp.sum()),
        )[0],
        (hidden, weight),
    )
    torch.testing.assert_close(
        ours, torch.autograd.grad(-full(hidden, weight, target, 1.0)[0].sum(), (hidden, weight))
    )


def test_gradcheck():
    hidden, weight, target, grad_logp = inputs(5, 3, 7)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_log_probs(h, w, target, 1.3, make_distribution)[0], (hidden, weight)
    )
    assert torch.autograd.gradcheck(
        lambda h, w: fused_linear_loss(
            h, w, target, 1.3, make_distribution, make_token_loss(weighted(grad_logp))
        )[0],
        (hidden, weight),
    )


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both", "no_grad"])
def test_gradients_nobody_needs_are_not_made(frozen):
    hidden, weight, target, grad_logp = inputs(6, 4, 11)
    (
        hidden.requires_grad_(frozen in ("weight", "no_grad")),
        weight.requires_grad_(frozen in ("hidden", "no_grad")),
    )
    with torch.set_grad_enabled(frozen != "no_grad"):
        loss, *_ = fused_linear_loss(
            hidden, weight, target, 1.0, make_distribution, make_token_loss(weighted(grad_logp))
        )
        logp, _ = linear_log_probs(hidden, weight, target, 1.0, make_distribution)
    if frozen in ("both", "no_grad"):
        assert not loss.requires_grad
        assert not logp.requires_grad
        return
    [leaf] = [x for x in (hidden, weight) if x.requires_grad]
    saved = [x for x in loss.grad_fn.saved_tensors if x is not None]
    assert [x.shape for x in saved] == [leaf.shape]
    for a, b in (
        (loss, weighted(grad_logp)(full(hidden, weight, target, 1.0)[0])),
        (logp.sum(), full(hidden, weight, target, 1.0)[0].sum()),
    ):
        torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x in (a, b)))


def test_float32_is_as_good_as_float32_can_be():
    hidden, weight, target, grad_logp = inputs(300, 64, 1001, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want, _ = full(*exact, target, 1.3)
    logp, _ = linear_log_probs(hidden, weight, target, 1.3, make_distribution)
    loss, again, _ = fused_linear_loss(
        hidden,
        weight,
        target,
        1.3,
        make_distribution,
        make_token_loss(lambda logp, rows: (logp * grad_logp[rows]).sum()),
    )
    assert logp.dtype == torch.float32
    assert (logp - want).norm() < 1e-6 * want.norm()
    assert torch.equal(logp, again)
    theirs = torch.autograd.grad(want, exact, grad_logp.double())
    for ours in (
        torch.autograd.grad(logp, (hidden, weight), grad_logp),
        torch.autograd.grad(loss, (hidden, weight)),
    ):
        for a, b in zip(ours, theirs):
            assert a.dtype == torch.float32
            assert (a - b).norm() < 1e-5 * b.norm()


def errors_in_bf16(backend: str) -> dict[str, float]:
    """Mean over 20 draws of (our error) / (error of torch's own bf16 path), both against float64 on
    the same bf16 numbers.
    """
    ratios: dict[str, list[float]] = {}
    for seed in range(20):
        hidden, weight, target, grad_logp = inputs(50, 33, 301, torch.bfloat16, seed)
        hidden, weight = ((x.detach() * 0.5).requires_grad_() for x in (hidden, weight))
        exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        logits = (hidden @ weight.T).float() / 0.7
        results = {}
        for name, logp, leaves in (
            ("exact", full(*exact, target, 0.7)[0], exact),
            (
                "theirs",
                logits.gather(-1, target[:, None])[:, 0] - logits.logsumexp(-1),
                (hidden, weight),
            ),
            (
                "recompute",
                linear_log_probs(hidden, weight, target, 0.7, make_distribution, backend)[0],
                (hidden, weight),
            ),
        ):
            results[name] = (
                logp.detach(),
                *torch.autograd.grad(logp, leaves, grad_logp.to(logp.dtype)),
            )
        loss, logp, _ = fused_linear_loss(
            hidden,
            weight,
            target,
            0.7,
            make_distribution,
            make_token_loss(lambda logp, rows: (logp * grad_logp[rows]).sum()),
            backend,
        )
        results["fused"] = (logp, *torch.autograd.grad(loss, (hidden, weight)))
        for i, what in enumerate(("logp", "d_hidden", "d_weight")):
            error = {
                name: (r[i].double() - results["exact"][i]).norm().item()
                for name, r in results.items()
            }
            for path in ("recompute", "fused"):
                ratios.setdefault(f"{path} {what}", []).append(error[path] / error["theirs"])
    return {name: sum(values) / len(values) for name, values in ratios.items()}


def test_bfloat16_is_as_good_as_torchs_own(request):
    means = errors_in_bf16("torch")
    assert max(means.values()) <= 1.25, means


def test_large_logits_stay_finite():
    hidden, weight, target, grad_logp = inputs(9, 4, 11)
    logp, entropy = linear_log_probs(hidden * 1e4, weight, target, 1.0, make_distribution)
    grads = torch.autograd.grad(logp, (hidden, weight), grad_logp)
    assert all(t.isfinite().all() for t in (logp, entropy, *grads))
    assert (logp <= 0).all()
    assert (entropy >= 0).all()


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hidden, weight, target, grad_logp = inputs(6, 4, 11, torch.float32)
    with pytest.raises(RuntimeError, match="kernels: triton needs"):
        linear_log_probs(hidden, weight, target, 1.0, make_distribution, "triton")
    with pytest.raises(RuntimeError, match="kernels: 'cuda' is none of torch, triton"):
        fused_linear_loss(
            hidden,
            weight,
            target,
            1.0,
            make_distribution,
            make_token_loss(weighted(grad_logp)),
            "cuda",
        )


def test_fused_equals_liger():
    """The clipped loss with k3 KL, token mean (dapo), from hidden states: value and gradients."""
    chunked = pytest.importorskip(
        "liger_kernel.chunked_loss",
        reason="the package liger-kernel is not installed: not compared with it",
    )
    (B, T), C, V = (3, 11), 8, 67
    hidden, weight, target, noise = inputs(B * T, C, V)
    logp, _ = full(hidden.detach(), weight.detach(), target, 0.7)
    old = logp + 0.3 * noise
    ref = logp - 0.2 * noise.roll(1)
    adv = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)

    def formula(logp, rows):
        ratio = (logp - old[rows]).exp()
        a = adv.repeat_interleave(T)[rows]
        d = ref[rows] - logp
        return (
            0.04 * (torch.expm1(d) - d) - torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
        ).sum() / (B * T)

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
        adv,
        ref_per_token_logps=ref.view(B, T),
        old_per_token_logps=old.view(B, T),
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight))
    ):
        assert (a - b).norm() <= 1e-6 * b.norm()
