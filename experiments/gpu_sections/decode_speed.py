"""How fast the sampler decodes, and what its parts take.

Expected on an H200 (arithmetic from 4.3 TB/s of a copy and 790 TF/s of a product, and not
measured): 384 rows with a prompt of 256 and 512 new tokens, products at .7 of that rate, keys and
values at .6 of a copy's, 26 small kernels a layer at 2.2 us:

                     graphs, torch            graphs, triton           single launches
    0.5B             4.3 ms (89,000 tok/s)    3.3 ms (116,000 tok/s)   9 to 11 ms
    1.5B             7.5 ms                   6.3 ms                   10 to 13 ms
    3B               11.0 to 12.5 ms          9.6 to 11.1 ms           13 to 17 ms

A step of 36 layers is 1,376 launches: 12.6 ms of the host alone were counted on a CPU. The parts at
384 rows of 3B: attention over 384 slots reads 151 MB a layer, .06 ms at .6 of a copy; the head's
product is 239 GFLOP, .35 ms, or two to four times that where the rows of its result start at odd
addresses; the choice moves 2.3 GB in torch, .7 ms, and .36 GB by the kernel, .12 ms.

Legend: B rows, H query heads, K kv heads, D head dim, S slots, C width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from gpu_sections.report import Report
from gpu_sections.sampling_checks import Draw, cuda_graphs, sample
from gpu_sections.setting import (
    Setting,
    load_benchmark,
    make_prompts,
    make_random_policy,
    measure_copy_rate,
    read_shape,
    relative_error,
)

from recr1.distributed.fsdp import Sharded
from recr1.kernels.sample_token import sample_token, triton_sample_token
from recr1.model.log_probs import make_distribution
from recr1.model.packed_attention import attend_decode, make_decode_bias

SIZES = ("0.5B", "1.5B", "3B")

# Tokens per second of 384 rows, at least: those of experiments/benchmarks/sampler.py.
SPEED_BARS = {"0.5B": 130_000, "1.5B": 49_000, "3B": 29_000}
LEFT_BAR = 1.0  # MiB that a call may leave allocated
CAPTURE_BAR = 1.5  # seconds of prefill, warm-up and captures


def measure_decoding(report: Report, setting: Setting) -> None:
    """Tokens per second and their share of the roofline at 0.5B, 1.5B and 3B, graphs and eager."""
    copy_rate = measure_copy_rate(setting)
    report.figure("copy, TB/s", copy_rate / 1e12)
    for size in SIZES[: setting.pick(3, 1)]:
        for kernels in setting.kernels:
            measure_policy(report, setting, size, kernels, copy_rate)


def measure_policy(
    report: Report, setting: Setting, size: str, kernels: str, copy_rate: float
) -> None:
    """Measure a policy with these kernels; the speed of a whole call with the fastest ones."""
    policy = make_random_policy(setting, size, kernels=kernels)
    step = setting.step
    prompts = make_prompts(step.prompts, step.prompt, setting.reachable)
    draw = Draw(prompts, step.group, step.completion, kernels=kernels)
    if kernels == setting.fastest_kernels:
        sample(policy, draw._replace(new_tokens=4))  # kernels compile
        seconds = setting.time(lambda: sample(policy, draw))
        speed = step.prompts * step.group * step.completion / seconds
        report.at_least(f"{size}: tokens per second", speed, SPEED_BARS[size])
        report.figure(
            f"{size}: share of the roofline at this copy rate",
            speed / compute_roofline(setting, size, copy_rate),
        )
    measure_token(report, setting, policy, draw, size)
    if kernels == setting.fastest_kernels:
        measure_leftovers(report, setting, policy, draw, size)


def compute_roofline(setting: Setting, size: str, copy_rate: float) -> float:
    """Return the tokens per second that reading and multiplying allow (benchmarks/sampler.py)."""
    benchmark = load_benchmark("sampler")
    step = setting.step
    work = benchmark.Work(step.prompts, step.group, step.prompt, step.completion)
    return benchmark.compute_roofline(read_shape(size, setting.tiny), work, copy_rate)


def measure_token(report: Report, setting: Setting, policy: Sharded, draw: Draw, size: str) -> None:
    """Measure the milliseconds of a token: what twice as many tokens take longer."""
    few = setting.pick(64, 4)
    for name, wanted in (("single launches", False), ("graphs", True)):
        if wanted and not setting.has_gpu:
            report.skip(f"{size}: graphs", "CUDA graphs need a GPU")
            continue
        with cuda_graphs(wanted):
            sample(policy, draw._replace(new_tokens=4))
            short = setting.time(lambda: sample(policy, draw._replace(new_tokens=few)))
            long = setting.time(lambda: sample(policy, draw._replace(new_tokens=2 * few)))
        title = f"{size}, {draw.kernels}, {name}"
        report.figure(f"{title}: ms per token", (long - short) / few * 1e3)
        if wanted:
            beside = max(0.0, short - (long - short))
            report.at_most(f"{title}: prefill and captures, s", beside, CAPTURE_BAR)


def measure_leftovers(
    report: Report, setting: Setting, policy: Sharded, draw: Draw, size: str
) -> None:
    """Measure what each further call leaves allocated: 32 or 64 MiB would be cuBLAS's workspace of
    a new stream.
    """
    if not setting.has_gpu:
        return
    calls = 3
    before = torch.cuda.memory_allocated()
    for _ in range(calls):
        sample(policy, draw._replace(new_tokens=10))
    left = (torch.cuda.memory_allocated() - before) / calls / 2**20
    report.at_most(f"{size}: MiB that a call leaves", left, LEFT_BAR)


# --- parts of a step ------------------------------------------------------------------------------


class Part(NamedTuple):
    """The sizes of one decode step of 3B."""

    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    vocabulary: int


def measure_parts(report: Report, setting: Setting) -> None:
    """Parts of a decode step of 3B at 384 rows: attention, the head's product, the choice."""
    part = Part(384, 16, 2, 128, 2048, setting.reachable)
    if setting.tiny:
        part = Part(8, 4, 2, 16, 64, setting.reachable)
    with torch.no_grad():
        for slots in (384, 768)[: setting.pick(2, 1)]:
            measure_attention(report, setting, part, slots)
        measure_head_products(report, setting, part)
        measure_choice(report, setting, part)
    measure_gathered_keys(report, setting)


