"""What the checks and the report run on the stand-in: the pieces of a training step, small enough
to count by hand. What decides how long a text is is fixed, so that counts are too.

Legend: L layers, P prompts, G siblings.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from gpu.standin.activity import activity
from gpu.standin.tensor import GPU

from recr1 import train
from recr1.config.schema import Config, LossConfig, OptimizerConfig, SamplingConfig, TrainConfig
from recr1.data.chat_template import ChatTemplate
from recr1.data_types import Prompt, Rollout
from recr1.distributed.fsdp import Sharded, unsharded
from recr1.kernels.sample_token import sample_from_hidden
from recr1.model.decoder import Decoder
from recr1.model.log_probs import compute_log_probs
from recr1.rl.losses import resolve_objective
from recr1.rl.packing import pack_rollouts
from recr1.rl.policy_loss import compute_policy_loss
from recr1.sampling import generate as sampler
from recr1.sampling.sequences import SequenceBatch
from recr1.training.dry_run import read_model_shape
from recr1.training.load_model import choose_model_backend, load_policy
from recr1.training.optimizer import Optimizer
from recr1.utils.counter_rng import draw_uniforms
from recr1.utils.hf_hub import load_tokenizer, read_stop_token_ids

ROOT = Path(__file__).resolve().parents[3]
MODEL = "Qwen/Qwen2.5-3B-Instruct"
VOCAB_SIZE = 1001  # odd, as Qwen's reachable ids
GROUP_SIZE = 4
NO_STOPS: frozenset[int] = frozenset()  # every text has the full length


def make_policy(num_layers: int, *, recompute: bool = False, on_host: bool = False) -> Sharded:
    """Make Qwen2.5-3B's decoder with few layers and narrow ones, in bfloat16 on the GPU."""
    shape = read_model_shape(MODEL, str(ROOT / "experiments/configs/any.yaml"))
    narrow = replace(
        shape,
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        head_dim=8,
    )
    with torch.device("meta"):
        decoder = Decoder(narrow)
    decoder.set_backend(choose_model_backend(narrow, "varlen", torch.bfloat16, GPU))
    shapes = {name: weight.shape for name, weight in decoder.named_parameters()}
    generator = torch.Generator().manual_seed(0)

    def draw_weight(name: str) -> torch.Tensor:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name])
        return 0.02 * torch.randn(shapes[name], generator=generator)

    return Sharded(
        decoder,
        draw_weight,
        device=GPU,
        compute=torch.bfloat16,
        gradient_checkpointing=recompute,
        on_host=on_host,
    )


def make_prompts(num_prompts: int) -> list[Prompt]:
    """Make prompts of 15, 16, ... ids that begin alike."""
    prompts = []
    for index in range(num_prompts):
        ids = tuple(range(5, 20 + index))
        prompts.append(Prompt(str(index), index, "", ids))
    return prompts


def sample_texts(
    policy: Sharded, num_prompts: int, group_size: int, length: int, *, greedy: bool = False
) -> list[Rollout]:
    """Sample texts of `length` tokens by the product's `generate`."""
    uniforms = None
    if not greedy:
        uniforms = np.random.default_rng(0).random((num_prompts, group_size, length))
    prompts = make_prompts(num_prompts)
    with unsharded(policy):
        return sampler.generate(policy, prompts, group_size, 1.0, length, NO_STOPS, uniforms)


def make_rollouts(num_prompts: int, length: int) -> list[Rollout]:
    """Make G texts of each prompt, without sampling them."""
    random = np.random.default_rng(0)
    rollouts = []
    for prompt in make_prompts(num_prompts):
        for sibling in range(GROUP_SIZE):
            ids = tuple(random.integers(VOCAB_SIZE, size=length).tolist())
            logp = (-6.9,) * length
            rollout = Rollout(prompt, prompt.index, sibling, ids, logp, finished=True)
            rollouts.append(rollout)
    return rollouts


def make_settings(**loss: float) -> Config:
    return Config(
        sampling=SamplingConfig(group_size=GROUP_SIZE, max_new_tokens=6),
        train=TrainConfig(tokens_per_micro_batch=4096),
        loss=LossConfig(**loss),
    )


class Counts(NamedTuple):
    """What a piece of work asked of the GPU."""

    launches: int
    kernels: Counter[str]
    waits: Counter[str]  # by place


