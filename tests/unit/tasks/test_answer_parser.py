"""The parser: what it takes, the name of every refusal, and 10,000 hostile completions."""

import json
import random
import sys
from collections import Counter

import pytest
from helpers.fuzz_answers import completions, wrap

from recr1.tasks.answer_parser import MAX_BRACKETS, MAX_CHARS, parse_answer_json, parse_query

GOOD = '{"query": "star wars"}'


@pytest.mark.parametrize(
    "completion",
    [
        wrap(GOOD),
        wrap(GOOD, thought=""),
        f"</think><answer>{GOOD}</answer>",
        # free text, as upstream
        f"a thought\nwith {{braces}} </think> some text <answer>\n{GOOD}\n</answer>. bye",
        wrap('{"why": [1, {"a": null}], "query": "  star wars\\n"}'),
        wrap(GOOD, thought="Assistant: </answ <|im_end|>"),
        wrap(GOOD) + "<|im_end|>",
        wrap(f"\u2003\n{GOOD}\xa0"),
    ],
)
def test_accepted(completion):
    assert parse_query(completion) == ("star wars", None)


REFUSED = [
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


@pytest.mark.parametrize("completion, error", REFUSED, ids=range(len(REFUSED)))
def test_refused(completion, error):
    assert parse_query(completion) == (None, error)


def test_nesting_counts_brackets_outside_of_strings_only():
    assert parse_query(wrap(json.dumps({"query": '[{\\"' * 1_000})))[1] is None
    at_limit = '{"query": "a", "b": ' + "[" * (MAX_BRACKETS - 1) + "]" * (MAX_BRACKETS - 1) + "}"
    assert parse_query(wrap(at_limit)) == ("a", None)
    assert parse_query(wrap(at_limit.replace("[]", "[[]]"))) == (None, "too_deep")


def test_a_nearly_full_stack_does_not_raise():
    def call_at_depth(n):
        return parse_query(text) if n == 0 else call_at_depth(n - 1)

    text = wrap('{"query": "a", "b": ' + "[" * 250 + "]" * 250 + "}")
    depth = 0
    frame = sys._getframe()
    while frame:
        depth = depth + 1
        frame = frame.f_back
    # on Python 3.12 and later C code has a stack of its own, and the answer is simply parsed
    assert call_at_depth(sys.getrecursionlimit() - depth - 100) in [("a", None), (None, "no_json")]


def test_any_query_comes_back_as_it_was_written():
    rng = random.Random(0)
    for _ in range(500):
        query = (
            "".join(
                chr(
                    rng.choice(
                        [
                            rng.randrange(32, 127),
                            rng.randrange(0x20, 0xD800),
                            rng.randrange(0x1F300, 0x1F600),
                        ]
                    )
                )
                for _ in range(rng.randint(1, 30))
            ).strip()
            or "x"
        )
        for ascii_only in (False, True):
            assert parse_query(wrap(json.dumps({"query": query}, ensure_ascii=ascii_only))) == (
                query,
                None,
            )


def test_fuzz():
    outcomes = Counter()
    for completion in completions(10_000, seed=0):
        query, error = parse_query(completion)
        assert (query is None) != (error is None)
        assert query is None or query == query.strip() != "" and query.encode()
        outcomes[error] += 1
    # the fuzz reaches every outcome there is, success too
    assert (
        set(outcomes) == {None} | {error for _, error in REFUSED} and min(outcomes.values()) >= 20
    ), outcomes


def test_answer_json_gives_any_value():
    assert parse_answer_json(wrap('{"reranked_items": ["Item_2", "Item_1"]}')) == (
        {"reranked_items": ["Item_2", "Item_1"]},
        None,
    )
    assert parse_answer_json(wrap("null")) == (None, None)
    assert parse_answer_json(wrap("[1")) == (None, "no_json")
