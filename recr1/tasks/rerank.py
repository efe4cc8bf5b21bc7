"""Product re-ranking (Rec-R1's later task): a query and the retriever's first candidates -> all of
them in a better order.

Stricter than the published reward, which takes a list of any length with any members and only
refuses repeats: here a list that is not a permutation of the candidates has no score, as in the
published evaluation.
"""

from recr1.tasks.candidate_list import CandidateRanking


class Rerank(CandidateRanking):
    placeholders = ("query", "candidates")
    key = "reranked_items"
    whole = True

    def render(self, row, title):
        return row["text"], self.shown(row, title)
