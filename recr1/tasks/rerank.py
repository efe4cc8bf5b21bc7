"""Product re-ranking, the later task of Rec-R1.

The policy reads a query and the first candidates of a retriever, and writes all of them in a better
order.

This is stricter than the published reward, which takes a list of any length with any members and
refuses only repeats. Here a list that is not a permutation of the candidates has no score, as in
the published evaluation.
"""

from __future__ import annotations

from collections.abc import Callable

from recr1.tasks.candidate_list import CandidateRanking


class Rerank(CandidateRanking):
    placeholders: tuple[str, ...] = ("query", "candidates")
    key = "reranked_items"
    whole = True

    def render(self, row: dict, title: Callable[[str], str]) -> tuple[str, ...]:
        """Return the query and the candidates, one line each."""
        return row["text"], self.format_candidates(row, title)
