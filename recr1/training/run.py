"""A training run, as a loop sees it: steps, prompts, updates, logs and results.

`setup_run` (training/setup.py) builds it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from recr1 import report
from recr1.config import loader as configs
from recr1.config.plugins import PluginError
from recr1.config.schema import Config
from recr1.data import prompt_order
from recr1.data.chat_template import ChatTemplate
from recr1.data_types import MicroBatch, Prompt
from recr1.distributed import collectives as dist, heartbeat
from recr1.distributed.fsdp import Sharded, unsharded
from recr1.distributed.printing import print_rank0
from recr1.memory import measure as memory, plan
from recr1.memory.estimate import MemoryEstimate
from recr1.memory.out_of_memory import (
    OutOfMemory,
    describe_allocation,
    is_out_of_memory,
    release_tensors,
)
from recr1.model.decoder import ScoredDecoder
from recr1.retrieval.interface import Retriever, RetrieverError
from recr1.rl.losses import Objective
from recr1.rl.replay import Replay
from recr1.sampling.generate import make_cache
from recr1.sampling.kv_cache import KVCache
from recr1.tasks.registry import Task
from recr1.tasks.rewards import RewardTerms
from recr1.tasks.scorer import Scorer
from recr1.tracking import versions
from recr1.tracking.console import format_console_line, show_step
from recr1.tracking.run_log import RunLog
from recr1.tracking.step_metrics import SftStepRecord, StepRecord
from recr1.tracking.trackers import Tracker
from recr1.training import summary
from recr1.training.checks import compute_kv_cache_budget
from recr1.training.load_model import save_policy
from recr1.training.optimizer import NonFiniteGradient, Optimizer
from recr1.training.progress import TrainState
from recr1.training.validation import Evaluator
from recr1.utils import counter_rng, interrupts
from recr1.utils.interrupts import NOTHING_NEW, Stopped

# makes the retriever of a corpus, and says which of its lines it has left out
RetrieverFactory = Callable[..., tuple[Retriever, str]]


class Dataset(NamedTuple):
    """The prompts of each split, and what is relevant to them."""

    train: list[Prompt]
    validation: list[Prompt]
    test: list[Prompt]
    qrels: dict[str, dict[str, float]]  # query id -> document id -> gain


@dataclass(kw_only=True)
class RunParts:
    """What is built from the config alone, before anything is written."""

    cfg: Config
    tokenizer: Any  # transformers'
    stops: frozenset[int]  # token ids that end a completion
    task: Task
    chat: ChatTemplate
    dataset: Dataset
    train_terms: RewardTerms
    eval_terms: RewardTerms
    compute_dtype: torch.dtype  # of the gathered weights
    policy: Sharded
    reference: ScoredDecoder | None  # the policy before training; None without a KL
    slot_bytes: int  # of the sampler's cache, per token
    replay: Replay | None  # logged rollouts instead of sampling
    objective: Objective
    make_retriever: RetrieverFactory


@dataclass(kw_only=True)
class Run(RunParts):
    """One training run: its parts, built and checked by `setup_run`, and its state.

    run.dir is new, or holds a run of the same config: that one goes on from its newest checkpoint
    (see `resume_or_start`).
    """

    loop: str  # train (GRPO) | sft
    folder: Path  # run.dir
    is_resumed: bool  # the folder held a run of this config
    started: float  # time.perf_counter() at the start
    threads: int  # of each rank
    retriever: Retriever
    scores_async: bool  # rewards are computed beside sampling: see rl/async_rewards.py
    train_scorer: Scorer
    evaluator: Evaluator
    log: RunLog
    tracker: Tracker
    footprint: MemoryEstimate
    num_steps: int

    progress: TrainState = field(init=False)  # from `resume_or_start` on
    step_start: float = field(init=False)

    # --- The run from its start to its end -------------------------------------------------------

    @contextmanager
    def resume_or_start(self, optimizer: Optimizer) -> Iterator[None]:
        """Go on from the newest valid checkpoint of run.dir, or start at step 1.

        When the run is asked to stop inside the block, or the retriever, a task or a reward of a
        user's own fails, or memory runs out on all ranks, they save the state after the last
        finished step and leave.
        """
        self.progress = TrainState(
            self.cfg,
            self.num_steps,
            self.started,
            self.policy,
            optimizer,
            self.log,
            self.tokenizer,
            self.stops,
        )
        self.progress.resume(self.is_resumed)
        with dist.fail_together():
            if dist.rank() == 0:
                versions.record_versions(self.folder)

        try:
            if self.progress.row is not None:
                self._validate_and_log()  # the earlier start was stopped in its validation
            yield
        except Stopped:
            raise Stopped(self._save_and_stop()) from None
        except (RetrieverError, PluginError) as e:
            raise type(e)(f"{e}; {self._save_and_stop()}") from None
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
            raise OutOfMemory(self._explain_out_of_memory(e), dist.is_common_error(e)) from None

    def _explain_out_of_memory(self, error: RuntimeError | MemoryError) -> str:
        """Return where memory has run out, what to set, and what is saved, which is done here.

        Where one rank alone has failed, the others wait for it in a collective: nothing is saved.
        """
        place = f"in {heartbeat.describe_place()}"
        notes = getattr(error, "__notes__", None)
        if notes:  # another rank's error: see collectives.fail_together
            place = f"{notes[0]} while rank {dist.rank()} was {place}"
        if self.loop == "train":
            advice = plan.advise_less_memory(self.footprint, memory.get_installed_bytes())
        else:
            advice = plan.ADVICE_WITHOUT_PLAN
        message = f"out of memory {place}: {describe_allocation(error)}; {advice}"
        if not dist.is_common_error(error):
            saved = self.progress.saved or "the start"
            return f"{message}; this rank alone has failed: the steps after {saved} are lost"
        release_tensors(error)
        return f"{message}; {self._save_and_stop()}"

    def _save_and_stop(self) -> str:
        """Save what is not yet saved. Returns the sentence that says what stands."""
        message = self.progress.save_and_describe()
        self.tracker.close()  # last: a tracker may take its time
        return message

    def stop_if_asked(self) -> None:
        """Raise Stopped on all ranks when one was asked to stop; called between collectives.

        A step that has moved weights is first finished, if that is soon.
        """
        # 0: no. 1: a rank was asked to stop. 2: so long ago that no step can be finished any more.
        stop_requested = dist.all_reduce_max(interrupts.stop_requested())
        if stop_requested > self.progress.is_mid_step():
            raise Stopped(NOTHING_NEW)

    def steps(self) -> Iterator[int]:
        """Yield the numbers of the steps to do, from 1, behind a progress bar on a terminal."""
        first_step = self.progress.step + 1
        numbers = tqdm(
            range(first_step, self.num_steps + 1),
            self.loop,
            self.num_steps,
            initial=self.progress.step,
            disable=None if dist.rank() == 0 else True,
        )
        for step in numbers:
            self.step_start = time.perf_counter()
            heartbeat.enter_phase("gather", step)
            yield step

    # --- Sampling --------------------------------------------------------------------------------

    def prompts(self, step: int, turn: int = 0) -> list[Prompt]:
        """Return this rank's share of a step's P prompts.

        A function of (seed, step, turn). `turn` counts the draws of one step: groups that teach
        nothing may be drawn again (sampling.dynamic_sampling). Some prompts have their words
        shuffled when the config says so.
        """
        order = prompt_order.choose_prompts(
            len(self.dataset.train),
            self.cfg.train.prompts_per_step,
            self.cfg.run.seed,
            step - 1,
            turn,
            1 + self.cfg.sampling.dynamic_sampling,
        )
        local_order = dist.split_across_ranks(order.tolist())
        prompts = [self.dataset.train[index] for index in local_order]
        share = self.cfg.data.shuffle_words
        seed = self.cfg.run.seed
        encode = self.chat.prompt
        return [prompt_order.shuffle_prompt(p, share, seed, step, encode) for p in prompts]

    def draw_uniforms(self, step: int, prompts: list[Prompt]) -> np.ndarray:
        """Draw random numbers (P, G, T), functions of (seed, step, prompt, sibling, token)."""
        prompt_indices = np.array([prompt.index for prompt in prompts])
        return counter_rng.draw_uniforms(
            self.cfg.run.seed,
            step,
            prompt_indices,
            self.cfg.sampling.group_size,
            self.cfg.sampling.max_new_tokens,
        )

    def make_sampling_cache(self) -> KVCache | None:
        """Make the KV cache that the run's sampling uses again and again, on a CPU.

        There fresh pages are dear. On a GPU training needs the room: None, each call makes its own.
        """
        with unsharded(self.policy):
            return make_cache(self.policy) if dist.device().type == "cpu" else None

    def get_kv_cache_budget(self) -> int | None:
        """Return how many slots the sampler's cache may have now; None: no limit."""
        return compute_kv_cache_budget(self.cfg, self.slot_bytes)

    def logs_tokens(self, step: int) -> bool:
        """Return whether this step's rollouts are logged with their per-token values."""
        return step == 1 or step % self.cfg.log.tokens_every == 0

    # --- Training --------------------------------------------------------------------------------

    @property
    def loss_reference(self) -> ScoredDecoder | None:
        """Return the reference where the KL is a part of the loss (loss.kl_in), else None."""
        return self.reference if self.cfg.loss.kl_in == "loss" else None

    @property
    def reward_reference(self) -> ScoredDecoder | None:
        """Return the reference where the KL is taken off the rewards (loss.kl_in), else None."""
        return None if self.cfg.loss.kl_in == "loss" else self.reference

    def iterate_micro_batches(self, micro_batches: list[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield the micro-batches of one optimizer step; a request to stop is met between them.

        With train.gradient_sync = "last_micro_batch" the ranks' gradients are summed in the last
        backward alone.
        """
        count = len(micro_batches)
        for number, micro_batch in enumerate(micro_batches, 1):
            heartbeat.enter_phase(f"train {number}/{count}")
            self.policy.requires_gradient_sync = (
                self.cfg.train.gradient_sync != "last_micro_batch" or number == count
            )
            yield micro_batch
            self.stop_if_asked()

    def optimizer_step(
        self, step: int, micro_batches: list[MicroBatch], record: StepRecord | SftStepRecord
    ) -> tuple[float, float]:
        """Take the optimizer's step on the gradient of `micro_batches`.

        Where a loss or the gradient is not finite on any rank, no weight moves on any of them, and
        every rank keeps its micro-batches in the run's folder.

        Returns:
            The norm of the gradient before clipping, and the learning rate.

        Raises:
            NonFiniteGradient: as optimizer.on_nonfinite and optimizer.max_skips say.
        """
        heartbeat.enter_phase("step")
        first = len(record.stats) - len(micro_batches)
        losses = [stats["loss"] for stats in record.stats[first:]]

        error = None
        try:
            grad_norm, lr = self.progress.optimizer.step(sum(losses))
        except NonFiniteGradient as e:
            grad_norm = math.nan
            lr = 0.0
            error = str(e)

        if math.isfinite(grad_norm):
            self.progress.num_skipped_in_a_row = 0
            return grad_norm, lr

        # Not finite: keep what led to it for who looks for the cause.
        self.progress.num_skipped_in_a_row += 1
        where = self.log.keep_nonfinite(step, micro_batches, losses, record.describe_texts())
        if error:
            raise NonFiniteGradient(f"{error}; {where}")
        self._report_skip(step, where)
        return grad_norm, lr

    def _report_skip(self, step: int, where: str) -> None:
        """Print that the optimizer's step was skipped; raise after optimizer.max_skips in a row."""
        num_skipped = self.progress.num_skipped_in_a_row
        if num_skipped >= self.cfg.optimizer.max_skips:
            raise NonFiniteGradient(
                f"step {step}: {num_skipped} optimizer steps in a row were not finite and skipped "
                f"(optimizer.max_skips); {where}"
            )
        print_rank0(
            f"recr1: step {step}: the loss or gradient is not finite, "
            f"no weight was changed; {where}"
        )

    # --- What a step leaves ----------------------------------------------------------------------

    def finish_step(self, step: int, record: StepRecord | SftStepRecord, **metrics) -> None:
        """Log a step of all ranks, validate and save a checkpoint when it is time.

        Writes the rollouts, then the step's row of metrics.jsonl with its validation, and the
        console line. `metrics` are added to the row.
        """
        heartbeat.enter_phase("log")
        records = dist.gather_to_rank0(record)

        # Rank 0 logs the ranks' records as one. Validation and writing are no part of the step's
        # seconds.
        self.log.seconds["step"] = time.perf_counter() - self.step_start
        with dist.fail_together():
            row = {}
            if records is not None:
                merged, *others = records
                for other in others:
                    merged.merge(other)
                row = merged.write_and_summarize(step, self.log, self.cfg, **metrics)

        # From here on the step stands: a run that is stopped goes on behind it.
        self.progress.mark_finished(step, row)
        self._validate_and_log()
        if records is not None and self.loop == "train":
            show_step(step, merged, self.cfg)
        self.stop_if_asked()
        self.progress.save_if_due()

    def _validate_and_log(self) -> None:
        """Validate the last finished step when it is time, then write and print its metrics."""
        step = self.progress.step
        validation = self.evaluator.validate(step)
        assert self.progress.row is not None  # of the step that has just finished
        row = self.progress.row | validation
        heartbeat.enter_phase("log")
        with dist.fail_together():
            if dist.rank() == 0:
                self.log.write_metrics(row)
                self.tracker.send(row)
                score = validation.get(f"val_{self.cfg.reward.metric}")
                assert not isinstance(score, list)
                self.progress.mark_validated(score)
        self.progress.row = None  # it is written

        is_printed = step % self.cfg.log.print_every == 0 or step in (1, self.num_steps)
        if dist.rank() == 0 and (validation or is_printed):
            print_rank0(format_console_line(row, self.num_steps))

    # --- What the run leaves ---------------------------------------------------------------------

    def evaluate_test(self, name: str) -> list[dict]:
        """Evaluate the test split and write the file `name`; rank 0 gets the rows."""
        return self.evaluator.evaluate_test(name)

    def write_results(self, before: list[dict], after: list[dict], **figures) -> None:
        """Write the model, summary.json and the report; print the table that a user reads.

        before, after: the test split's rows. `figures`: SFT's part of summary.json.
        """
        heartbeat.enter_phase("save")
        recipe = configs.dump_answering_config(self.cfg)
        save_policy(self.policy, self.tokenizer, self.stops, self.folder / "model", recipe)
        with dist.fail_together():
            if dist.rank() == 0:
                self._write_summary(before, after, figures)
        if dist.rank() == 0:
            print_rank0(report.write_report_at_end(self.folder, self.retriever, self.tokenizer))
        self.tracker.close()

    def _write_summary(self, before: list[dict], after: list[dict], figures: dict) -> None:
        """Write summary.json and print its text, rank 0."""
        results = summary.compare_test_results(before, after)
        bias = summary.describe_bias(self.cfg, self.loop)
        self.log.write_json(
            "summary.json",
            dict(
                task=self.cfg.task,
                retriever=self.cfg.retriever.kind if self.task.uses_retriever else None,
                **summary.summarize_test_results(self.cfg, results),
                **(dict(biased=bias) if bias else {}),
                seed=self.cfg.run.seed,
                steps=self.num_steps,
                world_size=dist.world_size(),
                threads=self.threads,
                wall_s=time.perf_counter() - self.progress.started,
                **(figures or self.log.summarize_sampling()),
                memory=self._summarize_memory(),
            ),
        )
        has_checkpoints = bool(self.progress.saved)
        print_rank0(
            summary.format_results(self.cfg, self.loop, results, self.folder, has_checkpoints)
        )

    def _summarize_memory(self) -> dict:
        """Return the predicted and the measured peaks of memory, by phase of the run."""
        # the prediction is GRPO's
        predicted = plan.predict_by_run_phase(self.footprint) if self.loop == "train" else None
        figures = dict(predicted=predicted, measured=self.log.peaks, of=self.log.peaks_of)
        if self.log.reserved_peaks:
            figures |= dict(reserved=self.log.reserved_peaks)
        return figures
