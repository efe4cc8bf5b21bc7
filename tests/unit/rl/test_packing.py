"""Test pack_rollouts and deduplicate: every token once, no padding, prompts once per group.

Their gradient: test_gradient.py.
"""

import pytest
import torch

from recr1.data_types import Prompt, Rollout
from recr1.rl.packing import deduplicate, pack_rollouts


def make_rollout(group: int, sibling: int, prompt_ids, ids, count: int = 1) -> Rollout:
    """Make a rollout whose log-prob of each token is -0.25 times its id."""
    prompt = Prompt(f"q{group}", group, "", tuple(prompt_ids))
    logp = tuple(-0.25 * i for i in ids)
    return Rollout(prompt, group, sibling, tuple(ids), logp, True, count)


# two prompts of 3 and 2 tokens; completions of 1 to 4; tokens are unique so that a mix-up shows
SMALL = [
    make_rollout(0, 0, [1, 2, 3], [10, 11, 12]),
    make_rollout(0, 1, [1, 2, 3], [20]),
    make_rollout(1, 0, [4, 5], [30, 31]),
    make_rollout(1, 1, [4, 5], [40, 41, 42, 43], 3),
]


def make_many(seed: int = 0) -> list[Rollout]:
    """Make 12 groups of 4, prompts of 1 to 9 tokens, completions of 1 to 12, every id different."""
    generator = torch.Generator().manual_seed(seed)
    next_id = 0

    def draw_ids(longest: int) -> list[int]:
        nonlocal next_id
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        first = next_id
        next_id += length
        return list(range(first, next_id))

    rollouts = []
    for group in range(12):
        prompt_ids = draw_ids(9)
        for sibling in range(4):
            ids = draw_ids(12)
            rollouts.append(make_rollout(group, sibling, prompt_ids, ids, 1 + sibling))
    return rollouts


def list_rollouts_of(batch) -> list[int]:
    return batch.rollout.unique_consecutive().tolist()


def test_a_batch_written_out():
    """Shorter prompts first: rows 4 5 | 1 2 3 | 30 | 40 41 42 | 10 11 | (20 has no input row)."""
    (batch,) = pack_rollouts(SMALL, 100)

    layout = [lengths.tolist() for lengths in batch.layout]
    want_logp = -0.25 * batch.target.float()
    assert batch.tokens.tolist() == [4, 5, 1, 2, 3, 30, 40, 41, 42, 10, 11]
    assert batch.positions.tolist() == [0, 1, 0, 1, 2, 2, 2, 3, 4, 3, 4]
    assert layout == [[2, 3], [1, 3, 2, 0], [0, 0, 1, 1]]
    assert batch.target.tolist() == [30, 31, 40, 41, 42, 43, 10, 11, 12, 20]
    assert batch.predict_from.tolist() == [1, 5, 1, 6, 7, 8, 4, 9, 10, 4]
    assert batch.rollout.tolist() == [2, 2, 3, 3, 3, 3, 0, 0, 0, 1]
    assert batch.weight.tolist() == [1, 1, 3, 3, 3, 3, 1, 1, 1, 1]
    assert torch.equal(batch.sampler_logp, want_logp)
    assert batch.old_logp is None
    assert batch.ref_logp is None
    assert batch.advantages is None


def check_prompts(batch, rollouts: list[Rollout], indices: list[int], budget: int) -> None:
    """Check that a batch has the rows that its layout says, and each prompt once whatever its
    siblings.
    """
    layout = batch.layout
    prompts = len(layout.prompt_lengths)
    groups = {rollouts[i].group for i in indices}
    prompt_rows = layout.prompt_lengths.sum()
    completion_rows = layout.completion_lengths.sum()
    rows = prompt_rows + completion_rows
    distinct = set(indices)
    prompts_in_order = layout.prompt_of.unique_consecutive()
    assert len(batch.tokens) == rows
    assert len(batch.positions) == rows
    assert rows <= budget
    assert len(layout.completion_lengths) == len(indices)
    assert len(distinct) == len(indices)
    assert len(groups) == prompts
    assert prompts_in_order.tolist() == list(range(prompts))


