"""RecLLM-R1's task (arXiv 2506.19235): a user's profile, the history in order of time and a pool of
candidates -> a list of them, best first.

The list may be shorter than the pool. The data give the pool in order of popularity, which is what
the policy is compared with.
"""

from recr1.tasks.candidate_list import CandidateRanking, get_history


class RecommendList(CandidateRanking):
    placeholders = ("profile", "history", "candidates")
    required_fields = ("profile", "history", "candidates")
    key = "items"

    def render(self, row, title):
        past = (
            "\n".join(f"{date}: {title(id)}".removeprefix(": ") for id, date in get_history(row))
            or "none"
        )
        return " ".join(row["profile"].split()) or "unknown", past, self.shown(row, title)
