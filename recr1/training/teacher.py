"""The texts that SFT learns: a file's, or the policy's own best of N by the task's reward
(rejection sampling, "self").

Either way RUN/teacher.jsonl keeps them with their scores, one line per text:
    id, text, ids      what is learned: the query, the completion without its end token, its token
                       ids with it
    reward, score, raw the task's reward, its reward.metric@k_train, that of the answer without a
                       policy (the raw query)
    error              why nothing can be learned from it (no answer, or sampling cut it off), else
                       null
    sibling, rewards   self: which of the N samples it is, and the rewards of all
A run that was stopped goes on behind its last line. The file is itself a teacher's file for another
run (sft.teacher=RUN/teacher.jsonl).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from recr1.config import loader as configs
from recr1.config.schema import SftConfig
from recr1.data.readers import DataError, read_rows, read_teacher
from recr1.data_types import Prompt, Reward, Rollout
from recr1.distributed import collectives as dist, heartbeat
from recr1.distributed.fsdp import unsharded
from recr1.distributed.printing import print_rank0
from recr1.sampling.generate import generate
from recr1.sampling.kv_cache import KVCache
from recr1.training.run import Run
from recr1.training.run_dir import RunError
from recr1.utils.files import report_write_errors, sync_to_disk
from recr1.utils.interrupts import Stopped, raise_on_signal

# settings that only a teacher that samples reads
SAMPLED = ("sampling.group_size", "sampling.top_p")


class TeacherText(NamedTuple):
    """A text of the teacher's file."""

    prompt: Prompt
    text: str
    ids: tuple[int, ...]


class SftData(NamedTuple):
    """What SFT learns; the same on all ranks."""

    texts: list[Rollout]  # those that passed the filter
    about_teacher: dict  # for summary.json


# scores a chunk of prompts (self) or of the file's texts: a line of teacher.jsonl for each
ScoreChunk = Callable[[list], list[dict]]


def load_sft_data(run: Run) -> SftData:
    """Make or read the teacher's texts, score them, and choose those that are learned.

    Raises DataError when too few are kept, and what reading the file, sampling and the retriever
    raise.
    """
    sft = run.cfg.sft
    # The teacher: prompts to sample for, or the texts of a file.
    todo: list[Prompt] | list[TeacherText]
    if sft.teacher == "self":
        todo = list(run.dataset.train)
        score_chunk = partial(sample_best_of, run, cache=run.make_sampling_cache())
    else:
        with dist.fail_together(), raise_on_signal():
            todo = read_teacher_file(run)
            score_chunk = partial(score_given, run)
        unused = configs.list_changed_keys(run.cfg, SAMPLED)
        if unused:
            print_rank0(
                "recr1: the teacher is a file: nothing is sampled, "
                f"{', '.join(unused)} are not read"
            )

    # Score them all, and keep those that pass the filter.
    rows = write_rows(run, todo, score_chunk)
    kept_rows = [row for row in rows if passes_filter(row, sft)]
    about_teacher = summarize_teacher(rows, kept_rows, sft)
    print_rank0(format_teacher(run, about_teacher))
    check_enough_texts(run, about_teacher)

    prompts = {prompt.id: prompt for prompt in run.dataset.train}
    texts = []
    for number, row in enumerate(kept_rows):
        texts.append(make_text_rollout(prompts[row["id"]], number, tuple(row["ids"])))
    return SftData(texts, about_teacher)


def make_text_rollout(prompt: Prompt, group: int, ids: tuple[int, ...]) -> Rollout:
    """Make a rollout of a text that no policy of ours has sampled: a group of its own."""
    sampler_logp = (0.0,) * len(ids)
    return Rollout(prompt, group, 0, ids, sampler_logp, True)


def passes_filter(row: dict, sft: SftConfig) -> bool:
    """Return whether a line of teacher.jsonl is learned, by sft.filter and sft.min_score."""
    if row["error"] is not None or row["score"] < sft.min_score:
        return False
    if sft.filter == "no_worse":
        return row["score"] >= row["raw"]
    if sft.filter == "better":
        return row["score"] > row["raw"]
    return True


