"""Train queries whose targets lie beyond rank K of the raw answer: python
experiments/sparse_queries.py CONFIG.yaml --beyond K --out F.jsonl

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
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("config")
    p.add_argument("--beyond", type=int, required=True)
    p.add_argument("--out", required=True)
    p.add_argument("overrides", nargs="*")
    args = p.parse_intermixed_args(argv)
    cfg = configs.load_config(args.config, args.overrides)
    setting = Setting(cfg, cfg.model.path)
    scorer = setting.scorer(args.beyond)
    found = scorer.score_answers(
        setting.train, [setting.task.baseline_answer(prompt.row) for prompt in setting.train]
    )
    sparse = {
        prompt.id
        for prompt, parts in zip(setting.train, found)
        if parts["hit"] == 0 and any(setting.qrels[prompt.id].values())
    }
    rows = read_judged_queries(cfg, setting.task.required_fields)[0]["train"]
    kept = {id: row for id, row in rows.items() if id in sparse or readers.is_validation(id)}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write_text(
        Path(args.out),
        "".join(
            json.dumps(dict(row, id=id), ensure_ascii=False) + "\n" for id, row in kept.items()
        ),
    )
    print_rank0(
        f"{args.out}: {len(sparse)} of {len(setting.train)} train queries have no target in the "
        f"first {args.beyond}; with {len(kept) - len(sparse)} of validation"
    )


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
