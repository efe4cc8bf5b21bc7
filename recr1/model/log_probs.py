"""The policy's distribution, defined once for sampler and trainer (DESIGN decision 1): p =
softmax(logits / temperature).

Temperature is part of the policy, and ids that the tokenizer lacks are no part of it:
`Decoder.head_weight` ends before them. Legend: M packed tokens, N trained tokens, C width, V
vocabulary.
"""

from typing import NamedTuple

import torch

from recr1.data_types import MicroBatch
from recr1.kernels.logprob import TokenLoss, fused_linear_loss, linear_log_probs
from recr1.model.packed_attention import PackedAttention


class TokenDistribution(NamedTuple):
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


def make_distribution(logits: torch.Tensor, temperature: float) -> TokenDistribution:
    """logits (N, V) -> Policy."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        scaled = scaled / temperature
    peak = scaled.amax(-1, keepdim=True)
    weights = (scaled - peak).exp_()
    total = weights.sum(-1, keepdim=True)
    return TokenDistribution(scaled, weights, total, peak + total.log())


def compute_log_probs(
    model: torch.nn.Module, batch: MicroBatch, temperature: float, kernels: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob (N,) with gradient and entropy (N,) of the batch's targets, by a Decoder, sharded or
    not.
    """
    with model.root():  # one gather for embedding and head
        return linear_log_probs(
            *_head_inputs(model, batch), temperature, make_distribution, kernels
        )


def compute_fused_loss(
    model: torch.nn.Module,
    batch: MicroBatch,
    temperature: float,
    pull: TokenLoss,
    kernels: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One shot: the loss that `pull` (kernels/logprob.py) makes of the log-probs, with gradient;
    log-prob (N,) and entropy (N,) without.
    """
    with model.root():
        return fused_linear_loss(
            *_head_inputs(model, batch), temperature, make_distribution, pull, kernels
        )


def get_lm_head_weight(model) -> torch.Tensor:
    """The head's weight (V, C) as logits are made with it: in float32 where model.head_float32 says
    so.
    """
    return model.head_weight.float() if model.backend.float32_head else model.head_weight


def _head_inputs(model, batch: MicroBatch):
    """Hidden states that predict (N, C), head weight (V, C), targets (N,)."""
    # (M, C)
    hidden = model(
        batch.tokens,
        batch.positions,
        PackedAttention(*batch.layout, batch.tokens.device, model.backend),
    )
    head = get_lm_head_weight(model)
    return hidden.index_select(0, batch.predict_from).to(head.dtype), head, batch.target
