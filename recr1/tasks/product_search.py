"""Product search, Rec-R1's first task: a shopper's words -> the policy's query -> a fixed retriever
-> NDCG (arXiv 2503.24289, section 3).

What the query should be like (words for BM25, a description or a review for a dense retriever) is
the prompt's text: experiments/prompts.
"""

from recr1.tasks.answer_parser import parse_query


class ProductSearch:
    """The answer is a query. What every method is asked for stands in tasks/registry.py."""

    placeholders = ("query",)
    required_fields = ()
    uses_retriever = True

    def __init__(self, rule):
        pass

    def render(self, row, title):
        return (row["text"],)

    def parse(self, completion, row):
        return parse_query(completion)

    def baseline_answer(self, row):
        return row["text"]

    def rank(self, queries, rows, k, search):
        return search(queries, k)
