"""Sequential recommendation, Rec-R1's All_Beauty task: what somebody had -> the policy's query -> a
fixed retriever -> the next item.
"""

from recr1.tasks.candidate_list import get_history
from recr1.tasks.product_search import ProductSearch


class Sequential(ProductSearch):
    """As product search, but the prompt shows the history's titles, the oldest first. The raw query
    is the last one: the row's text.
    """

    placeholders = ("history",)
    required_fields = ("history",)

    def __init__(self, rule):
        self.remove_seen = rule.remove_seen

    def render(self, row, title):
        return (
            "\n".join(f"Item {i}: {title(id)}" for i, (id, _) in enumerate(get_history(row), 1))
            or "none",
        )

    def rank(self, queries, rows, k, search):
        """With reward.remove_seen what stands in the history is taken out of the ranking, and what
        comes behind it moves up.
        """
        if not self.remove_seen:
            return search(queries, k)
        seen = [{id for id, _ in get_history(row)} for row in rows]
        return [
            [id for id in ranked if id not in own][:k]
            for ranked, own in zip(search(queries, k + max(map(len, seen))), seen)
        ]
