"""Make a teacher's file without a retriever or another model, and without labels unless asked to.

python experiments/make/cold_start.py CONFIG.yaml --out F.jsonl [options] [a.b=value ...]

What a policy needs before GRPO is the form of an answer and some variety in it; GRPO is to find out
what is a good answer. Each train query (validation left out) gets the answer that takes no policy,
stirred: for a list the given order, each candidate put behind its successor with probability
--stir; for a query its words, each left out with a quarter of that, one of them said again at the
end with that; for a history a title of it, the older ones the less often.

    --target         a query is made of the title of its target: SFT on the train judgements
    --answers F      the answers of another teacher's file, as they are
    --thought        the thought holds the query's words in another order (else it is empty)
    --thought title  the thought names the title of the target, from the train judgements
    --most N         items of a list that need not be whole
    --copies N       answers for each query, each stirred otherwise: few queries, learned for many
                     epochs, would be learned by heart
    --queries N      of the train queries only so many, drawn by --seed (0: all)

The target is the query's first relevant document; queries that have none are then left out. Where
the config's prompt closes the thought, the texts are the answers alone.

python -m recr1.sft CONFIG.yaml sft.teacher=F.jsonl learns it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recr1.config import loader as configs
from recr1.config.schema import Config, ConfigError
from recr1.data import readers
from recr1.data.chat_template import ends_thought
from recr1.distributed.printing import print_rank0
from recr1.tasks import registry as tasks
from recr1.tasks.candidate_list import CandidateRanking, get_history, list_mentioned, read_titles
from recr1.tasks.prompts import read_judged_queries
from recr1.tasks.registry import Task
from recr1.tasks.sequential import Sequential
from recr1.training.launch import run_command
from recr1.utils.files import write_text

THOUGHT_END = "</think>"


def main(argv: list[str]) -> None:
    """Write the teacher's file."""
    args = parse_arguments(argv)
    cfg = configs.load_config(args.config, args.overrides)
    is_closed = ends_thought(cfg.prompt.assistant)
    if args.thought and is_closed:
        raise ConfigError(
            "--thought: prompt.assistant ends the thought, so an answer has none; "
            "let it end in <think>"
        )
    source = read_source(cfg, args)

    # A text that comes out twice is written once.
    texts: dict[tuple[str, str], None] = {}
    for copy in range(args.copies):
        for id, row in source.rows.items():
            rng = random.Random(f"{args.seed}/{copy}/{id}")
            answer = make_answer(source, id, row, rng, args)
            text = answer
            if not is_closed:
                thought = make_thought(source, id, row, rng, args.thought)
                text = f"{thought}{THOUGHT_END}{answer}"
            texts[id, text] = None
    lines = []
    for id, text in texts:
        line = json.dumps(dict(id=id, text=text), ensure_ascii=False)
        lines.append(line + "\n")
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(lines))
    print_rank0(f"{args.out}: {len(lines)} texts")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--out", required=True)
    parser.add_argument(
        "--stir", type=float, default=0.3, help="probability of a change at each place (default .3)"
    )
    parser.add_argument("--target", action="store_true")
    parser.add_argument("--answers", metavar="F")
    parser.add_argument("--thought", nargs="?", const="words", choices=("words", "title"))
    parser.add_argument("--most", type=int, default=10)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--queries", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    return parser.parse_intermixed_args(argv)


# --- What the texts are made of -------------------------------------------------------------------


@dataclass
class Source:
    """Hold what the texts are made of."""

    task: Task
    rows: dict[str, dict]  # the train queries that get a text
    targets: dict[str, str]  # query id -> document id; empty where none is asked for
    answers: dict[str, str]  # query id -> text behind the thought, of --answers
    title: Callable[[str], str]  # document id -> title


def read_source(cfg: Config, args: argparse.Namespace) -> Source:
    """Read the train queries, and what of other files the options ask for."""
    task = tasks.build_task(cfg)
    queries, qrels = read_judged_queries(cfg, task.required_fields)
    rows = select_train_rows(cfg, queries["train"])
    answers = {}
    if args.answers:
        answers = read_answers(args.answers)
        rows = {id: row for id, row in rows.items() if id in answers}
    targets = {}
    if args.target or args.thought == "title":
        targets = find_targets(qrels, rows)
        rows = {id: row for id, row in rows.items() if id in targets}
    if args.queries:
        rows = draw_rows(rows, args.queries, args.seed)
    if not rows:
        raise readers.DataError(
            f"{cfg.data.train_queries}: no train query gets a text; "
            "bring more queries, judgements of them or another file of --answers"
        )

    mentioned_ids = list(targets.values())
    for row in rows.values():
        mentioned_ids += list_mentioned(row)
    title, *_ = read_titles(
        cfg.data.corpus, cfg.data.on_bad_line, mentioned_ids, cfg.prompt.title_words
    )
    return Source(task, rows, targets, answers, title)


