"""The texts that SFT learns: a file's, or the policy's own best of N by the task's reward
(rejection sampling, "self").

Either way RUN/teacher.jsonl keeps them with their scores, one line per text:
    id, text, ids        what is learnt: the query, the completion without its end token, its token
    ids with it reward, score, raw   the task's reward, its reward.metric@k_train, that of the
    answer without a policy (the raw query) error                why nothing can be learnt from it
    (no answer, or sampling cut it off), else null sibling, rewards     self: which of the N samples
    it is, and the rewards of all
A run that was stopped goes on behind its last line. The file is itself a teacher's file for another
run (sft.teacher=RUN/teacher.jsonl).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from tqdm import tqdm

from recr1.config import loader as configs
from recr1.config.schema import SftConfig
from recr1.data.readers import DataError, read_rows, read_teacher
from recr1.data_types import Prompt, Reward, Rollout
from recr1.distributed import collectives as dist, heartbeat
from recr1.distributed.fsdp import unsharded
from recr1.distributed.printing import print_rank0
from recr1.sampling.generate import generate, make_cache
from recr1.training.run import Run
from recr1.training.run_dir import RunError
from recr1.utils.files import report_write_errors, sync_to_disk
from recr1.utils.interrupts import Stopped, raise_on_signal

SAMPLED = ("sampling.group_size", "sampling.top_p")


class TeacherText(NamedTuple):
    """A text of the teacher's file."""

    prompt: Prompt
    text: str
    ids: tuple[int, ...]


def load_sft_data(run: Run) -> tuple[list[Rollout], dict]:
    """The texts that are kept, one Rollout each, and what summary.json says of the teacher; the
    same on all ranks.

    Raises DataError when too few are kept, and what reading the file, sampling and the retriever
    raise.
    """
    s = run.cfg.sft
    least = run.cfg.train.prompts_per_step
    prompts = {p.id: p for p in run.train}
    if s.teacher == "self":
        todo = list(run.train)
        score = partial(sample_best_of, run, cache=make_cache_for(run))
    else:
        with dist.fail_together(), raise_on_signal():
            todo = read_teacher_file(run, prompts)
            score = partial(score_given, run)
        if idle := configs.list_changed_keys(run.cfg, SAMPLED):
            print_rank0(
                f"recr1: the teacher is a file: nothing is sampled, {', '.join(idle)} are not read"
            )
    rows = write_rows(run, todo, score)
    kept = [row for row in rows if passes_filter(row, s)]
    about = summarize_teacher(rows, kept, s)
    print_rank0(
        f"recr1: teacher {s.teacher}: {len(rows)} texts, {len(kept)} kept (sft.keep={s.keep}, sft.least={s.least:g}), {run.cfg.reward.metric}@{run.cfg.reward.k_train} {about['score_kept']:.4f} "
        f"where the raw answer has {about['raw_kept']:.4f}; nothing to learn from {sum(about['errors'].values())} {about['errors'] or ''}".rstrip()
    )
    if len(kept) < least:
        raise DataError(
            f"sft.teacher: {len(kept)} of {len(rows)} texts are kept and train.prompts_per_step is {least}; lower that, "
            f"or keep more (sft.keep, sft.least{', sampling.group_size, sampling.temperature' if s.teacher == 'self' else ''})"
        )
    return [
        Rollout(prompts[row["id"]], i, 0, tuple(row["ids"]), (0.0,) * len(row["ids"]), True)
        for i, row in enumerate(kept)
    ], about


def passes_filter(row: dict, s: SftConfig) -> bool:
    """The rule, on a line of teacher.jsonl."""
    enough = {
        "all": True,
        "no_worse": row["score"] >= row["raw"],
        "better": row["score"] > row["raw"],
    }[s.keep]
    return row["error"] is None and enough and row["score"] >= s.least


def summarize_teacher(rows: list[dict], kept: list[dict], s: SftConfig) -> dict:
    """Counts and means over the texts; means of none are 0."""

    def mean(rows, name):
        return float(np.mean([row[name] for row in rows])) if rows else 0.0

    return dict(
        source=s.teacher,
        texts=len(rows),
        kept=len(kept),
        errors=dict(Counter(row["error"] for row in rows if row["error"])),
        score=mean(rows, "score"),
        raw=mean(rows, "raw"),
        score_kept=mean(kept, "score"),
        raw_kept=mean(kept, "raw"),
    )


