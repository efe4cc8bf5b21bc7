"""Malformed answers: every one is an error of its name, from the parser and in a run, whatever
stands beside it.
"""

import itertools
import json
import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from alone import LISTED, Bench, expect, read_log, run_cases
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
SETTINGS = (
    "train.prompts_per_step=28",
    "sampling.temperature=20",
    "train.tokens_per_micro_batch=4000",
)


class Answer(NamedTuple):
    """A completion of a task's policy that holds no answer."""

    way: str  # in which it was made
    task: str
    text: str
    errors: tuple[str, ...]  # the names that its error may have


def write_malformed(world: World, n: int) -> Iterator[Outcome]:
    """Parse texts that hold no answer alone, by the way in which they were made, and then all of
    them as what a run's policy writes.
    """
    bench = Bench(world, "answers")
    ways = []
    while len(ways) < n:
        ways += world.rng.sample(WAYS, len(WAYS))
    answers = [draw_answer(world.rng, way) for way in ways[:n]]
    cases = []
    for answer in answers:
        cases.append((answer.way, partial(check_answer, bench, answers, answer)))
    return run_cases(world, cases)


def draw_answer(rng, way: str) -> Answer:
    if way not in LIST_MAKERS:
        make, *errors = MAKERS[way]
        return Answer(way, "product_search", make(rng), tuple(errors))
    task = rng.choice(sorted(LISTS))
    make, error = LIST_MAKERS[way]
    return Answer(way, task, make(rng, LISTS[task]), (error,))


def check_answer(bench: Bench, answers: list[Answer], made: Answer) -> None:
    text = f"{made.text[:200]!r}"
    parse = tasks.TASKS[made.task](RewardConfig()).parse
    times = []
    for _ in range(3):
        start = time.thread_time()
        answer, error = parse(made.text, ROW)
        times.append(time.thread_time() - start)
    expect(
        answer is None and error in made.errors,
        f"{text} gives {answer!r}, {error}; must be one of {made.errors}",
    )
    _, json_error = parse_answer_json(made.text)
    expect(json_error in (None, error), f"{text}: the two parsers differ")
    expect(min(times) < SLOWEST, f"{text} takes {min(times):.2f} s")
    texts = [other.text for other in answers if other.task == made.task]
    rows = log_by_text(bench, made.task, texts).get(made.text, [])
    expect(bool(rows), f"{text} in a run: []")
    for row in rows:
        is_error = row["error"] == error
        is_unrewarded = row.get("reward", -1.0) == -1.0 and row.get("ndcg", 0.0) == 0.0
        values = {key: row.get(key) for key in ("error", "reward", "ndcg")}
        expect(is_error and is_unrewarded, f"{text} in a run: {values}")


def log_by_text(bench: Bench, task: str, texts: list[str]) -> dict[str, list[dict]]:
    """Return {text: what the run has written down of it}. One run for all texts of a task."""
    if task in bench.cache:
        return bench.cache[task]
    settings = list(SETTINGS)
    data = None
    if task != "product_search":
        user = " ".join(f"{{{place}}}" for place in tasks.TASKS[task].placeholders)
        settings += [f"task={task}", f"prompt.user='{user}'", "prompt.max_tokens=256"]
        data = bench.copy_listed_data()
    _, run = bench.run_saying(itertools.cycle(texts), data, *settings)
    rows = bench.cache[task] = {}
    for row in read_log(run):
        rows.setdefault(row["text"], []).append(row)
    return rows


def draw_words(rng) -> str:
    words = rng.choices(WORDS, k=rng.randint(1, 8))
    return " ".join(words)


def draw_query(rng) -> str:
    """Draw the JSON of an answer."""
    return json.dumps({"query": draw_words(rng)})


def draw_valid(rng) -> str:
    query = draw_words(rng)
    is_ascii = rng.random() < 0.5
    answer = json.dumps({"query": query}, ensure_ascii=is_ascii)
    return wrap(answer, thought=draw_words(rng))


def misspell_end_of_thought(rng) -> str:
    text = draw_valid(rng)
    tag = rng.choice(["", "</ think>", "</thin", "\\u003c/think>"])
    return text.replace("</think>", tag)


