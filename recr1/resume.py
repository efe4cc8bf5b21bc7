"""What lets a run outlive its process: whose folder it is, the checkpoint it goes on from, those it
writes, and how it leaves when it is stopped.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from . import checkpoint, config_file as configs, dist, heartbeat
from .config import Config
from .files import PARTIAL, Damaged, writing
from .fsdp import Sharded
from .log import RunLog, say
from .optim import Optimizer
from .stopping import EARLY

# what a run that goes on may have otherwise
FREE = ("run.dir", "run.threads", "run.patience", "retriever.timeout", "log.", "save.")


class RunError(ValueError):
    """The run cannot start as configured. The message says what to change."""


def look(folder: Path, cfg: Config) -> bool:
    """Whether `folder` holds a run of this config that is not finished; False: nothing. Raises
    RunError for anything else.
    """
    if (
        not folder.exists()
        or folder.is_dir()
        and {p.name for p in folder.iterdir()} <= {f"config.yaml{PARTIAL}"}
    ):
        return False
    if not (folder / "config.yaml").is_file():
        raise RunError(
            f"run.dir: {folder} exists, is not empty and holds no run's config.yaml; name a new folder, or move it away"
        )
    if (folder / "summary.json").exists():
        raise RunError(
            f"run.dir: the run in {folder} is finished; name a new folder, or move it away"
        )
    if difference := different(
        dataclasses.asdict(configs.load(str(folder / "config.yaml"), [])), cfg
    ):
        raise RunError(
            f"run.dir: the run in {folder} has another config: {difference}; set it back, or name a new folder"
        )
    return True


def different(other: dict, cfg: Config) -> str:
    """The first key in which a config, as a dict, is not `cfg`, with both values; "" for none. What
    FREE names does not count.
    """

    def flat(tree: dict, where: str = "") -> dict:
        parts = (
            flat(v, f"{where}{k}.")
            if isinstance(v, dict)
            else {where + k: list(v) if isinstance(v, tuple) else v}
            for k, v in tree.items()
        )
        return {k: v for part in parts for k, v in part.items()}

    theirs = flat(other)
    ours = flat(dataclasses.asdict(cfg))
    return next(
        (
            f"{key} was {theirs.get(key)!r}, is {ours.get(key)!r}"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key) and not key.startswith(FREE)
        ),
        "",
    )


class Progress:
    """How far a run of `last` steps is, and its checkpoints. `step`: the last finished one; `row`:
    its metrics until they are written.
    """

    def __init__(
        self,
        cfg: Config,
        last: int,
        started: float,
        policy: Sharded,
        optimizer: Optimizer,
        log: RunLog,
        tokenizer,
        stops: frozenset[int],
    ):
        self.cfg = cfg
        self.last = last
        self.started = started
        self.policy = policy
        self.optimizer = optimizer
        self.log = log
        self.tokenizer = tokenizer
        self.stops = stops
        self.root = log.folder / "checkpoints"
        # skips: optimiser steps skipped in a row
        self.step = 0
        self.row = None
        self.skips = 0
        self.saved = ""  # the last checkpoint that was written or loaded
        self.value: float | None = None  # rank 0: the step's val_ndcg, where it was validated
        self.best: list | None = None  # rank 0: [val_ndcg, step] of the best checkpoint

    def resume(self, found: bool) -> None:
        """From the newest checkpoint that is whole; without any from step 1. `found`: there was a
        run here. A collective.
        """
        folder, state, refused = checkpoint.newest(
            self.root, self.policy, self.optimizer, self._fits
        )
        for why in refused:
            say(f"recr1: checkpoint refused: {why}")
        if folder is None and refused:
            raise RunError(
                f"{self.root}: no checkpoint there is valid (the newest: {refused[0]}); move {self.root.parent} away to start anew"
            )
        with dist.together(), writing(self.root):
            if dist.rank() == 0 and self.root.exists():
                checkpoint.remove_partial(self.root)
            self.log.restore(state.get("log"))
        if folder is None:
            if found:
                say(f"recr1: {self.root.parent} has no checkpoint: starts from step 1 again")
            return
        checkpoint.load(folder, state, self.policy, self.optimizer)
        self.saved = folder.name
        self.step = state["step"]
        self.row = state["row"]
        self.skips = state["skips"]
        self.best = state["best"]
        self.started -= state["wall_s"]
        with dist.together(), writing(self.root):
            if dist.rank() == 0:
                self.best = checkpoint.settle(self.root, folder, self.best)
        changed = checkpoint.differences(state, self.policy, self.optimizer)
        say(
            f"recr1: goes on after step {self.step} from {folder}"
            + (f"; not bit for bit the same run: {changed}" if changed else "")
        )

    def _fits(self, state: dict) -> None:
        if difference := different(state["config"], self.cfg):
            raise Damaged(f"state.json is another config's: {difference}")
        best = state["best"]
        if not (
            type(state["wall_s"]) is float
            and type(state["skips"]) is int
            and 1 <= state["step"] <= self.last
            and type(state["row"]) in (dict, type(None))
            and (best is None or [type(x) for x in best] == [float, int])
        ):
            raise Damaged("state.json is not of the form that this version writes")
        self.log.check(state["log"])

    def finished(self, step: int, row: dict) -> None:
        """From here on the step stands: a run that is stopped goes on behind it, with its
        validation.
        """
        self.step = step
        self.row = row
        self.value = None

    def save(self) -> None:
        """A checkpoint of the state after the last finished step, and the pruning of older ones; a
        collective. Raises WriteError on all ranks.
        """
        heartbeat.at("save")
        folder = checkpoint.save(
            self.root,
            self.step,
            self._state,
            self.policy,
            self.optimizer,
            self.tokenizer,
            self.stops,
            configs.answering(self.cfg),
        )
        self.saved = folder.name
        with dist.together(), writing(self.root):
            if dist.rank() == 0:
                self._rank_and_prune()

    def save_if_due(self) -> None:
        """Every save.every steps and after the last one, before its evaluation."""
        every = self.cfg.save.every
        if every and (self.step % every == 0 or self.step == self.last):
            self.save()

    def _state(self) -> dict:
        self._rank()
        return dict(
            step=self.step,
            row=self.row,
            best=self.best,
            skips=self.skips,
            wall_s=time.perf_counter() - self.started,
            log=self.log.state(),
            config=dataclasses.asdict(self.cfg),
        )

    def _rank(self) -> None:
        if self.value is not None and (self.best is None or self.value > self.best[0]):
            self.best = [self.value, self.step]

    def _rank_and_prune(self) -> None:
        self._rank()
        checkpoint.prune(self.root, self.cfg.save.keep, self.best)

    def validated(self, value: float | None) -> None:
        """The step's val_ndcg is known; its checkpoint may stand already, when the run was stopped
        in between. Rank 0.
        """
        self.value = value
        if self.saved == self._name():
            self._rank_and_prune()

    def moved(self) -> bool:
        """Whether weights have changed since the last finished step: within train.inner_steps."""
        return self.optimizer.taken > self.step * self.cfg.train.inner_steps

    def leave(self) -> str:
        """Asked to stop: saves what is not yet saved, and says what stands; a collective."""
        if self.moved():
            return f"stopped within step {self.step + 1}, which had moved weights and is lost; the same command goes on from {self.saved or 'the start'}"
        if not self.step:
            return EARLY
        if self.saved != self._name():
            self.save()
        return f"stopped after step {self.step}; the same command goes on from {self.root / self.saved}"

    def _name(self) -> str:
        return f"step_{self.step:06d}"
