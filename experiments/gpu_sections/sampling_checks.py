"""The sampler: CUDA graphs against eager steps, and its log-probs against the trainer's.

Both use the bundled policy, 1.9 M trained parameters, on real queries: a model with random weights
chooses nearly uniformly, where rounding alone changes the texts.

Legend: P prompts, G siblings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from gpu_sections.report import CannotRun, Report
from gpu_sections.setting import (
    BUNDLED_POLICY,
    ROOT,
    Setting,
    attribute_set,
    make_prompts,
    make_random_policy,
)

from recr1.commands.rewrite import Rewriter
from recr1.config.schema import Config
from recr1.data_types import MicroBatch, Prompt, Rollout
from recr1.distributed.fsdp import Sharded, unsharded
from recr1.model.log_probs import compute_log_probs
from recr1.rl.packing import deduplicate
from recr1.sampling import generate as sampler
from recr1.train import make_micro_batches
from recr1.training.load_model import load_policy
from recr1.utils.counter_rng import draw_uniforms

QUERIES = ROOT / "experiments/data/msrd/test.queries.jsonl"
GROUP = 8
NEW_TOKENS = 28  # of the quickstart


class Draw(NamedTuple):
    """What a call of the sampler is asked for."""

    prompts: list[Prompt]
    group: int
    new_tokens: int
    stops: frozenset[int] = frozenset()
    temperature: float = 1.0
    greedy: bool = False
    top_p: float = 1.0
    kernels: str = "torch"


def read_bundled_prompts(setting: Setting) -> tuple[Rewriter, list[Prompt]]:
    """Return the bundled policy with its tokenizer, and prompts of the first test queries."""
    rewriter = Rewriter(str(BUNDLED_POLICY), None)
    count = setting.pick(64, 3)
    lines = QUERIES.read_text(encoding="utf-8").splitlines()[:count]
    prompts = [rewriter.make_prompt(json.loads(line)["text"]) for line in lines]
    return rewriter, prompts


def sample(policy: Sharded, draw: Draw) -> list[Rollout]:
    """Sample G texts of each prompt."""
    uniforms = None
    if not draw.greedy:
        indices = np.arange(len(draw.prompts))
        uniforms = draw_uniforms(0, 0, indices, draw.group, draw.new_tokens)
    with unsharded(policy):
        return sampler.generate(
            policy,
            draw.prompts,
            draw.group,
            draw.temperature,
            draw.new_tokens,
            draw.stops,
            uniforms,
            top_p=draw.top_p,
            kernels=draw.kernels,
        )


@contextmanager
def cuda_graphs(wanted: bool) -> Iterator[None]:
    """Let the sampler use CUDA graphs inside the block, or not."""
    devices = ("cuda",) if wanted else ()
    with attribute_set(sampler, "GRAPH_DEVICES", devices):
        yield


# --- graphs ---------------------------------------------------------------------------------------


def check_graphs(report: Report, setting: Setting) -> None:
    """Texts and log-probs of decode steps as CUDA graphs, against the same steps launched singly.

    In float32, where rounding hardly ever decides between two ids: every text is to be equal.
    """
    if not setting.has_gpu:
        raise CannotRun("CUDA graphs need a GPU")
    rewriter, prompts = read_bundled_prompts(setting)
    bundled = Draw(prompts, GROUP, setting.pick(NEW_TOKENS, 10), rewriter.stops)
    policy = load_policy(str(BUNDLED_POLICY), len(rewriter.tokenizer), torch.float32)
    for kernels in setting.kernels:
        draw = bundled._replace(kernels=kernels)
        compare_graphs(report, policy, draw, f"bundled policy, float32, {kernels}")
    compare_graphs(report, policy, bundled._replace(greedy=True), "bundled policy, float32, greedy")
    compare_graphs(report, policy, bundled._replace(top_p=0.9), "bundled policy, float32, top_p .9")

    # Grouped heads and the real vocabulary. Random weights are nearly uniform at temperature 1.
    policy = make_random_policy(setting, "0.5B", compute=torch.float32)
    prompts = make_prompts(setting.pick(16, 3), setting.pick(200, 8), setting.reachable)
    random = Draw(prompts, setting.pick(12, 2), setting.pick(64, 12))
    compare_graphs(report, policy, random._replace(greedy=True), "0.5B's shape, float32, greedy")
    cold = random._replace(temperature=0.05)
    compare_graphs(report, policy, cold, "0.5B's shape, float32, temperature .05")


def compare_graphs(report: Report, policy: Sharded, draw: Draw, title: str) -> None:
    """Sample twice and compare."""
    with cuda_graphs(False):
        eager = sample(policy, draw)
    with cuda_graphs(True):
        graphs = sample(policy, draw)
    num_equal = 0
    largest = 0.0
    for a, b in zip(eager, graphs, strict=True):
        if a.ids != b.ids:
            continue
        num_equal += 1
        differences = np.abs(np.subtract(a.sampler_logp, b.sampler_logp))
        largest = max(largest, float(differences.max()))
    report.at_least(f"{title}: share of equal texts", num_equal / len(eager), 0.98)
    report.at_most(f"{title}: log-probs of equal texts differ by at most", largest, 1e-3)


# --- the gap of sampler and trainer ---------------------------------------------------------------


class TokenLogProbs(NamedTuple):
    """Log-probs of the same tokens by three computations, (N,) each, on the host."""

    sampler: torch.Tensor
    trainer: torch.Tensor
    exact: torch.Tensor  # transformers, float32, CPU


# Without a correction the gap is a bias of the gradient: e^gap - 1 of a token's weight. On the
# stand-in GPU, in bfloat16 with scores in bfloat16 too: mean .0023, 99th percentile .032.
GAP_MEAN_BAR = 0.01
GAP_P99_BAR = 0.1


def check_gap(report: Report, setting: Setting) -> None:
    """|sampler - trainer| log-prob of sampled tokens by percentile, both beside float32."""
    rewriter, prompts = read_bundled_prompts(setting)
    exact_model = load_with_transformers()
    for kernels in setting.kernels:
        draw = Draw(prompts, GROUP, NEW_TOKENS, rewriter.stops, kernels=kernels)
        unique, _ = deduplicate(sample(rewriter.policy, draw))
        values = compare_log_probs(rewriter.policy, exact_model, unique)

        gap = (values.sampler - values.trainer).abs()
        for share in (0.5, 0.9, 0.99, 0.999):
            report.figure(f"{kernels}: p{100 * share:g}", gap.quantile(share).item())
        report.figure(f"{kernels}: max", gap.max().item())
        report.figure(f"{kernels}: tokens", len(gap))
        report.at_most(f"{kernels}: mean |sampler - trainer|", gap.mean().item(), GAP_MEAN_BAR)
        p99 = gap.quantile(0.99).item()
        report.at_most(f"{kernels}: 99th percentile", p99, GAP_P99_BAR)

        # Both sides round; neither is to be further from the truth than the other.
        from_sampler = (values.sampler - values.exact).abs().mean().item()
        from_trainer = (values.trainer - values.exact).abs().mean().item()
        report.figure(f"{kernels}: mean |trainer - float32|", from_trainer)
        bar = max(1.5 * from_trainer, 1e-4)
        report.at_most(f"{kernels}: mean |sampler - float32|", from_sampler, bar)


def load_with_transformers():
    """Return transformers' model of the bundled policy, float32 on the CPU: the oracle."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(BUNDLED_POLICY), dtype=torch.float32)
    return model.cpu().eval()


