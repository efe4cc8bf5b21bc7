"""Rollouts -> packed Batches. Where a token is predicted from is decided here, once (DESIGN: What flows)."""
from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import torch

from . import dist
from .records import Batch, Layout, Prompt, Rollout


def distinct(rollouts: list[Rollout]) -> tuple[list[Rollout], list[int]]:
    """One rollout per different text of a group, counting the siblings that wrote it, and where each first stood: same loss, fewer rows."""
    first: dict[tuple, int] = {}
    counts: dict[tuple, int] = {}
    for i, r in enumerate(rollouts):
        key = (r.group, r.ids)
        first.setdefault(key, i)
        counts[key] = counts.get(key, 0) + r.count
    return [replace(rollouts[i], count=counts[key]) for key, i in first.items()], list(first.values())


def pack(rollouts: list[Rollout], max_tokens: int, device=None) -> list[Batch]:
    """Micro-batches of at most `max_tokens` packed rows; siblings adjacent, their prompt once, groups of like length together.

    A rollout is never split; a group only when it alone exceeds the budget, and its prompt is then computed again.
    `Batch.rollout` counts along the list given here. Raises ValueError when one rollout exceeds the budget.
    """
    batches, pending, used = [], [], 0               # pending: (prompt, [(index, rollout), ...]) pieces of one batch
    by_length = sorted(_pieces(rollouts, max_tokens), key=lambda p: (len(p[0].ids), max(len(r.ids) for _, r in p[1])))
    for piece in by_length:                          # like lengths together: what attend() pads inside is least
        size = len(piece[0].ids) + sum(len(r.ids) - 1 for _, r in piece[1])
        if pending and used + size > max_tokens:
            batches.append(_batch(pending, device))
            pending, used = [], 0
        pending.append(piece)
        used += size
    return batches + [_batch(pending, device)] if pending else batches


def in_step(batches: list[Batch], device=None) -> list[Batch]:
    """As many batches on every rank, for each is a row of collectives: the shorter lists end in idle ones of one token, weight 0, rollout -1."""
    missing = dist.largest(len(batches)) - len(batches)
    prompt = Prompt("", 0, "", (0,))
    idle = _batch([(prompt, [(-1, Rollout(prompt, 0, 0, (0,), (0.0,), False, count=0))])], device) if missing else None
    return batches + [idle] * missing


def _pieces(rollouts: list[Rollout], max_tokens: int):
    """Groups, or the parts of one that is larger than the budget."""
    for _, group in groupby(enumerate(rollouts), key=lambda item: item[1].group):
        part, used = [], 0
        for i, r in group:
            need, prompt = len(r.ids) - 1, r.prompt
            if len(prompt.ids) + need > max_tokens:
                raise ValueError(f"prompt {prompt.id!r}: a rollout of {len(prompt.ids)} + {need} tokens exceeds "
                                 f"train.tokens_per_micro_batch = {max_tokens}; raise it")
            if part and len(prompt.ids) + used + need > max_tokens:
                yield prompt, part
                part, used = [], 0
            part.append((i, r))
            used += need
        yield prompt, part


def _batch(pieces: list[tuple[Prompt, list[tuple[int, Rollout]]]], device) -> Batch:
    prompts = [prompt.ids for prompt, _ in pieces]
    items = [(p, i, r) for p, (_, part) in enumerate(pieces) for i, r in part]
    tokens = [t for ids in prompts for t in ids] + [t for _, _, r in items for t in r.ids[:-1]]
    positions = [t for ids in prompts for t in range(len(ids))]
    last_row, end = [], 0                            # the last row of each prompt predicts all its siblings' first tokens
    for ids in prompts:
        end += len(ids)
        last_row.append(end - 1)
    predict_from = []
    for p, _, r in items:
        own = len(r.ids) - 1
        positions += range(len(prompts[p]), len(prompts[p]) + own)
        predict_from += [last_row[p], *range(end, end + own)]
        end += own

    def long(x):
        return torch.tensor(x, dtype=torch.int64, device=device)

    def each(value):                                 # a value per rollout -> (N,)
        return [value(i, r) for _, i, r in items for _ in r.ids]
    return Batch(
        tokens=long(tokens), positions=long(positions),
        layout=Layout(*(torch.tensor(x, dtype=torch.int64) for x in (
            [len(ids) for ids in prompts], [len(r.ids) - 1 for _, _, r in items], [p for p, _, _ in items]))),
        target=long([t for _, _, r in items for t in r.ids]), predict_from=long(predict_from),
        rollout=long(each(lambda i, r: i)), weight=torch.tensor(each(lambda i, r: float(r.count)), device=device),
        sampler_logp=torch.tensor([x for _, _, r in items for x in r.sampler_logp], device=device))
