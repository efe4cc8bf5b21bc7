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
from torch.nn.utils.rnn import pad_sequence
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
        qkv = self.qkv(self.norm1(x))
        qkv = qkv.view(B, L, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, C / heads)
        dropout = self.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        attended = attended.transpose(1, 2).reshape(B, L, C)
        x = x + self.drop(self.out(attended))
        hidden = F.gelu(self.up(self.norm2(x)))
        return x + self.drop(self.down(self.drop(hidden)))

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """Apply dropout in training."""
        return F.dropout(x, self.p, self.training)


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
    columns = {int(item): column for column, item in enumerate(known)}
    rows = [number_items(sequence, columns) for sequence in sequences if any(sequence.trained)]
    score = make_scorer(model, columns, n_items)
    log = []
    best = None
    bar = tqdm(range(1, settings.epochs + 1), desc=title, disable=None, leave=False)
    for epoch in bar:
        model.train()
        loss = train_epoch(model, optimizer, iterate_batches(rows, settings, rng))
        record = dict(epoch=epoch, loss=loss, validation=validate(score))
        log.append(record)
        bar.set_postfix(loss=f"{loss:.3f}", validation=f"{record['validation']:.4f}")
        if best is None or record["validation"] > best["validation"]:
            best = record
            state = copy.deepcopy(model.state_dict())
        elif epoch - best["epoch"] >= settings.patience:
            break
    model.load_state_dict(state)
    return score, log


def number_items(sequence: Sequence, columns: dict[int, int]) -> list[tuple[int, bool]]:
    """Return (the model's number, is it train data) of each item that the model knows."""
    numbered = []
    for item, is_train in zip(sequence.items, sequence.trained):
        if item in columns:
            numbered.append((columns[item], is_train))
    return numbered


def train_epoch(
    model: SASRec,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
) -> float:
    """Take a step on every batch; return the mean loss of a prediction."""
    total = 0.0
    num_targets = 0
    for inputs, targets in batches:
        is_target = targets >= 0  # (B, L)
        hidden = model(inputs)[is_target]
        loss = compute_cross_entropy(hidden, model.item.weight, targets[is_target])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        batch_size = int(is_target.sum())
        total += float(loss.detach()) * batch_size
        num_targets += batch_size
    return total / num_targets


def compute_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Compute the mean of -log softmax(hidden @ weight.T)[target], hidden (N, C), weight (K, C).

    It uses the product's head: the (N, K) logits are most of SASRec's time.
    """

    def compute_nll(log_probs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return -log_probs.sum() / len(target)

    token_loss = make_token_loss(compute_nll)
    return fused_linear_loss(hidden, weight, target, 1.0, make_distribution, token_loss)[0]


def iterate_batches(
    rows: list[list[tuple[int, bool]]], s: Settings, rng: np.random.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield one epoch: inputs and targets (B, L), where -1 means no target.

    Every sequence is cut into windows of at most `length` predictions, from another place each
    time.
    """
    windows = []
    for row in rows:
        first = -int(rng.integers(s.length))
        for start in range(first, len(row) - 1, s.length):
            end = start + s.length
            if end > 0:
                windows.append(row[max(0, start) : end + 1])
    order = rng.permutation(len(windows))
    for start in range(0, len(order), s.batch):
        batch = [windows[index] for index in order[start : start + s.batch]]
        inputs, targets = pad_windows(batch)
        if (targets >= 0).any():
            yield inputs, targets


def pad_windows(windows: list[list[tuple[int, bool]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets (B, L): item n of a window is the input of item n + 1."""
    longest = max(map(len, windows)) - 1
    inputs = torch.zeros(len(windows), longest, dtype=torch.long)
    targets = torch.full_like(inputs, -1)
    for row, window in enumerate(windows):
        numbers, trained = torch.tensor(window, dtype=torch.long).T
        length = len(window) - 1
        inputs[row, :length] = numbers[:-1]
        targets[row, :length] = torch.where(trained[1:] == 1, numbers[1:], -1)
    return inputs, targets


def make_scorer(model: SASRec, columns: dict[int, int], n_items: int) -> Scorer:
    """Return what scores every item after each history.

    `columns`: item number -> the model's number. A history of unknown items only ranks nothing.
    """
    known = np.array(list(columns))
    length = model.settings.length

    @torch.no_grad()
    def score(histories: list[list[int]], texts: list[str]) -> np.ndarray:
        model.eval()
        scores = np.full((len(histories), n_items), -np.inf, np.float32)
        queries = []
        rows = []
        for query, history in enumerate(histories):
            row = [columns[item] for item in history if item in columns]
            if row:
                queries.append(query)
                rows.append(torch.tensor(row[-length:]))
        if queries:
            inputs = pad_sequence(rows, batch_first=True)
            last_positions = torch.tensor([len(row) - 1 for row in rows])
            hidden = model(inputs)[torch.arange(len(rows)), last_positions]  # (queries, C)
            scores[np.ix_(queries, known)] = (hidden @ model.item.weight.T).numpy()
        return scores

    return score