@torch.no_grad()
def compare_log_probs(policy: Sharded, exact_model, unique: list[Rollout]) -> TokenLogProbs:
    """Compute the log-probs of all sampled tokens by the trainer and by transformers."""
    exact = [score_exactly(exact_model, rollout, policy.decoder.reachable) for rollout in unique]
    columns: dict[str, list[torch.Tensor]] = {"sampler": [], "trainer": [], "exact": []}
    for batch in make_micro_batches(unique, Config()):
        logp, _ = compute_log_probs(policy, batch, temperature=1.0)
        columns["sampler"].append(batch.sampler_logp.cpu().double())
        columns["trainer"].append(logp.cpu().double())
        columns["exact"].append(select_tokens(exact, batch))
    return TokenLogProbs(**{name: torch.cat(parts) for name, parts in columns.items()})


def score_exactly(model, rollout: Rollout, reachable: int) -> torch.Tensor:
    """Return transformers' log-prob of each sampled id; ids that the tokenizer lacks have none."""
    prompt = list(rollout.prompt.ids)
    ids = torch.tensor([prompt + list(rollout.ids)])
    logits = model(ids).logits[0, len(prompt) - 1 : -1, :reachable].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(rollout.ids)[:, None])[:, 0]


def select_tokens(by_rollout: list[torch.Tensor], batch: MicroBatch) -> torch.Tensor:
    """Return the values of a micro-batch's tokens, in its order."""
    rollouts = batch.rollout.cpu().unique_consecutive().tolist()
    return torch.cat([by_rollout[index] for index in rollouts])
