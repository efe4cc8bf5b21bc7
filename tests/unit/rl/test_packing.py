"""Test pack_rollouts and deduplicate: every token once, no padding, prompts once per group.

Their gradient: test_gradient.py.
"""

import pytest
import torch

from recr1.data_types import Prompt, Rollout
from recr1.rl.packing import deduplicate, pack_rollouts


def rollout(group: int, sibling: int, prompt_ids, ids, count: int = 1) -> Rollout:
    return Rollout(
        Prompt(f"q{group}", group, "", tuple(prompt_ids)),
        group,
        sibling,
        tuple(ids),
        tuple(-0.25 * i for i in ids),
        True,
        count,
    )


# two prompts of 3 and 2 tokens; completions of 1 to 4; tokens are unique so that a mix-up shows
SMALL = [
    rollout(0, 0, [1, 2, 3], [10, 11, 12]),
    rollout(0, 1, [1, 2, 3], [20]),
    rollout(1, 0, [4, 5], [30, 31]),
    rollout(1, 1, [4, 5], [40, 41, 42, 43], 3),
]


def many(seed: int = 0) -> list[Rollout]:
    """12 groups of 4, prompts of 1 to 9 tokens, completions of 1 to 12, every id different."""
    g = torch.Generator().manual_seed(seed)
    fresh = iter(range(10_000))

    def ids(most):
        return [next(fresh) for _ in range(int(torch.randint(1, most + 1, (1,), generator=g)))]

    out = []
    for group in range(12):
        prompt = ids(9)
        out += [rollout(group, s, prompt, ids(12), 1 + s) for s in range(4)]
    return out


def test_a_batch_written_out():
    """Shorter prompts first: rows 4 5 | 1 2 3 | 30 | 40 41 42 | 10 11 | (20 has no input row)."""
    (b,) = pack_rollouts(SMALL, 100)
    assert b.tokens.tolist() == [4, 5, 1, 2, 3, 30, 40, 41, 42, 10, 11]
    assert b.positions.tolist() == [0, 1, 0, 1, 2, 2, 2, 3, 4, 3, 4]
    assert [t.tolist() for t in b.layout] == [[2, 3], [1, 3, 2, 0], [0, 0, 1, 1]]
    assert b.target.tolist() == [30, 31, 40, 41, 42, 43, 10, 11, 12, 20]
    assert b.predict_from.tolist() == [1, 5, 1, 6, 7, 8, 4, 9, 10, 4]
    assert b.rollout.tolist() == [2, 2, 3, 3, 3, 3, 0, 0, 0, 1]
    assert b.weight.tolist() == [1, 1, 3, 3, 3, 3, 1, 1, 1, 1]
    assert torch.equal(b.sampler_logp, -0.25 * b.target.float())
    assert b.old_logp is None
    assert b.ref_logp is None
    assert b.advantages is None


@pytest.mark.parametrize("budget", [20, 21, 40, 100, 10_000])
def test_every_token_once_within_the_budget(budget):
    rollouts = many()
    seen = []
    batches = pack_rollouts(rollouts, budget)
    assert (len(batches) == 1) == (budget == 10_000)
    for b in batches:
        P = len(b.layout.prompt_lengths)
        R = len(b.layout.completion_lengths)
        assert len(b.tokens) == len(b.positions) == sum(t.sum() for t in b.layout[:2]) <= budget
        packed = b.rollout.unique_consecutive().tolist()
        assert len(packed) == len(set(packed)) == R
        seen += packed
        # a prompt stands once, whatever its siblings
        assert P == len({rollouts[i].group for i in packed})
        assert b.layout.prompt_of.unique_consecutive().tolist() == list(range(P))
        prompt_end = b.layout.prompt_lengths.cumsum(0)
        at = 0
        for i, p in zip(packed, b.layout.prompt_of.tolist()):
            r = rollouts[i]
            N = len(rollouts[i].ids)
            mine = slice(at, at + N)
            rows = b.predict_from[at : at + N]
            at += N
            # never split
            assert b.target[mine].tolist() == list(r.ids)
            assert set(b.rollout[mine].tolist()) == {i}
            assert b.tokens[prompt_end[p] - len(r.prompt.ids) : prompt_end[p]].tolist() == list(
                r.prompt.ids
            )
            # siblings' first tokens: their one prompt's last row
            assert rows[0] == prompt_end[p] - 1
            assert b.tokens[rows].tolist() == [r.prompt.ids[-1], *r.ids[:-1]]
            assert b.positions[rows].tolist() == list(
                range(len(r.prompt.ids) - 1, len(r.prompt.ids) - 1 + N)
            )
            assert set(b.weight[mine].tolist()) == {r.count}
        assert at == len(b.target)
    assert sorted(seen) == list(range(len(rollouts)))


def test_one_rollout_at_a_time_and_a_group_whole_when_it_fits():
    """Group 1 needs 2 + 1 + 3 = 6 rows, group 0 needs 3 + 2 + 0 = 5."""

    def shapes(budget):
        return [b.rollout.unique_consecutive().tolist() for b in pack_rollouts(SMALL, budget)]

    assert shapes(11) == [[2, 3, 0, 1]]
    assert shapes(10) == shapes(6) == [[2, 3], [0, 1]]
    assert shapes(5) == [[2], [3], [0, 1]]  # group 1 alone exceeds 5: its prompt is computed again


def test_a_rollout_over_the_budget_is_named():
    with pytest.raises(ValueError, match=r"'q0'.*3 \+ 2.*tokens_per_micro_batch = 4"):
        pack_rollouts(SMALL, 4)


def test_nothing_packs_to_nothing():
    assert pack_rollouts([], 10) == []
    assert deduplicate([]) == ([], [])


def test_distinct_counts_siblings_of_a_group_only():
    a = [
        rollout(0, 0, [1], [7, 8]),
        rollout(0, 1, [1], [7]),
        rollout(0, 2, [1], [7, 8], 2),
        rollout(0, 3, [1], [7, 8]),
        rollout(1, 0, [1], [7, 8]),
        rollout(1, 1, [1], [9]),
        rollout(1, 2, [1], [9]),
    ]
    texts, first = deduplicate(a)
    assert first == [0, 1, 4, 5]
    assert [(r.group, r.sibling, r.ids, r.count) for r in texts] == [
        (0, 0, (7, 8), 4),
        (0, 1, (7,), 1),
        (1, 0, (7, 8), 1),
        (1, 1, (9,), 2),
    ]
    assert [r.count for r in a] == [1, 1, 2, 1, 1, 1, 1]
