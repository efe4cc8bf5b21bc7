"""What a user gives a run: files with bad lines, prompts that are too long or empty. Each function
makes n faults.
"""

import gzip
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import yaml
from alone import Bench, Case, Lost, each, expect, logged, refused, said, spread
from helpers import tiny_world
from helpers.fuzz_answers import wrap
from safetensors import safe_open
from world import Outcome, World, result

from recr1 import cli, sft, train
from recr1.data.readers import is_validation

ALWAYS = ("10 MB", "not UTF-8", "cut", "no id", "id twice")
CONTROL = tiny_world.ROLES + tiny_world.CONTRACT


def lines(world: World, n: int) -> Iterator[Outcome]:
    """Bad lines: stopped at by file and line, or left out, counted, and the run is the one without
    them.
    """
    rng = world.rng
    bench = Bench(world, "lines")
    lessons = Bench(world, "lessons", _of_sft(world), sft.main)
    kinds = [
        (file, bad, policy)
        for file, bads in (("train_queries", QUERY), ("corpus", CORPUS), ("train_qrels", QRELS))
        for bad in bads
        for policy in ("stop", "drop")
    ]
    rng.shuffle(kinds)
    seen = set()
    makers = []
    # each kind once, in one of the files, under one policy
    for file, bad, policy in sorted(kinds, key=lambda kind: kind[1] not in ALWAYS):
        if bad not in seen:
            seen.add(bad)
            makers.append(partial(_bad_line, bench, file, bad, policy))
    teacher = [partial(_bad_lesson, lessons, bad) for bad in rng.sample(sorted(TEACHER), 3)]
    makers = (
        makers[:11]
        + teacher
        + [
            partial(make, bench)
            for make in (_empty_file, _torn, _misnamed, _marked, _windows, _all_bad)
        ]
    )
    return each(world, [make() for make in (makers if n >= len(makers) else rng.sample(makers, n))])


def _text(rng) -> str:
    return " ".join(rng.choices(tiny_world.COLOURS + tiny_world.THINGS, k=3))


def new_id(rng) -> str:
    return f"new{rng.randrange(10**6)}"


JSONL = {  # name: a function of (rng, a good line of this file) -> a bad one
    "not UTF-8": lambda rng, good: (
        f'{{"id": "{new_id(rng)}", "text": "red '.encode()
        + bytes([rng.randrange(0x80, 0xC0)])
        + b'"}'
    ),
    "cut": lambda rng, good: good[: rng.randrange(1, len(good))],
    "no id": lambda rng, good: json.dumps(dict(text=_text(rng))).encode(),
    "an id that is none": lambda rng, good: json.dumps(
        dict(id=rng.choice([None, 7, [], True, "", " x", "x\n"]), text=_text(rng))
    ).encode(),
    "a text that is none": lambda rng, good: json.dumps(
        dict(id=new_id(rng), text=rng.choice([None, 7, ["a"], {}, 1.5]))
    ).encode(),
    "no object": lambda rng, good: rng.choice([b"[1, 2]", b"null", b"7", b'"text"', b"[]"]),
    "empty": lambda rng, good: rng.choice([b"", b" ", b"\t", "\u3000".encode()]),
    "10 MB": lambda rng, good: (
        b'{"id": "'
        + new_id(rng).encode()
        + b'", "text": "'
        + rng.choice([b"a", b"[", b"\\"]) * 10_000_001
    ),
    "id twice": lambda rng, good: json.dumps(dict(json.loads(good), text=_text(rng))).encode(),
    "nested": lambda rng, good: b'{"id": ' + b"[" * 100_000,
    "digits": lambda rng, good: b'{"id": "x", "text": "lamp", "n": ' + b"9" * 5_000 + b"}",
    "half a character": lambda rng, good: (
        f'{{"id": "{new_id(rng)}", "text": "red \\ud8{rng.randrange(16, 100)}"}}'.encode()
    ),
    "two objects": lambda rng, good: good + b" " + good,
}
QUERY = JSONL | {
    "no text": lambda rng, good: json.dumps(dict(id=new_id(rng), title=_text(rng))).encode(),
    "an empty text": lambda rng, good: json.dumps(
        dict(id=new_id(rng), text=" \n\u3000"[: rng.randrange(4)])
    ).encode(),
}
CORPUS = JSONL | {
    "says nothing": lambda rng, good: json.dumps(dict(id=new_id(rng), title="", text=" ")).encode()
}
QRELS = {
    "columns": lambda rng, good: rng.choice(
        [good.replace(b"\t", b" "), good + b"\t0", good.rpartition(b"\t")[0]]
    ),
    "gain": lambda rng, good: (
        good.rpartition(b"\t")[0]
        + rng.choice([b"\tnan", b"\t-1", b"\tinf", b"\thigh", b"\t", b"\t1,5"])
    ),
    "header": lambda rng, good: b"query-id\tcorpus-id\tscore",
    "another gain": lambda rng, good: good.rpartition(b"\t")[0] + b"\t77",
    "no query id": lambda rng, good: b"\t" + good.partition(b"\t")[2],
}


