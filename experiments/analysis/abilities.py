"""Measure what models can do at all, before and after training, without a hub.

python experiments/analysis/abilities.py --initial DIR --model NAME=DIR [--model ...] --out DIR

Does training for search cost a model its general abilities? Four parts, each on fixed texts
(ability_texts.py, verifiable.py):

  perplexity     cross-entropy in nats per token and per byte: plots, products, neutral text
  kl             KL(initial || model) of the next token, exact over the vocabulary, on answers that
                 the initial model has sampled to neutral prompts: nats per token
  instructions   share of prompts whose constraint the greedy answer fulfils, as a program checks
  next_sentence  share of questions where the next sentence is more likely, per byte, than three
                 sentences of other texts: plots, neutral text

The last two are sets of our own in the manner of IFEval and HellaSwag: compare models on them,
never a figure with one that was published. audit.py runs the published sets, where the hub is in
reach.

All models read the same tokens. Differences are paired by passage, prompt or question, and have
95% bootstrap intervals. DIR/NAME/PART.json has a part's rows and stays: the same command goes on
where it was stopped, and measures again only what was measured on something else. The figures are
in DIR/abilities.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from ability_texts import Question, make_passages, make_questions, read_neutral_prompts
from tqdm import tqdm
from verifiable import Instruction, make_instructions

from recr1.cli import parse_positive
from recr1.config.schema import ConfigError
from recr1.data.chat_template import ChatTemplate
from recr1.data_types import MicroBatch, Prompt, Rollout
from recr1.distributed import collectives as dist
from recr1.distributed.fsdp import unsharded
from recr1.distributed.printing import print_rank0
from recr1.evaluation.evaluate import compute_mean_ci, get_column
from recr1.model.decoder import AnyDecoder
from recr1.model.log_probs import (
    HeadInputs,
    compute_head_inputs,
    compute_log_probs,
    make_distribution,
)
from recr1.rl.packing import pack_rollouts
from recr1.sampling.generate import generate
from recr1.training.launch import run_command
from recr1.training.load_model import load_reference
from recr1.utils.counter_rng import draw_uniforms
from recr1.utils.files import fingerprint_file, write_text
from recr1.utils.hf_hub import load_tokenizer, read_stop_token_ids, resolve_model_folder

INITIAL = "initial"

# How much of each text source, and how long sampled texts may become. Less than 100,000 tokens go
# through a model: sizes meant for a model of 135 M parameters on 2 cores.
NUM_PASSAGES = dict(plots=100, products=100, neutral=200)
NUM_QUESTIONS = dict(plots=120, neutral=120)
CONTINUATION_TOKENS = 48
ANSWER_TOKENS = 128
SEED = 0

ROWS_PER_BATCH = 2048  # packed rows of a forward pass
LOGIT_ROWS = 256  # rows whose logits are in memory at a time


# --- Models and texts -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A model that is measured: where it is, and what its files are."""

    name: str
    folder: str
    tokenizer: Any
    files: dict[str, str]  # SHA-256 by name

    def load(self) -> AnyDecoder:
        """Load the model, in float32."""
        return load_reference(self.folder, len(self.tokenizer), torch.float32)


@dataclass(frozen=True)
class Texts:
    """What is measured on. A passage and a question have the name of their source before them."""

    passages: list[tuple[str, str]]
    questions: list[tuple[str, Question]]
    instructions: list[Instruction]
    neutral_prompts: list[str]


@dataclass(frozen=True)
class Tokens:
    """The texts as ids. What is scored is a rollout behind a prompt: nothing is sampled of it."""

    passages: list[Rollout]
    choices: list[Rollout]  # those of a question are siblings
    instructions: list[Prompt]
    neutral_prompts: list[Prompt]


def open_subject(name: str, path: str) -> Subject:
    """Find a model's folder and read its tokenizer."""
    folder = resolve_model_folder(path, key=f"the folder of {name}")
    tokenizer = load_tokenizer(folder)
    files = {}
    for file in [Path(folder, "config.json"), *sorted(Path(folder).glob("*.safetensors"))]:
        files[file.name] = fingerprint_file(file)["sha256"]
    return Subject(name, folder, tokenizer, files)


