"""Show where a policy helps and where it hurts.

Test queries are grouped by their length, difficulty, history, first word, and by what the answer
did to the raw one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recr1.report.record import compute_interval

# (highest score of the band, name)
SCORE_BANDS = (
    (0.0, "0"),
    (0.25, "above 0, up to .25"),
    (0.5, "up to .50"),
    (0.75, "up to .75"),
    (0.999999, "below 1"),
    (1.0, "1"),
)

# (most items of the history, name)
HISTORY_BANDS = (
    (0, "0"),
    (2, "1 to 2"),
    (5, "3 to 5"),
    (10, "6 to 10"),
    (20, "11 to 20"),
    (10**9, "more than 20"),
)

QUERY_LENGTHS = (*map(str, range(7)), "7 and more")

REWRITE_KINDS = (
    "unchanged",
    "other order",
    "left words out",
    "repeated words",
    "left out and repeated",
    "brought new words",
    "no answer",
)

LIST_KINDS = ("the given order", "another order", "items left out", "another answer", "no answer")

MAX_WORDS = 10  # rows of a table of words

BOOTSTRAP_SAMPLES = 2_000

MIN_CHANGE = 1e-9  # a smaller change of a score counts as none


@dataclass
class GroupScores:
    """Summarize the scores of groups of queries.

    score_columns: {column: (Q,)}; change: (Q,), what is judged.
    """

    score_columns: dict[str, np.ndarray]
    change: np.ndarray

    def summarize_group(self, name: str, members: list[int]) -> dict:
        """Return a table's row for the queries at the indices `members`."""
        group_change = self.change[members]
        means = {}
        for column, scores in self.score_columns.items():
            means[column] = float(scores[members].mean())
        # One query has no interval.
        interval: Sequence[float | None] = [float(group_change[0]), None, None]
        if len(group_change) > 1:
            interval = compute_interval(group_change, BOOTSTRAP_SAMPLES)
        is_helped = group_change > MIN_CHANGE
        is_hurt = group_change < -MIN_CHANGE
        return dict(
            name=name,
            n=len(members),
            means=means,
            change=interval,
            helped=int(is_helped.sum()),
            hurt=int(is_hurt.sum()),
        )

    def make_table(
        self,
        title: str,
        text: str,
        labels: Iterable[str | None],
        order: Sequence[str] | None = None,
    ) -> dict:
        """Group the queries by their labels.

        Args:
            labels: one per query; a query with None is in no group.
            order: the names in the order of the rows; by default the largest group is first.
        """
        members = defaultdict(list)
        for index, label in enumerate(labels):
            if label is not None:
                members[label].append(index)
        names = _sort_by_size(members)
        if order:
            names = [name for name in order if name in members]
        return self._fill_table(title, text, names, members)

    def make_word_table(self, title: str, text: str, words: Iterable[list[str]]) -> dict:
        """Group the queries by each of their words; keep the words that several queries have."""
        members = defaultdict(list)
        for index, words_of_query in enumerate(words):
            for word in words_of_query:
                members[word].append(index)
        names = [word for word in _sort_by_size(members) if len(members[word]) > 1]
        return self._fill_table(title, text, names[:MAX_WORDS], members)

    def _fill_table(self, title: str, text: str, names: list[str], members: dict) -> dict:
        table_rows = [self.summarize_group(name, members[name]) for name in names]
        return dict(title=title, text=text, rows=table_rows)


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
    """Make the tables of groups; a table without rows is left out.

    Args:
        raws: the raw answers: queries, or lists.
        answers: the policy's answers, None for no answer.
        raw: the raw answers' scores, (Q,).
        scores: {column: (Q,)}.
        of: the column whose difference to the first column is the change that is judged.
        rows: {id: the query's line of the data} where the data can be read.

    Returns:
        [{"title", "text", "rows": [{"name", "n", "means", "change": [mean, low, high], "helped",
        "hurt"}]}]
    """
    is_list = not all(isinstance(query, str) for query in raws)
    data_rows = [rows.get(id, {}) for id in ids]
    texts = raws
    if is_list:
        texts = [row.get("text", "") for row in data_rows]
    history_lengths = [len(row["history"]) if "history" in row else None for row in data_rows]
    # True for queries that somebody typed: they are not the last item of a history
    is_typed = all(length is None for length in history_lengths)
    first_scores = next(iter(scores.values()))
    groups = GroupScores(scores, change=scores[of] - first_scores)

    tables = [
        groups.make_table("all", "", ["all queries"] * len(ids)),
        groups.make_table(
            "words in the query", "", _label_query_lengths(texts, is_typed), QUERY_LENGTHS
        ),
        groups.make_table(
            "items in the history",
            "",
            [_find_history_band(length) for length in history_lengths],
            [name for _, name in HISTORY_BANDS],
        ),
        _make_score_table(groups, raw, metric, is_list),
        _make_answer_table(groups, raws, answers, is_list),
        groups.make_table(
            "first word",
            f"The {MAX_WORDS} most frequent.",
            _label_first_words(texts, is_typed),
        ),
    ]
    if not is_list:
        tables += _make_changed_word_tables(groups, raws, answers)
    return [table for table in tables if table["rows"]]


