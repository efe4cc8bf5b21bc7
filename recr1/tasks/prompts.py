"""The data of a run: queries and judgements -> prompts of train, validation and test."""

from __future__ import annotations

from functools import partial

from recr1.config.schema import Config
from recr1.data import readers
from recr1.data.chat_template import ChatTemplate, make_prompts
from recr1.data.readers import DataError
from recr1.data_types import Prompt
from recr1.distributed.printing import print_rank0
from recr1.tasks.candidate_list import list_mentioned, read_titles
from recr1.tasks.registry import Task


def read_judged_queries(
    cfg: Config, needs: tuple[str, ...]
) -> tuple[dict[str, dict[str, dict]], dict[str, dict[str, float]]]:
    """({"train": {query id: row}, and "test" where it has files of its own}, judgements {query id:
    {document id: gain}} of them all).

    Rows hold "text" and what the task needs. Raises DataError.
    """
    d = cfg.data
    rows = {}
    qrels = {}
    dropped = []
    readers.check_readable(d.corpus)  # who reads it does so later
    files = {"train": (d.train_queries, d.train_qrels), "test": (d.test_queries, d.test_qrels)}
    for split, (queries_path, qrels_path) in (
        files.items() if d.test_queries else [("train", files["train"])]
    ):
        rows[split], more = readers.read_rows(queries_path, d.on_bad_line, needs)
        judged, even_more = readers.read_qrels(qrels_path, d.on_bad_line)
        both = qrels.keys() & rows[split].keys()
        if both:
            raise DataError(
                f"{queries_path}: query id {sorted(both)[0]!r} is in the train split too; train and test must not overlap"
            )
        qrels |= {id: judged.get(id, {}) for id in rows[split]}
        dropped += more + even_more
    _report_dropped("data lines", dropped)
    return rows, qrels


def load_prompts(
    cfg: Config, chat: ChatTemplate, task: Task
) -> tuple[list[Prompt], list[Prompt], list[Prompt], dict[str, dict[str, float]]]:
    """Prompts of train, validation, test, and the judgements {query id: {document id: gain}} of
    them all.

    Validation is a hash tenth of the train queries, test its own files or a second tenth. Raises
    DataError, ChatError.
    """
    d = cfg.data
    train = cfg.train
    queries, qrels = read_judged_queries(cfg, task.required_fields)
    title, lacking, dropped = read_titles(
        d.corpus,
        d.on_bad_line,
        (id for rows in queries.values() for row in rows.values() for id in list_mentioned(row)),
        cfg.prompt.title_words,
    )
    _report_dropped("corpus lines", dropped)
    stranded = {}
    for split, rows in queries.items() if lacking else ():
        for id in [id for id, row in rows.items() if lacking.intersection(list_mentioned(row))]:
            missing = min(lacking.intersection(list_mentioned(rows.pop(id))))
            stranded[id] = (
                f"query {id!r} ({split}) shows document {missing!r}, which {d.corpus} does not hold; add it, or delete the query"
            )
    if stranded and d.on_bad_line == "stop":
        raise DataError(next(iter(stranded.values())))
    _report_dropped("queries", list(stranded.values()))
    parts = {
        "validation": {i: r for i, r in queries["train"].items() if readers.is_validation(i)},
        "test": queries.get("test")
        or {i: r for i, r in queries["train"].items() if readers.is_test(i)},
    }
    parts["train"] = {
        i: r
        for i, r in queries["train"].items()
        if i not in parts["validation"] and i not in parts["test"]
    }
    texts = partial(task.render, title=title)
    made = {
        name: make_prompts(part, texts, chat, cfg.prompt.max_tokens, d.on_long_prompt)
        for name, part in parts.items()
    }
    _report_dropped("prompts over the limit", [m for _, long in made.values() for m in long])
    prompts = {name: found for name, (found, _) in made.items()}
    if len(prompts["train"]) < train.prompts_per_step:
        raise DataError(
            f"train.prompts_per_step: {train.prompts_per_step} is more than the {len(prompts['train'])} train queries outside the held-out tenths"
        )
    if train.eval_every and not prompts["validation"]:
        raise DataError(
            "no train query falls into the validation tenth; set train.eval_every=0 or bring more queries"
        )
    if not prompts["test"]:
        raise DataError(
            "no train query falls into the test tenth; bring more queries, or data.test_queries and data.test_qrels"
        )
    return prompts["train"], prompts["validation"], prompts["test"], qrels


def _report_dropped(what: str, messages: list[str]) -> None:
    if messages:
        print_rank0(f"recr1: {len(messages)} {what} left out, first: {messages[0]}")
