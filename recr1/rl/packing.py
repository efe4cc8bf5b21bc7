"""Rollouts -> packed micro-batches. Which row predicts a token is decided here, once.

A group of siblings is packed as its prompt once and, later, the inputs of its completions (the last
sampled token predicts nothing and is no input):

    two siblings of the prompt 1 2 3:  10 11 12  and  20

    row             0   1   2 |  3   4         (20 has no input row)
    tokens          1   2   3 | 10  11
    positions       0   1   2 |  3   4

    target         10  11  12 | 20
    predict_from    2   3   4 |  2             the prompt's last row predicts both first tokens
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate, groupby
from typing import NamedTuple, TypeVar

import torch

from recr1.data_types import MicroBatch, PackedLayout, Prompt, Rollout
from recr1.distributed import collectives as dist

T = TypeVar("T")


class IndexedRollout(NamedTuple):
    """A rollout and its index in the list that is packed; -1: in no list."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    rollout: Rollout

    @property
    def num_inputs(self) -> int:
        return _count_input_tokens(self.rollout)


class PromptRollouts(NamedTuple):
    """A prompt and rollouts of it: a group, or a part of one that is larger than the budget."""

    prompt: Prompt
    rollouts: list[IndexedRollout]

    @property
    def num_rows(self) -> int:
        """Count the packed rows of the prompt and its completions."""
        return len(self.prompt.ids) + sum(item.num_inputs for item in self.rollouts)

    @property
    def lengths(self) -> tuple[int, int]:
        """Return the lengths of the prompt and of its longest completion."""
        return len(self.prompt.ids), max(len(item.rollout.ids) for item in self.rollouts)


def deduplicate(rollouts: list[Rollout]) -> tuple[list[Rollout], list[int]]:
    """Keep one rollout per different text of a group, counting the siblings that wrote it.

    The loss stays the same and the packed rows are fewer.

    Returns:
        The different rollouts, and for each the index of its first sibling in `rollouts`.
    """
    first_index: dict[tuple, int] = {}
    counts: Counter[tuple] = Counter()
    for index, rollout in enumerate(rollouts):
        text = (rollout.group, rollout.ids)
        first_index.setdefault(text, index)
        counts[text] += rollout.count

    unique_rollouts = []
    for text, index in first_index.items():
        unique_rollouts.append(replace(rollouts[index], count=counts[text]))
    return unique_rollouts, list(first_index.values())


def pack_rollouts(rollouts: list[Rollout], max_tokens: int, device=None) -> list[MicroBatch]:
    """Pack rollouts into micro-batches of at most `max_tokens` rows.

    Siblings are adjacent, their prompt is there once, and groups of similar length are together. A
    rollout is never split. A group is split only when it alone exceeds the budget, and its prompt
    is then computed again. `MicroBatch.rollout` indexes the list given here.

    Raises ValueError when one rollout exceeds the budget.
    """
    # Groups, or the parts of one that is larger than the budget.
    pieces = []
    for group in _group_siblings(rollouts):
        prompt = group[0].rollout.prompt
        _check_rollouts_fit(prompt, group, max_tokens)
        num_inputs_left = max_tokens - len(prompt.ids)
        for siblings in _fill_bins(group, lambda item: item.num_inputs, num_inputs_left):
            pieces.append(PromptRollouts(prompt, siblings))

    # PackedAttention pads to the longest: similar lengths together pad least.
    pieces.sort(key=lambda piece: piece.lengths)

    micro_batches = []
    for bin_pieces in _fill_bins(pieces, lambda piece: piece.num_rows, max_tokens):
        micro_batches.append(_build_micro_batch(bin_pieces, device))
    return micro_batches


def pad_to_same_count(batches: list[MicroBatch], device=None) -> list[MicroBatch]:
    """Pad this rank's list with idle micro-batches until every rank has as many.

    Each micro-batch issues collectives: a rank with fewer would leave the others waiting. An idle
    one is a single token of weight 0 and rollout -1.
    """
    num_missing = dist.all_reduce_max(len(batches)) - len(batches)
    if num_missing == 0:
        return batches

    prompt = Prompt(id="", index=0, text="", ids=(0,))
    rollout = Rollout(
        prompt, group=0, sibling=0, ids=(0,), sampler_logp=(0.0,), finished=False, count=0
    )
    piece = PromptRollouts(prompt, [IndexedRollout(-1, rollout)])
    idle = _build_micro_batch([piece], device)
    return batches + [idle] * num_missing


