"""What a task is, and the config's `task` -> the task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from recr1.config import plugins
from recr1.config.schema import Config, ConfigError, RewardConfig
from recr1.tasks.product_search import ProductSearch
from recr1.tasks.recommend_list import RecommendList
from recr1.tasks.rerank import Rerank
from recr1.tasks.sequential import Sequential
from recr1.tasks.user_task import UserTask

TASKS = {
    "product_search": ProductSearch,
    "sequential": Sequential,
    "rerank": Rerank,
    "recommend_list": RecommendList,
}


class Task(Protocol):
    """A kind of question and how its answers are ranked. `row` is a query's line of the data:
    "text" and the keys of `needs`.

    A task keeps nothing of what it is asked: it is called from another thread than the one that
    trains.
    """

    placeholders: tuple[str, ...]  # of prompt.user, {name} each, that the texts of a row go to
    required_fields: tuple[str, ...]  # keys that a row must have beside "text"
    uses_retriever: bool  # whether `rank` searches; where none does no index is made

    def __init__(self, rule: RewardConfig): ...

    def render(self, row: dict, title: Callable[[str], str]) -> tuple[str, ...]:
        """The text for each of `places`; title(document id) is a title of what the row's "history"
        and "candidates" name.
        """

    def parse(self, completion: str, row: dict) -> tuple[Any, str | None]:
        """(answer, None), or (None, the error's name). Takes any string and does not raise. An
        answer can be written as JSON.
        """

    def baseline_answer(self, row: dict) -> Any:
        """The answer that takes no policy, which it is compared with."""

    def rank(
        self,
        answers: list,
        rows: list[dict],
        k: int,
        search: Callable[[list[str], int], list[list[str]]],
    ) -> list[list[str]]:
        """Document ids for each answer, best first; search(queries, k) asks the retriever."""


def build_task(cfg: Config) -> Task:
    """Raises ConfigError."""
    kind = TASKS.get(cfg.task) or plugins.load_function("task", cfg.task, TASKS)
    with plugins.calling_plugin(f"task: {cfg.task!r}, called with the config's reward,"):
        task = kind(cfg.reward)
    if missing := [
        name
        for name in (
            "placeholders",
            "required_fields",
            "uses_retriever",
            "render",
            "parse",
            "baseline_answer",
            "rank",
        )
        if not hasattr(task, name)
    ]:
        raise ConfigError(
            f"task: {cfg.task!r} has no {', '.join(missing)}; what a task needs stands in recr1/tasks/make.py"
        )
    task = task if cfg.task in TASKS else UserTask(cfg.task, task)
    if cfg.data.shuffle_words and tuple(task.placeholders) != ("query",):
        raise ConfigError(
            f"data.shuffle_words: shuffles the words of a query, and the prompts of {cfg.task} show more than that; set it to 0"
        )
    return task
