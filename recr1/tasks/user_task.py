"""Call a task of a user's own, `module:Class`, and check what it returns."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from recr1.config.plugins import PluginError, calling_plugin
from recr1.config.schema import ConfigError
from recr1.retrieval.interface import RetrieverError


class UserTask:
    """Wrap `task` in the interface `Task` of tasks/registry.py, and check every result.

    A method that raises, or returns anything but what the interface says, becomes a PluginError
    that names the method and the query.
    """

    def __init__(self, name: str, task: Any):
        for key in ("placeholders", "required_fields"):
            value = getattr(task, key)
            if not _is_strings(value):
                raise ConfigError(f"task: {name!r}: {key} must be a tuple of strings, is {value!r}")
        self.name = name
        self.task = task
        self.placeholders = tuple(task.placeholders)
        self.required_fields = tuple(task.required_fields)
        self.uses_retriever = bool(task.uses_retriever)

    def render(self, row: dict, title: Callable[[str], str]) -> tuple[str, ...]:
        """Return what the task renders: one string for each placeholder. Raises PluginError."""
        num_texts = len(self.placeholders)
        return self._call(
            "render",
            row,
            arguments=(dict(row), title),
            is_valid=lambda texts: _is_strings(texts) and len(texts) == num_texts,
            expected=f"{num_texts} strings, one for each of {', '.join(self.placeholders)}",
        )

    def parse(self, completion: str, row: dict) -> tuple[Any, str | None]:
        """Return the task's (answer, None) or (None, error). Raises PluginError."""
        return self._call(
            "parse",
            row,
            arguments=(completion, dict(row)),
            is_valid=_is_answer_or_error,
            expected="(answer, None) or (None, the error's name)",
        )

    def baseline_answer(self, row: dict) -> Any:
        """Return the task's baseline answer. Raises PluginError."""
        return self._call("baseline_answer", row, arguments=(dict(row),))

    def rank(
        self,
        answers: list,
        rows: list[dict],
        k: int,
        search: Callable[[list[str], int], list[list[str]]],
    ) -> list[list[str]]:
        """Return the task's rankings. Raises PluginError; a RetrieverError passes through."""
        queries = f" for {len(rows)} queries, the first {rows[0]['text'][:80]!r}"
        with calling_plugin(f"task: {self.name}: rank", queries, (RetrieverError,)):
            copied_rows = [dict(row) for row in rows]
            rankings = self.task.rank(list(answers), copied_rows, k, search)
            if not _is_rankings(rankings, len(answers)):
                raise PluginError(
                    f"task: {self.name}: rank returned {repr(rankings)[:80]}, "
                    "must be a list of document ids "
                    f"for each of the {len(answers)} answers,{queries}"
                )
        return rankings

    def _call(
        self,
        method: str,
        row: dict,
        arguments: tuple,
        is_valid: Callable[[Any], bool] = lambda result: True,
        expected: str = "",
    ) -> Any:
        """Call a method of the task. Its result must be valid, and something that JSON can hold.

        Raises PluginError.
        """
        query = f" for the query {row['text'][:80]!r}"
        with calling_plugin(f"task: {self.name}: {method}", query):
            result = getattr(self.task, method)(*arguments)
            if not is_valid(result):
                raise PluginError(
                    f"task: {self.name}: {method} returned {repr(result)[:80]}, "
                    f"must be {expected},{query}"
                )
            if not _is_loggable(result):
                raise PluginError(
                    f"task: {self.name}: {method} returned {repr(result)[:80]}, "
                    f"which cannot be written as JSON in UTF-8,{query}"
                )
        return result


def _is_strings(value: Any) -> bool:
    """Check for a tuple or list of strings."""
    if not isinstance(value, (tuple, list)):
        return False
    return all(isinstance(item, str) for item in value)


def _is_rankings(value: Any, num_answers: int) -> bool:
    """Check for `num_answers` lists of document ids."""
    if not isinstance(value, (list, tuple)):
        return False
    if len(value) != num_answers:
        return False
    return all(_is_strings(doc_ids) for doc_ids in value)


def _is_answer_or_error(value: Any) -> bool:
    """Check for (answer, None) or (None, a name that is not blank)."""
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    answer, error = value
    if error is None:
        return True
    return answer is None and isinstance(error, str) and error.strip() != ""


def _is_loggable(value: Any) -> bool:
    """Check that the log can hold the value: as JSON without NaN, in UTF-8."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True
