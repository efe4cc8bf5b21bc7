"""Make the recommendation view.

It shows chosen test queries with the lists that two answers bring, which documents moved, and
which terms moved them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recr1.config.schema import Config
from recr1.data import readers
from recr1.report.record import round_digits
from recr1.retrieval.factory import RETRIEVERS_WITH_INDEX, build_retriever, get_index_dir
from recr1.retrieval.interface import Retriever
from recr1.tasks import registry as tasks
from recr1.tasks.candidate_list import get_history
from recr1.tasks.registry import Task
from recr1.tasks.rewards import METRICS
from recr1.utils import terminal

LIST_DEPTH = 10  # documents of a list that are shown

# queries that are shown
MAX_GAINS = 20
MAX_LOSSES = 20
MAX_MIDDLE = 10

MAX_CHARS = 90  # of a document

MAX_TERMS = 6  # of a document's change of score

MAX_HISTORY = 5  # documents of a history

SCORE_TOLERANCE = 1e-6  # a larger difference to the logged score is another score


@dataclass
class RankingSearch:
    """Turn a run's answers into rankings, with all that they are judged by.

    retriever: None where the task uses none; rows: {id: the query's line of the data}; row_of: the
    retriever's row of each document that a search has returned.
    """

    task: Task
    retriever: Retriever | None
    qrels: dict[str, dict[str, float]]
    rows: dict[str, dict]
    corpus: str
    on_bad_line: str
    metric: str
    k: int
    row_of: dict[str, int] = field(default_factory=dict)

    def rank_answers(self, answers: list, ids: list[str], depth: int) -> list[list[str]]:
        """Return the document ids of each answer's ranking, best first; [] for no answer."""
        given = [index for index, answer in enumerate(answers) if answer is not None]
        rankings: list[list[str]] = [[] for _ in answers]
        if not given:
            return rankings
        given_answers = [answers[index] for index in given]
        given_rows = [self.rows.get(ids[index], dict(text="")) for index in given]
        given_rankings = self.task.rank(given_answers, given_rows, depth, self._search)
        for index, ranking in zip(given, given_rankings, strict=True):
            rankings[index] = list(ranking[:depth])
        return rankings

    def _search(self, queries: list[str], k: int) -> list[list[str]]:
        """Return each query's document ids, and note the retriever's row of each document."""
        assert self.retriever is not None, "the task uses no retriever"
        rows_by_query, _ = self.retriever.search(queries, k)
        doc_ids = self.retriever.doc_ids
        rankings = []
        for rows in rows_by_query.tolist():
            hits = [(doc_ids[row], row) for row in rows if row >= 0]
            self.row_of.update(hits)
            rankings.append([doc_id for doc_id, _ in hits])
        return rankings


def open_search(
    config: Config, folder: Path, retriever: Retriever | None = None
) -> RankingSearch | str:
    """Open what the recommendation view reads, or say in one sentence why it cannot be opened.

    retriever: the run's own; without it the run's index is loaded.
    """
    try:
        task = tasks.build_task(config)
        data = config.data
        qrels, _ = readers.read_qrels(data.test_qrels or data.train_qrels, "drop")
        queries_path = data.test_queries or data.train_queries
        rows = readers.read_rows(queries_path, "drop", task.required_fields)[0]
        if not task.uses_retriever:
            retriever = None
        elif retriever is None:
            index_dir = get_index_dir(config.retriever, folder)
            has_index = config.retriever.kind in RETRIEVERS_WITH_INDEX
            if has_index and not Path(index_dir).is_dir():
                return (
                    f"The run's index is no longer in {index_dir} (seen from here); "
                    "recr1 index makes it."
                )
            if not Path(data.corpus).is_file():
                return f"The corpus is no longer in {data.corpus} (seen from here)."
            build = build_retriever(config.retriever)
            retriever, _ = build(data.corpus, data.on_bad_line, index_dir, lambda text: None)
    except (ValueError, OSError) as e:
        reason = " ".join(str(e).split())
        return (
            "The run's retriever, corpus or judgements are no longer there (seen from here): "
            f"{reason}"
        )
    return RankingSearch(
        task=task,
        retriever=retriever,
        qrels=qrels,
        rows=rows,
        corpus=data.corpus,
        on_bad_line=data.on_bad_line,
        metric=config.reward.metric,
        k=config.reward.k_eval,
    )


def choose_queries(change: np.ndarray, differ: Sequence[bool]) -> list[tuple[str, int]]:
    """Choose the queries that are shown: (why, index).

    They are the largest gains and losses, the middle of those whose score changed, and answers that
    changed nothing.

    Args:
        change: the change of each query's score, (Q,).
        differ: whether the query's two answers differ.
    """
    by_gain = np.argsort(-change, kind="stable").tolist()
    gains = [index for index in by_gain if change[index] > 0]
    losses = [index for index in reversed(by_gain) if change[index] < 0]
    changed = [index for index in by_gain if change[index] != 0]
    middle_start = max(0, len(changed) // 2 - MAX_MIDDLE // 2)
    same_score = [index for index in range(len(change)) if change[index] == 0 and differ[index]]
    candidates = {
        "largest gains": gains[:MAX_GAINS],
        "largest losses": losses[:MAX_LOSSES],
        "middle of the changed": changed[middle_start:][:MAX_MIDDLE],
        "another answer, same score": same_score[:MAX_MIDDLE],
    }

    # A query is shown for the first of its reasons.
    picks = []
    picked_indices = set()
    for why, indices in candidates.items():
        for index in indices:
            if index not in picked_indices:
                picks.append((why, index))
        picked_indices.update(indices)
    return picks


def describe_rankings(
    search: RankingSearch | str,
    picks: list[tuple[str, int]],
    ids: list[str],
    raws: list,
    answers: tuple[list, list],
    logged: tuple[np.ndarray, np.ndarray],
    more: Callable[[int], dict],
) -> dict:
    """Return the chosen queries with the lists that the two sides' answers bring.

    Args:
        search: what makes the lists, or why there are none.
        picks: the chosen queries, (why, index).
        raws: the raw answers.
        answers: what each of the two sides answered, None for no answer.
        logged: the score of each side as the run logged it, each (Q,).
        more: what else a query's page shows, from the query's index.

    Returns:
        {"why": reason when there are no lists, "queries": [...], "documents": {id: text},
        "explained": whether terms are known, "listed": answers are lists}
    """
    is_list = not all(isinstance(raw, str) for raw in raws)
    data_rows = {} if isinstance(search, str) else search.rows
    view: dict[str, Any] = dict(why="", queries=[], documents={}, explained=False, listed=is_list)
    for why, index in picks:
        row = data_rows.get(ids[index], {})
        query = dict(
            why=why,
            id=ids[index],
            raw=row.get("text", ids[index]) if is_list else raws[index],
            texts=[format_answer(side[index], raws[index]) for side in answers],
            scores=[float(side[index]) for side in logged],
            about=describe_prompt(row),
        )
        view["queries"].append(query | more(index))
    if isinstance(search, str):
        return view | dict(why=search)

    # Each side's lists are made again.
    indices = [index for _, index in picks]
    picked_ids = [ids[index] for index in indices]
    depth = max(LIST_DEPTH, search.k)
    rankings = []
    try:
        for side in answers:
            side_answers = [side[index] for index in indices]
            rankings.append(search.rank_answers(side_answers, picked_ids, depth))
    except Exception as e:  # a retriever or a task of the user's own may raise anything
        reason = terminal.describe_exception(e)
        return view | dict(why=f"The lists could not be made again: {reason}")

    is_explained = not is_list and hasattr(search.retriever, "explain")
    _add_lists(view, search, rankings, is_explained)
    return view | dict(depth=depth, top=LIST_DEPTH)


def _add_lists(
    view: dict, search: RankingSearch, rankings: list[list[list[str]]], is_explained: bool
) -> None:
    """Add to the view's queries the two sides' lists, and to the view the documents' texts.

    Where a list has another score than the run logged for it, the view says so.
    """
    num_changed = 0
    shown_ids = set()
    for query, *lists in zip(view["queries"], *rankings):
        num_changed += _has_other_score(search, query, lists)
        _add_documents(search, query, lists, is_explained)
        shown_ids.update(query["about"].get("history", []))
        shown_ids.update(document["id"] for document in query["documents"])
    if num_changed:
        view["why"] = (
            f"Of {len(view['queries'])} queries {num_changed} have another score today than the "
            "run logged: corpus, judgements or index are not the run's any more."
        )
    view["explained"] = is_explained
    view["documents"] = _read_beginnings(search, shown_ids)


def _has_other_score(search: RankingSearch, query: dict, lists: list[list[str]]) -> bool:
    """Return whether one side's list has another score than the run logged for it."""
    relevance = search.qrels.get(query["id"], {})
    compute_metric = METRICS[search.metric]
    for ranking, logged_score in zip(lists, query["scores"]):
        score = compute_metric(ranking, relevance, search.k)
        if abs(score - logged_score) > SCORE_TOLERANCE:
            return True
    return False


def _add_documents(
    search: RankingSearch, query: dict, lists: list[list[str]], is_explained: bool
) -> None:
    """Add to a query the documents at the tops of its two lists, with their places in both."""
    relevance = search.qrels.get(query["id"], {})
    places_by_side = [{id: place for place, id in enumerate(ids, 1)} for ids in lists]
    first, second = lists
    documents = []
    # a dict keeps the order of the first list, then the second's other documents
    for id in dict.fromkeys([*first[:LIST_DEPTH], *second[:LIST_DEPTH]]):
        terms = None
        if is_explained:
            terms = _list_moved_terms(search.retriever, query["texts"], search.row_of[id])
        places = [side.get(id) for side in places_by_side]
        documents.append(dict(id=id, gain=relevance.get(id, 0.0), places=places, terms=terms))
    query["documents"] = documents
    query["relevant"] = sum(gain > 0 for gain in relevance.values())


def format_answer(answer: object, raw: object) -> str | None:
    """Format an answer as text.

    A query stays as it is; a list of the raw list's documents becomes their places in that list;
    anything else becomes JSON.
    """
    if answer is None or isinstance(answer, str):
        return answer
    places = {}
    if isinstance(raw, list):
        places = {id: str(place) for place, id in enumerate(raw, 1)}
    if isinstance(answer, list) and all(isinstance(id, str) and id in places for id in answer):
        return ", ".join(places[id] for id in answer)
    return json.dumps(answer, ensure_ascii=False)


def describe_prompt(row: dict) -> dict:
    """Return what a prompt shows beside its text: a profile, the last documents of a history."""
    about = {}
    if row.get("profile"):
        about["profile"] = row["profile"][:MAX_CHARS]
    history_ids = [id for id, _ in get_history(row)]
    if history_ids:
        about["history"] = history_ids[-MAX_HISTORY:]
        about["items"] = len(history_ids)
    return about


def _list_moved_terms(retriever: Any, texts: list[str | None], row: int) -> list[list]:
    """Return the terms that moved a document, largest change first.

    Each is [term, what it adds to the document's score under the first text, under the second].
    `retriever` has the method `explain`, which a Retriever need not have.
    """
    weights_by_side = []
    for text in texts:
        term_weights = {} if text is None else dict(retriever.explain(text, row))
        weights_by_side.append(term_weights)
    first, second = weights_by_side
    moved_terms = []
    for term in first | second:
        first_weight = round_digits(first.get(term, 0.0))
        second_weight = round_digits(second.get(term, 0.0))
        moved_terms.append([term, first_weight, second_weight])
    moved_terms.sort(key=lambda moved: -abs(moved[2] - moved[1]))
    return moved_terms[:MAX_TERMS]


def _read_beginnings(search: RankingSearch, ids: set[str]) -> dict[str, str]:
    """Read the first characters of the documents `ids` from the corpus file."""
    beginnings: dict[str, str] = {}
    try:
        for id, contents in readers.iterate_documents(search.corpus, search.on_bad_line, []):
            if id in ids:
                beginnings[id] = contents[:MAX_CHARS]
            if len(beginnings) == len(ids):
                break
    except (ValueError, OSError):
        pass  # the corpus was moved since: the page shows ids instead
    return beginnings
