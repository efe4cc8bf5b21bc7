"""Rewards made in a thread while groups are still being sampled: order, batches, errors."""

import threading

import pytest

from recr1.data_types import Prompt, Reward, Rollout
from recr1.rl.async_rewards import AsyncRewards


def group(number: int, size: int = 3) -> list[Rollout]:
    return [
        Rollout(Prompt(f"q{number}", number, "", (1,)), number, s, (number, s), (0.0, 0.0), True)
        for s in range(size)
    ]


@pytest.mark.parametrize("beside", [True, False])
def test_rewards_come_in_the_order_of_the_groups(beside):
    scored = AsyncRewards(
        lambda rollouts: [Reward(10.0 * r.group + r.sibling) for r in rollouts], beside
    )
    for number in (2, 0, 3, 1):
        scored.submit(group(number))
    assert [r.total for r in scored.results()] == [10.0 * g + s for g in range(4) for s in range(3)]
    assert AsyncRewards(lambda rollouts: pytest.fail("called for nothing"), beside).results() == []


def test_what_waits_is_one_call_and_nothing_is_scored_twice():
    """The first call is held until all groups are there: the others then come together."""
    calls = []
    go = threading.Event()

    def score(rollouts):
        assert threading.current_thread() is not threading.main_thread()
        go.wait(30)
        calls.append([r.prompt.id for r in rollouts])
        return [Reward(1.0) for _ in rollouts]

    scored = AsyncRewards(score, True)
    scored.submit(group(0, 1))
    while not scored.waiting.empty():
        pass
    for number in range(1, 5):
        scored.submit(group(number, 1))
    go.set()
    assert len(scored.results()) == 5
    assert calls == [["q0"], ["q1", "q2", "q3", "q4"]]


@pytest.mark.parametrize("beside", [True, False])
def test_an_error_comes_out_where_the_step_waits(beside):
    def score(rollouts):
        raise ValueError("the service is down")

    scored = AsyncRewards(score, beside)
    scored.submit(group(0))
    scored.submit(group(1))
    with pytest.raises(ValueError, match="the service is down"):
        scored.results()
