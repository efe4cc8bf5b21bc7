"""The recommendation view: chosen test queries with the lists that two answers bring, who moved,
and which terms moved it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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

TOP = 10  # of a list that are shown

# queries shown
GAINS = 20

LOSSES = 20

MIDDLE = 10

CHARS = 90  # of a document

TERMS = 6  # of a document's change of score

PAST = 5  # documents of a history


@dataclass
class RankingSearch:
    """How a run's answers become rankings, and what they are judged by. row_of: the retriever's row
    of each document that was found.
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

    def ranked(self, answers: list, ids: list[str], depth: int) -> list[list[str]]:
        """Document ids of each answer's ranking, best first; none for no answer."""
        asked = [i for i, answer in enumerate(answers) if answer is not None]
        lists: list[list[str]] = [[] for _ in answers]
        if asked:
            found = self.task.rank(
                [answers[i] for i in asked],
                [self.rows.get(ids[i], dict(text="")) for i in asked],
                depth,
                self._search,
            )
            for i, ranking in zip(asked, found, strict=True):
                lists[i] = list(ranking[:depth])
        return lists

    def _search(self, queries: list[str], k: int) -> list[list[str]]:
        hits = self.retriever.search(queries, k)[0].tolist()
        names = self.retriever.doc_ids
        found = [[(names[row], row) for row in ranking if row >= 0] for ranking in hits]
        for ranking in found:
            self.row_of |= ranking
        return [[id for id, _ in ranking] for ranking in found]


def open_search(
    config: Config, folder: Path, retriever: Retriever | None = None
) -> RankingSearch | str:
    """What the recommendation view reads, or in one sentence why it cannot. retriever: the run's
    own where it is at hand; else its index is loaded.
    """
    d = config.data
    r = config.retriever
    try:
        task = tasks.build_task(config)
        qrels = readers.read_qrels(d.test_qrels or d.train_qrels, "drop")[0]
        rows = readers.read_rows(d.test_queries or d.train_queries, "drop", task.required_fields)[0]
        if retriever is None and task.uses_retriever:
            place = get_index_dir(r, folder)
            if r.kind in RETRIEVERS_WITH_INDEX and not Path(place).is_dir():
                return f"The run's index is no longer in {place} (seen from here); recr1 index makes it."
            if not Path(d.corpus).is_file():
                return f"The corpus is no longer in {d.corpus} (seen from here)."
            retriever, _ = build_retriever(r)(d.corpus, d.on_bad_line, place, lambda text: None)
    except (ValueError, OSError) as e:
        return f"The run's retriever, corpus or judgements are no longer there (seen from here): {' '.join(str(e).split())}"
    return RankingSearch(
        task,
        retriever if task.uses_retriever else None,
        qrels,
        rows,
        d.corpus,
        d.on_bad_line,
        config.reward.metric,
        config.reward.k_eval,
    )


