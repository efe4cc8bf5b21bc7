"""What every run does around its loop: open the folder, build the parts from the config, log,
evaluate, leave the results.
"""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from tqdm import tqdm

from recr1 import report
from recr1.config import loader as configs
from recr1.config.plugins import PluginError
from recr1.config.schema import Config, ConfigError
from recr1.data import prompt_order
from recr1.data.chat_template import ChatTemplate
from recr1.data_types import MicroBatch, Prompt
from recr1.distributed import collectives as dist, heartbeat
from recr1.distributed.printing import print_rank0
from recr1.distributed.process_group import set_collective_timeout
from recr1.evaluation import evaluate
from recr1.kernels.availability import explain_unavailable
from recr1.memory import measure as memory, plan
from recr1.model.hf_config import read_config
from recr1.retrieval.factory import RETRIEVERS_WITH_INDEX, build_retriever, get_index_dir
from recr1.retrieval.interface import NoRetriever, Retriever, RetrieverError
from recr1.rl.losses import resolve_objective
from recr1.rl.replay import Replay
from recr1.sampling.kv_cache import count_slots
from recr1.tasks import registry as tasks
from recr1.tasks.prompts import load_prompts
from recr1.tasks.rewards import RewardTerms, read_item_table
from recr1.tasks.scorer import Scorer
from recr1.tracking import versions
from recr1.tracking.console import format_console_line, show_step
from recr1.tracking.run_log import RunLog
from recr1.tracking.step_metrics import StepRecord
from recr1.tracking.trackers import Tracker
from recr1.training.checks import check_lengths
from recr1.training.launch import EXPECTED_ERRORS
from recr1.training.load_model import (
    load_policy,
    load_reference,
    resolve_compute_dtype,
    save_policy,
)
from recr1.training.optimizer import NonFiniteGradient, Optimizer
from recr1.training.progress import TrainState
from recr1.training.run_dir import RunError, claim_run_dir
from recr1.utils import counter_rng, interrupts
from recr1.utils.files import report_write_errors, write_text
from recr1.utils.hf_hub import load_tokenizer, read_stop_token_ids, resolve_model_folder
from recr1.utils.interrupts import NOTHING_NEW, Stopped, raise_on_signal


