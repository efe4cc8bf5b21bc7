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
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from recr1.config.schema import (
    Config,
    LoraConfig,
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
from recr1.model.lora import FrozenReference, add_adapters
from recr1.model.rope import DecoderConfig
from recr1.rl.losses import Objective, resolve_objective
from recr1.rl.packing import deduplicate
from recr1.rl.policy_loss import compute_policy_loss
from recr1.sampling.generate import generate, make_cache
from recr1.sampling.kv_cache import KVCache
from recr1.train import log_token_values, make_updates
from recr1.training.optimizer import Optimizer

SMALL = dict(num_hidden_layers=4, hidden_size=256)
WIDE = dict(num_hidden_layers=12, hidden_size=512)
MANY = dict(vocab_size=32_768)
GROUP = 64 + 4 * 127  # tokens of a group of four: budgets are whole groups
CHECKPOINTING = {"train.gradient_checkpointing": True}
RECOMPUTE = {"model.head": "recompute"}
LAST_SYNC = {"train.gradient_sync": "last_micro_batch"}
SHORT_TEXTS = {"prompt.max_tokens": 24, "sampling.max_new_tokens": 28}
COOLER = {"sampling.temperature": 0.7}
BFLOAT16 = {"model.compute": "bfloat16"}
UNTIED = dict(tie_word_embeddings=False)
QWEN3 = dict(family="qwen3", head_dim=96)
REFERENCE = {"loss.kl_coef": 0.1}
LORA = {"lora.rank": 16}
LORA_OF_ATTENTION = {"lora.rank": 8, "lora.targets": "q_proj, v_proj"}
CASES = {  # shape, token budget in groups, overrides, ranks
    "4x256": (SMALL, 4, {}, 1),
    "4x256, all in one micro-batch": (SMALL, 8, {}, 1),
    "4x256 checkpointing": (SMALL, 4, CHECKPOINTING, 1),
    "4x256 vocabulary 32768": (SMALL | MANY, 2, {}, 1),
    "4x256 vocabulary 32768 recompute, reference": (SMALL | MANY, 2, RECOMPUTE | REFERENCE, 1),
    "4x256 untied 32768, temperature .7": (SMALL | MANY | UNTIED, 2, COOLER, 1),
    "4x256 Qwen3, own head size": (SMALL | QWEN3, 4, CHECKPOINTING, 1),
    "4x256 bfloat16": (SMALL, 4, BFLOAT16, 1),
    "4x256 short texts": (SMALL, 8, SHORT_TEXTS, 1),
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
    "4x256 two ranks, one reduction a step": (SMALL, 2, LAST_SYNC, 2),
    "4x256 LoRA": (SMALL, 4, LORA, 1),
    "4x256 LoRA checkpointing, vocabulary 32768, reference": (
        SMALL | MANY,
        2,
        LORA | CHECKPOINTING | REFERENCE,
        1,
    ),
    "4x256 LoRA of attention, untied 32768, recompute": (
        SMALL | MANY | UNTIED,
        2,
        LORA_OF_ATTENTION | RECOMPUTE,
        1,
    ),
    "4x256 LoRA Qwen3, bfloat16": (SMALL | QWEN3, 4, LORA | BFLOAT16, 1),
    "12x512 LoRA": (WIDE, 2, LORA, 1),
    "4x256 LoRA two ranks, reference": (SMALL, 2, LORA | REFERENCE, 2),
}
QUICK = [
    "4x256 checkpointing",
    "4x256 vocabulary 32768 recompute, reference",
    "4x256 LoRA checkpointing, vocabulary 32768, reference",
]
BARRED = ("sampling", "training")
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16)


