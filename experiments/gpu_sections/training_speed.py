"""What the training part of a step takes, and the paper's whole step: time and memory.

Expected on an H200 for the paper's step (32 prompts x 12 texts, 256 + 512 tokens, 3B, gradient
checkpointing, kernels in torch; arithmetic from 4.3 TB/s and 790 TF/s, and not measured):

    sampling     7 to 9 s     512 steps of 11 ms, prefill, 17 captures
    reference    3.1 s        16 micro-batches of 195 ms
    training     12.3 s       16 x 770 ms: forward 155, recomputed 148, backward 324, head and loss
                              110, gradients and gathers 34
    rest         1 s
    together     22 to 27 s

MFU counts 6 FLOP per weight and token computed, over 989 TF/s (experiments/benchmarks/mfu.py).
`recr1 plan`'s prediction is to be at least what is measured.

Legend: P prompts, G siblings, N trained tokens.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from gpu_sections.report import Report
from gpu_sections.setting import (
    Setting,
    Work,
    load_benchmark,
    make_prompts,
    make_random_policy,
    predict_phase_bytes,
    read_shape,
)

from recr1.config.schema import Config, PromptConfig, SamplingConfig, TrainConfig
from recr1.data_types import Prompt, Rollout
from recr1.distributed.fsdp import Sharded, unsharded
from recr1.memory.estimate import MemoryEstimate
from recr1.rl.losses import Objective, resolve_objective
from recr1.rl.policy_loss import compute_policy_loss
from recr1.sampling.generate import generate
from recr1.train import make_updates
from recr1.training.optimizer import Optimizer
from recr1.utils.counter_rng import draw_uniforms

TEMPERATURE = 0.6  # the paper's
MFU_BAR = 0.40
STEP_SECONDS_BAR = 30.0
PLAN_BAR = 1.02  # measured over predicted: the plan is not to promise less than a run takes


class Variant(NamedTuple):
    """One way to train."""

    checkpointing: bool
    token_budget: int
    kernels: str
    entropy_coef: float = 0.0  # above 0 the loss is computed in torch

    def describe(self) -> str:
        checkpointing = "checkpointing" if self.checkpointing else "no checkpointing"
        loss = "loss with entropy" if self.entropy_coef else "loss in the kernel"
        if self.kernels == "torch":
            loss = "loss in torch"
        return f"{checkpointing}, {self.token_budget}, {self.kernels}, {loss}"


def list_variants(setting: Setting) -> list[Variant]:
    """List what is compared: from what every machine has to what should be fastest."""
    variants = [Variant(True, 16_384, "torch", 0.001)]
    if "triton" in setting.kernels:
        variants.append(Variant(True, 16_384, "triton", 0.001))
        variants.append(Variant(True, 16_384, "triton"))
    variants.append(Variant(False, 8_192, setting.fastest_kernels))
    return variants


def make_config(work: Work, variant: Variant, kl_coef: float = 0.0) -> Config:
    """Return the config of a run that trains this."""
    cfg = Config(
        prompt=PromptConfig(max_tokens=work.prompt),
        sampling=SamplingConfig(
            group_size=work.group, max_new_tokens=work.completion, temperature=TEMPERATURE
        ),
        train=TrainConfig(
            prompts_per_step=work.prompts,
            tokens_per_micro_batch=variant.token_budget,
            gradient_checkpointing=variant.checkpointing,
        ),
    )
    return replace(
        cfg,
        model=replace(cfg.model, kernels=variant.kernels),
        loss=replace(cfg.loss, kl_coef=kl_coef, entropy_coef=variant.entropy_coef),
    )


def make_rollouts(setting: Setting, work: Work) -> list[Rollout]:
    """Make rollouts of random ids, all different."""
    return load_benchmark("mfu").make_rollouts(setting.reachable, work)


def make_advantages(rollouts: list[Rollout]) -> torch.Tensor:
    """Return 1, -1, 1, ...: every text has a gradient."""
    return torch.tensor([1.0, -1.0]).repeat(len(rollouts))[: len(rollouts)]


# --- the training part ----------------------------------------------------------------------------


def measure_training(report: Report, setting: Setting) -> None:
    """Seconds, MFU and memory of the training part of 3B, six of the paper's 32 prompts."""
    work = setting.step._replace(prompts=setting.pick(6, 2))
    for variant in list_variants(setting):
        measure_variant(report, setting, work, variant)
    count_waits(report, setting, work)


