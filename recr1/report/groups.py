"""Where a policy helps and where it hurts: test queries by their length, difficulty, history, first
word, and by what the answer did to the raw one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

import numpy as np

from recr1.report.record import compute_interval

BANDS = (
    (0.0, "0"),
    (0.25, "above 0, up to .25"),
    (0.5, "up to .50"),
    (0.75, "up to .75"),
    (0.999999, "below 1"),
    (1.0, "1"),
)

PAST = (
    (0, "0"),
    (2, "1 to 2"),
    (5, "3 to 5"),
    (10, "6 to 10"),
    (20, "11 to 20"),
    (10**9, "more than 20"),
)

WORDS = 10  # rows of a list of words

SAMPLES = 2_000  # of the bootstrap

HARM = 1e-9  # a smaller change is none


def describe_groups(
    ids: list[str],
    raws: list,
    answers: list,
    raw: np.ndarray,
    scores: dict[str, np.ndarray],
    of: str,
    rows: Mapping[str, dict] = {},
    metric: str = "NDCG",
) -> list[dict]:
    """Tables of groups. raws, answers: queries, or lists; raw (Q,): the raw answers' scores; scores
    {column: (Q,)}, `of` the one whose difference to the first is the change that is judged; rows
    {id: the query's line of the data} where it is at hand.

    [{"title", "text", "rows": [{"name", "n", "raw", "means", "change": [mean, low, high], "helped",
    "hurt"}]}]
    """
    listed = not all(isinstance(query, str) for query in raws)
    texts = [rows.get(id, {}).get("text", "") if listed else query for id, query in zip(ids, raws)]
    past = [len(rows[id]["history"]) if "history" in rows.get(id, {}) else None for id in ids]
    # a query that somebody typed, not the last item of a history
    asked = not any(n is not None for n in past)
    change = scores[of] - next(iter(scores.values()))

    def row(name: str, members: list[int]) -> dict:
        d = change[members]
        return dict(
            name=name,
            n=len(members),
            means={k: float(v[members].mean()) for k, v in scores.items()},
            change=compute_interval(d, SAMPLES) if len(d) > 1 else [float(d[0]), None, None],
            helped=int((d > HARM).sum()),
            hurt=int((d < -HARM).sum()),
        )

    def table(
        title: str,
        text: str,
        label: Callable[[int], str | None],
        order: list[str] | None = None,
        most: int | None = None,
    ) -> dict:
        members = defaultdict(list)
        for i in range(len(ids)):
            if (name := label(i)) is not None:
                members[name].append(i)
        names = (
            [n for n in order if n in members]
            if order
            else sorted(members, key=lambda n: (-len(members[n]), n))[:most]
        )
        return dict(title=title, text=text, rows=[row(name, members[name]) for name in names])

    lengths = [len(q.split()) for q in texts]
    firsts = [q.lower().split()[0] if q.split() else "" for q in texts]
    bands = [
        next(name for limit, name in BANDS if value <= limit + 1e-12) if value < 1 else "1"
        for value in raw.tolist()
    ]
    common = {word for word, n in Counter(firsts).most_common(WORDS) if n > 1}
    doings = [
        classify_list(q, a) if listed else classify_rewrite(q, a) for q, a in zip(raws, answers)
    ]
    tables = [
        dict(title="all", text="", rows=[row("all queries", list(range(len(ids))))]),
        table(
            "words in the query",
            "",
            lambda i: (
                (f"{lengths[i]}" if lengths[i] < 7 else "7 and more")
                if asked and lengths[i]
                else None
            ),
            [*map(str, range(7)), "7 and more"],
        ),
        table(
            "items in the history",
            "",
            lambda i: (
                None if past[i] is None else next(name for limit, name in PAST if past[i] <= limit)
            ),
            [name for _, name in PAST],
        ),
        table(
            f"{metric} of the raw {'list' if listed else 'query'}",
            f"{'Lists' if listed else 'Queries'} at 1 can only lose, those at 0 only win: some of the slope over these rows is regression to the mean.",
            lambda i: bands[i],
            [name for _, name in BANDS],
        ),
        table(
            "what the answer did",
            "" if listed else "Words are what stands between blanks, in lower case.",
            lambda i: doings[i],
            list(LISTS if listed else DOINGS),
        ),
        table(
            "first word",
            f"The {WORDS} most frequent.",
            lambda i: firsts[i] if asked and firsts[i] in common else None,
        ),
    ]
    for title, text, side in (
        ()
        if listed
        else (
            (
                "word left out",
                "Queries whose answer has the word less often than they do, or not at all.",
                0,
            ),
            (
                "word added or repeated",
                "Queries whose answer has the word more often than they do.",
                1,
            ),
        )
    ):
        members = defaultdict(list)
        for i, (query, answer) in enumerate(zip(raws, answers)):
            for word in diff_words(query, answer)[side] if answer is not None else ():
                members[word].append(i)
        names = sorted(
            (w for w in members if len(members[w]) > 1), key=lambda w: (-len(members[w]), w)
        )[:WORDS]
        tables.append(
            dict(title=title, text=text, rows=[row(name, members[name]) for name in names])
        )
    return [t for t in tables if t["rows"]]


DOINGS = (
    "unchanged",
    "other order",
    "left words out",
    "repeated words",
    "left out and repeated",
    "brought new words",
    "no answer",
)


LISTS = ("the given order", "another order", "items left out", "another answer", "no answer")


def classify_list(given, answer) -> str:
    """Which of LISTS."""
    if answer is None:
        return "no answer"
    if answer == given:
        return "the given order"
    if not (isinstance(given, list) and isinstance(answer, list)) or Counter(
        map(str, answer)
    ) - Counter(map(str, given)):
        return "another answer"
    return "another order" if len(answer) == len(given) else "items left out"


def classify_rewrite(query: str, rewrite: str | None) -> str:
    """Which of DOINGS."""
    if rewrite is None:
        return "no answer"
    before = query.lower().split()
    after = rewrite.lower().split()
    gone, more = diff_words(query, rewrite)
    if set(more) - set(before):
        return "brought new words"
    if gone or more:
        return (
            "left out and repeated"
            if gone and more
            else "left words out"
            if gone
            else "repeated words"
        )
    return "unchanged" if before == after else "other order"


def diff_words(query: str, rewrite: str) -> tuple[list[str], list[str]]:
    """Words that stand less often in the rewrite than in the query, and words that stand there more
    often.
    """
    before = Counter(query.lower().split())
    after = Counter(rewrite.lower().split())
    return [w for w in before if after[w] < before[w]], [w for w in after if after[w] > before[w]]
