"""Rollouts -> packed Batches. Where a token is predicted from is decided here, once (DESIGN: What
flows).
"""

from collections import Counter
from dataclasses import replace
from itertools import accumulate, groupby
from typing import Callable

import torch

from recr1.data_types import MicroBatch, PackedLayout, Prompt, Rollout
from recr1.distributed import collectives as dist


def deduplicate(rollouts: list[Rollout]) -> tuple[list[Rollout], list[int]]:
    """One rollout per different text of a group, counting the siblings that wrote it, and where
    each first stood: same loss, fewer rows.
    """
    first = {}
    counts = Counter()
    for i, r in enumerate(rollouts):
        first.setdefault((r.group, r.ids), i)
        counts[r.group, r.ids] += r.count
    return [replace(rollouts[i], count=counts[key]) for key, i in first.items()], list(
        first.values()
    )


def pack_rollouts(rollouts: list[Rollout], max_tokens: int, device=None) -> list[MicroBatch]:
    """Micro-batches of at most `max_tokens` packed rows; siblings adjacent, their prompt once,
    groups of like length together.

    A rollout is never split; a group only when it alone exceeds the budget, and its prompt is then
    computed again. `Batch.rollout` counts along the list given here. Raises ValueError when one
    rollout exceeds the budget.
    """
    # (prompt, [(index, rollout), ...]): groups, or the parts of one that is larger than the budget
    pieces = []
    for _, group in groupby(enumerate(rollouts), key=lambda item: item[1].group):
        group = list(group)
        prompt = group[0][1].prompt
        for _, r in group:
            if len(prompt.ids) + _count_input_tokens(r) > max_tokens:
                raise ValueError(
                    f"prompt {prompt.id!r}: a rollout of {len(prompt.ids)} + {_count_input_tokens(r)} tokens exceeds "
                    f"train.tokens_per_micro_batch = {max_tokens}; raise it"
                )
        pieces += [
            (prompt, part)
            for part in _fill_bins(
                group, lambda item: _count_input_tokens(item[1]), max_tokens - len(prompt.ids)
            )
        ]
    # like together: what attend() pads inside is least
    pieces.sort(key=lambda p: (len(p[0].ids), max(len(r.ids) for _, r in p[1])))
    return [
        _build_micro_batch(run, device)
        for run in _fill_bins(
            pieces,
            lambda p: len(p[0].ids) + sum(_count_input_tokens(r) for _, r in p[1]),
            max_tokens,
        )
    ]


def pad_to_same_count(batches: list[MicroBatch], device=None) -> list[MicroBatch]:
    """As many batches on every rank, for each is a row of collectives: the shorter lists end in
    idle ones of one token, weight 0, rollout -1.
    """
    missing = dist.all_reduce_max(len(batches)) - len(batches)
    prompt = Prompt("", 0, "", (0,))
    idle = (
        _build_micro_batch(
            [(prompt, [(-1, Rollout(prompt, 0, 0, (0,), (0.0,), False, count=0))])], device
        )
        if missing
        else None
    )
    return batches + [idle] * missing


def _count_input_tokens(r: Rollout) -> int:
    """Rows that a completion takes: the last token predicts nothing."""
    return len(r.ids) - 1


def _fill_bins(items: list, size: Callable, most: int):
    """The items in order, as many at a time as come to `most` together."""
    run = []
    used = 0
    for item in items:
        if run and used + size(item) > most:
            yield run
            run = []
            used = 0
        run.append(item)
        used += size(item)
    if run:
        yield run


def _build_micro_batch(
    pieces: list[tuple[Prompt, list[tuple[int, Rollout]]]], device
) -> MicroBatch:
    prompts = [prompt.ids for prompt, _ in pieces]
    items = [(p, i, r) for p, (_, part) in enumerate(pieces) for i, r in part]
    tokens = [t for ids in prompts for t in ids] + [t for _, _, r in items for t in r.ids[:-1]]
    positions = [t for ids in prompts for t in range(len(ids))]
    after = list(accumulate(map(len, prompts)))
    end = len(positions)
    predict_from = []
    for p, _, r in items:
        positions += range(len(prompts[p]), len(prompts[p]) + _count_input_tokens(r))
        # the last row of a prompt predicts all its siblings' first tokens
        predict_from += [after[p] - 1, *range(end, end + _count_input_tokens(r))]
        end += _count_input_tokens(r)

    def long(x):
        return torch.tensor(x, dtype=torch.int64, device=device)

    def each(value):  # a value per rollout -> (N,)
        return [value(i, r) for _, i, r in items for _ in r.ids]

    return MicroBatch(
        tokens=long(tokens),
        positions=long(positions),
        layout=PackedLayout(
            *(
                torch.tensor(x, dtype=torch.int64)
                for x in (
                    [len(ids) for ids in prompts],
                    [_count_input_tokens(r) for _, _, r in items],
                    [p for p, _, _ in items],
                )
            )
        ),
        target=long([t for _, _, r in items for t in r.ids]),
        predict_from=long(predict_from),
        rollout=long(each(lambda i, r: i)),
        weight=torch.tensor(each(lambda i, r: float(r.count)), device=device),
        sampler_logp=torch.tensor([x for _, _, r in items for x in r.sampler_logp], device=device),
    )