def _make_score_table(groups: GroupScores, raw: np.ndarray, metric: str, is_list: bool) -> dict:
    """Group the queries by the score of the raw answer, (Q,)."""
    title = f"{metric} of the raw {'list' if is_list else 'query'}"
    text = (
        f"{'Lists' if is_list else 'Queries'} at 1 can only lose, those at 0 only win: "
        "some of the slope over these rows is regression to the mean."
    )
    labels = [_find_score_band(score) for score in raw.tolist()]
    return groups.make_table(title, text, labels, [name for _, name in SCORE_BANDS])


def _make_answer_table(groups: GroupScores, raws: list, answers: list, is_list: bool) -> dict:
    """Group the queries by what the answer did to the raw one."""
    title = "what the answer did"
    if is_list:
        kinds = [classify_list(given, answer) for given, answer in zip(raws, answers)]
        return groups.make_table(title, "", kinds, LIST_KINDS)
    text = "Words are what stands between blanks, in lower case."
    kinds = [classify_rewrite(query, answer) for query, answer in zip(raws, answers)]
    return groups.make_table(title, text, kinds, REWRITE_KINDS)


def _make_changed_word_tables(
    groups: GroupScores, queries: list[str], rewrites: list[str | None]
) -> list[dict]:
    """Make the tables of the words that rewrites left out, and of those that they added."""
    removed_words = []
    added_words = []
    for query, rewrite in zip(queries, rewrites):
        removed, added = ([], []) if rewrite is None else diff_words(query, rewrite)
        removed_words.append(removed)
        added_words.append(added)
    return [
        groups.make_word_table(
            "word left out",
            "Queries whose answer has the word less often than they do, or not at all.",
            removed_words,
        ),
        groups.make_word_table(
            "word added or repeated",
            "Queries whose answer has the word more often than they do.",
            added_words,
        ),
    ]


def _sort_by_size(members: dict[str, list[int]]) -> list[str]:
    """Return the groups' names, the largest group first, then in the order of the alphabet."""
    return sorted(members, key=lambda name: (-len(members[name]), name))


def _label_query_lengths(texts: list[str], is_typed: bool) -> list[str | None]:
    """Name each query's number of words; None for no words, and where nobody typed the query."""
    labels: list[str | None] = []
    for text in texts:
        num_words = len(text.split())
        if not is_typed or num_words == 0:
            labels.append(None)
        else:
            labels.append(QUERY_LENGTHS[min(num_words, 7)])
    return labels


def _label_first_words(texts: list[str], is_typed: bool) -> list[str | None]:
    """Return each query's first word where it is one of the frequent ones, else None."""
    first_words = []
    for text in texts:
        words = text.lower().split()
        first_words.append(words[0] if words else "")
    frequencies = Counter(first_words).most_common(MAX_WORDS)
    frequent_words = {word for word, count in frequencies if count > 1}
    return [word if is_typed and word in frequent_words else None for word in first_words]


def _find_score_band(score: float) -> str:
    if score >= 1:
        return "1"
    return next(name for limit, name in SCORE_BANDS if score <= limit + 1e-12)


def _find_history_band(length: int | None) -> str | None:
    if length is None:
        return None
    return next(name for limit, name in HISTORY_BANDS if length <= limit)


def classify_list(given: object, answer: object) -> str:
    """Return which of LIST_KINDS an answer is, compared with the list that was given."""
    if answer is None:
        return "no answer"
    if answer == given:
        return "the given order"
    if not isinstance(given, list) or not isinstance(answer, list):
        return "another answer"
    new_items = Counter(map(str, answer)) - Counter(map(str, given))
    if new_items:
        return "another answer"
    return "another order" if len(answer) == len(given) else "items left out"


def classify_rewrite(query: str, rewrite: str | None) -> str:
    """Return which of REWRITE_KINDS a rewrite of a query is."""
    if rewrite is None:
        return "no answer"
    query_words = query.lower().split()
    rewrite_words = rewrite.lower().split()
    removed, added = diff_words(query, rewrite)
    if set(added) - set(query_words):
        return "brought new words"
    if removed and added:
        return "left out and repeated"
    if removed:
        return "left words out"
    if added:
        return "repeated words"
    return "unchanged" if query_words == rewrite_words else "other order"


def diff_words(query: str, rewrite: str) -> tuple[list[str], list[str]]:
    """Return the words that the rewrite has less often than the query, and those it has more
    often.
    """
    query_counts = Counter(query.lower().split())
    rewrite_counts = Counter(rewrite.lower().split())
    removed = [word for word in query_counts if rewrite_counts[word] < query_counts[word]]
    added = [word for word in rewrite_counts if rewrite_counts[word] > query_counts[word]]
    return removed, added
