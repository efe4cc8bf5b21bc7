"""Turn a run's queries and judgements into the prompts of train, validation and test."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from recr1.config.schema import Config
from recr1.data import readers
from recr1.data.chat_template import ChatTemplate, make_prompts
from recr1.data.readers import DataError
from recr1.data_types import Prompt
from recr1.distributed.printing import print_rank0
from recr1.tasks.candidate_list import list_mentioned, read_titles
from recr1.tasks.registry import Task

Queries = dict[str, dict]  # {query id: row}
Judgements = dict[str, dict[str, float]]  # {query id: {document id: gain}}


class PromptSplits(NamedTuple):
    """The prompts of a run, and the judgements of all their queries."""

    train: list[Prompt]
    validation: list[Prompt]
    test: list[Prompt]
    qrels: Judgements


def load_prompts(cfg: Config, chat: ChatTemplate, task: Task) -> PromptSplits:
    """Load the prompts of train, validation and test, and the judgements of them all.

    Validation is a tenth of the train queries, chosen by a hash of the id. Test has files of its
    own, or is a second tenth. Raises DataError, ChatError.
    """
    queries, qrels = read_judged_queries(cfg, task.required_fields)

    # Only the titles that some prompt shows are kept. A task that shows none reads no corpus here.
    shown_ids: set[str] = set()
    for rows in queries.values():
        for row in rows.values():
            shown_ids.update(list_mentioned(row))
    titles = read_titles(cfg.data.corpus, cfg.data.on_bad_line, shown_ids, cfg.prompt.title_words)
    _report_dropped("corpus lines", titles.dropped)
    _drop_queries_that_show(titles.missing_ids, queries, cfg)

    prompts: dict[str, list[Prompt]] = {}
    too_long: list[str] = []
    render = partial(task.render, title=titles.get)
    for split, rows in _split_queries(queries).items():
        prompts[split], messages = make_prompts(
            rows, render, chat, cfg.prompt.max_tokens, cfg.data.on_long_prompt
        )
        too_long += messages
    _report_dropped("prompts over the limit", too_long)

    splits = PromptSplits(prompts["train"], prompts["validation"], prompts["test"], qrels)
    _check_sizes(splits, cfg)
    return splits


def read_judged_queries(
    cfg: Config, needs: tuple[str, ...]
) -> tuple[dict[str, Queries], Judgements]:
    """Read the queries of each split, and the judgements of them all.

    Args:
        needs: the keys that a row must have beside "text".
    Returns:
        ({"train": {query id: row}, and "test" where it has files of its own}, judgements {query id:
        {document id: gain}}). Raises DataError.
    """
    data = cfg.data
    readers.check_readable(data.corpus)  # the corpus itself is read later
    files = {"train": (data.train_queries, data.train_qrels)}
    if data.test_queries:
        files["test"] = (data.test_queries, data.test_qrels)

    queries: dict[str, Queries] = {}
    qrels: Judgements = {}
    dropped: list[str] = []
    for split, (queries_path, qrels_path) in files.items():
        rows, dropped_queries = readers.read_rows(queries_path, data.on_bad_line, needs)
        judgements, dropped_judgements = readers.read_qrels(qrels_path, data.on_bad_line)
        in_both = qrels.keys() & rows.keys()
        if in_both:
            raise DataError(
                f"{queries_path}: query id {min(in_both)!r} is in the train split too; "
                "train and test must not overlap"
            )
        for query_id in rows:
            qrels[query_id] = judgements.get(query_id, {})
        queries[split] = rows
        dropped += dropped_queries
        dropped += dropped_judgements
    _report_dropped("data lines", dropped)
    return queries, qrels


def _drop_queries_that_show(
    missing_ids: set[str], queries: dict[str, Queries], cfg: Config
) -> None:
    """Remove the queries that show a document which the corpus lacks.

    Raises DataError where data.on_bad_line is "stop".
    """
    if not missing_ids:
        return
    messages = []
    for split, rows in queries.items():
        for query_id, row in list(rows.items()):
            missing_of_row = missing_ids.intersection(list_mentioned(row))
            if missing_of_row:
                del rows[query_id]
                messages.append(
                    f"query {query_id!r} ({split}) shows document {min(missing_of_row)!r}, "
                    f"which {cfg.data.corpus} does not hold; add it, or delete the query"
                )
    if messages and cfg.data.on_bad_line == "stop":
        raise DataError(messages[0])
    _report_dropped("queries", messages)


def _split_queries(queries: dict[str, Queries]) -> dict[str, Queries]:
    """Split the train queries by the hash of their id into validation, test and train."""
    validation: Queries = {}
    hashed_test: Queries = {}
    for query_id, row in queries["train"].items():
        if readers.is_validation(query_id):
            validation[query_id] = row
        elif readers.is_test(query_id):
            hashed_test[query_id] = row

    # With test files of its own, a run trains on the second tenth too.
    test = queries.get("test") or hashed_test
    train: Queries = {}
    for query_id, row in queries["train"].items():
        if query_id not in validation and query_id not in test:
            train[query_id] = row
    return {"validation": validation, "test": test, "train": train}


def _check_sizes(splits: PromptSplits, cfg: Config) -> None:
    """Raise DataError when a split has too few prompts for the run."""
    prompts_per_step = cfg.train.prompts_per_step
    if len(splits.train) < prompts_per_step:
        raise DataError(
            f"train.prompts_per_step: {prompts_per_step} is more than "
            f"the {len(splits.train)} train queries outside the held-out tenths"
        )
    if cfg.train.eval_every and not splits.validation:
        raise DataError(
            "no train query falls into the validation tenth; "
            "set train.eval_every=0 or bring more queries"
        )
    if not splits.test:
        raise DataError(
            "no train query falls into the test tenth; "
            "bring more queries, or data.test_queries and data.test_qrels"
        )


def _report_dropped(what: str, messages: list[str]) -> None:
    if messages:
        print_rank0(f"recr1: {len(messages)} {what} left out, first: {messages[0]}")