class Run:
    """One training run: `policy`, `task`, `prompts(step)`, `steps()`, and the files under run.dir.
    Everything is checked before training.

    run.dir is new, or holds a run of the same config, which goes on from its newest checkpoint: see
    `resumed`. `loop`: train (GRPO) or sft.
    """

    def __init__(self, cfg: Config, loop: str = "train"):
        configs.check_settings_used(cfg, loop)
        self.cfg = cfg
        self.loop = loop
        self.started = time.perf_counter()
        self.num_steps = cfg.train.steps
        self.threads = cfg.run.threads or max(1, (os.cpu_count() or 1) // dist.local_world_size())
        torch.set_num_threads(self.threads)
        if dist.device().type == "cpu":
            memory.keep_freed_pages()
        self.folder = Path(cfg.run.dir)
        with dist.fail_together(), raise_on_signal():
            found = claim_run_dir(self.folder, cfg) if dist.rank() == 0 else False
            if dist.local_rank() == 0:
                resolve_model_folder(cfg.model.path)  # a hub id: one rank of a machine downloads
                if cfg.retriever.encoder:
                    resolve_model_folder(cfg.retriever.encoder, "retriever.encoder")
        with dist.fail_together(), raise_on_signal():
            model = resolve_model_folder(cfg.model.path)
            self.tokenizer = load_tokenizer(model)
            self.stops = read_stop_token_ids(model, self.tokenizer)
            self.task = tasks.build_task(cfg)
            self.chat = ChatTemplate(
                self.tokenizer,
                cfg.prompt.system,
                cfg.prompt.user,
                cfg.prompt.assistant,
                self.task.placeholders,
            )
            self.train, self.validation, self.test, self.qrels = load_prompts(
                cfg, self.chat, self.task
            )
            items = read_item_table(cfg)
            train_parts = RewardTerms(cfg.reward, cfg.reward.k_train, items)
            eval_parts = RewardTerms(cfg.reward, cfg.reward.k_eval, items, every=True)
            check_lengths(cfg, read_config(model).max_position_embeddings)
            compute = resolve_compute_dtype(cfg.model.compute)
            how = cfg.model.attention, cfg.model.batch_invariant, cfg.model.head_float32
            self.policy = load_policy(
                model, len(self.tokenizer), compute, cfg.train.checkpointing, cfg.train.frozen, *how
            )
            self.reference = (
                load_reference(
                    model, len(self.tokenizer), compute, cfg.loss.reference_on_host, *how
                )
                if cfg.loss.kl > 0
                else None
            )
            self.slot_bytes = (
                2
                * self.policy.config.num_hidden_layers
                * self.policy.config.num_key_value_heads
                * self.policy.config.head_dim
                * compute.itemsize
            )
            if (room := self.get_kv_cache_budget()) is not None and room < (
                one := count_slots(cfg.prompt.max_tokens + cfg.sampling.max_new_tokens)
            ):
                raise ConfigError(
                    f"sampling.cache_gib: {room * self.slot_bytes / 2**30:.2g} GiB do not hold one text, which takes {one * self.slot_bytes / 2**30:.2g}"
                )
            self.replay = (
                Replay(cfg.train.replay, cfg.sampling.group_size) if cfg.train.replay else None
            )
            loss = resolve_objective(cfg.loss, cfg.model)
            if why := explain_unavailable(cfg.model.kernels, dist.device()):
                raise ConfigError(why)
            self.make_retriever = (
                build_retriever(cfg.retriever) if self.task.uses_retriever else NoRetriever.make
            )
        self.is_resumed = dist.broadcast_from_rank0(found)  # a run of this config
        with dist.fail_together(), raise_on_signal():
            if dist.rank() == 0:
                with report_write_errors(self.folder):
                    self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self.folder / "config.yaml", configs.dump_config(cfg))
                self._open_heartbeat()
            self.tracker = Tracker(cfg, self.folder)
        with dist.fail_together(), raise_on_signal():
            if dist.rank() > 0:
                self._open_heartbeat()
            if dist.local_rank() == 0 and cfg.retriever.kind in RETRIEVERS_WITH_INDEX:
                self._open_retriever()
        with dist.fail_together(), raise_on_signal():
            # its index was built above, on this rank or beside it
            self.retriever, dropped = self._open_retriever()
        if dropped:
            print_rank0(f"recr1: {dropped}")
        # rewards are made beside sampling: see rl/async_rewards.py
        self.scores_async = dist.device().type != "cpu" or ":" in cfg.retriever.kind
        self.log = RunLog(self.folder, loop)
        set_collective_timeout(cfg.run.patience)
        self.train_scorer, self.eval_scorer = (
            self._build_scorer(train_parts),
            self._build_scorer(eval_parts),
        )
        learns = (
            f"loss {cfg.loss.kind} ({loss.surrogate.__name__}, {loss.advantage.__name__}, per {loss.agg_mode})"
            if loop == "train"
            else "SFT"
        )
        print_rank0(
            f"recr1: {self.policy.size:,} parameters in {str(compute).removeprefix('torch.')}, {dist.world_size()} x {dist.device().type}, {self.threads} threads each, "
            f"attention {self.policy.backend}, {learns}, "
            f"head {cfg.model.head}, kernels {cfg.model.kernels}{' (group_loss)' if loss.fused else ''}, {len(self.retriever.doc_ids)} documents, "
            f"retriever {self.retriever.description}{', beside sampling' if self.scores_async and loop == 'train' else ''}, "
            f"queries: {len(self.train)} train, {len(self.validation)} validation, {len(self.test)} test"
        )
        if loop == "train" and cfg.sampling.top_p < 1:
            print_rank0(f"recr1: {BIASED_BY_TOP_P.format(cfg.sampling.top_p)}")
        self.footprint = plan.Footprint(
            cfg, self.policy.config, dist.world_size(), gpu=dist.device().type == "cuda"
        )
        if loop == "train":  # the footprint is GRPO's
            print_rank0(plan.format_announcement(self.footprint, memory.get_installed_bytes()))

    def _open_heartbeat(self) -> None:
        with report_write_errors(self.folder):
            heartbeat.start_heartbeat(self.folder / "heartbeats", dist.rank(), dist.world_size())

    def _open_retriever(self) -> tuple[Retriever, str]:
        try:
            return self.make_retriever(
                self.cfg.data.corpus,
                self.cfg.data.on_bad_line,
                get_index_dir(self.cfg.retriever, self.folder),
                print_rank0,
            )
        except EXPECTED_ERRORS:
            raise
        except (ValueError, OSError) as e:
            raise RunError(f"retriever: {e}") from None

    def _build_scorer(self, parts: RewardTerms) -> Scorer:
        # as sampled: Llama's would drop spaces
        decode = partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
        return Scorer(
            self.task,
            self.retriever,
            self.qrels,
            parts,
            decode,
            self.stops,
            self.cfg.sampling.max_new_tokens,
            self.chat.thought_closed,
        )

    @contextmanager
    def resume_or_start(self, optimizer: Optimizer):
        """Goes on from the newest valid checkpoint of run.dir. Asked to stop inside, or when the
        retriever, a task or a reward of a user's own fails, all ranks save the state after the last
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
                self._log_and_validate()  # stopped in its validation
            yield
        except Stopped:
            raise Stopped(self._save_and_stop()) from None
        except (RetrieverError, PluginError) as e:
            raise type(e)(f"{e}; {self._save_and_stop()}") from None

    def _save_and_stop(self) -> str:
        said = self.progress.save_and_describe()
        self.tracker.close()  # last: a tracker may take its time
        return said

    def stop_if_asked(self) -> None:
        """Between collectives: when one rank was asked to stop, all do (Stopped). A step that has
        moved weights is first finished, if that is soon.
        """
        if dist.all_reduce_max(interrupts.stop_requested()) > self.progress.is_mid_step():
            raise Stopped(NOTHING_NEW)

    def optimizer_step(
        self, step: int, batches: list[MicroBatch], done: StepRecord
    ) -> tuple[float, float]:
        """The optimiser's step on the gradient of `batches`: its norm and the learning rate.

        Where a loss or the gradient is not finite on any rank, no weight moves on any and all
        ranks' batches are kept. Raises NonFiniteGradient.
        """
        heartbeat.enter_phase("step")
        losses = [s["loss"] for s in done.sums[len(done.sums) - len(batches) :]]
        stop = None
        try:
            norm, lr = self.progress.optimizer.step(sum(losses))
        except NonFiniteGradient as e:
            norm = math.nan
            lr = 0.0
            stop = str(e)
        if math.isfinite(norm):
            self.progress.num_skipped_in_a_row = 0
            return norm, lr
        self.progress.num_skipped_in_a_row += 1
        where = self.log.keep_nonfinite(step, batches, losses, done.named())
        if stop:
            raise NonFiniteGradient(f"{stop}; {where}")
        if self.progress.num_skipped_in_a_row >= self.cfg.optimizer.max_skips:
            raise NonFiniteGradient(
                f"step {step}: {self.progress.num_skipped_in_a_row} optimiser steps in a row were not finite and skipped (optimizer.max_skips); {where}"
            )
        print_rank0(
            f"recr1: step {step}: the loss or gradient is not finite, no weight was changed; {where}"
        )
        return norm, lr

    def steps(self) -> Iterator[int]:
        """Numbers of the steps to be done, from 1, behind a progress bar on a terminal."""
        for step in tqdm(
            range(self.progress.step + 1, self.num_steps + 1),
            self.loop,
            self.num_steps,
            initial=self.progress.step,
            disable=None if dist.rank() == 0 else True,
        ):
            self.step_start = time.perf_counter()
            heartbeat.enter_phase("gather", step)
            yield step

    def prompts(self, step: int, turn: int = 0) -> list[Prompt]:
        """This rank's share of a step's P prompts: a function of (seed, step, turn), some with
        their words shuffled when the config says so.
        """
        seed = self.cfg.run.seed
        share = self.cfg.data.shuffle_words
        order = prompt_order.choose_prompts(
            len(self.train),
            self.cfg.train.prompts_per_step,
            seed,
            step - 1,
            turn,
            1 + self.cfg.sampling.resample,
        )
        chosen = [self.train[i] for i in dist.split_across_ranks(order.tolist())]
        if not share:
            return chosen
        texts = [prompt_order.shuffle_words(p.text, share, seed, step, p.index) for p in chosen]
        return [
            p if text == p.text else Prompt(p.id, p.index, text, self.chat.prompt(text), p.row)
            for p, text in zip(chosen, texts)
        ]

    def draw_uniforms(self, step: int, prompts: list[Prompt]) -> np.ndarray:
        """(P, G, T) random numbers, each a function of (seed, step, prompt, sibling, token)."""
        s = self.cfg.sampling
        return counter_rng.draw_uniforms(
            self.cfg.run.seed,
            step,
            np.array([p.index for p in prompts]),
            s.group_size,
            s.max_new_tokens,
        )

    def get_kv_cache_budget(self) -> int | None:
        """Slots that the sampler's cache may come to: sampling.cache_gib, or four fifths of what a
        GPU has free; on a CPU no limit.
        """
        budget = self.cfg.sampling.cache_gib * 2**30 or 0.8 * (memory.get_free_bytes() or 0)
        return int(budget / self.slot_bytes) if budget else None

    def logs_tokens(self, step: int) -> bool:
        """Whether this step's rollouts are logged with their per-token values."""
        return step == 1 or step % self.cfg.log.tokens_every == 0

    def evaluate(self, prompts: list[Prompt]) -> list[dict]:
        """A greedy pass over `prompts`; see evaluate.py."""
        heartbeat.enter_phase("eval")
        with self.log.track_peak("evaluate"):
            return evaluate.evaluate_prompts(
                self.policy,
                prompts,
                self.eval_scorer,
                self.cfg.sampling.max_new_tokens,
                self.footprint.evaluated,
            )

    def evaluate_test(self, name: str) -> list[dict]:
        """The test split, greedily, kept in the file `name`; rank 0 has the rows. Before and after
        training only: it never chooses anything.
        """
        kept = (
            self._read_earlier_evaluation(self.folder / name)
            if dist.rank() == 0 and name == "eval_before.jsonl"
            else None
        )
        if dist.broadcast_from_rank0(kept is not None):
            return kept or []
        rows = self.evaluate(self.test)
        with dist.fail_together():
            self.log.write_rows(name, rows)
        return rows

    def _read_earlier_evaluation(self, path: Path) -> list[dict] | None:
        """The evaluation that an earlier start of this run has left, if it is whole."""
        try:
            rows = (
                [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
                if self.is_resumed
                else []
            )
            return rows if [row["id"] for row in rows] == [p.id for p in self.test] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def validate(self, step: int) -> dict[str, float]:
        """At every `eval_every`-th step: reward.metric on validation and its gain over the raw
        answer, with the interval.
        """
        every = self.cfg.train.eval_every
        metric = self.cfg.reward.metric
        if not every or step % every:
            return {}
        rows = self.evaluate(self.validation[: self.cfg.train.eval_queries or None])
        if not rows:
            return {}  # rank 0 has them
        after = evaluate.get_column(rows, metric)
        raw = evaluate.get_column(rows, f"{metric}_raw")
        gain, interval = evaluate.compute_mean_ci(after - raw)
        return {f"val_{metric}": float(after.mean())} | dict(
            val_raw=float(raw.mean()),
            val_gain=gain,
            val_gain_ci95=interval,
            val_errors=sum(row["error"] is not None for row in rows),
        )

    def finish_step(self, step: int, mine: StepRecord, **more) -> None:
        """Writes a step of all ranks: rollouts, metrics with the validation when its turn has come,
        the console line, a checkpoint when its has.
        """
        heartbeat.enter_phase("log")
        parts = dist.gather_to_rank0(mine)
        # validation and writing are not the step's
        self.log.seconds["step"] = time.perf_counter() - self.step_start
        with dist.fail_together():
            row = {}
            if parts is not None:
                done, *others = parts
                for other in others:
                    done.merge(other)
                row = done.logged(step, self.log, self.cfg, **more)
        self.progress.mark_finished(step, row)
        self._log_and_validate()
        if parts is not None and self.loop == "train":
            show_step(step, done, self.cfg)
        self.stop_if_asked()
        self.progress.save_if_due()

    def _log_and_validate(self) -> None:
        """The last step's validation, its line in metrics.jsonl and on the console."""
        step = self.progress.step
        row = self.progress.row | (validation := self.validate(step))
        heartbeat.enter_phase("log")
        with dist.fail_together():
            if dist.rank() == 0:
                self.log.write_metrics(row)
                self.tracker.send(row)
                self.progress.mark_validated(validation.get(f"val_{self.cfg.reward.metric}"))
        self.progress.row = None
        if dist.rank() == 0 and (
            validation or step % self.cfg.log.print_every == 0 or step in (1, self.num_steps)
        ):
            print_rank0(format_console_line(row, self.num_steps))

    def write_results(self, before: list[dict], after: list[dict], **more) -> None:
        """The model, summary.json (`more` is SFT's part of it), the table a user reads, and the
        report.
        """
        heartbeat.enter_phase("save")
        save_policy(
            self.policy,
            self.tokenizer,
            self.stops,
            self.folder / "model",
            configs.dump_answering_config(self.cfg),
        )
        with dist.fail_together():
            if dist.rank() == 0:
                self._write_summary(before, after, more)
        if dist.rank() == 0:
            print_rank0(report.write_report_at_end(self.folder, self.retriever, self.tokenizer))
        self.tracker.close()

    def _write_summary(self, before: list[dict], after: list[dict], more: dict) -> None:
        metric = self.cfg.reward.metric
        k = self.cfg.reward.k_eval
        parts = {
            name: evaluate.compare_evaluations(before, after, name)
            for name in evaluate.list_metrics(after)
        }
        self.log.write_json(
            "summary.json",
            dict(
                task=self.cfg.task,
                retriever=self.cfg.retriever.kind if self.task.uses_retriever else None,
                metric=f"{metric}@{k}",
                n_eval=len(after),
                **parts[metric],
                parts=parts,
                unparsable_before=sum(row["error"] is not None for row in before),
                unparsable_after=sum(row["error"] is not None for row in after),
                **(
                    dict(biased=BIASED_BY_TOP_P.format(self.cfg.sampling.top_p))
                    if self.loop == "train" and self.cfg.sampling.top_p < 1
                    else {}
                ),
                seed=self.cfg.run.seed,
                steps=self.num_steps,
                world_size=dist.world_size(),
                threads=self.threads,
                wall_s=time.perf_counter() - self.progress.started,
                **(
                    more
                    or dict(
                        rollout_tokens_per_s=self.log.sampled / self.log.sampling_s
                        if self.log.sampling_s
                        else None,
                        **self.log.run_gaps.figures(),
                    )
                ),
                memory=dict(
                    predicted=plan.predict_by_run_phase(self.footprint)
                    if self.loop == "train"
                    else None,
                    measured=self.log.peaks,
                    of=self.log.peaks_of,
                ),
            ),
        )
        print_rank0(
            f"\n{evaluate.format_table(before, after, metric, k, parts)}\n\nanswers on test:\n{evaluate.format_examples(after, metric)}\n\n"
            f"{self.folder}/: model/ (Hugging Face folder), summary.json, eval_before.jsonl, eval_after.jsonl, "
            f"metrics.jsonl, {'rollouts.jsonl.gz' if self.loop == 'train' else 'teacher.jsonl'}, "
            f"config.yaml, versions.json{', checkpoints/' if self.progress.saved else ''}"
        )


BIASED_BY_TOP_P = "sampling.top_p = {} samples from a truncated distribution and trains the whole one: the gradient is biased (1 is not)"
