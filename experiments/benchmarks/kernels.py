"""Compare head and loss on a GPU with the ways others do it.

python experiments/benchmarks/kernels.py [--tokens 4096 ...] [--models 0.5B 1.5B 3B]

bf16, V = 151,936, forward and backward of -sum logp / N (`joined`: the clipped group loss from
rewards). In turn in one process, median of 5, the peak of allocated memory over the inputs
(gradients included), the relative error of d_hidden and d_weight on 512 tokens against float64,
TF/s on FLOP executed (6 N C V; 8 N C V where logits are made twice) and its share of a plain
matmul's rate at the same shape. What is missing or runs out of memory is skipped aloud. Then the
group loss's token kernel against a copy. Ends with one line of JSON, the bars. `--dry-run` runs
what a CPU can at a tiny size, Triton in its interpreter: it shows that the bench works, its times
mean nothing.

EXPECTED, arithmetic and not measured: H100, 700 TF/s in products, 3.0 TB/s, ms at 8,192 tokens
(kernels/logprob.py has the sums)
                                    0.5B  C = 896        1.5B  C = 1,536       3B  C = 2,048
    fused                        15.0   (448 TF/s)    23.9   (481)          31.0   (494)
    joined, all / none in L2        14.1 / 15.0          23.0 / 23.9           30.1 / 31.0
    recompute                       15.4   (580)         24.6   (622)          32.0   (638)
    memory over the inputs          0.29 GiB of logits and the gradients; d_weight in float32 while
                                    it is summed (fused): 0.51 / 0.87 / 1.16
    eager                           18.5 GiB; 9.6 / 16.4 / 21.8 of products and about 35 GB of
                                    passes: 21 / 28 / 33
    token kernel                    32 B a token, 0.9 of a copy's rate at 16 M tokens
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from statistics import median
from time import perf_counter
from typing import NamedTuple

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it at its import

import torch
import torch.nn.functional as F

from recr1.kernels import availability, logprob
from recr1.kernels.group_loss import GroupTokenLoss, LossRule
from recr1.kernels.logprob import fused_linear_loss, linear_log_probs, make_token_loss
from recr1.model.log_probs import make_distribution

WIDTHS = {"0.5B": 896, "1.5B": 1536, "3B": 2048}
VOCABULARY = 151_936
GROUP = 16
FLOP = dict(
    fused=6,
    joined=6,
    recompute=8,
    fused_torch=6,
    eager=6,
    compiled=6,
    torch_linear_cross_entropy=6,
    liger_cross_entropy=6,
    cut_cross_entropy=8,
)
OURS = ("fused", "joined", "recompute")
PEERS = ("liger_cross_entropy", "cut_cross_entropy")
NOT_DRY = ("compiled", *PEERS)


class Shape(NamedTuple):
    """Hold a problem's size: N tokens, C hidden channels, V words of the vocabulary."""

    model: str
    N: int
    C: int
    V: int


