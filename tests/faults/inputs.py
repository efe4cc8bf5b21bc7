"""What a user gives a run: files with bad lines, prompts that are too long or empty. Each function
makes n faults.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import yaml
from alone import (
    Bench,
    Case,
    Lost,
    draw_cases,
    expect,
    expect_refusal,
    read_log,
    run_cases,
    run_command,
    write_rows,
)
from helpers import tiny_world
from helpers.fuzz_answers import wrap
from safetensors import safe_open
from world import Outcome, World, read_result

from recr1 import cli, sft, train
from recr1.data.readers import is_validation

ALWAYS = ("10 MB", "not UTF-8", "cut", "no id", "id twice")
CONTROL = tiny_world.ROLES + tiny_world.CONTRACT
WORDS = tiny_world.COLOURS + tiny_world.THINGS
SPLITS = ("train", "test")
POLICIES = ("stop", "drop")


def spoil_data(world: World, n: int) -> Iterator[Outcome]:
    """Spoil lines: a run stops at them by file and line, or leaves them out, counts them, and is
    the run without them.
    """
    rng = world.rng
    bench = Bench(world, "lines")
    sft_bench = Bench(world, "lessons", write_sft_config(world), sft.main)
    makers = draw_line_makers(bench)[:11]
    for bad in rng.sample(sorted(TEACHER), 3):
        makers.append(partial(spoil_lessons, sft_bench, bad))
    for make in FILE_MAKERS:
        makers.append(partial(make, bench))
    if n < len(makers):
        makers = rng.sample(makers, n)
    cases = [make() for make in makers]
    return run_cases(world, cases)


def draw_line_makers(bench: Bench) -> list[Callable[[], Case]]:
    """Draw each kind of bad line once, in one of the files, under one policy."""
    kinds = []
    for file, bads in BAD_LINES.items():
        for bad in bads:
            for policy in POLICIES:
                kinds.append((file, bad, policy))
    bench.rng.shuffle(kinds)
    kinds.sort(key=is_optional)
    seen = set()
    makers = []
    for file, bad, policy in kinds:
        if bad in seen:
            continue
        seen.add(bad)
        makers.append(partial(spoil_lines, bench, file, bad, policy))
    return makers


def is_optional(kind: tuple[str, str, str]) -> bool:
    _, bad, _ = kind
    return bad not in ALWAYS


def draw_text(rng) -> str:
    words = rng.choices(WORDS, k=3)
    return " ".join(words)


def draw_id(rng) -> str:
    number = rng.randrange(10**6)
    return f"new{number}"


def encode_row(**fields) -> bytes:
    return json.dumps(fields).encode()


# --- bad lines: functions of (rng, a good line of this file) -> a bad one ---


def break_utf8(rng, good: bytes) -> bytes:
    start = f'{{"id": "{draw_id(rng)}", "text": "red '.encode()
    lone_byte = rng.randrange(0x80, 0xC0)
    return start + bytes([lone_byte]) + b'"}'


def cut_line(rng, good: bytes) -> bytes:
    length = rng.randrange(1, len(good))
    return good[:length]


def omit_id(rng, good: bytes) -> bytes:
    return encode_row(text=draw_text(rng))


def write_bad_id(rng, good: bytes) -> bytes:
    bad_id = rng.choice([None, 7, [], True, "", " x", "x\n"])
    return encode_row(id=bad_id, text=draw_text(rng))


def write_bad_text(rng, good: bytes) -> bytes:
    id = draw_id(rng)
    bad_text = rng.choice([None, 7, ["a"], {}, 1.5])
    return encode_row(id=id, text=bad_text)


def write_no_object(rng, good: bytes) -> bytes:
    return rng.choice([b"[1, 2]", b"null", b"7", b'"text"', b"[]"])


def write_blank(rng, good: bytes) -> bytes:
    return rng.choice([b"", b" ", b"\t", "\u3000".encode()])


def write_10_mb(rng, good: bytes) -> bytes:
    start = f'{{"id": "{draw_id(rng)}", "text": "'.encode()
    return start + rng.choice([b"a", b"[", b"\\"]) * 10_000_001


def repeat_id(rng, good: bytes) -> bytes:
    row = json.loads(good)
    row["text"] = draw_text(rng)
    return encode_row(**row)


def nest_brackets(rng, good: bytes) -> bytes:
    return b'{"id": ' + b"[" * 100_000


def write_digits(rng, good: bytes) -> bytes:
    digits = b"9" * 5_000
    return b'{"id": "x", "text": "lamp", "n": ' + digits + b"}"


def halve_character(rng, good: bytes) -> bytes:
    id = draw_id(rng)
    half = rf"\ud8{rng.randrange(16, 100)}"
    return f'{{"id": "{id}", "text": "red {half}"}}'.encode()


def write_two_objects(rng, good: bytes) -> bytes:
    return good + b" " + good


def omit_text(rng, good: bytes) -> bytes:
    id = draw_id(rng)
    return encode_row(id=id, title=draw_text(rng))


def empty_text(rng, good: bytes) -> bytes:
    id = draw_id(rng)
    length = rng.randrange(4)
    return encode_row(id=id, text=" \n\u3000"[:length])


def say_nothing(rng, good: bytes) -> bytes:
    return encode_row(id=draw_id(rng), title="", text=" ")


def cut_gain(good: bytes) -> bytes:
    """Return a line of judgements without its last column."""
    before, _, _ = good.rpartition(b"\t")
    return before


def change_columns(rng, good: bytes) -> bytes:
    return rng.choice([good.replace(b"\t", b" "), good + b"\t0", cut_gain(good)])


def write_bad_gain(rng, good: bytes) -> bytes:
    gain = rng.choice([b"nan", b"-1", b"inf", b"high", b"", b"1,5"])
    return cut_gain(good) + b"\t" + gain


def write_header(rng, good: bytes) -> bytes:
    return b"query-id\tcorpus-id\tscore"


def change_gain(rng, good: bytes) -> bytes:
    return cut_gain(good) + b"\t77"


def omit_query_id(rng, good: bytes) -> bytes:
    _, _, after = good.partition(b"\t")
    return b"\t" + after


JSONL = {
    "not UTF-8": break_utf8,
    "cut": cut_line,
    "no id": omit_id,
    "an id that is none": write_bad_id,
    "a text that is none": write_bad_text,
    "no object": write_no_object,
    "empty": write_blank,
    "10 MB": write_10_mb,
    "id twice": repeat_id,
    "nested": nest_brackets,
    "digits": write_digits,
    "half a character": halve_character,
    "two objects": write_two_objects,
}
QUERY = JSONL | {"no text": omit_text, "an empty text": empty_text}
CORPUS = JSONL | {"says nothing": say_nothing}
QRELS = {
    "columns": change_columns,
    "gain": write_bad_gain,
    "header": write_header,
    "another gain": change_gain,
    "no query id": omit_query_id,
}
BAD_LINES = {"train_queries": QUERY, "corpus": CORPUS, "train_qrels": QRELS}


def spoil_lines(bench: Bench, key: str, bad: str, policy: str) -> Case:
    rng = bench.rng
    data = bench.copy_data()
    file = data[key]
    rows = file.read_bytes().splitlines()
    make = BAD_LINES[key][bad]
    count = 1
    if policy == "drop" and bad != "10 MB":
        count = rng.randrange(1, 5)
    good = rng.randrange(len(rows))
    position = rng.randrange(good + 1, len(rows) + 1)  # behind the line that it may repeat
    rows[position:position] = [make(rng, rows[good]) for _ in range(count)]
    first = f"{file}:{position + 1}: "
    file.write_bytes(b"\n".join(rows) + b"\n")

    def check():
        if policy == "stop":
            argv, _ = bench.make_argv(data)
            return expect_refusal(train.main, argv, first)
        out, run = bench.run(data, "data.on_bad_line=drop")
        told = rf"recr1: {count} [\w ]+ left out, first: {re.escape(first)}"
        expect(
            re.search(told, out),
            f"{count} lines from {file.name}:{position + 1} are not told of: {out[:1500]}",
        )
        expect(
            read_result(run) == bench.run_undisturbed(),
            "the run is another one than without these lines",
        )

    return f"{bad} ({key}, {policy})", check


# --- bad lines of recr1.sft's teacher: functions of (rng, a good line, a query of the test split)
# -> a bad one ---


def cut_lesson(rng, good: bytes, test_query: str) -> bytes:
    return cut_line(rng, good)


def omit_lesson_text(rng, good: bytes, test_query: str) -> bytes:
    row = json.loads(good)
    return encode_row(id=row["id"])


def teach_no_query(rng, good: bytes, test_query: str) -> bytes:
    row = json.loads(good)
    row["id"] = draw_id(rng)
    return encode_row(**row)


def teach_end_token(rng, good: bytes, test_query: str) -> bytes:
    word = rng.choice([b"lamp<|end|>", b"<|end|>"])
    return good.replace(b"lamp", word)


def teach_too_long(rng, good: bytes, test_query: str) -> bytes:
    times = rng.randrange(20, 9_000)
    return good.replace(b"lamp", b"lamp " * times)


def teach_half_character(rng, good: bytes, test_query: str) -> bytes:
    return good.replace(b"lamp", b"lamp \\ud83d")


def teach_test_query(rng, good: bytes, test_query: str) -> bytes:
    row = json.loads(good)
    row["id"] = test_query
    return encode_row(**row)


TEACHER = {  # name: (what makes the line, whether "drop" leaves it out)
    "cut": (cut_lesson, True),
    "no text": (omit_lesson_text, True),
    "a query of nobody's": (teach_no_query, True),
    "the end token inside": (teach_end_token, True),
    "over the limit": (teach_too_long, True),
    "half a character": (teach_half_character, True),
    "a query of the test": (teach_test_query, False),
}


def write_sft_config(world: World) -> str:
    """Write the world's config for recr1.sft, which reads no loss. Return its path."""
    text = Path(world.config).read_text(encoding="utf-8")
    tree = yaml.safe_load(text)
    for section in ("loss", "log"):
        tree.pop(section, None)
    path = world.folder / "sft.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


