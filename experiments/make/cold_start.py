"""Make a teacher's file without labels, a retriever or another model.

python experiments/make/cold_start.py CONFIG.yaml --out F.jsonl [options] [a.b=value ...]

What a policy needs before GRPO is the form of an answer and some variety in it; GRPO is to find out
what is a good answer. Each train query (validation left out) gets the answer that takes no policy,
stirred: for a list the given order, each candidate put behind its successor with probability
--stir; for a query its words, each left out with a quarter of that, one of them said again at the
end with that; for a history a title of it, the older ones the less often.

    --thought     the thought holds the query's words in another order (else it is empty)
    --most N      items of a list that need not be whole
    --copies N    answers for each query, each stirred otherwise: few queries, learned for many
                  epochs, would be learned by heart

python -m recr1.sft CONFIG.yaml sft.teacher=F.jsonl learns it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from recr1.config import loader as configs
from recr1.config.schema import Config
from recr1.data import readers
from recr1.distributed.printing import print_rank0
from recr1.tasks import registry as tasks
from recr1.tasks.candidate_list import CandidateRanking, get_history, list_mentioned, read_titles
from recr1.tasks.prompts import read_judged_queries
from recr1.tasks.registry import Task
from recr1.tasks.sequential import Sequential
from recr1.training.launch import run_command
from recr1.utils.files import write_text


def main(argv: list[str]) -> None:
    """Write the teacher's file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--out", required=True)
    parser.add_argument(
        "--stir", type=float, default=0.3, help="probability of a change at each place (default .3)"
    )
    parser.add_argument("--most", type=int, default=10)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--thought", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args(argv)
    cfg = configs.load_config(args.config, args.overrides)
    task = tasks.build_task(cfg)
    rows = read_train_rows(cfg, task)
    mentioned_ids: list[str] = []
    for row in rows.values():
        mentioned_ids += list_mentioned(row)
    title, *_ = read_titles(
        cfg.data.corpus, cfg.data.on_bad_line, mentioned_ids, cfg.prompt.title_words
    )

    # A text that comes out twice is written once.
    texts: dict[tuple[str, str], None] = {}
    for copy in range(args.copies):
        for id, row in rows.items():
            rng = random.Random(f"{args.seed}/{copy}/{id}")
            text = make_completion(task, row, title, rng, args)
            texts[id, text] = None
    lines = []
    for id, text in texts:
        line = json.dumps(dict(id=id, text=text), ensure_ascii=False)
        lines.append(line + "\n")
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(lines))
    print_rank0(f"{args.out}: {len(lines)} texts")


def read_train_rows(cfg: Config, task: Task) -> dict[str, dict]:
    """Read the train queries that are neither of validation nor, without test queries, of test."""
    queries, *_ = read_judged_queries(cfg, task.required_fields)
    rows = {}
    for id, row in queries["train"].items():
        is_held_out = not cfg.data.test_queries and readers.is_test(id)
        if not readers.is_validation(id) and not is_held_out:
            rows[id] = row
    return rows


def make_completion(
    task: Task,
    row: dict,
    title: Callable[[str], str],
    rng: random.Random,
    args: argparse.Namespace,
) -> str:
    """Make a text for a query: a thought and the stirred answer.

    title: returns a document's title, from its id.
    """
    thought = ""
    if isinstance(task, CandidateRanking):
        labels = [f"Item_{place}" for place, _ in enumerate(row["candidates"], 1)]
        stir_labels(labels, args.stir, rng)
        if not task.whole:
            labels = labels[: args.most]
        answer = {task.key: labels}
    else:
        source = choose_source(task, row, title, rng)
        words = source.split()
        kept_words = [word for word in words if rng.random() >= args.stir / 4] or words
        repeated_words = []
        if rng.random() < args.stir:
            repeated_words.append(rng.choice(kept_words))
        # " word" is one token of most tokenizers
        shuffled_words = rng.sample(words, len(words))
        thought = " ".join(shuffled_words)
        query = " ".join(kept_words + repeated_words)
        answer = {"query": f" {query}"}
    answer_json = json.dumps(answer, ensure_ascii=False)
    text = f"</think><answer>{answer_json}</answer>"
    if not args.thought:
        return text
    return f" {thought}{text}"


def choose_source(task: Task, row: dict, title: Callable[[str], str], rng: random.Random) -> str:
    """Return the text that the query is made of."""
    if not isinstance(task, Sequential):
        return row["text"]
    oldest_first = [id for id, _ in get_history(row)]
    if not oldest_first:
        return row["text"]
    newest_first = oldest_first[::-1]
    weights = [0.5**age for age, _ in enumerate(newest_first)]
    [id] = rng.choices(newest_first, weights)
    return title(id)


def stir_labels(labels: list[str], share: float, rng: random.Random) -> None:
    """Put each label behind its successor with probability `share`, in place."""
    for index in range(len(labels) - 1):
        if rng.random() < share:
            successor = labels[index + 1]
            labels[index + 1] = labels[index]
            labels[index] = successor


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