def summarize_teacher(rows: list[dict], kept_rows: list[dict], sft: SftConfig) -> dict:
    """Return counts and means over the texts; means of none are 0."""
    errors = [row["error"] for row in rows if row["error"]]
    return dict(
        source=sft.teacher,
        texts=len(rows),
        kept=len(kept_rows),
        format_errors=dict(Counter(errors)),
        score=_average(rows, "score"),
        raw=_average(rows, "raw"),
        score_kept=_average(kept_rows, "score"),
        raw_kept=_average(kept_rows, "raw"),
    )


def _average(rows: list[dict], name: str) -> float:
    return float(np.mean([row[name] for row in rows])) if rows else 0.0


def format_teacher(run: Run, about: dict) -> str:
    """Format what `summarize_teacher` has returned as one line of the console."""
    sft = run.cfg.sft
    reward = run.cfg.reward
    errors = about["format_errors"]
    line = (
        f"recr1: teacher {sft.teacher}: {about['texts']} texts, {about['kept']} kept "
        f"(sft.filter={sft.filter}, sft.min_score={sft.min_score:g}), "
        f"{reward.metric}@{reward.k_train} {about['score_kept']:.4f} "
        f"where the raw answer has {about['raw_kept']:.4f}; "
        f"nothing to learn from {sum(errors.values())} {errors or ''}"
    )
    return line.rstrip()


def check_enough_texts(run: Run, about: dict) -> None:
    """Raise DataError unless the texts that are kept fill one step."""
    per_step = run.cfg.train.prompts_per_step
    if about["kept"] >= per_step:
        return
    of_sampling = ""
    if run.cfg.sft.teacher == "self":
        of_sampling = ", sampling.group_size, sampling.temperature"
    raise DataError(
        f"sft.teacher: {about['kept']} of {about['texts']} texts are kept and "
        f"train.prompts_per_step is {per_step}; lower that, "
        f"or keep more (sft.filter, sft.min_score{of_sampling})"
    )


# --- The two teachers -----------------------------------------------------------------------------


def sample_best_of(run: Run, prompts: list[Prompt], cache: KVCache | None) -> list[dict]:
    """Sample texts of each prompt and make a line of the best one.

    That is, of the samples that ended with an answer, the one with the highest reward, of those the
    likeliest, of those the first. Samples are functions of (seed, prompt, sibling, token), at step
    0, which GRPO has not.
    """
    sampling = run.cfg.sampling
    group_size = sampling.group_size
    rollouts = generate(
        run.policy,
        prompts,
        group_size,
        sampling.temperature,
        sampling.max_new_tokens,
        run.stops,
        run.draw_uniforms(0, prompts),
        cache,
        top_p=sampling.top_p,
        max_cache_tokens=run.get_kv_cache_budget(),
        kernels=run.cfg.model.kernels,
    )
    rewards = run.train_scorer.score(rollouts)
    baselines = score_baselines(run, prompts)

    # Of each group the best sample becomes a line.
    def rank_sample(index: int) -> tuple:
        rollout = rollouts[index]
        is_usable = rollout.finished and rewards[index].error is None
        return is_usable, rewards[index].total, sum(rollout.sampler_logp), -index

    rows = []
    for start, baseline in zip(range(0, len(rollouts), group_size), baselines):
        best = max(range(start, start + group_size), key=rank_sample)
        row = make_row(run, rollouts[best], rewards[best], baseline)
        group_rewards = rewards[start : start + group_size]
        row |= dict(sibling=best - start, rewards=[reward.total for reward in group_rewards])
        rows.append(row)
    return rows


def score_given(run: Run, given: list[TeacherText]) -> list[dict]:
    """Score texts of the file and make a line of each."""
    rollouts = []
    for number, text in enumerate(given):
        rollouts.append(make_text_rollout(text.prompt, number, text.ids))
    baselines = score_baselines(run, [text.prompt for text in given])
    rewards = run.train_scorer.score(rollouts)
    rows = []
    for text, rollout, reward, baseline in zip(given, rollouts, rewards, baselines):
        row = make_row(run, rollout, reward, baseline)
        row["text"] = text.text
        rows.append(row)
    return rows


