"""A run to be broken, what it comes to when nothing breaks it, and whether a broken one came to the
same.
"""

import gzip
import hashlib
import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from helpers import tiny_world
from jobs import Job, run_forked, watch_events

STEPS = 6
RANKS = 2
# seconds that the undisturbed run takes at most where nothing else runs: limits are longer by as
# much as it takes longer
USUAL = 8.0
# seconds for a job, and for a rank that waits: one that takes longer hangs, and its run is lost
LIMIT = 90.0
PATIENCE = 30
SETTINGS = {
    "train.steps": STEPS,
    "train.tokens_per_micro_batch": 100,
    "train.eval_every": 2,
    "save.every": 1,
    "save.keep_last": 3,
    "loss.kl_coef": 0.01,
}
LORA = {"lora.rank": 3, "optimizer.lr": 1e-2}
# what two equal runs differ in
OTHERWISE = (
    "timing_s",
    "memory",
    "rollout_tokens_per_s",
    "tokens_per_s",
    "reward_wait_frac",
    "wall_s",
)


@dataclass
class Outcome:
    """One fault. lost: the run did not come to its end; silent: it did, but not to the result, or
    something broken was taken without a word.
    """

    where: str
    verdict: str = "survived"
    note: str = ""
    seconds: float | None = None  # until every rank had ended, where that is the question

    def lose(self, note: str) -> None:
        self.verdict = "lost"
        self.note = note


class World:
    """Config, policy and data in `folder`, and the result of an undisturbed run."""

    def __init__(self, folder: Path, lora: bool = False):
        self.folder = folder
        self.rng = random.Random()
        self.runs = 0
        self.slow = 50.0
        self.results = {}
        # the undisturbed run as it was after its last save
        self.config = str(folder / "config.yaml")
        self.unfinished = folder / "unfinished"
        settings = SETTINGS | (LORA if lora else {})
        run_forked(lambda: tiny_world.write_yaml(folder, **settings))
        start = time.monotonic()
        self.want = self.run_undisturbed()
        self.slow = max(1.0, (time.monotonic() - start) / USUAL)

    def read_events(self) -> dict[int, list[str]]:
        """Return {rank: what a save forces onto the disk and renames, in this order}, from the
        undisturbed run.
        """
        events = {}
        for rank in range(RANKS):
            text = (self.folder / f"events{rank}").read_text()
            events[rank] = text.splitlines()
        return events

    @property
    def limit(self) -> float:
        return LIMIT * self.slow

    def run_undisturbed(self, *more: str) -> dict:
        """Return what this run comes to, made once."""
        if more in self.results:
            return self.results[more]
        run = self.choose_folder()
        job = self.start(run, *more, prepare=self._trace_events)
        codes = job.wait(self.limit)
        note = f"the undisturbed run {more} ends with {codes}:\n{job.read_output()}"
        assert codes == [0] * RANKS, note
        self.results[more] = read_result(run)
        if not more:
            unsaved = shutil.ignore_patterns("summary.json", "eval_after.jsonl")
            shutil.copytree(run, self.unfinished, ignore=unsaved)
            shutil.rmtree(self.unfinished / "model")
        return self.results[more]

    def _trace_events(self, rank: int) -> None:
        path = self.folder / f"events{rank}"
        path.unlink(missing_ok=True)

        def write_event(number: int, name: str) -> None:
            with open(path, "a") as file:
                file.write(f"{name}\n")

        watch_events(rank, write_event)

    def choose_folder(self) -> Path:
        """Return the folder of a new run; the one before is removed."""
        shutil.rmtree(self.folder / f"run{self.runs}", ignore_errors=True)
        self.runs += 1
        return self.folder / f"run{self.runs}"

    def start(self, run: Path, *more: str, ranks: int = RANKS, prepare=None) -> Job:
        patience = round(PATIENCE * self.slow)
        settings = [f"run.collective_timeout={patience}", *more, f"run.dir={run}"]
        return Job([self.config, *settings], ranks, prepare, self.slow)

    def finish(self, run: Path, *more: str) -> tuple[Job, str, str]:
        """Run the same command again, left alone; return (job, verdict, note)."""
        job = self.start(run, *more)
        codes = job.wait(self.limit)
        verdict, note = self.judge(run, job, codes)
        return job, verdict, note

    def judge(
        self, run: Path, job: Job, codes: list[int] | None, want: dict | None = None
    ) -> tuple[str, str]:
        """Return (verdict, note) of a job that was to finish the run; want: another than the
        world's.
        """
        want = want or self.want
        if codes != [0] * RANKS:
            return "lost", f"exit codes {codes}: {job.read_output()[-1500:]}"
        actual = read_result(run)
        wrong = [name for name in want if actual[name] != want[name]]
        if wrong:
            return "silent", f"differs in {', '.join(wrong)}"
        return "survived", ""


def read_result(run: Path) -> dict:
    """Return all that a run is to come to, whatever happened on the way."""
    weights = run / "model/model.safetensors"
    rollouts = run / "rollouts.jsonl.gz"
    values = dict(weights=None, rollouts=None)
    if weights.exists():
        values["weights"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    if rollouts.exists():
        values["rollouts"] = gzip.decompress(rollouts.read_bytes())
    values["metrics"] = read_plain_rows(run / "metrics.jsonl")
    values["scores"] = read_plain_rows(run / "eval_before.jsonl")
    values["scores"] += read_plain_rows(run / "eval_after.jsonl")
    summary = json.loads((run / "summary.json").read_text())
    values["summary"] = drop_otherwise(summary)
    return values


def read_plain_rows(path: Path) -> list[dict]:
    """Read all whole lines of a file, without what two equal runs differ in."""
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [drop_otherwise(json.loads(line)) for line in lines]


def drop_otherwise(row: dict) -> dict:
    """Drop what two equal runs differ in."""
    return {key: value for key, value in row.items() if key not in OTHERWISE}


def list_checkpoints(run: Path) -> list[str]:
    """Return the names in its folder of checkpoints, the partial ones too."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir())