def spoil_lessons(bench: Bench, bad: str) -> Case:
    """Spoil lines of the teacher's file."""
    rng = bench.rng
    data = bench.copy_data()
    rows = draw_lessons(rng, data["train_queries"])
    clean_file = data["corpus"].with_name("whole.jsonl")
    clean_file.write_bytes(b"\n".join(rows) + b"\n")
    make, is_left_out = TEACHER[bad]
    position = rng.randrange(len(rows))
    count = rng.randrange(1, 5)
    test_query = rng.choice(tiny_world.jsonl(data["test_queries"]))["id"]
    rows[position:position] = [make(rng, rng.choice(rows), test_query) for _ in range(count)]
    file = data["corpus"].with_name("teacher.jsonl")
    file.write_bytes(b"\n".join(rows) + b"\n")
    first = f"{file}:{position + 1}: "
    bad_lesson = [f"sft.teacher={file}", "data.on_bad_line=drop"]

    def check():
        argv, _ = bench.make_argv(data, f"sft.teacher={file}")
        expect_refusal(sft.main, argv, first)
        if not is_left_out:
            argv, _ = bench.make_argv(data, *bad_lesson)
            return expect_refusal(sft.main, argv, first)
        out, actual = learn_from(bench, data, file, "data.on_bad_line=drop")
        expect(
            f"recr1: {count} lines of the teacher left out, first: {first}" in out,
            f"{count} lines from {position + 1} are not told of: {out[:1500]}",
        )
        _, want = learn_from(bench, data, clean_file)
        expect(actual == want, "the run is another one than without these lines")

    return f"{bad} (teacher)", check


