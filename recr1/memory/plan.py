"""`recr1 plan`: whether a run fits its GPUs, what to set so that it does, and the prediction that a
run logs beside what it measures.

The prediction is memory/estimate.py's sum. Options are tried from the cheapest to the dearest; of the
token budgets the largest that fits is taken.
"""

from __future__ import annotations

import re
from dataclasses import replace

from recr1.config.loader import get_value
from recr1.config.schema import Config, ConfigError
from recr1.memory.estimate import MemoryEstimate, sum_bytes
from recr1.model.rope import DecoderConfig

# left free: the CUDA context, cuBLAS's and NCCL's buffers; a share of all for what fragments
CONTEXT = 1.5e9

FRAGMENTS = 0.05

MOST_RANKS = 64

BUDGET = "train.tokens_per_micro_batch"

# from cheap to dear: each line goes on top of those before it, and a smaller token budget on top of
# a line that does not fit by itself
LADDER = (
    {},
    {"train.reduce": "micro_batch"},
    {"train.checkpointing": True},
    {"loss.reference_on_host": True},
    {"loss.reference_on_host": None, "optimizer.on_host": True},
    {"loss.reference_on_host": True},
)

# tracking/run_log.py's names: ours
RUN_PHASES = {
    "sample": ("sampling",),
    "train": ("scoring", "training", "update"),
    "evaluate": ("evaluation",),
}


def parse_bytes(text: str) -> float:
    """ "48GB" (1e9) or "141GiB" (2^30) -> bytes. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB)", text.strip())
    if not match or not float(match[1]):
        raise ConfigError(
            f"--memory: {text!r} is no size; write 48GB (10^9 bytes) or 141GiB (2^30 bytes)"
        )
    return float(match[1]) * (1e9 if match[2] == "GB" else 2**30)


def get_usable_bytes(memory: float) -> float:
    """What of a device's memory a run may use."""
    return memory * (1 - FRAGMENTS) - CONTEXT


def apply_overrides(cfg: Config, options: dict) -> Config:
    for key, value in options.items():
        section, name = key.split(".")
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{name: value})})
    return cfg


def list_budgets(most: int, least: int) -> list[int]:
    """Token budgets to try, largest first: `most`, then 2^k and 3 2^k below it, at last `least`."""
    return [
        most,
        *(
            b
            for b in sorted({m << k for m in (2, 3) for k in range(1, 30)}, reverse=True)
            if least < b < most
        ),
        *[least] * (least < most),
    ]


def try_settings(
    cfg: Config, shape: DecoderConfig, ranks: int, usable: float
) -> list[tuple[dict, MemoryEstimate]]:
    """(overrides, footprint) of what was tried, in turn. The last one fits, unless nothing does:
    then it is the one with every option.

    A budget below a whole group, whose prompt is then computed several times, comes after all other
    options.
    """
    found = MemoryEstimate(cfg, shape, ranks)
    options = {}
    lines = []
    for more in LADDER:
        options = {key: value for key, value in (options | more).items() if value is not None}
        changes = {
            key: value
            for key, value in options.items()
            if get_value(cfg, key) != value and (key != "loss.reference_on_host" or cfg.loss.kl > 0)
        }
        lines += [changes] if changes not in lines else []
    tried = []
    most = get_value(cfg, BUDGET)
    for least in (max(found.group, found.longest), found.longest):
        for changes in lines:
            for budget in list_budgets(most, least):
                overrides = changes | ({BUDGET: budget} if budget < most else {})
                found = MemoryEstimate(apply_overrides(cfg, overrides), shape, ranks)
                if found.peak() <= usable:
                    return tried + [(overrides, found)]
                if overrides == changes and len(tried) < len(lines):
                    tried.append((overrides, found))
    return tried + [(overrides, found)]


