"""Items as prompts show them: their titles, read from the corpus only where a task needs them;
candidates by label; answers that are lists of labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from recr1.data.readers import DataError, iterate_attributes
from recr1.tasks.answer_parser import parse_answer_json


def list_mentioned(row: dict) -> list[str]:
    """The documents whose titles a row's prompt may show."""
    return [id for id, _ in get_history(row)] + row.get("candidates", [])


def get_history(row: dict) -> list[tuple[str, str]]:
    """[(document id, date)], oldest first; where the data give no date it is empty."""
    return [
        (item, "") if isinstance(item, str) else (item[0], item[1] if len(item) > 1 else "")
        for item in row.get("history", [])
    ]


def read_titles(
    path: str, on_bad_line: str, wanted: Iterable[str], words: int = 0
) -> tuple[Callable[[str], str], set[str], list[str]]:
    """(title of a document id, ids that the corpus lacks, dropped): the first `words` words of the
    title (0: all), of the text where there is none.

    In one line, whatever white space it has: a title never looks like several. Titles of `wanted`
    alone are kept. Raises DataError.
    """
    left = set(wanted)
    titles = {}
    dropped = []
    if left:
        for id, row in iterate_attributes(path, on_bad_line, dropped):
            if id in left:
                left.discard(id)
                titles[id] = " ".join(
                    (row.get("title") or row.get("text") or "").split()[: words or None]
                )
    if titles and not any(titles.values()):
        raise DataError(
            f"{path}: none of the documents that the queries show has a title or a text"
        )
    return titles.__getitem__, left, dropped


class CandidateRanking:
    """A task whose answer orders the row's candidates, {KEY: ["Item_3", "Item_1", ...]}. Nothing is
    searched; the raw list is the given order.
    """

    required_fields = ("candidates",)
    uses_retriever = False
    key = ""  # of the answer's JSON
    whole = False  # every candidate must stand in it

    def __init__(self, rule):
        pass

    def format_candidates(self, row: dict, title: Callable[[str], str]) -> str:
        """The candidates as lines `Item_1: title`."""
        return "\n".join(f"Item_{i}: {title(id)}" for i, id in enumerate(row["candidates"], 1))

    def parse(self, completion: str, row: dict) -> tuple[list[str] | None, str | None]:
        """(document ids, best first, None), or (None, error): those of tasks/answer_parser.py and

        no_list, not_list     no KEY in the object; its value is not a list
        not_label             something in the list is not a string
        unknown_item          a string that is no label of a candidate, letter by letter
        repeated_item         a label twice
        list_length           not every candidate, where all must stand there; else an empty list
        """
        answer, error = parse_answer_json(completion)
        if error is not None:
            return None, error
        if not isinstance(answer, dict):
            return None, "not_object"
        labels = answer.get(self.key)
        if not isinstance(labels, list):
            return None, "not_list" if self.key in answer else "no_list"
        if not all(isinstance(label, str) for label in labels):
            return None, "not_label"
        of = {f"Item_{i}": id for i, id in enumerate(row["candidates"], 1)}
        if not all(label in of for label in labels):
            return None, "unknown_item"
        if len(set(labels)) < len(labels):
            return None, "repeated_item"
        if not labels or self.whole and len(labels) < len(of):
            return None, "list_length"
        return [of[label] for label in labels], None

    def baseline_answer(self, row: dict) -> list[str]:
        return row["candidates"]

    def rank(self, answers, rows, k, search):
        return answers
