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
from jobs import dies_with_parent
from world import Outcome, World, result

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


def each(world: World, cases: list[Case]) -> Iterator[Outcome]:
    """Their outcomes. One that ends the process or hangs is lost, and those after it run in
    another.
    """
    done = 0
    while done < len(cases):
        reader, writer = Pipe(duplex=False)
        pid = os.fork() or _work(cases[done:], writer)
        writer.close()
        while done < len(cases):
            why = "" if reader.poll(world.limit) else f"no end within {world.limit:.0f} s"
            try:
                outcome = Outcome(cases[done][0], "lost", why) if why else reader.recv()
            except EOFError:
                why = "it ended the process"
                outcome = Outcome(cases[done][0], "lost", why)
            done += 1
            yield outcome
            if why:
                break
        os.kill(pid, signal.SIGKILL)
        reader.close()
        os.waitpid(pid, 0)


def _work(cases: list[Case], writer) -> None:
    try:
        dies_with_parent()
        for where, case in cases:
            verdict = "survived"
            note = ""
            try:
                case()
            except (Lost, Silent) as e:
                verdict = type(e).__name__.lower()
                note = str(e)[-1500:]
            except BaseException:
                verdict = "lost"
                note = traceback.format_exc()[-1500:]
            writer.send(Outcome(where, verdict, note))
    finally:
        os._exit(0)


def said(main, argv: list) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command of ours."""
    out = io.StringIO()
    err = io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run_guarded(main, [str(a) for a in argv])
    return code, out.getvalue(), err.getvalue()


def refused(main, argv: list, *names: object) -> None:
    """The command ends with 2 and one line that holds all of `names`."""
    code, out, err = said(main, argv)
    expect(code != 0, f"it was accepted: {out[-600:]}")
    if (
        code != 2
        or not err.startswith("recr1: ")
        or err.count("\n") != 1
        or not err[:-1].isprintable()
    ):
        raise Lost(f"exit code {code}: {err}")
    expect(all(str(name) in err for name in names), f"{names} are not all named: {err}")


class Bench:
    """Runs of one process and one step on the world's policy, each in a folder of its own. Made for
    one kind of fault; main: of recr1.train or recr1.sft.
    """

    def __init__(self, world: World, name: str, config: str = "", main: Callable = train.main):
        self.world = world
        self.rng = world.rng
        self.folder = world.folder / name
        self.made = 0
        self.kept = {}
        self.config = config or world.config
        self.main = main

    def data(self) -> dict[str, Path]:
        """A copy of the world's data, to be spoiled: {setting: file}."""
        self.made += 1
        folder = self.folder / f"data{os.getpid()}.{self.made}"
        shutil.copytree(self.world.folder / "data", folder)
        names = dict(
            corpus="corpus.jsonl",
            train_queries="train.queries.jsonl",
            train_qrels="train.qrels.tsv",
            test_queries="test.queries.jsonl",
            test_qrels="test.qrels.tsv",
        )
        return {key: folder / name for key, name in names.items()}

    def listed(self) -> dict[str, Path]:
        """Data whose queries have what the tasks with lists need."""
        data = self.data()
        ids = [row["id"] for row in tiny_world.jsonl(data["corpus"])]
        for split in ("train", "test"):
            rows = [
                row
                | dict(
                    profile="likes lamps",
                    history=self.rng.sample(ids, 2),
                    candidates=self.rng.sample(ids, LISTED),
                )
                for row in tiny_world.jsonl(data[f"{split}_queries"])
            ]
            data[f"{split}_queries"].write_text("".join(json.dumps(row) + "\n" for row in rows))
        return data

    def argv(self, data: dict[str, Path] | None = None, *more: str) -> tuple[list[str], Path]:
        """(arguments of recr1.train, the run's folder)."""
        self.made += 1
        run = self.folder / f"run{os.getpid()}.{self.made}"
        paths = data or {}
        return [
            self.config,
            *ONE_STEP,
            *(f"data.{key}={path}" for key, path in paths.items()),
            f"retriever.index_dir={run}.index",
            *more,
            f"run.dir={run}",
        ], run

    def run(self, data: dict[str, Path] | None = None, *more: str) -> tuple[str, Path]:
        """A run that has to come to its end: (stdout, folder)."""
        argv, folder = self.argv(data, *more)
        code, out, err = said(self.main, argv)
        if code or err:
            raise Lost(f"exit code {code}: {err or out[-1000:]}")
        return out, folder

    def result(self, *more: str) -> dict:
        """What the undisturbed run of these settings comes to."""
        if more not in self.kept:
            self.kept[more] = result(self.run(None, *more)[1])
        return self.kept[more]

    def run_saying(
        self, texts: Iterator[str], data: dict[str, Path] | None = None, *more: str
    ) -> tuple[str, Path]:
        """`run` of a policy whose completions read as `texts` has them."""
        return self.saying(texts, lambda: self.run(data, *more))

    def saying(self, texts: Iterator[str], work: Callable):
        """work(), with whatever a policy samples decoded to the next of `texts`."""
        load = setup.load_tokenizer

        def loaded(folder):
            tokenizer = load(folder)
            tokenizer.decode = lambda ids, **how: next(texts)
            return tokenizer

        setup.load_tokenizer = loaded
        try:
            return work()
        finally:
            setup.load_tokenizer = load


def logged(run: Path) -> list[dict]:
    """Every completion that a run has written down, with `error` and `answer`, where it was
    evaluated `ndcg`, where it was trained on `reward`. Each line must be JSON in the strict sense,
    and there must be as many as the run has made.
    """

    def rows(path: Path) -> list[dict]:
        found = tiny_world.jsonl(path)
        expect(
            json.dumps(found, allow_nan=False) and all(isinstance(row, dict) for row in found),
            f"{path} is no JSONL",
        )
        return found

    steps = rows(run / "metrics.jsonl")
    expect(
        [row["step"] for row in steps] == [1],
        f"metrics.jsonl has the steps {[row.get('step') for row in steps]}",
    )
    return (
        rows(run / "rollouts.jsonl.gz")
        + rows(run / "eval_before.jsonl")
        + rows(run / "eval_after.jsonl")
    )


def spread(rng, n: int, makers: list[Callable[[], Case]]) -> list[Case]:
    """n cases: every maker as often as any other, a sample of them where n is less."""
    chosen = [
        maker for _ in range(-(-n // len(makers))) for maker in rng.sample(makers, len(makers))
    ][:n]
    return [maker() for maker in chosen]