def draw_lessons(rng, train_queries: Path) -> list[bytes]:
    """Draw a line of a teacher's file for each query that is trained on."""
    rows = []
    for query in tiny_world.jsonl(train_queries):
        if is_validation(query["id"]):
            continue
        answer = json.dumps({"query": rng.choice(tiny_world.COLOURS) + " lamp"})
        rows.append(encode_row(id=query["id"], text=wrap(answer, thought="")))
    return rows


def learn_from(bench: Bench, data: dict, file: Path, *more: str) -> tuple[str, dict]:
    """Train on the teacher's file; return (stdout, what the run comes to)."""
    out, run = bench.run(data, f"sft.teacher={file}", *more)
    learned = read_result(run)
    learned["teacher"] = tiny_world.jsonl(run / "teacher.jsonl")
    source = learned["summary"]["teacher"].pop("source")
    expect(source == str(file), "summary.json names another teacher")
    return out, learned


# --- files that are bad as a whole, or only look so ---


def spoil_file(bench: Bench, spoil: Callable[[bytes], bytes], where: str, *names: object) -> Case:
    """Spoil one of the files; names: what the run's line must hold beside the file."""
    data = bench.copy_data()
    key = bench.rng.choice(sorted(data))
    file = data[key]
    raw = file.read_bytes()
    file.write_bytes(spoil(raw))
    policy = bench.rng.choice(["stop", "drop"])

    def check():
        argv, _ = bench.make_argv(data, f"data.on_bad_line={policy}")
        expect_refusal(train.main, argv, file, *names)

    return f"{where} ({file.name})", check


