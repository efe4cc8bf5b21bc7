"""The policy's distribution, defined once for sampler and trainer (DESIGN decision 1): p =
softmax(logits / temperature).

Temperature is part of the policy, and ids that the tokenizer lacks are no part of it:
`Decoder.head_weight` ends before them. Legend: M packed tokens, N trained tokens, C width, V
vocabulary.
"""

from typing import NamedTuple

import torch

from .attention import PackedAttention
from .kernels.logprob import Pull, linear_logp, linear_loss
from .records import Batch


class Policy(NamedTuple):
    """p = weights / total for each of N positions; log p = scaled - log_norm."""

    scaled: torch.Tensor  # (N, V) logits / temperature, at least float32; float64 stays float64
    weights: torch.Tensor  # (N, V) exp(scaled - max)
    total: torch.Tensor  # (N, 1) their sum
    log_norm: torch.Tensor  # (N, 1) logsumexp(scaled)

    def logp(self, target: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of target (N, K) -> (N, K)."""
        return self.scaled.gather(-1, target) - self.log_norm

    def entropy(self) -> torch.Tensor:
        """-sum p log p, (N,) nats."""
        return (
            self.log_norm - torch.linalg.vecdot(self.weights, self.scaled)[:, None] / self.total
        )[:, 0]


def policy(logits: torch.Tensor, temperature: float) -> Policy:
    """logits (N, V) -> Policy."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        scaled = scaled / temperature
    peak = scaled.amax(-1, keepdim=True)
    weights = (scaled - peak).exp_()
    total = weights.sum(-1, keepdim=True)
    return Policy(scaled, weights, total, peak + total.log())


def score(
    model: torch.nn.Module, batch: Batch, temperature: float, kernels: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob (N,) with gradient and entropy (N,) of the batch's targets, by a Decoder, sharded or
    not.
    """
    with model.root():  # one gather for embedding and head
        return linear_logp(*_head_inputs(model, batch), temperature, policy, kernels)


def score_loss(
    model: torch.nn.Module, batch: Batch, temperature: float, pull: Pull, kernels: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One shot: the loss that `pull` (kernels/logprob.py) makes of the log-probs, with gradient;
    log-prob (N,) and entropy (N,) without.
    """
    with model.root():
        return linear_loss(*_head_inputs(model, batch), temperature, policy, pull, kernels)


def head_of(model) -> torch.Tensor:
    """The head's weight (V, C) as logits are made with it: in float32 where model.head_float32 says
    so.
    """
    return model.head_weight.float() if model.backend.float32_head else model.head_weight


def _head_inputs(model, batch: Batch):
    """Hidden states that predict (N, C), head weight (V, C), targets (N,)."""
    # (M, C)
    hidden = model(
        batch.tokens,
        batch.positions,
        PackedAttention(*batch.layout, batch.tokens.device, model.backend),
    )
    head = head_of(model)
    return hidden.index_select(0, batch.predict_from).to(head.dtype), head, batch.target
