"""Where a policy helps and where it hurts: test queries by their length, difficulty, first word, and by what the rewrite did to their words."""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np

from .record import interval

BANDS = ((0.0, "0"), (0.25, "above 0, up to .25"), (0.5, "up to .50"), (0.75, "up to .75"), (0.999999, "below 1"), (1.0, "1"))
WORDS = 10                               # rows of a list of words
SAMPLES = 2_000                          # of the bootstrap
HARM = 1e-9                              # a smaller change is none


def as_page(ids: list[str], raws: list[str], rewrites: list[str | None], raw: np.ndarray, scores: dict[str, np.ndarray], of: str) -> list[dict]:
    """Tables of groups. raw (Q,): the raw queries' NDCG; scores {column: (Q,)}, `of` the one whose difference to the first is the change that is judged.

    [{"title", "text", "rows": [{"name", "n", "raw", "means", "change": [mean, low, high], "helped", "hurt"}]}]
    """
    change = scores[of] - next(iter(scores.values()))

    def row(name: str, members: list[int]) -> dict:
        d = change[members]
        return dict(name=name, n=len(members), means={k: float(v[members].mean()) for k, v in scores.items()},
                    change=interval(d, SAMPLES) if len(d) > 1 else [float(d[0]), None, None],
                    helped=int((d > HARM).sum()), hurt=int((d < -HARM).sum()))

    def table(title: str, text: str, label: Callable[[int], str | None], order: list[str] | None = None, most: int | None = None) -> dict:
        members = defaultdict(list)
        for i in range(len(ids)):
            if (name := label(i)) is not None:
                members[name].append(i)
        names = [n for n in order if n in members] if order else sorted(members, key=lambda n: (-len(members[n]), n))[:most]
        return dict(title=title, text=text, rows=[row(name, members[name]) for name in names])

    lengths, firsts = [len(q.split()) for q in raws], [q.lower().split()[0] if q.split() else "" for q in raws]
    bands = [next(name for limit, name in BANDS if value <= limit + 1e-12) if value < 1 else "1" for value in raw.tolist()]
    common = {word for word, n in Counter(firsts).most_common(WORDS) if n > 1}
    doings = [doing(q, r) for q, r in zip(raws, rewrites)]
    tables = [
        dict(title="all", text="", rows=[row("all queries", list(range(len(ids))))]),
        table("words in the query", "", lambda i: f"{lengths[i]}" if lengths[i] < 7 else "7 and more", [*map(str, range(7)), "7 and more"]),
        table("NDCG of the raw query", "Queries at 1 can only lose, those at 0 only win: some of the slope over these rows is regression to the mean.",
              lambda i: bands[i], [name for _, name in BANDS]),
        table("what the rewrite did", "Words are what stands between blanks, in lower case.", lambda i: doings[i], list(DOINGS)),
        table("first word", f"The {WORDS} most frequent.", lambda i: firsts[i] if firsts[i] in common else None)]
    for title, text, side in (("word left out", "Queries whose rewrite has the word less often than they do, or not at all.", 0),
                              ("word added or repeated", "Queries whose rewrite has the word more often than they do.", 1)):
        members = defaultdict(list)
        for i, (query, rewrite) in enumerate(zip(raws, rewrites)):
            for word in moved(query, rewrite)[side] if rewrite is not None else ():
                members[word].append(i)
        names = sorted((w for w in members if len(members[w]) > 1), key=lambda w: (-len(members[w]), w))[:WORDS]
        tables.append(dict(title=title, text=text, rows=[row(name, members[name]) for name in names]))
    return [t for t in tables if t["rows"]]


DOINGS = ("unchanged", "other order", "left words out", "repeated words", "left out and repeated", "brought new words", "no answer")


def doing(query: str, rewrite: str | None) -> str:
    """Which of DOINGS."""
    if rewrite is None:
        return "no answer"
    before, after = query.lower().split(), rewrite.lower().split()
    gone, more = moved(query, rewrite)
    if set(more) - set(before):
        return "brought new words"
    if gone or more:
        return "left out and repeated" if gone and more else "left words out" if gone else "repeated words"
    return "unchanged" if before == after else "other order"


def moved(query: str, rewrite: str) -> tuple[list[str], list[str]]:
    """Words that stand less often in the rewrite than in the query, and words that stand there more often."""
    before, after = Counter(query.lower().split()), Counter(rewrite.lower().split())
    return [w for w in before if after[w] < before[w]], [w for w in after if after[w] > before[w]]
