"""Which prompts a step has, and random numbers that depend on nothing but their keys (DESIGN
decision 10): resuming needs no generator's state.
"""

from functools import lru_cache

import numpy as np


def steps_per_epoch(n: int, per_step: int) -> int:
    """Steps of one pass over n prompts, n // per_step; ValueError when one step asks for more
    prompts than there are.
    """
    if not 1 <= per_step <= n:
        raise ValueError(
            f"{per_step} prompts a step out of {n}: no prompt may come twice in a step, "
            f"so ask for 1 to {n} a step or give more data"
        )
    return n // per_step


def prompt_order(
    n: int, per_step: int, seed: int, step: int, turn: int = 0, turns: int = 1
) -> np.ndarray:
    """(per_step,) int64 indices into n prompts for this step, counted from 0. Turn 0, 1, ... of
    `turns`: further prompts for the same step, others as long as an epoch has so many steps.

    An epoch is a permutation that depends on (seed, epoch) alone. Its last n % per_step prompts are
    left out, others in each epoch, so no step straddles two epochs and no prompt comes twice in a
    step.
    """
    length = steps_per_epoch(n, per_step)
    epoch, place = divmod(step, length)
    place = (place + turn * max(1, length // turns)) % length
    return _permutation(n, seed, epoch)[place * per_step : (place + 1) * per_step].copy()


def uniforms(seed: int, step: int, prompts: np.ndarray, siblings: int, tokens: int) -> np.ndarray:
    """(P, G, T) float64 in (0, 1), never 0 or 1, for prompts (P,) int, G siblings, T tokens.

    Each value is a function of (seed, step, prompt, sibling, token) alone: not of the other
    prompts, nor of G or T. Keep it in float64: in float32 the largest values round to 1.
    """
    prompts = np.asarray(prompts)[:, None, None]
    return _unit(
        _hash(_SAMPLING, seed, step, prompts, np.arange(siblings)[:, None], np.arange(tokens))
    )


def shuffle_words(text: str, share: float, seed: int, step: int, prompt: int) -> str:
    """With probability `share` the words of `text` in random order, one space between them; else
    `text` as it is.

    Both draws are functions of (seed, step, prompt). ValueError when share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of shuffled prompts must be in [0, 1], got {share}")
    words = text.split()
    # the first one decides, the others sort
    draws = _hash(_SHUFFLE, seed, step, prompt, np.arange(len(words) + 1))
    if _unit(draws[0]) >= share:
        return text
    return " ".join(words[i] for i in np.argsort(draws[1:], kind="stable"))


# the first key of each use: streams with equal further keys stay unrelated
_SAMPLING, _ORDER, _SHUFFLE = range(3)


def _hash(*keys):
    """Integer keys, broadcast together -> uint64: each step is output number `key` of a splitmix64
    generator (Steele, Lea & Flood 2014) that was seeded with the hash of the keys before it.
    """
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        for key in keys:
            mixed = state + (np.asarray(key).astype(np.uint64) + np.uint64(1)) * np.uint64(
                0x9E3779B97F4A7C15
            )
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = mixed ^ (mixed >> np.uint64(31))
    return state


def _unit(bits):
    # 52 bits and a half, not 53: 2^53 - 1/2 has no float64, it would round up and the value would
    # be 1.
    return ((bits >> np.uint64(12)) + 0.5) * 2.0**-52


@lru_cache(maxsize=2)  # the steps of an epoch share one permutation
def _permutation(n, seed, epoch):
    # Not Generator.permutation: numpy may change its stream between versions, and a resumed run
    # must not notice.
    return np.argsort(_hash(_ORDER, seed, epoch, np.arange(n)), kind="stable")
