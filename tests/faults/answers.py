"""Malformed answers: every one is an error of its name, from the parser and in a run, whatever
stands beside it.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import partial

from alone import LISTED, Bench, each, expect, logged
from helpers.fuzz_answers import MB, wrap
from world import Outcome, World

from recr1.config.schema import RewardConfig
from recr1.tasks import registry as tasks
from recr1.tasks.answer_parser import MAX_BRACKETS, MAX_CHARS, parse_answer_json
from recr1.tasks.recommend_list import RecommendList
from recr1.tasks.rerank import Rerank

SLOWEST = 0.05  # seconds of CPU time for a text of up to 1 MB
ROW = dict(text="lamps", candidates=[f"d{i}" for i in range(LISTED)])
LISTS = {"rerank": Rerank.key, "recommend_list": RecommendList.key}
WORDS = "red green blue lamp chair table café ユーザー 12 naïve".split()


def malformed(world: World, n: int) -> Iterator[Outcome]:
    """Texts that hold no answer by the way in which they were made, parsed alone and then all of
    them as what a run's policy writes.
    """
    rng = world.rng
    bench = Bench(world, "answers")
    made = []
    for make in [
        make for _ in range(-(-n // len(MAKERS))) for make in rng.sample(MAKERS, len(MAKERS))
    ][:n]:
        task = rng.choice(sorted(LISTS)) if make in OF_LISTS else "product_search"
        made.append(
            (
                make.__name__.strip("_"),
                task,
                *(make(rng, LISTS[task]) if make in OF_LISTS else make(rng)),
            )
        )
    return each(
        world,
        [
            (name, partial(_judged, bench, made, task, text, errors))
            for name, task, text, errors in made
        ],
    )


def _judged(bench: Bench, made: list, task: str, text: str, errors: tuple[str, ...]) -> None:
    parse = tasks.TASKS[task](RewardConfig()).parse
    times = []
    for _ in range(3):
        start = time.thread_time()
        answer, error = parse(text, ROW)
        times.append(time.thread_time() - start)
    expect(
        answer is None and error in errors,
        f"{text[:200]!r} gives {answer!r}, {error}; must be one of {errors}",
    )
    expect(
        not parse_answer_json(text)[1] or parse_answer_json(text)[1] == error,
        f"{text[:200]!r}: the two parsers differ",
    )
    expect(min(times) < SLOWEST, f"{text[:200]!r} takes {min(times):.2f} s")
    texts = [text for _, of, text, _ in made if of == task]
    rows = _in_a_run(bench, task, texts).get(text, [])
    logged_values = [{key: row.get(key) for key in ("error", "reward", "ndcg")} for row in rows]
    expect(
        bool(rows)
        and all(
            row["error"] == error
            and row.get("reward", -1.0) == -1.0
            and row.get("ndcg", 0.0) == 0.0
            for row in rows
        ),
        f"{text[:200]!r} in a run: {logged_values}",
    )


def _in_a_run(bench: Bench, task: str, texts: list[str]) -> dict[str, list[dict]]:
    """{text: what the run has written down of it}. One run for all texts of a task."""
    if task not in bench.kept:
        user = " ".join(f"{{{place}}}" for place in tasks.TASKS[task].placeholders)
        more = (
            ()
            if task == "product_search"
            else (
                f"task={task}",
                f"prompt.user='{user}'",
                "prompt.max_tokens=256",
            )
        )
        data = None if task == "product_search" else bench.listed()
        _, run = bench.run_saying(
            itertools.cycle(texts),
            data,
            "train.prompts_per_step=28",
            "sampling.temperature=20",
            "train.tokens_per_micro_batch=4000",
            *more,
        )
        rows = bench.kept[task] = {}
        for row in logged(run):
            rows.setdefault(row["text"], []).append(row)
    return bench.kept[task]


def words(rng) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))


def valid(rng) -> str:
    return wrap(
        json.dumps({"query": words(rng)}, ensure_ascii=rng.random() < 0.5), thought=words(rng)
    )


def _no_end_of_thought(rng):
    return valid(rng).replace(
        "</think>", rng.choice(["", "</ think>", "</thin", "\\u003c/think>"])
    ), ("no_think_end",)


def _a_tag_missing(rng):
    tag = rng.choice(["<answer>", "</answer>"])
    return valid(rng).replace(
        tag, rng.choice(["", tag[:-1], tag.upper(), tag.replace("a", "а")])
    ), ("tags",)


def _a_tag_twice(rng):
    tag = rng.choice(["<answer>", "</answer>", "</think>", "<think>"])
    text = valid(rng)
    at = rng.randrange(len(text) + 1)
    while any(
        text[i : i + len(t)] == t and i < at < i + len(t)
        for t in ("<answer>", "</answer>", "</think>")
        for i in range(len(text))
    ):
        at = rng.randrange(len(text) + 1)
    return text[:at] + tag + text[at:], ("tags",)


def _two_answers(rng):
    text = valid(rng)
    return text + text[text.index("<answer>") :], ("tags",)


def _tags_in_another_order(rng):
    parts = ["</think>", "<answer>", json.dumps({"query": words(rng)}), "</answer>"]
    order = rng.choice([[1, 0, 2, 3], [3, 0, 2, 1], [1, 2, 3, 0], [0, 3, 2, 1], [0, 2, 3, 1]])
    return words(rng) + "".join(parts[i] for i in order), ("tags",)


def _the_prompt_again(rng):
    """What a parser finds that looks through prompt and completion."""
    return f'Assistant: <think>{words(rng)}\n<answer>{{"query": "{words(rng)}"}}</answer>', (
        "no_think_end",
    )


def _json_cut(rng):
    text = json.dumps({"query": words(rng)})
    return wrap(text[: rng.randrange(1, len(text))]), ("no_json",)


def _json_and_more(rng):
    return wrap(
        json.dumps({"query": words(rng)})
        + rng.choice([", ", "}", " {}", "\x00", "\ufeff", "; drop", "```"])
    ), ("no_json",)


def _no_json(rng):
    return wrap(
        rng.choice(
            [
                words(rng) + "!",
                "{'query': 'lamp'}",
                '{query: "lamp"}',
                '{"query": "a\nb"}',
                '{"query": "\\x41"}',
                "```json\n{}\n```",
                "",
            ]
        )
    ), ("no_json",)


def _not_an_object(rng):
    return wrap(
        rng.choice(
            [
                "null",
                "7",
                "true",
                "-1e999",
                '"lamp"',
                '["query"]',
                "[]",
                json.dumps([{"query": words(rng)}]),
                json.dumps(words(rng)),
            ]
        )
    ), ("not_object",)


def _another_type(rng):
    value = rng.choice([None, 7, 1.5, True, [], ["a"], {"query": "a"}, {}])
    return wrap(json.dumps({"query": value})), ("query_not_string",)


def _another_key(rng):
    return wrap(
        json.dumps({rng.choice(["Query", "query ", "q", "", "queries", "qu\u0435ry"]): words(rng)})
    ), ("no_query",)


def _empty(rng):
    return wrap(
        json.dumps({"query": "".join(rng.choices(" \n\t\u2003\u3000\xa0", k=rng.randrange(9)))})
    ), ("query_empty",)


def _key_twice(rng):
    return wrap(f'{{"query": "{words(rng)}", "n": [1], "query": "{words(rng)}"}}'), (
        "duplicate_key",
    )


def _no_number(rng):
    query = words(rng)
    number = rng.choice(["NaN", "Infinity", "-Infinity", "nan", "0x10", "01", "1."])
    return wrap(f'{{"query": "{query}", "n": {number}}}'), ("no_json",)


def _digits(rng):
    query = words(rng)
    digits = rng.choice("123456789") * rng.randrange(4_301, 30_000)
    return wrap(f'{{"query": "{query}", "n": {digits}}}'), ("no_json",)


def _surrogate(rng):
    half = f"\\u{rng.randrange(0xD800, 0xE000):04x}"
    return wrap(f'{{"query": "{words(rng)} {half}{rng.choice(["", " x", half])}"}}'), (
        "query_surrogate",
    )


def _nested(rng):
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}"), ('[{"query":', "}]")])
    depth = rng.choice([MAX_BRACKETS, 1_000, 5_000])
    text = (
        '{"query": "x", "y": '
        + opening * depth
        + "1"
        + closing * rng.choice([depth, depth - 1, 0])
        + "}"
    )
    return wrap(text), ("too_deep", "too_long")


def _long(rng):
    return wrap(
        json.dumps(
            {"query": rng.choice('ab[{\\"é') * rng.choice([MAX_CHARS, 200_000, MB // 2])},
            ensure_ascii=False,
        )
    ), ("too_long",)


def _unclosed(rng):
    """1 MB in which a lazy regular expression looks for an end that never comes."""
    piece = rng.choice(["<answer>", "<answer", "</answer", "<", '{"query": "', "[", "\\"])
    return f"{words(rng)}</think>" + rng.choice(["", "<answer>"]) + piece * (MB // len(piece)), (
        "tags",
    )


# --- lists of labels: key is that of the task's answer ---


def _list(rng, key: str, *strange, drop: int = 0, add: int = 0):
    labels = [f"Item_{i}" for i in rng.sample(range(1, LISTED + 1), LISTED - drop)]
    for item in strange:
        labels.insert(rng.randrange(len(labels) + 1), item)
    return wrap(
        json.dumps({"why": words(rng), key: labels + rng.choices(labels, k=add)}),
        thought=words(rng),
    )


def _no_list(rng, key):
    other = rng.choice([key.upper(), key + "s", "query", "candidates", ""])
    return _list(rng, other), ("no_list",)


def _list_is_none(rng, key):
    return wrap(
        json.dumps({key: rng.choice([None, "Item_1", 1, True, {"Item_1": 1}, {}, '["Item_1"]'])})
    ), ("not_list",)


def _no_label(rng, key):
    return _list(
        rng, key, rng.choice([1, None, 1.5, False, ["Item_1"], {"Item_1": 1}, []]), drop=1
    ), ("not_label",)


def _unknown_item(rng, key):
    strange = [
        "Item_0",
        f"Item_{LISTED + 1}",
        "Item_01",
        "item_1",
        " Item_1",
        "Item_1\n",
        "Item_",
        "",
        "d0",
        "Item_\u0661",
        "Item_" + "9" * 5_000,
        "\ud800",
        "red lamp",
        "Item_-1",
    ]
    return _list(rng, key, rng.choice(strange), drop=1), ("unknown_item",)


def _repeated_item(rng, key):
    return _list(rng, key, drop=rng.randrange(LISTED - 1), add=rng.randrange(1, 3)), (
        "repeated_item",
    )


def _list_too_short(rng, key):
    """Where all must be ordered, one is missing; nowhere none."""
    return _list(rng, key, drop=rng.randrange(1, LISTED + 1) if key == Rerank.key else LISTED), (
        "list_length",
    )


OF_LISTS = [_no_list, _list_is_none, _no_label, _unknown_item, _repeated_item, _list_too_short]
MAKERS: list[Callable] = [
    _no_end_of_thought,
    _a_tag_missing,
    _a_tag_twice,
    _two_answers,
    _tags_in_another_order,
    _the_prompt_again,
    _json_cut,
    _json_and_more,
    _no_json,
    _not_an_object,
    _another_type,
    _another_key,
    _empty,
    _key_twice,
    _no_number,
    _digits,
    _surrogate,
    _nested,
    _long,
    _unclosed,
    *OF_LISTS,
]