def collect_texts(limit: int | None) -> Texts:
    """Collect all texts; at most `limit` of each kind and source."""
    passages = []
    for source, count in NUM_PASSAGES.items():
        for passage in make_passages(source, min(count, limit or count)):
            passages.append((source, passage))
    questions = []
    for source, count in NUM_QUESTIONS.items():
        for question in make_questions(source, min(count, limit or count)):
            questions.append((source, question))
    return Texts(
        passages=passages,
        questions=questions,
        instructions=make_instructions()[:limit],
        neutral_prompts=read_neutral_prompts()[:limit],
    )


def encode_texts(texts: Texts, tokenizer: Any) -> Tokens:
    """Encode all texts.

    Plain text begins with what the tokenizer itself puts before a text: a BOS, or nothing. So the
    first token of a passage is read and not scored.
    """
    chat = ChatTemplate(tokenizer, system="", user="{query}", assistant="")
    start_ids = tokenizer("")["input_ids"]

    passages = []
    for index, (source, text) in enumerate(texts.passages):
        first_id, *ids = chat.user_ids(text)
        prompt = Prompt(source, index, text, (*start_ids, first_id))
        passages.append(make_rollout(prompt, 0, ids))
    choices = []
    for index, (source, question) in enumerate(texts.questions):
        context_ids = chat.user_ids(question.context)
        prompt = Prompt(source, index, question.context, (*start_ids, *context_ids))
        for sibling, choice in enumerate(question.choices):
            choices.append(make_rollout(prompt, sibling, chat.user_ids(" " + choice)))

    instructions = []
    for index, instruction in enumerate(texts.instructions):
        text = instruction.prompt
        instructions.append(Prompt(instruction.kind, index, text, chat.prompt(text)))
    neutral_prompts = []
    for index, text in enumerate(texts.neutral_prompts):
        neutral_prompts.append(Prompt("neutral", index, text, chat.prompt(text)))
    return Tokens(passages, choices, instructions, neutral_prompts)


def make_rollout(prompt: Prompt, sibling: int, ids: list[int]) -> Rollout:
    """Make a text that stands behind a prompt into a rollout, to be packed and scored."""
    no_logp = (0.0,) * len(ids)  # nothing has sampled it
    return Rollout(prompt, prompt.index, sibling, tuple(ids), no_logp, finished=True)


def check_same_tokens(subject: Subject, texts: Texts, tokens: Tokens) -> None:
    """Raise ConfigError unless the model's tokenizer makes the initial model's tokens."""
    if encode_texts(texts, subject.tokenizer) != tokens:
        raise ConfigError(
            f"{subject.folder}: its tokenizer or chat template makes other ids of the texts than "
            "the initial model's; nothing could be paired: take models of one tokenizer"
        )


# --- The four parts: rows of a model --------------------------------------------------------------


@dataclass
class Audit:
    """Measure models on the same tokens."""

    initial: Subject
    texts: Texts
    tokens: Tokens
    out: Path

    @cached_property
    def stops(self) -> frozenset[int]:
        """Return the ids that end an answer."""
        return read_stop_token_ids(self.initial.folder, self.initial.tokenizer)

    @cached_property
    def continuations(self) -> list[Rollout]:
        """Return what the initial model has answered to the neutral prompts."""
        rows = measure_parts(self, self.initial, dict(continuations=sample_continuations))
        rollouts = []
        for prompt, row in zip(self.tokens.neutral_prompts, rows["continuations"]):
            rollouts.append(make_rollout(prompt, 0, row["ids"]))
        return rollouts

    @cached_property
    def initial_states(self) -> list[HeadInputs]:
        """Return what the initial model's head reads at the continuations' tokens."""
        return compute_states(self.initial.load(), self.continuations, f"{INITIAL}: states")

    def get_inputs(self, part: str) -> dict:
        """Return what a part's rows depend on beside the model."""
        inputs: dict[str, Any] = dict(torch=torch.__version__, device=str(dist.device()))
        if part == "perplexity":
            return inputs | dict(tokens=hash_ids(self.tokens.passages))
        if part == "next_sentence":
            return inputs | dict(tokens=hash_ids(self.tokens.choices))
        if part == "kl":
            return inputs | dict(tokens=hash_ids(self.continuations), initial=self.initial.files)
        if part == "instructions":
            return inputs | dict(tokens=hash_ids(self.tokens.instructions), limit=ANSWER_TOKENS)
        tokens = hash_ids(self.tokens.neutral_prompts)
        return inputs | dict(tokens=tokens, limit=CONTINUATION_TOKENS, seed=SEED)

    def decode(self, rollout: Rollout) -> str:
        """Return a rollout's text, without its end token."""
        ids = [id for id in rollout.ids if id not in self.stops]
        return self.initial.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


