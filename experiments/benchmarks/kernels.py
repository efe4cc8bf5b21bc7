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

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it at its import

import torch
import torch.nn.functional as F

from recr1.kernels import availability, logprob
from recr1.kernels.group_loss import GroupTokenLoss, LossRule
from recr1.kernels.logprob import fused_linear_loss, linear_log_probs, make_token_loss
from recr1.model.log_probs import make_distribution

WIDTHS = {"0.5B": 896, "1.5B": 1536, "3B": 2048}
GROUP = 16


class Case:
    """Hold the inputs at one shape; each path is a method that leaves gradients in hidden.grad and
    weight.grad.
    """

    def __init__(self, N: int, C: int, V: int, device: str):
        g = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, std: float = 1.0) -> torch.Tensor:
            return torch.empty(shape, device=device).normal_(std=std, generator=g)

        self.N = N
        self.C = C
        self.V = V
        self.hidden = draw(N, C).bfloat16().requires_grad_()
        self.weight = draw(V, C, std=C**-0.5).bfloat16().requires_grad_()
        self.target = torch.randint(V, (N,), device=device, generator=g)
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

    def mean(self, logp, rows=None):
        return -logp.sum() / self.N

    def shots(self, pull, backend="triton"):
        return fused_linear_loss(
            self.hidden, self.weight, self.target, 1.0, make_distribution, pull, backend
        )[0]

    def fused(self):
        return self.shots(make_token_loss(self.mean))

    def joined(self):
        return self.shots(GroupTokenLoss(LossRule(), **self.group))

    def recompute(self):
        return self.mean(
            linear_log_probs(
                self.hidden, self.weight, self.target, 1.0, make_distribution, "triton"
            )[0]
        )

    def fused_torch(self):
        return self.shots(make_token_loss(self.mean), "torch")

    def eager(self):
        logits = (self.hidden @ self.weight.T).float()
        return self.mean(logits.gather(-1, self.target[:, None])[:, 0] - logits.logsumexp(-1))

    def compiled(self):
        return torch.compile(Case.eager, dynamic=False)(self)

    def torch_linear_cross_entropy(self):
        return F.linear_cross_entropy(
            self.hidden, self.weight, self.target, options=torch.nn.LinearCrossEntropyOptions()
        )

    def liger_cross_entropy(self):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(self.weight, self.hidden, self.target)

    def cut_cross_entropy(self):
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(self.hidden, self.weight, self.target, filter_eps=None)


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
NOT_DRY = ("compiled", "liger_cross_entropy", "cut_cross_entropy")


def time_call(run, device: str) -> float:
    """Return the seconds of a call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


def measure_path(case: Case, path: str, device: str) -> tuple[float, float, int]:
    """Return seconds forward, seconds backward, peak bytes over the inputs."""
    case.hidden.grad = case.weight.grad = None
    before = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    out = []
    forward = time_call(lambda: out.append(getattr(case, path)()), device)
    backward = time_call(lambda: out[0].backward(), device)
    return (
        forward,
        backward,
        (torch.cuda.max_memory_allocated() if device == "cuda" else 0) - before,
    )


def compute_errors(paths: list[str], C: int, V: int, device: str) -> dict[str, list[float]]:
    """Return the relative error of d_hidden and d_weight of the mean's paths against float64."""
    case = Case(512 if device == "cuda" else 8, C, V, device)
    exact = [x.detach().double().requires_grad_() for x in (case.hidden, case.weight)]
    logp = (exact[0] @ exact[1].T).log_softmax(-1).gather(-1, case.target[:, None])
    want = torch.autograd.grad(-logp.mean(), exact)
    found = {}
    for path in paths:
        if path != "joined":
            measure_path(case, path, device)
            found[path] = [
                ((x.grad.double() - y).norm() / y.norm()).item()
                for x, y in zip((case.hidden, case.weight), want)
            ]
    return found


def list_usable_paths(device: str, dry: bool) -> list[str]:
    """Return the paths that can run here; print which cannot."""
    paths = []
    for path in FLOP:
        why = (
            "not in a dry run"
            if dry and path in NOT_DRY
            else availability.explain_unavailable(
                "triton" if path in OURS else "torch", torch.device(device)
            )
        )
        try:
            if why is None:
                case = Case(64, 32, 512, device)
                getattr(case, path)().backward()
        except (
            Exception
        ) as e:  # a peer may fail to import, to compile or to run: that is its line in the table
            why = f"{type(e).__name__}: {e}".splitlines()[0]
        if why:
            print(f"{path}: skipped, {why}")
        else:
            paths.append(path)
    return paths


