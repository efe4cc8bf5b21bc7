"""A task of a user's own, `module:Class`: its methods are called, and what one of them does wrong
is one line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from recr1.config.plugins import PluginError, calling_plugin
from recr1.config.schema import ConfigError
from recr1.retrieval.interface import RetrieverError


class UserTask:
    """tasks/registry.py's Task around `task`. A method that raises, or returns anything but what stands
    there, is an OwnError that names it and the query.
    """

    def __init__(self, name: str, task):
        self.name = name
        self.task = task
        for key in ("placeholders", "required_fields"):
            if not (
                isinstance(value := getattr(task, key), (tuple, list))
                and all(isinstance(item, str) for item in value)
            ):
                raise ConfigError(f"task: {name!r}: {key} must be a tuple of strings, is {value!r}")
        self.placeholders = tuple(task.placeholders)
        self.required_fields = tuple(task.required_fields)
        self.uses_retriever = bool(task.uses_retriever)

    def render(self, row: dict, title: Callable[[str], str]) -> tuple[str, ...]:
        return self._checked(
            "render",
            row,
            (dict(row), title),
            lambda found: _is_strings(found) and len(found) == len(self.placeholders),
            f"{len(self.placeholders)} strings, one for each of {', '.join(self.placeholders)}",
        )

    def parse(self, completion: str, row: dict) -> tuple[Any, str | None]:
        def right(found):
            return (
                isinstance(found, tuple)
                and len(found) == 2
                and (
                    found[1] is None
                    or found[0] is None
                    and isinstance(found[1], str)
                    and found[1].strip()
                )
            )

        return self._checked(
            "parse",
            row,
            (completion, dict(row)),
            right,
            "(answer, None) or (None, the error's name)",
        )

    def baseline_answer(self, row: dict) -> Any:
        return self._checked("baseline_answer", row, (dict(row),))

    def rank(
        self,
        answers: list,
        rows: list[dict],
        k: int,
        search: Callable[[list[str], int], list[list[str]]],
    ) -> list[list[str]]:
        where = f" for {len(rows)} queries, the first {rows[0]['text'][:80]!r}"
        with calling_plugin(f"task: {self.name}: rank", where, (RetrieverError,)):
            found = self.task.rank(list(answers), [dict(row) for row in rows], k, search)
            if not (
                isinstance(found, (list, tuple))
                and len(found) == len(answers)
                and all(_is_strings(ids) for ids in found)
            ):
                raise PluginError(
                    f"task: {self.name}: rank returned {repr(found)[:80]}, must be a list of document ids for each of the {len(answers)} answers,{where}"
                )
        return found

    def _checked(
        self,
        method: str,
        row: dict,
        args: tuple,
        right: Callable[[Any], Any] = lambda found: True,
        wanted: str = "",
    ):
        """The method's result, which must also be something that the log can hold."""
        where = f" for the query {row['text'][:80]!r}"
        with calling_plugin(f"task: {self.name}: {method}", where):
            found = getattr(self.task, method)(*args)
            if not right(found):
                raise PluginError(
                    f"task: {self.name}: {method} returned {repr(found)[:80]}, must be {wanted},{where}"
                )
            try:
                json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
            except (TypeError, ValueError, RecursionError):
                raise PluginError(
                    f"task: {self.name}: {method} returned {repr(found)[:80]}, which cannot be written as JSON in UTF-8,{where}"
                ) from None
        return found


def _is_strings(found) -> bool:
    return isinstance(found, (tuple, list)) and all(isinstance(item, str) for item in found)
