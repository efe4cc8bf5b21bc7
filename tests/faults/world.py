"""A run to be broken, what it comes to when nothing breaks it, and whether a broken one came to the same."""
import gzip
import hashlib
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import tiny
from jobs import Job, forked

STEPS, RANKS = 6, 2
LIMIT = 90.0           # seconds for a job: one that takes longer hangs, and its run is lost
SETTINGS = {"train.steps": STEPS, "train.tokens_per_micro_batch": 100, "train.eval_every": 2, "run.patience": 30, "save.every": 1, "save.keep": 3,
            "loss.kl": 0.01}
OTHERWISE = ("seconds", "memory", "rollout_tokens_per_s", "reward_wait", "wall_s")         # what two equal runs differ in


@dataclass
class Outcome:
    """One fault. lost: the run did not come to its end; silent: it did, but not to the result, or something broken was taken without a word."""
    where: str
    verdict: str = "survived"
    note: str = ""
    seconds: float | None = None           # until every rank had ended, where that is the question


class World:
    """Config, policy and data in `folder`, and the result of an undisturbed run."""

    def __init__(self, folder: Path):
        self.folder, self.rng, self.runs = folder, random.Random(), 0
        self.config = str(folder / "config.yaml")
        forked(lambda: tiny.write_yaml(folder, **SETTINGS))
        run = self.fresh()
        job = self.start(run)
        codes = job.wait(LIMIT)
        assert codes == [0] * RANKS, f"the undisturbed run ends with {codes}:\n{job.said()}"
        self.want = result(run)

    def fresh(self) -> Path:
        """The folder of a new run; the one before is removed."""
        shutil.rmtree(self.folder / f"run{self.runs}", ignore_errors=True)
        self.runs += 1
        return self.folder / f"run{self.runs}"

    def start(self, run: Path, *more: str, ranks: int = RANKS, prepare=None) -> Job:
        return Job([self.config, *more, f"run.dir={run}"], ranks, prepare)

    def finish(self, run: Path, *more: str) -> tuple[Job, str, str]:
        """The same command again, left alone: (job, verdict, note)."""
        job = self.start(run, *more)
        return job, *self.judge(run, job, job.wait(LIMIT))

    def judge(self, run: Path, job: Job, codes: list[int] | None) -> tuple[str, str]:
        """(verdict, note) of a job that was to finish the run."""
        if codes != [0] * RANKS:
            return "lost", f"exit codes {codes}: {job.said()[-1500:]}"
        now = result(run)
        wrong = [name for name in self.want if now[name] != self.want[name]]
        return ("silent", f"differs in {', '.join(wrong)}") if wrong else ("survived", "")


def result(run: Path) -> dict:
    """All that a run is to come to, whatever happened on the way."""
    def plain(row: dict) -> dict:
        return {key: value for key, value in row.items() if key not in OTHERWISE}

    def rows(path: Path) -> list[dict]:
        return [plain(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    weights = run / "model/model.safetensors"
    return dict(weights=hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else None, metrics=rows(run / "metrics.jsonl"),
                rollouts=gzip.decompress((run / "rollouts.jsonl.gz").read_bytes()) if (run / "rollouts.jsonl.gz").exists() else None,
                scores=rows(run / "eval_before.jsonl") + rows(run / "eval_after.jsonl"), summary=plain(json.loads((run / "summary.json").read_text())))


def checkpoints(run: Path) -> list[str]:
    """Names in its folder of checkpoints, the partial ones too."""
    folder = run / "checkpoints"
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