def print_table(paths, model, N, C, V, device, repeats) -> dict[str, dict]:
    """Measure all paths and print a line for each."""
    torch._dynamo.reset()  # after eight shapes `compiled` would run eagerly and not say so
    case = Case(N, C, V, device)
    runs = {path: [] for path in paths}
    left = list(paths)
    for _ in range(repeats + 1):  # the first round warms up
        for path in list(left):
            try:
                runs[path].append(measure_path(case, path, device))
            except torch.OutOfMemoryError:
                print(f"{path}: skipped at {N:,} tokens of {model}, out of memory")
                left.remove(path)
                case.hidden.grad = case.weight.grad = None
                torch.cuda.empty_cache()
    plain = median(
        time_call(lambda: case.hidden.detach() @ case.weight.detach().T, device)
        for _ in range(repeats)
    )
    rate = 2 * N * C * V / plain / 1e12
    found = {}
    wrong = compute_errors(left, C, V, device)
    print(f"\n{model}: {N:,} tokens, C = {C:,}, V = {V:,}; a plain matmul makes {rate:.4g} TF/s")
    print(
        f"{'':<28}{'forward ms':>11}{'backward ms':>12}{'total ms':>10}{'peak GiB':>10}"
        f"{'TF/s':>11}{'share':>7}   error d_hidden, d_weight"
    )
    for path in left:
        forwards, backwards, peaks = zip(*runs[path][1:])
        forward = median(forwards)
        backward = median(backwards)
        peak = median(peaks)
        speed = FLOP[path] * N * C * V / (forward + backward) / 1e12
        found[path] = dict(ms=1e3 * (forward + backward), tflops=speed)
        print(
            f"{path:<28}{1e3 * forward:11.2f}{1e3 * backward:12.2f}"
            f"{1e3 * (forward + backward):10.2f}{peak / 2**30:10.2f}"
            f"{speed:11.4g}{speed / rate:7.2f}   "
            + ", ".join(f"{e:.1e}" for e in wrong.get(path, []))
        )
    return found


def measure_copy_share(N: int, device: str, repeats: int) -> float:
    """Return the token kernel's rate over a copy's, by bytes."""
    x = torch.randn(N, device=device)
    pull = GroupTokenLoss(
        LossRule(kl_coef=0.1),
        torch.randn(64, GROUP, device=device),
        torch.arange(N, device=device) * 64 * GROUP // N,
        torch.ones_like(x),
        x + 0.1,
        float(N),
        x + 0.1,
        x + 0.2,
    )
    destination = torch.empty_like(x)

    def run() -> None:
        pull(x, x, slice(0, N))

    def copy() -> None:
        destination.copy_(x)

    run()
    copy()
    ours = median(time_call(run, device) for _ in range(repeats))
    theirs = median(time_call(copy, device) for _ in range(repeats))
    print(
        f"\ntoken kernel: {32 * N / ours / 1e9:.4g} GB/s, a copy: "
        f"{8 * N / theirs / 1e9:.4g} GB/s, at {N:,} tokens"
    )
    return 32 / ours / (8 / theirs)


def make_bar(name: str, value: float, limit: float, ok: bool) -> dict:
    """Return a bar for the line of JSON."""
    return dict(name=name, value=round(value, 4), bar=limit, ok=ok)


def main() -> int:
    """Run the shapes and print the bars."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192, 16_384, 65_536])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    device = "cpu" if args.dry_run else "cuda"
    if not args.dry_run and not torch.cuda.is_available():
        print("no GPU: --dry-run shows that the bench works", file=sys.stderr)
        return 2
    print(
        f"torch {torch.__version__}, "
        + ("dry run: times mean nothing" if args.dry_run else torch.cuda.get_device_name())
    )
    paths = list_usable_paths(device, args.dry_run)
    bars = []
    shapes = (
        [("dry", 40, 16, 301)]
        if args.dry_run
        else [(m, N, WIDTHS[m], 151_936) for m in args.models for N in args.tokens]
    )
    for model, N, C, V in shapes:
        found = print_table(paths, model, N, C, V, device, 1 if args.dry_run else args.repeats)
        for path in OURS:
            if path in found and not args.dry_run:
                bars.append(
                    make_bar(
                        f"{model} {N}: {path} TF/s",
                        found[path]["tflops"],
                        450,
                        found[path]["tflops"] >= 450,
                    )
                )
                bars += [
                    make_bar(
                        f"{model} {N}: {path} ms / {peer}",
                        found[path]["ms"] / found[peer]["ms"],
                        1,
                        found[path]["ms"] < found[peer]["ms"],
                    )
                    for peer in ("liger_cross_entropy", "cut_cross_entropy")
                    if peer in found and N > 4096
                ]
    if "joined" in paths:
        share = measure_copy_share(3000 if args.dry_run else 1 << 24, device, args.repeats)
        if not args.dry_run:
            bars.append(make_bar("token kernel / copy bandwidth", share, 0.8, share >= 0.8))
    logits = logprob.WORKSPACE_BYTES["cuda"] / 2**30
    bars.append(make_bar("workspace of logits, GiB", logits, 0.3, logits <= 0.3))
    print(json.dumps({"bars": bars}))
    return 0 if all(b["ok"] for b in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