Measure = Callable[[Audit, AnyDecoder, str], list[dict]]


def hash_ids(items: list[Rollout] | list[Prompt]) -> str:
    """Return the SHA-256 of the ids of prompts, or of rollouts and their prompts."""
    ids = []
    for item in items:
        if isinstance(item, Rollout):
            ids.append(item.prompt.ids)
        ids.append(item.ids)
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def sample_continuations(audit: Audit, model: AnyDecoder, title: str) -> list[dict]:
    """Sample an answer to each neutral prompt: a row {prompt, ids, text}.

    Sampled, not greedy: the mean of KL(initial || model) over such texts is that of the models.
    """
    prompts = audit.tokens.neutral_prompts
    numbers = np.arange(len(prompts))
    uniforms = draw_uniforms(SEED, 0, numbers, siblings=1, tokens=CONTINUATION_TOKENS)
    rollouts = answer_prompts(audit, model, prompts, CONTINUATION_TOKENS, uniforms, title)
    rows = []
    for rollout in rollouts:
        text = audit.decode(rollout)
        rows.append(dict(prompt=rollout.prompt.text, ids=list(rollout.ids), text=text))
    return rows


def measure_perplexity(audit: Audit, model: AnyDecoder, title: str) -> list[dict]:
    """Measure the passages: a row {source, tokens, bytes, nats} of each."""
    rollouts = audit.tokens.passages
    logps = score_rollouts(model, rollouts, title)
    rows = []
    for (source, _), rollout, logp in zip(audit.texts.passages, rollouts, logps):
        num_bytes = len(audit.decode(rollout).encode())
        nats = -float(logp)
        rows.append(dict(source=source, tokens=len(rollout.ids), bytes=num_bytes, nats=nats))
    return rows


def measure_next_sentence(audit: Audit, model: AnyDecoder, title: str) -> list[dict]:
    """Answer the questions: a row {source, nats_per_byte, answer, correct} of each.

    The choice is that of the greatest log-likelihood per byte, as lm-evaluation-harness'
    `acc_norm`.
    """
    logps = score_rollouts(model, audit.tokens.choices, title)
    rows = []
    start = 0
    for source, question in audit.texts.questions:
        end = start + len(question.choices)
        num_bytes = [len(choice.encode()) for choice in question.choices]
        nats_per_byte = -logps[start:end] / num_bytes
        is_correct = int(nats_per_byte.argmin()) == question.answer
        rows.append(
            dict(
                source=source,
                nats_per_byte=nats_per_byte.tolist(),
                answer=question.answer,
                correct=is_correct,
            )
        )
        start = end
    return rows


def measure_instructions(audit: Audit, model: AnyDecoder, title: str) -> list[dict]:
    """Let the model answer and check the answers: a row {kind, prompt, answer, followed} of each.

    An answer that is cut at ANSWER_TOKENS is checked as it is.
    """
    prompts = audit.tokens.instructions
    rollouts = answer_prompts(audit, model, prompts, ANSWER_TOKENS, None, title)
    rows = []
    for instruction, rollout in zip(audit.texts.instructions, rollouts):
        answer = audit.decode(rollout)
        rows.append(
            dict(
                kind=instruction.kind,
                prompt=instruction.prompt,
                answer=answer,
                followed=instruction.is_followed(answer),
            )
        )
    return rows