# of recr1.sft: (a function of (rng, a good line, a query of the test split) -> a bad one, whether
# "drop" leaves it out)
TEACHER = {
    "cut": (lambda rng, good, tested: good[: rng.randrange(1, len(good))], True),
    "no text": (
        lambda rng, good, tested: json.dumps(dict(id=json.loads(good)["id"])).encode(),
        True,
    ),
    "a query of nobody's": (
        lambda rng, good, tested: json.dumps(json.loads(good) | dict(id=new_id(rng))).encode(),
        True,
    ),
    "the end token inside": (
        lambda rng, good, tested: good.replace(b"lamp", rng.choice([b"lamp<|end|>", b"<|end|>"])),
        True,
    ),
    "over the limit": (
        lambda rng, good, tested: good.replace(b"lamp", b"lamp " * rng.randrange(20, 9_000)),
        True,
    ),
    "half a character": (lambda rng, good, tested: good.replace(b"lamp", b"lamp \\ud83d"), True),
    "a query of the test": (
        lambda rng, good, tested: json.dumps(json.loads(good) | dict(id=tested)).encode(),
        False,
    ),
}


def _of_sft(world: World) -> str:
    """The world's config for recr1.sft, which reads no loss."""
    tree = yaml.safe_load(Path(world.config).read_text(encoding="utf-8"))
    path = world.folder / "sft.yaml"
    path.write_text(
        yaml.safe_dump(
            {section: value for section, value in tree.items() if section not in ("loss", "log")}
        ),
        encoding="utf-8",
    )
    return str(path)


def _bad_lesson(bench: Bench, bad: str) -> Case:
    """A line of the teacher's file."""
    rng = bench.rng
    data = bench.data()
    ids = [
        row["id"] for row in tiny_world.jsonl(data["train_queries"]) if not is_validation(row["id"])
    ]
    rows = [
        json.dumps(
            dict(
                id=id,
                text=wrap(
                    json.dumps({"query": rng.choice(tiny_world.COLOURS) + " lamp"}), thought=""
                ),
            )
        ).encode()
        for id in ids
    ]
    file = data["corpus"].with_name("teacher.jsonl")
    whole = data["corpus"].with_name("whole.jsonl")
    whole.write_bytes(b"\n".join(rows) + b"\n")
    at, count, (make, left_out) = rng.randrange(len(rows)), rng.randrange(1, 5), TEACHER[bad]
    tested = rng.choice(tiny_world.jsonl(data["test_queries"]))["id"]
    rows[at:at] = [make(rng, rng.choice(rows), tested) for _ in range(count)]
    file.write_bytes(b"\n".join(rows) + b"\n")

    def learnt(path: Path, *more: str) -> tuple[str, dict]:
        out, run = bench.run(data, f"sft.teacher={path}", *more)
        found = result(run) | dict(teacher=tiny_world.jsonl(run / "teacher.jsonl"))
        expect(
            found["summary"]["teacher"].pop("source") == str(path),
            "summary.json names another teacher",
        )
        return out, found

    def case():
        refused(sft.main, bench.argv(data, f"sft.teacher={file}")[0], f"{file}:{at + 1}: ")
        if not left_out:
            return refused(
                sft.main,
                bench.argv(data, f"sft.teacher={file}", "data.on_bad_line=drop")[0],
                f"{file}:{at + 1}: ",
            )
        out, found = learnt(file, "data.on_bad_line=drop")
        expect(
            f"recr1: {count} lines of the teacher left out, first: {file}:{at + 1}: " in out,
            f"{count} lines from {at + 1} are not told of: {out[:1500]}",
        )
        expect(found == learnt(whole)[1], "the run is another one than without these lines")

    return f"{bad} (teacher)", case