def misspell_tag(rng) -> str:
    tag = rng.choice(["<answer>", "</answer>"])
    text = draw_valid(rng)
    other = rng.choice(["", tag[:-1], tag.upper(), tag.replace("a", "а")])
    return text.replace(tag, other)


def repeat_tag(rng) -> str:
    """Anywhere but inside of a tag."""
    tag = rng.choice(["<answer>", "</answer>", "</think>", "<think>"])
    text = draw_valid(rng)
    position = rng.randrange(len(text) + 1)
    while is_inside_tag(text, position):
        position = rng.randrange(len(text) + 1)
    return text[:position] + tag + text[position:]


def is_inside_tag(text: str, position: int) -> bool:
    for tag in ("<answer>", "</answer>", "</think>"):
        for start in range(len(text)):
            is_tag = text.startswith(tag, start)
            if is_tag and start < position < start + len(tag):
                return True
    return False


def answer_twice(rng) -> str:
    text = draw_valid(rng)
    answer = text[text.index("<answer>") :]
    return text + answer


def reorder_tags(rng) -> str:
    parts = ["</think>", "<answer>", draw_query(rng), "</answer>"]
    order = rng.choice([[1, 0, 2, 3], [3, 0, 2, 1], [1, 2, 3, 0], [0, 3, 2, 1], [0, 2, 3, 1]])
    return draw_words(rng) + "".join(parts[i] for i in order)


def write_prompt_again(rng) -> str:
    """What a parser finds that looks through prompt and completion."""
    thought = draw_words(rng)
    query = draw_words(rng)
    return f'Assistant: <think>{thought}\n<answer>{{"query": "{query}"}}</answer>'


def cut_json(rng) -> str:
    text = draw_query(rng)
    length = rng.randrange(1, len(text))
    return wrap(text[:length])


def append_to_json(rng) -> str:
    text = draw_query(rng)
    more = rng.choice([", ", "}", " {}", "\x00", "\ufeff", "; drop", "```"])
    return wrap(text + more)


def write_no_json(rng) -> str:
    texts = [
        draw_words(rng) + "!",
        "{'query': 'lamp'}",
        '{query: "lamp"}',
        '{"query": "a\nb"}',
        '{"query": "\\x41"}',
        "```json\n{}\n```",
        "",
    ]
    return wrap(rng.choice(texts))


def write_no_object(rng) -> str:
    texts = ["null", "7", "true", "-1e999", '"lamp"', '["query"]', "[]"]
    texts.append(json.dumps([{"query": draw_words(rng)}]))
    texts.append(json.dumps(draw_words(rng)))
    return wrap(rng.choice(texts))


def change_type(rng) -> str:
    value = rng.choice([None, 7, 1.5, True, [], ["a"], {"query": "a"}, {}])
    return wrap(json.dumps({"query": value}))


def change_key(rng) -> str:
    key = rng.choice(["Query", "query ", "q", "", "queries", "qu\u0435ry"])
    return wrap(json.dumps({key: draw_words(rng)}))


def ask_blanks(rng) -> str:
    blanks = rng.choices(" \n\t\u2003\u3000\xa0", k=rng.randrange(9))
    return wrap(json.dumps({"query": "".join(blanks)}))


def repeat_key(rng) -> str:
    first = draw_words(rng)
    second = draw_words(rng)
    return wrap(f'{{"query": "{first}", "n": [1], "query": "{second}"}}')


def write_no_number(rng) -> str:
    query = draw_words(rng)
    number = rng.choice(["NaN", "Infinity", "-Infinity", "nan", "0x10", "01", "1."])
    return wrap(f'{{"query": "{query}", "n": {number}}}')


def write_digits(rng) -> str:
    query = draw_words(rng)
    digits = rng.choice("123456789") * rng.randrange(4_301, 30_000)
    return wrap(f'{{"query": "{query}", "n": {digits}}}')


def write_surrogate(rng) -> str:
    half = f"\\u{rng.randrange(0xD800, 0xE000):04x}"
    query = draw_words(rng)
    after = rng.choice(["", " x", half])
    return wrap(f'{{"query": "{query} {half}{after}"}}')


def nest_brackets(rng) -> str:
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}"), ('[{"query":', "}]")])
    depth = rng.choice([MAX_BRACKETS, 1_000, 5_000])
    closed = rng.choice([depth, depth - 1, 0])
    value = opening * depth + "1" + closing * closed
    return wrap('{"query": "x", "y": ' + value + "}")


