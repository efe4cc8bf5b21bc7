"""What lets a run outlive its process: whose folder it is, the checkpoint it goes on from, those it
writes, and how it leaves when it is stopped.
"""

from __future__ import annotations

import dataclasses
import time

from recr1.config import loader as configs
from recr1.config.schema import Config
from recr1.distributed import collectives as dist, heartbeat
from recr1.distributed.fsdp import Sharded
from recr1.distributed.printing import print_rank0
from recr1.tracking.run_log import RunLog
from recr1.training import checkpoint
from recr1.training.optimizer import Optimizer
from recr1.training.run_dir import RunError, find_difference
from recr1.utils.files import Damaged, report_write_errors
from recr1.utils.interrupts import NOTHING_NEW


class TrainState:
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
        self.num_skipped_in_a_row = 0
        self.saved = ""  # the last checkpoint that was written or loaded
        self.val_score: float | None = None  # rank 0: the step's val_ndcg, where it was validated
        self.best: list | None = None  # rank 0: [val_ndcg, step] of the best checkpoint

    def resume(self, found: bool) -> None:
        """From the newest checkpoint that is whole; without any from step 1. `found`: there was a
        run here. A collective.
        """
        folder, state, refused = checkpoint.find_newest_checkpoint(
            self.root, self.policy, self.optimizer, self._fits
        )
        for why in refused:
            print_rank0(f"recr1: checkpoint refused: {why}")
        if folder is None and refused:
            raise RunError(
                f"{self.root}: no checkpoint there is valid (the newest: {refused[0]}); move {self.root.parent} away to start anew"
            )
        with dist.fail_together(), report_write_errors(self.root):
            if dist.rank() == 0 and self.root.exists():
                checkpoint.remove_partial(self.root)
            self.log.restore(state.get("log"))
        if folder is None:
            if found:
                print_rank0(
                    f"recr1: {self.root.parent} has no checkpoint: starts from step 1 again"
                )
            return
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
        changed = checkpoint.list_differences(state, self.policy, self.optimizer)
        print_rank0(
            f"recr1: goes on after step {self.step} from {folder}"
            + (f"; not bit for bit the same run: {changed}" if changed else "")
        )

    def _fits(self, state: dict) -> None:
        if difference := find_difference(state["config"], self.cfg):
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

    def mark_finished(self, step: int, row: dict) -> None:
        """From here on the step stands: a run that is stopped goes on behind it, with its
        validation.
        """
        self.step = step
        self.row = row
        self.val_score = None

    def save(self) -> None:
        """A checkpoint of the state after the last finished step, and the pruning of older ones; a
        collective. Raises WriteError on all ranks.
        """
        heartbeat.enter_phase("save")
        folder = checkpoint.save_checkpoint(
            self.root,
            self.step,
            self._state,
            self.policy,
            self.optimizer,
            self.tokenizer,
            self.stops,
            configs.dump_answering_config(self.cfg),
        )
        self.saved = folder.name
        with dist.fail_together(), report_write_errors(self.root):
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
            skips=self.num_skipped_in_a_row,
            wall_s=time.perf_counter() - self.started,
            log=self.log.state(),
            config=dataclasses.asdict(self.cfg),
        )

    def _rank(self) -> None:
        if self.val_score is not None and (self.best is None or self.val_score > self.best[0]):
            self.best = [self.val_score, self.step]

    def _rank_and_prune(self) -> None:
        self._rank()
        checkpoint.prune_checkpoints(self.root, self.cfg.save.keep, self.best)

    def mark_validated(self, value: float | None) -> None:
        """The step's val_ndcg is known; its checkpoint may stand already, when the run was stopped
        in between. Rank 0.
        """
        self.val_score = value
        if self.saved == self._describe_saved():
            self._rank_and_prune()

    def is_mid_step(self) -> bool:
        """Whether weights have changed since the last finished step: within train.inner_steps."""
        return self.optimizer.num_steps > self.step * self.cfg.train.inner_steps

    def save_and_describe(self) -> str:
        """Asked to stop: saves what is not yet saved, and says what stands; a collective."""
        if self.is_mid_step():
            return f"stopped within step {self.step + 1}, which had moved weights and is lost; the same command goes on from {self.saved or 'the start'}"
        if not self.step:
            return NOTHING_NEW
        if self.saved != self._describe_saved():
            self.save()
        return f"stopped after step {self.step}; the same command goes on from {self.root / self.saved}"

    def _describe_saved(self) -> str:
        return f"step_{self.step:06d}"
