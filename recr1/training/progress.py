"""The progress of a run that outlives its process: the checkpoint from which it continues, those
that it writes, and how it ends when it is stopped.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from recr1.config import loader as configs
from recr1.config.schema import Config
from recr1.distributed import collectives as dist, heartbeat
from recr1.distributed.fsdp import Sharded
from recr1.distributed.printing import print_rank0
from recr1.tracking.run_log import RunLog
from recr1.training import checkpoint
from recr1.training.optimizer import Optimizer
from recr1.training.run_dir import RunError, find_difference, list_rounding_changes
from recr1.utils.files import Damaged, report_write_errors
from recr1.utils.interrupts import NOTHING_NEW


class TrainState:
    """How far a run of `last` steps is, and its checkpoints.

    `step` is the last finished step, `row` its metrics until they are written.
    """

    def __init__(
        self,
        cfg: Config,
        last: int,
        started: float,
        policy: Sharded,
        optimizer: Optimizer,
        log: RunLog,
        tokenizer: Any,
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
        self.step = 0
        self.row: dict[str, Any] | None = None
        self.num_skipped_in_a_row = 0  # optimizer steps
        self.saved = ""  # the last checkpoint that was written or loaded
        self.val_score: float | None = (
            None  # rank 0: the step's validation score, if it was validated
        )
        self.best: list | None = None  # rank 0: [validation score, step] of the best checkpoint

    def resume(self, is_resumed: bool) -> None:
        """Continue from the newest complete checkpoint; without any, from step 1. A collective.

        is_resumed: run.dir holds an unfinished run. Raises RunError when it has checkpoints and
        none is valid.
        """
        folder, state, refused = checkpoint.find_newest_checkpoint(
            self.root, self.policy, self.optimizer, self._check_fits
        )
        for reason in refused:
            print_rank0(f"recr1: checkpoint refused: {reason}")
        if folder is None and refused:
            raise RunError(
                f"{self.root}: no checkpoint there is valid (the newest: {refused[0]}); "
                f"move {self.root.parent} away to start anew"
            )

        # What was written after the checkpoint, or not to its end, goes.
        with dist.fail_together(), report_write_errors(self.root):
            if dist.rank() == 0 and self.root.exists():
                checkpoint.remove_partial(self.root)
            self.log.restore(state.get("log"))
        if folder is not None:
            self._continue_from(folder, state)
        elif is_resumed:
            print_rank0(f"recr1: {self.root.parent} has no checkpoint: starts from step 1 again")

    def _continue_from(self, folder: Path, state: dict[str, Any]) -> None:
        """Load a checkpoint; a collective."""
        checkpoint.load_checkpoint(folder, state, self.policy, self.optimizer)
        self.saved = folder.name
        self.step = state["step"]
        self.row = state["row"]
        self.num_skipped_in_a_row = state["skips"]
        self.best = state["best"]
        self.started -= state["wall_s"]
        with dist.fail_together(), report_write_errors(self.root):
            if dist.rank() == 0:
                self.best = checkpoint.settle_on_checkpoint(self.root, folder, self.best)
        message = f"recr1: goes on after step {self.step} from {folder}"
        differences = checkpoint.list_differences(state, self.policy, self.optimizer)
        differences += list_rounding_changes(state["config"], self.cfg)
        if differences:
            message += f"; not bit for bit the same run: {', '.join(differences)}"
        print_rank0(message)

    def _check_fits(self, state: dict[str, Any]) -> None:
        """Raise Damaged unless a checkpoint's state is one of this run."""
        difference = find_difference(state["config"], self.cfg)
        if difference:
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

    def mark_finished(self, step: int, row: dict[str, Any]) -> None:
        """Note that a step is finished: a run that is stopped from here on continues behind it,
        with its validation.
        """
        self.step = step
        self.row = row
        self.val_score = None

    def save(self) -> None:
        """Save a checkpoint of the state after the last finished step and prune older ones; a
        collective. Raises WriteError on all ranks.
        """
        heartbeat.enter_phase("save")
        recipe = configs.dump_answering_config(self.cfg)
        folder = checkpoint.save_checkpoint(
            self.root,
            self.step,
            self._collect_state,
            self.policy,
            self.optimizer,
            self.tokenizer,
            self.stops,
            recipe,
        )
        self.saved = folder.name
        with dist.fail_together(), report_write_errors(self.root):
            if dist.rank() == 0:
                self._update_best_and_prune()

    def save_if_due(self) -> None:
        """Save every save.every steps, and after the last step, before its evaluation."""
        every = self.cfg.save.every
        if every and (self.step % every == 0 or self.step == self.last):
            self.save()

    def _collect_state(self) -> dict[str, Any]:
        """Return what state.json has of the run. Rank 0."""
        self._update_best()
        return dict(
            step=self.step,
            row=self.row,
            best=self.best,
            skips=self.num_skipped_in_a_row,
            wall_s=time.perf_counter() - self.started,
            log=self.log.state(),
            config=dataclasses.asdict(self.cfg),
        )

    def _update_best(self) -> None:
        """Make this step's checkpoint the best if its validation is better. Rank 0."""
        if self.val_score is None:
            return
        if self.best is None or self.val_score > self.best[0]:
            self.best = [self.val_score, self.step]

    def _update_best_and_prune(self) -> None:
        """Update the best checkpoint and remove those that save.keep_last does not keep. Rank 0."""
        self._update_best()
        checkpoint.prune_checkpoints(self.root, self.cfg.save.keep_last, self.best)

    def mark_validated(self, value: float | None) -> None:
        """Note the step's validation score. The step's checkpoint may exist already, if the run
        was stopped in between. Rank 0.
        """
        self.val_score = value
        if self._is_saved():
            self._update_best_and_prune()

    def is_mid_step(self) -> bool:
        """Return whether weights have changed since the last finished step: within
        train.num_mini_batches.
        """
        return self.optimizer.num_steps > self.step * self.cfg.train.num_mini_batches

    def save_and_describe(self) -> str:
        """Save what is not yet saved when the run is asked to stop. Return the message that says
        where it continues. A collective.
        """
        if self.is_mid_step():
            return (
                f"stopped within step {self.step + 1}, which had moved weights and is lost; "
                f"the same command goes on from {self.saved or 'the start'}"
            )
        if not self.step:
            return NOTHING_NEW
        if not self._is_saved():
            self.save()
        return (
            f"stopped after step {self.step}; "
            f"the same command goes on from {self.root / self.saved}"
        )

    def _is_saved(self) -> bool:
        """Return whether the last finished step has a checkpoint."""
        return self.saved == checkpoint.format_checkpoint_name(self.step)
