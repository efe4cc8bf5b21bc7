"""The recommendation view: chosen test queries with the lists that two texts bring, who moved, and which terms moved it."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import data
from ..config import Config
from ..metrics import ndcg
from ..retrieval.base import Retriever
from ..retrieval.make import KEPT, directory_of, make
from .record import short

TOP = 10                                 # of a list that are shown
GAINS, LOSSES, MIDDLE = 20, 20, 10       # queries shown
CHARS = 90                               # of a document
TERMS = 6                                # of a document's change of score


@dataclass
class Search:
    """A run's retriever, judgements and corpus."""
    retriever: Retriever
    qrels: dict[str, dict[str, float]]
    corpus: str
    on_bad_line: str
    k: int


def opened(config: Config, folder: Path, retriever: Retriever | None = None) -> Search | str:
    """What the recommendation view reads, or in one sentence why it cannot. retriever: the run's own where it is at hand; else its index is loaded."""
    d, r = config.data, config.retriever
    try:
        qrels = data.read_qrels(d.test_qrels or d.train_qrels, d.on_bad_line)[0]
        if retriever is None:
            place = directory_of(r, folder)
            if r.kind in KEPT and not Path(place).is_dir():
                return f"The run's index is no longer in {place} (seen from here); recr1 index makes it."
            if not Path(d.corpus).is_file():
                return f"The corpus is no longer in {d.corpus} (seen from here)."
            retriever, _ = make(r)(d.corpus, d.on_bad_line, place, lambda text: None)
    except (ValueError, OSError) as e:
        return f"The run's retriever, corpus or judgements are no longer there (seen from here): {' '.join(str(e).split())}"
    return Search(retriever, qrels, d.corpus, d.on_bad_line, config.reward.k_eval)


def choose(change: np.ndarray, differ: Sequence[bool]) -> list[tuple[str, int]]:
    """(why, index) of the queries shown: the largest gains and losses, the middle of those whose score changed, and rewrites that changed nothing."""
    order = np.argsort(-change, kind="stable").tolist()
    gains, losses = [i for i in order if change[i] > 0], [i for i in reversed(order) if change[i] < 0]
    changed = [i for i in order if change[i] != 0]
    middle = changed[max(0, len(changed) // 2 - MIDDLE // 2):][:MIDDLE]
    idle = [i for i in range(len(change)) if change[i] == 0 and differ[i]][:MIDDLE]
    picks, taken = [], set()
    for why, some in (("largest gains", gains[:GAINS]), ("largest losses", losses[:LOSSES]), ("middle of the changed", middle), ("rewritten, no change", idle)):
        picks += [(why, i) for i in some if i not in taken]
        taken |= set(some)
    return picks


def as_page(search: Search | str, picks: list[tuple[str, int]], ids: list[str], raws: list[str], texts: tuple[list[str | None], list[str | None]],
            logged: tuple[np.ndarray, np.ndarray], more: Callable[[int], dict]) -> dict:
    """texts: what each of the two sides searches for, logged: its NDCG by the run. more(i): what else a query's page says.

    {"why": reason when there are no lists, "queries": [...], "documents": {id: text}, "explained": whether terms are known}
    """
    found = dict(why="", queries=[dict(why=why, id=ids[i], raw=raws[i], texts=[side[i] for side in texts], ndcg=[float(side[i]) for side in logged], **more(i))
                                  for why, i in picks], documents={}, explained=False)
    if isinstance(search, str):
        return found | dict(why=search)
    found["explained"] = explained = hasattr(search.retriever, "explain")
    depth, wanted, off = max(TOP, search.k), set(), 0
    chosen = [i for _, i in picks]
    ranked = [_ranked(search.retriever, [side[i] for i in chosen], depth) for side in texts]
    names = search.retriever.doc_ids
    for n, (i, query) in enumerate(zip(chosen, found["queries"])):
        gains, rows = search.qrels.get(ids[i], {}), [side[n] for side in ranked]
        off += any(abs(ndcg([names[r] for r in side], gains, search.k) - score) > 1e-6 for side, score in zip(rows, query["ndcg"]))
        places = [{r: place for place, r in enumerate(side, 1)} for side in rows]
        shown = list(dict.fromkeys([*rows[0][:TOP], *rows[1][:TOP]]))
        wanted |= {names[r] for r in shown}
        query["documents"] = [dict(id=names[r], gain=gains.get(names[r], 0.0), places=[side.get(r) for side in places],
                                   terms=_moved(search.retriever, query["texts"], r) if explained else None) for r in shown]
        query["relevant"] = sum(gain > 0 for gain in gains.values())
    if off:
        found["why"] = f"Of {len(chosen)} queries {off} have another NDCG today than the run logged: corpus, judgements or index are not the run's any more."
    found["documents"], found["depth"], found["top"] = _beginnings(search, wanted), depth, TOP
    return found


def _ranked(retriever: Retriever, texts: list[str | None], depth: int) -> list[list[int]]:
    """Rows of each text's hits, best first; none for no text."""
    asked = [i for i, text in enumerate(texts) if text is not None]
    hits: list[list[int]] = [[] for _ in texts]
    if asked:
        rows, _ = retriever.search([texts[i] for i in asked], depth)
        for i, ranking in zip(asked, rows.tolist()):
            hits[i] = [r for r in ranking if r >= 0]
    return hits


def _moved(retriever: Retriever, texts: list[str | None], row: int) -> list[list]:
    """[term, what it adds to the document's score under the first text, under the second], largest change first."""
    sides = [dict(retriever.explain(text, row)) if text is not None else {} for text in texts]
    terms = [[term, short(sides[0].get(term, 0.0)), short(sides[1].get(term, 0.0))] for term in {**sides[0], **sides[1]}]
    return sorted(terms, key=lambda t: -abs(t[2] - t[1]))[:TERMS]


def _beginnings(search: Search, wanted: set[str]) -> dict[str, str]:
    """The documents' first characters, from the corpus' file."""
    found: dict[str, str] = {}
    try:
        for id, contents in data.documents(search.corpus, search.on_bad_line, []):
            if id in wanted:
                found[id] = contents[:CHARS]
            if len(found) == len(wanted):
                break
    except (ValueError, OSError):                        # moved since: ids stand for themselves
        pass
    return found