def measure_variant(report: Report, setting: Setting, work: Work, variant: Variant) -> None:
    """Train three steps and report the faster of the last two."""
    title = f"3B, {variant.describe()}"
    cfg = make_config(work, variant)
    policy = make_random_policy(
        setting, "3B", checkpointing=variant.checkpointing, kernels=variant.kernels
    )
    objective = resolve_objective(cfg.loss, cfg.model)
    optimizer = Optimizer(policy, cfg.optimizer, 100)
    rollouts = make_rollouts(setting, work)

    reset_peak(setting)
    seconds = []
    for _ in range(3):
        seconds.append(
            setting.time(lambda: train_once(policy, optimizer, objective, rollouts, cfg))
        )
    fastest = min(seconds[1:])

    mfu_bench = load_benchmark("mfu")
    flop, _ = mfu_bench.count_flops(policy.config, work)
    report.figure(f"{title}: s", fastest)
    report.at_least(f"{title}: MFU", flop / fastest / mfu_bench.PEAK, MFU_BAR)
    scale = setting.step.prompts / work.prompts
    report.figure(f"{title}: s for the paper's step", fastest * scale)
    shape = read_shape("3B", setting.tiny)
    predicted = predict_phase_bytes(MemoryEstimate(cfg, shape, 1))
    compare_with_plan(report, setting, title, max(predicted["training"], predicted["update"]))


def train_once(
    policy: Sharded,
    optimizer: Optimizer,
    objective: Objective,
    rollouts: list[Rollout],
    cfg: Config,
) -> None:
    """Do what train.py does between sampling and the log."""
    advantages = make_advantages(rollouts)
    [update] = make_updates(policy, None, rollouts, advantages, cfg, objective.agg_mode)
    for batch in update.micro_batches:
        loss = compute_policy_loss(policy, batch, update.denominator, TEMPERATURE, objective)
        loss.value.backward()
    optimizer.step()


def reset_peak(setting: Setting) -> None:
    if setting.has_gpu:
        torch.cuda.reset_peak_memory_stats()


def compare_with_plan(report: Report, setting: Setting, title: str, predicted: float) -> None:
    """Report the peak of memory since `reset_peak` beside what `recr1 plan` counts."""
    if not setting.has_real_gpu:
        return  # no allocator that counts
    peak = torch.cuda.max_memory_allocated()
    report.figure(f"{title}: peak allocated, GiB", peak / 2**30)
    report.figure(f"{title}: reserved, GiB", torch.cuda.max_memory_reserved() / 2**30)
    report.figure(f"{title}: predicted by the plan, GiB", predicted / 2**30)
    report.at_most(f"{title}: measured over predicted", peak / predicted, PLAN_BAR)


def count_waits(report: Report, setting: Setting, work: Work) -> None:
    """Count, by torch's own warnings, how often the host waits for the GPU in a micro-batch."""
    if not setting.has_real_gpu:
        report.skip("waits of the host in a micro-batch", "torch counts them on a real GPU only")
        return
    variant = Variant(True, 16_384, "torch", 0.001)
    cfg = make_config(work, variant)
    policy = make_random_policy(setting, "0.5B", checkpointing=True)
    objective = resolve_objective(cfg.loss, cfg.model)
    rollouts = make_rollouts(setting, work)
    advantages = make_advantages(rollouts)
    [update] = make_updates(policy, None, rollouts, advantages, cfg, objective.agg_mode)
    batch = update.micro_batches[0]
    with warnings.catch_warnings(record=True) as waits, sync_warnings():
        warnings.simplefilter("always")
        loss = compute_policy_loss(policy, batch, update.denominator, TEMPERATURE, objective)
        loss.value.backward()
    report.figure("waits of the host in a micro-batch", len(waits))