def count(work: Callable[[], Any]) -> Counts:
    """Do the work, and count what it asks of the GPU."""
    kernels = activity.kernels.copy()
    waits = activity.sum_waits_by_place()
    work()
    new_kernels = activity.kernels - kernels
    return Counts(new_kernels.total(), new_kernels, activity.sum_waits_by_place() - waits)


# --- Sampling -------------------------------------------------------------------------------------


def count_decode_step(num_layers: int) -> Counter[str]:
    """Count the launches of a captured decode step, by operation."""
    policy = make_policy(num_layers)
    activity.clear()
    sample_texts(policy, num_prompts=4, group_size=1, length=8)
    return activity.captured[0]


class SamplingCounts(NamedTuple):
    counts: Counts
    num_looks: int  # of the host at what was chosen


def count_sampling(group_size: int, greedy: bool = False) -> SamplingCounts:
    """Count what texts of 97 tokens of 6 prompts ask: their first token, and 12 times 8."""
    num_looks = 0
    append_tokens = SequenceBatch.append_tokens

    def append_and_count(self, *arguments):
        nonlocal num_looks
        num_looks += 1
        return append_tokens(self, *arguments)

    policy = make_policy(2)
    with mock.patch.object(SequenceBatch, "append_tokens", append_and_count):
        counts = count(lambda: sample_texts(policy, 6, group_size, 97, greedy=greedy))
    return SamplingCounts(counts, num_looks)


class GraphSteps(NamedTuple):
    """How many decode steps ran how."""

    replayed: int
    warm_up: int  # each graph's first step
    eager: int


class RealPolicy(NamedTuple):
    """A model folder's policy on the GPU, and prompts to it."""

    policy: Sharded
    prompts: list[Prompt]
    stops: frozenset[int]


def load_real_policy(
    folder: str,
    num_prompts: int,
    compute: torch.dtype = torch.bfloat16,
    attention: str = "auto",
    user: str = "find: {query}",
    assistant: str = "<think>",
) -> RealPolicy:
    """Load a model; its prompts ask for the quickstart's first train queries, as there."""
    tokenizer = load_tokenizer(folder)
    chat = ChatTemplate(tokenizer, "", user, assistant)
    queries = ROOT / "experiments/data/msrd/train.queries.jsonl"
    lines = queries.read_text(encoding="utf-8").splitlines()[:num_prompts]
    prompts = []
    for index, line in enumerate(lines):
        text = json.loads(line)["text"]
        prompts.append(Prompt(str(index), index, text, chat.prompt(text)))
    policy = load_policy(folder, len(tokenizer), compute, attention=attention)
    return RealPolicy(policy, prompts, read_stop_token_ids(folder, tokenizer))


def sample_real_texts(
    real: RealPolicy, group_size: int, length: int, temperature: float
) -> list[Rollout]:
    """Sample texts of at most `length` tokens, as a run's first step does."""
    rows = np.arange(len(real.prompts))
    uniforms = draw_uniforms(0, 0, rows, group_size, length)
    with unsharded(real.policy):
        return sampler.generate(
            real.policy, real.prompts, group_size, temperature, length, real.stops, uniforms
        )


def count_graph_steps(real: RealPolicy, temperature: float) -> GraphSteps:
    """Sample as the quickstart does, 8 texts of at most 28 tokens of each prompt."""
    num_choices = 0

    def choose_and_count(*arguments, **settings):
        nonlocal num_choices
        num_choices += 1
        return sample_from_hidden(*arguments, **settings)

    activity.clear()
    with mock.patch.object(sampler, "sample_from_hidden", choose_and_count):
        sample_real_texts(real, group_size=8, length=28, temperature=temperature)
    num_captures = len(activity.captured)
    num_eager = num_choices - 2 * num_captures  # each graph's step ran once, and was captured once
    return GraphSteps(activity.num_replays, num_captures, num_eager)


class Gaps(NamedTuple):
    """|difference| of the log-probs of sampled tokens, (n,) nats."""

    sampler_trainer: np.ndarray
    sampler_float32: np.ndarray  # to the same model in float32
    trainer_float32: np.ndarray


