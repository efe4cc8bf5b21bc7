"""Generate a corpus of Zipf-Mandelbrot words with topics for the retrieval benches.

A million real titles are not at hand.

65% of a document's words are drawn from p(rank) ~ (rank + 2.7) ** -1.05 over 160,000 words, 35%
from its topic: one of 2,000, each a Zipf-Mandelbrot order over 60 words of its own (drawn from the
same distribution, ranks above 50). Lengths are Poisson. The ten most frequent words stand in 8-26%
of the documents. Queries are as long as an LLM's: 10 to 40 distinct words, half from one topic. It
has no real co-occurrence, typos or duplicates.
"""

from __future__ import annotations

import numpy as np

WORDS = 160_000
TOPICS = 2_000
PER_TOPIC = 60
SHARE = 0.35
EXPONENT = 1.05
SHIFT = 2.7


class Zipf:
    """Draw documents and queries of words, which are numbers.

    `texts` spells them so that the analyzer keeps each as one token.
    """

    def __init__(self, seed: int = 0, words: int = WORDS):
        self.random = np.random.default_rng(seed)
        self.words = words
        self.all = cumulate_zipf(words)
        self.own = cumulate_zipf(PER_TOPIC)
        start = self.all[50]
        self.topics = np.searchsorted(
            self.all, start + (1 - start) * self.random.random((TOPICS, PER_TOPIC))
        ).astype(np.int32)

    def corpus(self, documents: int, mean_length: int = 15) -> tuple[np.ndarray, np.ndarray]:
        """Draw tokens (N,) int32 of all documents in a row, and lengths (documents,)."""
        lengths = np.clip(self.random.poisson(mean_length, documents), 3, None)
        tokens = np.empty(lengths.sum(), np.int32)
        at = 0
        # the masks of a whole million would take gigabytes
        for part in np.array_split(lengths, max(1, documents // 100_000)):
            n = part.sum()
            topic = np.repeat(self.random.integers(TOPICS, size=len(part)), part)
            own = self.topics[topic, np.searchsorted(self.own, self.random.random(n))]
            tokens[at : at + n] = np.where(
                self.random.random(n) < SHARE, own, np.searchsorted(self.all, self.random.random(n))
            )
            at += n
        return tokens, lengths

    def queries(self, n: int) -> list[list[int]]:
        """Draw distinct words for each of n queries."""
        found = []
        for size in self.random.integers(10, 41, n):
            topic = self.topics[self.random.integers(TOPICS)]
            query = {}
            while len(query) < size:
                word = (
                    topic[np.searchsorted(self.own, self.random.random())]
                    if self.random.random() < 0.5
                    else np.searchsorted(self.all, self.random.random())
                )
                query[min(int(word), self.words - 1)] = None
            found.append(list(query))
        return found


def cumulate_zipf(n: int) -> np.ndarray:
    """Return the cumulative probabilities (n,) of the Zipf-Mandelbrot distribution over n ranks."""
    weights = (np.arange(1, n + 1) + SHIFT) ** -EXPONENT
    return np.cumsum(weights / weights.sum())


def spell_words(tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
    """Spell the words."""
    words = [f"w{i}" for i in tokens.tolist()]
    ends = np.cumsum(lengths).tolist()
    return [" ".join(words[a:b]) for a, b in zip([0, *ends], ends)]