def measure_kl(audit: Audit, model: AnyDecoder, title: str) -> list[dict]:
    """Measure KL(initial || model) on the initial model's continuations: a row {tokens, nats} of
    each.
    """
    rollouts = audit.continuations
    initial_states = audit.initial_states
    states = compute_states(model, rollouts, title)
    totals = torch.zeros(len(rollouts), dtype=torch.float64)
    for batch, initial_inputs, inputs in zip(pack(rollouts), initial_states, states):
        add_per_rollout(totals, batch, compute_exact_kl(initial_inputs, inputs))
    rows = []
    for rollout, nats in zip(rollouts, totals.tolist()):
        rows.append(dict(tokens=len(rollout.ids), nats=nats))
    return rows


PARTS: dict[str, Measure] = dict(
    perplexity=measure_perplexity,
    kl=measure_kl,
    instructions=measure_instructions,
    next_sentence=measure_next_sentence,
)


# --- What the parts compute -----------------------------------------------------------------------


def pack(rollouts: list[Rollout]) -> list[MicroBatch]:
    """Pack rollouts for forward passes."""
    return pack_rollouts(rollouts, ROWS_PER_BATCH, dist.device())


def add_per_rollout(totals: torch.Tensor, batch: MicroBatch, values: torch.Tensor) -> None:
    """Add one value of each of the batch's tokens, (N,), to the total of its rollout, (R,)."""
    totals.index_add_(0, batch.rollout.cpu(), values.double().cpu())


def score_rollouts(model: AnyDecoder, rollouts: list[Rollout], title: str) -> np.ndarray:
    """Compute the log-likelihood of each rollout behind its prompt, (R,) nats."""
    totals = torch.zeros(len(rollouts), dtype=torch.float64)
    with unsharded(model):
        for batch in tqdm(pack(rollouts), desc=title, disable=None, leave=False):
            logp, _ = compute_log_probs(model, batch, temperature=1.0)
            add_per_rollout(totals, batch, logp)
    return totals.numpy()


def compute_states(model: AnyDecoder, rollouts: list[Rollout], title: str) -> list[HeadInputs]:
    """Compute what the head reads, of each packed batch."""
    states = []
    with unsharded(model), model.root():
        for batch in tqdm(pack(rollouts), desc=title, disable=None, leave=False):
            states.append(compute_head_inputs(model, batch))
    return states


@torch.no_grad()
def compute_exact_kl(p: HeadInputs, q: HeadInputs) -> torch.Tensor:
    """Compute KL(p || q) = sum_v p(v) (log p(v) - log q(v)) of every position, (N,) nats."""
    chunks = []
    for start in range(0, len(p.hidden), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        log_p = compute_log_distribution(p, rows)
        log_q = compute_log_distribution(q, rows)
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="none")  # (rows, V)
        chunks.append(kl.sum(-1))
    return torch.cat(chunks)


def compute_log_distribution(inputs: HeadInputs, rows: slice) -> torch.Tensor:
    """Compute the log-probs of all ids at some of the positions, (rows, V)."""
    logits = inputs.hidden[rows] @ inputs.weight.T
    distribution = make_distribution(logits, temperature=1.0)
    return distribution.scaled - distribution.logsumexp


def answer_prompts(
    audit: Audit,
    model: AnyDecoder,
    prompts: list[Prompt],
    max_new_tokens: int,
    uniforms: np.ndarray | None,
    title: str,
) -> list[Rollout]:
    """Answer every prompt once; greedily without `uniforms`. The bar's end is the most that can
    come: it is reached only where no answer ends by itself.
    """
    most = len(prompts) * max_new_tokens
    bar = tqdm(total=most, desc=title, unit="token", disable=None, leave=False)
    with unsharded(model), bar:
        return generate(
            model,
            prompts,
            1,
            1.0,
            max_new_tokens,
            audit.stops,
            uniforms,
            on_token=lambda sequence, id: bar.update(),
        )


# --- Rows on the disk -----------------------------------------------------------------------------


