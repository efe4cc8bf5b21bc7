"""Select the train queries whose targets lie beyond rank K of the raw answer.

python experiments/analysis/sparse_queries.py CONFIG.yaml --beyond K --out F.jsonl

The sparsity test: where the raw query finds nothing in its first K the reward is 0 but for rewrites
that dig deeper. Train on them with data.train_queries=F.jsonl; validation queries are kept as they
are, so that runs can be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from evaluate import Setting

from recr1.config import loader as configs
from recr1.data import readers
from recr1.distributed.printing import print_rank0
from recr1.tasks.prompts import read_judged_queries
from recr1.training.launch import run_command
from recr1.utils.files import write_text


def main(argv: list[str]) -> None:
    """Write the sparse train queries and all validation queries."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--beyond", type=int, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args(argv)
    cfg = configs.load_config(args.config, args.overrides)
    setting = Setting(cfg, cfg.model.path)

    # A query is sparse when the raw answer has no target in the first K, and it has targets.
    scorer = setting.make_scorer(args.beyond)
    raw_answers = [setting.task.baseline_answer(prompt.row) for prompt in setting.train]
    raw_metrics = scorer.score_answers(setting.train, raw_answers)
    sparse_ids = set()
    for prompt, metrics in zip(setting.train, raw_metrics):
        if metrics["hit"] == 0 and any(setting.qrels[prompt.id].values()):
            sparse_ids.add(prompt.id)

    rows, _ = read_judged_queries(cfg, setting.task.required_fields)
    num_validation = write_train_queries(args.out, rows["train"], sparse_ids)
    num_sparse = len(sparse_ids)
    print_rank0(
        f"{args.out}: {num_sparse} of {len(setting.train)} train queries have no target in "
        f"the first {args.beyond}; with {num_validation} of validation"
    )


def write_train_queries(path: str, rows: dict[str, dict], chosen_ids: set[str]) -> int:
    """Write those of the train queries {id: row} that are chosen, and all of validation.

    They keep their order. Returns the number of validation queries.
    """
    lines = []
    num_validation = 0
    for id, row in rows.items():
        is_held_out = readers.is_validation(id)
        num_validation += is_held_out
        if id in chosen_ids or is_held_out:
            line = json.dumps(dict(row, id=id), ensure_ascii=False)
            lines.append(line + "\n")
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(lines))
    return num_validation


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