class Case:
    """Hold the inputs at one shape; each path is a method run_PATH that returns its loss.

    Its backward leaves gradients in hidden.grad and weight.grad.
    """

    def __init__(self, N: int, C: int, V: int, device: str):
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, std: float = 1.0) -> torch.Tensor:
            return torch.empty(shape, device=device).normal_(std=std, generator=generator)

        self.N = N
        self.C = C
        self.V = V
        self.hidden = draw(N, C).bfloat16().requires_grad_()
        self.weight = draw(V, C, std=C**-0.5).bfloat16().requires_grad_()
        self.target = torch.randint(V, (N,), device=device, generator=generator)
        length = max(N // (4 * GROUP), 1)
        rollout = (torch.arange(N, device=device) // length).clamp(max=4 * GROUP - 1)
        logp = torch.full((N,), -float(torch.tensor(V).log()), device=device)
        self.group = dict(
            rewards=draw(4, GROUP),
            rollout=rollout,
            weight=torch.ones(N, device=device),
            sampler_logp=logp + 0.1 * draw(N),
            denominator=float(N),
        )

    def compute_mean(self, logp, rows=None):
        return -logp.sum() / self.N

    def compute_fused_loss(self, token_loss, backend="triton"):
        loss, *_ = fused_linear_loss(
            self.hidden, self.weight, self.target, 1.0, make_distribution, token_loss, backend
        )
        return loss

    def run_fused(self):
        return self.compute_fused_loss(make_token_loss(self.compute_mean))

    def run_joined(self):
        return self.compute_fused_loss(GroupTokenLoss(LossRule(), **self.group))

    def run_recompute(self):
        logp, *_ = linear_log_probs(
            self.hidden, self.weight, self.target, 1.0, make_distribution, "triton"
        )
        return self.compute_mean(logp)

    def run_fused_torch(self):
        return self.compute_fused_loss(make_token_loss(self.compute_mean), "torch")

    def run_eager(self):
        logits = (self.hidden @ self.weight.T).float()
        chosen = logits.gather(-1, self.target[:, None])[:, 0]
        return self.compute_mean(chosen - logits.logsumexp(-1))

    def run_compiled(self):
        run = torch.compile(Case.run_eager, dynamic=False)
        return run(self)

    def run_torch_linear_cross_entropy(self):
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(self.hidden, self.weight, self.target, options=options)

    def run_liger_cross_entropy(self):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        return loss(self.weight, self.hidden, self.target)

    def run_cut_cross_entropy(self):
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(self.hidden, self.weight, self.target, filter_eps=None)


def time_call(run, device: str) -> float:
    """Return the seconds of a call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


def time_median(run, device: str, repeats: int) -> float:
    """Return the median seconds of some calls."""
    return median(time_call(run, device) for _ in range(repeats))


def measure_path(case: Case, path: str, device: str) -> tuple[float, float, int]:
    """Return seconds forward, seconds backward, peak bytes over the inputs."""
    case.hidden.grad = None
    case.weight.grad = None
    before = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    compute = getattr(case, f"run_{path}")
    losses = []
    forward = time_call(lambda: losses.append(compute()), device)
    backward = time_call(losses[0].backward, device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return forward, backward, peak - before


def compute_errors(paths: list[str], C: int, V: int, device: str) -> dict[str, list[float]]:
    """Return the relative error of d_hidden and d_weight of the mean's paths against float64."""
    case = Case(512 if device == "cuda" else 8, C, V, device)
    hidden = case.hidden.detach().double().requires_grad_()
    weight = case.weight.detach().double().requires_grad_()
    log_probs = (hidden @ weight.T).log_softmax(-1)
    logp = log_probs.gather(-1, case.target[:, None])
    want_hidden, want_weight = torch.autograd.grad(-logp.mean(), (hidden, weight))
    errors = {}
    for path in paths:
        if path != "joined":
            measure_path(case, path, device)
            hidden_error = compute_relative_error(case.hidden.grad, want_hidden)
            weight_error = compute_relative_error(case.weight.grad, want_weight)
            errors[path] = [hidden_error, weight_error]
    return errors


def compute_relative_error(actual: torch.Tensor, want: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of what is wanted."""
    difference = actual.double() - want
    return (difference.norm() / want.norm()).item()


def list_usable_paths(device: str, dry: bool) -> list[str]:
    """Return the paths that can run here; print which cannot."""
    paths = []
    for path in FLOP:
        obstacle = explain_obstacle(path, device, dry)
        if obstacle:
            print(f"{path}: skipped, {obstacle}")
        else:
            paths.append(path)
    return paths


def explain_obstacle(path: str, device: str, dry: bool) -> str | None:
    """Return why a path cannot run here, or None: it was run on a small case."""
    if dry and path in NOT_DRY:
        return "not in a dry run"
    backend = "triton" if path in OURS else "torch"
    reason = availability.explain_unavailable(backend, torch.device(device))
    if reason is not None:
        return reason
    # a peer may fail to import, to compile or to run: that is its line in the table
    try:
        case = Case(64, 32, 512, device)
        loss = getattr(case, f"run_{path}")()
        loss.backward()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return message.splitlines()[0]
    return None


def measure_shape(paths: list[str], shape: Shape, device: str, repeats: int) -> dict[str, dict]:
    """Measure all paths, print a line for each and return their ms and TF/s."""
    model, N, C, V = shape
    torch._dynamo.reset()  # after eight shapes `compiled` would run eagerly and not say so
    case = Case(N, C, V, device)
    runs = run_rounds(case, paths, model, device, repeats)
    seconds = time_median(lambda: case.hidden.detach() @ case.weight.detach().T, device, repeats)
    matmul_rate = 2 * N * C * V / seconds / 1e12
    errors = compute_errors(list(runs), C, V, device)

    print(
        f"\n{model}: {N:,} tokens, C = {C:,}, V = {V:,}; "
        f"a plain matmul makes {matmul_rate:.4g} TF/s"
    )
    print(
        f"{'':<28}{'forward ms':>11}{'backward ms':>12}{'total ms':>10}{'peak GiB':>10}"
        f"{'TF/s':>11}{'share':>7}   error d_hidden, d_weight"
    )
    figures = {}
    for path, measured in runs.items():
        forwards, backwards, peaks = zip(*measured)
        forward_ms = 1e3 * median(forwards)
        backward_ms = 1e3 * median(backwards)
        total_ms = forward_ms + backward_ms
        peak = median(peaks) / 2**30
        speed = FLOP[path] * N * C * V / (total_ms / 1e3) / 1e12
        share = speed / matmul_rate
        figures[path] = dict(ms=total_ms, tflops=speed)
        path_errors = ", ".join(f"{error:.1e}" for error in errors.get(path, []))
        print(
            f"{path:<28}{forward_ms:11.2f}{backward_ms:12.2f}{total_ms:10.2f}{peak:10.2f}"
            f"{speed:11.4g}{share:7.2f}   {path_errors}"
        )
    return figures


def run_rounds(
    case: Case, paths: list[str], model: str, device: str, repeats: int
) -> dict[str, list[tuple]]:
    """Run the paths in turn; return the figures of those that had the memory, without a warmup."""
    runs = {path: [] for path in paths}
    for _ in range(repeats + 1):  # the first round warms up
        for path in list(runs):
            try:
                runs[path].append(measure_path(case, path, device))
            except torch.OutOfMemoryError:
                print(f"{path}: skipped at {case.N:,} tokens of {model}, out of memory")
                del runs[path]
                case.hidden.grad = None
                case.weight.grad = None
                torch.cuda.empty_cache()
    return {path: measured[1:] for path, measured in runs.items()}


def measure_copy_share(N: int, device: str, repeats: int) -> float:
    """Return the token kernel's rate over a copy's, by bytes."""
    logp = torch.randn(N, device=device)
    rewards = torch.randn(64, GROUP, device=device)
    rollout = torch.arange(N, device=device) * 64 * GROUP // N
    weight = torch.ones_like(logp)
    token_loss = GroupTokenLoss(
        LossRule(kl_coef=0.1),
        rewards,
        rollout,
        weight,
        logp + 0.1,
        float(N),
        logp + 0.1,
        logp + 0.2,
    )
    destination = torch.empty_like(logp)

    def run_kernel() -> None:
        token_loss(logp, logp, slice(0, N))

    def copy_tokens() -> None:
        destination.copy_(logp)

    run_kernel()
    copy_tokens()
    kernel_seconds = time_median(run_kernel, device, repeats)
    copy_seconds = time_median(copy_tokens, device, repeats)
    kernel_rate = 32 * N / kernel_seconds
    copy_rate = 8 * N / copy_seconds
    print(
        f"\ntoken kernel: {kernel_rate / 1e9:.4g} GB/s, a copy: "
        f"{copy_rate / 1e9:.4g} GB/s, at {N:,} tokens"
    )
    return kernel_rate / copy_rate


def make_bar(name: str, value: float, limit: float, ok: bool) -> dict:
    """Return a bar for the line of JSON."""
    return dict(name=name, value=round(value, 4), bar=limit, ok=ok)


def make_shape_bars(shape: Shape, figures: dict[str, dict]) -> list[dict]:
    """Return the bars of our paths: their TF/s, and their time over the peers'."""
    bars = []
    title = f"{shape.model} {shape.N}"
    for path in OURS:
        if path not in figures:
            continue
        speed = figures[path]["tflops"]
        ms = figures[path]["ms"]
        bars.append(make_bar(f"{title}: {path} TF/s", speed, 450, speed >= 450))
        for peer in PEERS:
            if peer in figures and shape.N > 4096:
                peer_ms = figures[peer]["ms"]
                name = f"{title}: {path} ms / {peer}"
                bars.append(make_bar(name, ms / peer_ms, 1, ms < peer_ms))
    return bars


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192, 16_384, 65_536])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args()


def main() -> int:
    """Run the shapes and print the bars."""
    args = parse_arguments()
    if not args.dry_run and not torch.cuda.is_available():
        print("no GPU: --dry-run shows that the bench works", file=sys.stderr)
        return 2
    if args.dry_run:
        print(f"torch {torch.__version__}, dry run: times mean nothing")
        run_dry(args.repeats)
        bars = []
    else:
        print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
        bars = run_on_gpu(args)
    logits = logprob.WORKSPACE_BYTES["cuda"] / 2**30
    bars.append(make_bar("workspace of logits, GiB", logits, 0.3, logits <= 0.3))
    print(json.dumps({"bars": bars}))
    return 0 if all(bar["ok"] for bar in bars) else 1


def run_dry(repeats: int) -> None:
    """Run what a CPU can at a tiny size."""
    paths = list_usable_paths("cpu", dry=True)
    measure_shape(paths, Shape("dry", 40, 16, 301), "cpu", 1)
    if "joined" in paths:
        measure_copy_share(3000, "cpu", repeats)


def run_on_gpu(args: argparse.Namespace) -> list[dict]:
    """Measure all shapes and return their bars."""
    paths = list_usable_paths("cuda", dry=False)
    bars = []
    for model in args.models:
        for tokens in args.tokens:
            shape = Shape(model, tokens, WIDTHS[model], VOCABULARY)
            figures = measure_shape(paths, shape, "cuda", args.repeats)
            bars += make_shape_bars(shape, figures)
    if "joined" in paths:
        share = measure_copy_share(1 << 24, "cuda", args.repeats)
        bars.append(make_bar("token kernel / copy bandwidth", share, 0.8, share >= 0.8))
    return bars


if __name__ == "__main__":
    sys.exit(main())
