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
    setting = Setting(configs.load_config(args.config, args.overrides), args.model)
    reward = setting.cfg.reward
    policy = setting.load_policy()
    scorer = setting.make_scorer(reward.k_eval)

    # The policy's own thoughts; those of fewer than two words cannot be perturbed.
    all_prompts = setting.test[: args.queries]
    rollouts = generate_greedily(
        policy, all_prompts, setting.stop_token_ids, setting.cfg.sampling.max_new_tokens
    )
    thoughts = {}  # {index of the prompt: words}
    for index, answer in enumerate(scorer.score(rollouts)):
        thought, end, _ = answer.text.partition(THOUGHT_END)
        words = thought.split()
        if end and len(words) > 1:
            thoughts[index] = words
    result = dict(model=args.model, queries=len(all_prompts), with_thought=len(thoughts))
    print_rank0(f"{len(thoughts)} of {len(all_prompts)} thoughts have two words or more")

    if thoughts:
        prompts = [all_prompts[index] for index in thoughts]
        answers = {}
        for name, perturb in PERTURBATIONS.items():
            texts = []
            for index, words in thoughts.items():
                perturbed = perturb(words, random.Random(index))
                texts.append(" " + " ".join(perturbed) + THOUGHT_END)
            answers[name] = answer_after(setting, policy, scorer, prompts, texts)
            figures = compare_answers(answers["unchanged"], answers[name], reward.metric)
            result[name] = figures
            low, high = figures["difference_ci95"]
            print_rank0(
                f"  {name:<10} another answer {figures['other_answer'][0]:.3f}   "
                f"{reward.metric}@{reward.k_eval} {figures['metric']:.4f}, "
                f"{figures['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
            )
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(result, indent=1) + "\n")


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
    is_other = np.array([a.answer != b.answer for a, b in zip(unchanged, perturbed)], float)
    unchanged_scores = np.array([answer.terms[metric] for answer in unchanged])
    perturbed_scores = np.array([answer.terms[metric] for answer in perturbed])
    difference, interval = compute_mean_ci(perturbed_scores - unchanged_scores)
    return dict(
        other_answer=compute_mean_ci(is_other),
        metric=float(perturbed_scores.mean()),
        difference=difference,
        difference_ci95=interval,
    )


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
