"""Score groups that are finished in a thread while others are still being sampled.

Where the policy samples on the CPU itself and the retriever computes there too, the two would only
take each other's cores (9% of the quickstart's step). Then there is no thread, and `results` scores
all groups in one call.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import Callable

from recr1.data_types import Reward, Rollout


class AsyncRewards:
    """Score the groups of a step: `submit` takes one as it finishes, `results` waits for the rest.

    Groups that wait are scored in one call, so a retriever that is slower than the sampler gets few
    large batches. `results` raises what `score` raised. A run that is stopped in between leaves the
    thread behind: it ends with the process.

    Args:
        score: rollouts of whole groups -> one Reward per rollout, in the same order.
        in_thread: whether there is a thread at all.
    """

    def __init__(self, score: Callable[[list[Rollout]], list[Reward]], in_thread: bool):
        self.score = score
        self.waiting: SimpleQueue = SimpleQueue()  # groups; None: there are no more
        self.rewards_by_group: dict[int, list[Reward]] = {}
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None
        if in_thread:
            self.thread = threading.Thread(target=self._score_all, name="rewards", daemon=True)

    def submit(self, group: list[Rollout]) -> None:
        """Take a finished group."""
        if self.thread and not self.thread.ident:
            self.thread.start()
        self.waiting.put(group)

    def results(self) -> list[Reward]:
        """Return one Reward per rollout, in the groups' order. Call it once, after all `submit`."""
        self.waiting.put(None)
        if not self.thread:
            self._score_all()
        elif self.thread.ident:  # else it never started: no group was submitted
            self.thread.join()
        if self.error:
            raise self.error

        rewards: list[Reward] = []
        for group in sorted(self.rewards_by_group):
            rewards += self.rewards_by_group[group]
        return rewards

    def _score_all(self) -> None:
        """Score what waits, again and again, until the mark that there is no more."""
        is_last = False
        try:
            while not is_last:
                groups = self._take_waiting()
                is_last = groups[-1] is None
                self._score_groups([group for group in groups if group])
        # Also what would only end this thread: the step must not go on without its rewards.
        except BaseException as e:
            self.error = e

    def _take_waiting(self) -> list[list[Rollout] | None]:
        """Wait for a group and return it with all others that wait."""
        groups = [self.waiting.get()]
        while not self.waiting.empty():
            groups.append(self.waiting.get())
        return groups

    def _score_groups(self, groups: list[list[Rollout]]) -> None:
        """Score some groups in one call."""
        if not groups:
            return
        rollouts: list[Rollout] = []
        for group in groups:
            rollouts += group
        rewards = iter(self.score(rollouts))
        for group in groups:
            self.rewards_by_group[group[0].group] = [next(rewards) for _ in group]
