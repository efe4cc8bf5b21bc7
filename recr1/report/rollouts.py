"""Read rollouts.jsonl.gz in two passes.

The first pass surveys every row and chooses; the second reads the chosen rows with their tokens.
"""

from __future__ import annotations

import gzip
import heapq
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from recr1.config.schema import Config, ConfigError
from recr1.data.readers import DataError
from recr1.data_types import Prompt, Rollout
from recr1.report.record import round_digits
from recr1.rl.losses import Objective, resolve_objective, sequence_clipped_surrogate
from recr1.rl.packing import pack_rollouts
from recr1.tasks.answer_parser import parse_answer_json
from recr1.tasks.registry import TASKS
from recr1.utils.renamed import RENAMED_ROLLOUT_KEYS, rename_keys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PHASES = ("early", "middle", "late")

RANKS = ("best", "median", "worst")

ROLLOUTS_PER_RANK = 2  # best, median and worst rollouts shown of a phase

MAX_TOKENS = 400  # of a rollout that are shown

MAX_CHARS = 600  # of a text in a table

MAX_SIBLINGS = 32  # of a group that are listed

STUFFING = 0.15  # a mean share of repeated words in the answers that should be looked at

MAX_AUDITED = 40  # rollouts of highest reward by phase

# rollouts of highest reward kept by phase: more than are shown, for some are of the same query
MAX_HIGHEST = 8 * MAX_AUDITED

MAX_ANSWERS = 200_000  # distinct answers counted; later ones are not

MAX_RECURRING = 15  # answers given to several prompts

NUM_BINS = 24

AUDITED_FIELDS = (
    "step",
    "prompt",
    "text",
    "error",
    "reward",
    "reward_terms",
    "advantage",
    "count",
    "finished",
)

TOKEN_VALUES = ("sampler_logp", "trainer_logp", "ref_logp", "old_logp", "entropy")

REQUIRED_TOKEN_VALUES = ("sampler_logp", "trainer_logp", "old_logp")


class TracedRollout(NamedTuple):
    """A row of the log that has tokens.

    The rows sort by reward, then advantage; of equal ones the first line is the highest.
    """

    reward: float
    advantage: float
    negative_line: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    step: int
    prompt: str

    @property
    def line(self) -> int:
        """Return the number of the row's line, from 1."""
        return -self.negative_line

    @property
    def group(self) -> tuple[int, str]:
        """Return the key of the group: (step, prompt)."""
        return self.step, self.prompt


@dataclass
class AnswerCount:
    """Count how often, and to which prompts, one answer was given."""

    prompts: set[str] = field(default_factory=set)
    num_rollouts: int = 0
    reward_sum: float = 0.0
    last_step: int = 0

    def add(self, row: dict) -> None:
        """Count a row of the log."""
        self.prompts.add(row["prompt"])
        self.num_rollouts = self.num_rollouts + row["count"]
        self.reward_sum = self.reward_sum + row["count"] * row["reward"]
        self.last_step = row["step"]


