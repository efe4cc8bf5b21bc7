"""The parser: what it takes, the name of every refusal, and 10,000 hostile completions."""

import json
import random
import sys
from collections import Counter

import pytest
from helpers.fuzz_answers import completions, wrap

from recr1.tasks.answer_parser import MAX_BRACKETS, MAX_CHARS, parse_answer_json, parse_query

GOOD = '{"query": "star wars"}'
ACCEPTED = [
    wrap(GOOD),
    wrap(GOOD, thought=""),
    f"</think><answer>{GOOD}</answer>",
    # free text, as upstream
    f"a thought\nwith {{braces}} </think> some text <answer>\n{GOOD}\n</answer>. bye",
    wrap('{"why": [1, {"a": null}], "query": "  star wars\\n"}'),
    wrap(GOOD, thought="Assistant: </answ <|im_end|>"),
    wrap(GOOD) + "<|im_end|>",
    wrap(f"\u2003\n{GOOD}\xa0"),
]
REFUSED_COMPLETIONS = [
    ("", "no_think_end"),
    ("star wars", "no_think_end"),
    (f"<answer>{GOOD}</answer>", "no_think_end"),
    ("</think>", "tags"),
    (f"</think>{GOOD}", "tags"),
    (f"</think><answer>{GOOD}", "tags"),
    (f"</think>{GOOD}</answer>", "tags"),
    (f"<answer>{GOOD}</answer></think>", "tags"),
    (f"</think></answer>{GOOD}<answer>", "tags"),
    (f"<answer></think>{GOOD}</answer>", "tags"),
    ("<think>" + wrap(GOOD), "tags"),
    (wrap(GOOD) + "<think>", "tags"),
    (wrap(GOOD) + wrap(GOOD), "tags"),
    (wrap(GOOD) + "</think>", "tags"),
    (wrap(GOOD) + "</answer>", "tags"),
    (wrap("<answer>" + GOOD), "tags"),
    (wrap('{"query": "a</answer>"}'), "tags"),
    (wrap(GOOD).replace("answer", "Answer"), "tags"),
]
REFUSED_BODIES = [  # between the tags
    ("", "no_json"),
    ("star wars", "no_json"),
    ("{'query': 'a'}", "no_json"),
    (f"```json\n{GOOD}\n```", "no_json"),
    (GOOD[:-1], "no_json"),
    (GOOD + GOOD, "no_json"),
    ('{"query": "a\nb"}', "no_json"),
    ("\ufeff" + GOOD, "no_json"),
    ('( "query": "a" )', "no_json"),
    ("NaN", "no_json"),
    ('{"query": "a", "n": -Infinity}', "no_json"),
    ('{"query": ' + "9" * 5_000 + "}", "no_json"),
    ("[" * 20_000, "too_deep"),
    ('{"query":' * 2_000 + "1" + "}" * 2_000, "too_deep"),
    ("[" * 100_000, "too_long"),
    ('{"query": "' + "a" * MAX_CHARS + '"}', "too_long"),
    ("null", "not_object"),
    ("7", "not_object"),
    ('"query"', "not_object"),
    ('["query"]', "not_object"),
    ("{}", "no_query"),
    ('{"Query": "a"}', "no_query"),
    ('{"a": {"query": "a"}}', "no_query"),
    ('{"query": null}', "query_not_string"),
    ('{"query": ["a"]}', "query_not_string"),
    ('{"query": 7}', "query_not_string"),
    ('{"query": ""}', "query_empty"),
    ('{"query": " \\t\\n "}', "query_empty"),
    ('{"query": "a \\ud800"}', "query_surrogate"),
    ('{"query": "a \udc00"}', "query_surrogate"),
    ('{"query": "a", "query": "b"}', "duplicate_key"),
    ('{"query": "a", "b": [{"c": 1, "c": 1}]}', "duplicate_key"),
]


@pytest.mark.parametrize("completion", ACCEPTED)
def test_accepted(completion):
    assert parse_query(completion) == ("star wars", None)


def list_refused() -> list[tuple[str, str]]:
    refused = list(REFUSED_COMPLETIONS)
    for body, error in REFUSED_BODIES:
        refused.append((wrap(body), error))
    return refused


REFUSED = list_refused()


def parse_body(body: str) -> tuple[str | None, str | None]:
    return parse_query(wrap(body))


@pytest.mark.parametrize("completion, error", REFUSED, ids=range(len(REFUSED)))
def test_refused(completion, error):
    assert parse_query(completion) == (None, error)


def test_nesting_counts_brackets_outside_of_strings_only():
    in_a_string = json.dumps({"query": '[{\\"' * 1_000})
    depth = MAX_BRACKETS - 1
    at_limit = '{"query": "a", "b": ' + "[" * depth + "]" * depth + "}"
    over_limit = at_limit.replace("[]", "[[]]")

    _, error = parse_body(in_a_string)
    assert error is None
    assert parse_body(at_limit) == ("a", None)
    assert parse_body(over_limit) == (None, "too_deep")


def measure_stack_depth() -> int:
    """Count the frames of Python's stack, from the caller's on."""
    depth = 0
    frame = sys._getframe(1)
    while frame:
        depth = depth + 1
        frame = frame.f_back
    return depth


def parse_at_depth(completion: str, frames: int):
    """Parse a completion under so many further frames of Python."""
    if frames == 0:
        return parse_query(completion)
    return parse_at_depth(completion, frames - 1)


def test_a_nearly_full_stack_does_not_raise():
    completion = wrap('{"query": "a", "b": ' + "[" * 250 + "]" * 250 + "}")
    frames = sys.getrecursionlimit() - measure_stack_depth() - 100

    result = parse_at_depth(completion, frames)

    # on Python 3.12 and later C code has a stack of its own, and the answer is simply parsed
    assert result in [("a", None), (None, "no_json")]


def draw_query(rng: random.Random) -> str:
    """Draw a query of up to 30 characters: ASCII, any of Unicode's first plane, or emoji."""
    characters = []
    length = rng.randint(1, 30)
    for _ in range(length):
        ascii_code = rng.randrange(32, 127)
        first_plane_code = rng.randrange(0x20, 0xD800)
        emoji_code = rng.randrange(0x1F300, 0x1F600)
        code = rng.choice([ascii_code, first_plane_code, emoji_code])
        characters.append(chr(code))
    return "".join(characters).strip() or "x"


def test_any_query_comes_back_as_it_was_written():
    rng = random.Random(0)
    for _ in range(500):
        query = draw_query(rng)
        for ascii_only in (False, True):
            body = json.dumps({"query": query}, ensure_ascii=ascii_only)
            assert parse_body(body) == (query, None)


def test_fuzz():
    outcomes = Counter()
    for completion in completions(10_000, seed=0):
        query, error = parse_query(completion)
        outcomes[error] += 1
        assert (query is None) != (error is None)
        if query is not None:
            assert query == query.strip()
            assert query != ""
            assert query.encode("utf-8")

    # the fuzz reaches every outcome there is, success too
    errors = {error for _, error in REFUSED}
    assert set(outcomes) == errors | {None}
    assert min(outcomes.values()) >= 20, outcomes


def test_answer_json_gives_any_value():
    value = {"reranked_items": ["Item_2", "Item_1"]}
    list_answer = wrap(json.dumps(value))
    null_answer = wrap("null")
    broken_answer = wrap("[1")

    assert parse_answer_json(list_answer) == (value, None)
    assert parse_answer_json(null_answer) == (None, None)
    assert parse_answer_json(broken_answer) == (None, "no_json")
