"""Random numbers that depend only on their keys: seed, step, prompt, sibling, token.
A run that resumes needs no generator's state.

Legend: P prompts, G siblings, T tokens.
"""

import numpy as np

# The first key says what the numbers are for: streams with equal further keys stay unrelated.
SAMPLING_STREAM = 0
ORDER_STREAM = 1
SHUFFLE_STREAM = 2


def draw_uniforms(
    seed: int, step: int, prompts: np.ndarray, siblings: int, tokens: int
) -> np.ndarray:
    """Return (P, G, T) float64 in (0, 1), never 0 or 1, for prompts (P,) int, G siblings and T
    tokens.

    Each value is a function of (seed, step, prompt, sibling, token) alone: not of the other
    prompts, nor of G or T. Keep it in float64: in float32 the largest values round to 1.
    """
    prompt_keys = np.asarray(prompts)[:, None, None]  # (P, 1, 1)
    sibling_keys = np.arange(siblings)[:, None]  # (G, 1)
    token_keys = np.arange(tokens)  # (T,)
    bits = hash_keys(SAMPLING_STREAM, seed, step, prompt_keys, sibling_keys, token_keys)
    return to_unit_interval(bits)


def hash_keys(*keys: int | np.ndarray) -> np.ndarray:
    """Return the hash of integer keys, broadcast together, as uint64.

    For each key, the new hash is output number `key` of a splitmix64 generator (Steele, Lea & Flood
    2014) that was seeded with the hash of the keys before it.
    """
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        for key in keys:
            output_number = np.asarray(key).astype(np.uint64) + np.uint64(1)
            mixed = state + output_number * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = mixed ^ (mixed >> np.uint64(31))
    return state


def to_unit_interval(bits: np.ndarray) -> np.ndarray:
    """Return uint64 as float64 in (0, 1)."""
    # 52 bits and a half, not 53: 2^53 - 1/2 has no float64, it would round up and the value would
    # be 1.
    return ((bits >> np.uint64(12)) + 0.5) * 2.0**-52