def _bad_line(bench: Bench, key: str, bad: str, policy: str) -> Case:
    rng = bench.rng
    data = bench.data()
    file = data[key]
    rows = file.read_bytes().splitlines()
    make = dict(train_queries=QUERY, corpus=CORPUS, train_qrels=QRELS)[key][bad]
    count = 1 if policy == "stop" or bad == "10 MB" else rng.randrange(1, 5)
    good = rng.randrange(len(rows))
    at = rng.randrange(good + 1, len(rows) + 1)  # behind the line that it may repeat
    rows[at:at] = [make(rng, rows[good]) for _ in range(count)]
    first = at + 1
    file.write_bytes(b"\n".join(rows) + b"\n")

    def case():
        if policy == "stop":
            return refused(train.main, bench.argv(data)[0], f"{file}:{first}: ")
        out, run = bench.run(data, "data.on_bad_line=drop")
        expect(
            re.search(
                rf"recr1: {count} [\w ]+ left out, first: {re.escape(str(file))}:{first}: ", out
            ),
            f"{count} lines from {file.name}:{first} are not told of: {out[:1500]}",
        )
        expect(result(run) == bench.result(), "the run is another one than without these lines")

    return f"{bad} ({key}, {policy})", case


def _spoilt(bench: Bench, spoil, where: str, *names: object, only: tuple[str, ...] = ()) -> Case:
    data = bench.data()
    file = data[bench.rng.choice(only or sorted(data))]
    file.write_bytes(spoil(file.read_bytes()))
    policy = f"data.on_bad_line={bench.rng.choice(['stop', 'drop'])}"
    return f"{where} ({file.name})", lambda: refused(
        train.main, bench.argv(data, policy)[0], file, *names
    )


def _empty_file(bench: Bench) -> Case:
    return _spoilt(bench, lambda raw: b"", "empty file", "empty")


def _all_bad(bench: Bench) -> Case:
    return _spoilt(bench, lambda raw: re.sub(rb"[{\t]", b"?", raw), "every line bad")


def _misnamed(bench: Bench) -> Case:
    return _spoilt(bench, gzip.compress, "gzip without its name", ".gz")


def _torn(bench: Bench) -> Case:
    data = bench.data()
    key = bench.rng.choice(sorted(data))
    packed = gzip.compress(data[key].read_bytes())
    file = data[key].with_name(data[key].name + ".gz")
    file.write_bytes(packed[: bench.rng.randrange(20, len(packed) - 1)])
    return f"torn gzip ({file.name})", lambda: refused(
        train.main, bench.argv(data | {key: file}, "data.on_bad_line=drop")[0], file, "torn"
    )


def _harmless(bench: Bench, change, where: str) -> Case:
    data = bench.data()
    for file in data.values():
        file.write_bytes(change(file.read_bytes()))
    return where, lambda: expect(
        result(bench.run(data)[1]) == bench.result(), "the run is another one"
    )


def _marked(bench: Bench) -> Case:
    return _harmless(bench, lambda raw: b"\xef\xbb\xbf" + raw, "byte order marks")


def _windows(bench: Bench) -> Case:
    return _harmless(
        bench,
        lambda raw: raw.replace(b"\n", b"\r\n").removesuffix(b"\r\n"),
        "CRLF, no last line end",
    )


def prompts(world: World, n: int) -> Iterator[Outcome]:
    """Prompts too long, empty, of nothing but control tokens; answers of 0 and 1 tokens."""
    bench = Bench(world, "prompts")
    long = [
        partial(_too_long, bench, split, policy)
        for split in ("train", "test")
        for policy in ("stop", "drop")
    ]
    rest = [
        partial(make, bench)
        for make in (
            _megabyte,
            _control_only,
            _control_only,
            _empty_query,
            _no_tokens,
            _one_token,
            _all_too_long,
            _generate_too_long,
        )
    ]
    return each(world, spread(world.rng, n, [*long, *rest]))


def _add(bench: Bench, data: dict, split: str, texts: list[str]) -> list[str]:
    """Queries with these texts, at random places: their ids."""
    file = data[f"{split}_queries"]
    ids = []
    rows = file.read_text().splitlines()
    for text in texts:
        ids.append(new_id(bench.rng))
        rows.insert(bench.rng.randrange(len(rows) + 1), json.dumps(dict(id=ids[-1], text=text)))
    file.write_text("\n".join(rows) + "\n")
    return ids


def _too_long(bench: Bench, split: str, policy: str) -> Case:
    data = bench.data()
    rng = bench.rng
    ids = _add(
        bench,
        data,
        split,
        [
            _text(rng) * rng.randrange(40, 400)
            for _ in range(1 if policy == "stop" else rng.randrange(1, 6))
        ],
    )

    def case():
        if policy == "stop":
            return refused(
                train.main,
                bench.argv(data)[0],
                ids[0],
                "prompt.max_tokens is 64",
                "data.on_long_prompt=drop",
            )
        out, run = bench.run(data, "data.on_long_prompt=drop")
        expect(
            f"recr1: {len(ids)} prompts over the limit left out, first: query '" in out,
            f"{len(ids)} prompts are not told of: {out[:1500]}",
        )
        expect(result(run) == bench.result(), "the run is another one than without these prompts")

    return f"too long ({split}, {policy})", case