def select_train_rows(cfg: Config, queries: dict[str, dict]) -> dict[str, dict]:
    """Select the queries that are neither of validation nor, without test queries, of test."""
    rows = {}
    for id, row in queries.items():
        is_held_out = not cfg.data.test_queries and readers.is_test(id)
        if not readers.is_validation(id) and not is_held_out:
            rows[id] = row
    return rows


def read_answers(path: str) -> dict[str, str]:
    """Read {query id: text behind the thought} of a teacher's file; of several the last."""
    completions, _ = readers.read_completions(path)
    answers = {}
    for id, text in completions:
        before, end, behind = text.partition(THOUGHT_END)
        answers[id] = behind if end else before
    return answers


def find_targets(qrels: dict[str, dict[str, float]], ids: dict[str, dict]) -> dict[str, str]:
    """Find the first relevant document of each query that has one."""
    targets = {}
    for id in ids:
        relevant = [doc for doc, gain in qrels[id].items() if gain > 0]
        if relevant:
            targets[id] = relevant[0]
    return targets


def draw_rows(rows: dict[str, dict], num_queries: int, seed: int) -> dict[str, dict]:
    """Draw some queries without replacement; they keep their order."""
    if num_queries >= len(rows):
        return rows
    drawn = set(random.Random(seed).sample(list(rows), num_queries))
    return {id: row for id, row in rows.items() if id in drawn}


# --- One text -------------------------------------------------------------------------------------


def make_answer(
    source: Source, id: str, row: dict, rng: random.Random, args: argparse.Namespace
) -> str:
    """Make what stands behind the thought."""
    if source.answers:
        return source.answers[id]
    task = source.task
    if isinstance(task, CandidateRanking):
        labels = [f"Item_{place}" for place, _ in enumerate(row["candidates"], 1)]
        stir_labels(labels, args.stir, rng)
        if not task.whole:
            labels = labels[: args.most]
        answer = {task.key: labels}
    else:
        text = source.title(source.targets[id]) if args.target else choose_text(source, row, rng)
        # " word" is one token of most tokenizers
        answer = {"query": f" {stir_words(text.split(), args.stir, rng)}"}
    answer_json = json.dumps(answer, ensure_ascii=False)
    return f"<answer>{answer_json}</answer>"


def make_thought(source: Source, id: str, row: dict, rng: random.Random, kind: str | None) -> str:
    """Make the thought, with the space before it; kind: words, title or, for an empty one, None."""
    if kind is None:
        return ""
    if kind == "title":
        return f" {source.title(source.targets[id])}"
    words = [] if isinstance(source.task, CandidateRanking) else row["text"].split()
    shuffled_words = rng.sample(words, len(words))
    return f" {' '.join(shuffled_words)}"


def choose_text(source: Source, row: dict, rng: random.Random) -> str:
    """Return the text that the query is made of."""
    if not isinstance(source.task, Sequential):
        return row["text"]
    oldest_first = [id for id, _ in get_history(row)]
    if not oldest_first:
        return row["text"]
    newest_first = oldest_first[::-1]
    weights = [0.5**age for age, _ in enumerate(newest_first)]
    [id] = rng.choices(newest_first, weights)
    return source.title(id)


def stir_words(words: list[str], share: float, rng: random.Random) -> str:
    """Leave words out with probability `share` / 4 each, and say one again with `share`."""
    kept_words = [word for word in words if rng.random() >= share / 4] or words
    repeated_words = []
    if rng.random() < share:
        repeated_words.append(rng.choice(kept_words))
    return " ".join(kept_words + repeated_words)


def stir_labels(labels: list[str], share: float, rng: random.Random) -> None:
    """Put each label behind its successor with probability `share`, in place."""
    for index in range(len(labels) - 1):
        if rng.random() < share:
            successor = labels[index + 1]
            labels[index + 1] = labels[index]
            labels[index] = successor


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
