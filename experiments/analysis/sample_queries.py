"""Draw a part of the train queries, for a run that has no time for them all.

python experiments/analysis/sample_queries.py CONFIG.yaml --queries N --out F.jsonl [--seed S]

N train queries, drawn by the seed, and all of validation, so that runs can be compared. Train on
them with data.train_queries=F.jsonl.
"""

from __future__ import annotations

import argparse
import random
import sys

from sparse_queries import write_train_queries

from recr1.config import loader as configs
from recr1.data import readers
from recr1.distributed.printing import print_rank0
from recr1.tasks import registry as tasks
from recr1.tasks.prompts import read_judged_queries
from recr1.training.launch import run_command


def main(argv: list[str]) -> None:
    """Write the drawn train queries and all validation queries."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--queries", type=int, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args(argv)
    cfg = configs.load_config(args.config, args.overrides)
    task = tasks.build_task(cfg)

    rows, _ = read_judged_queries(cfg, task.required_fields)
    train_ids = [id for id in rows["train"] if not readers.is_validation(id)]
    num_drawn = min(args.queries, len(train_ids))
    drawn_ids = set(random.Random(args.seed).sample(train_ids, num_drawn))
    num_validation = write_train_queries(args.out, rows["train"], drawn_ids)
    print_rank0(
        f"{args.out}: {num_drawn} of {len(train_ids)} train queries, "
        f"with {num_validation} of validation"
    )


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