@dataclass
class RolloutSurvey:
    """Hold what the first pass saw. Steps from 1 to `last` are cut into thirds, the phases."""

    last: int
    key: str = "query"  # of the answer's JSON
    rows: int = 0
    rollouts: int = 0
    torn: str = ""
    # by phase: the rows with tokens
    traced: list[list[TracedRollout]] = field(default_factory=lambda: [[] for _ in PHASES])
    # (step, prompt) -> lines of rows with tokens
    groups: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    # by phase: heap of (reward, advantage, -line, row without its tokens)
    highest: list[list[tuple]] = field(default_factory=lambda: [[] for _ in PHASES])
    # by phase: reward -> rollouts
    rewards: list[Counter] = field(default_factory=lambda: [Counter() for _ in PHASES])
    answers: dict[str, AnswerCount] = field(default_factory=dict)
    uncounted: int = 0

    def get_phase(self, step: int) -> int:
        """Return the index of the phase that a step belongs to."""
        phase = (step - 1) * len(PHASES) // max(1, self.last)
        return min(len(PHASES) - 1, phase)

    def add_row(self, line: int, row: dict) -> None:
        """Take a row of the log into the survey. line: its number, from 1."""
        phase = self.get_phase(row["step"])
        count = row["count"]
        self.rows = self.rows + 1
        self.rollouts = self.rollouts + count
        self.rewards[phase][round_digits(row["reward"])] += count
        if "ids" in row:
            traced = TracedRollout(
                row["reward"], row["advantage"], -line, count, row["step"], row["prompt"]
            )
            self.traced[phase].append(traced)
            self.groups.setdefault(traced.group, []).append(line)
        self._keep_if_high(self.highest[phase], line, row)
        self._count_answer(row)

    def _keep_if_high(self, heap: list[tuple], line: int, row: dict) -> None:
        rank = (row["reward"], row["advantage"], -line)
        is_full = len(heap) >= MAX_HIGHEST
        is_high = not is_full or rank > heap[0][:3]
        if not is_high:
            return
        audited_row = {name: row[name] for name in AUDITED_FIELDS}
        if is_full:
            heapq.heappushpop(heap, (*rank, audited_row))
        else:
            heapq.heappush(heap, (*rank, audited_row))

    def _count_answer(self, row: dict) -> None:
        answer = extract_answer(row, self.key)
        if answer is None:
            return
        if answer not in self.answers:
            if len(self.answers) >= MAX_ANSWERS:
                self.uncounted += 1
                return
            self.answers[answer] = AnswerCount()
        self.answers[answer].add(row)


def extract_answer(row: dict, key: str) -> str | None:
    """Return what a rollout answered, in the policy's own words: a query, or a list's labels.

    Returns None where the run found no answer in the text.
    """
    if row["error"] is not None:
        return None
    text = row["text"]
    # The prompt may have closed the thought.
    has_thought_end = "</think>" in text
    value, error = parse_answer_json(text if has_thought_end else "</think>" + text)
    if error is not None:  # a task of the user's own reads texts in its own way
        return text.strip()
    if isinstance(value, dict):
        value = value.get(key, value)
    if isinstance(value, list) and all(isinstance(label, str) for label in value):
        return ", ".join(value)
    if isinstance(value, str):
        return value.strip()
    return json.dumps(value)


def _parse_row(line: str) -> dict:
    return rename_keys(json.loads(line), RENAMED_ROLLOUT_KEYS)


