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
REFUSED = [  # completion, error
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
    (wrap(""), "no_json"),
    (wrap("star wars"), "no_json"),
    (wrap("{'query': 'a'}"), "no_json"),
    (wrap(f"```json\n{GOOD}\n```"), "no_json"),
    (wrap(GOOD[:-1]), "no_json"),
    (wrap(GOOD + GOOD), "no_json"),
    (wrap('{"query": "a\nb"}'), "no_json"),
    (wrap("\ufeff" + GOOD), "no_json"),
    (wrap('( "query": "a" )'), "no_json"),
    (wrap("NaN"), "no_json"),
    (wrap('{"query": "a", "n": -Infinity}'), "no_json"),
    (wrap('{"query": ' + "9" * 5_000 + "}"), "no_json"),
    (wrap("[" * 20_000), "too_deep"),
    (wrap('{"query":' * 2_000 + "1" + "}" * 2_000), "too_deep"),
    (wrap("[" * 100_000), "too_long"),
    (wrap('{"query": "' + "a" * MAX_CHARS + '"}'), "too_long"),
    (wrap("null"), "not_object"),
    (wrap("7"), "not_object"),
    (wrap('"query"'), "not_object"),
    (wrap('["query"]'), "not_object"),
    (wrap("{}"), "no_query"),
    (wrap('{"Query": "a"}'), "no_query"),
    (wrap('{"a": {"query": "a"}}'), "no_query"),
    (wrap('{"query": null}'), "query_not_string"),
    (wrap('{"query": ["a"]}'), "query_not_string"),
    (wrap('{"query": 7}'), "query_not_string"),
    (wrap('{"query": ""}'), "query_empty"),
    (wrap('{"query": " \\t\\n "}'), "query_empty"),
    (wrap('{"query": "a \\ud800"}'), "query_surrogate"),
    (wrap('{"query": "a \udc00"}'), "query_surrogate"),
    (wrap('{"query": "a", "query": "b"}'), "duplicate_key"),
    (wrap('{"query": "a", "b": [{"c": 1, "c": 1}]}'), "duplicate_key"),
]


@pytest.mark.parametrize("completion", ACCEPTED)
def test_accepted(completion):
    assert parse_query(completion) == ("star wars", None)


@pytest.mark.parametrize("completion, error", REFUSED, ids=range(len(REFUSED)))
def test_refused(completion, error):
    assert parse_query(completion) == (None, error)


def test_nesting_counts_brackets_outside_of_strings_only():
    in_a_string = json.dumps({"query": '[{\\"' * 1_000})
    depth = MAX_BRACKETS - 1
    at_limit = '{"query": "a", "b": ' + "[" * depth + "]" * depth + "}"
    over_limit = at_limit.replace("[]", "[[]]")

    _, error = parse_query(wrap(in_a_string))
    assert error is None
    assert parse_query(wrap(at_limit)) == ("a", None)
    assert parse_query(wrap(over_limit)) == (None, "too_deep")


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
    for _ in range(rng.randint(1, 30)):
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
            assert parse_query(wrap(body)) == (query, None)


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

    assert parse_answer_json(wrap(json.dumps(value))) == (value, None)
    assert parse_answer_json(wrap("null")) == (None, None)
    assert parse_answer_json(wrap("[1")) == (None, "no_json")
