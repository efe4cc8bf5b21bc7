"""Evaluate a policy on the test split of any config, greedily.

python experiments/analysis/evaluate.py CONFIG.yaml --model DIR --out F.jsonl [a.b=value ...]

It does what a run does before and after training, for another data set or another setting of it
(cross-domain transfer, users never seen). The prompt is the config's. F.jsonl is as a run's
eval_after.jsonl. `Setting` is that config without a run: other scripts use it too.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch

from recr1.config import loader as configs
from recr1.config.schema import Config
from recr1.data.chat_template import ChatTemplate
from recr1.distributed.fsdp import Sharded
from recr1.distributed.printing import print_rank0
from recr1.evaluation.evaluate import compute_mean_ci, evaluate_prompts, get_column
from recr1.retrieval.factory import build_retriever, get_index_dir
from recr1.retrieval.interface import NoRetriever
from recr1.tasks import registry as tasks
from recr1.tasks.prompts import load_prompts
from recr1.tasks.rewards import RewardTerms, read_item_table
from recr1.tasks.scorer import Scorer
from recr1.training.launch import run_command
from recr1.training.load_model import load_policy, resolve_compute_dtype
from recr1.utils.files import write_text
from recr1.utils.hf_hub import load_tokenizer, read_stop_token_ids, resolve_model_folder


class Setting:
    """Hold the prompts and the retriever of a config, with a model's tokenizer."""

    def __init__(self, cfg: Config, model: str):
        self.cfg = cfg
        self.folder = resolve_model_folder(model)
        torch.set_num_threads(cfg.run.threads or torch.get_num_threads())
        self.tokenizer = load_tokenizer(self.folder)
        self.stop_token_ids = read_stop_token_ids(self.folder, self.tokenizer)
        self.task = tasks.build_task(cfg)
        self.chat = ChatTemplate(
            self.tokenizer,
            cfg.prompt.system,
            cfg.prompt.user,
            cfg.prompt.assistant,
            self.task.placeholders,
        )
        self.train, self.validation, self.test, self.qrels = load_prompts(cfg, self.chat, self.task)
        make_retriever = NoRetriever.make
        if self.task.uses_retriever:
            make_retriever = build_retriever(cfg.retriever)
        index_dir = get_index_dir(cfg.retriever, Path(cfg.run.dir))
        self.retriever, _ = make_retriever(
            cfg.data.corpus, cfg.data.on_bad_line, index_dir, print_rank0
        )

    def make_scorer(self, k: int) -> Scorer:
        """Return the scorer of the task, with the metrics at rank k."""
        terms = RewardTerms(self.cfg.reward, k, read_item_table(self.cfg), every=True)
        decode = partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
        return Scorer(
            self.task,
            self.retriever,
            self.qrels,
            terms,
            decode,
            self.stop_token_ids,
            self.cfg.sampling.max_new_tokens,
            self.chat.thought_closed,
        )

    def load_policy(self) -> Sharded:
        """Load the model in the config's compute dtype."""
        dtype = resolve_compute_dtype(self.cfg.model.compute)
        return load_policy(self.folder, len(self.tokenizer), dtype)


def main(argv: list[str]) -> None:
    """Evaluate, write a row per query and print the means."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args(argv)
    cfg = configs.load_config(args.config, args.overrides)
    setting = Setting(cfg, args.model)
    metric = cfg.reward.metric
    k = cfg.reward.k_eval
    policy = setting.load_policy()
    scorer = setting.make_scorer(k)
    rows = evaluate_prompts(policy, setting.test, scorer, cfg.sampling.max_new_tokens)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(out, "".join(lines))
    scores = get_column(rows, metric)
    raw = get_column(rows, f"{metric}_raw")
    gain, (low, high) = compute_mean_ci(scores - raw)
    print_rank0(
        f"{metric}@{k} on {len(rows)} queries: {scores.mean():.4f}, raw {raw.mean():.4f}, "
        f"{gain:+.4f} [{low:+.4f}, {high:+.4f}]"
    )


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