def check_rollout(batch, rollout: Rollout, index: int, start: int, prompt_end: int) -> None:
    """Check the targets of one rollout, which begin at `start` and are never split."""
    prompt_ids = list(rollout.prompt.ids)
    ids = list(rollout.ids)
    length = len(ids)
    targets = slice(start, start + length)
    rows = batch.predict_from[targets]
    prompt_start = prompt_end - len(prompt_ids)
    prompt_tokens = batch.tokens[prompt_start:prompt_end]
    inputs = [prompt_ids[-1], *ids[:-1]]
    first_position = len(prompt_ids) - 1
    positions = range(first_position, first_position + length)

    assert batch.target[targets].tolist() == ids
    assert batch.rollout[targets].tolist() == [index] * length
    assert prompt_tokens.tolist() == prompt_ids
    # siblings' first tokens: their one prompt's last row
    assert rows[0] == prompt_end - 1
    assert batch.tokens[rows].tolist() == inputs
    assert batch.positions[rows].tolist() == list(positions)
    assert batch.weight[targets].tolist() == [rollout.count] * length


@pytest.mark.parametrize("budget", [20, 21, 40, 100, 10_000])
def test_every_token_once_within_the_budget(budget):
    rollouts = make_many()

    batches = pack_rollouts(rollouts, budget)

    assert (len(batches) == 1) == (budget == 10_000)
    packed = []
    for batch in batches:
        indices = list_rollouts_of(batch)
        check_prompts(batch, rollouts, indices, budget)
        packed += indices
        prompts = batch.layout.prompt_of.tolist()
        prompt_ends = batch.layout.prompt_lengths.cumsum(0).tolist()
        start = 0
        for index, prompt in zip(indices, prompts, strict=True):
            rollout = rollouts[index]
            check_rollout(batch, rollout, index, start, prompt_ends[prompt])
            start += len(rollout.ids)
        assert start == len(batch.target)
    assert sorted(packed) == list(range(len(rollouts)))


def test_one_rollout_at_a_time_and_a_group_whole_when_it_fits():
    """Group 1 needs 2 + 1 + 3 = 6 rows, group 0 needs 3 + 2 + 0 = 5."""

    def list_batches(budget):
        return [list_rollouts_of(batch) for batch in pack_rollouts(SMALL, budget)]

    assert list_batches(11) == [[2, 3, 0, 1]]
    assert list_batches(10) == [[2, 3], [0, 1]]
    assert list_batches(6) == [[2, 3], [0, 1]]
    # group 1 alone exceeds 5: its prompt is computed again
    assert list_batches(5) == [[2], [3], [0, 1]]


def test_a_rollout_over_the_budget_is_named():
    with pytest.raises(ValueError, match=r"'q0'.*3 \+ 2.*tokens_per_micro_batch = 4"):
        pack_rollouts(SMALL, 4)


def test_nothing_packs_to_nothing():
    assert pack_rollouts([], 10) == []
    assert deduplicate([]) == ([], [])


def test_distinct_counts_siblings_of_a_group_only():
    rollouts = [
        make_rollout(0, 0, [1], [7, 8]),
        make_rollout(0, 1, [1], [7]),
        make_rollout(0, 2, [1], [7, 8], 2),
        make_rollout(0, 3, [1], [7, 8]),
        make_rollout(1, 0, [1], [7, 8]),
        make_rollout(1, 1, [1], [9]),
        make_rollout(1, 2, [1], [9]),
    ]

    texts, first = deduplicate(rollouts)

    actual = [(text.group, text.sibling, text.ids, text.count) for text in texts]
    assert first == [0, 1, 4, 5]
    assert actual == [
        (0, 0, (7, 8), 4),
        (0, 1, (7,), 1),
        (1, 0, (7, 8), 1),
        (1, 1, (9,), 2),
    ]
    # the rollouts themselves are as before
    assert [rollout.count for rollout in rollouts] == [1, 1, 2, 1, 1, 1, 1]
