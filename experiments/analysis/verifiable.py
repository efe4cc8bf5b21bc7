"""Instructions whose fulfilment a program can check, in the manner of IFEval.

This is a small set of our own, not IFEval (Zhou et al. 2023, arXiv:2311.07911): 13 kinds of
constraints on 12 plain tasks each, 156 prompts, one constraint a prompt, and answers of a few dozen
words. IFEval's 541 prompts ask for up to hundreds of words and come from a hub. As there, an empty
answer follows nothing. Compare models on this set, never its figures with IFEval's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import NamedTuple

Check = Callable[[str], bool]


class Task(NamedTuple):
    """What is asked for, apart from the constraint."""

    text: str
    keyword: str  # a word that an answer could well have
    avoidable: str  # a word that an answer can do without


class Instruction(NamedTuple):
    """One prompt with the check of its answer."""

    kind: str
    prompt: str
    check: Check

    def is_followed(self, answer: str) -> bool:
        """Return whether the answer says something and fulfils the constraint."""
        return bool(answer.strip()) and self.check(answer)


TASKS = (
    Task("Describe a rainy day in a city.", "street", "umbrella"),
    Task("Explain why people need sleep.", "body", "tired"),
    Task("Tell me about dogs as pets.", "home", "loyal"),
    Task("Give advice on learning to swim.", "water", "pool"),
    Task("Describe what a farmer does.", "field", "animals"),
    Task("Explain what a bridge is for.", "river", "cars"),
    Task("Write about a walk in a forest.", "trees", "green"),
    Task("Say what makes a good friend.", "trust", "honest"),
    Task("Describe how to make a sandwich.", "bread", "cheese"),
    Task("Explain what the sun gives us.", "light", "warm"),
    Task("Write about a train journey.", "window", "station"),
    Task("Say why people read books.", "story", "learn"),
)

ENDINGS = ("That is all.", "Have a nice day.", "I hope this helps.", "This is the end.")
OPENINGS = ("In short", "First of all", "To begin with", "As you know")
TITLE = re.compile(r"<<[^\n<>]*\w[^\n<>]*>>")
BULLET = re.compile(r"^\s*[*-] +\S", re.MULTILINE)
WORD = re.compile(r"\w[\w'’-]*")


def make_instructions() -> list[Instruction]:
    """Make the prompts: one of each kind, then the next of each kind, ..., so that the first N of
    them are a balanced set too.
    """
    instructions = []
    for index, task in enumerate(TASKS):
        for require in CONSTRAINTS:
            kind = require.__name__.removeprefix("require_")
            wish, check = require(index, task)
            instructions.append(Instruction(kind, f"{task.text} {wish}", check))
    return instructions


# --- Constraints: (number of the task, task) -> the words of the prompt, and the check ------------


def require_lower_case(index: int, task: Task) -> tuple[str, Check]:
    return "Write in lower case letters only, without any capital letter.", str.islower


def require_capitals(index: int, task: Task) -> tuple[str, Check]:
    return "Write in capital letters only.", str.isupper


def require_no_comma(index: int, task: Task) -> tuple[str, Check]:
    return "Do not use any commas.", lambda answer: "," not in answer


def require_bullets(index: int, task: Task) -> tuple[str, Check]:
    number = 2 + index % 4
    wish = (
        f"Answer with exactly {number} bullet points. "
        "Begin each of them on a line of its own with an asterisk, like this: * one point"
    )
    return wish, lambda answer: len(BULLET.findall(answer)) == number


def require_ending(index: int, task: Task) -> tuple[str, Check]:
    ending = ENDINGS[index % len(ENDINGS)]
    wish = f'Answer in one or two sentences, then end with exactly these words: "{ending}"'

    def check(answer: str) -> bool:
        return answer.strip().rstrip('"').lower().endswith(ending.lower())

    return wish, check


def require_opening(index: int, task: Task) -> tuple[str, Check]:
    opening = OPENINGS[index % len(OPENINGS)]
    wish = f'Begin your answer with exactly these words: "{opening}"'

    def check(answer: str) -> bool:
        return answer.strip().lstrip('"').lower().startswith(opening.lower())

    return wish, check


def require_json(index: int, task: Task) -> tuple[str, Check]:
    return 'Answer with one JSON object and nothing else. Use the key "answer".', is_json_object


def require_at_least_words(index: int, task: Task) -> tuple[str, Check]:
    least = 20 + 10 * (index % 4)
    return f"Use at least {least} words.", lambda answer: count_words(answer) >= least


def require_at_most_words(index: int, task: Task) -> tuple[str, Check]:
    most = 10 + 10 * (index % 3)
    return f"Use at most {most} words.", lambda answer: count_words(answer) <= most


def require_keyword(index: int, task: Task) -> tuple[str, Check]:
    times = 2 + index % 2
    wish = f'Use the word "{task.keyword}" at least {times} times.'
    return wish, lambda answer: count_word(answer, task.keyword) >= times


def require_no_word(index: int, task: Task) -> tuple[str, Check]:
    wish = f'Do not use the word "{task.avoidable}".'
    return wish, lambda answer: count_word(answer, task.avoidable) == 0


def require_quotation(index: int, task: Task) -> tuple[str, Check]:
    wish = "Put your whole answer into double quotation marks."
    return wish, lambda answer: bool(re.fullmatch(r'"[^"]+"', answer.strip()))


def require_title(index: int, task: Task) -> tuple[str, Check]:
    wish = "Begin with a title in double angular brackets, like this: <<a title>>"
    return wish, lambda answer: bool(TITLE.match(answer.strip()))


CONSTRAINTS = (
    require_lower_case,
    require_capitals,
    require_no_comma,
    require_bullets,
    require_ending,
    require_opening,
    require_json,
    require_at_least_words,
    require_at_most_words,
    require_keyword,
    require_no_word,
    require_quotation,
    require_title,
)


def is_json_object(answer: str) -> bool:
    """Return whether the answer is a JSON object with the key "answer"; a fence around it counts as
    nothing, as in IFEval.
    """
    text = answer.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and "answer" in value


def count_words(answer: str) -> int:
    """Count the words of an answer; punctuation alone is none."""
    return len(WORD.findall(answer))


def count_word(answer: str, word: str) -> int:
    """Count how often a word stands in an answer, in capitals or not."""
    words = [found.lower() for found in WORD.findall(answer)]
    return words.count(word)
