"""The policy's distribution, defined once for sampler and trainer.

    p = softmax(logits / temperature)

Temperature is part of the policy. Ids that the tokenizer lacks are no part of it: their probability
is 0, because `Decoder.head_weight` ends before them.

Legend: M packed tokens, N trained tokens, C width, V vocabulary.
"""

from typing import NamedTuple

import torch

from recr1.data_types import MicroBatch
from recr1.kernels.logprob import TokenLoss, fused_linear_loss, linear_log_probs
from recr1.model.decoder import ScoredDecoder
from recr1.model.packed_attention import PackedAttention


class TokenDistribution(NamedTuple):
    """p = weights / total for each of N positions; log p = scaled - logsumexp."""

    scaled: torch.Tensor  # (N, V) logits / temperature, at least float32; float64 stays float64
    weights: torch.Tensor  # (N, V) exp(scaled - max)
    total: torch.Tensor  # (N, 1) sum of the weights
    logsumexp: torch.Tensor  # (N, 1) logsumexp(scaled)

    def logp(self, target: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities of target (N, K) -> (N, K)."""
        return self.scaled.gather(-1, target) - self.logsumexp

    def entropy(self) -> torch.Tensor:
        """Return -sum p log p, (N,) nats."""
        weighted_sum = torch.linalg.vecdot(self.weights, self.scaled)[:, None]
        entropy = self.logsumexp - weighted_sum / self.total  # (N, 1)
        return entropy[:, 0]


class HeadInputs(NamedTuple):
    """What the head computes log-probs of."""

    hidden: torch.Tensor  # (N, C) the states that predict
    weight: torch.Tensor  # (V, C)
    target: torch.Tensor  # (N,)


def make_distribution(logits: torch.Tensor, temperature: float) -> TokenDistribution:
    """Make the policy's distribution of logits (N, V)."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        scaled = scaled / temperature
    peak = scaled.amax(-1, keepdim=True)
    weights = (scaled - peak).exp_()
    total = weights.sum(-1, keepdim=True)
    return TokenDistribution(scaled, weights, total, peak + total.log())


def compute_log_probs(
    model: ScoredDecoder, batch: MicroBatch, temperature: float, kernels: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-prob (N,) and entropy (N,) of the batch's targets, with gradient."""
    with model.root():  # one gather for embedding and head
        inputs = compute_head_inputs(model, batch)
        return linear_log_probs(*inputs, temperature, make_distribution, kernels)


def compute_fused_loss(
    model: ScoredDecoder,
    batch: MicroBatch,
    temperature: float,
    token_loss: TokenLoss,
    kernels: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the loss that `token_loss` makes of the log-probs, with its gradients in the forward.

    Returns:
        The loss, a scalar with gradient; log-prob (N,) and entropy (N,) without gradient.
    """
    with model.root():
        inputs = compute_head_inputs(model, batch)
        return fused_linear_loss(*inputs, temperature, make_distribution, token_loss, kernels)


def get_lm_head_weight(model: ScoredDecoder) -> torch.Tensor:
    """Return the head's weight (V, C) that logits are made with.

    It is float32 where model.head_float32 says so.
    """
    weight = model.head_weight
    return weight.float() if model.backend.float32_head else weight


def compute_head_inputs(model: ScoredDecoder, batch: MicroBatch) -> HeadInputs:
    """Run the model over the batch and select the hidden states that predict.

    Call it inside `model.root()`: the weight is there no longer than that.
    """
    attention = PackedAttention(*batch.layout, batch.tokens.device, model.backend)
    hidden = model(batch.tokens, batch.positions, attention)  # (M, C)
    weight = get_lm_head_weight(model)
    predicting = hidden.index_select(0, batch.predict_from)  # (N, C)
    return HeadInputs(predicting.to(weight.dtype), weight, batch.target)
