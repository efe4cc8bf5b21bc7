"""Show items in prompts (titles from the corpus, candidates by label), and read lists of labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from recr1.config.schema import RewardConfig
from recr1.data.readers import DataError, iterate_attributes
from recr1.tasks.answer_parser import parse_answer_json


class Titles(NamedTuple):
    """The titles of the documents that prompts show."""

    get: Callable[[str], str]  # document id -> title
    missing_ids: set[str]  # documents that the corpus does not hold
    dropped: list[str]  # messages about bad lines of the corpus


def list_mentioned(row: dict) -> list[str]:
    """List the documents whose titles a row's prompt may show."""
    history_ids = [doc_id for doc_id, _date in get_history(row)]
    return history_ids + row.get("candidates", [])


def get_history(row: dict) -> list[tuple[str, str]]:
    """Return [(document id, date)], oldest first; the date is empty where the data give none."""
    history = []
    for item in row.get("history", []):
        if isinstance(item, str):
            history.append((item, ""))
        elif len(item) == 1:
            history.append((item[0], ""))
        else:
            history.append((item[0], item[1]))
    return history


def read_titles(path: str, on_bad_line: str, wanted: Iterable[str], words: int = 0) -> Titles:
    """Read the titles of the documents `wanted` from the corpus, or nothing where none is wanted.

    A title is cut to its first `words` words (0: all); a document without a title shows its text. A
    title is one line, whatever white space it holds, so it never looks like several. Raises
    DataError.
    """
    missing_ids = set(wanted)
    title_of: dict[str, str] = {}
    dropped: list[str] = []
    if not missing_ids:
        return Titles(title_of.__getitem__, missing_ids, dropped)

    for doc_id, row in iterate_attributes(path, on_bad_line, dropped):
        if doc_id in missing_ids:
            missing_ids.discard(doc_id)
            title = row.get("title") or row.get("text") or ""
            title_words = title.split()[: words or None]
            title_of[doc_id] = " ".join(title_words)

    if title_of and not any(title_of.values()):
        raise DataError(
            f"{path}: none of the documents that the queries show has a title or a text"
        )
    return Titles(title_of.__getitem__, missing_ids, dropped)


class CandidateRanking:
    """A task whose answer orders the row's candidates, {KEY: ["Item_3", "Item_1", ...]}.

    Nothing is searched. The baseline is the order in which the data give the candidates.
    """

    placeholders: tuple[str, ...]
    required_fields: tuple[str, ...] = ("candidates",)
    uses_retriever = False
    key = ""  # of the list in the answer's JSON
    whole = False  # True: the list must hold every candidate

    def __init__(self, reward: RewardConfig):
        pass

    def format_candidates(self, row: dict, title: Callable[[str], str]) -> str:
        """Format the candidates as lines `Item_1: title`."""
        doc_of_label = label_candidates(row)
        return "\n".join(f"{label}: {title(doc_id)}" for label, doc_id in doc_of_label.items())

    def parse(self, completion: str, row: dict) -> tuple[list[str] | None, str | None]:
        """Return (document ids, best first, None), or (None, error).

        The errors are those of tasks/answer_parser.py and:

        no_list, not_list     no KEY in the object; its value is not a list
        not_label             something in the list is not a string
        unknown_item          a string that is not exactly the label of a candidate
        repeated_item         a label twice
        list_length           not every candidate, where all are required; otherwise an empty list
        """
        answer, error = parse_answer_json(completion)
        if error is not None:
            return None, error
        if not isinstance(answer, dict):
            return None, "not_object"
        if self.key not in answer:
            return None, "no_list"
        labels = answer[self.key]
        if not isinstance(labels, list):
            return None, "not_list"
        if not all(isinstance(label, str) for label in labels):
            return None, "not_label"

        doc_of_label = label_candidates(row)
        if not all(label in doc_of_label for label in labels):
            return None, "unknown_item"
        if len(set(labels)) < len(labels):
            return None, "repeated_item"
        if not labels:
            return None, "list_length"
        if self.whole and len(labels) < len(doc_of_label):
            return None, "list_length"
        return [doc_of_label[label] for label in labels], None

    def baseline_answer(self, row: dict) -> list[str]:
        """Return the candidates in the order of the data."""
        return row["candidates"]

    def rank(
        self,
        answers: list[list[str]],
        rows: list[dict],
        k: int,
        search: Callable[[list[str], int], list[list[str]]],
    ) -> list[list[str]]:
        """Return the answers: they are rankings already."""
        return answers


def label_candidates(row: dict) -> dict[str, str]:
    """Return {"Item_1": document id, ...} of the row's candidates, in their order."""
    return {f"Item_{number}": doc_id for number, doc_id in enumerate(row["candidates"], 1)}
