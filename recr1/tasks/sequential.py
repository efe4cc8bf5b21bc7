"""Sequential recommendation, the All_Beauty task of Rec-R1.

The policy reads what a person bought, in order, and writes a search query. A fixed retriever should
find the item that the person bought next.
"""

from __future__ import annotations

from collections.abc import Callable

from recr1.config.schema import RewardConfig
from recr1.tasks.candidate_list import get_history
from recr1.tasks.product_search import ProductSearch


class Sequential(ProductSearch):
    """As product search, but the prompt shows the titles of the history, the oldest first.

    The baseline query is the row's text: the title of the last item.
    """

    placeholders: tuple[str, ...] = ("history",)
    required_fields: tuple[str, ...] = ("history",)

    def __init__(self, reward: RewardConfig):
        self.remove_seen = reward.remove_seen

    def render(self, row: dict, title: Callable[[str], str]) -> tuple[str, ...]:
        """Return the history as lines `Item 1: title`, or "none"."""
        lines = []
        for number, (doc_id, _date) in enumerate(get_history(row), 1):
            lines.append(f"Item {number}: {title(doc_id)}")
        return ("\n".join(lines) or "none",)

    def rank(
        self,
        answers: list[str],
        rows: list[dict],
        k: int,
        search: Callable[[list[str], int], list[list[str]]],
    ) -> list[list[str]]:
        """Return the document ids of each query, best first.

        With reward.remove_seen the items of the history are removed, and later hits move up.
        """
        if not self.remove_seen:
            return search(answers, k)

        seen_ids = []  # per query
        for row in rows:
            seen_ids.append({doc_id for doc_id, _date in get_history(row)})

        # Search deeper by the longest history: k hits remain even if all of it is found.
        max_seen = max(map(len, seen_ids))
        unseen_rankings = []
        for ranking, seen in zip(search(answers, k + max_seen), seen_ids):
            unseen = [doc_id for doc_id in ranking if doc_id not in seen]
            unseen_rankings.append(unseen[:k])
        return unseen_rankings