def score_baselines(run: Run, prompts: list[Prompt]) -> list[float]:
    """Score the task's answers without a policy by reward.metric: for a query the query itself."""
    answers = [run.task.baseline_answer(prompt.row) for prompt in prompts]
    metrics = run.train_scorer.score_answers(prompts, answers)
    return [of_answer[run.cfg.reward.metric] for of_answer in metrics]


def make_row(run: Run, rollout: Rollout, reward: Reward, raw: float) -> dict:
    """Make a line of teacher.jsonl. raw: the score of the answer without a policy."""
    error = reward.error
    if error is None and not rollout.finished:
        error = "unfinished"
    return dict(
        id=rollout.prompt.id,
        text=reward.text,
        reward=reward.total,
        score=reward.terms[run.cfg.reward.metric],
        raw=raw,
        error=error,
        ids=list(rollout.ids),
    )


# --- The teacher's file ---------------------------------------------------------------------------


def read_teacher_file(run: Run) -> list[TeacherText]:
    """Read and check the teacher's file. Raises DataError.

    A line's own "ids" are learned as they are when they spell its text; else the tokenizer's.
    """
    cfg = run.cfg
    prompts = {prompt.id: prompt for prompt in run.dataset.train}
    encoder = TeacherEncoder(run)
    held_out = {prompt.id for prompt in (*run.dataset.validation, *run.dataset.test)}
    known_ids = set(prompts)
    if cfg.data.on_long_prompt != "stop":  # then some train queries may have no prompt
        queries, _ = read_rows(cfg.data.train_queries, cfg.data.on_bad_line, ())
        known_ids = set(queries)
    rows, dropped_lines = read_teacher(
        cfg.sft.teacher, known_ids, held_out, encoder.encode, cfg.data.on_bad_line
    )

    # Say what of the file is not learned as it stands there.
    without_prompt = [id for id, *_ in rows if id not in prompts]
    if without_prompt:
        print_rank0(
            f"recr1: {len(without_prompt)} texts of the teacher belong to prompts that are left "
            f"out, first: {without_prompt[0]!r}"
        )
    if dropped_lines:
        print_rank0(
            f"recr1: {len(dropped_lines)} lines of the teacher left out, first: {dropped_lines[0]}"
        )
    if encoder.num_respelled:
        print_rank0(
            f"recr1: the 'ids' of {encoder.num_respelled} lines of the teacher do not spell their "
            "text in this model's tokenizer: the text is encoded anew"
        )
    return [TeacherText(prompts[id], text, tuple(ids)) for id, text, ids in rows if id in prompts]


