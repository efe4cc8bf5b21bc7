"""Which prompts a step has, and random numbers that depend on nothing but their keys (DESIGN
decision 10): resuming needs no generator's state.
"""

from functools import lru_cache

import numpy as np

from recr1.utils.counter_rng import ORDER_STREAM, SHUFFLE_STREAM, hash_keys, to_unit_interval


def count_steps_per_epoch(n: int, per_step: int) -> int:
    """Steps of one pass over n prompts, n // per_step; ValueError when one step asks for more
    prompts than there are.
    """
    if not 1 <= per_step <= n:
        raise ValueError(
            f"{per_step} prompts a step out of {n}: no prompt may come twice in a step, "
            f"so ask for 1 to {n} a step or give more data"
        )
    return n // per_step


def choose_prompts(
    n: int, per_step: int, seed: int, step: int, turn: int = 0, turns: int = 1
) -> np.ndarray:
    """(per_step,) int64 indices into n prompts for this step, counted from 0. Turn 0, 1, ... of
    `turns`: further prompts for the same step, others as long as an epoch has so many steps.

    An epoch is a permutation that depends on (seed, epoch) alone. Its last n % per_step prompts are
    left out, others in each epoch, so no step straddles two epochs and no prompt comes twice in a
    step.
    """
    length = count_steps_per_epoch(n, per_step)
    epoch, place = divmod(step, length)
    place = (place + turn * max(1, length // turns)) % length
    return _permute(n, seed, epoch)[place * per_step : (place + 1) * per_step].copy()


def shuffle_words(text: str, share: float, seed: int, step: int, prompt: int) -> str:
    """With probability `share` the words of `text` in random order, one space between them; else
    `text` as it is.

    Both draws are functions of (seed, step, prompt). ValueError when share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of shuffled prompts must be in [0, 1], got {share}")
    words = text.split()
    # the first one decides, the others sort
    draws = hash_keys(SHUFFLE_STREAM, seed, step, prompt, np.arange(len(words) + 1))
    if to_unit_interval(draws[0]) >= share:
        return text
    return " ".join(words[i] for i in np.argsort(draws[1:], kind="stable"))


@lru_cache(maxsize=2)  # the steps of an epoch share one permutation
def _permute(n, seed, epoch):
    # Not Generator.permutation: numpy may change its stream between versions, and a resumed run
    # must not notice.
    return np.argsort(hash_keys(ORDER_STREAM, seed, epoch, np.arange(n)), kind="stable")