def measure_attention(report: Report, setting: Setting, part: Part, slots: int) -> None:
    """Measure attention over slots that are the first half of the cache's, against SDPA's."""
    B, H, K, D, _, _ = part
    q = setting.draw(B, H, D, dtype=setting.compute)
    k = setting.draw(B, K, 2 * slots, D, dtype=setting.compute)[:, :, :slots]
    v = setting.draw(B, K, 2 * slots, D, dtype=setting.compute)[:, :, :slots]
    last = torch.full((B,), slots - 3, device=setting.device)
    bias = make_decode_bias(last, slots, setting.compute)

    seconds = setting.time_many(lambda: attend_decode(q, k, v, bias))
    moved = 2 * B * K * slots * D * q.element_size()
    report.figure(f"attention, {B} x {slots}: us", seconds * 1e6)
    report.figure(f"attention, {B} x {slots}: TB/s of keys and values", moved / seconds / 1e12)
    want = F.scaled_dot_product_attention(
        q[:, :, None].double(),
        k.double().repeat_interleave(H // K, 1),
        v.double().repeat_interleave(H // K, 1),
        attn_mask=bias[:, 0].double(),
    )
    error = relative_error(attend_decode(q, k, v, bias), want[:, :, 0])
    report.figure(f"attention, {B} x {slots}: relative error", error)


def measure_head_products(report: Report, setting: Setting, part: Part) -> None:
    """Measure the head's product with rows that start anywhere and aligned, and in float32."""
    B, C, V = part.rows, part.width, part.vocabulary
    hidden = setting.draw(B, C)
    weight = setting.draw(V, C, std=C**-0.5)
    stride = -(-V // 16) * 16
    aligned = torch.empty(B, stride, dtype=torch.bfloat16, device=setting.device)
    products = {
        "rows of an odd length": lambda: F.linear(hidden, weight),
        "rows that start aligned": lambda: torch.mm(hidden, weight.T, out=aligned[:, :V]),
        "float32 operands (model.head_float32)": lambda: F.linear(hidden.float(), weight.float()),
    }
    if setting.has_gpu:  # a CPU has no such product
        products["float32 result of bfloat16 operands"] = lambda: torch.mm(
            hidden, weight.T, out_dtype=torch.float32
        )
    for name, run in products.items():
        seconds = setting.time_many(run, calls=10)
        report.figure(f"head, {name}: ms", seconds * 1e3)
        report.figure(f"head, {name}: TF/s", 2 * B * C * V / seconds / 1e12)


def measure_choice(report: Report, setting: Setting, part: Part) -> None:
    """Measure what choosing the next token from logits takes."""
    B, V = part.rows, part.vocabulary
    logits = setting.draw(B, -(-V // 16) * 16, std=3.0)[:, :V]
    uniforms = setting.draw_uniforms(B, 1)
    choices = {"torch": lambda: sample_token(make_distribution(logits, 0.6), uniforms)}
    if "triton" in setting.kernels:
        choices["triton"] = lambda: triton_sample_token(logits, 0.6, uniforms)
    for name, run in choices.items():
        report.figure(f"choice, {name}: ms", setting.time_many(run, calls=10) * 1e3)


def measure_gathered_keys(report: Report, setting: Setting) -> None:
    """Measure the backward of gathering a prompt's keys for its siblings: atomic sums."""
    rows = setting.pick(18_408, 24)  # the completions' keys of a micro-batch
    keys = setting.draw(rows, 2, 128).requires_grad_()
    index = torch.randint(rows, (rows,)).to(setting.device)
    gathered = keys.index_select(0, index)
    d_gathered = setting.draw(rows, 2, 128)

    def run_backward() -> None:
        torch.autograd.grad(gathered, keys, d_gathered, retain_graph=True)

    seconds = setting.time_many(run_backward, calls=5)
    report.figure(f"gathered keys, {rows} x 256: backward, ms", seconds * 1e3)