def make_plan(cfg: Config, shape: DecoderConfig, ranks: int, memory: float) -> tuple[str, str]:
    """The text of `recr1 plan`, and why nothing fits, empty when something does."""
    if cfg.sft.teacher:
        raise ConfigError(
            "recr1 plan: counts GRPO's memory, and this config is for recr1.sft (sft.teacher), whose training it does not cover"
        )
    usable = get_usable_bytes(memory)
    tried = try_settings(cfg, shape, ranks, usable)
    overrides, last = tried[-1]
    fits = last.peak() <= usable
    lines = [
        f"{cfg.model.path}: {last.P:,} weights on {ranks} x {format_gib(memory)} GiB, of which {format_gib(usable)} are counted on: "
        f"{FRAGMENTS:.0%} are left to fragmentation, {format_gib(CONTEXT)} to CUDA, cuBLAS and NCCL",
        "",
        format_phase_table(last),
        "",
    ]
    for changes, found in tried:
        phase, need = format_largest(found)
        lines.append(
            f"{format_gib(need):>8} GiB  {phase:<11} {'fits' if need <= usable else 'too much':<9} {format_overrides(changes) or 'as configured'}"
        )
    if not fits:
        larger = next(
            (
                w
                for w in range(ranks + 1, MOST_RANKS + 1)
                if try_settings(cfg, shape, w, usable)[-1][1].peak() <= usable
            ),
            None,
        )
        return "\n".join(lines), (
            f"nothing fits {ranks} x {format_gib(memory)} GiB: with {format_overrides(overrides)} a GPU still needs {format_gib(last.peak())} GiB, "
            f"{format_gib(usable)} can be counted on; "
            + (f"take --gpus {larger}" if larger else f"nor do {MOST_RANKS} such GPUs")
        )
    larger = (
        MemoryEstimate(apply_overrides(last.cfg, {BUDGET: b}), shape, ranks)
        for b in list_budgets(last.step_tokens, get_value(last.cfg, BUDGET))[:-1]
    )
    more = [get_value(found.cfg, BUDGET) for found in larger if found.peak() <= usable]
    lines += ["", f"add: {format_overrides(overrides)}" if overrides else "fits as configured"]
    return "\n".join(lines + [f"there is room for {BUDGET}={more[0]}"] * bool(more)), ""


def format_phase_table(found: MemoryEstimate) -> str:
    """Phases by terms in GiB, then each term's formula."""
    phases = found.phases()
    terms = {t.name: t.formula for terms in phases.values() for t in terms if t.bytes}
    wide, unit, name_of = (
        max(map(len, terms)),
        *((2**30, "GiB") if found.peak() >= 2**30 else (2**20, "MiB")),
    )

    def cell(n: float) -> str:
        return f"{n / unit:11.1f}"

    lines = [f"{f'{name_of} per rank':<{wide}}" + "".join(f"{name:>11}" for name in phases)]
    for name in terms:
        cells = [sum(t.bytes for t in moment if t.name == name) for moment in phases.values()]
        lines.append(f"{name:<{wide}}" + "".join(cell(n) if n else " " * 11 for n in cells))
    lines += [
        f"{'sum':<{wide}}" + "".join(cell(sum_bytes(moment)) for moment in phases.values()),
        "",
    ]
    return "\n".join(lines + [f"{name:<{wide}}  {formula}" for name, formula in terms.items()])


def predict_by_run_phase(found: MemoryEstimate) -> dict[str, int]:
    """Bytes per rank by the phases that a run measures."""
    phases = found.phases()
    return {
        name: round(max(sum_bytes(phases[phase]) for phase in ours))
        for name, ours in RUN_PHASES.items()
    }


def format_announcement(found: MemoryEstimate, memory: int | None) -> str:
    """What a run says at its start: the prediction, and advice when it exceeds the GPU's `memory`."""
    text = "recr1: memory predicted per rank, at most: " + ", ".join(
        f"{name} {n / 2**20:,.0f} MiB" for name, n in predict_by_run_phase(found).items()
    )
    phase, need = format_largest(found)
    if memory is None or need <= get_usable_bytes(memory):
        return text
    overrides, last = try_settings(found.cfg, found.shape, found.ranks, get_usable_bytes(memory))[
        -1
    ]
    advice = (
        f"this fits: {format_overrides(overrides)}"
        if last.peak() <= get_usable_bytes(memory)
        else f"nothing fits {found.ranks} of them: take more GPUs"
    )
    return f"{text}\nrecr1: warning: {phase} may need {format_gib(need)} GiB, and of this GPU's {format_gib(memory)} {format_gib(get_usable_bytes(memory))} can be counted on; {advice}"


def format_largest(found: MemoryEstimate) -> tuple[str, float]:
    return max(
        ((phase, sum_bytes(moment)) for phase, moment in found.phases().items()),
        key=lambda item: item[1],
    )


def format_overrides(overrides: dict) -> str:
    return " ".join(f"{key}={str(value).lower()}" for key, value in overrides.items())


def format_gib(n: float) -> str:
    return f"{n / 2**30:.1f}"
