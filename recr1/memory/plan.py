"""`recr1 plan`: whether a run fits its GPUs, what to set so that it does, and the prediction that a
run logs beside what it measures.

The prediction is the sum of memory/estimate.py. Options are tried from the cheapest to the most
expensive; of the token budgets the largest that fits is taken.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from recr1.config.loader import get_value
from recr1.config.schema import Config, ConfigError
from recr1.memory.estimate import MemoryEstimate, sum_bytes
from recr1.model.rope import DecoderConfig

# What a run may not use: bytes for the CUDA context and the buffers of cuBLAS and NCCL, and a share
# of a device's memory that fragmentation takes.
CONTEXT_BYTES = 1.5e9
FRAGMENTATION = 0.05

MAX_RANKS = 64  # how many GPUs are tried when nothing fits

BUDGET = "train.tokens_per_micro_batch"

# What a run that has run out of memory is to need of what it was predicted to need.
LESS = 0.9

ADVICE_WITHOUT_PLAN = f"set train.gradient_checkpointing=true, or a smaller {BUDGET}"

# From cheap to expensive. Each line is added to those before it (None takes an option back), and a
# smaller token budget to a line that does not fit by itself.
LADDER: tuple[dict[str, Any], ...] = (
    {},
    {"train.gradient_sync": "every_micro_batch"},
    {"train.gradient_checkpointing": True},
    {"loss.reference_cpu_offload": True},
    {"loss.reference_cpu_offload": None, "optimizer.cpu_offload": True},
    {"loss.reference_cpu_offload": True},
    {"sampling.kv_cache_gib": 4.0},
    {"sampling.kv_cache_gib": 2.0},
)

# The phases that a run measures (tracking/run_log.py), and ours that they include.
RUN_PHASES = {
    "sample": ("sampling",),
    "train": ("scoring", "training", "update"),
    "evaluate": ("evaluation",),
}


def parse_bytes(text: str) -> float:
    """Return the bytes of "48GB" (1e9 each) or "141GiB" (2^30 each). Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB)", text.strip())
    if not match or not float(match[1]):
        raise ConfigError(
            f"--memory: {text!r} is no size; write 48GB (10^9 bytes) or 141GiB (2^30 bytes)"
        )
    number, unit = match.groups()
    return float(number) * (1e9 if unit == "GB" else 2**30)


def get_usable_bytes(memory: float) -> float:
    """Return what a run may use of a device's memory."""
    return memory * (1 - FRAGMENTATION) - CONTEXT_BYTES


def apply_overrides(cfg: Config, overrides: dict[str, Any]) -> Config:
    """Return the config with the values of dotted keys replaced."""
    for key, value in overrides.items():
        section_name, name = key.split(".")
        section = replace(getattr(cfg, section_name), **{name: value})
        cfg = replace(cfg, **{section_name: section})
    return cfg


def list_budgets(largest: int, smallest: int) -> list[int]:
    """Return the token budgets to try, from the largest: it, then 2^k and 3 2^k, the smallest."""
    budgets = [largest]
    powers = {factor << k for factor in (2, 3) for k in range(1, 30)}
    for budget in sorted(powers, reverse=True):
        if smallest < budget < largest:
            budgets.append(budget)
    if smallest < largest:
        budgets.append(smallest)
    return budgets


def try_settings(
    cfg: Config, shape: DecoderConfig, ranks: int, usable: float, gpu: bool = True
) -> list[tuple[dict[str, Any], MemoryEstimate]]:
    """Return (overrides, estimate) of what was tried, in order.

    The last one fits, unless nothing does: then it is the one with every option. A budget below a
    whole group, whose prompt is then computed several times, comes after all other options.
    """
    estimate = MemoryEstimate(cfg, shape, ranks, gpu)
    option_sets = _list_option_sets(cfg)
    configured_budget = get_value(cfg, BUDGET)
    tried: list[tuple[dict[str, Any], MemoryEstimate]] = []
    for smallest in (max(estimate.group, estimate.longest), estimate.longest):
        for options in option_sets:
            for budget in list_budgets(configured_budget, smallest):
                overrides = dict(options)
                if budget < configured_budget:
                    overrides[BUDGET] = budget
                estimate = MemoryEstimate(apply_overrides(cfg, overrides), shape, ranks, gpu)
                if estimate.peak() <= usable:
                    return tried + [(overrides, estimate)]
                is_first_time = len(tried) < len(option_sets)
                if overrides == options and is_first_time:
                    tried.append((overrides, estimate))
    return tried + [(overrides, estimate)]


