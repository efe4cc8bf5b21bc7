"""Check what must hold of a prepared data set before it is written.

Upstream checks none of it: there test lay inside validation, train came twice, targets repeated.
Every check raises PrepareError with the first offender; `check_splits` returns the names of those
that passed, for prepared.json.
"""

from collections import Counter
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
    liked_docs = list_relevant(targets)
    return row["user"], tuple(sorted(liked_docs))


def list_relevant(targets: Targets) -> list[str]:
    """Return the documents whose gain is above 0."""
    return [doc for doc, gain in targets if gain > 0]


def get_history(row: dict) -> list[str]:
    """Return the document ids of a row's history, whose entries are ids or [id, date]."""
    return [entry if isinstance(entry, str) else entry[0] for entry in row.get("history", ())]


def count_popularity(train: Split) -> Counter:
    """Count for each document the users whose train examples show it, validation's not counted."""
    popularity = Counter()
    user_docs = set()
    for row in train.rows:
        if is_validation(row["id"]):
            continue
        for doc in (*get_history(row), *list_relevant(train.targets[row["id"]])):
            if (row["user"], doc) not in user_docs:
                user_docs.add((row["user"], doc))
                popularity[doc] += 1
    return popularity


def drop_repeats(train: Split, tests: dict[str, Split]) -> tuple[Split, int]:
    """Drop from train the examples whose words are those of a test's or of an earlier one of train.

    Returns the rest, and how many were dropped.
    """
    seen_texts = set()
    for split in tests.values():
        for row in split.rows:
            seen_texts.add(by_text(row, []))
    unique = Split()
    for row in train.rows:
        text = by_text(row, [])
        if text not in seen_texts:
            seen_texts.add(text)
            unique.add(row, train.targets[row["id"]])
    return unique, len(train.rows) - len(unique.rows)


def check_document(row: dict, docs: set[str]) -> None:
    """Raise PrepareError unless readers.read_corpus would take the row; add its id to `docs`."""
    id = row["id"]
    if not isinstance(id, str) or not id or id != id.strip():
        raise PrepareError(f"document id {id!r} is no string, empty, or has white space around it")
    if id in docs:
        raise PrepareError(f"document {id!r} came before; ids are unique")
    title = row.get("title", "").strip()
    text = row.get("text", "").strip()
    if not title and not text:
        raise PrepareError(f"document {id!r} has neither title nor text")
    docs.add(id)


def check_splits(docs: set[str], splits: dict[str, Split], key: Key) -> list[str]:
    """Check the splits and return the names of the checks, all passed.

    `docs`: every document id of the corpus. key: what makes two examples the same.
    """
    for name, split in splits.items():
        if not split.rows:
            raise PrepareError(f"{name}: no example is left; look at the filters and at the source")
        ids = set()
        for row in split.rows:
            if row["id"] in ids:
                raise PrepareError(f"{name}: id {row['id']!r} stands for two examples")
            ids.add(row["id"])
            check_example(name, row, split.targets[row["id"]], docs)

    # Train holds every example once, and every user on one side of the validation hash.
    train = splits["train"]
    example_ids: dict[Hashable, str] = {}
    for row in train.rows:
        first_id = example_ids.setdefault(key(row, train.targets[row["id"]]), row["id"])
        if first_id != row["id"]:
            raise PrepareError(f"train holds one example twice: {first_id!r} and {row['id']!r}")
    docs_by_user = collect_user_docs(train)

    # No test repeats what train shows.
    train_ids = {row["id"] for row in train.rows}
    for name, split in splits.items():
        if name == "train":
            continue
        for row in split.rows:
            same_id = example_ids.get(key(row, split.targets[row["id"]]))
            if same_id is not None:
                side = "validation" if is_validation(same_id) else "train"
                raise PrepareError(f"{name}: {row['id']!r} is {same_id!r} of {side} again")
            if row["id"] in train_ids:
                raise PrepareError(f"{name}: id {row['id']!r} is an id of train too")
            known_docs = set(get_history(row))
            if "user" in row:
                known_docs |= docs_by_user.get(row["user"], set())
            for doc in list_relevant(split.targets[row["id"]]):
                if doc in known_docs:
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


def check_example(name: str, row: dict, targets: Targets, docs: set[str]) -> None:
    """Check one example of the split `name`. Raises PrepareError."""
    id = row["id"]
    if not row["text"].strip():
        raise PrepareError(f"{name}: {id!r} has no text")
    target_docs = [doc for doc, _ in targets]
    if len(set(target_docs)) != len(targets):
        raise PrepareError(
            f"{name}: {id!r} has the same target twice, which would spoil the ideal DCG"
        )
    if not list_relevant(targets):
        raise PrepareError(f"{name}: {id!r} has no relevant document")
    for doc in (*target_docs, *get_history(row), *row.get("candidates", ())):
        if doc not in docs:
            raise PrepareError(f"{name}: {id!r} names document {doc!r}, which is not in the corpus")


def collect_user_docs(train: Split) -> dict[str, set[str]]:
    """Return {user: the documents that the user's train examples show}.

    Raises PrepareError for a user in train and in validation.
    """
    docs_by_user: dict[str, set[str]] = {}
    sides: dict[str, bool] = {}
    for row in train.rows:
        if "user" not in row:
            continue
        user_docs = docs_by_user.setdefault(row["user"], set())
        user_docs.update(get_history(row), list_relevant(train.targets[row["id"]]))
        side = is_validation(row["id"])
        if sides.setdefault(row["user"], side) != side:
            raise PrepareError(f"user {row['user']!r} lies in train and in validation")
    return docs_by_user


def check_inductive(train: Split, test: Split, name: str) -> list[str]:
    """Check the strict inductive setting: train has none of the test's users, histories and
    targets.
    """
    users = {row["user"] for row in train.rows}
    docs = set()
    for row in train.rows:
        docs.update(list_shown(train, row))
    for row in test.rows:
        if row["user"] in users:
            raise PrepareError(f"{name}: user {row['user']!r} of {row['id']!r} is in train")
        for doc in list_shown(test, row):
            if doc in docs:
                raise PrepareError(f"{name}: document {doc!r} of {row['id']!r} is in train")
    return [f"{name}: neither user, history nor target in train"]


def list_shown(split: Split, row: dict) -> list[str]:
    """Return the documents of a row's history and of its judgements."""
    judged_docs = [doc for doc, _ in split.targets[row["id"]]]
    return get_history(row) + judged_docs
