"""Rewards of groups that have ended, made in a thread while others are still being sampled.

Where the policy samples on the CPU itself and the retriever computes there too, the two would only
take each other's cores (9% of the quickstart's step): then nothing is done beside, and `results`
scores all groups in one call.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import Callable

from recr1.data_types import Reward, Rollout


class AsyncRewards:
    """`submit` takes a group as it ends, `results` waits for the rest: one Reward per rollout, in
    the groups' order.

    What waits is scored in one call, so a retriever that is slower than the sampler gets few large
    batches. An exception of `score` comes out of `results`. A run that is stopped in between leaves
    the thread behind: it ends with the process. beside: whether there is a thread at all.
    """

    def __init__(self, score: Callable[[list[Rollout]], list[Reward]], beside: bool):
        self.score = score
        self.waiting = SimpleQueue()
        self.rewards = {}
        self.error = None
        self.thread = (
            threading.Thread(target=self._work, name="rewards", daemon=True) if beside else None
        )

    def submit(self, group: list[Rollout]) -> None:
        if self.thread and not self.thread.ident:
            self.thread.start()
        self.waiting.put(group)

    def results(self) -> list[Reward]:
        """Call it once, after the last `submit`."""
        self.waiting.put(None)
        if not self.thread:
            self._work()
        elif self.thread.ident:
            self.thread.join()
        if self.error:
            raise self.error
        return [reward for _, rewards in sorted(self.rewards.items()) for reward in rewards]

    def _work(self) -> None:
        last = False
        try:
            while not last:
                groups = [self.waiting.get()]
                while not self.waiting.empty():
                    groups.append(self.waiting.get())
                last = groups[-1] is None
                groups = [group for group in groups if group]
                rewards = iter(
                    self.score([rollout for group in groups for rollout in group]) if groups else ()
                )
                for group in groups:
                    self.rewards[group[0].group] = [next(rewards) for _ in group]
        except (
            BaseException
        ) as e:  # also what would only end this thread: the step must not go on without its rewards
            self.error = e
