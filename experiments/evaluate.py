"""A policy on the test split of any config, greedily: python experiments/evaluate.py CONFIG.yaml
--model DIR --out F.jsonl [a.b=value ...]

What a run does before and after training, for another data set or another setting of it
(cross-domain transfer, users never seen). The prompt is the config's. F.jsonl is as a run's
eval_after.jsonl. `Setting` is that config without a run: other scripts ask it too.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch

from recr1 import config_file as configs
from recr1.chat import Chat
from recr1.checkpoint import compute_type, load_policy
from recr1.config import Config
from recr1.evaluate import column, evaluate, mean_ci
from recr1.files import write_text
from recr1.fsdp import Sharded
from recr1.hub import load_tokenizer, resolve, stop_ids
from recr1.log import say
from recr1.retrieval.base import NoRetriever
from recr1.retrieval.make import directory_of, make
from recr1.run import run_command
from recr1.splits import read_splits
from recr1.tasks import make as tasks
from recr1.tasks.rewards import Parts, read_items
from recr1.tasks.scoring import Scorer


class Setting:
    """Prompts and scorer of a config with a model's tokenizer."""

    def __init__(self, cfg: Config, model: str):
        self.cfg = cfg
        self.folder = resolve(model)
        torch.set_num_threads(cfg.run.threads or torch.get_num_threads())
        self.tokenizer = load_tokenizer(self.folder)
        self.stops = stop_ids(self.folder, self.tokenizer)
        self.task = tasks.make(cfg)
        self.chat = Chat(
            self.tokenizer,
            cfg.prompt.system,
            cfg.prompt.user,
            cfg.prompt.assistant,
            self.task.places,
        )
        self.train, self.validation, self.test, self.qrels = read_splits(cfg, self.chat, self.task)
        maker = make(cfg.retriever) if self.task.searches else NoRetriever.make
        self.retriever, _ = maker(
            cfg.data.corpus,
            cfg.data.on_bad_line,
            directory_of(cfg.retriever, Path(cfg.run.dir)),
            say,
        )

    def scorer(self, k: int) -> Scorer:
        parts = Parts(self.cfg.reward, k, read_items(self.cfg), every=True)
        decode = partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
        return Scorer(
            self.task,
            self.retriever,
            self.qrels,
            parts,
            decode,
            self.stops,
            self.cfg.sampling.max_new_tokens,
            self.chat.thought_closed,
        )

    def policy(self) -> Sharded:
        return load_policy(self.folder, len(self.tokenizer), compute_type(self.cfg.model.compute))


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("config")
    p.add_argument("--model", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("overrides", nargs="*")
    args = p.parse_intermixed_args(argv)
    setting = Setting(configs.load(args.config, args.overrides), args.model)
    metric = setting.cfg.reward.metric
    k = setting.cfg.reward.k_eval
    rows = evaluate(
        setting.policy(), setting.test, setting.scorer(k), setting.cfg.sampling.max_new_tokens
    )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(args.out), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    gain, (low, high) = mean_ci(column(rows, metric) - column(rows, f"{metric}_raw"))
    say(
        f"{metric}@{k} on {len(rows)} queries: {column(rows, metric).mean():.4f}, raw {column(rows, f'{metric}_raw').mean():.4f}, {gain:+.4f} [{low:+.4f}, {high:+.4f}]"
    )


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
