"""Parse the text of a completion into an answer. Strict, in time linear in the length of the text,
and no string makes it raise.

The prompt already ends in `<think>`, so a completion reads
`thought</think> <answer>{"query": "..."}</answer>`. Only sampled text is parsed, never prompt +
completion: the example in the prompt would be scored.

The names of the errors, as the log counts them:

    no_think_end      the thought never ends
    tags              `</think>`, `<answer>`, `</answer>` are not there exactly once each and in
                      this order, or there is another `<think>`
    too_long          more than MAX_CHARS characters between the answer tags
    too_deep          more than MAX_BRACKETS opening brackets outside of strings
    no_json           no JSON value, or one followed by more text, or NaN, Infinity, or an
                      integer of thousands of digits
    duplicate_key     an object with the same key twice: which one was meant?
    not_object        a JSON value that is not an object
    no_query, query_not_string, query_empty
    query_surrogate   half of a UTF-16 pair, which no UTF-8 text can hold
"""

from __future__ import annotations

import json
import re

MAX_CHARS = 32_768  # enough for every real answer; bounds the time that json takes

MAX_BRACKETS = 256  # bounds the nesting, so that json never recurses deeply

# One JSON string. The quantifier is possessive and the closing quote optional, so that one pass
# consumes an unclosed string too: linear time.
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)

_SURROGATE = re.compile(r"[\ud800-\udfff]")  # json.loads accepts a lone one


class DuplicateKeyError(Exception):
    """A JSON object has the same key twice."""


def parse_query(completion: str) -> tuple[str | None, str | None]:
    """Return (query, None), or (None, error) with one of the names above.

    The query is stripped of surrounding white space and is not empty. Keys beside "query" are
    ignored.
    """
    answer, error = parse_answer_json(completion)
    if error is not None:
        return None, error
    if not isinstance(answer, dict):
        return None, "not_object"
    if "query" not in answer:
        return None, "no_query"
    query = answer["query"]
    if not isinstance(query, str):
        return None, "query_not_string"

    query = query.strip()
    if not query:
        return None, "query_empty"
    if _SURROGATE.search(query):
        return None, "query_surrogate"
    return query, None


def parse_answer_json(completion: str) -> tuple[object, str | None]:
    """Return the JSON value between the answer tags as (value, None), or (None, error).

    The value `null` is (None, None). Text before `</think>`, between `</think>` and `<answer>`, and
    after `</answer>` is free, as in Rec-R1's reward, which asks only that each tag occurs exactly
    once and in order. A string in the value may hold a lone surrogate: the caller checks for it, as
    parse_query does.
    """
    if "</think>" not in completion:
        return None, "no_think_end"
    if not _has_each_tag_once(completion):
        return None, "tags"

    start = completion.find("<answer>") + len("<answer>")
    end = completion.find("</answer>")
    text = completion[start:end].strip()
    if len(text) > MAX_CHARS:
        return None, "too_long"
    if _count_brackets(text) > MAX_BRACKETS:
        return None, "too_deep"
    return _load_json(text)


def _has_each_tag_once(completion: str) -> bool:
    """Check that the three tags occur once each and in order, and that no thought begins anew."""
    if "<think>" in completion:
        return False
    tags = ("</think>", "<answer>", "</answer>")
    if any(completion.count(tag) != 1 for tag in tags):
        return False
    thought_end, answer_start, answer_end = map(completion.find, tags)
    return thought_end < answer_start < answer_end


def _count_brackets(text: str) -> int:
    """Count the opening brackets outside of strings."""
    outside_strings = _JSON_STRING.sub("", text)
    return outside_strings.count("[") + outside_strings.count("{")


def _load_json(text: str) -> tuple[object, str | None]:
    """Return (value, None) or (None, error)."""
    try:
        value = json.loads(text, object_pairs_hook=_build_object, parse_constant=_refuse_constant)
    except DuplicateKeyError:
        return None, "duplicate_key"
    except ValueError:
        # No JSON, or an integer over Python's limit on digits.
        return None, "no_json"
    except RecursionError:
        # The caller's own stack was almost full.
        return None, "no_json"
    return value, None


def _build_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a dict of an object's (key, value) pairs. Raises DuplicateKeyError."""
    value_of_key = dict(pairs)
    if len(value_of_key) < len(pairs):
        raise DuplicateKeyError
    return value_of_key


def _refuse_constant(name: str) -> None:
    """Raise ValueError for NaN, Infinity and -Infinity: json.loads takes them, JSON has none."""
    raise ValueError(f"{name} is no JSON")