# --- the two teachers -------------------------------------------------------------------------------------------------------------


def sample_best_of(run: Run, prompts: list[Prompt], cache) -> list[dict]:
    """A line for each prompt: of its samples that ended with an answer the one with the highest
    reward, of those the likeliest, of those the first.

    Samples are functions of (seed, prompt, sibling, token); at step 0, which GRPO has not.
    """
    s = run.cfg.sampling
    rollouts = generate(
        run.policy,
        prompts,
        s.group_size,
        s.temperature,
        s.max_new_tokens,
        run.stops,
        run.draw_uniforms(0, prompts),
        cache,
        top_p=s.top_p,
        max_cache_tokens=run.get_kv_cache_budget(),
        kernels=run.cfg.model.kernels,
    )
    rewards = run.train_scorer.score(rollouts)
    lines = []

    def rank(i):
        usable = rollouts[i].finished and rewards[i].error is None
        return usable, rewards[i].total, sum(rollouts[i].sampler_logp), -i

    for p, raw in zip(range(0, len(rollouts), s.group_size), score_baselines(run, prompts)):
        best = max(range(p, p + s.group_size), key=rank)
        line = make_row(run, rollouts[best], rewards[best], raw)
        lines.append(
            line | dict(sibling=best - p, rewards=[r.total for r in rewards[p : p + s.group_size]])
        )
    return lines


def make_cache_for(run: Run):
    """The sampler's cache, kept from chunk to chunk on a CPU, where fresh pages are dear."""
    with unsharded(run.policy):
        return make_cache(run.policy) if dist.device().type == "cpu" else None


def score_given(run: Run, given: list[TeacherText]) -> list[dict]:
    """A line for each text of the file."""
    rollouts = [
        Rollout(g.prompt, i, 0, g.ids, (0.0,) * len(g.ids), True) for i, g in enumerate(given)
    ]
    raw = score_baselines(run, [g.prompt for g in given])
    return [
        make_row(run, *of) | dict(text=g.text)
        for g, of in zip(given, zip(rollouts, run.train_scorer.score(rollouts), raw))
    ]


def score_baselines(run: Run, prompts: list[Prompt]) -> list[float]:
    """reward.metric of the task's answer without a policy: for a query the query itself."""
    return [
        parts[run.cfg.reward.metric]
        for parts in run.train_scorer.score_answers(
            prompts, [run.task.baseline_answer(p.row) for p in prompts]
        )
    ]


def make_row(run: Run, rollout: Rollout, reward: Reward, raw: float) -> dict:
    error = reward.error or (None if rollout.finished else "unfinished")
    return dict(
        id=rollout.prompt.id,
        text=reward.text,
        reward=reward.total,
        score=reward.terms[run.cfg.reward.metric],
        raw=raw,
        error=error,
        ids=list(rollout.ids),
    )


def read_teacher_file(run: Run, prompts: dict[str, Prompt]) -> list[TeacherText]:
    """The teacher's file, checked. A line's own "ids" are learnt as they are when they spell its
    text; else the tokenizer's. Raises DataError.
    """
    cfg = run.cfg
    spelt_otherwise = 0
    tokenizer = run.tokenizer
    limit = cfg.sampling.max_new_tokens
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in run.stops else min(run.stops)

    def encode(text: str, own) -> list[int]:
        nonlocal spelt_otherwise
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if run.stops.intersection(ids):
            raise DataError(
                f"the text holds the end token {tokenizer.decode(min(run.stops.intersection(ids)))!r}, which is set behind it anyway; delete that"
            )
        ids = own if spells(own, text) else [*ids, end]
        spelt_otherwise += own is not None and ids is not own
        if len(ids) > limit:
            raise DataError(
                f"the text has {len(ids)} tokens with its end, sampling.max_new_tokens is {limit}; raise that or delete the line"
            )
        return ids

    def spells(ids, text: str) -> bool:
        right = (
            isinstance(ids, list)
            and ids
            and all(type(i) is int and 0 <= i < len(tokenizer) for i in ids)
        )
        return (
            right
            and [i in run.stops for i in ids] == [False] * (len(ids) - 1) + [True]
            and tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == text
        )

    held_out = {p.id for p in (*run.validation, *run.test)}
    known = (
        prompts.keys()
        if cfg.data.on_long_prompt == "stop"
        else read_rows(cfg.data.train_queries, cfg.data.on_bad_line, ())[0].keys()
    )
    rows, dropped = read_teacher(cfg.sft.teacher, known, held_out, encode, cfg.data.on_bad_line)
    if idle := [id for id, *_ in rows if id not in prompts]:
        print_rank0(
            f"recr1: {len(idle)} texts of the teacher belong to prompts that are left out, first: {idle[0]!r}"
        )
    if dropped:
        print_rank0(f"recr1: {len(dropped)} lines of the teacher left out, first: {dropped[0]}")
    if spelt_otherwise:
        print_rank0(
            f"recr1: the 'ids' of {spelt_otherwise} lines of the teacher do not spell their text in this model's tokenizer: the text is encoded anew"
        )
    return [TeacherText(prompts[id], text, tuple(ids)) for id, text, ids in rows if id in prompts]


