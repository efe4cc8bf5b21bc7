"""Product search, the first task of Rec-R1 (arXiv 2503.24289, section 3).

The policy reads the words of a shopper and writes a search query. A fixed retriever searches with
it, and NDCG of the ranking is the reward.

The text of the prompt says what the query should be like: words for BM25, a description or a review
for a dense retriever. The prompts are in experiments/configs/prompts.

To make a task of your own, copy this file, change what differs, and name the class in the config
as `task: module:Class`. The interface is `Task` in recr1/tasks/registry.py.
"""

from __future__ import annotations

from collections.abc import Callable

from recr1.config.schema import RewardConfig
from recr1.tasks.answer_parser import parse_query


class ProductSearch:
    """A task whose answer is one search query.

    `row` is always one line of the query file: its "text" and the keys of `required_fields`.
    """

    placeholders: tuple[str, ...] = ("query",)  # names that prompt.user holds in braces: {query}
    required_fields: tuple[str, ...] = ()  # keys that a row must have beside "text"
    uses_retriever = True  # False: `rank` never searches, and no index is built

    def __init__(self, reward: RewardConfig):
        """Receive the config's `reward` section, which this task does not need."""

    def render(self, row: dict, title: Callable[[str], str]) -> tuple[str, ...]:
        """Return one text per placeholder; `title(document id)` is the title of a document."""
        return (row["text"],)

    def parse(self, completion: str, row: dict) -> tuple[str | None, str | None]:
        """Return (answer, None), or (None, name of the error). Never raise."""
        return parse_query(completion)

    def baseline_answer(self, row: dict) -> str:
        """Return the answer that needs no policy: here the shopper's own words.

        Evaluations compare the policy's answers with it.
        """
        return row["text"]

    def rank(
        self,
        answers: list[str],
        rows: list[dict],
        k: int,
        search: Callable[[list[str], int], list[list[str]]],
    ) -> list[list[str]]:
        """Return the document ids of each answer, best first.

        `search(queries, k)` asks the retriever and returns the k best document ids of each query.
        """
        return search(answers, k)
