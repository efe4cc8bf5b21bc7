"""The data of a run: queries and judgements -> prompts of train, validation and test."""
from __future__ import annotations

from . import data
from .chat import Chat, make_prompts
from .config import Config
from .data import DataError
from .log import say
from .records import Prompt


def read_splits(cfg: Config, chat: Chat) -> tuple[list[Prompt], list[Prompt], list[Prompt], dict[str, dict[str, float]]]:
    """Prompts of train, validation, test, and the judgements {query id: {document id: gain}} of them all.

    Validation is a hash tenth of the train queries, test its own files or a second tenth. Raises DataError, ChatError.
    """
    d, train = cfg.data, cfg.train
    queries, qrels, dropped = {}, {}, []
    files = {"train": (d.train_queries, d.train_qrels), "test": (d.test_queries, d.test_qrels)}
    for split, (queries_path, qrels_path) in files.items() if d.test_queries else [("train", files["train"])]:
        queries[split], more = data.read_queries(queries_path, d.on_bad_line)
        judged, even_more = data.read_qrels(qrels_path, d.on_bad_line)
        both = qrels.keys() & queries[split].keys()
        if both:
            raise DataError(f"{queries_path}: query id {sorted(both)[0]!r} is in the train split too; train and test must not overlap")
        qrels |= {id: judged.get(id, {}) for id in queries[split]}
        dropped += more + even_more
    parts = {"validation": {i: t for i, t in queries["train"].items() if data.is_validation(i)},
             "test": queries.get("test") or {i: t for i, t in queries["train"].items() if data.is_test(i)}}
    parts["train"] = {i: t for i, t in queries["train"].items() if i not in parts["validation"] and i not in parts["test"]}
    made = {name: make_prompts(part, chat, cfg.prompt.max_tokens, d.on_long_prompt) for name, part in parts.items()}
    for what, messages in (("data lines", dropped), ("prompts over the limit", [m for _, long in made.values() for m in long])):
        if messages:
            say(f"recr1: {len(messages)} {what} left out, first: {messages[0]}")
    prompts = {name: found for name, (found, _) in made.items()}
    if len(prompts["train"]) < train.prompts_per_step:
        raise DataError(f"train.prompts_per_step: {train.prompts_per_step} is more than the {len(prompts['train'])} train queries outside the held-out tenths")
    if train.eval_every and not prompts["validation"]:
        raise DataError("no train query falls into the validation tenth; set train.eval_every=0 or bring more queries")
    if not prompts["test"]:
        raise DataError("no train query falls into the test tenth; bring more queries, or data.test_queries and data.test_qrels")
    return prompts["train"], prompts["validation"], prompts["test"], qrels
