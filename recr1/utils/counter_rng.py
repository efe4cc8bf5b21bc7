"""Random numbers that depend on nothing but their keys: seed, step, prompt, sibling, token (DESIGN decision 10)."""

import numpy as np


def draw_uniforms(
    seed: int, step: int, prompts: np.ndarray, siblings: int, tokens: int
) -> np.ndarray:
    """(P, G, T) float64 in (0, 1), never 0 or 1, for prompts (P,) int, G siblings, T tokens.

    Each value is a function of (seed, step, prompt, sibling, token) alone: not of the other
    prompts, nor of G or T. Keep it in float64: in float32 the largest values round to 1.
    """
    prompts = np.asarray(prompts)[:, None, None]
    return to_unit_interval(
        hash_keys(
            SAMPLING_STREAM, seed, step, prompts, np.arange(siblings)[:, None], np.arange(tokens)
        )
    )


# the first key of each use: streams with equal further keys stay unrelated
SAMPLING_STREAM, ORDER_STREAM, SHUFFLE_STREAM = range(3)


def hash_keys(*keys):
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


def to_unit_interval(bits):
    # 52 bits and a half, not 53: 2^53 - 1/2 has no float64, it would round up and the value would
    # be 1.
    return ((bits >> np.uint64(12)) + 0.5) * 2.0**-52
