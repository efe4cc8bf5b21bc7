"""Faults that need no ranks: cases in a process of their own, one after the other, and commands as
a user gives them.
"""

import io
import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import Pipe
from pathlib import Path

from helpers import tiny_world
from jobs import die_with_parent
from world import Outcome, World, read_result

from recr1 import train
from recr1.training import setup
from recr1.training.launch import run_guarded

ONE_STEP = ("run.collective_timeout=300", "train.steps=1", "train.eval_every=0", "save.every=0")
LISTED = 4  # candidates of a query
Case = tuple[str, Callable[[], None]]  # (what is done, a function that raises Lost or Silent)


class Lost(Exception):
    """The command did not end as a command should."""


class Silent(Exception):
    """Something broken was taken without a word, or made the result another one."""


def expect(true: bool, note: object) -> None:
    if not true:
        raise Silent(note)


def run_cases(world: World, cases: list[Case]) -> Iterator[Outcome]:
    """Yield their outcomes. One that ends the process or hangs is lost, and those after it run in
    another.
    """
    ended = 0
    while ended < len(cases):
        reader, writer = Pipe(duplex=False)
        pid = os.fork() or run_and_leave(cases[ended:], writer)
        writer.close()
        for where, _ in cases[ended:]:
            outcome = receive_outcome(reader, world.limit)
            ended += 1
            if isinstance(outcome, str):
                yield Outcome(where, "lost", outcome)
                break
            yield outcome
        os.kill(pid, signal.SIGKILL)
        reader.close()
        os.waitpid(pid, 0)


def receive_outcome(reader, limit: float) -> Outcome | str:
    """Return the next outcome, or why there is none."""
    if not reader.poll(limit):
        return f"no end within {limit:.0f} s"
    try:
        return reader.recv()
    except EOFError:
        return "it ended the process"


def run_and_leave(cases: list[Case], writer) -> None:
    """Send the outcomes of the cases, and end this process."""
    try:
        die_with_parent()
        for where, check in cases:
            outcome = run_case(where, check)
            writer.send(outcome)
    finally:
        os._exit(0)


def run_case(where: str, check: Callable[[], None]) -> Outcome:
    try:
        check()
    except (Lost, Silent) as error:
        verdict = type(error).__name__.lower()
        return Outcome(where, verdict, str(error)[-1500:])
    except BaseException:
        return Outcome(where, "lost", traceback.format_exc()[-1500:])
    return Outcome(where)