def measure_gaps(folder: str, num_prompts: int, length: int) -> Gaps:
    """Sample in bfloat16 and compute the log-probs of the same texts as the trainer does.

    The prompt asks for what an instruct model knows: where it is lost, its log-probs are small and
    the gaps large.
    """
    real = load_real_policy(
        folder, num_prompts, user="Write one short sentence about the film: {query}", assistant=""
    )
    rollouts = sample_real_texts(real, GROUP_SIZE, length, temperature=1.0)
    sampled = np.concatenate([rollout.sampler_logp for rollout in rollouts])
    trained = compute_rollout_logp(real.policy, rollouts)
    exact = load_real_policy(folder, 0, torch.float32, "sdpa")
    reference = compute_rollout_logp(exact.policy, rollouts)
    return Gaps(np.abs(sampled - trained), np.abs(sampled - reference), np.abs(trained - reference))


def compute_rollout_logp(policy: Sharded, rollouts: list[Rollout]) -> np.ndarray:
    """Compute the log-prob of each token of the rollouts, in their order, as the trainer does."""
    [batch] = pack_rollouts(rollouts, max_tokens=10**6, device=GPU)
    with torch.no_grad():
        logp, _ = compute_log_probs(policy, batch, temperature=1.0)
    order = np.argsort(batch.rollout.cpu().numpy(), kind="stable")
    return logp.cpu().double().numpy()[order]


# --- Training -------------------------------------------------------------------------------------


class MicroBatchCounts(NamedTuple):
    forward: Counts
    backward: Counts
    update: Counts


def count_micro_batch(num_layers: int, *, recompute: bool, **loss: float) -> MicroBatchCounts:
    """Count the forward and backward of one micro-batch of two groups, and the update after it."""
    cfg = make_settings(**loss)
    policy = make_policy(num_layers, recompute=recompute)
    reference = make_policy(num_layers) if cfg.loss.kl_coef > 0 else None
    optimizer = Optimizer(policy, OptimizerConfig(), steps=10)
    [update] = make_updates(policy, reference, cfg)
    [batch] = update.micro_batches
    objective = resolve_objective(cfg.loss, cfg.model)
    losses = []

    def compute_loss():
        loss = compute_policy_loss(policy, batch, update.denominator, 1.0, objective)
        losses.append(loss.value)

    forward = count(compute_loss)
    backward = count(lambda: losses[0].backward())
    return MicroBatchCounts(forward, backward, count(optimizer.step))


def make_updates(policy: Sharded, reference: Sharded | None, cfg: Config) -> list:
    rollouts = make_rollouts(num_prompts=2, length=6)
    advantages = torch.tensor([1.0, -1.0] * GROUP_SIZE)
    agg_mode = resolve_objective(cfg.loss, cfg.model).agg_mode
    return train.make_updates(policy, reference, rollouts, advantages, cfg, agg_mode)


def train_on_host(num_steps: int) -> None:
    """Make updates with the reference and AdamW's moments in host memory."""
    cfg = make_settings(kl_coef=0.1)
    policy = make_policy(2)
    reference = make_policy(2, on_host=True)
    optimizer = Optimizer(policy, OptimizerConfig(cpu_offload=True), steps=num_steps)
    objective = resolve_objective(cfg.loss, cfg.model)
    for _ in range(num_steps):
        for update in make_updates(policy, reference, cfg):
            for batch in update.micro_batches:
                loss, _, _ = compute_policy_loss(policy, batch, update.denominator, 1.0, objective)
                loss.backward()
            optimizer.step()
    torch.cuda.synchronize()


# --- Whole runs -----------------------------------------------------------------------------------


def run_dry(config: str, *overrides: str) -> None:
    """Make the dry run of a config of experiments/configs, in a folder of its own, in silence."""
    path = ROOT / "experiments/configs" / config
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.redirect_stdout(io.StringIO()):
            train.main([str(path), *overrides, "--dry-run"])


# --- Where the host waits -------------------------------------------------------------------------


def sample_everything() -> None:
    policy = make_policy(2)
    activity.clear()
    sample_texts(policy, num_prompts=4, group_size=GROUP_SIZE, length=33)


def train_everything() -> None:
    count_micro_batch(2, recompute=False, kl_coef=0.001, entropy_coef=0.001)


def run_everything() -> None:
    run_dry("rec_r1/esci_bm25_3b.yaml")
    run_dry("rec_r1/esci_dense_3b.yaml", "retriever.index=exact")


# name -> what is done
WORKLOADS: dict[str, Callable[[], None]] = {
    "sampling": sample_everything,
    "training": train_everything,
    "runs": run_everything,
}


def count_waits(workload: str) -> Counter[str]:
    """Return place -> how often the host waits there in a workload."""
    activity.clear()
    WORKLOADS[workload]()
    return activity.sum_waits_by_place()