def _megabyte(bench: Bench) -> Case:
    data = bench.data()
    _add(
        bench, data, "train", [bench.rng.choice(["a", "<|end|>", "é ", "\u200d", "1"]) * 1_000_000]
    )

    def case():
        out, run = bench.run(data, "data.on_long_prompt=drop")
        expect(
            "recr1: 1 prompts over the limit left out" in out and result(run) == bench.result(),
            out[:1500],
        )

    return "1,000,000 characters", case


def _control_only(bench: Bench) -> Case:
    """Every query: then some of them are sampled from, and those are logged with their ids."""
    data = bench.data()
    rng = bench.rng
    for split in ("train", "test"):
        rows = [json.loads(line) for line in data[f"{split}_queries"].read_text().splitlines()]
        data[f"{split}_queries"].write_text(
            "".join(
                json.dumps(dict(row, text="".join(rng.choices(CONTROL, k=rng.randrange(1, 4)))))
                + "\n"
                for row in rows
            )
        )
    return "only control tokens", lambda: no_forged_ids(
        bench.run(data, "prompt.max_tokens=128", "train.tokens_per_micro_batch=400")[1]
    )


def no_forged_ids(run) -> None:
    """The prompts that were sampled from hold the template's control tokens and no other."""
    tokenizer = tiny_world.tiny_tokenizer()
    added = set(tokenizer.get_added_vocab().values())
    want = [
        i
        for i in tokenizer(
            tokenizer.apply_chat_template(
                [dict(role="user", content="find: x")], tokenize=False, add_generation_prompt=True
            )
            + "<think>"
        )["input_ids"]
        if i in added
    ]
    found = [row["prompt_ids"] for row in logged(run) if "prompt_ids" in row]
    expect(
        bool(found) and all([i for i in ids if i in added] == want for ids in found),
        f"control tokens {found}, must be {want}",
    )


def _empty_query(bench: Bench) -> Case:
    data = bench.data()
    text = "".join(bench.rng.choices(" \t\u3000\u2028", k=bench.rng.randrange(4)))
    [id] = _add(bench, data, "test", [text])
    line = 1 + next(
        i for i, row in enumerate(data["test_queries"].read_text().split("\n")) if id in row
    )

    def case():
        refused(
            train.main, bench.argv(data)[0], f"{data['test_queries']}:{line}: ", "'text' is empty"
        )
        out, run = bench.run(data, "data.on_bad_line=drop")
        expect("recr1: 1 data lines left out" in out and result(run) == bench.result(), out[:1500])

    return "empty query", case


def _no_tokens(bench: Bench) -> Case:
    return "max_new_tokens 0", lambda: refused(
        train.main, bench.argv(None, "sampling.max_new_tokens=0")[0], "sampling.max_new_tokens"
    )


def _one_token(bench: Bench) -> Case:
    def case():
        _, run = bench.run(None, "sampling.max_new_tokens=1", "loss.kl_coef=0")
        expect(all(row["error"] for row in logged(run)), "an answer of one token was understood")
        with (
            safe_open(run / "model/model.safetensors", "pt") as after,
            safe_open(bench.world.folder / "policy/model.safetensors", "pt") as before,
        ):
            expect(
                all(
                    bool((after.get_tensor(k) == before.get_tensor(k)).all()) for k in before.keys()
                ),
                "weights moved where no reward differs",
            )

    return "max_new_tokens 1", case


def _all_too_long(bench: Bench) -> Case:
    return "no prompt fits", lambda: refused(
        train.main,
        bench.argv(None, "prompt.max_tokens=5", "data.on_long_prompt=drop")[0],
        "train.prompts_per_step",
    )


def _generate_too_long(bench: Bench) -> Case:
    text = _text(bench.rng) * bench.rng.randrange(40, 100)

    def case():
        _, run = bench.run()
        refused(cli.main, ["generate", "--model", run / "model", text], "prompt.max_tokens is 64")
        # nothing asked: an answer or the one line
        code, out, err = said(cli.main, ["generate", "--model", run / "model", ""])
        if code not in (0, 2) or code and err.count("\n") != 1:
            raise Lost(f"generate '' ends with {code}: {out}{err}")

    return "generate, too long", case