def run_command(main, argv: list) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) of a command of ours."""
    out = io.StringIO()
    err = io.StringIO()
    arguments = [str(argument) for argument in argv]
    with redirect_stdout(out), redirect_stderr(err):
        code = run_guarded(main, arguments)
    return code, out.getvalue(), err.getvalue()


def expect_refusal(main, argv: list, *names: object) -> None:
    """Check that the command ends with 2 and one line that holds all of `names`."""
    code, out, err = run_command(main, argv)
    expect(code != 0, f"it was accepted: {out[-600:]}")
    is_one_line = err.count("\n") == 1 and err[:-1].isprintable()
    if code != 2 or not err.startswith("recr1: ") or not is_one_line:
        raise Lost(f"exit code {code}: {err}")
    for name in names:
        expect(str(name) in err, f"{names} are not all named: {err}")


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write a file of JSONL."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))


class Bench:
    """Runs of one process and one step on the world's policy, each in a folder of its own. Made for
    one kind of fault; main: of recr1.train or recr1.sft.
    """

    def __init__(self, world: World, name: str, config: str = "", main: Callable = train.main):
        self.world = world
        self.rng = world.rng
        self.folder = world.folder / name
        self.folders = 0
        self.cache = {}
        self.config = config or world.config
        self.main = main

    def copy_data(self) -> dict[str, Path]:
        """Copy the world's data, to be spoiled: {setting: file}."""
        self.folders += 1
        folder = self.folder / f"data{os.getpid()}.{self.folders}"
        shutil.copytree(self.world.folder / "data", folder)
        names = dict(
            corpus="corpus.jsonl",
            train_queries="train.queries.jsonl",
            train_qrels="train.qrels.tsv",
            test_queries="test.queries.jsonl",
            test_qrels="test.qrels.tsv",
        )
        return {key: folder / name for key, name in names.items()}

    def copy_listed_data(self) -> dict[str, Path]:
        """Copy data whose queries have what the tasks with lists need."""
        data = self.copy_data()
        ids = [row["id"] for row in tiny_world.jsonl(data["corpus"])]
        for split in ("train", "test"):
            file = data[f"{split}_queries"]
            rows = tiny_world.jsonl(file)
            for row in rows:
                row["profile"] = "likes lamps"
                row["history"] = self.rng.sample(ids, 2)
                row["candidates"] = self.rng.sample(ids, LISTED)
            write_rows(file, rows)
        return data

    def make_argv(self, data: dict[str, Path] | None = None, *more: str) -> tuple[list[str], Path]:
        """Return (arguments of recr1.train, the run's folder)."""
        self.folders += 1
        run = self.folder / f"run{os.getpid()}.{self.folders}"
        paths = data or {}
        settings = [f"data.{key}={path}" for key, path in paths.items()]
        settings.append(f"retriever.index_dir={run}.index")
        return [self.config, *ONE_STEP, *settings, *more, f"run.dir={run}"], run

    def run(self, data: dict[str, Path] | None = None, *more: str) -> tuple[str, Path]:
        """Run what has to come to its end; return (stdout, folder)."""
        argv, folder = self.make_argv(data, *more)
        code, out, err = run_command(self.main, argv)
        if code or err:
            raise Lost(f"exit code {code}: {err or out[-1000:]}")
        return out, folder

    def run_undisturbed(self, *more: str) -> dict:
        """Return what the undisturbed run of these settings comes to."""
        if more not in self.cache:
            _, folder = self.run(None, *more)
            self.cache[more] = read_result(folder)
        return self.cache[more]

    def run_saying(
        self, texts: Iterator[str], data: dict[str, Path] | None = None, *more: str
    ) -> tuple[str, Path]:
        """Do as `run`, with a policy whose completions read as `texts` has them."""
        return self.call_saying(texts, lambda: self.run(data, *more))

    def call_saying(self, texts: Iterator[str], work: Callable):
        """Return work(), with whatever a policy samples decoded to the next of `texts`."""
        load = setup.load_tokenizer

        def load_speaker(folder):
            tokenizer = load(folder)
            tokenizer.decode = lambda ids, **how: next(texts)
            return tokenizer

        setup.load_tokenizer = load_speaker
        try:
            return work()
        finally:
            setup.load_tokenizer = load


def read_log(run: Path) -> list[dict]:
    """Read every completion that a run has written down, with `error` and `answer`, where it was
    evaluated `ndcg`, where it was trained on `reward`. Each line must be JSON in the strict sense,
    and there must be as many as the run has made.
    """
    steps = [row.get("step") for row in read_strictly(run / "metrics.jsonl")]
    expect(steps == [1], f"metrics.jsonl has the steps {steps}")
    rows = []
    for name in ("rollouts.jsonl.gz", "eval_before.jsonl", "eval_after.jsonl"):
        rows += read_strictly(run / name)
    return rows


def read_strictly(path: Path) -> list[dict]:
    """Read a file of objects without a NaN or an infinity."""
    rows = tiny_world.jsonl(path)
    for row in rows:
        expect(isinstance(row, dict), f"{path} is no JSONL")
    expect(json.dumps(rows, allow_nan=False), f"{path} is no JSONL")
    return rows


def draw_cases(rng, n: int, makers: list[Callable[[], Case]]) -> list[Case]:
    """Make n cases: by every maker as often as by any other, by a sample of them where n is
    less.
    """
    chosen = []
    while len(chosen) < n:
        chosen += rng.sample(makers, len(makers))
    return [make() for make in chosen[:n]]