def make_config(name: str) -> tuple[Config, DecoderConfig, int]:
    """Return the config of a case, the model's shape and the number of ranks."""
    sizes, groups, overrides, ranks = CASES[name]
    width = sizes["hidden_size"]
    base = dict(
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
    shape = DecoderConfig(**(base | sizes))
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
    train = replace(cfg.train, tokens_per_micro_batch=groups * group)
    return replace(cfg, train=train), shape, ranks


class Trainer(NamedTuple):
    """Hold what lives from step to step."""

    cfg: Config
    policy: Sharded
    reference: Sharded | FrozenReference | None
    optimizer: Optimizer
    loss: Objective
    generator: torch.Generator


def run_steps(cfg: Config, shape: DecoderConfig) -> None:
    """Run two steps of the loop, with random rewards, the first of short texts."""
    compute = DTYPES[cfg.model.compute]
    generator = torch.Generator().manual_seed(0)
    checkpointing = cfg.train.gradient_checkpointing
    policy = make_model(shape, compute, generator, cfg.lora, gradient_checkpointing=checkpointing)
    reference = None
    if cfg.loss.kl_coef and cfg.lora.rank:
        reference = FrozenReference(policy)
    elif cfg.loss.kl_coef:
        reference = make_model(shape, compute, generator, master=compute, frozen=("*",))
    optimizer = Optimizer(policy, cfg.optimizer, 2)
    loss = resolve_objective(cfg.loss, cfg.model)
    trainer = Trainer(cfg, policy, reference, optimizer, loss, generator)

    longest = cfg.sampling.max_new_tokens
    for length in (2, longest):
        with unsharded(policy):
            cache = make_cache(policy)
        prompts = draw_prompts(cfg.train.prompts_per_step, cfg, shape, generator)
        run_step(trainer, dist.split_across_ranks(prompts), cache, length)

    evaluated = MemoryEstimate(cfg, shape, dist.world_size(), gpu=False).evaluated
    with record_function("phase evaluation"):
        prompts = draw_prompts(evaluated, cfg, shape, generator)
        generate_greedily(policy, prompts, frozenset(), longest)


def make_model(
    shape: DecoderConfig,
    compute: torch.dtype,
    generator: torch.Generator,
    lora: LoraConfig | None = None,
    **options,
) -> Sharded:
    """Return a model with random weights, its adapters beside them as load_policy has it."""
    with torch.device("meta"):
        decoder = Decoder(shape)
        if lora and lora.rank:
            options |= dict(frozen=tuple(decoder.state_dict()), frozen_master=compute)
            add_adapters(decoder, lora)
    sizes = {name: parameter.shape for name, parameter in decoder.named_parameters()}

    def draw_weight(name: str) -> torch.Tensor:
        return torch.randn(sizes[name], generator=generator) * 0.02

    return Sharded(decoder, draw_weight, device=dist.device(), compute=compute, **options)


def draw_prompts(
    count: int, cfg: Config, shape: DecoderConfig, generator: torch.Generator
) -> list[Prompt]:
    """Draw prompts of random tokens, as long as they may be."""
    size = (cfg.prompt.max_tokens,)
    prompts = []
    for row in range(count):
        ids = torch.randint(shape.vocab_size, size, generator=generator).tolist()
        prompts.append(Prompt(f"q{row}", row, "", tuple(ids)))
    return prompts


def run_step(trainer: Trainer, prompts: list[Prompt], cache: KVCache, length: int) -> None:
    """Run one step of the loop, each phase under its name.

    What the step made lives to its end, as in the loop.
    """
    cfg, policy, reference, optimizer, loss, generator = trainer
    sampling = cfg.sampling
    shape = (len(prompts), sampling.group_size, length)
    uniforms = np.random.default_rng(dist.rank()).random(shape)
    with record_function("phase sampling"), unsharded(policy):
        rollouts = generate(
            policy,
            prompts,
            sampling.group_size,
            sampling.temperature,
            length,
            frozenset(),
            uniforms,
            cache,
        )
    texts, first = deduplicate(rollouts)
    with record_function("phase scoring"):
        log_token_values(policy, reference, texts, cfg)
    with record_function("phase training"):
        advantages = torch.randn(len(rollouts), generator=generator)[first]
        [(tokens, batches)] = make_updates(policy, reference, texts, advantages, cfg, loss.agg_mode)
        reduces_each = cfg.train.gradient_sync != "last_micro_batch"
        for number, batch in enumerate(batches, 1):
            policy.requires_gradient_sync = reduces_each or number == len(batches)
            value, logp, _ = compute_policy_loss(policy, batch, tokens, sampling.temperature, loss)
            value.backward()
            del value, logp  # the loop's next line binds them anew; here the phase ends
    with record_function("phase update"):
        optimizer.step()


class MemoryEvent(NamedTuple):
    """Hold an allocation (size > 0) or a release, and the calls around it."""

    time: int
    address: int
    size: int
    place: tuple[str, ...]


class Span(NamedTuple):
    """Hold the start and end of a phase."""

    start: int
    end: int
    phase: str


def measure_live(
    cfg: Config, shape: DecoderConfig, watched: str | None
) -> tuple[dict[str, int], Counter]:
    """Return {phase: bytes live at most}, and what is live at the peak of the phase `watched`.

    The latter is {(bytes of one, place of allocation): bytes}.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run_steps(cfg, shape)
    events, spans = read_events(profiled)
    peaks, live_at_peak = find_peaks(events, spans, watched)
    places = Counter()
    for event in live_at_peak:
        place = " > ".join(event.place[-3:])
        places[event.size, place] += event.size
    return peaks, places


def read_events(profiled: profile) -> tuple[list[MemoryEvent], list[Span]]:
    """Return the profile's memory events in the order of time, and the phases."""
    events = []
    spans = []

    def visit(event, place: tuple[str, ...]) -> None:
        if event.name == "[memory]":
            fields = event.extra_fields
            change = MemoryEvent(event.start_time_ns, fields.ptr, fields.alloc_size, place)
            events.append(change)
        elif event.name.startswith("phase "):
            phase = event.name.removeprefix("phase ")
            span = Span(event.start_time_ns, event.end_time_ns, phase)
            spans.append(span)
        for child in event.children:
            visit(child, (*place, event.name))

    for root in profiled.profiler.kineto_results.experimental_event_tree():
        visit(root, ())
    events.sort(key=lambda event: event.time)
    return events, spans


def find_peaks(
    events: list[MemoryEvent], spans: list[Span], watched: str | None
) -> tuple[dict[str, int], list[MemoryEvent]]:
    """Return {phase: bytes live at most}, and the allocations live at the watched phase's peak."""
    live = {}
    total = 0
    peaks = {}
    live_at_peak = []
    for event in events:
        if event.size > 0:
            live[event.address] = event
        elif live.pop(event.address, None) is None:
            continue  # allocated before the profile began
        total += event.size
        for span in spans:
            is_inside = span.start <= event.time <= span.end
            if is_inside and total > peaks.get(span.phase, 0):
                peaks[span.phase] = total
                if span.phase == watched:
                    live_at_peak = list(live.values())
    return peaks, live_at_peak


def run_case(name: str, live: str | None) -> None:
    """Run one case and print what was measured beside the plan."""
    torch.set_num_threads(1)
    with process_group():
        cfg, shape, _ = make_config(name)
        peaks, places = measure_live(cfg, shape, live)
        if dist.rank() == 0:
            if live:
                print_places(places)
            print("measured " + json.dumps(peaks))


def print_places(places: Counter) -> None:
    """Print what is live at a peak, the largest first."""
    lines = []
    for (size, place), total in places.most_common(30):
        lines.append(f"{total / 1e6:9.2f} MB of {size / 1e6:9.3f}  {place}")
    print("\n".join(lines), file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--quick", action="store_true", help="the cases that the tests run")
    parser.add_argument("--live", metavar="PHASE")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the cases, each in a fresh process, and print the bars."""
    args = parse_arguments()
    if args.one:
        run_case(args.one, args.live)
        return 0
    bars = []
    print(f"torch {torch.__version__}; MB predicted / measured")
    for name in QUICK if args.quick else args.cases or CASES:
        cfg, shape, ranks = make_config(name)
        measured = measure_alone(name, ranks, args.live)
        if measured is None:
            return 1
        phases = MemoryEstimate(cfg, shape, ranks, gpu=False).phases()
        predicted = {phase: sum_bytes(phases[phase]) for phase in measured}
        print_case(name, predicted, measured)
        if args.live:
            print_terms(phases[args.live])
        for phase in BARRED:
            ratio = predicted[phase] / measured[phase]
            title = f"{name}: {phase}, predicted / measured"
            is_near = abs(ratio - 1) <= 0.1
            bars.append(dict(name=title, value=round(ratio, 4), bar=0.1, ok=is_near))
    print(json.dumps({"bars": bars}))
    return 0 if all(bar["ok"] for bar in bars) else 1


def measure_alone(name: str, ranks: int, live: str | None) -> dict[str, int] | None:
    """Run a case in processes of its own and return {phase: bytes}; print an error and return
    None.
    """
    launcher = [*LAUNCHER, str(ranks)] if ranks > 1 else []
    script = str(Path(__file__).resolve())
    command = [sys.executable, *launcher, script, "--one", name]
    stderr = subprocess.PIPE
    if live:
        command += ["--live", live]
        stderr = None
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, stderr=stderr)
    if result.returncode:
        print(result.stderr, file=sys.stderr)
        return None
    lines = [line for line in result.stdout.splitlines() if line.startswith("measured ")]
    return json.loads(lines[0].removeprefix("measured "))


def print_case(name: str, predicted: dict[str, int], measured: dict[str, int]) -> None:
    """Print the figures of all phases of a case in one line."""
    columns = []
    for phase in measured:
        predicted_mb = predicted[phase] / 1e6
        measured_mb = measured[phase] / 1e6
        ratio = predicted[phase] / measured[phase]
        columns.append(f"{phase} {predicted_mb:.1f}/{measured_mb:.1f}={ratio:.3f}")
    print(f"{name:<60}" + "  ".join(columns), flush=True)


def print_terms(terms: list) -> None:
    """Print the terms of a phase's prediction."""
    lines = []
    for term in terms:
        if term.bytes:
            lines.append(f"{term.bytes / 1e6:9.2f} MB  {term.name}: {term.formula}")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
