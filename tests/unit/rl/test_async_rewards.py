"""Rewards made in a thread while groups are still being sampled: order, batches, errors."""

import threading

import pytest

from recr1.data_types import Prompt, Reward, Rollout
from recr1.rl.async_rewards import AsyncRewards


def make_group(number: int, size: int = 3) -> list[Rollout]:
    """Make the rollouts of one prompt; the tokens of each are its group and its place there."""
    prompt = Prompt(f"q{number}", number, "", (1,))
    rollouts = []
    for sibling in range(size):
        ids = (number, sibling)
        rollouts.append(Rollout(prompt, number, sibling, ids, (0.0, 0.0), True))
    return rollouts


def score_by_place(rollouts: list[Rollout]) -> list[Reward]:
    rewards = []
    for rollout in rollouts:
        total = 10.0 * rollout.group + rollout.sibling
        rewards.append(Reward(total))
    return rewards


def refuse_to_score(rollouts: list[Rollout]) -> None:
    pytest.fail("called for nothing")


def raise_an_error(rollouts: list[Rollout]) -> None:
    raise ValueError("the service is down")


@pytest.mark.parametrize("beside", [True, False])
def test_rewards_come_in_the_order_of_the_groups(beside):
    scored = AsyncRewards(score_by_place, beside)
    for number in (2, 0, 3, 1):
        scored.submit(make_group(number))

    rewards = scored.results()

    totals = [reward.total for reward in rewards]
    assert totals == [0.0, 1.0, 2.0, 10.0, 11.0, 12.0, 20.0, 21.0, 22.0, 30.0, 31.0, 32.0]

    no_group = AsyncRewards(refuse_to_score, beside)
    assert no_group.results() == []


def test_what_waits_is_one_call_and_nothing_is_scored_twice():
    """Hold the first call until all groups are there: the others then come together."""
    calls = []
    go = threading.Event()

    def score_and_record(rollouts):
        assert threading.current_thread() is not threading.main_thread()
        go.wait(30)
        calls.append([rollout.prompt.id for rollout in rollouts])
        return [Reward(1.0) for _ in rollouts]

    scored = AsyncRewards(score_and_record, True)
    scored.submit(make_group(0, 1))
    while not scored.waiting.empty():
        pass
    for number in range(1, 5):
        scored.submit(make_group(number, 1))
    go.set()

    rewards = scored.results()
    assert len(rewards) == 5
    assert calls == [["q0"], ["q1", "q2", "q3", "q4"]]


@pytest.mark.parametrize("beside", [True, False])
def test_an_error_comes_out_where_the_step_waits(beside):
    scored = AsyncRewards(raise_an_error, beside)
    scored.submit(make_group(0))
    scored.submit(make_group(1))

    with pytest.raises(ValueError, match="the service is down"):
        scored.results()
