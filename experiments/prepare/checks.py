"""Check what must hold of a prepared data set before it is written.

Upstream checks none of it: there test lay inside validation, train came twice, targets repeated.
Every check raises PrepareError with the first offender; `check_splits` returns the names of those
that passed, for prepared.json.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from recr1.data.readers import DataError, is_validation

Targets = list[tuple[str, float]]
Key = Callable[[dict, Targets], Hashable]


class PrepareError(DataError):
    """Say why the data set cannot be prepared.

    The message names file, line, column or example, and what to do.
    """


@dataclass
class Split:
    """Hold query rows and, by query id, judgements (document id, gain).

    Judgements are a list in upstream's order, so that one given twice is found and not lost.
    """

    rows: list[dict] = field(default_factory=list)
    targets: dict[str, Targets] = field(default_factory=dict)

    def add(self, row: dict, targets: Targets) -> None:
        """Add a query and its judgements."""
        self.rows.append(row)
        self.targets[row["id"]] = targets


def by_text(row: dict, targets: Targets) -> Hashable:
    """Identify an example of search: by its words, however they are spaced or capitalized."""
    return " ".join(row["text"].casefold().split())


def by_interaction(row: dict, targets: Targets) -> Hashable:
    """Identify an example of recommendation: by its user and the liked documents.

    Two users may well share a history.
    """
    return row["user"], tuple(sorted(doc for doc, gain in targets if gain > 0))


def get_history(row: dict) -> list[str]:
    """Return the document ids of a row's history, whose entries are ids or [id, date]."""
    return [entry if isinstance(entry, str) else entry[0] for entry in row.get("history", ())]


def count_popularity(train: Split) -> Counter:
    """Count for each document the users whose train examples show it, validation's not counted."""
    shown = {
        (row["user"], doc)
        for row in train.rows
        if not is_validation(row["id"])
        for doc in (*get_history(row), *(doc for doc, gain in train.targets[row["id"]] if gain > 0))
    }
    return Counter(doc for _, doc in shown)


def drop_repeats(train: Split, tests: dict[str, Split]) -> tuple[Split, int]:
    """Drop from train the examples whose words are those of a test's or of an earlier one of train.

    Returns the rest, and how many were dropped.
    """
    seen = {by_text(row, []) for split in tests.values() for row in split.rows}
    kept = Split()
    for row in train.rows:
        if (words := by_text(row, [])) not in seen:
            seen.add(words)
            kept.add(row, train.targets[row["id"]])
    return kept, len(train.rows) - len(kept.rows)


def check_document(row: dict, docs: set[str]) -> None:
    """Raise PrepareError unless readers.read_corpus would take the row; add its id to `docs`."""
    id = row["id"]
    if not isinstance(id, str) or not id or id != id.strip():
        raise PrepareError(f"document id {id!r} is no string, empty, or has white space around it")
    if id in docs:
        raise PrepareError(f"document {id!r} came before; ids are unique")
    if not (row.get("title", "").strip() or row.get("text", "").strip()):
        raise PrepareError(f"document {id!r} has neither title nor text")
    docs.add(id)


def check_splits(docs: set[str], splits: dict[str, Split], key: Key) -> list[str]:
    """Check the splits and return the names of the checks, all passed.

    `docs`: every document id of the corpus. key: what makes two examples the same.
    """
    for name, split in splits.items():
        if not split.rows:
            raise PrepareError(f"{name}: no example is left; look at the filters and at the source")
        seen = set()
        for row in split.rows:
            id = row["id"]
            targets = split.targets[row["id"]]
            if id in seen:
                raise PrepareError(f"{name}: id {id!r} stands for two examples")
            seen.add(id)
            if not row["text"].strip():
                raise PrepareError(f"{name}: {id!r} has no text")
            if len({doc for doc, _ in targets}) != len(targets):
                raise PrepareError(
                    f"{name}: {id!r} has the same target twice, which would spoil the ideal DCG"
                )
            if not any(gain > 0 for _, gain in targets):
                raise PrepareError(f"{name}: {id!r} has no relevant document")
            for doc in (
                *(doc for doc, _ in targets),
                *get_history(row),
                *row.get("candidates", ()),
            ):
                if doc not in docs:
                    raise PrepareError(
                        f"{name}: {id!r} names document {doc!r}, which is not in the corpus"
                    )
    train = splits["train"]
    tests = {name: split for name, split in splits.items() if name != "train"}
    first: dict[Hashable, str] = {}
    for row in train.rows:
        same = first.setdefault(key(row, train.targets[row["id"]]), row["id"])
        if same != row["id"]:
            raise PrepareError(f"train holds one example twice: {same!r} and {row['id']!r}")
    ids = {row["id"] for row in train.rows}
    seen_by = defaultdict(set)
    sides = {}
    for row in train.rows:
        if "user" in row:
            seen_by[row["user"]].update(
                get_history(row), (doc for doc, gain in train.targets[row["id"]] if gain > 0)
            )
            if sides.setdefault(row["user"], is_validation(row["id"])) != is_validation(row["id"]):
                raise PrepareError(f"user {row['user']!r} lies in train and in validation")
    for name, split in tests.items():
        for row in split.rows:
            same = first.get(key(row, split.targets[row["id"]]))
            if same is not None:
                raise PrepareError(
                    f"{name}: {row['id']!r} is {same!r} of "
                    f"{'validation' if is_validation(same) else 'train'} again"
                )
            if row["id"] in ids:
                raise PrepareError(f"{name}: id {row['id']!r} is an id of train too")
            known = seen_by[row["user"]] if "user" in row else ()
            for doc, gain in split.targets[row["id"]]:
                if gain > 0 and (doc in known or doc in get_history(row)):
                    raise PrepareError(
                        f"{name}: {row['id']!r} asks for {doc!r}, which its user's train examples "
                        "or its own history show"
                    )
    return [
        "no id twice",
        "no target twice",
        "every document named is in the corpus",
        "train holds no example twice",
        "no test example in train or validation",
        "no user in train and validation, no test target shown to its user before",
    ]


def check_inductive(train: Split, test: Split, name: str) -> list[str]:
    """Check the strict inductive setting: train has none of the test's users, histories and
    targets.
    """
    users = {row["user"] for row in train.rows}
    docs = set()
    for row in train.rows:
        docs.update(get_history(row), (doc for doc, _ in train.targets[row["id"]]))
    for row in test.rows:
        if row["user"] in users:
            raise PrepareError(f"{name}: user {row['user']!r} of {row['id']!r} is in train")
        for doc in (*get_history(row), *(doc for doc, _ in test.targets[row["id"]])):
            if doc in docs:
                raise PrepareError(f"{name}: document {doc!r} of {row['id']!r} is in train")
    return [f"{name}: neither user, history nor target in train"]
