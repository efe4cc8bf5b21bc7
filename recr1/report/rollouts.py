"""rollouts.jsonl.gz in two passes: the first sees every row and chooses, the second reads the
chosen ones with their tokens.
"""

from __future__ import annotations

import gzip
import heapq
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from recr1.config.schema import Config, ConfigError
from recr1.data.readers import DataError
from recr1.data_types import Prompt, Rollout
from recr1.report.record import round_digits
from recr1.rl.losses import resolve_objective
from recr1.rl.packing import pack_rollouts
from recr1.tasks.answer_parser import parse_answer_json
from recr1.tasks.registry import TASKS

PHASES = ("early", "middle", "late")

EACH = 2  # best, median and worst rollouts shown of a phase

TOKENS = 400  # of a rollout that are shown

CHARS = 600  # of a text in a table

SIBLINGS = 32  # of a group that are listed

AUDITED = 40  # rollouts of highest reward by phase

ANSWERS = 200_000  # distinct answers counted; later ones are not

BINS = 24


@dataclass
class RolloutSurvey:
    """What the first pass found. Steps from 1 to `last` are cut into thirds, the phases."""

    last: int
    key: str = "query"  # of the answer's JSON
    rows: int = 0
    rollouts: int = 0
    torn: str = ""
    # (reward, adv, -line, count, step, prompt) of rows with tokens
    traced: list[list[tuple]] = field(default_factory=lambda: [[] for _ in PHASES])
    # (step, prompt) -> lines of rows with tokens
    groups: dict[tuple, list[int]] = field(default_factory=dict)
    # heaps of (reward, adv, -line, row)
    highest: list[list[tuple]] = field(default_factory=lambda: [[] for _ in PHASES])
    # reward -> rollouts
    rewards: list[Counter] = field(default_factory=lambda: [Counter() for _ in PHASES])
    # answer -> [prompts, rollouts, reward sum, last step]
    answers: dict[str, list] = field(default_factory=dict)
    uncounted: int = 0

    def phase(self, step: int) -> int:
        return min(len(PHASES) - 1, (step - 1) * len(PHASES) // max(1, self.last))

    def see(self, line: int, row: dict) -> None:
        phase = self.phase(row["step"])
        count = row["count"]
        self.rows = self.rows + 1
        self.rollouts = self.rollouts + count
        self.rewards[phase][round_digits(row["reward"])] += count
        rank = (row["reward"], row["adv"], -line)
        if "ids" in row:
            self.traced[phase].append((*rank, count, row["step"], row["prompt"]))
            self.groups.setdefault((row["step"], row["prompt"]), []).append(line)
        heap = self.highest[phase]
        # more than are shown: some are of the same query
        if len(heap) < 8 * AUDITED or rank > heap[0][:3]:
            light = {
                k: row[k]
                for k in (
                    "step",
                    "prompt",
                    "text",
                    "error",
                    "reward",
                    "parts",
                    "adv",
                    "count",
                    "finished",
                )
            }
            (heapq.heappush if len(heap) < 8 * AUDITED else heapq.heappushpop)(heap, (*rank, light))
        answer = extract_answer(row, self.key)
        if answer is None or answer not in self.answers and len(self.answers) >= ANSWERS:
            self.uncounted += answer is not None
            return
        known = self.answers.setdefault(answer, [set(), 0, 0.0, 0])
        known[0].add(row["prompt"])
        known[1:] = [known[1] + count, known[2] + count * row["reward"], row["step"]]


def extract_answer(row: dict, key: str) -> str | None:
    """What a rollout answered, in the policy's own words: a query, or a list's labels; None where
    the run found no answer in its text.
    """
    if row["error"] is not None:
        return None
    text = row["text"]
    # the prompt may have closed the thought
    value, error = parse_answer_json(text if "</think>" in text else "</think>" + text)
    if error is not None:  # a task of the user's own reads texts in its own way
        return text.strip()
    value = value.get(key, value) if isinstance(value, dict) else value
    if isinstance(value, list) and all(isinstance(label, str) for label in value):
        return ", ".join(value)
    return value.strip() if isinstance(value, str) else json.dumps(value)


def survey_rollouts(path: Path, last: int, key: str = "query") -> RolloutSurvey:
    """The first pass. Raises DataError for a row that is none of a rollout log's; a torn end is
    noted and left out.
    """
    found = RolloutSurvey(last, key)
    for number, line in iterate_lines(path, found):
        try:
            found.see(number, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise DataError(
                f"{path}:{number}: not a row of a rollout log ({type(e).__name__}: {e}); the run's log is damaged"
            ) from None
    return found


def iterate_lines(path: Path, found: RolloutSurvey) -> Iterator[tuple[int, str]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="surrogatepass") as file:
            yield from enumerate(
                tqdm(file, desc="report", unit=" rollouts", disable=None, leave=False), 1
            )
    except FileNotFoundError:
        found.torn = "rollouts.jsonl.gz is missing: no rollouts can be shown."
    except (OSError, EOFError, zlib.error) as e:
        found.torn = f"rollouts.jsonl.gz is torn behind row {found.rows} ({type(e).__name__}): what stands there is left out."


def describe_rollouts(
    path: Path, last: int, config: Config, tokenizer, queries: dict[str, str]
) -> dict:
    """Phases with their rollouts, the audit and the distribution of rewards. tokenizer: None where
    there is none; queries {id: text} where known.
    """
    found = survey_rollouts(path, last, getattr(TASKS.get(config.task), "key", "query"))
    picks = [choose_rollouts(rows) for rows in found.traced]
    wanted = {
        line for chosen in picks for _, row in chosen for line in found.groups[row[4], row[5]]
    }
    kept = (
        {
            number: json.loads(line)
            for number, line in iterate_lines(path, found)
            if number in wanted
        }
        if wanted
        else {}
    )
    lens = TokenView(config, tokenizer)
    phases = []
    for i, chosen in enumerate(picks):
        first, end = (-(-last * k // len(PHASES)) for k in (i, i + 1))
        idle = sum(row[1] == 0 for row in found.traced[i])
        phases.append(
            dict(
                name=PHASES[i],
                first=first + 1,
                last=end,
                logged=len(found.traced[i]),
                idle=idle,
                steps=len({row[4] for row in found.traced[i]}),
                rollouts=[
                    dict(
                        rank=rank,
                        **lens.show(
                            kept[-row[2]], [kept[n] for n in found.groups[row[4], row[5]]], queries
                        ),
                    )
                    for rank, row in chosen
                ],
            )
        )
    return dict(
        rows=found.rows,
        rollouts=found.rollouts,
        note=found.torn,
        phases=[p for p in phases if p["first"] <= p["last"]],
        tokenizer=tokenizer is not None,
        loss_note=lens.note,
        audit=audit_rollouts(found, queries, config.task),
        recurring=list_recurring(found, queries),
        uncounted=found.uncounted,
        histogram=make_histogram(found.rewards),
    )


def choose_rollouts(rows: list[tuple]) -> list[tuple[str, tuple]]:
    """(rank, row) of the best, median and worst by reward, then advantage; of rows with an
    advantage where there are any. One rollout per prompt.
    """
    ranked = sorted([row for row in rows if row[1] != 0] or rows)
    taken = set()
    chosen = []
    if not ranked:
        return []
    half = np.searchsorted(np.cumsum([row[3] for row in ranked]), sum(row[3] for row in ranked) / 2)
    by_distance = sorted(range(len(ranked)), key=lambda i: abs(i - int(half)))
    for rank, order in (
        ("best", reversed(ranked)),
        ("worst", ranked),
        ("median", [ranked[i] for i in by_distance]),
    ):
        fresh = (row for row in order if row[5] not in taken)
        for row in (row for row, _ in zip(fresh, range(EACH))):
            taken.add(row[5])
            chosen.append((rank, row))
    return sorted(chosen, key=lambda pick: ("best", "median", "worst").index(pick[0]))


class TokenView:
    """Rows with per-token values -> what the page shows of them."""

    def __init__(self, config: Config, tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        self.note = ""
        try:
            self.objective = resolve_objective(config.loss, config.model)
        except ConfigError as e:  # a loss of the user's own whose file is not here
            self.objective = None
            self.note = f"Which tokens the clip stopped cannot be said: {e}."

    def show(self, row: dict, group: list[dict], queries: dict[str, str]) -> dict:
        n = len(row["ids"])
        values = {
            name: row.get(name)
            for name in ("sampler_logp", "trainer_logp", "ref_logp", "old_logp", "entropy")
        }
        if any(
            len(v or ()) != n
            for name, v in values.items()
            if v is not None or name in ("sampler_logp", "trainer_logp", "old_logp")
        ):
            raise DataError(
                f"rollouts.jsonl.gz: step {row['step']}, {row['prompt']!r}: its tokens and their log-probs do not match; the run's log is damaged"
            )
        clipped, of_text = self.clipped(row, values)
        ratio = [
            float(np.exp(min(700.0, new - old)))
            for new, old in zip(values["trainer_logp"], values["old_logp"])
        ]
        shares = np.repeat([g["reward"] for g in group], [g["count"] for g in group])
        return dict(
            step=row["step"],
            prompt=row["prompt"],
            query=queries.get(row["prompt"]),
            count=row["count"],
            reward=row["reward"],
            parts=row["parts"],
            error=row["error"],
            adv=row["adv"],
            finished=row["finished"],
            total=n,
            prompt_text="".join(self.pieces(row["prompt_ids"])[-TOKENS:]),
            ids=row["ids"][:TOKENS],
            pieces=self.pieces(row["ids"])[:TOKENS],
            ratio=_shorten_values(ratio[:TOKENS]),
            clipped=clipped and clipped[:TOKENS],
            text_ratio=of_text,
            **{name: v and _shorten_values(v[:TOKENS]) for name, v in values.items()},
            group=dict(
                size=len(shares),
                mean=float(shares.mean()),
                std=float(shares.std(ddof=1)) if len(shares) > 1 else 0.0,
                siblings=[
                    dict(
                        text=g["text"][:CHARS],
                        count=g["count"],
                        reward=g["reward"],
                        adv=g["adv"],
                        error=g["error"],
                        own=g is row,
                    )
                    for g in sorted(group, key=lambda g: -g["reward"])[:SIBLINGS]
                ],
            ),
        )

    def clipped(self, row: dict, values: dict) -> tuple[list[bool] | None, float | None]:
        """Tokens with an advantage whose gain, by the run's own loss, has no gradient; and the
        ratio of the whole text where the loss has one.
        """
        if self.objective is None:
            return None, None
        text = Rollout(
            Prompt(row["prompt"], 0, "", tuple(row["prompt_ids"])),
            0,
            0,
            tuple(row["ids"]),
            tuple(row["sampler_logp"]),
            row["finished"],
        )
        [batch] = pack_rollouts([text], len(row["prompt_ids"]) + len(row["ids"]))
        old, logp = (
            torch.tensor(values[name], dtype=torch.float64) for name in ("old_logp", "trainer_logp")
        )
        logp.requires_grad_()
        batch = replace(batch, advantages=torch.full_like(old, row["adv"]), old_logp=old)
        [slope] = torch.autograd.grad(
            self.objective.surrogate(logp, old, batch, self.config.loss).sum(), [logp]
        )
        of_text = (
            float((logp.detach() - old).mean().exp()) if self.config.loss.kind == "gspo" else None
        )
        return ((slope == 0) & (batch.advantages != 0)).tolist(), of_text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; bytes of a character that is spread over tokens stand at the
        token that ends it.
        """
        if self.tokenizer is None:
            return [f"[{id}]" for id in ids]
        pieces = []
        done = []
        shown = ""
        waiting = False
        for id in ids:
            done.append(id)
            text = self.tokenizer.decode(done, clean_up_tokenization_spaces=False)
            waiting = text.endswith("\ufffd") and len(done) < 8
            if waiting:
                pieces.append("")
                continue
            pieces.append(text[len(shown) :])
            # one token of context: a decoder may need it
            done = [id]
            shown = self.tokenizer.decode([id], clean_up_tokenization_spaces=False)
            if shown.endswith("\ufffd"):
                done = []
                shown = ""
        if waiting:  # the text ends in bytes that never became a character
            pieces[-1] = text[len(shown) :]
        return pieces


def audit_rollouts(found: RolloutSurvey, queries: dict[str, str], task: str) -> list[dict]:
    """The rollouts of highest reward of each phase, one per query, with what is conspicuous about
    it.
    """
    rows = []
    for phase, heap in zip(PHASES, found.highest):
        seen: dict[str, dict] = {}
        for *_, row in sorted(heap, key=lambda item: item[:3], reverse=True):
            if row["prompt"] not in seen and len(seen) < AUDITED:
                answer = extract_answer(row, found.key)
                query = queries.get(row["prompt"])
                seen[row["prompt"]] = dict(
                    phase=phase,
                    step=row["step"],
                    prompt=row["prompt"],
                    query=query,
                    answer=answer and answer[:CHARS],
                    text=row["text"][:CHARS],
                    error=row["error"],
                    reward=row["reward"],
                    parts=row["parts"],
                    adv=row["adv"],
                    flags=list_flags(
                        query, answer, row, len(found.answers.get(answer, [()])[0]), task
                    ),
                )
        rows += seen.values()
    return sorted(rows, key=lambda row: (-row["reward"], -row["adv"], row["step"]))


def list_flags(
    query: str | None, answer: str | None, row: dict, prompts: int, task: str
) -> list[str]:
    """What to look at twice. Words are what stands between blanks, in lower case."""
    words = (answer or "").lower().split()
    own = set((query or "").lower().split())
    rewritten = task == "product_search" and bool(own) and bool(words)
    listed = hasattr(TASKS.get(task), "key")
    word, times = Counter(words).most_common(1)[0] if words and not listed else ("", 0)
    labels = (answer or "").split(", ")
    return [
        text
        for text, holds in (
            (f"'{word[:20]}' {times} times", times >= 3),
            ("no word of the query", rewritten and not own & set(words)),
            (f"{len(words)} words for {len(own)}", rewritten and len(words) > max(8, 3 * len(own))),
            (
                "the given order",
                listed
                and len(labels) > 1
                and labels == [f"Item_{i}" for i in range(1, len(labels) + 1)],
            ),
            (f"answer to {prompts} queries", prompts >= 3),
            ("no letter or digit", bool(words) and not re.search(r"\w", answer or "")),
            ("control characters", not all(c.isprintable() or c in "\n\t" for c in row["text"])),
            ("cut", not row["finished"]),
            ("no answer", answer is None),
        )
        if holds
    ]


def list_recurring(found: RolloutSurvey, queries: dict[str, str]) -> list[dict]:
    """Answers given to the most different prompts: a policy that has found a trick says the same to
    all.
    """
    ranked = sorted(
        (
            (len(p), n, total, step, answer)
            for answer, (p, n, total, step) in found.answers.items()
            if len(p) > 1
        ),
        key=lambda r: (-r[0], -r[1], r[4]),
    )
    return [
        dict(
            answer=answer[:CHARS],
            prompts=prompts,
            rollouts=n,
            reward=total / n,
            last=step,
            examples=[queries.get(id, id)[:80] for id in sorted(found.answers[answer][0])[:3]],
        )
        for prompts, n, total, step, answer in ranked[:15]
    ]


def make_histogram(rewards: list[Counter]) -> dict:
    """Rollouts by reward in each phase: {"edges": (BINS + 1,), "counts": {phase: (BINS,)}}."""
    values = [v for counter in rewards for v in counter]
    if not values:
        return {}
    low = min(values)
    high = max(values)
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    return dict(
        edges=_shorten_values(edges.tolist()),
        counts={
            phase: np.histogram(list(c), edges, weights=list(c.values()))[0].tolist()
            if c
            else [0] * BINS
            for phase, c in zip(PHASES, rewards)
        },
    )


def _shorten_values(values: list[float]) -> list[float]:
    return [float(f"{v:.6g}") for v in values]
