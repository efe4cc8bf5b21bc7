"""Measure time and memory of head and loss on a CPU.

python experiments/benchmarks/loss_memory.py [--repeats 5]
[--threads 2] [--shapes small large]

One forward and backward of the clipped GRPO loss (dapo's token mean, no KL) from hidden states (N,
C) and a weight (V, C), in float32: `naive` makes float32 logits, gather - logsumexp, and leaves the
rest to autograd; `fused` and `recompute` are kernels/logprob.py in torch; `liger` is
LigerFusedLinearGRPOLoss(compiled=False, chunk_size=1), at the small shape only (minutes at the
large one).

Time: all in one process, in turn, median of the repeats. Memory: each in a fresh process, after a
call on 8 rows that loads the libraries: the peak resident size during one call (VmHWM, reset by
clear_refs) less the resident size before it, the weight's gradient included. Ends with one line of
JSON: the bars and whether they hold. Needs Linux, 12 GB for naive at the large shape, and a quiet
machine.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from recr1.kernels.logprob import fused_linear_loss, linear_log_probs, make_token_loss
from recr1.model.log_probs import make_distribution

SHAPES = {"small": (1024, 512, 32_768), "large": (4096, 896, 151_936)}
# time, memory
BARS = {
    "small": {"fused": (1.0, 0.35), "recompute": (1.4, None)},
    "large": {"fused": (1.0, 0.15), "recompute": (1.4, None)},
}
TOKENS = 64  # of a rollout, for Liger's (B, T)


class Case:
    """Hold the inputs at one shape; each path is a method run_PATH that returns its loss.

    Its backward leaves gradients in hidden.grad and weight.grad.
    """

    def __init__(self, N: int, C: int, V: int):
        generator = torch.Generator().manual_seed(0)
        rollouts = -(-N // TOKENS)
        uniform = -float(torch.tensor(V).log())
        self.N = N
        self.hidden = torch.randn(N, C, generator=generator).requires_grad_()
        self.weight = torch.empty(V, C).normal_(std=C**-0.5, generator=generator).requires_grad_()
        self.target = torch.randint(V, (N,), generator=generator)
        advantages = torch.randn(rollouts, generator=generator)
        self.advantage = advantages.repeat_interleave(TOKENS)[:N]
        self.old = torch.full((N,), uniform) + torch.randn(N, generator=generator)

    def compute_loss(self, logp, rows=slice(None)):
        ratio = (logp - self.old[rows]).exp()
        clipped = ratio.clamp(0.8, 1.2)
        advantage = self.advantage[rows]
        return -torch.minimum(ratio * advantage, clipped * advantage).sum() / self.N

    def run_naive(self):
        logits = (self.hidden @ self.weight.T).float()
        chosen = logits.gather(-1, self.target[:, None])[:, 0]
        return self.compute_loss(chosen - logits.logsumexp(-1))

    def run_fused(self):
        token_loss = make_token_loss(self.compute_loss)
        loss, *_ = fused_linear_loss(
            self.hidden, self.weight, self.target, 1.0, make_distribution, token_loss
        )
        return loss

    def run_recompute(self):
        logp, *_ = linear_log_probs(self.hidden, self.weight, self.target, 1.0, make_distribution)
        return self.compute_loss(logp)

    def run_liger(self):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        compute = LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=False, use_ref_model=False, chunk_size=1, loss_type="dapo"
        )
        shape = (-1, min(TOKENS, self.N))
        target = self.target.view(shape)
        hidden = self.hidden.view(*target.shape, -1)
        mask = torch.ones_like(target)
        advantage = self.advantage.view(shape)[:, 0]
        old = self.old.view(shape)
        loss, *_ = compute(hidden, self.weight, target, mask, advantage, old_per_token_logps=old)
        return loss

    def time_path(self, path: str) -> float:
        """Return the seconds of forward and backward."""
        self.hidden.grad = None
        self.weight.grad = None
        start = time.perf_counter()
        self.loss = getattr(self, f"run_{path}")()
        self.loss.backward()
        return time.perf_counter() - start


def measure_resident(field: str) -> int:
    """Return the resident memory in bytes."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    return int(match[1]) * 1024