def _list_option_sets(cfg: Config) -> list[dict[str, Any]]:
    """Return the overrides of each line of LADDER, without those that change nothing."""
    option_sets: list[dict[str, Any]] = []
    added: dict[str, Any] = {}
    for line in LADDER:
        merged = added | line
        added = {key: value for key, value in merged.items() if value is not None}
        overrides = {}
        for key, value in added.items():
            if _saves_memory(cfg, key, value):
                overrides[key] = value
        if overrides not in option_sets:
            option_sets.append(overrides)
    return option_sets


def _saves_memory(cfg: Config, key: str, value: Any) -> bool:
    """Return whether a line of LADDER can make a config smaller."""
    current = get_value(cfg, key)
    has_adapters = cfg.lora.rank > 0
    if key == "loss.reference_cpu_offload" and (cfg.loss.kl_coef == 0 or has_adapters):
        return False  # LoRA's reference is the policy's own weights
    if key == "optimizer.cpu_offload" and has_adapters:
        return False  # its moments are not worth two copies a step
    if key == "sampling.kv_cache_gib" and 0 < current <= value:
        return False
    return current != value


def make_plan(cfg: Config, shape: DecoderConfig, ranks: int, memory: float) -> tuple[str, str]:
    """Return the text of `recr1 plan`, and why nothing fits, empty when something does."""
    if cfg.sft.teacher:
        raise ConfigError(
            "recr1 plan: counts GRPO's memory, and this config is for recr1.sft (sft.teacher), "
            "whose training it does not cover"
        )
    usable = get_usable_bytes(memory)
    tried = try_settings(cfg, shape, ranks, usable)
    overrides, last = tried[-1]
    trained = ""
    if last.trained_weights < last.num_weights:
        trained = f", {last.trained_weights:,} of them trained,"
    lines = [
        f"{cfg.model.path}: {last.num_weights:,} weights{trained} "
        f"on {ranks} x {format_gib(memory)} GiB, "
        f"of which {format_gib(usable)} are counted on: "
        f"{FRAGMENTATION:.0%} are left to fragmentation, "
        f"{format_gib(CONTEXT_BYTES)} to CUDA, cuBLAS and NCCL",
        "",
        format_phase_table(last),
        "",
    ]
    for tried_overrides, estimate in tried:
        phase, needed = find_largest_phase(estimate)
        verdict = "fits" if needed <= usable else "too much"
        options = format_overrides(tried_overrides) or "as configured"
        lines.append(f"{format_gib(needed):>8} GiB  {phase:<11} {verdict:<9} {options}")
    if last.peak() > usable:
        enough_ranks = _find_enough_ranks(cfg, shape, ranks, usable)
        advice = f"nor do {MAX_RANKS} such GPUs"
        if enough_ranks is not None:
            advice = f"take --gpus {enough_ranks}"
        return "\n".join(lines), (
            f"nothing fits {ranks} x {format_gib(memory)} GiB: "
            f"with {format_overrides(overrides)} a GPU still needs {format_gib(last.peak())} GiB, "
            f"{format_gib(usable)} can be counted on; {advice}"
        )

    lines.append("")
    lines.append(f"add: {format_overrides(overrides)}" if overrides else "fits as configured")
    larger_budget = _find_larger_budget(last, usable)
    if larger_budget is not None:
        lines.append(f"there is room for {BUDGET}={larger_budget}")
    return "\n".join(lines), ""


def _find_enough_ranks(cfg: Config, shape: DecoderConfig, ranks: int, usable: float) -> int | None:
    """Return the least number of ranks above `ranks` on which something fits."""
    for more_ranks in range(ranks + 1, MAX_RANKS + 1):
        _, last = try_settings(cfg, shape, more_ranks, usable)[-1]
        if last.peak() <= usable:
            return more_ranks
    return None