def measure_parts(
    audit: Audit, subject: Subject, parts: dict[str, Measure]
) -> dict[str, list[dict]]:
    """Return the rows of every part of a model; those that are stored are read, the others
    measured and stored.
    """
    rows_by_part = {}
    model = None
    for part, measure in parts.items():
        path = audit.out / subject.name / f"{part}.json"
        made_of = dict(model=subject.files) | audit.get_inputs(part)
        rows = read_rows(path, made_of)
        if rows is None:
            title = f"{subject.name}: {part}"
            model = model or subject.load()
            start = time.perf_counter()
            rows = measure(audit, model, title)
            seconds = time.perf_counter() - start
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(dict(made_of=made_of, seconds=seconds, rows=rows), indent=1)
            write_text(path, text + "\n")
            print_rank0(f"{title}, {len(rows)} rows, {seconds:.1f} s")
        rows_by_part[part] = rows
    return rows_by_part


def read_rows(path: Path, made_of: dict) -> list[dict] | None:
    """Return the stored rows of a part; None where there are none, or none of this model on these
    tokens. Raises ConfigError.
    """
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_bytes())
        if stored["made_of"] == made_of:
            return stored["rows"]
    except (ValueError, TypeError, KeyError) as e:
        raise ConfigError(
            f"{path}: not a file that this script has written ({type(e).__name__}: {e}); "
            "delete it, or give another --out"
        ) from None
    print_rank0(f"{path}: measured on another model or on other texts; measured again")
    return None


# --- Figures --------------------------------------------------------------------------------------


class Ability(NamedTuple):
    """A figure: sum(total) / sum(weight) over the rows of a part and source."""

    name: str
    part: str
    source: str | None
    total: str
    weight: str | None  # None: 1 for each row
    higher_is_better: bool


ABILITIES = (
    Ability("nats per token, plots", "perplexity", "plots", "nats", "tokens", False),
    Ability("nats per token, products", "perplexity", "products", "nats", "tokens", False),
    Ability("nats per token, neutral", "perplexity", "neutral", "nats", "tokens", False),
    Ability("nats per byte, plots", "perplexity", "plots", "nats", "bytes", False),
    Ability("nats per byte, products", "perplexity", "products", "nats", "bytes", False),
    Ability("nats per byte, neutral", "perplexity", "neutral", "nats", "bytes", False),
    Ability("KL(initial || model)", "kl", None, "nats", "tokens", False),
    Ability("instructions followed", "instructions", None, "followed", None, True),
    Ability("next sentence, plots", "next_sentence", "plots", "correct", None, True),
    Ability("next sentence, neutral", "next_sentence", "neutral", "correct", None, True),
)


def make_figures(results: dict[str, dict[str, list[dict]]]) -> list[dict]:
    """Return the figures of every ability: each model's mean and interval, and the paired
    difference of every two models, the later minus the earlier one.

    results: {model: {part: rows}}.
    """
    figures = []
    for ability in ABILITIES:
        values_by_model = {}
        for name, rows_by_part in results.items():
            values_by_model[name] = make_values(rows_by_part[ability.part], ability)

        models = {}
        for name, values in values_by_model.items():
            mean, interval = compute_mean_ci(values)
            models[name] = dict(mean=mean, ci95=interval)
        differences = []
        for earlier, later in combinations(results, 2):
            change = values_by_model[later] - values_by_model[earlier]
            mean, interval = compute_mean_ci(change)
            differences.append(dict(models=[later, earlier], mean=mean, ci95=interval))
        figures.append(
            dict(
                ability=ability.name,
                higher_is_better=ability.higher_is_better,
                n=len(values),
                models=models,
                differences=differences,
            )
        )
    return figures


def make_values(rows: list[dict], ability: Ability) -> np.ndarray:
    """Return one value of each row, (n,), whose mean is the figure, sum(total) / sum(weight).

    A row's value is linear in its own total and weight, so that the bootstrap of the mean is that
    of the ratio, to first order: ratio + (total - ratio * weight) / mean(weight). (Cochran 1977,
    section 6.4)
    """
    selected = [row for row in rows if ability.source in (None, row.get("source"))]
    total = get_column(selected, ability.total)
    if ability.weight is None:
        return total
    weight = get_column(selected, ability.weight)
    ratio = total.sum() / weight.sum()
    return ratio + (total - ratio * weight) / weight.mean()


