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
from jobs import Job, at_events, forked

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


class World:
    """Config, policy and data in `folder`, and the result of an undisturbed run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rng = random.Random()
        self.runs = 0
        self.slow = 50.0
        self.results = {}
        # the undisturbed run as it was after its last save
        self.config = str(folder / "config.yaml")
        self.unfinished = folder / "unfinished"
        forked(lambda: tiny_world.write_yaml(folder, **SETTINGS))
        start = time.monotonic()
        self.want = self.undisturbed()
        self.slow = max(1.0, (time.monotonic() - start) / USUAL)

    def events(self) -> dict[int, list[str]]:
        """{rank: what a save forces onto the disk and renames, in this order}, from the undisturbed
        run.
        """
        return {
            rank: (self.folder / f"events{rank}").read_text().splitlines() for rank in range(RANKS)
        }

    @property
    def limit(self) -> float:
        return LIMIT * self.slow

    def undisturbed(self, *more: str) -> dict:
        """What this run comes to, made once."""
        if more not in self.results:
            run = self.fresh()
            job = self.start(run, *more, prepare=self._trace)
            codes = job.wait(self.limit)
            assert codes == [0] * RANKS, (
                f"the undisturbed run {more} ends with {codes}:\n{job.said()}"
            )
            self.results[more] = result(run)
            if not more:
                shutil.copytree(
                    run,
                    self.unfinished,
                    ignore=shutil.ignore_patterns("summary.json", "eval_after.jsonl"),
                )
                shutil.rmtree(self.unfinished / "model")
        return self.results[more]

    def _trace(self, rank: int) -> None:
        path = self.folder / f"events{rank}"
        path.unlink(missing_ok=True)
        at_events(rank, lambda k, name: open(path, "a").write(f"{name}\n"))

    def fresh(self) -> Path:
        """The folder of a new run; the one before is removed."""
        shutil.rmtree(self.folder / f"run{self.runs}", ignore_errors=True)
        self.runs += 1
        return self.folder / f"run{self.runs}"

    def start(self, run: Path, *more: str, ranks: int = RANKS, prepare=None) -> Job:
        return Job(
            [
                self.config,
                f"run.collective_timeout={round(PATIENCE * self.slow)}",
                *more,
                f"run.dir={run}",
            ],
            ranks,
            prepare,
            self.slow,
        )

    def finish(self, run: Path, *more: str) -> tuple[Job, str, str]:
        """The same command again, left alone: (job, verdict, note)."""
        job = self.start(run, *more)
        return job, *self.judge(run, job, job.wait(self.limit))

    def judge(
        self, run: Path, job: Job, codes: list[int] | None, want: dict | None = None
    ) -> tuple[str, str]:
        """(verdict, note) of a job that was to finish the run; want: another than the world's."""
        want = want or self.want
        if codes != [0] * RANKS:
            return "lost", f"exit codes {codes}: {job.said()[-1500:]}"
        now = result(run)
        wrong = [name for name in want if now[name] != want[name]]
        return ("silent", f"differs in {', '.join(wrong)}") if wrong else ("survived", "")


def result(run: Path) -> dict:
    """All that a run is to come to, whatever happened on the way."""

    def plain(row: dict) -> dict:
        return {key: value for key, value in row.items() if key not in OTHERWISE}

    def rows(path: Path) -> list[dict]:
        return (
            [plain(json.loads(line)) for line in path.read_bytes().split(b"\n")[:-1]]
            if path.exists()
            else []
        )

    weights = run / "model/model.safetensors"
    return dict(
        weights=hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else None,
        metrics=rows(run / "metrics.jsonl"),
        rollouts=gzip.decompress((run / "rollouts.jsonl.gz").read_bytes())
        if (run / "rollouts.jsonl.gz").exists()
        else None,
        scores=rows(run / "eval_before.jsonl") + rows(run / "eval_after.jsonl"),
        summary=plain(json.loads((run / "summary.json").read_text())),
    )


def checkpoints(run: Path) -> list[str]:
    """Names in its folder of checkpoints, the partial ones too."""
    folder = run / "checkpoints"
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
