"""Completion text -> answer. Strict, linear in the length of the text, and no string makes it
raise.

The prompt already ends in `<think>`, so a completion reads `thought</think> <answer>{"query":
"..."}</answer>`. Only sampled text comes in here, never prompt + completion: the prompt's own
example would be scored.

The errors, as they are counted in the log:
    no_think_end      the thought never ends
    tags              `</think>`, `<answer>`, `</answer>` not exactly once each in this order, or a
    further `<think>` too_long          more than MAX_CHARS characters between the answer tags
    too_deep          more than MAX_BRACKETS opening brackets outside of strings
    no_json           no JSON value, or one followed by more text, or NaN, Infinity, an integer of
    thousands of digits duplicate_key     an object with the same key twice: which one was meant?
    not_object        a JSON value that is not an object
    no_query, query_not_string, query_empty
    query_surrogate   half of a UTF-16 pair: no UTF-8 text holds it
"""

import json
import re

MAX_CHARS = 32_768  # room for every real answer, and a bound on the time json takes

MAX_BRACKETS = 256  # bounds the nesting, so json never recurses deeply

# Possessive, and the closing quote is optional, so that one pass consumes an unclosed string:
# linear.
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)

_SURROGATE = re.compile(r"[\ud800-\udfff]")  # json.loads accepts a lone one


def parse_query(completion: str) -> tuple[str | None, str | None]:
    """(query, None), or (None, error) with one of the names above.

    The query is stripped of surrounding white space and not empty. Keys beside "query" are ignored.
    """
    answer, error = parse_answer_json(completion)
    if error is not None:
        return None, error
    if not isinstance(answer, dict):
        return None, "not_object"
    query = answer.get("query")
    if not isinstance(query, str):
        return None, "query_not_string" if "query" in answer else "no_query"
    query = query.strip()
    error = "query_empty" if not query else "query_surrogate" if _SURROGATE.search(query) else None
    return (None, error) if error else (query, None)


def parse_answer_json(completion: str) -> tuple[object, str | None]:
    """The JSON value between the answer tags as (value, None), or (None, error); `null` is (None,
    None).

    Text before `</think>`, between `</think>` and `<answer>`, and after `</answer>` is free, as in
    Rec-R1's reward, which asks only that each tag stands exactly once and in order. A string in the
    value may hold a lone surrogate: who uses it checks, as parse_query does.
    """
    if "</think>" not in completion:
        return None, "no_think_end"
    tags = "</think>", "<answer>", "</answer>"
    thought_end, start, end = (completion.find(tag) for tag in tags)
    if (
        "<think>" in completion
        or any(completion.count(tag) != 1 for tag in tags)
        or not thought_end < start < end
    ):
        return None, "tags"
    text = completion[start + len("<answer>") : end].strip()
    if len(text) > MAX_CHARS:
        return None, "too_long"
    bare = _STRING.sub("", text)
    if bare.count("[") + bare.count("{") > MAX_BRACKETS:
        return None, "too_deep"
    # NaN, Infinity, -Infinity: json.loads takes them, JSON does not have them, and int raises
    # ValueError
    try:
        return json.loads(text, object_pairs_hook=_build_object, parse_constant=int), None
    except KeyError:  # _object's
        return None, "duplicate_key"
    # A plain ValueError is Python's limit on the digits of an int. RecursionError: the caller's own
    # stack was almost full.
    except (ValueError, RecursionError):
        return None, "no_json"


def _build_object(pairs):
    keys = dict(pairs)
    if len(keys) < len(pairs):
        raise KeyError
    return keys