def _find_larger_budget(estimate: MemoryEstimate, usable: float) -> int | None:
    """Return the largest token budget above the config's that fits, if there is one."""
    budget = get_value(estimate.cfg, BUDGET)
    for larger in list_budgets(estimate.step_tokens, budget)[:-1]:
        cfg = apply_overrides(estimate.cfg, {BUDGET: larger})
        if MemoryEstimate(cfg, estimate.shape, estimate.ranks).peak() <= usable:
            return larger
    return None


def format_phase_table(estimate: MemoryEstimate) -> str:
    """Return a table of phases by terms, in GiB or MiB, then the formula of each term."""
    phases = estimate.phases()
    formulas = {}
    for terms in phases.values():
        for term in terms:
            if term.bytes:
                formulas[term.name] = term.formula
    name_width = max(map(len, formulas))
    is_large = estimate.peak() >= 2**30
    unit = 2**30 if is_large else 2**20
    unit_name = "GiB" if is_large else "MiB"

    def format_row(name: str, cells: list[str]) -> str:
        return f"{name:<{name_width}}" + "".join(f"{cell:>11}" for cell in cells)

    lines = [format_row(f"{unit_name} per rank", list(phases))]
    for name in formulas:
        cells = []
        for terms in phases.values():
            size = sum(term.bytes for term in terms if term.name == name)
            cells.append(f"{size / unit:.1f}" if size else "")
        lines.append(format_row(name, cells))
    sums = [f"{sum_bytes(terms) / unit:.1f}" for terms in phases.values()]
    lines.append(format_row("sum", sums))
    lines.append("")
    for name, formula in formulas.items():
        lines.append(f"{name:<{name_width}}  {formula}")
    return "\n".join(lines)


def predict_by_run_phase(estimate: MemoryEstimate) -> dict[str, int]:
    """Return bytes per rank by the phases that a run measures."""
    phases = estimate.phases()
    predicted = {}
    for run_phase, names in RUN_PHASES.items():
        largest = max(sum_bytes(phases[name]) for name in names)
        predicted[run_phase] = round(largest)
    return predicted


def format_announcement(estimate: MemoryEstimate, memory: int | None) -> str:
    """Return what a run prints at its start: the prediction, and advice when it exceeds the GPU's
    `memory`.
    """
    predicted = predict_by_run_phase(estimate)
    sizes = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in predicted.items())
    text = f"recr1: memory predicted per rank, at most: {sizes}"
    if memory is None:
        return text
    usable = get_usable_bytes(memory)
    phase, needed = find_largest_phase(estimate)
    if needed <= usable:
        return text

    ranks = estimate.ranks
    overrides, last = try_settings(estimate.cfg, estimate.shape, ranks, usable)[-1]
    advice = f"nothing fits {ranks} of them: take more GPUs"
    if last.peak() <= usable:
        advice = f"this fits: {format_overrides(overrides)}"
    return (
        f"{text}\nrecr1: warning: {phase} may need {format_gib(needed)} GiB, "
        f"and of this GPU's {format_gib(memory)} {format_gib(usable)} can be counted on; {advice}"
    )


def advise_less_memory(estimate: MemoryEstimate, memory: int | None) -> str:
    """Return what to add to the command of a run that has run out of memory.

    By the plan it then needs a tenth less than before, and fits the GPU's `memory`; None on a CPU.
    """
    usable = LESS * estimate.peak()
    if memory is not None:
        usable = min(usable, get_usable_bytes(memory))
    overrides, last = try_settings(
        estimate.cfg, estimate.shape, estimate.ranks, usable, estimate.gpu
    )[-1]
    if last.peak() > usable:
        device = "GPUs" if estimate.gpu else "memory"
        return f"no setting needs a tenth less: take more {device}"
    return f"add {format_overrides(overrides)}"


def find_largest_phase(estimate: MemoryEstimate) -> tuple[str, float]:
    """Return the phase that needs the most memory, and its bytes."""
    sizes = {phase: sum_bytes(terms) for phase, terms in estimate.phases().items()}
    largest = max(sizes, key=sizes.__getitem__)
    return largest, sizes[largest]


def format_overrides(overrides: dict[str, Any]) -> str:
    """Return the overrides as they are written on a command line."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in overrides.items())


def format_gib(size: float) -> str:
    return f"{size / 2**30:.1f}"