def choose_queries(change: np.ndarray, differ: Sequence[bool]) -> list[tuple[str, int]]:
    """(why, index) of the queries shown: the largest gains and losses, the middle of those whose
    score changed, and answers that changed nothing.
    """
    order = np.argsort(-change, kind="stable").tolist()
    gains = [i for i in order if change[i] > 0]
    losses = [i for i in reversed(order) if change[i] < 0]
    changed = [i for i in order if change[i] != 0]
    middle = changed[max(0, len(changed) // 2 - MIDDLE // 2) :][:MIDDLE]
    idle = [i for i in range(len(change)) if change[i] == 0 and differ[i]][:MIDDLE]
    picks = []
    taken = set()
    for why, some in (
        ("largest gains", gains[:GAINS]),
        ("largest losses", losses[:LOSSES]),
        ("middle of the changed", middle),
        ("another answer, same score", idle),
    ):
        picks += [(why, i) for i in some if i not in taken]
        taken |= set(some)
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
    """raws: the raw answers; answers: what each of the two sides answered, None for nothing;
    logged: its score by the run. more(i): what else a query's page says.

    {"why": reason when there are no lists, "queries": [...], "documents": {id: text}, "explained":
    whether terms are known, "listed": answers are lists}
    """
    listed = not all(isinstance(raw, str) for raw in raws)
    rows = {} if isinstance(search, str) else search.rows
    found = dict(why="", queries=[], documents={}, explained=False, listed=listed)
    for why, i in picks:
        row = rows.get(ids[i], {})
        found["queries"].append(
            dict(
                why=why,
                id=ids[i],
                raw=row.get("text", ids[i]) if listed else raws[i],
                texts=[format_answer(side[i], raws[i]) for side in answers],
                scores=[float(side[i]) for side in logged],
                about=describe_prompt(row),
                **more(i),
            )
        )
    if isinstance(search, str):
        return found | dict(why=search)
    explained = not listed and hasattr(search.retriever, "explain")
    depth = max(TOP, search.k)
    chosen = [i for _, i in picks]
    off = 0
    wanted = {id for query in found["queries"] for id in query["about"].get("history", [])}
    try:
        ranked = [
            search.ranked([side[i] for i in chosen], [ids[i] for i in chosen], depth)
            for side in answers
        ]
    except Exception as e:  # a retriever's or a task's of the user's own
        return found | dict(
            why=f"The lists could not be made again: {terminal.describe_exception(e)}"
        )
    for n, (i, query) in enumerate(zip(chosen, found["queries"])):
        gains = search.qrels.get(ids[i], {})
        lists = [side[n] for side in ranked]
        off += any(
            abs(METRICS[search.metric](side, gains, search.k) - score) > 1e-6
            for side, score in zip(lists, query["scores"])
        )
        places = [{id: place for place, id in enumerate(side, 1)} for side in lists]
        shown = list(dict.fromkeys([*lists[0][:TOP], *lists[1][:TOP]]))
        wanted |= set(shown)
        query["documents"] = [
            dict(
                id=id,
                gain=gains.get(id, 0.0),
                places=[side.get(id) for side in places],
                terms=_list_moved_terms(search.retriever, query["texts"], search.row_of[id])
                if explained
                else None,
            )
            for id in shown
        ]
        query["relevant"] = sum(gain > 0 for gain in gains.values())
    if off:
        found["why"] = (
            f"Of {len(chosen)} queries {off} have another score today than the run logged: corpus, judgements or index are not the run's any more."
        )
    return found | dict(
        explained=explained, documents=_read_beginnings(search, wanted), depth=depth, top=TOP
    )


def format_answer(answer, raw) -> str | None:
    """An answer as text: a query; a list of the raw list's documents by their places there;
    anything else as JSON.
    """
    if answer is None or isinstance(answer, str):
        return answer
    place = {id: str(i) for i, id in enumerate(raw, 1)} if isinstance(raw, list) else {}
    if isinstance(answer, list) and all(isinstance(id, str) and id in place for id in answer):
        return ", ".join(place[id] for id in answer)
    return json.dumps(answer, ensure_ascii=False)


def describe_prompt(row: dict) -> dict:
    """What a prompt shows beside its text: a profile, and the last of the history's documents."""
    past = [id for id, _ in get_history(row)]
    return (dict(profile=row["profile"][:CHARS]) if row.get("profile") else {}) | (
        dict(history=past[-PAST:], items=len(past)) if past else {}
    )


def _list_moved_terms(retriever: Retriever, texts: list[str | None], row: int) -> list[list]:
    """[term, what it adds to the document's score under the first text, under the second], largest
    change first.
    """
    sides = [dict(retriever.explain(text, row)) if text is not None else {} for text in texts]
    terms = [
        [term, round_digits(sides[0].get(term, 0.0)), round_digits(sides[1].get(term, 0.0))]
        for term in {**sides[0], **sides[1]}
    ]
    return sorted(terms, key=lambda t: -abs(t[2] - t[1]))[:TERMS]


def _read_beginnings(search: RankingSearch, wanted: set[str]) -> dict[str, str]:
    """The documents' first characters, from the corpus' file."""
    found: dict[str, str] = {}
    try:
        for id, contents in readers.iterate_documents(search.corpus, search.on_bad_line, []):
            if id in wanted:
                found[id] = contents[:CHARS]
            if len(found) == len(wanted):
                break
    except (ValueError, OSError):  # moved since: ids stand for themselves
        pass
    return found