def count_kinds(results: dict[str, dict[str, list[dict]]]) -> dict[str, dict[str, float]]:
    """Return {kind of instruction: {model: share that it has followed}}."""
    shares: dict[str, dict[str, float]] = {}
    for name, rows_by_part in results.items():
        followed_by_kind: dict[str, list[bool]] = {}
        for row in rows_by_part["instructions"]:
            followed_by_kind.setdefault(row["kind"], []).append(row["followed"])
        for kind, followed in followed_by_kind.items():
            shares.setdefault(kind, {})[name] = sum(followed) / len(followed)
    return shares


def format_table(figures: list[dict], names: list[str]) -> str:
    """Format a block of lines for every two models."""
    lines = []
    for number, (earlier, later) in enumerate(combinations(names, 2)):
        lines.append(
            f"{'ability':<26}{'n':>5}{earlier[:12]:>13}{later[:12]:>13}   "
            f"{later} - {earlier} [95% interval]"
        )
        for figure in figures:
            models = figure["models"]
            difference = figure["differences"][number]
            low, high = difference["ci95"]
            lines.append(
                f"{figure['ability']:<26}{figure['n']:>5}"
                f"{models[earlier]['mean']:13.4f}{models[later]['mean']:13.4f}   "
                f"{difference['mean']:+.4f} [{low:+.4f}, {high:+.4f}]"
            )
        lines.append("")
    lines.append(
        "Nats: less is better; shares: more. Instructions and next sentences are sets of our own, "
        "in the manner of IFEval and HellaSwag."
    )
    return "\n".join(lines)


# --- The command ----------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--initial",
        metavar="DIR",
        required=True,
        help="the model before training: a Hugging Face folder or hub id",
    )
    parser.add_argument(
        "--model",
        metavar="NAME=DIR",
        type=parse_model,
        action="append",
        required=True,
        help="a model after training, and what to call it; may be given many times",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument(
        "--limit",
        type=parse_positive,
        metavar="N",
        help="only the first N of each kind of text: to try it, not to report it",
    )
    return parser


def parse_model(text: str) -> tuple[str, str]:
    """Parse NAME=DIR. Raises argparse.ArgumentTypeError."""
    name, _, folder = text.partition("=")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or not folder:
        raise argparse.ArgumentTypeError(
            f"must be NAME=DIR, NAME of letters, digits, '_', '.' and '-', is {text!r}"
        )
    return name, folder


def check_names(names: list[str]) -> None:
    """Raise ConfigError where two models have one name: their files would be the same."""
    for name in names:
        if names.count(name) > 1:
            what = "is the name of the initial model" if name == INITIAL else "names two models"
            raise ConfigError(f"--model: {name!r} {what}; give each model a name of its own")


def main(argv: list[str]) -> None:
    """Measure all models, write their figures and print the table."""
    args = build_parser().parse_args(argv)
    if dist.world_size() > 1:
        raise ConfigError("abilities.py runs in one process; start it without torchrun")
    models = [(INITIAL, args.initial), *args.model]
    names = [name for name, _ in models]
    check_names(names)
    initial, *others = [open_subject(name, folder) for name, folder in models]
    texts = collect_texts(args.limit)
    audit = Audit(initial, texts, encode_texts(texts, initial.tokenizer), args.out)
    for subject in others:
        check_same_tokens(subject, texts, audit.tokens)

    results = {}
    about_models = {}
    for subject in (initial, *others):
        results[subject.name] = measure_parts(audit, subject, PARTS)
        about_models[subject.name] = dict(folder=subject.folder, files=subject.files)
    figures = make_figures(results)
    result = dict(
        settings=collect_settings(args.limit),
        models=about_models,
        figures=figures,
        instructions_by_kind=count_kinds(results),
    )
    write_text(args.out / "abilities.json", json.dumps(result, indent=1) + "\n")
    print_rank0(format_table(figures, names))


def collect_settings(limit: int | None) -> dict:
    """Return what all figures depend on beside the models."""
    return dict(
        limit=limit,
        passages=NUM_PASSAGES,
        questions=NUM_QUESTIONS,
        continuation_tokens=CONTINUATION_TOKENS,
        answer_tokens=ANSWER_TOKENS,
        seed=SEED,
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        device=str(dist.device()),
    )


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
