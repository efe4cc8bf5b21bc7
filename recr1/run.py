"""What every run does around its loop: open the folder, build the parts from the config, log,
evaluate, leave the results.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Iterator, NoReturn

import numpy as np
import torch
from tqdm import tqdm

from . import (
    config_file as configs,
    dist,
    draws,
    evaluate,
    heartbeat,
    memory,
    plan,
    report,
    stopping,
    versions,
)
from .cache import slots
from .chat import Chat, ChatError
from .checkpoint import compute_type, load_policy, load_reference, save_policy
from .config import Config, ConfigError
from .console import show
from .data import DataError
from .exits import end_process
from .files import WriteError, write_text, writing
from .grpo import objective
from .hub import ModelFolderError, load_tokenizer, resolve, stop_ids
from .kernels.launch import refusal
from .log import RunLog, Step, console_line, say
from .named import OwnError
from .optim import NonFiniteGradient, Optimizer
from .records import Batch, Prompt
from .replay import Replay, ReplayError
from .resume import Progress, RunError, look
from .retrieval.base import NoRetriever, Retriever, RetrieverError
from .retrieval.make import KEPT, directory_of, make
from .session import patience, session
from .splits import read_splits
from .stopping import EARLY, Stopped, at_once
from .tasks import make as tasks
from .tasks.rewards import Parts, read_items
from .tasks.scoring import Scorer
from .terminal import plain
from .track import Tracker
from .weights import check_room, read_config


class Run:
    """One training run: `policy`, `task`, `prompts(step)`, `steps()`, and the files under run.dir.
    Everything is checked before training.

    run.dir is new, or holds a run of the same config, which goes on from its newest checkpoint: see
    `resumed`. `loop`: train (GRPO) or sft.
    """

    def __init__(self, cfg: Config, loop: str = "train"):
        configs.check_loop(cfg, loop)
        self.cfg = cfg
        self.loop = loop
        self.started = time.perf_counter()
        self.last = cfg.train.steps
        self.threads = cfg.run.threads or max(1, (os.cpu_count() or 1) // dist.local_world())
        torch.set_num_threads(self.threads)
        if dist.device().type == "cpu":
            memory.keep_pages()
        self.folder = Path(cfg.run.dir)
        with dist.together(), at_once():
            found = look(self.folder, cfg) if dist.rank() == 0 else False
            if dist.local_rank() == 0:
                resolve(cfg.model.path)  # a hub id: one rank of a machine downloads
                if cfg.retriever.encoder:
                    resolve(cfg.retriever.encoder, "retriever.encoder")
        with dist.together(), at_once():
            model = resolve(cfg.model.path)
            self.tokenizer = load_tokenizer(model)
            self.stops = stop_ids(model, self.tokenizer)
            self.task = tasks.make(cfg)
            self.chat = Chat(
                self.tokenizer,
                cfg.prompt.system,
                cfg.prompt.user,
                cfg.prompt.assistant,
                self.task.places,
            )
            self.train, self.validation, self.test, self.qrels = read_splits(
                cfg, self.chat, self.task
            )
            items = read_items(cfg)
            train_parts = Parts(cfg.reward, cfg.reward.k_train, items)
            eval_parts = Parts(cfg.reward, cfg.reward.k_eval, items, every=True)
            check_room(cfg, read_config(model).max_position_embeddings)
            compute = compute_type(cfg.model.compute)
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
            self.slot = (
                2
                * self.policy.config.num_hidden_layers
                * self.policy.config.num_key_value_heads
                * self.policy.config.head_dim
                * compute.itemsize
            )
            if (room := self.room()) is not None and room < (
                one := slots(cfg.prompt.max_tokens + cfg.sampling.max_new_tokens)
            ):
                raise ConfigError(
                    f"sampling.cache_gib: {room * self.slot / 2**30:.2g} GiB do not hold one text, which takes {one * self.slot / 2**30:.2g}"
                )
            self.replay = (
                Replay(cfg.train.replay, cfg.sampling.group_size) if cfg.train.replay else None
            )
            loss = objective(cfg.loss, cfg.model)
            if why := refusal(cfg.model.kernels, dist.device()):
                raise ConfigError(why)
            self.make_retriever = make(cfg.retriever) if self.task.searches else NoRetriever.make
        self.found = dist.first(found)  # a run of this config
        with dist.together(), at_once():
            if dist.rank() == 0:
                with writing(self.folder):
                    self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self.folder / "config.yaml", configs.dump(cfg))
                self._open_heartbeat()
            self.tracker = Tracker(cfg, self.folder)
        with dist.together(), at_once():
            if dist.rank() > 0:
                self._open_heartbeat()
            if dist.local_rank() == 0 and cfg.retriever.kind in KEPT:
                self._retriever()
        with dist.together(), at_once():
            # its index was built above, on this rank or beside it
            self.retriever, dropped = self._retriever()
        if dropped:
            say(f"recr1: {dropped}")
        # rewards are made beside sampling: see overlap.py
        self.overlaps = dist.device().type != "cpu" or ":" in cfg.retriever.kind
        self.log = RunLog(self.folder, loop)
        patience(cfg.run.patience)
        self.train_task, self.eval_task = self._scorer(train_parts), self._scorer(eval_parts)
        learns = (
            f"loss {cfg.loss.kind} ({loss.gain.__name__}, {loss.advantage.__name__}, per {loss.average})"
            if loop == "train"
            else "SFT"
        )
        say(
            f"recr1: {self.policy.size:,} parameters in {str(compute).removeprefix('torch.')}, {dist.world()} x {dist.device().type}, {self.threads} threads each, "
            f"attention {self.policy.backend}, {learns}, "
            f"head {cfg.model.head}, kernels {cfg.model.kernels}{' (group_loss)' if loss.fused else ''}, {len(self.retriever.doc_ids)} documents, "
            f"retriever {self.retriever.how}{', beside sampling' if self.overlaps and loop == 'train' else ''}, "
            f"queries: {len(self.train)} train, {len(self.validation)} validation, {len(self.test)} test"
        )
        if loop == "train" and cfg.sampling.top_p < 1:
            say(f"recr1: {BIASED.format(cfg.sampling.top_p)}")
        self.footprint = plan.Footprint(
            cfg, self.policy.config, dist.world(), gpu=dist.device().type == "cuda"
        )
        if loop == "train":  # the footprint is GRPO's
            say(plan.announcement(self.footprint, memory.installed()))

    def _open_heartbeat(self) -> None:
        with writing(self.folder):
            heartbeat.start(self.folder / "heartbeats", dist.rank(), dist.world())

    def _retriever(self) -> tuple[Retriever, str]:
        try:
            return self.make_retriever(
                self.cfg.data.corpus,
                self.cfg.data.on_bad_line,
                directory_of(self.cfg.retriever, self.folder),
                say,
            )
        except EXPECTED:
            raise
        except (ValueError, OSError) as e:
            raise RunError(f"retriever: {e}") from None

    def _scorer(self, parts: Parts) -> Scorer:
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
    def resumed(self, optimizer: Optimizer):
        """Goes on from the newest valid checkpoint of run.dir. Asked to stop inside, or when the
        retriever, a task or a reward of a user's own fails, all ranks save the state after the last
        finished step and leave.
        """
        self.progress = Progress(
            self.cfg,
            self.last,
            self.started,
            self.policy,
            optimizer,
            self.log,
            self.tokenizer,
            self.stops,
        )
        self.progress.resume(self.found)
        with dist.together():
            if dist.rank() == 0:
                versions.note(self.folder)
        try:
            if self.progress.row is not None:
                self._conclude()  # stopped in its validation
            yield
        except Stopped:
            raise Stopped(self._leave()) from None
        except (RetrieverError, OwnError) as e:
            raise type(e)(f"{e}; {self._leave()}") from None

    def _leave(self) -> str:
        said = self.progress.leave()
        self.tracker.close()  # last: a tracker may take its time
        return said

    def meet(self) -> None:
        """Between collectives: when one rank was asked to stop, all do (Stopped). A step that has
        moved weights is first finished, if that is soon.
        """
        if dist.largest(stopping.asked()) > self.progress.moved():
            raise Stopped(EARLY)

    def update(self, step: int, batches: list[Batch], done: Step) -> tuple[float, float]:
        """The optimiser's step on the gradient of `batches`: its norm and the learning rate.

        Where a loss or the gradient is not finite on any rank, no weight moves on any and all
        ranks' batches are kept. Raises NonFiniteGradient.
        """
        heartbeat.at("step")
        losses = [s["loss"] for s in done.sums[len(done.sums) - len(batches) :]]
        stop = None
        try:
            norm, lr = self.progress.optimizer.step(sum(losses))
        except NonFiniteGradient as e:
            norm = math.nan
            lr = 0.0
            stop = str(e)
        if math.isfinite(norm):
            self.progress.skips = 0
            return norm, lr
        self.progress.skips += 1
        where = self.log.nonfinite(step, batches, losses, done.named())
        if stop:
            raise NonFiniteGradient(f"{stop}; {where}")
        if self.progress.skips >= self.cfg.optimizer.max_skips:
            raise NonFiniteGradient(
                f"step {step}: {self.progress.skips} optimiser steps in a row were not finite and skipped (optimizer.max_skips); {where}"
            )
        say(
            f"recr1: step {step}: the loss or gradient is not finite, no weight was changed; {where}"
        )
        return norm, lr

    def steps(self) -> Iterator[int]:
        """Numbers of the steps to be done, from 1, behind a progress bar on a terminal."""
        for step in tqdm(
            range(self.progress.step + 1, self.last + 1),
            self.loop,
            self.last,
            initial=self.progress.step,
            disable=None if dist.rank() == 0 else True,
        ):
            self.began = time.perf_counter()
            heartbeat.at("gather", step)
            yield step

    def prompts(self, step: int, turn: int = 0) -> list[Prompt]:
        """This rank's share of a step's P prompts: a function of (seed, step, turn), some with
        their words shuffled when the config says so.
        """
        seed = self.cfg.run.seed
        share = self.cfg.data.shuffle_words
        order = draws.prompt_order(
            len(self.train),
            self.cfg.train.prompts_per_step,
            seed,
            step - 1,
            turn,
            1 + self.cfg.sampling.resample,
        )
        chosen = [self.train[i] for i in dist.share(order.tolist())]
        if not share:
            return chosen
        texts = [draws.shuffle_words(p.text, share, seed, step, p.index) for p in chosen]
        return [
            p if text == p.text else Prompt(p.id, p.index, text, self.chat.prompt(text), p.row)
            for p, text in zip(chosen, texts)
        ]

    def uniforms(self, step: int, prompts: list[Prompt]) -> np.ndarray:
        """(P, G, T) random numbers, each a function of (seed, step, prompt, sibling, token)."""
        s = self.cfg.sampling
        return draws.uniforms(
            self.cfg.run.seed,
            step,
            np.array([p.index for p in prompts]),
            s.group_size,
            s.max_new_tokens,
        )

    def room(self) -> int | None:
        """Slots that the sampler's cache may come to: sampling.cache_gib, or four fifths of what a
        GPU has free; on a CPU no limit.
        """
        budget = self.cfg.sampling.cache_gib * 2**30 or 0.8 * (memory.free() or 0)
        return int(budget / self.slot) if budget else None

    def keeps_tokens(self, step: int) -> bool:
        """Whether this step's rollouts are logged with their per-token values."""
        return step == 1 or step % self.cfg.log.tokens_every == 0

    def evaluate(self, prompts: list[Prompt]) -> list[dict]:
        """A greedy pass over `prompts`; see evaluate.py."""
        heartbeat.at("eval")
        with self.log.peak("evaluate"):
            return evaluate.evaluate(
                self.policy,
                prompts,
                self.eval_task,
                self.cfg.sampling.max_new_tokens,
                self.footprint.evaluated,
            )

    def test_scores(self, name: str) -> list[dict]:
        """The test split, greedily, kept in the file `name`; rank 0 has the rows. Before and after
        training only: it never chooses anything.
        """
        kept = (
            self._kept(self.folder / name)
            if dist.rank() == 0 and name == "eval_before.jsonl"
            else None
        )
        if dist.first(kept is not None):
            return kept or []
        rows = self.evaluate(self.test)
        with dist.together():
            self.log.rows(name, rows)
        return rows

    def _kept(self, path: Path) -> list[dict] | None:
        """The evaluation that an earlier start of this run has left, if it is whole."""
        try:
            rows = (
                [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
                if self.found
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
        after = evaluate.column(rows, metric)
        raw = evaluate.column(rows, f"{metric}_raw")
        gain, interval = evaluate.mean_ci(after - raw)
        return {f"val_{metric}": float(after.mean())} | dict(
            val_raw=float(raw.mean()),
            val_gain=gain,
            val_gain_ci95=interval,
            val_errors=sum(row["error"] is not None for row in rows),
        )

    def record(self, step: int, mine: Step, **more) -> None:
        """Writes a step of all ranks: rollouts, metrics with the validation when its turn has come,
        the console line, a checkpoint when its has.
        """
        heartbeat.at("log")
        parts = dist.gather(mine)
        # validation and writing are not the step's
        self.log.seconds["step"] = time.perf_counter() - self.began
        with dist.together():
            row = {}
            if parts is not None:
                done, *others = parts
                for other in others:
                    done.merge(other)
                row = done.logged(step, self.log, self.cfg, **more)
        self.progress.finished(step, row)
        self._conclude()
        if parts is not None and self.loop == "train":
            show(step, done, self.cfg)
        self.meet()
        self.progress.save_if_due()

    def _conclude(self) -> None:
        """The last step's validation, its line in metrics.jsonl and on the console."""
        step = self.progress.step
        row = self.progress.row | (validation := self.validate(step))
        heartbeat.at("log")
        with dist.together():
            if dist.rank() == 0:
                self.log.metrics(row)
                self.tracker.send(row)
                self.progress.validated(validation.get(f"val_{self.cfg.reward.metric}"))
        self.progress.row = None
        if dist.rank() == 0 and (
            validation or step % self.cfg.log.print_every == 0 or step in (1, self.last)
        ):
            say(console_line(row, self.last))

    def finish(self, before: list[dict], after: list[dict], **more) -> None:
        """The model, summary.json (`more` is SFT's part of it), the table a user reads, and the
        report.
        """
        heartbeat.at("save")
        save_policy(
            self.policy,
            self.tokenizer,
            self.stops,
            self.folder / "model",
            configs.answering(self.cfg),
        )
        with dist.together():
            if dist.rank() == 0:
                self._sum_up(before, after, more)
        if dist.rank() == 0:
            say(report.at_end(self.folder, self.retriever, self.tokenizer))
        self.tracker.close()

    def _sum_up(self, before: list[dict], after: list[dict], more: dict) -> None:
        metric = self.cfg.reward.metric
        k = self.cfg.reward.k_eval
        parts = {name: evaluate.compared(before, after, name) for name in evaluate.parts_of(after)}
        self.log.json(
            "summary.json",
            dict(
                task=self.cfg.task,
                retriever=self.cfg.retriever.kind if self.task.searches else None,
                metric=f"{metric}@{k}",
                n_eval=len(after),
                **parts[metric],
                parts=parts,
                unparsable_before=sum(row["error"] is not None for row in before),
                unparsable_after=sum(row["error"] is not None for row in after),
                **(
                    dict(biased=BIASED.format(self.cfg.sampling.top_p))
                    if self.loop == "train" and self.cfg.sampling.top_p < 1
                    else {}
                ),
                seed=self.cfg.run.seed,
                steps=self.last,
                world_size=dist.world(),
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
                    predicted=plan.by_run_phase(self.footprint) if self.loop == "train" else None,
                    measured=self.log.peaks,
                    of=self.log.peaks_of,
                ),
            ),
        )
        say(
            f"\n{evaluate.table(before, after, metric, k, parts)}\n\nanswers on test:\n{evaluate.examples(after, metric)}\n\n"
            f"{self.folder}/: model/ (Hugging Face folder), summary.json, eval_before.jsonl, eval_after.jsonl, "
            f"metrics.jsonl, {'rollouts.jsonl.gz' if self.loop == 'train' else 'teacher.jsonl'}, "
            f"config.yaml, versions.json{', checkpoints/' if self.progress.saved else ''}"
        )


BIASED = "sampling.top_p = {} samples from a truncated distribution and trains the whole one: the gradient is biased (1 is not)"
EXPECTED = (
    ConfigError,
    DataError,
    ChatError,
    ModelFolderError,
    ReplayError,
    RunError,
    NonFiniteGradient,
    WriteError,
    RetrieverError,
    heartbeat.Busy,
)
RANK_LOST = 3


def run_command(main, argv: list[str]) -> NoReturn:
    """Runs main(argv) as `guarded` does and ends the process with its exit code: the last line of
    every program that is started by its own name.
    """
    end_process(lambda: guarded(main, argv))


def guarded(main, argv: list[str]) -> int:
    """Runs main(argv) on every rank; what a user can mend is one line on stderr and exit code 2,
    never a traceback. Asked to stop: 0.

    3, with one line of one of the others, when a rank is gone or hangs: torchrun --max-restarts
    then starts all of them anew.
    """
    first = os.environ.get("RANK", "0") == "0"
    try:
        with session():
            try:
                main(argv)
            except Stopped as e:
                say(f"recr1: {e}")
        return 0
    except EXPECTED as e:  # on all ranks at once: see dist.together
        if first:
            print(f"recr1: {plain(str(e))}", file=sys.stderr)
        return 2
    except heartbeat.RankLost as e:
        if str(e):
            print(f"recr1: {plain(str(e))}", file=sys.stderr)
        return RANK_LOST
    finally:
        heartbeat.stop()
