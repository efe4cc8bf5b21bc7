"""Malformed answers: every one is an error of its name, from the parser and in a run, whatever stands beside it."""
import itertools
import json
import time
from collections.abc import Callable
from functools import partial

from alone import Bench, each, expect, logged
from fuzz_answers import MB, wrap
from recr1.answers import MAX_BRACKETS, MAX_CHARS, answer_json, parse_query
from world import Outcome, World

SLOWEST = 0.05             # seconds of CPU time for a text of up to 1 MB
WORDS = "red green blue lamp chair table café ユーザー 12 naïve".split()


def malformed(world: World, n: int) -> list[Outcome]:
    """Texts that hold no answer by the way in which they were made, parsed alone and then all of them as what a run's policy writes."""
    rng, bench = world.rng, Bench(world, "answers")
    makers = [partial(make, rng) for make in MAKERS]
    chosen = [make for _ in range(-(-n // len(makers))) for make in rng.sample(makers, len(makers))][:n]
    made = [(make.func.__name__.strip("_"), *make()) for make in chosen]
    rows: dict[str, list[dict]] = {}

    def in_a_run() -> dict[str, list[dict]]:
        if not rows:
            _, run = bench.run_saying(itertools.cycle(text for _, text, _ in made), None, "train.prompts_per_step=28", "sampling.temperature=20", "train.tokens_per_micro_batch=4000")
            for row in logged(run):
                rows.setdefault(row["text"], []).append(row)
        return rows

    def case(text: str, errors: tuple[str, ...]) -> None:
        times = []
        for _ in range(3):
            start = time.thread_time()
            query, error = parse_query(text)
            times.append(time.thread_time() - start)
        expect(query is None and error in errors, f"{text[:200]!r} gives {query!r}, {error}; must be one of {errors}")
        expect(not answer_json(text)[1] or answer_json(text)[1] == error, f"{text[:200]!r}: the two parsers differ")
        expect(min(times) < SLOWEST, f"{text[:200]!r} takes {min(times):.2f} s")
        found = in_a_run().get(text, [])
        expect(bool(found) and all(row["error"] == error and row.get("reward", -1.0) == -1.0 and row.get("ndcg", 0.0) == 0.0 for row in found),
               f"{text[:200]!r} in a run: {[{k: row.get(k) for k in ('error', 'reward', 'ndcg')} for row in found]}")
    return each(world, [(name, partial(case, text, errors)) for name, text, errors in made])


def words(rng) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))


def valid(rng) -> str:
    return wrap(json.dumps({"query": words(rng)}, ensure_ascii=rng.random() < 0.5), thought=words(rng))


def _no_end_of_thought(rng):
    return valid(rng).replace("</think>", rng.choice(["", "</ think>", "</thin", "\\u003c/think>"])), ("no_think_end",)


def _a_tag_missing(rng):
    tag = rng.choice(["<answer>", "</answer>"])
    return valid(rng).replace(tag, rng.choice(["", tag[:-1], tag.upper(), tag.replace("a", "а")])), ("tags",)


def _a_tag_twice(rng):
    tag, text = rng.choice(["<answer>", "</answer>", "</think>", "<think>"]), valid(rng)
    at = rng.randrange(len(text) + 1)
    while any(text[i:i + len(t)] == t and i < at < i + len(t) for t in ("<answer>", "</answer>", "</think>") for i in range(len(text))):
        at = rng.randrange(len(text) + 1)
    return text[:at] + tag + text[at:], ("tags",)


def _two_answers(rng):
    text = valid(rng)
    return text + text[text.index("<answer>"):], ("tags",)


def _tags_in_another_order(rng):
    parts = ["</think>", "<answer>", json.dumps({"query": words(rng)}), "</answer>"]
    order = rng.choice([[1, 0, 2, 3], [3, 0, 2, 1], [1, 2, 3, 0], [0, 3, 2, 1], [0, 2, 3, 1]])
    return words(rng) + "".join(parts[i] for i in order), ("tags",)


def _the_prompt_again(rng):
    """What a parser finds that looks through prompt and completion."""
    return f'Assistant: <think>{words(rng)}\n<answer>{{"query": "{words(rng)}"}}</answer>', ("no_think_end",)


def _json_cut(rng):
    text = json.dumps({"query": words(rng)})
    return wrap(text[:rng.randrange(1, len(text))]), ("no_json",)


def _json_and_more(rng):
    return wrap(json.dumps({"query": words(rng)}) + rng.choice([", ", "}", " {}", "\x00", "\ufeff", "; drop", "```"])), ("no_json",)


def _no_json(rng):
    return wrap(rng.choice([words(rng) + "!", "{'query': 'lamp'}", "{query: \"lamp\"}", '{"query": "a\nb"}', '{"query": "\\x41"}', "```json\n{}\n```", ""])), ("no_json",)


def _not_an_object(rng):
    return wrap(rng.choice(["null", "7", "true", "-1e999", '"lamp"', '["query"]', "[]", json.dumps([{"query": words(rng)}]), json.dumps(words(rng))])), ("not_object",)


def _another_type(rng):
    value = rng.choice([None, 7, 1.5, True, [], ["a"], {"query": "a"}, {}])
    return wrap(json.dumps({"query": value})), ("query_not_string",)


def _another_key(rng):
    return wrap(json.dumps({rng.choice(["Query", "query ", "q", "", "queries", "qu\u0435ry"]): words(rng)})), ("no_query",)


def _empty(rng):
    return wrap(json.dumps({"query": "".join(rng.choices(" \n\t\u2003\u3000\xa0", k=rng.randrange(9)))})), ("query_empty",)


def _key_twice(rng):
    return wrap(f'{{"query": "{words(rng)}", "n": [1], "query": "{words(rng)}"}}'), ("duplicate_key",)


def _no_number(rng):
    return wrap(f'{{"query": "{words(rng)}", "n": {rng.choice(["NaN", "Infinity", "-Infinity", "nan", "0x10", "01", "1."])}}}'), ("no_json",)


def _digits(rng):
    return wrap(f'{{"query": "{words(rng)}", "n": {rng.choice("123456789") * rng.randrange(4_301, 30_000)}}}'), ("no_json",)


def _surrogate(rng):
    half = f"\\u{rng.randrange(0xd800, 0xe000):04x}"
    return wrap(f'{{"query": "{words(rng)} {half}{rng.choice(["", " x", half])}"}}'), ("query_surrogate",)


def _nested(rng):
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}"), ('[{"query":', "}]")])
    depth = rng.choice([MAX_BRACKETS, 1_000, 5_000])
    text = '{"query": "x", "y": ' + opening * depth + "1" + closing * rng.choice([depth, depth - 1, 0]) + "}"
    return wrap(text), ("too_deep", "too_long")


def _long(rng):
    return wrap(json.dumps({"query": rng.choice("ab[{\\\"é") * rng.choice([MAX_CHARS, 200_000, MB // 2])}, ensure_ascii=False)), ("too_long",)


def _unclosed(rng):
    """1 MB in which a lazy regular expression looks for an end that never comes."""
    piece = rng.choice(["<answer>", "<answer", "</answer", "<", '{"query": "', "[", "\\"])
    return f"{words(rng)}</think>" + rng.choice(["", "<answer>"]) + piece * (MB // len(piece)), ("tags",)


MAKERS: list[Callable] = [make for name, make in list(globals().items()) if name.startswith("_") and not name.startswith("__")]