@contextmanager
def sync_warnings() -> Iterator[None]:
    """Let torch warn at each wait inside the block."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- the whole step -------------------------------------------------------------------------------


class StepParts(NamedTuple):
    """What a step works on."""

    policy: Sharded
    reference: Sharded
    optimizer: Optimizer
    objective: Objective
    prompts: list[Prompt]
    cfg: Config


def measure_step(report: Report, setting: Setting) -> None:
    """The paper's whole step on random weights, twice: sampling, reference, training, update."""
    variant = Variant(True, 16_384, setting.fastest_kernels, 0.001)
    work = setting.step
    cfg = make_config(work, variant, kl_coef=0.001)
    kernels = variant.kernels
    policy = make_random_policy(setting, "3B", checkpointing=True, kernels=kernels)
    parts = StepParts(
        policy=policy,
        reference=make_random_policy(setting, "3B", is_reference=True, kernels=kernels),
        optimizer=Optimizer(policy, cfg.optimizer, 100),
        objective=resolve_objective(cfg.loss, cfg.model),
        prompts=make_prompts(work.prompts, work.prompt, setting.reachable),
        cfg=cfg,
    )
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    settings = [os.environ[name] for name in names if name in os.environ]
    report.figure("allocator", ", ".join(settings) or "as torch has it")
    for number in range(2):
        run_step(report, setting, parts, number)


def run_step(report: Report, setting: Setting, parts: StepParts, number: int) -> None:
    """Run one step and report its phases."""
    predicted = predict_phase_bytes(
        MemoryEstimate(parts.cfg, read_shape("3B", setting.tiny), ranks=1)
    )
    title = f"step {number + 1}"
    clock = PhaseClock(report, setting, title)

    rollouts = sample_rollouts(parts, number)
    clock.end("sampling", predicted["sampling"])

    advantages = make_advantages(rollouts)
    [update] = make_updates(
        parts.policy,
        parts.reference,
        rollouts,
        advantages,
        parts.cfg,
        parts.objective.agg_mode,
    )
    clock.end("packing and reference", predicted["scoring"])

    gaps = []
    for batch in update.micro_batches:
        loss = compute_policy_loss(
            parts.policy, batch, update.denominator, TEMPERATURE, parts.objective
        )
        loss.value.backward()
        gaps.append((loss.logp - batch.sampler_logp).abs())
    clock.end("training", predicted["training"])

    parts.optimizer.step()
    clock.end("update", predicted["update"])

    report.at_most(f"{title}: s", clock.total, STEP_SECONDS_BAR)
    gap = torch.cat(gaps)
    report.figure(f"{title}: mean |sampler - trainer|", gap.mean().item())
    report.figure(f"{title}: max |sampler - trainer|", gap.max().item())


def sample_rollouts(parts: StepParts, step: int) -> list[Rollout]:
    """Sample the step's texts; no id ends one."""
    sampling = parts.cfg.sampling
    indices = np.arange(len(parts.prompts))
    uniforms = draw_uniforms(0, step, indices, sampling.group_size, sampling.max_new_tokens)
    with unsharded(parts.policy):
        return generate(
            parts.policy,
            parts.prompts,
            sampling.group_size,
            sampling.temperature,
            sampling.max_new_tokens,
            frozenset(),
            uniforms,
            kernels=parts.cfg.model.kernels,
        )


class PhaseClock:
    """Measure a step's phases, one after another."""

    def __init__(self, report: Report, setting: Setting, title: str):
        self.report = report
        self.setting = setting
        self.title = title
        self.total = 0.0
        self._begin()

    def _begin(self) -> None:
        reset_peak(self.setting)
        self.setting.synchronize()
        self.began = time.perf_counter()

    def end(self, phase: str, predicted: float) -> None:
        """End a phase, report its seconds and memory, and begin the next one."""
        self.setting.synchronize()
        seconds = time.perf_counter() - self.began
        self.total += seconds
        title = f"{self.title}, {phase}"
        self.report.figure(f"{title}: s", seconds)
        compare_with_plan(self.report, self.setting, title, predicted)
        self._begin()