def drop_all(raw: bytes) -> bytes:
    return b""


def break_every_line(raw: bytes) -> bytes:
    return re.sub(rb"[{\t]", b"?", raw)


def empty_file(bench: Bench) -> Case:
    return spoil_file(bench, drop_all, "empty file", "empty")


def spoil_every_line(bench: Bench) -> Case:
    return spoil_file(bench, break_every_line, "every line bad")


def misname_gzip(bench: Bench) -> Case:
    return spoil_file(bench, gzip.compress, "gzip without its name", ".gz")


def tear_gzip(bench: Bench) -> Case:
    data = bench.copy_data()
    key = bench.rng.choice(sorted(data))
    packed = gzip.compress(data[key].read_bytes())
    file = data[key].with_name(data[key].name + ".gz")
    length = bench.rng.randrange(20, len(packed) - 1)
    file.write_bytes(packed[:length])

    def check():
        argv, _ = bench.make_argv(data | {key: file}, "data.on_bad_line=drop")
        expect_refusal(train.main, argv, file, "torn")

    return f"torn gzip ({file.name})", check


def change_harmlessly(bench: Bench, change: Callable[[bytes], bytes], where: str) -> Case:
    data = bench.copy_data()
    for file in data.values():
        raw = file.read_bytes()
        file.write_bytes(change(raw))

    def check():
        _, run = bench.run(data)
        expect(read_result(run) == bench.run_undisturbed(), "the run is another one")

    return where, check


def add_byte_order_mark(raw: bytes) -> bytes:
    return b"\xef\xbb\xbf" + raw


def end_lines_by_crlf(raw: bytes) -> bytes:
    """And the last line by nothing."""
    return raw.replace(b"\n", b"\r\n").removesuffix(b"\r\n")


def mark_byte_order(bench: Bench) -> Case:
    return change_harmlessly(bench, add_byte_order_mark, "byte order marks")


def end_lines_otherwise(bench: Bench) -> Case:
    return change_harmlessly(bench, end_lines_by_crlf, "CRLF, no last line end")


FILE_MAKERS = (
    empty_file,
    tear_gzip,
    misname_gzip,
    mark_byte_order,
    end_lines_otherwise,
    spoil_every_line,
)


# --- prompts ---


def spoil_prompts(world: World, n: int) -> Iterator[Outcome]:
    """Make prompts too long, empty, of nothing but control tokens; answers of 0 and 1 tokens."""
    bench = Bench(world, "prompts")
    makers = []
    for split in SPLITS:
        for policy in POLICIES:
            makers.append(partial(add_long_prompts, bench, split, policy))
    for make in PROMPT_MAKERS:
        makers.append(partial(make, bench))
    cases = draw_cases(world.rng, n, makers)
    return run_cases(world, cases)


def add_queries(bench: Bench, data: dict, split: str, texts: list[str]) -> list[str]:
    """Add queries with these texts, at random places; return their ids."""
    file = data[f"{split}_queries"]
    rows = file.read_text().splitlines()
    ids = []
    for text in texts:
        id = draw_id(bench.rng)
        position = bench.rng.randrange(len(rows) + 1)
        rows.insert(position, json.dumps(dict(id=id, text=text)))
        ids.append(id)
    file.write_text("\n".join(rows) + "\n")
    return ids


def add_long_prompts(bench: Bench, split: str, policy: str) -> Case:
    rng = bench.rng
    data = bench.copy_data()
    count = 1 if policy == "stop" else rng.randrange(1, 6)
    texts = [draw_text(rng) * rng.randrange(40, 400) for _ in range(count)]
    ids = add_queries(bench, data, split, texts)

    def check():
        if policy == "stop":
            argv, _ = bench.make_argv(data)
            says = ("prompt.max_tokens is 64", "data.on_long_prompt=drop")
            return expect_refusal(train.main, argv, ids[0], *says)
        out, run = bench.run(data, "data.on_long_prompt=drop")
        expect(
            f"recr1: {count} prompts over the limit left out, first: query '" in out,
            f"{count} prompts are not told of: {out[:1500]}",
        )
        expect(
            read_result(run) == bench.run_undisturbed(),
            "the run is another one than without these prompts",
        )

    return f"too long ({split}, {policy})", check


