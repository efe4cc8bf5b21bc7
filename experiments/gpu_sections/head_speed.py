"""Head and loss at the sizes of Qwen2.5, beside Liger's and TRL's kernels where they are installed.

Expected on an H100 (arithmetic at 700 TF/s in products and 3.0 TB/s, and not measured; the sums are
in kernels/logprob.py), 8,192 tokens, forward and backward:

                     0.5B  C = 896             3B  C = 2,048
    fused            15.0 ms (448 TF/s)        31.0 ms (494)
    joined           14.1 to 15.0              30.1 to 31.0
    recompute        15.4 (580)                32.0 (638)

The FLOP are those that are executed: 6 N C V, and 8 N C V where logits are computed twice. The deep
dive, with more peers, sizes and memory, is experiments/benchmarks/kernels.py.

Legend: N trained tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_sections.report import Report, describe_error
from gpu_sections.setting import Setting, load_benchmark, read_shape

from recr1.kernels.logprob import fused_linear_loss, make_token_loss
from recr1.model.log_probs import make_distribution

TFLOPS_BAR = 450

# How often each path multiplies N x C x V, twice for a multiply and an add.
FLOP = {
    "fused, torch": 6,
    "fused, triton": 6,
    "joined, triton": 6,
    "recompute, triton": 8,
    "Liger": 6,
    "TRL, chunked": 8,
    "TRL, logits and kernel": 6,
}
OURS = ("fused, triton", "joined, triton", "recompute, triton")
PEERS = ("Liger", "TRL, chunked")

TRL_CHUNK = 32_768  # columns of a tile, as in its trainer


def measure_head(report: Report, setting: Setting) -> None:
    """TF/s of head and loss, forward and backward, beside Liger's and TRL's kernels."""
    for size in ("0.5B", "3B")[: setting.pick(2, 1)]:
        shape = read_shape(size, setting.tiny)
        N, C, V = setting.pick(8192, 12), shape.hidden_size, shape.vocab_size
        case = make_case(setting, N, C, V)
        milliseconds = {}
        for name in FLOP:
            try:
                seconds = time_path(setting, case, PATHS[name])
            except Exception as e:  # a peer that is not there, does not compile or has no memory
                report.skip(f"{size}, {name}", describe_error(e))
                continue
            milliseconds[name] = seconds * 1e3
            speed = FLOP[name] * N * C * V / seconds / 1e12
            report.figure(f"{size}, {name}: ms", seconds * 1e3)
            if name in OURS:
                report.at_least(f"{size}, {name}: TF/s", speed, TFLOPS_BAR)
            else:
                report.figure(f"{size}, {name}: TF/s", speed)
        compare_with_peers(report, milliseconds, size)


def compare_with_peers(report: Report, milliseconds: dict[str, float], size: str) -> None:
    """Add our fused head's time over each peer's."""
    ours = milliseconds.get("fused, triton")
    for peer in PEERS:
        if ours is not None and peer in milliseconds:
            report.at_most(f"{size}, fused over {peer}: time", ours / milliseconds[peer], 1.0)


def make_case(setting: Setting, N: int, C: int, V: int) -> Any:
    """Make the inputs of experiments/benchmarks/kernels.py, which has the paths that are ours."""
    benchmark = load_benchmark("kernels")
    if not setting.tiny:
        return benchmark.Case(N, C, V, setting.device.type)
    case = benchmark.Case(N, C, V, "cpu")  # a stand-in GPU has no random numbers of its own
    case.hidden = case.hidden.detach().to(setting.device).requires_grad_()
    case.weight = case.weight.detach().to(setting.device).requires_grad_()
    case.target = case.target.to(setting.device)
    for name, value in case.group.items():
        if isinstance(value, torch.Tensor):
            case.group[name] = value.to(setting.device)
    return case


def time_path(setting: Setting, case: Any, run: Callable[[Any], torch.Tensor]) -> float:
    """Return the seconds of forward and backward."""

    def run_both() -> None:
        case.hidden.grad = None
        case.weight.grad = None
        run(case).backward()

    run_both()  # kernels compile
    return setting.time_many(run_both, calls=3)


def run_fused_in_torch(case: Any) -> torch.Tensor:
    token_loss = make_token_loss(case.compute_mean)
    loss, *_ = fused_linear_loss(
        case.hidden, case.weight, case.target, 1.0, make_distribution, token_loss, "torch"
    )
    return loss


def run_trl_chunked(case: Any) -> torch.Tensor:
    """TRL's head without logits: they are computed tile by tile, twice."""
    from trl.kernels import ChunkedLogProbFunction

    no_bias = None
    logp, *_ = ChunkedLogProbFunction.apply(
        case.hidden, case.weight, no_bias, case.target, 1.0, TRL_CHUNK
    )
    return case.compute_mean(logp)


def run_trl_logits(case: Any) -> torch.Tensor:
    """TRL's kernel over logits that are all there."""
    from trl.kernels import selective_log_softmax_and_entropy

    logits = case.hidden @ case.weight.T
    logp, _ = selective_log_softmax_and_entropy(logits[None], case.target[None])
    return case.compute_mean(logp[0])


PATHS: dict[str, Callable[[Any], torch.Tensor]] = {
    "fused, torch": run_fused_in_torch,
    "fused, triton": lambda case: case.run_fused(),
    "joined, triton": lambda case: case.run_joined(),
    "recompute, triton": lambda case: case.run_recompute(),
    "Liger": lambda case: case.run_liger_cross_entropy(),
    "TRL, chunked": run_trl_chunked,
    "TRL, logits and kernel": run_trl_logits,
}
