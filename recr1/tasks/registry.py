"""The interface of a task, and the task that a config names."""

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

TASKS: dict[str, Callable[[RewardConfig], Task]] = {
    "product_search": ProductSearch,
    "sequential": Sequential,
    "rerank": Rerank,
    "recommend_list": RecommendList,
}

TASK_ATTRIBUTES = (
    "placeholders",
    "required_fields",
    "uses_retriever",
    "render",
    "parse",
    "baseline_answer",
    "rank",
)


class Task(Protocol):
    """A kind of question, and how its answers are ranked.

    `row` is a query's line of the data: "text" and the keys of `required_fields`.

    A task stores nothing of what it is asked: it is called from another thread than the one that
    trains.
    """

    placeholders: tuple[str, ...]  # names in prompt.user, {name} each, that `render` fills
    required_fields: tuple[str, ...]  # keys that a row must have beside "text"
    uses_retriever: bool  # whether `rank` searches; if not, no index is built

    def __init__(self, reward: RewardConfig): ...

    def render(self, row: dict, title: Callable[[str], str]) -> tuple[str, ...]:
        """Return one text for each of `placeholders`.

        title(document id) is the title of a document of the row's "history" and "candidates".
        """

    def parse(self, completion: str, row: dict) -> tuple[Any, str | None]:
        """Return (answer, None), or (None, the error's name).

        Takes any string and does not raise. An answer can be written as JSON.
        """

    def baseline_answer(self, row: dict) -> Any:
        """Return the answer that needs no policy; the policy's answers are compared with it."""

    def rank(
        self,
        answers: list,
        rows: list[dict],
        k: int,
        search: Callable[[list[str], int], list[list[str]]],
    ) -> list[list[str]]:
        """Return document ids for each answer, best first.

        search(queries, k) asks the retriever.
        """


def build_task(cfg: Config) -> Task:
    """Build the task that the config names, checked. Raises ConfigError."""
    if cfg.task in TASKS:
        task_class = TASKS[cfg.task]
    else:
        task_class = plugins.load_function("task", cfg.task, TASKS)
    with plugins.calling_plugin(f"task: {cfg.task!r}, called with the config's reward,"):
        task = task_class(cfg.reward)

    missing = [name for name in TASK_ATTRIBUTES if not hasattr(task, name)]
    if missing:
        raise ConfigError(
            f"task: {cfg.task!r} has no {', '.join(missing)}; "
            "what a task needs stands in recr1/tasks/registry.py"
        )
    if cfg.task not in TASKS:
        task = UserTask(cfg.task, task)

    if cfg.data.shuffle_words and tuple(task.placeholders) != ("query",):
        raise ConfigError(
            "data.shuffle_words: shuffles the words of a query, "
            f"and the prompts of {cfg.task} show more than that; set it to 0"
        )
    return task
