"""Compare the memory plan with the memory that is used.

python experiments/benchmarks/plan.py [--cases NAME
...] [--live PHASE]

Each case is a fresh process (or torchrun's, of two ranks) on a CPU that runs a step by the
functions of the loop: prompts sampled to their full length, scored, trained on, the update, and a
greedy evaluation. Every allocation and release of torch's CPU allocator is an event of the profiler
(torch.profiler, profile_memory), a library kernel's temporaries too; what is allocated less what is
released, counted from before the model is made, is the memory that is live. A phase's figure is its
largest, beside memory/estimate.py's prediction; of two ranks that of rank 0. The cache is emptied
before the step: it then grows while Adam's moments are there, the worst case that the plan counts.

Ends with one line of JSON: prediction / measured of the phases sampling and training, each within
10% of 1. --live PHASE prints what is live at the phase's peak, by size and place of allocation,
beside the terms of the prediction.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from recr1.config.schema import (
    Config,
    LossConfig,
    ModelConfig,
    PromptConfig,
    SamplingConfig,
    TrainConfig,
)
from recr1.data_types import Prompt
from recr1.distributed import collectives as dist
from recr1.distributed.fsdp import Sharded, unsharded
from recr1.distributed.process_group import process_group
from recr1.evaluation.evaluate import generate_greedily
from recr1.memory.estimate import MemoryEstimate, sum_bytes
from recr1.memory.plan import apply_overrides
from recr1.model.decoder import Decoder
from recr1.model.rope import DecoderConfig
from recr1.rl.losses import resolve_objective
from recr1.rl.packing import deduplicate
from recr1.rl.policy_loss import compute_policy_loss
from recr1.sampling.generate import generate, make_cache
from recr1.train import log_token_values, make_updates
from recr1.training.optimizer import Optimizer

SMALL = dict(num_hidden_layers=4, hidden_size=256)
WIDE = dict(num_hidden_layers=12, hidden_size=512)
MANY = dict(vocab_size=32_768)
GROUP = 64 + 4 * 127  # tokens of a group of four: budgets are whole groups
CHECKPOINTING = {"train.gradient_checkpointing": True}
RECOMPUTE = {"model.head": "recompute"}
REFERENCE = {"loss.kl_coef": 0.1}
CASES = {  # shape, token budget in groups, overrides, ranks
    "4x256": (SMALL, 4, {}, 1),
    "4x256, all in one micro-batch": (SMALL, 8, {}, 1),
    "4x256 checkpointing": (SMALL, 4, CHECKPOINTING, 1),
    "4x256 vocabulary 32768": (SMALL | MANY, 2, {}, 1),
    "4x256 vocabulary 32768 recompute, reference": (SMALL | MANY, 2, RECOMPUTE | REFERENCE, 1),
    "4x256 untied 32768, temperature .7": (
        SMALL | MANY | dict(tie_word_embeddings=False),
        2,
        {"sampling.temperature": 0.7},
        1,
    ),
    "4x256 Qwen3, own head size": (SMALL | dict(family="qwen3", head_dim=96), 4, CHECKPOINTING, 1),
    "4x256 bfloat16": (SMALL, 4, {"model.compute": "bfloat16"}, 1),
    "4x256 short texts": (SMALL, 8, {"prompt.max_tokens": 24, "sampling.max_new_tokens": 28}, 1),
    "12x512": (WIDE, 2, {}, 1),
    "12x512 checkpointing, all in one micro-batch": (WIDE, 4, CHECKPOINTING, 1),
    "12x512 vocabulary 32768 checkpointing": (WIDE | MANY, 1, CHECKPOINTING, 1),
    "12x512 vocabulary 32768 recompute": (WIDE | MANY, 1, RECOMPUTE, 1),
    "4x256 two ranks": (SMALL, 2, {}, 2),
    "4x256 two ranks checkpointing, reference, vocabulary 32768": (
        SMALL | MANY,
        1,
        CHECKPOINTING | REFERENCE,
        2,
    ),
    "4x256 two ranks, one reduction a step": (
        SMALL,
        2,
        {"train.gradient_sync": "last_micro_batch"},
        2,
    ),
}
QUICK = ["4x256 checkpointing", "4x256 vocabulary 32768 recompute, reference"]
BARRED = ("sampling", "training")


def make_config(name: str) -> tuple[Config, DecoderConfig, int]:
    """Return the config of a case."""
    sizes, groups, overrides, ranks = CASES[name]
    width = sizes["hidden_size"]
    shape = DecoderConfig(
        **dict(
            family="qwen2",
            vocab_size=4096,
            intermediate_size=4 * width,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 128,
            head_dim=64,
            rms_norm_eps=1e-6,
            rope_theta=1e4,
            rope_scaling=None,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
        )
        | sizes
    )
    prompts = 4 if sizes["num_hidden_layers"] > 4 else 8
    cfg = Config(
        model=ModelConfig(compute="float32"),
        prompt=PromptConfig(max_tokens=64),
        sampling=SamplingConfig(group_size=4, max_new_tokens=128),
        loss=LossConfig(),
        train=TrainConfig(prompts_per_step=prompts, tokens_per_micro_batch=groups * GROUP),
    )
    cfg = apply_overrides(cfg, overrides)
    group = cfg.prompt.max_tokens + 4 * (cfg.sampling.max_new_tokens - 1)
    return (
        replace(cfg, train=replace(cfg.train, tokens_per_micro_batch=groups * group)),
        shape,
        ranks,
    )


def run_steps(cfg: Config, shape: DecoderConfig) -> None:
    """Run two steps of the loop, with random rewards.

    The first, of short texts, makes Adam's moments.
    """
    compute = dict(float32=torch.float32, bfloat16=torch.bfloat16)[cfg.model.compute]
    g = torch.Generator().manual_seed(0)
    s = cfg.sampling

    def model(**how):
        with torch.device("meta"):
            decoder = Decoder(shape)
        sizes = {name: p.shape for name, p in decoder.named_parameters()}
        return Sharded(
            decoder,
            lambda name: torch.randn(sizes[name], generator=g) * 0.02,
            device=dist.device(),
            compute=compute,
            **how,
        )

    def prompts(n):
        return [
            Prompt(
                f"q{i}",
                i,
                "",
                tuple(
                    torch.randint(shape.vocab_size, (cfg.prompt.max_tokens,), generator=g).tolist()
                ),
            )
            for i in range(n)
        ]

    policy = model(checkpointing=cfg.train.gradient_checkpointing)
    reference = model(master=compute, frozen=("*",)) if cfg.loss.kl_coef else None
    optimizer = Optimizer(policy, cfg.optimizer, 2)
    loss = resolve_objective(cfg.loss, cfg.model)
    for length in (2, s.max_new_tokens):
        with unsharded(policy):
            cache = make_cache(policy)
        mine = dist.split_across_ranks(prompts(cfg.train.prompts_per_step))
        uniforms = np.random.default_rng(dist.rank()).random((len(mine), s.group_size, length))
        with record_function("phase sampling"), unsharded(policy):
            rollouts = generate(
                policy, mine, s.group_size, s.temperature, length, frozenset(), uniforms, cache
            )
        texts, first = deduplicate(rollouts)
        with record_function("phase scoring"):
            log_token_values(policy, reference, texts, cfg)
        with record_function("phase training"):
            [(tokens, batches)] = make_updates(
                policy,
                reference,
                texts,
                torch.randn(len(rollouts), generator=g)[first],
                cfg,
                loss.agg_mode,
            )
            for i, batch in enumerate(batches, 1):
                policy.requires_gradient_sync = (
                    cfg.train.gradient_sync != "last_micro_batch" or i == len(batches)
                )
                value, logp, _ = compute_policy_loss(policy, batch, tokens, s.temperature, loss)
                value.backward()
                del value, logp  # the loop's next line binds them anew; here the phase ends
        with record_function("phase update"):
            optimizer.step()
        del rollouts, texts, batches, batch
    with record_function("phase evaluation"):
        generate_greedily(
            policy,
            prompts(MemoryEstimate(cfg, shape, dist.world_size(), gpu=False).evaluated),
            frozenset(),
            s.max_new_tokens,
        )


def measure_live(
    cfg: Config, shape: DecoderConfig, watched: str | None
) -> tuple[dict[str, int], Counter]:
    """Return {phase: bytes live at most}, and what is live at the peak of the phase `watched`.

    The latter is {(bytes of one, place of allocation): bytes}.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run_steps(cfg, shape)
    events = []
    spans = []

    def walk(event, place):
        if event.name == "[memory]":
            events.append(
                (event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size, place)
            )
        elif event.name.startswith("phase "):
            spans.append(
                (event.start_time_ns, event.end_time_ns, event.name.removeprefix("phase "))
            )
        for child in event.children:
            walk(child, (*place, event.name))

    for root in profiled.profiler.kineto_results.experimental_event_tree():
        walk(root, ())
    live = {}
    now = 0
    most = {}
    held = {}
    for time, address, size, place in sorted(events, key=lambda e: e[0]):
        if size > 0:
            live[address] = size, place
        elif live.pop(address, None) is None:
            continue  # allocated before the profile began
        now += size
        for start, end, phase in spans:
            if start <= time <= end and now > most.get(phase, 0):
                most[phase] = now
                if phase == watched:
                    held = dict(live)
    places = Counter()
    for size, place in held.values():
        places[size, " > ".join(place[-3:])] += size
    return most, places


