"""The task of RecLLM-R1 (arXiv 2506.19235).

The policy reads a profile of the user, the history in order of time and a pool of candidates, and
writes a list of candidates, best first. The list may be shorter than the pool.

The data give the pool in order of popularity, which is the baseline.
"""

from __future__ import annotations

from collections.abc import Callable

from recr1.tasks.candidate_list import CandidateRanking, get_history


class RecommendList(CandidateRanking):
    placeholders: tuple[str, ...] = ("profile", "history", "candidates")
    required_fields: tuple[str, ...] = ("profile", "history", "candidates")
    key = "items"

    def render(self, row: dict, title: Callable[[str], str]) -> tuple[str, ...]:
        """Return the profile on one line, the history as lines `date: title`, the candidates."""
        profile = " ".join(row["profile"].split()) or "unknown"
        lines = []
        for doc_id, date in get_history(row):
            line = f"{date}: {title(doc_id)}"
            lines.append(line.removeprefix(": "))  # no date
        history = "\n".join(lines) or "none"
        return profile, history, self.format_candidates(row, title)