def _count_input_tokens(rollout: Rollout) -> int:
    """Count the rows that a completion takes: its last token predicts nothing."""
    return len(rollout.ids) - 1


def _group_siblings(rollouts: list[Rollout]) -> list[list[IndexedRollout]]:
    """Split a list of rollouts, siblings adjacent, into its groups."""
    indexed = [IndexedRollout(index, rollout) for index, rollout in enumerate(rollouts)]
    return [list(group) for _, group in groupby(indexed, key=lambda item: item.rollout.group)]


def _check_rollouts_fit(prompt: Prompt, group: list[IndexedRollout], max_tokens: int) -> None:
    """Raise ValueError when a rollout of the group, with its prompt, exceeds the budget."""
    for item in group:
        if len(prompt.ids) + item.num_inputs > max_tokens:
            raise ValueError(
                f"prompt {prompt.id!r}: a rollout of {len(prompt.ids)} + {item.num_inputs} tokens "
                f"exceeds train.tokens_per_micro_batch = {max_tokens}; raise it"
            )


def _fill_bins(items: list[T], size: Callable[[T], int], capacity: int) -> Iterator[list[T]]:
    """Yield the items in order, as many at a time as fit into `capacity` together."""
    current: list[T] = []
    used = 0
    for item in items:
        if current and used + size(item) > capacity:
            yield current
            current = []
            used = 0
        current.append(item)
        used += size(item)
    if current:
        yield current


def _build_micro_batch(pieces: list[PromptRollouts], device) -> MicroBatch:
    """Lay out prompts, then completions, and say which row predicts which token."""
    tokens: list[int] = []
    positions: list[int] = []
    for piece in pieces:
        tokens += piece.prompt.ids
        positions += range(len(piece.prompt.ids))
    prompt_lengths = [len(piece.prompt.ids) for piece in pieces]
    prompt_ends = list(accumulate(prompt_lengths))

    # per completion
    completion_lengths: list[int] = []
    prompt_of: list[int] = []
    # per trained token
    target: list[int] = []
    predict_from: list[int] = []
    rollout_index: list[int] = []
    weight: list[float] = []
    sampler_logp: list[float] = []

    for prompt_index, piece in enumerate(pieces):
        prompt_len = len(piece.prompt.ids)
        for index, rollout in piece.rollouts:
            num_inputs = _count_input_tokens(rollout)
            first_row = len(tokens)
            tokens += rollout.ids[:-1]
            positions += range(prompt_len, prompt_len + num_inputs)
            completion_lengths.append(num_inputs)
            prompt_of.append(prompt_index)

            target += rollout.ids
            # The last row of a prompt predicts the first token of all its siblings.
            predict_from.append(prompt_ends[prompt_index] - 1)
            predict_from += range(first_row, first_row + num_inputs)
            num_targets = len(rollout.ids)
            rollout_index += [index] * num_targets
            weight += [float(rollout.count)] * num_targets
            sampler_logp += rollout.sampler_logp

    # The layout stays on the CPU: attention reads lengths without waiting for a GPU.
    layout = PackedLayout(
        prompt_lengths=torch.tensor(prompt_lengths, dtype=torch.int64),
        completion_lengths=torch.tensor(completion_lengths, dtype=torch.int64),
        prompt_of=torch.tensor(prompt_of, dtype=torch.int64),
    )
    return MicroBatch(
        tokens=torch.tensor(tokens, dtype=torch.int64, device=device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        layout=layout,
        target=torch.tensor(target, dtype=torch.int64, device=device),
        predict_from=torch.tensor(predict_from, dtype=torch.int64, device=device),
        rollout=torch.tensor(rollout_index, dtype=torch.int64, device=device),
        weight=torch.tensor(weight, device=device),
        sampler_logp=torch.tensor(sampler_logp, device=device),
    )