def run_case(name: str, live: str | None) -> None:
    """Run one case and print what was measured beside the plan."""
    torch.set_num_threads(1)
    with process_group():
        cfg, shape, _ = make_config(name)
        most, places = measure_live(cfg, shape, live)
        if dist.rank() == 0:
            if live:
                print(
                    "\n".join(
                        f"{bytes / 1e6:9.2f} MB of {size / 1e6:9.3f}  {place}"
                        for (size, place), bytes in places.most_common(30)
                    ),
                    file=sys.stderr,
                )
            print("measured " + json.dumps(most))


def main() -> int:
    """Run the cases, each in a fresh process, and print the bars."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--quick", action="store_true", help="the cases that the tests run")
    parser.add_argument("--live", metavar="PHASE")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_case(args.one, args.live)
        return 0
    bars = []
    print(f"torch {torch.__version__}; MB predicted / measured")
    for name in QUICK if args.quick else args.cases or CASES:
        cfg, shape, ranks = make_config(name)
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            if ranks > 1
            else []
        )
        more = ["--live", args.live] if args.live else []
        done = subprocess.run(
            [sys.executable, *launcher, str(Path(__file__).resolve()), "--one", name, *more],
            stdout=subprocess.PIPE,
            text=True,
            stderr=None if args.live else subprocess.PIPE,
        )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        measured = json.loads(
            next(
                line for line in done.stdout.splitlines() if line.startswith("measured ")
            ).removeprefix("measured ")
        )
        phases = MemoryEstimate(cfg, shape, ranks, gpu=False).phases()
        print(
            f"{name:<60}"
            + "  ".join(
                f"{p} {sum_bytes(phases[p]) / 1e6:.1f}/{measured[p] / 1e6:.1f}"
                f"={sum_bytes(phases[p]) / measured[p]:.3f}"
                for p in measured
            ),
            flush=True,
        )
        if args.live:
            print(
                "\n".join(
                    f"{t.bytes / 1e6:9.2f} MB  {t.name}: {t.formula}"
                    for t in phases[args.live]
                    if t.bytes
                )
            )
        for phase in BARRED:
            ratio = sum_bytes(phases[phase]) / measured[phase]
            bars.append(
                dict(
                    name=f"{name}: {phase}, predicted / measured",
                    value=round(ratio, 4),
                    bar=0.1,
                    ok=abs(ratio - 1) <= 0.1,
                )
            )
    print(json.dumps({"bars": bars}))
    return 0 if all(bar["ok"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