def ask_at_length(rng) -> str:
    character = rng.choice('ab[{\\"é')
    length = rng.choice([MAX_CHARS, 200_000, MB // 2])
    answer = json.dumps({"query": character * length}, ensure_ascii=False)
    return wrap(answer)


def leave_unclosed(rng) -> str:
    """1 MB in which a lazy regular expression looks for an end that never comes."""
    piece = rng.choice(["<answer>", "<answer", "</answer", "<", '{"query": "', "[", "\\"])
    thought = draw_words(rng)
    tag = rng.choice(["", "<answer>"])
    times = MB // len(piece)
    return f"{thought}</think>{tag}{piece * times}"


# --- lists of labels: key is that of the task's answer ---


def write_list(rng, key: str, *strange, missing: int = 0, repeated: int = 0) -> str:
    """Write a list with other items at random places, some labels missing, some repeated."""
    numbers = rng.sample(range(1, LISTED + 1), LISTED - missing)
    labels = [f"Item_{number}" for number in numbers]
    for item in strange:
        labels.insert(rng.randrange(len(labels) + 1), item)
    reason = draw_words(rng)
    labels = labels + rng.choices(labels, k=repeated)
    answer = json.dumps({"why": reason, key: labels})
    return wrap(answer, thought=draw_words(rng))


def omit_list(rng, key: str) -> str:
    other = rng.choice([key.upper(), key + "s", "query", "candidates", ""])
    return write_list(rng, other)


def write_no_list(rng, key: str) -> str:
    value = rng.choice([None, "Item_1", 1, True, {"Item_1": 1}, {}, '["Item_1"]'])
    return wrap(json.dumps({key: value}))


def list_no_label(rng, key: str) -> str:
    item = rng.choice([1, None, 1.5, False, ["Item_1"], {"Item_1": 1}, []])
    return write_list(rng, key, item, missing=1)


UNKNOWN_ITEMS = [
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


def list_unknown_item(rng, key: str) -> str:
    return write_list(rng, key, rng.choice(UNKNOWN_ITEMS), missing=1)


def repeat_item(rng, key: str) -> str:
    missing = rng.randrange(LISTED - 1)
    repeated = rng.randrange(1, 3)
    return write_list(rng, key, missing=missing, repeated=repeated)


def shorten_list(rng, key: str) -> str:
    """Where all must be ordered, one is missing; nowhere none."""
    missing = LISTED
    if key == Rerank.key:
        missing = rng.randrange(1, LISTED + 1)
    return write_list(rng, key, missing=missing)


LIST_MAKERS = {  # way: (what makes the text, the name of its error)
    "no_list": (omit_list, "no_list"),
    "list_is_none": (write_no_list, "not_list"),
    "no_label": (list_no_label, "not_label"),
    "unknown_item": (list_unknown_item, "unknown_item"),
    "repeated_item": (repeat_item, "repeated_item"),
    "list_too_short": (shorten_list, "list_length"),
}
MAKERS = {  # way: (what makes the text, the names that its error may have ...)
    "no_end_of_thought": (misspell_end_of_thought, "no_think_end"),
    "a_tag_missing": (misspell_tag, "tags"),
    "a_tag_twice": (repeat_tag, "tags"),
    "two_answers": (answer_twice, "tags"),
    "tags_in_another_order": (reorder_tags, "tags"),
    "the_prompt_again": (write_prompt_again, "no_think_end"),
    "json_cut": (cut_json, "no_json"),
    "json_and_more": (append_to_json, "no_json"),
    "no_json": (write_no_json, "no_json"),
    "not_an_object": (write_no_object, "not_object"),
    "another_type": (change_type, "query_not_string"),
    "another_key": (change_key, "no_query"),
    "empty": (ask_blanks, "query_empty"),
    "key_twice": (repeat_key, "duplicate_key"),
    "no_number": (write_no_number, "no_json"),
    "digits": (write_digits, "no_json"),
    "surrogate": (write_surrogate, "query_surrogate"),
    "nested": (nest_brackets, "too_deep", "too_long"),
    "long": (ask_at_length, "too_long"),
    "unclosed": (leave_unclosed, "tags"),
}
WAYS = [*MAKERS, *LIST_MAKERS]