class TeacherEncoder:
    """Encodes texts of the teacher's file, each with the end token behind it."""

    def __init__(self, run: Run):
        self.tokenizer = run.tokenizer
        self.stops = run.stops
        self.max_new_tokens = run.cfg.sampling.max_new_tokens
        self.end = min(run.stops)
        if self.tokenizer.eos_token_id in run.stops:
            self.end = self.tokenizer.eos_token_id
        self.num_respelled = 0  # lines whose own ids do not spell their text

    def encode(self, text: str, given_ids: Any) -> list[int]:
        """Return the ids of a text: the line's own when they spell it. Raises DataError."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        stops_inside = self.stops.intersection(ids)
        if stops_inside:
            raise DataError(
                f"the text holds the end token {self.tokenizer.decode(min(stops_inside))!r}, "
                "which is set behind it anyway; delete that"
            )

        # The line's own ids, when they spell the text; else the tokenizer's with the end token.
        if self.spells(given_ids, text):
            ids = given_ids
        else:
            ids = [*ids, self.end]
            self.num_respelled += given_ids is not None
        if len(ids) > self.max_new_tokens:
            raise DataError(
                f"the text has {len(ids)} tokens with its end, sampling.max_new_tokens is "
                f"{self.max_new_tokens}; raise that or delete the line"
            )
        return ids

    def spells(self, ids: Any, text: str) -> bool:
        """Return whether `ids`, whatever the file has there, are the text and one end token."""
        if not isinstance(ids, list) or not ids:
            return False
        for id in ids:
            if type(id) is not int or not 0 <= id < len(self.tokenizer):
                return False
        is_stop = [id in self.stops for id in ids]
        if is_stop != [False] * (len(ids) - 1) + [True]:
            return False
        return self.tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == text


# --- RUN/teacher.jsonl ----------------------------------------------------------------------------


def write_rows(
    run: Run, todo: list[Prompt] | list[TeacherText], score_chunk: ScoreChunk
) -> list[dict]:
    """Make a line for each of `todo`, in order.

    Those that the file already has are read; the others come from score_chunk(this rank's share),
    chunk after chunk. A chunk is on the disk before the next one begins. Raises RunError when the
    file was made of something else.
    """
    path = run.folder / "teacher.jsonl"

    # An earlier start of this run may have written the first of them.
    with dist.fail_together():
        rows = read_written(path, todo) if dist.rank() == 0 else []
    num_written = dist.broadcast_from_rank0(len(rows))

    progress_bar = tqdm(
        total=len(todo),
        initial=num_written,
        desc="teacher",
        unit="text",
        disable=None if dist.rank() == 0 else True,
    )
    chunk_size = run.cfg.train.prompts_per_step
    try:
        with run.log.track_peak("teacher"):
            for start in range(num_written, len(todo), chunk_size):
                heartbeat.enter_phase(f"teacher {start}/{len(todo)}")
                chunk = todo[start : start + chunk_size]
                rows += write_chunk(run, path, chunk, score_chunk)
                progress_bar.update(len(chunk))
    except Stopped:
        raise Stopped(
            "stopped within the teacher's texts; those that are done stand in "
            f"{path}, the same command goes on behind them"
        ) from None
    finally:
        progress_bar.close()
    return dist.broadcast_from_rank0(rows)


def write_chunk(run: Run, path: Path, chunk: list, score_chunk: ScoreChunk) -> list[dict]:
    """Score a chunk on all ranks and append its lines to the file; rank 0 gets them."""
    local_chunk = dist.split_across_ranks(chunk)
    is_sampled = isinstance(chunk[0], Prompt)
    # a text of the file needs no policy
    weights = unsharded(run.policy) if is_sampled else nullcontext()
    with weights, dist.fail_together(), raise_on_signal():
        local_lines = score_chunk(local_chunk)

    lines_by_rank = dist.gather_to_rank0(local_lines)
    lines: list[dict] = []
    with dist.fail_together():
        if lines_by_rank is not None:
            for of_rank in lines_by_rank:
                lines += of_rank
            append_lines(path, lines)
    return lines


def append_lines(path: Path, lines: list[dict]) -> None:
    """Append lines to a JSONL file and force them onto the disk."""
    text = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    with report_write_errors(path):
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(text))
        sync_to_disk(path)


def read_written(path: Path, todo: Sequence[Prompt | TeacherText]) -> list[dict]:
    """Read the lines of an earlier start of this run; a torn last one is cut off.

    Raises RunError unless they are those of the first texts of `todo`.
    """
    rows: list[dict] = []
    with report_write_errors(path):
        if path.exists():
            rows, end = _read_complete_lines(path)
            os.truncate(path, end)

    for text, row in zip(todo, rows):
        if not _is_line_of(row, text):
            id = text.id if isinstance(text, Prompt) else text.prompt.id
            raise RunError(
                f"{path}: has {row.get('id')!r} where this run's teacher has {id!r}, or another "
                "text: the teacher's file or the data have changed; "
                "set them back, or name a new run.dir"
            )
    if len(rows) > len(todo):
        raise RunError(
            f"{path}: has {len(rows)} texts, this run's teacher {len(todo)}; "
            "set the data back, or name a new run.dir"
        )
    return rows


def _read_complete_lines(path: Path) -> tuple[list[dict], int]:
    """Read a JSONL file up to its first line that is torn. Returns the rows and their bytes."""
    rows = []
    end = 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
        end += len(line)
    return rows, end


def _is_line_of(row: dict, text: Prompt | TeacherText) -> bool:
    """Return whether a line of teacher.jsonl belongs to this prompt, or this text of the file."""
    if not {"ids", "score", "raw", "error"} <= row.keys():
        return False
    if isinstance(text, Prompt):
        return row.get("id") == text.id
    return row.get("id") == text.prompt.id and row.get("text") == text.text