def add_megabyte(bench: Bench) -> Case:
    data = bench.copy_data()
    piece = bench.rng.choice(["a", "<|end|>", "é ", "\u200d", "1"])
    add_queries(bench, data, "train", [piece * 1_000_000])

    def check():
        out, run = bench.run(data, "data.on_long_prompt=drop")
        expect("recr1: 1 prompts over the limit left out" in out, out[:1500])
        expect(read_result(run) == bench.run_undisturbed(), out[:1500])

    return "1,000,000 characters", check


def ask_control_tokens(bench: Bench) -> Case:
    """Every query: then some of them are sampled from, and those are logged with their ids."""
    rng = bench.rng
    data = bench.copy_data()
    for split in SPLITS:
        file = data[f"{split}_queries"]
        rows = []
        for line in file.read_text().splitlines():
            row = json.loads(line)
            tokens = rng.choices(CONTROL, k=rng.randrange(1, 4))
            row["text"] = "".join(tokens)
            rows.append(row)
        write_rows(file, rows)

    def check():
        _, run = bench.run(data, "prompt.max_tokens=128", "train.tokens_per_micro_batch=400")
        check_prompt_ids(run)

    return "only control tokens", check


def check_prompt_ids(run: Path) -> None:
    """Check that the prompts that were sampled from hold the template's control tokens and no
    other.
    """
    tokenizer = tiny_world.tiny_tokenizer()
    control_ids = set(tokenizer.get_added_vocab().values())
    message = dict(role="user", content="find: x")
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt + "<think>")["input_ids"]
    want = [i for i in prompt_ids if i in control_ids]
    sampled = [row["prompt_ids"] for row in read_log(run) if "prompt_ids" in row]
    note = f"control tokens {sampled}, must be {want}"
    expect(bool(sampled), note)
    for ids in sampled:
        expect([i for i in ids if i in control_ids] == want, note)


def add_empty_query(bench: Bench) -> Case:
    data = bench.copy_data()
    blanks = bench.rng.choices(" \t\u3000\u2028", k=bench.rng.randrange(4))
    [id] = add_queries(bench, data, "test", ["".join(blanks)])
    file = data["test_queries"]
    rows = file.read_text().split("\n")
    [line] = [number for number, row in enumerate(rows, 1) if id in row]

    def check():
        argv, _ = bench.make_argv(data)
        expect_refusal(train.main, argv, f"{file}:{line}: ", "'text' is empty")
        out, run = bench.run(data, "data.on_bad_line=drop")
        expect("recr1: 1 data lines left out" in out, out[:1500])
        expect(read_result(run) == bench.run_undisturbed(), out[:1500])

    return "empty query", check


def sample_no_tokens(bench: Bench) -> Case:
    def check():
        argv, _ = bench.make_argv(None, "sampling.max_new_tokens=0")
        expect_refusal(train.main, argv, "sampling.max_new_tokens")

    return "max_new_tokens 0", check


def sample_one_token(bench: Bench) -> Case:
    def check():
        _, run = bench.run(None, "sampling.max_new_tokens=1", "loss.kl_coef=0")
        for row in read_log(run):
            expect(row["error"], "an answer of one token was understood")
        weights = run / "model/model.safetensors"
        policy = bench.world.folder / "policy/model.safetensors"
        with safe_open(weights, "pt") as after, safe_open(policy, "pt") as before:
            for name in before.keys():
                is_same = after.get_tensor(name) == before.get_tensor(name)
                expect(bool(is_same.all()), "weights moved where no reward differs")

    return "max_new_tokens 1", check


def limit_every_prompt(bench: Bench) -> Case:
    def check():
        argv, _ = bench.make_argv(None, "prompt.max_tokens=5", "data.on_long_prompt=drop")
        expect_refusal(train.main, argv, "train.prompts_per_step")

    return "no prompt fits", check


def generate_from_long(bench: Bench) -> Case:
    text = draw_text(bench.rng) * bench.rng.randrange(40, 100)

    def check():
        _, run = bench.run()
        command = ["generate", "--model", run / "model"]
        expect_refusal(cli.main, [*command, text], "prompt.max_tokens is 64")
        # nothing asked: an answer or the one line
        code, out, err = run_command(cli.main, [*command, ""])
        is_answer = code == 0
        is_refusal = code == 2 and err.count("\n") == 1
        if not is_answer and not is_refusal:
            raise Lost(f"generate '' ends with {code}: {out}{err}")

    return "generate, too long", check


PROMPT_MAKERS = (
    add_megabyte,
    ask_control_tokens,
    ask_control_tokens,
    add_empty_query,
    sample_no_tokens,
    sample_one_token,
    limit_every_prompt,
    generate_from_long,
)
