"""Choose which prompts a step has, by random numbers that depend on nothing but their keys:
resuming needs no generator's state.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np

from recr1.data_types import Prompt
from recr1.utils.counter_rng import ORDER_STREAM, SHUFFLE_STREAM, hash_keys, to_unit_interval


def count_steps_per_epoch(n: int, per_step: int) -> int:
    """Return the steps of one pass over n prompts, n // per_step.

    Raises ValueError when one step asks for more prompts than there are.
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
    """Return (per_step,) int64 indices into n prompts for a step, counted from 0.

    An epoch is a permutation that depends on (seed, epoch) alone. Its last n % per_step prompts are
    left out, others in each epoch, so no step straddles two epochs and no prompt comes twice in a
    step. Turns 0, 1, ... of `turns` are further prompts for the same step: other ones, as long as
    an epoch has so many steps.
    """
    steps_per_epoch = count_steps_per_epoch(n, per_step)
    epoch, step_of_epoch = divmod(step, steps_per_epoch)
    shift = turn * max(1, steps_per_epoch // turns)
    index = (step_of_epoch + shift) % steps_per_epoch
    order = _permute(n, seed, epoch)
    return order[index * per_step : (index + 1) * per_step].copy()


def shuffle_words(text: str, share: float, seed: int, step: int, prompt: int) -> str:
    """Return, with probability `share`, the words of `text` in random order with one space between
    them; else `text` as it is.

    Both draws are functions of (seed, step, prompt). Raises ValueError when share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of shuffled prompts must be in [0, 1], got {share}")
    words = text.split()
    hashes = hash_keys(SHUFFLE_STREAM, seed, step, prompt, np.arange(len(words) + 1))
    if to_unit_interval(hashes[0]) >= share:  # the first decides, the others sort
        return text
    order = np.argsort(hashes[1:], kind="stable")
    return " ".join(words[i] for i in order)


def shuffle_prompt(
    prompt: Prompt, share: float, seed: int, step: int, encode: Callable[[str], tuple[int, ...]]
) -> Prompt:
    """Return the prompt with its words in another order, or the same, as `shuffle_words` says.

    encode: gives the prompt ids of a text.
    """
    if not share:
        return prompt
    text = shuffle_words(prompt.text, share, seed, step, prompt.index)
    if text == prompt.text:
        return prompt
    return replace(prompt, text=text, ids=encode(text))


@lru_cache(maxsize=2)  # the steps of an epoch share one permutation
def _permute(n: int, seed: int, epoch: int) -> np.ndarray:
    # Not Generator.permutation: numpy may change its stream between versions, and a resumed run
    # must not notice.
    hashes = hash_keys(ORDER_STREAM, seed, epoch, np.arange(n))
    return np.argsort(hashes, kind="stable")
