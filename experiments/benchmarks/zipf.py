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
    """Draw documents and queries of words, which are numbers below `words`."""

    def __init__(self, seed: int = 0, words: int = WORDS):
        self.random = np.random.default_rng(seed)
        self.words = words
        self.cumulative = cumulate_zipf(words)
        self.topic_cumulative = cumulate_zipf(PER_TOPIC)
        start = self.cumulative[50]
        draws = start + (1 - start) * self.random.random((TOPICS, PER_TOPIC))
        self.topics = np.searchsorted(self.cumulative, draws).astype(np.int32)

    def draw_corpus(self, documents: int, mean_length: int = 15) -> tuple[np.ndarray, np.ndarray]:
        """Draw tokens (N,) int32 of all documents in a row, and lengths (documents,)."""
        lengths = np.clip(self.random.poisson(mean_length, documents), 3, None)
        tokens = np.empty(lengths.sum(), np.int32)
        start = 0
        # the masks of a whole million would take gigabytes
        parts = max(1, documents // 100_000)
        for part in np.array_split(lengths, parts):
            end = start + part.sum()
            tokens[start:end] = self.draw_tokens(part)
            start = end
        return tokens, lengths

    def draw_tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Draw the tokens of documents of these lengths, each of one topic."""
        count = lengths.sum()
        topic = np.repeat(self.random.integers(TOPICS, size=len(lengths)), lengths)
        topic_ranks = np.searchsorted(self.topic_cumulative, self.random.random(count))
        topic_words = self.topics[topic, topic_ranks]
        is_of_topic = self.random.random(count) < SHARE
        words = np.searchsorted(self.cumulative, self.random.random(count))
        return np.where(is_of_topic, topic_words, words)

    def draw_queries(self, count: int) -> list[list[int]]:
        """Draw distinct words for each query."""
        queries = []
        for size in self.random.integers(10, 41, count):
            topic = self.topics[self.random.integers(TOPICS)]
            query = {}
            while len(query) < size:
                word = min(self.draw_word(topic), self.words - 1)
                query[word] = None
            queries.append(list(query))
        return queries

    def draw_word(self, topic: np.ndarray) -> int:
        """Draw a word, half of the times from the topic."""
        if self.random.random() < 0.5:
            rank = np.searchsorted(self.topic_cumulative, self.random.random())
            return int(topic[rank])
        return int(np.searchsorted(self.cumulative, self.random.random()))


def cumulate_zipf(n: int) -> np.ndarray:
    """Return the cumulative probabilities (n,) of the Zipf-Mandelbrot distribution over n ranks."""
    ranks = np.arange(1, n + 1)
    weights = (ranks + SHIFT) ** -EXPONENT
    return np.cumsum(weights / weights.sum())
