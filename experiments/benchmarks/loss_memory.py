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
    """Hold the inputs at one shape.

    Each path leaves gradients in hidden.grad and weight.grad and returns its loss.
    """

    def __init__(self, N: int, C: int, V: int):
        g = torch.Generator().manual_seed(0)
        self.N = N
        self.hidden = torch.randn(N, C, generator=g).requires_grad_()
        self.weight = torch.empty(V, C).normal_(std=C**-0.5, generator=g).requires_grad_()
        self.target = torch.randint(V, (N,), generator=g)
        self.adv = torch.randn(-(-N // TOKENS), generator=g).repeat_interleave(TOKENS)[:N]
        self.old = torch.full((N,), -float(torch.tensor(V).log())) + torch.randn(N, generator=g)

    def formula(self, logp, rows=slice(None)):
        ratio = (logp - self.old[rows]).exp()
        adv = self.adv[rows]
        return -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv).sum() / self.N

    def naive(self):
        logits = (self.hidden @ self.weight.T).float()
        return self.formula(logits.gather(-1, self.target[:, None])[:, 0] - logits.logsumexp(-1))

    def fused(self):
        return fused_linear_loss(
            self.hidden,
            self.weight,
            self.target,
            1.0,
            make_distribution,
            make_token_loss(self.formula),
        )[0]

    def recompute(self):
        return self.formula(
            linear_log_probs(self.hidden, self.weight, self.target, 1.0, make_distribution)[0]
        )

    def liger(self):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=False, use_ref_model=False, chunk_size=1, loss_type="dapo"
        )
        shape = (-1, min(TOKENS, self.N))
        target = self.target.view(shape)
        return loss(
            self.hidden.view(*target.shape, -1),
            self.weight,
            target,
            torch.ones_like(target),
            self.adv.view(shape)[:, 0],
            old_per_token_logps=self.old.view(shape),
        )[0]

    def run(self, path: str) -> float:
        """Return the seconds of forward and backward."""
        self.hidden.grad = self.weight.grad = None
        start = time.perf_counter()
        self.loss = getattr(self, path)()
        self.loss.backward()
        return time.perf_counter() - start


def measure_resident(field: str) -> int:
    """Return the resident memory in bytes."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure_memory(shape: str, path: str) -> int:
    """Return, in a fresh process, the bytes by which one call at the shape raises the peak."""
    Case(8, 16, 32).run(path)
    case = Case(*SHAPES[shape])
    Path("/proc/self/clear_refs").write_text("5")
    before = measure_resident("VmRSS")
    case.run(path)
    return measure_resident("VmHWM") - before


def measure_times(shape: str, paths: list[str], repeats: int) -> dict[str, float]:
    """Return the median seconds of each path, the paths in turn."""
    case = Case(*SHAPES[shape])
    seconds = {path: [] for path in paths}
    gradients = {}
    for path in paths * repeats:
        seconds[path].append(case.run(path))
        if path not in gradients:  # the fair comparison: all give the same
            gradients[path] = [
                case.loss.item(),
                case.hidden.grad.norm().item(),
                case.weight.grad.norm().item(),
            ]
            torch.testing.assert_close(gradients[path], gradients["naive"], rtol=1e-3, atol=1e-6)
    return {path: median(s) for path, s in seconds.items()}


def main() -> int:
    """Run the shapes and print the bars."""
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
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        print(measure_memory(*args.memory))
        return 0
    bars = []
    for shape in args.shapes:
        paths = ["naive", "fused", "recompute"] + ["liger"] * (shape == "small")
        if "liger" in paths:
            try:
                import liger_kernel  # noqa: F401
            except ImportError:
                print("liger: skipped, the package liger-kernel is not installed")
                paths.remove("liger")
        seconds = measure_times(shape, paths, args.repeats)
        command = [sys.executable, __file__, "--threads", str(args.threads), "--memory", shape]
        peak = {
            path: int(
                subprocess.run(
                    [*command, path], capture_output=True, text=True, check=True
                ).stdout.split()[-1]
            )
            for path in paths
        }
        print("N={:,} C={:,} V={:,}, float32, {} threads".format(*SHAPES[shape], args.threads))
        for path in paths:
            print(
                f"  {path:<10}{seconds[path]:8.2f} s {seconds[path] / seconds['naive']:6.2f}x   "
                f"{peak[path] / 2**20:8.0f} MiB {peak[path] / peak['naive']:6.2f}x"
            )
        for path, (time_bar, memory_bar) in BARS[shape].items():
            bars.append(
                make_bar(
                    f"{shape}: {path} time / naive", seconds[path] / seconds["naive"], time_bar
                )
            )
            if memory_bar:
                bars.append(
                    make_bar(
                        f"{shape}: {path} memory / naive", peak[path] / peak["naive"], memory_bar
                    )
                )
            if "liger" in paths:
                bars.append(
                    make_bar(f"{shape}: {path} time / liger", seconds[path] / seconds["liger"], 0.5)
                )
    print(json.dumps({"bars": bars}))
    return 0 if all(b["ok"] for b in bars) else 1


def make_bar(name: str, value: float, limit: float) -> dict:
    """Return a bar for the line of JSON."""
    return dict(name=name, value=round(value, 4), bar=limit, ok=value <= limit)


if __name__ == "__main__":
    sys.exit(main())
