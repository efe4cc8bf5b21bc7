"""Linear -> log-prob: from hidden states and the head's weight to each target's log-prob, never holding (N, V).

Legend: N trained tokens, C width, V vocabulary, n rows of a chunk.
"""
from __future__ import annotations

import torch

CHUNK = 256                     # rows whose logits exist at once: at V = 4,096 they stay in a core's cache


def linear_logp(hidden, weight, target, temperature: float, of_logits):
    """hidden (N, C), weight (V, C), target (N,) -> log-prob (N,) with gradient, entropy (N,) without.

    `of_logits(logits (n, V), target (n,)) -> (logp (n,), entropy (n,))` is the policy's definition (policy.py). The
    backward makes a chunk's logits again: d logp / d logits = (onehot(target) - softmax(logits / T)) / T.
    """
    return _LinearLogp.apply(hidden, weight, target, temperature, of_logits)


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, of_logits):
        ctx.save_for_backward(hidden, weight, target)
        ctx.temperature = temperature
        parts = [of_logits(h @ weight.T, t) for h, t in zip(hidden.split(CHUNK), target.split(CHUNK))]
        logp, entropy = (torch.cat(column) for column in zip(*parts))
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, target = ctx.saved_tensors
        wide = torch.promote_types(weight.dtype, torch.float32)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=wide)
        grad = (grad / ctx.temperature).to(wide)[:, None]
        start = 0
        for h, t, g in zip(hidden.split(CHUNK), target.split(CHUNK), grad.split(CHUNK)):
            d_logits = ((h @ weight.T).to(wide) * (1 / ctx.temperature)).softmax(-1).mul_(-g)      # (n, V)
            d_logits = d_logits.scatter_add_(-1, t[:, None], g).to(weight.dtype)
            d_hidden[start:start + len(h)] = d_logits @ weight
            d_weight += d_logits.T @ h
            start += len(h)
        return d_hidden, d_weight.to(weight.dtype), None, None, None
