"""Define and train SASRec (Kang & McAuley 2018) in plain PyTorch.

It is a causal Transformer over a user's items that predicts the next one. Two pre-norm blocks,
width 64, two heads, inner width 256, learned positions, tied item embedding, at most 50 items: the
sizes of RecBole's SASRec, which Rec-R1's own baselines vendor. The loss is cross-entropy over all
train items (full softmax), not the paper's binary one against a sampled negative, which is known to
be much weaker under full ranking (Klenitskiy & Vasilev 2023). Legend: B windows, L positions, C
width, D items, K items that train has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from counts import Scorer
from sequences import Sequence
from torch import nn
from tqdm import tqdm

from recr1.kernels.logprob import fused_linear_loss, make_token_loss
from recr1.model.log_probs import make_distribution


@dataclass(frozen=True)
class Settings:
    """Hold the sizes of the model and of its training."""

    layers: int = 2
    width: int = 64
    heads: int = 2
    inner: int = 256
    length: int = 50  # items a prediction looks back on at most
    dropout: float = 0.2
    lr: float = 3e-3  # validation NDCG@10 on movielens: .058 after 35 epochs; 1e-3: .051 after 31
    batch: int = 32  # windows
    epochs: int = 100  # at most
    patience: int = 5  # epochs without a better validation score before it stops


class Block(nn.Module):
    """Apply a pre-norm Transformer block."""

    def __init__(self, s: Settings):
        super().__init__()
        self.heads = s.heads
        self.p = s.dropout
        self.norm1 = nn.LayerNorm(s.width)
        self.norm2 = nn.LayerNorm(s.width)
        self.qkv = nn.Linear(s.width, 3 * s.width)
        self.out = nn.Linear(s.width, s.width)
        self.up = nn.Linear(s.width, s.inner)
        self.down = nn.Linear(s.inner, s.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply causal attention and the MLP to x (B, L, C)."""
        B, L, C = x.shape
        # each (B, heads, L, C / heads)
        q, k, v = (
            self.qkv(self.norm1(x))
            .view(B, L, 3, self.heads, C // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        a = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.p if self.training else 0.0
        )
        x = x + F.dropout(self.out(a.transpose(1, 2).reshape(B, L, C)), self.p, self.training)
        h = F.dropout(F.gelu(self.up(self.norm2(x))), self.p, self.training)
        return x + F.dropout(self.down(h), self.p, self.training)


class SASRec(nn.Module):
    """Map items (B, L), from 0, to hidden states (B, L, C).

    Rows are filled up on the right with any item: causal attention hides it from the positions
    before.
    """

    def __init__(self, n_items: int, settings: Settings):
        super().__init__()
        self.settings = settings
        self.item = nn.Embedding(n_items, settings.width)
        self.position = nn.Embedding(settings.length, settings.width)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.width)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0, 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        x = self.item(items) + self.position.weight[: items.shape[1]]
        x = F.dropout(x, self.settings.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def fit(
    sequences: list[Sequence],
    known: np.ndarray,
    n_items: int,
    settings: Settings,
    seed: int,
    validate: Callable[[Scorer], float],
    title: str = "sasrec",
) -> tuple[Scorer, list[dict]]:
    """Train until `validate(scorer)` has not risen for `patience` epochs.

    Returns the scorer with the weights of the best epoch.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = SASRec(len(known), settings)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, betas=(0.9, 0.98))
    within = {int(item): i for i, item in enumerate(known)}
    rows = [
        [(within[item], t) for item, t in zip(s.items, s.trained) if item in within]
        for s in sequences
        if any(s.trained)
    ]
    score = make_scorer(model, within, n_items)
    log = []
    best = None
    bar = tqdm(range(1, settings.epochs + 1), desc=title, disable=None, leave=False)
    for epoch in bar:
        model.train()
        total = n = 0.0
        for inputs, targets in iterate_batches(rows, settings, rng):
            at = targets >= 0  # (B, L)
            loss = compute_cross_entropy(model(inputs)[at], model.item.weight, targets[at])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = total + float(loss.detach()) * int(at.sum())
            n = n + int(at.sum())
        log.append(dict(epoch=epoch, loss=total / n, validation=validate(score)))
        bar.set_postfix(loss=f"{total / n:.3f}", validation=f"{log[-1]['validation']:.4f}")
        if best is None or log[-1]["validation"] > best["validation"]:
            best = log[-1]
            state = copy.deepcopy(model.state_dict())
        elif epoch - best["epoch"] >= settings.patience:
            break
    model.load_state_dict(state)
    return score, log


def compute_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Compute the mean of -log softmax(hidden @ weight.T)[target], hidden (N, C), weight (K, C).

    It uses the product's head: the (N, K) logits are most of SASRec's time.
    """
    return fused_linear_loss(
        hidden,
        weight,
        target,
        1.0,
        make_distribution,
        make_token_loss(lambda logp, rows: -logp.sum() / len(target)),
    )[0]


def iterate_batches(
    rows: list[list[tuple[int, bool]]], s: Settings, rng: np.random.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield one epoch: inputs and targets (B, L), where -1 means no target.

    Every sequence is cut into windows of at most `length` predictions, from another place each
    time.
    """
    windows = []
    for row in rows:
        start = -int(rng.integers(s.length))
        windows += [
            row[max(0, at) : at + s.length + 1]
            for at in range(start, len(row) - 1, s.length)
            if at + s.length > 0
        ]
    order = rng.permutation(len(windows))
    for first in range(0, len(order), s.batch):
        chosen = [windows[i] for i in order[first : first + s.batch]]
        inputs = torch.zeros(len(chosen), max(map(len, chosen)) - 1, dtype=torch.long)
        targets = torch.full_like(inputs, -1)
        for i, window in enumerate(chosen):
            inputs[i, : len(window) - 1] = torch.tensor(
                [item for item, _ in window[:-1]], dtype=torch.long
            )
            targets[i, : len(window) - 1] = torch.tensor(
                [item if trained else -1 for item, trained in window[1:]], dtype=torch.long
            )
        if (targets >= 0).any():
            yield inputs, targets


def make_scorer(model: SASRec, within: dict[int, int], n_items: int) -> Scorer:
    """Return what scores every item after each history.

    `within`: item number -> the model's number. A history of unknown items only ranks nothing.
    """
    columns = np.array(list(within))

    @torch.no_grad()
    def scores(histories: list[list[int]], texts: list[str]) -> np.ndarray:
        model.eval()
        out = np.full((len(histories), n_items), -np.inf, np.float32)
        rows = [
            [within[item] for item in history if item in within][-model.settings.length :]
            for history in histories
        ]
        asked = [q for q, row in enumerate(rows) if row]
        if asked:
            lengths = torch.tensor([len(rows[q]) for q in asked])
            inputs = torch.zeros(len(asked), int(lengths.max()), dtype=torch.long)
            for i, q in enumerate(asked):
                inputs[i, : len(rows[q])] = torch.tensor(rows[q])
            last = model(inputs)[torch.arange(len(asked)), lengths - 1]  # (asked, C)
            out[np.ix_(asked, columns)] = (last @ model.item.weight.T).numpy()
        return out

    return scores