# --- RUN/teacher.jsonl ------------------------------------------------------------------------------------------------------------


def write_rows(
    run: Run, todo: list[Prompt] | list[TeacherText], score: Callable[[list], list[dict]]
) -> list[dict]:
    """A line for each of `todo`, in order: those that the file already has, then score(chunk) of
    this rank's share of chunk after chunk.

    A chunk is on the disk before the next one begins. Raises RunError when the file was made of
    something else.
    """
    path = run.folder / "teacher.jsonl"
    chunk = run.cfg.train.prompts_per_step
    sampled = todo and isinstance(todo[0], Prompt)
    with dist.fail_together():
        rows = read_written(path, todo) if dist.rank() == 0 else []
    start = dist.broadcast_from_rank0(len(rows))
    bar = tqdm(
        total=len(todo),
        initial=start,
        desc="teacher",
        unit="text",
        disable=None if dist.rank() == 0 else True,
    )
    try:
        with run.log.track_peak("teacher"):
            for at in range(start, len(todo), chunk):
                heartbeat.enter_phase(f"teacher {at}/{len(todo)}")
                mine = dist.split_across_ranks(todo[at : at + chunk])
                if sampled:
                    with unsharded(run.policy), dist.fail_together(), raise_on_signal():
                        lines = score(mine)
                else:
                    with dist.fail_together(), raise_on_signal():
                        lines = score(mine)
                parts = dist.gather_to_rank0(lines)
                with dist.fail_together():
                    if parts is not None:
                        rows += append_lines(path, [line for part in parts for line in part])
                bar.update(min(chunk, len(todo) - at))
    except Stopped:
        raise Stopped(
            f"stopped within the teacher's texts; those that are done stand in {path}, the same command goes on behind them"
        ) from None
    finally:
        bar.close()
    return dist.broadcast_from_rank0(rows)


def append_lines(path: Path, lines: list[dict]) -> list[dict]:
    with report_write_errors(path):
        with open(path, "a", encoding="utf-8") as f:
            f.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        sync_to_disk(path)
    return lines


def read_written(path: Path, todo: list[Prompt] | list[TeacherText]) -> list[dict]:
    """The lines of an earlier start of this run; a torn last one is cut off."""
    rows = []
    end = 0
    with report_write_errors(path):
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            try:
                found = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                found = None
            if not isinstance(found, dict):
                break
            rows.append(found)
            end += len(line)
        if path.exists():
            os.truncate(path, end)
    wanted = [(t.id, None) if isinstance(t, Prompt) else (t.prompt.id, t.text) for t in todo]
    for (id, text), found in zip(wanted, rows):
        if (
            found.get("id") != id
            or text not in (None, found.get("text"))
            or not {"ids", "score", "raw", "error"} <= found.keys()
        ):
            raise RunError(
                f"{path}: has {found.get('id')!r} where this run's teacher has {id!r}, or another text: the teacher's file or the data have changed; "
                "set them back, or name a new run.dir"
            )
    if len(rows) > len(todo):
        raise RunError(
            f"{path}: has {len(rows)} texts, this run's teacher {len(todo)}; set the data back, or name a new run.dir"
        )
    return rows
