"""A teacher's file without labels, a retriever or another model: python experiments/cold_start.py
CONFIG.yaml --out F.jsonl [options] [a.b=value ...]

What a policy needs before GRPO is the form of an answer and some variety in it; what is a good
answer GRPO is to find out. Each train query (validation left out) gets the answer that takes no
policy, stirred: for a list the given order, each candidate put behind its successor with
probability --stir; for a query its words, each left out with a quarter of that, one of them said
again at the end with that; for a history a title of it, the older ones the less often.

    --thought       the thought holds the query's words in another order (else it is empty) --most N
    items of a list that need not be whole
    --copies N      answers for each query, each stirred otherwise: few queries, learnt for many
    epochs, would be learnt by heart python -m recr1.sft CONFIG.yaml sft.teacher=F.jsonl learns it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from recr1.config import loader as configs
from recr1.data import readers
from recr1.distributed.printing import print_rank0
from recr1.tasks import registry as tasks
from recr1.tasks.candidate_list import CandidateRanking, get_history, list_mentioned, read_titles
from recr1.tasks.prompts import read_judged_queries
from recr1.tasks.sequential import Sequential
from recr1.training.launch import run_command
from recr1.utils.files import write_text


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("config")
    p.add_argument("--out", required=True)
    p.add_argument(
        "--stir", type=float, default=0.3, help="probability of a change at each place (default .3)"
    )
    p.add_argument("--most", type=int, default=10)
    p.add_argument("--copies", type=int, default=1)
    p.add_argument("--thought", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("overrides", nargs="*")
    args = p.parse_intermixed_args(argv)
    cfg = configs.load_config(args.config, args.overrides)
    task = tasks.build_task(cfg)
    rows = {
        id: row
        for id, row in read_judged_queries(cfg, task.required_fields)[0]["train"].items()
        if not readers.is_validation(id) and (cfg.data.test_queries or not readers.is_test(id))
    }
    title, *_ = read_titles(
        cfg.data.corpus,
        cfg.data.on_bad_line,
        (id for row in rows.values() for id in list_mentioned(row)),
        cfg.prompt.title_words,
    )
    texts = {
        (id, completion(task, row, title, random.Random(f"{args.seed}/{copy}/{id}"), args)): None
        for copy in range(args.copies)
        for id, row in rows.items()
    }
    lines = [json.dumps(dict(id=id, text=text), ensure_ascii=False) for id, text in texts]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(args.out), "".join(line + "\n" for line in lines))
    print_rank0(f"{args.out}: {len(lines)} texts")


def completion(task, row: dict, title, rng: random.Random, args) -> str:
    if isinstance(task, CandidateRanking):
        labels = stirred(
            [f"Item_{i}" for i in range(1, 1 + len(row["candidates"]))], args.stir, rng
        )
        thought = ""
        answer = {task.key: labels if task.whole else labels[: args.most]}
    else:
        words = source(task, row, title, rng).split()
        kept = [word for word in words if rng.random() >= args.stir / 4] or words
        again = [rng.choice(kept)] if rng.random() < args.stir else []
        # " word" is one token of most tokenizers
        thought = " ".join(rng.sample(words, len(words)))
        answer = {"query": " " + " ".join(kept + again)}
    return (
        " " + thought if args.thought else ""
    ) + f"</think><answer>{json.dumps(answer, ensure_ascii=False)}</answer>"


def source(task, row: dict, title, rng: random.Random) -> str:
    """The text that the query is made of."""
    if not isinstance(task, Sequential):
        return row["text"]
    items = [id for id, _ in get_history(row)][::-1]
    return (
        title(rng.choices(items, [0.5**i for i in range(len(items))])[0]) if items else row["text"]
    )


def stirred(labels: list[str], share: float, rng: random.Random) -> list[str]:
    for i in range(len(labels) - 1):
        if rng.random() < share:
            labels[i], labels[i + 1] = labels[i + 1], labels[i]
    return labels


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
