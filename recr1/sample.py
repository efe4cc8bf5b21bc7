"""generate(): batched KV-cache sampling with the training modules. Legend: P prompts, G siblings, B live rows, V vocabulary.

Siblings that are still the same text are one row (DESIGN decision 13): each draws with its own uniform, and the row splits
where they choose differently. Prefill once per prompt is the case of the empty completion. Same text as one row each.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable

import numpy as np
import torch

from .attention import PackedAttention
from .cache import KVCache, slots
from .model import Decoder
from .policy import policy
from .records import Prompt, Rollout


@dataclass
class Row:
    """A text that `siblings` of group `group` share so far."""
    group: int
    siblings: list[int]
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)


@torch.no_grad()
def generate(model: Decoder, prompts: list[Prompt], group_size: int, temperature: float, max_new_tokens: int, stops: frozenset[int],
             uniforms: np.ndarray | None, cache: KVCache | None = None, *, heard: Callable[[int, int], None] | None = None) -> list[Rollout]:
    """P prompts -> P * G rollouts, siblings adjacent, in order.

    `uniforms` (P, G, max_new_tokens) in (0, 1), one per token, chooses by inverse CDF; None is greedy. A text ends with any id
    of `stops`, which it keeps, or unfinished at max_new_tokens. Log-probs are those of the policy at `temperature`.
    A `cache` of `new_cache` saves its memory from one call to the next: fresh pages cost a third of a small model's step.
    `heard(r, id)` is called for each token of rollout r, in the order of its text, as soon as it is chosen.
    """
    if not prompts:
        return []                    # a rank without a share
    device = model.head_weight.device
    rows = [Row(p, list(range(group_size))) for p in range(len(prompts))]
    out: dict[tuple[int, int], Rollout] = {}
    cache = cache or new_cache(model)
    cache.most = len(prompts) * group_size, slots(max(len(p.ids) for p in prompts) + max_new_tokens)
    hidden = prefill(model, prompts, cache)                                                  # (P, C)
    for t in range(max_new_tokens):
        distribution = policy(hidden @ model.head_weight.T, temperature)                     # (B, V)
        ids, logp = choose(distribution, rows, None if uniforms is None else uniforms[:, :, t])
        alive: list[tuple[int, Row]] = []                                                    # (its row so far, the row it becomes)
        for b, row in enumerate(rows):
            for branch in split(row, ids[b], logp[b]):
                for s in branch.siblings if heard else ():
                    heard(branch.group * group_size + s, branch.ids[-1])
                finished = branch.ids[-1] in stops
                if finished or t + 1 == max_new_tokens:
                    for s in branch.siblings:
                        out[branch.group, s] = Rollout(prompts[branch.group], branch.group, s, tuple(branch.ids), tuple(branch.logp), finished)
                else:
                    alive.append((b, branch))
        if not alive:
            break
        rows = place(alive, cache)
        tokens = torch.tensor([row.ids[-1] for row in rows], device=device)
        hidden = model(tokens, cache.lengths[:cache.live].clone(), cache)                    # (B, C)
        cache.advance()
    return [out[p, s] for p in range(len(prompts)) for s in range(group_size)]


def new_cache(model: Decoder) -> KVCache:
    """An empty cache in the model's shape, type and place."""
    c, weight = model.config, model.head_weight
    return KVCache(c.num_hidden_layers, c.num_key_value_heads, c.head_dim, weight.dtype, weight.device)


def prefill(model: Decoder, prompts: list[Prompt], cache: KVCache) -> torch.Tensor:
    """The prompts' packed forward: row p of the cache then holds prompt p. Returns the hidden states (P, C) that predict the first tokens."""
    device = cache.lengths.device
    lengths, none = torch.tensor([len(p.ids) for p in prompts]), torch.zeros(0, dtype=torch.int64)
    tokens = torch.tensor([t for p in prompts for t in p.ids], device=device)
    positions = torch.tensor([t for p in prompts for t in range(len(p.ids))], device=device)
    hidden = model(tokens, positions, cache.prefill(PackedAttention(lengths, none, none, device), lengths))
    return hidden.index_select(0, (lengths.cumsum(0) - 1).to(device))


def choose(distribution, rows: list[Row], uniforms: np.ndarray | None) -> tuple[list[list[int]], list[list[float]]]:
    """Each row's siblings' next ids and their log-probs, by inverse CDF (or argmax). uniforms (P, G)."""
    weights = distribution.weights
    if uniforms is None:
        ids = weights.argmax(-1, keepdim=True)                                               # (B, 1): siblings agree
    else:
        most = max(len(row.siblings) for row in rows)
        u = np.full((len(rows), most), 0.5)
        for b, row in enumerate(rows):
            u[b, :len(row.siblings)] = uniforms[row.group, row.siblings]
        cdf = weights.cumsum(-1)                                                             # (B, V)
        mass = cdf[:, -1:]
        at = torch.as_tensor(u, device=cdf.device).to(cdf.dtype) * mass
        mass = mass.contiguous()
        # right=True never lands on an id of probability 0; a u that rounds to 1 would fall off the end: the last possible id
        ids = torch.minimum(torch.searchsorted(cdf, at, right=True), torch.searchsorted(cdf, mass))
    return ids.tolist(), distribution.logp(ids).tolist()


def split(row: Row, ids: list[int], logp: list[float]) -> list[Row]:
    """The row continued: one branch per different id its siblings chose, in the order of the siblings."""
    if len(ids) == 1 or len(row.siblings) == 1:
        return [Row(row.group, row.siblings, row.ids + ids[:1], row.logp + logp[:1])]
    branches: dict[int, Row] = {}
    for s, i, x in zip(row.siblings, ids, logp):
        if i in branches:
            branches[i].siblings.append(s)
        else:
            branches[i] = Row(row.group, [s], row.ids + [i], row.logp + [x])
    return list(branches.values())


def place(alive: list[tuple[int, Row]], cache: KVCache) -> list[Row]:
    """Cache rows for the branches: the first of a row stays where it is, finished rows' places are filled, the rest appended."""
    n = len(alive)
    rows: list[Row | None] = [None] * n
    movers = []
    for b, branch in alive:
        if b < n and rows[b] is None:
            rows[b] = branch
        else:
            movers.append((b, branch))
    free = [i for i, row in enumerate(rows) if row is None]
    for i, (_, branch) in zip(free, movers):
        rows[i] = branch
    cache.rearrange([b for b, _ in movers], free, n)
    return rows
