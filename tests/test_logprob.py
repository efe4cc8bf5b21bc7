"""linear_logp against the full float64 log-softmax: values, gradients, entropy, at odd sizes and across its chunks."""
import pytest
import torch

from recr1.kernels.logprob import CHUNK, linear_logp
from recr1.policy import policy


def definition(temperature):
    def of_logits(logits, target):
        p = policy(logits, temperature)
        return p.logp(target[:, None])[:, 0], p.entropy()
    return of_logits


def inputs(N, C, V, dtype=torch.float64):
    g = torch.Generator().manual_seed(N * 1000 + V)
    hidden, weight = (torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in ((N, C), (V, C)))
    return hidden, weight, torch.randint(V, (N,), generator=g), torch.randn(N, generator=g, dtype=torch.float64).to(dtype)


def full(hidden, weight, target, temperature):
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return logp[torch.arange(len(target)), target], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("N, C, V", [(1, 1, 2), (1, 7, 33), (37, 13, 101), (CHUNK - 1, 5, 9), (CHUNK, 5, 9), (CHUNK + 1, 5, 9), (2 * CHUNK + 3, 11, 17)])
def test_equals_the_full_log_softmax(N, C, V, temperature):
    hidden, weight, target, pull = inputs(N, C, V)
    logp, entropy = linear_logp(hidden, weight, target, temperature, definition(temperature))
    want, want_entropy = full(hidden, weight, target, temperature)
    assert logp.dtype == torch.float64 and logp.shape == entropy.shape == (N,)
    torch.testing.assert_close(logp, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(x, (hidden, weight), pull) for x in (logp, want))
    for a, b in zip(ours, theirs):
        assert (a - b).norm() <= 1e-13 * b.norm()


def test_gradcheck():
    hidden, weight, target, _ = inputs(5, 3, 7)
    assert torch.autograd.gradcheck(lambda h, w: linear_logp(h, w, target, 1.3, definition(1.3)), (hidden, weight))


def test_float32_is_as_good_as_float32_can_be():
    hidden, weight, target, pull = inputs(300, 64, 1001, torch.float32)
    logp, _ = linear_logp(hidden, weight, target, 1.3, definition(1.3))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want, _ = full(*exact, target, 1.3)
    assert logp.dtype == torch.float32 and (logp - want).abs().max() < 1e-4
    for a, b in zip(torch.autograd.grad(logp, (hidden, weight), pull), torch.autograd.grad(want, exact, pull.double())):
        assert a.dtype == torch.float32 and (a - b).norm() < 1e-5 * b.norm()


def test_large_logits_stay_finite():
    hidden, weight, target, pull = inputs(9, 4, 11)
    logp, entropy = linear_logp(hidden * 1e4, weight, target, 1.0, definition(1.0))
    grads = torch.autograd.grad(logp, (hidden, weight), pull)
    assert all(t.isfinite().all() for t in (logp, entropy, *grads)) and (logp <= 0).all() and (entropy >= 0).all()


def test_entropy_carries_no_gradient():
    hidden, weight, target, _ = inputs(6, 4, 11)
    logp, entropy = linear_logp(hidden, weight, target, 1.0, definition(1.0))
    assert logp.requires_grad and not entropy.requires_grad
