"""Does the answer depend on the thought? python experiments/perturb_thoughts.py CONFIG.yaml --model
DIR --out F.json [--queries 300]

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
from recr1.distributed.printing import print_rank0
from recr1.evaluation.evaluate import compute_mean_ci, generate_greedily
from recr1.training.launch import run_command
from recr1.utils.files import write_text

END = "</think>"


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("config")
    p.add_argument("--model", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--queries", type=int, default=300)
    p.add_argument("overrides", nargs="*")
    args = p.parse_intermixed_args(argv)
    setting = Setting(configs.load_config(args.config, args.overrides), args.model)
    cfg = setting.cfg
    policy = setting.policy()
    scorer = setting.scorer(cfg.reward.k_eval)
    prompts = setting.test[: args.queries]
    texts = [
        reward.text
        for reward in scorer.score(
            generate_greedily(policy, prompts, setting.stops, cfg.sampling.max_new_tokens)
        )
    ]
    thoughts = [text.partition(END)[0] for text in texts]
    long = [i for i, thought in enumerate(thoughts) if END in texts[i] and len(thought.split()) > 1]
    result = dict(model=args.model, queries=len(prompts), with_thought=len(long))
    print_rank0(f"{len(long)} of {len(prompts)} thoughts have two words or more")
    answers = {}
    for name, change in (
        dict(
            unchanged=lambda words, rng: words,
            cut=lambda words, rng: words[: len(words) // 2],
            shuffled=lambda words, rng: rng.sample(words, len(words)),
        ).items()
        if long
        else ()
    ):
        # the closed thought belongs to the prompt: what comes is the answer alone
        changed = [
            " " + " ".join(change(thoughts[i].split(), random.Random(i))) + END for i in long
        ]
        forced = [
            replace(
                prompts[i],
                ids=(
                    *prompts[i].ids,
                    *setting.tokenizer(text, add_special_tokens=False)["input_ids"],
                ),
            )
            for i, text in zip(long, changed)
        ]
        rollouts = generate_greedily(policy, forced, setting.stops, cfg.sampling.max_new_tokens)
        rest = [
            setting.tokenizer.decode(
                [id for id in r.ids if id not in setting.stops], clean_up_tokenization_spaces=False
            )
            for r in rollouts
        ]
        answers[name] = scorer.score_texts(
            [prompts[i] for i in long],
            [text + more for text, more in zip(changed, rest)],
            [0.0] * len(long),
        )
        other = np.array(
            [a.answer != b.answer for a, b in zip(answers["unchanged"], answers[name])], float
        )
        metric = np.array([reward.terms[cfg.reward.metric] for reward in answers[name]])
        loss, ci = compute_mean_ci(
            metric - np.array([reward.terms[cfg.reward.metric] for reward in answers["unchanged"]])
        )
        result[name] = dict(
            other_answer=compute_mean_ci(other),
            metric=float(metric.mean()),
            difference=loss,
            difference_ci95=ci,
        )
        print_rank0(
            f"  {name:<10} another answer {other.mean():.3f}   "
            f"{cfg.reward.metric}@{cfg.reward.k_eval} {metric.mean():.4f}, "
            f"{loss:+.4f} [{ci[0]:+.4f}, {ci[1]:+.4f}]"
        )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(args.out), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
