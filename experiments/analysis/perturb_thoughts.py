"""Test whether the answer depends on the thought.

python experiments/analysis/perturb_thoughts.py CONFIG.yaml --model DIR --out F.json [--queries 300]

Each test query is answered greedily. Then its own thought is cut in half, or its words are
shuffled, the thought is closed and the policy goes on greedily from there. How often is the answer
another one, and what does that do to the metric? Where a thought has fewer than two words nothing
is perturbed, and that is counted.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from evaluate import Setting

from recr1.config import loader as configs
from recr1.data_types import Prompt, Reward
from recr1.distributed.fsdp import Sharded
from recr1.distributed.printing import print_rank0
from recr1.evaluation.evaluate import compute_mean_ci, generate_greedily
from recr1.tasks.scorer import Scorer
from recr1.training.launch import run_command
from recr1.utils.files import write_text

THOUGHT_END = "</think>"


def keep_words(words: list[str], rng: random.Random) -> list[str]:
    """Change nothing: what the changed thoughts are compared with."""
    return words


def cut_words(words: list[str], rng: random.Random) -> list[str]:
    """Keep the first half."""
    return words[: len(words) // 2]


def shuffle_words(words: list[str], rng: random.Random) -> list[str]:
    """Put the words into another order."""
    return rng.sample(words, len(words))


PERTURBATIONS = {"unchanged": keep_words, "cut": cut_words, "shuffled": shuffle_words}


def main(argv: list[str]) -> None:
    """Perturb the thoughts of the test queries and write what it did to the answers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args(argv)
    cfg = configs.load_config(args.config, args.overrides)
    setting = Setting(cfg, args.model)
    reward = cfg.reward
    policy = setting.load_policy()
    scorer = setting.make_scorer(reward.k_eval)

    all_prompts = setting.test[: args.queries]
    thoughts = generate_thoughts(setting, policy, scorer, all_prompts)
    result = dict(model=args.model, queries=len(all_prompts), with_thought=len(thoughts))
    print_rank0(f"{len(thoughts)} of {len(all_prompts)} thoughts have two words or more")

    if thoughts:
        prompts = [all_prompts[index] for index in thoughts]
        answers = {}
        for name, perturb in PERTURBATIONS.items():
            texts = []
            for index, words in thoughts.items():
                rng = random.Random(index)
                text = " ".join(perturb(words, rng))
                texts.append(f" {text}{THOUGHT_END}")
            answers[name] = answer_after(setting, policy, scorer, prompts, texts)
            figures = compare_answers(answers["unchanged"], answers[name], reward.metric)
            result[name] = figures
            line = format_figures(figures, f"{reward.metric}@{reward.k_eval}")
            print_rank0(f"  {name:<10} {line}")
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    write_text(out, text + "\n")


def generate_thoughts(
    setting: Setting, policy: Sharded, scorer: Scorer, prompts: list[Prompt]
) -> dict[int, list[str]]:
    """Return {index of the prompt: the words of the policy's own thought}.

    Thoughts of fewer than two words cannot be perturbed and are left out.
    """
    rollouts = generate_greedily(
        policy, prompts, setting.stop_token_ids, setting.cfg.sampling.max_new_tokens
    )
    thoughts = {}
    for index, answer in enumerate(scorer.score(rollouts)):
        thought, end, _ = answer.text.partition(THOUGHT_END)
        words = thought.split()
        if end and len(words) > 1:
            thoughts[index] = words
    return thoughts


def answer_after(
    setting: Setting, policy: Sharded, scorer: Scorer, prompts: list[Prompt], thoughts: list[str]
) -> list[Reward]:
    """Let the policy answer greedily behind thoughts that are given, and score the answers.

    The closed thought belongs to the prompt: what is generated is the answer alone.
    """
    prompts_with_thought = []
    for prompt, thought in zip(prompts, thoughts):
        thought_ids = setting.tokenizer(thought, add_special_tokens=False)["input_ids"]
        prompts_with_thought.append(replace(prompt, ids=(*prompt.ids, *thought_ids)))
    rollouts = generate_greedily(
        policy,
        prompts_with_thought,
        setting.stop_token_ids,
        setting.cfg.sampling.max_new_tokens,
    )
    texts = []
    for thought, rollout in zip(thoughts, rollouts):
        answer_ids = [id for id in rollout.ids if id not in setting.stop_token_ids]
        answer = setting.tokenizer.decode(answer_ids, clean_up_tokenization_spaces=False)
        texts.append(thought + answer)
    return scorer.score_texts(prompts, texts, [0.0] * len(prompts))


def compare_answers(unchanged: list[Reward], perturbed: list[Reward], metric: str) -> dict:
    """Return how often the answer is another one, and the metric's paired difference."""
    is_other = []
    old_scores = []
    new_scores = []
    for old, new in zip(unchanged, perturbed):
        is_other.append(old.answer != new.answer)
        old_scores.append(old.terms[metric])
        new_scores.append(new.terms[metric])
    share_other = compute_mean_ci(np.array(is_other, float))
    perturbed_scores = np.array(new_scores)
    difference, interval = compute_mean_ci(perturbed_scores - np.array(old_scores))
    return dict(
        other_answer=share_other,
        metric=float(perturbed_scores.mean()),
        difference=difference,
        difference_ci95=interval,
    )


def format_figures(figures: dict, metric: str) -> str:
    """Format what a perturbation did; metric: its name."""
    share_other, _ = figures["other_answer"]
    low, high = figures["difference_ci95"]
    difference = f"{figures['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"another answer {share_other:.3f}   {metric} {figures['metric']:.4f}, {difference}"


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