def measure_memory(shape: str, path: str) -> int:
    """Return, in a fresh process, the bytes by which one call at the shape raises the peak."""
    small = Case(8, 16, 32)
    small.time_path(path)
    del small
    case = Case(*SHAPES[shape])
    Path("/proc/self/clear_refs").write_text("5")
    before = measure_resident("VmRSS")
    case.time_path(path)
    return measure_resident("VmHWM") - before


def measure_times(shape: str, paths: list[str], repeats: int) -> dict[str, float]:
    """Return the median seconds of each path, the paths in turn."""
    case = Case(*SHAPES[shape])
    seconds = {path: [] for path in paths}
    gradients = {}
    for path in paths * repeats:
        seconds[path].append(case.time_path(path))
        if path not in gradients:  # the fair comparison: all give the same
            loss = case.loss.item()
            hidden_norm = case.hidden.grad.norm().item()
            weight_norm = case.weight.grad.norm().item()
            gradients[path] = [loss, hidden_norm, weight_norm]
            torch.testing.assert_close(gradients[path], gradients["naive"], rtol=1e-3, atol=1e-6)
    return {path: median(times) for path, times in seconds.items()}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument(
        "--memory",
        nargs=2,
        metavar=("SHAPE", "PATH"),
        help="print one path's bytes: what a fresh process is started with",
    )
    return parser.parse_args()


def main() -> int:
    """Run the shapes and print the bars."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.memory:
        shape, path = args.memory
        print(measure_memory(shape, path))
        return 0
    bars = []
    for shape in args.shapes:
        paths = list_paths(shape)
        seconds = measure_times(shape, paths, args.repeats)
        peaks = {}
        for path in paths:
            peaks[path] = measure_memory_alone(shape, path, args.threads)
        print_shape(shape, seconds, peaks, args.threads)
        bars += make_bars(shape, seconds, peaks)
    print(json.dumps({"bars": bars}))
    return 0 if all(bar["ok"] for bar in bars) else 1


def list_paths(shape: str) -> list[str]:
    """Return the paths to run at a shape; print that liger is skipped where it is missing."""
    paths = ["naive", "fused", "recompute"]
    if shape != "small":
        return paths
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        print("liger: skipped, the package liger-kernel is not installed")
        return paths
    return [*paths, "liger"]


def measure_memory_alone(shape: str, path: str, threads: int) -> int:
    """Start a fresh process and return the bytes that it measures."""
    command = [sys.executable, __file__, "--threads", str(threads), "--memory", shape, path]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1])


def print_shape(shape: str, seconds: dict[str, float], peaks: dict[str, int], threads: int) -> None:
    """Print the figures of all paths at a shape."""
    N, C, V = SHAPES[shape]
    print(f"N={N:,} C={C:,} V={V:,}, float32, {threads} threads")
    for path in seconds:
        time_ratio = seconds[path] / seconds["naive"]
        memory_ratio = peaks[path] / peaks["naive"]
        mib = peaks[path] / 2**20
        print(
            f"  {path:<10}{seconds[path]:8.2f} s {time_ratio:6.2f}x   "
            f"{mib:8.0f} MiB {memory_ratio:6.2f}x"
        )


def make_bars(shape: str, seconds: dict[str, float], peaks: dict[str, int]) -> list[dict]:
    """Return the bars of our paths at a shape."""
    bars = []
    for path, (time_bar, memory_bar) in BARS[shape].items():
        time_ratio = seconds[path] / seconds["naive"]
        bars.append(make_bar(f"{shape}: {path} time / naive", time_ratio, time_bar))
        if memory_bar:
            memory_ratio = peaks[path] / peaks["naive"]
            bars.append(make_bar(f"{shape}: {path} memory / naive", memory_ratio, memory_bar))
        if "liger" in seconds:
            liger_ratio = seconds[path] / seconds["liger"]
            bars.append(make_bar(f"{shape}: {path} time / liger", liger_ratio, 0.5))
    return bars


def make_bar(name: str, value: float, limit: float) -> dict:
    """Return a bar for the line of JSON."""
    return dict(name=name, value=round(value, 4), bar=limit, ok=value <= limit)


if __name__ == "__main__":
    sys.exit(main())