def survey_rollouts(path: Path, last: int, key: str = "query") -> RolloutSurvey:
    """Read every row: the first pass.

    A torn end is noted and left out. Raises DataError for a row that is not one of a rollout log.
    """
    survey = RolloutSurvey(last, key)
    for number, line in iterate_lines(path, survey):
        try:
            survey.add_row(number, _parse_row(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise DataError(
                f"{path}:{number}: not a row of a rollout log ({type(e).__name__}: {e}); "
                "the run's log is damaged"
            ) from None
    return survey


def iterate_lines(path: Path, survey: RolloutSurvey) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line); note in the survey where the log is missing or torn."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="surrogatepass") as file:
            lines = tqdm(file, desc="report", unit=" rollouts", disable=None, leave=False)
            yield from enumerate(lines, 1)
    except FileNotFoundError:
        survey.torn = "rollouts.jsonl.gz is missing: no rollouts can be shown."
    except (OSError, EOFError, zlib.error) as e:
        survey.torn = (
            f"rollouts.jsonl.gz is torn behind row {survey.rows} ({type(e).__name__}): "
            "what stands there is left out."
        )


def describe_rollouts(
    path: Path,
    last: int,
    config: Config,
    tokenizer: PreTrainedTokenizerBase | None,
    queries: dict[str, str],
) -> dict:
    """Return the phases with their rollouts, the audit and the distribution of rewards.

    Args:
        path: rollouts.jsonl.gz.
        last: the run's last step.
        tokenizer: None where there is none; tokens are then shown as their ids.
        queries: {id: text} where known.
    """
    task = TASKS.get(config.task)
    survey = survey_rollouts(path, last, getattr(task, "key", "query"))
    choices = [choose_rollouts(traced) for traced in survey.traced]

    # The second pass reads the chosen rollouts and their siblings.
    rows_by_line = _read_chosen_rows(path, survey, choices)
    view = TokenView(config, tokenizer)
    phases = []
    for phase_index, chosen in enumerate(choices):
        phase = _describe_phase(survey, phase_index)
        phase["rollouts"] = []
        for rank, traced in chosen:
            row = rows_by_line[traced.line]
            siblings = [rows_by_line[line] for line in survey.groups[traced.group]]
            phase["rollouts"].append(dict(rank=rank) | view.show(row, siblings, queries))
        phases.append(phase)
    return dict(
        rows=survey.rows,
        rollouts=survey.rollouts,
        note=survey.torn,
        phases=[phase for phase in phases if phase["first"] <= phase["last"]],
        tokenizer=tokenizer is not None,
        loss_note=view.note,
        audit=audit_rollouts(survey, queries, config.task),
        recurring=list_recurring(survey, queries),
        uncounted=survey.uncounted,
        histogram=make_histogram(survey.rewards),
    )


def _read_chosen_rows(
    path: Path, survey: RolloutSurvey, choices: list[list[tuple[str, TracedRollout]]]
) -> dict[int, dict]:
    """Return {line: row} of the chosen rollouts and of their siblings."""
    chosen_lines: set[int] = set()
    for chosen in choices:
        for _, traced in chosen:
            chosen_lines.update(survey.groups[traced.group])
    rows_by_line = {}
    if chosen_lines:
        for number, line in iterate_lines(path, survey):
            if number in chosen_lines:
                rows_by_line[number] = _parse_row(line)
    return rows_by_line


def _describe_phase(survey: RolloutSurvey, phase_index: int) -> dict:
    """Return the phase's name, steps and how many of its rows have tokens."""
    # A phase begins behind the last step of the one before; thirds are rounded up.
    previous_last = -(-survey.last * phase_index // len(PHASES))
    last = -(-survey.last * (phase_index + 1) // len(PHASES))
    traced = survey.traced[phase_index]
    return dict(
        name=PHASES[phase_index],
        first=previous_last + 1,
        last=last,
        logged=len(traced),
        idle=sum(rollout.advantage == 0 for rollout in traced),
        steps=len({rollout.step for rollout in traced}),
    )


def choose_rollouts(rows: list[TracedRollout]) -> list[tuple[str, TracedRollout]]:
    """Choose the best, median and worst rollouts: (rank, row), one per prompt.

    They are ranked by reward, then advantage. Rows with an advantage are preferred to those
    without. The median counts rollouts, not rows.
    """
    if not rows:
        return []
    rows_with_advantage = [row for row in rows if row.advantage != 0]
    ranked = sorted(rows_with_advantage or rows)
    counts = [row.count for row in ranked]
    median_index = int(np.searchsorted(np.cumsum(counts), sum(counts) / 2))
    by_distance = sorted(range(len(ranked)), key=lambda index: abs(index - median_index))

    chosen_prompts: set[str] = set()
    best = _take_new_prompts(reversed(ranked), chosen_prompts)
    worst = _take_new_prompts(ranked, chosen_prompts)
    median = _take_new_prompts([ranked[index] for index in by_distance], chosen_prompts)
    chosen = []
    for rank, rollouts in zip(RANKS, (best, median, worst)):
        chosen += [(rank, rollout) for rollout in rollouts]
    return chosen


def _take_new_prompts(
    rows: Iterable[TracedRollout], chosen_prompts: set[str]
) -> list[TracedRollout]:
    """Return the first rows whose prompts were not chosen yet, and mark these prompts as chosen."""
    rollouts: list[TracedRollout] = []
    for row in rows:
        if len(rollouts) == ROLLOUTS_PER_RANK:
            break
        if row.prompt not in chosen_prompts:
            chosen_prompts.add(row.prompt)
            rollouts.append(row)
    return rollouts


class TokenView:
    """Turn rows with per-token values into what the page shows of them."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase | None):
        self.config = config
        self.tokenizer = tokenizer
        self.note = ""
        self.objective: Objective | None = None
        try:
            self.objective = resolve_objective(config.loss, config.model)
        except ConfigError as e:  # a loss of the user's own whose file is not here
            self.note = f"Which tokens the clip stopped cannot be said: {e}."

    def show(self, row: dict, group: list[dict], queries: dict[str, str]) -> dict:
        """Return what the page shows of a rollout.

        Args:
            row: the rollout's row of the log.
            group: the rows of its group, this one among them.
            queries: {id: text} where known.

        Raises:
            DataError: its tokens and their values do not match.
        """
        values = _get_token_values(row)
        is_clipped, text_ratio = self.find_clipped(row, values)
        ratios = []
        new_values = values["trainer_logp"]
        old_values = values["old_logp"]
        assert new_values is not None and old_values is not None  # REQUIRED_TOKEN_VALUES
        for new_logp, old_logp in zip(new_values, old_values):
            log_ratio = min(700.0, new_logp - old_logp)  # exp of more is infinite
            ratios.append(float(np.exp(log_ratio)))
        shown_values = {}
        for name, token_values in values.items():
            shown_values[name] = token_values and _shorten_values(token_values[:MAX_TOKENS])
        prompt_pieces = self.split_text(row["prompt_ids"])
        pieces = self.split_text(row["ids"])
        return dict(
            step=row["step"],
            prompt=row["prompt"],
            query=queries.get(row["prompt"]),
            count=row["count"],
            reward=row["reward"],
            reward_terms=row["reward_terms"],
            error=row["error"],
            advantage=row["advantage"],
            finished=row["finished"],
            total=len(row["ids"]),
            prompt_text="".join(prompt_pieces[-MAX_TOKENS:]),
            ids=row["ids"][:MAX_TOKENS],
            pieces=pieces[:MAX_TOKENS],
            ratio=_shorten_values(ratios[:MAX_TOKENS]),
            clipped=is_clipped and is_clipped[:MAX_TOKENS],
            text_ratio=text_ratio,
            **shown_values,
            group=_describe_group(row, group),
        )

    def find_clipped(self, row: dict, values: dict) -> tuple[list[bool] | None, float | None]:
        """Find the tokens that the clip stopped, by the run's own loss.

        They are the tokens with an advantage whose surrogate has no gradient.

        Returns:
            whether each token is clipped, None where the loss is not known; and the ratio of the
            full text where the loss has one.
        """
        if self.objective is None:
            return None, None
        prompt = Prompt(row["prompt"], 0, "", tuple(row["prompt_ids"]))
        rollout = Rollout(
            prompt=prompt,
            group=0,
            sibling=0,
            ids=tuple(row["ids"]),
            sampler_logp=tuple(row["sampler_logp"]),
            finished=row["finished"],
        )
        num_tokens = len(row["prompt_ids"]) + len(row["ids"])
        [batch] = pack_rollouts([rollout], num_tokens)
        old_logp = torch.tensor(values["old_logp"], dtype=torch.float64)  # (N,)
        logp = torch.tensor(values["trainer_logp"], dtype=torch.float64)  # (N,)
        logp.requires_grad_()
        advantages = torch.full_like(old_logp, row["advantage"])
        batch = replace(batch, advantages=advantages, old_logp=old_logp)

        # Clipping makes a token's surrogate constant.
        surrogate = self.objective.surrogate(logp, old_logp, batch, self.config.loss)
        [grad_surrogate] = torch.autograd.grad(surrogate.sum(), [logp])
        is_clipped = (grad_surrogate == 0) & (batch.advantages != 0)
        text_ratio = None
        if self.objective.surrogate is sequence_clipped_surrogate:
            mean_log_ratio = (logp.detach() - old_logp).mean()
            text_ratio = float(mean_log_ratio.exp())
        return is_clipped.tolist(), text_ratio

    def split_text(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token.

        A character whose bytes are spread over several tokens belongs to the token that ends it.
        """
        if self.tokenizer is None:
            return [f"[{id}]" for id in ids]
        pieces = []
        pending_ids = []
        shown_text = ""
        is_incomplete = False
        for id in ids:
            pending_ids.append(id)
            text = self._decode(pending_ids)
            is_incomplete = text.endswith("\ufffd") and len(pending_ids) < 8
            if is_incomplete:
                pieces.append("")
                continue
            pieces.append(text[len(shown_text) :])
            # Keep one token of context: a decoder may need it.
            pending_ids = [id]
            shown_text = self._decode(pending_ids)
            if shown_text.endswith("\ufffd"):
                pending_ids = []
                shown_text = ""
        if is_incomplete:  # the text ends in bytes that never became a character
            pieces[-1] = text[len(shown_text) :]
        return pieces

    def _decode(self, ids: list[int]) -> str:
        assert self.tokenizer is not None
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # of one list of ids
        return text


def _get_token_values(row: dict) -> dict[str, list[float] | None]:
    """Return {name: a value per token}, None for values that the run did not log."""
    values = {name: row.get(name) for name in TOKEN_VALUES}
    for name, token_values in values.items():
        if token_values is None and name not in REQUIRED_TOKEN_VALUES:
            continue
        if len(token_values or ()) != len(row["ids"]):
            raise DataError(
                f"rollouts.jsonl.gz: step {row['step']}, {row['prompt']!r}: "
                "its tokens and their log-probs do not match; the run's log is damaged"
            )
    return values


def _describe_group(row: dict, group: list[dict]) -> dict:
    """Return the rewards of a rollout's group, and its siblings, the highest reward first."""
    rewards = np.repeat(
        [sibling["reward"] for sibling in group], [sibling["count"] for sibling in group]
    )
    by_reward = sorted(group, key=lambda sibling: -sibling["reward"])
    siblings = []
    for sibling in by_reward[:MAX_SIBLINGS]:
        siblings.append(
            dict(
                text=sibling["text"][:MAX_CHARS],
                count=sibling["count"],
                reward=sibling["reward"],
                advantage=sibling["advantage"],
                error=sibling["error"],
                own=sibling is row,
            )
        )
    return dict(
        size=len(rewards),
        mean=float(rewards.mean()),
        std=float(rewards.std(ddof=1)) if len(rewards) > 1 else 0.0,
        siblings=siblings,
    )


def audit_rollouts(survey: RolloutSurvey, queries: dict[str, str], task: str) -> list[dict]:
    """Return the rollouts of highest reward of each phase, one per query, with their flags."""
    audited = []
    for phase, heap in zip(PHASES, survey.highest):
        rows_by_prompt: dict[str, dict] = {}
        for *_, row in sorted(heap, key=lambda item: item[:3], reverse=True):
            if len(rows_by_prompt) == MAX_AUDITED:
                break
            if row["prompt"] not in rows_by_prompt:
                rows_by_prompt[row["prompt"]] = row
        audited += [
            _audit_row(survey, queries, task, phase, row) for row in rows_by_prompt.values()
        ]
    return sorted(audited, key=lambda row: (-row["reward"], -row["advantage"], row["step"]))


def _audit_row(
    survey: RolloutSurvey, queries: dict[str, str], task: str, phase: str, row: dict
) -> dict:
    """Return what the audit shows of a rollout."""
    answer = extract_answer(row, survey.key)
    query = queries.get(row["prompt"])
    answer_count = AnswerCount()
    if answer is not None:
        answer_count = survey.answers.get(answer, answer_count)
    return dict(
        phase=phase,
        step=row["step"],
        prompt=row["prompt"],
        query=query,
        answer=answer and answer[:MAX_CHARS],
        text=row["text"][:MAX_CHARS],
        error=row["error"],
        reward=row["reward"],
        reward_terms=row["reward_terms"],
        advantage=row["advantage"],
        flags=list_flags(query, answer, row, len(answer_count.prompts), task),
    )


def list_flags(
    query: str | None, answer: str | None, row: dict, prompts: int, task: str
) -> list[str]:
    """List what is conspicuous about a rollout and should be looked at twice.

    Words are what stands between blanks, in lower case.

    Args:
        query: the prompt's text, None where it is not known.
        row: the rollout's row of the log.
        prompts: how many different prompts got the same answer.
    """
    words = (answer or "").lower().split()
    query_words = set((query or "").lower().split())
    has_labels = hasattr(TASKS.get(task), "key")
    flags = []

    # The answer beside the query, or beside the list that was given.
    if words and not has_labels:
        word, frequency = Counter(words).most_common(1)[0]
        if frequency >= 3:
            flags.append(f"'{word[:20]}' {frequency} times")
    if task == "product_search" and query_words and words:
        if not query_words & set(words):
            flags.append("no word of the query")
        if len(words) > max(8, 3 * len(query_words)):
            flags.append(f"{len(words)} words for {len(query_words)}")
    if has_labels:
        labels = (answer or "").split(", ")
        given_labels = [f"Item_{place}" for place in range(1, len(labels) + 1)]
        if len(labels) > 1 and labels == given_labels:
            flags.append("the given order")

    # The answer and the text by themselves.
    if prompts >= 3:
        flags.append(f"answer to {prompts} queries")
    if words and not re.search(r"\w", answer or ""):
        flags.append("no letter or digit")
    if not all(character.isprintable() or character in "\n\t" for character in row["text"]):
        flags.append("control characters")
    if not row["finished"]:
        flags.append("cut")
    if answer is None:
        flags.append("no answer")
    return flags


def measure_repeats(before: list[dict], after: list[dict]) -> dict | None:
    """Measure stuffing: the share of an answer's words that stood in it before, as a mean over the
    test answers that are texts.

    Words are what stands between blanks, in lower case.

    Args:
        before, after: the rows of eval_before.jsonl and eval_after.jsonl.

    Returns:
        {"before", "after": mean shares, "flagged": whether the policy has learned to stuff}; None
        where there is no such answer on both sides.
    """
    shares_before = [_measure_share(row["rewrite"]) for row in before if _is_text(row["rewrite"])]
    shares_after = [_measure_share(row["rewrite"]) for row in after if _is_text(row["rewrite"])]
    if not shares_before or not shares_after:
        return None
    mean_before = float(np.mean(shares_before))
    mean_after = float(np.mean(shares_after))
    is_flagged = mean_after >= STUFFING and mean_after > mean_before
    return dict(before=mean_before, after=mean_after, flagged=is_flagged)


def _is_text(answer: object) -> bool:
    return isinstance(answer, str) and bool(answer.split())


def _measure_share(answer: str) -> float:
    """Return the share of the words that repeat an earlier one."""
    words = answer.lower().split()
    return 1 - len(set(words)) / len(words)


def list_recurring(survey: RolloutSurvey, queries: dict[str, str]) -> list[dict]:
    """Return the answers given to the most different prompts.

    A policy that has found a trick gives the same answer to all prompts.
    """
    repeated = []
    for answer, count in survey.answers.items():
        num_prompts = len(count.prompts)
        if num_prompts > 1:
            repeated.append((-num_prompts, -count.num_rollouts, answer))
    recurring = []
    for negative_prompts, _, answer in sorted(repeated)[:MAX_RECURRING]:
        count = survey.answers[answer]
        example_ids = sorted(count.prompts)[:3]
        recurring.append(
            dict(
                answer=answer[:MAX_CHARS],
                prompts=-negative_prompts,
                rollouts=count.num_rollouts,
                reward=count.reward_sum / count.num_rollouts,
                last=count.last_step,
                examples=[queries.get(id, id)[:80] for id in example_ids],
            )
        )
    return recurring


def make_histogram(rewards: list[Counter]) -> dict:
    """Count rollouts by reward in each phase: {"edges": (B + 1,), "counts": {phase: (B,)}}.

    B is NUM_BINS. Returns {} where there are no rewards.
    """
    values = set().union(*rewards)
    if not values:
        return {}
    low = min(values)
    high = max(values)
    if not high > low:
        high = low + 1
    edges = np.linspace(low, high, NUM_BINS + 1)
    counts = {}
    for phase, counter in zip(PHASES, rewards):
        if counter:
            histogram, _ = np.histogram(list(counter), edges, weights=list(counter.values()))
            counts[phase] = histogram.tolist()
        else:
            counts[phase] = [0] * NUM_BINS
    return dict(edges=_shorten_values(edges.tolist()), counts=counts)


def _shorten_values(values: list[float]) -> list[float]:
    """Round to six digits."""
    return [float(f"{value:.6g}") for value in values]
