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

from . import config_file as configs, dist, heartbeat
from .config import Sft
from .data import DataError, read_rows, read_teacher
from .files import sync, writing
from .fsdp import gathered
from .log import say
from .records import Prompt, Reward, Rollout
from .resume import RunError
from .run import Run
from .sample import generate, new_cache
from .stopping import Stopped, at_once

SAMPLED = ("sampling.group_size", "sampling.top_p")


class Given(NamedTuple):
    """A text of the teacher's file."""

    prompt: Prompt
    text: str
    ids: tuple[int, ...]


def lessons(run: Run) -> tuple[list[Rollout], dict]:
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
        score = partial(best_of, run, cache=new_cache_of(run))
    else:
        with dist.together(), at_once():
            todo = read(run, prompts)
            score = partial(scored, run)
        if idle := configs.changed(run.cfg, SAMPLED):
            say(f"recr1: the teacher is a file: nothing is sampled, {', '.join(idle)} are not read")
    rows = written(run, todo, score)
    kept = [row for row in rows if keeps(row, s)]
    about = summary(rows, kept, s)
    say(
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


def keeps(row: dict, s: Sft) -> bool:
    """The rule, on a line of teacher.jsonl."""
    enough = {
        "all": True,
        "no_worse": row["score"] >= row["raw"],
        "better": row["score"] > row["raw"],
    }[s.keep]
    return row["error"] is None and enough and row["score"] >= s.least


def summary(rows: list[dict], kept: list[dict], s: Sft) -> dict:
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


def best_of(run: Run, prompts: list[Prompt], cache) -> list[dict]:
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
        run.uniforms(0, prompts),
        cache,
        top_p=s.top_p,
        room=run.room(),
        kernels=run.cfg.model.kernels,
    )
    rewards = run.train_task.score(rollouts)
    lines = []

    def rank(i):
        usable = rollouts[i].finished and rewards[i].error is None
        return usable, rewards[i].total, sum(rollouts[i].sampler_logp), -i

    for p, raw in zip(range(0, len(rollouts), s.group_size), raw_scores(run, prompts)):
        best = max(range(p, p + s.group_size), key=rank)
        line = row(run, rollouts[best], rewards[best], raw)
        lines.append(
            line | dict(sibling=best - p, rewards=[r.total for r in rewards[p : p + s.group_size]])
        )
    return lines


def new_cache_of(run: Run):
    """The sampler's cache, kept from chunk to chunk on a CPU, where fresh pages are dear."""
    with gathered(run.policy):
        return new_cache(run.policy) if dist.device().type == "cpu" else None


def scored(run: Run, given: list[Given]) -> list[dict]:
    """A line for each text of the file."""
    rollouts = [
        Rollout(g.prompt, i, 0, g.ids, (0.0,) * len(g.ids), True) for i, g in enumerate(given)
    ]
    raw = raw_scores(run, [g.prompt for g in given])
    return [
        row(run, *of) | dict(text=g.text)
        for g, of in zip(given, zip(rollouts, run.train_task.score(rollouts), raw))
    ]


def raw_scores(run: Run, prompts: list[Prompt]) -> list[float]:
    """reward.metric of the task's answer without a policy: for a query the query itself."""
    return [
        parts[run.cfg.reward.metric]
        for parts in run.train_task.measure(prompts, [run.task.raw(p.row) for p in prompts])
    ]


def row(run: Run, rollout: Rollout, reward: Reward, raw: float) -> dict:
    error = reward.error or (None if rollout.finished else "unfinished")
    return dict(
        id=rollout.prompt.id,
        text=reward.text,
        reward=reward.total,
        score=reward.parts[run.cfg.reward.metric],
        raw=raw,
        error=error,
        ids=list(rollout.ids),
    )


def read(run: Run, prompts: dict[str, Prompt]) -> list[Given]:
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
        say(
            f"recr1: {len(idle)} texts of the teacher belong to prompts that are left out, first: {idle[0]!r}"
        )
    if dropped:
        say(f"recr1: {len(dropped)} lines of the teacher left out, first: {dropped[0]}")
    if spelt_otherwise:
        say(
            f"recr1: the 'ids' of {spelt_otherwise} lines of the teacher do not spell their text in this model's tokenizer: the text is encoded anew"
        )
    return [Given(prompts[id], text, tuple(ids)) for id, text, ids in rows if id in prompts]


# --- RUN/teacher.jsonl ------------------------------------------------------------------------------------------------------------


def written(
    run: Run, todo: list[Prompt] | list[Given], score: Callable[[list], list[dict]]
) -> list[dict]:
    """A line for each of `todo`, in order: those that the file already has, then score(chunk) of
    this rank's share of chunk after chunk.

    A chunk is on the disk before the next one begins. Raises RunError when the file was made of
    something else.
    """
    path = run.folder / "teacher.jsonl"
    chunk = run.cfg.train.prompts_per_step
    sampled = todo and isinstance(todo[0], Prompt)
    with dist.together():
        rows = already(path, todo) if dist.rank() == 0 else []
    start = dist.first(len(rows))
    bar = tqdm(
        total=len(todo),
        initial=start,
        desc="teacher",
        unit="text",
        disable=None if dist.rank() == 0 else True,
    )
    try:
        with run.log.peak("teacher"):
            for at in range(start, len(todo), chunk):
                heartbeat.at(f"teacher {at}/{len(todo)}")
                mine = dist.share(todo[at : at + chunk])
                if sampled:
                    with gathered(run.policy), dist.together(), at_once():
                        lines = score(mine)
                else:
                    with dist.together(), at_once():
                        lines = score(mine)
                parts = dist.gather(lines)
                with dist.together():
                    if parts is not None:
                        rows += append(path, [line for part in parts for line in part])
                bar.update(min(chunk, len(todo) - at))
    except Stopped:
        raise Stopped(
            f"stopped within the teacher's texts; those that are done stand in {path}, the same command goes on behind them"
        ) from None
    finally:
        bar.close()
    return dist.first(rows)


def append(path: Path, lines: list[dict]) -> list[dict]:
    with writing(path):
        with open(path, "a", encoding="utf-8") as f:
            f.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        sync(path)
    return lines


def already(path: Path, todo: list[Prompt] | list[Given]) -> list[dict]:
    """The lines of an earlier start of this run; a torn last one is cut off."""
    rows = []
    end = 0
    with writing(path):
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
