"""Climb from recr1/plain.py to recr1/train.py, one part at a time.

python experiments/benchmarks/ladder.py [--shape quickstart|135m|all] [--rounds 3] [--threads 2]

A step of every rung has the same prompts, random numbers and weights (the learning rate is 0), so
all rungs sample the same texts and have the same gradient: both are checked. The rungs:

    plain            recr1/plain.py: transformers' model, the whole text for each new token
    our decoder      model/decoder.py on rows without padding, with the CPU's faster products
    KV cache         sampling/generate.py, each sibling in a row of its own
    shared rows      equal siblings are one row, so a prompt is computed once for its group
    packed training  equal siblings and a group's prompt once, micro-batches; the logits are held
    fused head       kernels/logprob.py: logits a chunk at a time; it is the loop of recr1/train.py

A rung is a way to sample and a way to train; each way is measured once per round, the ways in turn,
and a rung's seconds are the sum of the medians (with the reward's). Peak memory: the growth of the
resident high-water mark over the memory before, in a pass of its own that is the warm-up too, of
the larger of the two phases. Lines: code lines of the files that a rung adds.

`135m` is 30 layers x 576 with a vocabulary of 49,152, random weights, 8 prompts of 64 tokens x 8 x
48. A plain step takes minutes there: in the rounds its padded training is done on every fourth row,
and its sampling at every eighth token, and the seconds are scaled to the whole.

After each round on the quickstart's shape the quickstart itself runs by recr1.train, with the
learning rate 0; the seconds of the round's steps in it stand beside the last rung's in a process of
its own too, just before and just after it: where plain has run, every phase is slower by some
hundredths. Ends with one line of JSON: the bars and whether they hold. Linux; a quiet
machine; 16 GB. `--dry-run` takes tiny sizes: its times mean nothing.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import gc
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from few_queries import write_few_queries
from twins import make_twins

from recr1 import plain
from recr1.config import loader as configs
from recr1.config.schema import Config, SamplingConfig, TrainConfig
from recr1.data_types import MicroBatch, Prompt, Reward, Rollout
from recr1.distributed.fsdp import Sharded, unsharded
from recr1.kernels.cpu_linear import multiply, packed_for_sampling
from recr1.memory import measure as memory
from recr1.model.decoder import Decoder
from recr1.model.hf_weights import load_model
from recr1.model.log_probs import get_lm_head_weight
from recr1.model.packed_attention import PackedAttention
from recr1.model.rope import DecoderConfig
from recr1.rl import policy_loss
from recr1.rl.advantages import compute_group_advantages
from recr1.rl.losses import resolve_objective
from recr1.rl.packing import deduplicate
from recr1.rl.policy_loss import compute_policy_loss
from recr1.sampling.generate import generate, make_cache
from recr1.tracking.step_metrics import StepRecord
from recr1.train import make_updates
from recr1.training.optimizer import Optimizer
from recr1.training.plain_run import setup_plain_run
from recr1.utils.counter_rng import draw_uniforms

ROOT = Path(__file__).resolve().parents[2]

CHEAP = 3.0  # seconds: a way that is faster is repeated
REPEATS = 5
WARM_UP = 3  # steps of a run that come before those that are compared

NO_TOKENS = torch.zeros(0, dtype=torch.int64)


class Rung(NamedTuple):
    """A way to sample, a way to train, and the files that it adds to the rung before."""

    name: str
    sampling: str
    training: str
    files: tuple[str, ...]


RUNGS = (
    Rung("plain", "plain", "plain", ("recr1/plain.py",)),
    Rung(
        "our decoder",
        "our decoder",
        "our decoder",
        (
            "recr1/model/decoder.py",
            "recr1/model/rope.py",
            "recr1/model/packed_attention.py",
            "recr1/model/hf_config.py",
            "recr1/model/hf_weights.py",
            "kernels/cpu_linear.py",
        ),
    ),
    Rung(
        "KV cache",
        "KV cache",
        "our decoder",
        ("recr1/sampling/generate.py", "recr1/sampling/kv_cache.py", "kernels/sample_token.py"),
    ),
    Rung("shared rows", "shared rows", "our decoder", ("recr1/sampling/sequences.py",)),
    Rung(
        "packed training",
        "shared rows",
        "packed",
        ("recr1/rl/packing.py", "recr1/rl/policy_loss.py", "recr1/rl/losses.py", "recr1/train.py"),
    ),
    Rung(
        "fused head",
        "shared rows",
        "fused head",
        ("recr1/model/log_probs.py", "kernels/logprob.py"),
    ),
)


# --- Shapes: what a step is made of ---------------------------------------------------------------


@dataclass
class Shape:
    """Hold the models, which have the same weights, and what a step is given.

    run: as plain.py uses it: cfg, num_ids, stops.
    """

    name: str
    run: Any
    theirs: torch.nn.Module
    decoder: Decoder
    draw: Callable[[int], tuple[list[Prompt], torch.Tensor]]  # step -> prompts, uniforms (R, T)
    score: Callable[[list[Rollout]], list[Reward]]
    row_step: int = 1  # padded training takes every so many rows
    token_step: int = 1  # sampling without a cache takes every so many tokens
    policy: Sharded = field(init=False)

    def __post_init__(self):
        weights = {name: tensor.clone() for name, tensor in self.decoder.state_dict().items()}
        with torch.device("meta"):
            empty = Decoder(self.decoder.config, self.decoder.reachable)
        self.policy = Sharded(empty, weights.__getitem__, device=torch.device("cpu"))
        with unsharded(self.policy):
            self.cache = make_cache(self.policy)
        cfg = self.run.cfg
        self.objective = resolve_objective(cfg.loss, cfg.model)
        self.optimizers = {
            "plain": plain.make_optimizer(self.theirs, cfg),
            "our decoder": plain.make_optimizer(self.decoder, cfg),
            "packed": Optimizer(self.policy, cfg.optimizer, 10**6),
        }


def make_quickstart(folder: str, tiny: bool) -> Shape:
    """Make the quickstart's own shape: its policy, prompts and retriever."""
    overrides = [f"run.dir={folder}/ladder", "optimizer.lr=0", "optimizer.warmup_steps=0"]
    if tiny:
        overrides += ["train.prompts_per_step=2", "sampling.group_size=4"]
    cfg = configs.load_config(str(ROOT / "experiments/quickstart.yaml"), overrides)
    run = setup_plain_run(cfg, known_kinds=tuple(plain.AGG_MODES))

    def draw(step: int) -> tuple[list[Prompt], torch.Tensor]:
        prompts = run.draw_prompts(step)
        return prompts, run.draw_uniforms(step, prompts)

    def score(rollouts: list[Rollout]) -> list[Reward]:
        run.train_scorer.known_rewards.clear()  # each repeat searches anew
        return run.score(rollouts)

    return Shape(
        name="quickstart",
        run=run,
        theirs=plain.load_model(run),
        decoder=load_model(run.model_folder, run.num_ids),
        draw=draw,
        score=score,
    )


def make_random(tiny: bool) -> Shape:
    """Make 135 M parameters (tiny: a few thousand) of random weights, and random prompts."""
    layers, width, inner, heads, vocabulary = (
        (2, 32, 48, 4, 128) if tiny else (30, 576, 1536, 9, 49152)
    )
    num_prompts, prompt_length, group_size, length = (2, 6, 4, 8) if tiny else (8, 64, 8, 48)
    shape = DecoderConfig(
        family="llama",
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2 if tiny else 3,
        head_dim=width // heads,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    decoder, theirs = make_twins(shape)
    cfg = Config(
        sampling=SamplingConfig(group_size=group_size, max_new_tokens=length),
        train=TrainConfig(prompts_per_step=num_prompts, tokens_per_micro_batch=2048),
    )
    cfg = replace(cfg, optimizer=replace(cfg.optimizer, lr=0.0))

    def draw(step: int) -> tuple[list[Prompt], torch.Tensor]:
        random = np.random.default_rng(step)
        prompts = []
        for index in range(num_prompts):
            ids = random.integers(vocabulary, size=prompt_length)
            prompts.append(Prompt(str(index), index, "", tuple(ids.tolist())))
        uniforms = draw_uniforms(0, step, np.arange(num_prompts), group_size, length)
        return prompts, torch.from_numpy(uniforms.reshape(-1, length))

    def score(rollouts: list[Rollout]) -> list[Reward]:
        return [Reward(float(np.mean([i % 2 for i in rollout.ids]))) for rollout in rollouts]

    return Shape(
        name="135m",
        run=SimpleNamespace(cfg=cfg, num_ids=vocabulary, stops=frozenset()),
        theirs=theirs,
        decoder=decoder,
        draw=draw,
        score=score,
        row_step=1 if tiny else 4,
        token_step=1 if tiny else 8,
    )


# --- Our decoder in the place of transformers' model ----------------------------------------------


class PaddedDecoder:
    """Call our decoder as plain.py calls transformers' model: padded rows in, logits out.

    Inside there is no padding: the rows' real tokens are packed one behind the other.
    """

    def __init__(self, decoder: Decoder, head: torch.Tensor | None = None):
        self.decoder = decoder
        self.head = head  # packed for sampling; None: the decoder's own, with gradient

    def __call__(self, tokens, attention_mask, position_ids, logits_to_keep, use_cache):
        packed = PackedAttention(attention_mask.sum(1), NO_TOKENS, NO_TOKENS)
        is_text = attention_mask.flatten()
        hidden = self.decoder(
            tokens.flatten()[is_text], position_ids.flatten()[is_text], packed
        )  # (M, C)
        padded = hidden.new_zeros(len(is_text), hidden.shape[1])
        padded = padded.index_put((is_text.nonzero()[:, 0],), hidden)
        last = padded.view(*tokens.shape, -1)[:, -logits_to_keep:]  # (R, last, C)
        if self.head is None:
            logits = last @ self.decoder.head_weight.T
        else:
            logits = multiply(last.flatten(0, 1), self.head).view(*last.shape[:2], -1)
        return SimpleNamespace(logits=logits)


# --- Ways to sample -------------------------------------------------------------------------------


def sample_as_plain(shape: Shape, model: Any, step: int, token_step: int) -> list[Rollout]:
    """Sample by plain.py. With token_step > 1 only so many passes are done, of known texts."""
    prompts, uniforms = shape.draw(step)
    if token_step == 1:
        return plain.sample(model, prompts, uniforms, shape.run)
    questions = []
    for prompt in prompts:
        questions += [prompt] * shape.run.cfg.sampling.group_size
    with torch.no_grad():
        for t in range(token_step // 2, uniforms.shape[1], token_step):
            texts = [(question.ids, question.ids[:1] * t) for question in questions]
            tokens, is_text = plain.pad(texts, t)
            plain.compute_log_pi(model, tokens, is_text, 1, shape.run)
    return []


def sample_by_decoder(shape: Shape, step: int, token_step: int) -> list[Rollout]:
    """Sample by plain.py from our decoder, its weights packed for the CPU's products."""
    head = shape.decoder.head_weight
    with torch.no_grad(), packed_for_sampling(shape.decoder, head) as packed_head:
        model = PaddedDecoder(shape.decoder, packed_head)
        return sample_as_plain(shape, model, step, token_step)


def sample_by_cache(shape: Shape, step: int, shared: bool) -> list[Rollout]:
    """Sample by generate. Not shared: each sibling is a prompt of its own."""
    prompts, uniforms = shape.draw(step)
    sampling = shape.run.cfg.sampling
    group_size = sampling.group_size
    questions = prompts
    if not shared:
        questions = []
        for prompt in prompts:
            questions += [prompt] * group_size
        group_size = 1
    with unsharded(shape.policy):
        rollouts = generate(
            shape.policy,
            questions,
            group_size,
            sampling.temperature,
            sampling.max_new_tokens,
            shape.run.stops,
            uniforms.numpy().reshape(len(questions), group_size, -1),
            shape.cache,
        )
    if shared:
        return rollouts
    numbered = []
    for row, rollout in enumerate(rollouts):
        group, sibling = divmod(row, sampling.group_size)
        numbered.append(replace(rollout, group=group, sibling=sibling))
    return numbered


# --- Ways to train: each returns the gradient's norm ----------------------------------------------


def train_as_plain(
    shape: Shape,
    way: str,
    model: Any,
    rollouts: list[Rollout],
    rewards: list[Reward],
    row_step: int,
) -> float:
    """Train by plain.py, on every row_step-th row."""
    cfg = shape.run.cfg
    advantages = plain.compute_advantages(rewards, cfg)[::row_step]
    rollouts = rollouts[::row_step]
    T = cfg.sampling.max_new_tokens
    tokens, is_text = plain.pad([(rollout.prompt.ids, rollout.ids) for rollout in rollouts], T)
    with torch.no_grad():
        old_logp, _ = plain.compute_logp(model, tokens, is_text, shape.run)
    logp, _ = plain.compute_logp(model, tokens, is_text, shape.run)
    loss = plain.compute_loss(logp, old_logp, old_logp, advantages, is_text[:, -T:], cfg)
    loss.backward()
    trained = shape.theirs if way == "plain" else shape.decoder
    return float(plain.update_weights(trained, shape.optimizers[way], 0.0, cfg))


def train_packed(shape: Shape, rollouts: list[Rollout], rewards: list[Reward], head: str) -> float:
    """Train as the loop of recr1/train.py does."""
    cfg = shape.run.cfg
    objective = replace(shape.objective, head=head)
    unique, first = deduplicate(rollouts)
    totals = torch.tensor([reward.total for reward in rewards])
    advantages = compute_group_advantages(
        totals, cfg.sampling.group_size, objective.advantage, cfg.loss
    )
    record = StepRecord(rollouts, rewards, advantages.tolist(), unique, first)
    updates = make_updates(shape.policy, None, unique, advantages[first], cfg, objective.agg_mode)
    for update in updates:
        for batch in update.micro_batches:
            loss, logp, stats = compute_policy_loss(
                shape.policy, batch, update.denominator, cfg.sampling.temperature, objective
            )
            loss.backward()
            record.add(loss, logp, batch, stats)
        norm, _ = shape.optimizers["packed"].step()
    return norm


def train_with_all_logits(shape: Shape, rollouts: list[Rollout], rewards: list[Reward]) -> float:
    """Train packed, by a head that holds the logits of a micro-batch."""
    inner = policy_loss.compute_log_probs
    policy_loss.compute_log_probs = compute_from_all_logits
    try:
        return train_packed(shape, rollouts, rewards, "recompute")
    finally:
        policy_loss.compute_log_probs = inner


def compute_from_all_logits(
    model: Sharded, batch: MicroBatch, temperature: float, kernels: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-probs and entropy, (N,), as plain.py does: from logits (N, V)."""
    with model.root():
        attention = PackedAttention(*batch.layout, batch.tokens.device, model.backend)
        hidden = model(batch.tokens, batch.positions, attention)[batch.predict_from]
        logits = hidden @ get_lm_head_weight(model).T
        log_pi = (logits / temperature).log_softmax(-1)
        logp = log_pi.gather(-1, batch.target[:, None])[:, 0]
        with torch.no_grad():
            entropy = -(log_pi.exp() * log_pi).sum(-1)
    return logp, entropy


# --- Measuring ------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What one call took, and gave: rollouts, or the gradient's norm."""

    seconds: float
    result: Any


def list_ways(shape: Shape, whole: bool) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """List the ways to sample (step), and to train (rollouts, rewards).

    whole: nothing is left out to be scaled.
    """
    token_step = 1 if whole else shape.token_step
    row_step = 1 if whole else shape.row_step
    padded = PaddedDecoder(shape.decoder)
    sampling = {
        "plain": lambda step: sample_as_plain(shape, shape.theirs, step, token_step),
        "our decoder": lambda step: sample_by_decoder(shape, step, token_step),
        "KV cache": lambda step: sample_by_cache(shape, step, shared=False),
        "shared rows": lambda step: sample_by_cache(shape, step, shared=True),
    }
    training = {
        "plain": lambda *given: train_as_plain(shape, "plain", shape.theirs, *given, row_step),
        "our decoder": lambda *given: train_as_plain(
            shape, "our decoder", padded, *given, row_step
        ),
        "packed": lambda *given: train_with_all_logits(shape, *given),
        "fused head": lambda *given: train_packed(shape, *given, "fused"),
    }
    return sampling, training


def call(function: Callable, *args: Any) -> Measured:
    """Call and time."""
    start = time.perf_counter()
    result = function(*args)
    return Measured(time.perf_counter() - start, result)


def measure_growth(function: Callable, *args: Any) -> tuple[float, Measured]:
    """Call, and return by how many bytes it raised the peak of the resident memory."""
    ctypes.CDLL(None).malloc_trim(0)
    memory.restart_peak()
    before = memory.measure_peak()
    measured = call(function, *args)
    return memory.measure_peak() - before, measured


def measure_shape(
    shape: Shape,
    rounds: int,
    run_beside: Callable[[range], BesideLoop] | None = None,
) -> list[dict]:
    """Measure all ways of a shape in turn, print its table and return the bars.

    run_beside: measures these steps in the loop itself and by the last rung alone.
    """
    sampling_s: dict[str, list[float]] = {}
    training_s: dict[str, list[float]] = {}
    reward_s: list[float] = []

    # A pass for the memory; where plain's phases are scaled later, its times count too.
    counts = shape.row_step > 1
    growth: dict[tuple[str, str], float] = {}
    sampling, training = list_ways(shape, whole=False)
    sampled = {}
    for name, way in sampling.items():
        growth["sample", name], measured = measure_growth(way, 1)
        sampled[name] = measured.result
    rollouts = sampled["shared rows"]
    rewards = shape.score(rollouts)
    _, whole_training = list_ways(shape, whole=True)
    norms = {}
    for name, way in whole_training.items():
        growth["train", name], measured = measure_growth(way, rollouts, rewards)
        norms[name] = measured.result
        if counts:
            training_s.setdefault(name, []).append(measured.seconds)

    others = count_other_texts(sampled)
    beside = BesideLoop([], [])
    for number in range(rounds):
        steps = choose_steps(number)
        measure_round(shape, steps, sampling, training, sampling_s, training_s, reward_s)
        if run_beside is not None:
            loop_s, last_rung_s = run_beside(steps)
            beside.loop_s.extend(loop_s)
            beside.last_rung_s.extend(last_rung_s)

    seconds = {}
    reward = median(reward_s)
    for rung in RUNGS:
        seconds[rung.name] = (
            median(sampling_s[rung.sampling]) + reward + median(training_s[rung.training])
        )
    print_table(shape, seconds, sampling_s, training_s, reward, growth)
    spread = max(norms.values()) / min(norms.values()) - 1
    print(f"  texts that differ from shared rows': {others}; gradient norms within {spread:.1e}")
    bars = [
        make_bar(f"{shape.name}: gradient norms of the ways to train, spread", spread, 1e-4),
        make_bar(f"{shape.name}: texts that differ, share", others / len(rollouts), 0.02),
    ]
    if run_beside is not None:
        last = median(beside.last_rung_s)
        loop = median(beside.loop_s)
        print(f"  {shape.name} by recr1.train: {loop:.3f} s/step, the last rung {last:.3f}")
        off = abs(last / loop - 1)
        bars.append(make_bar(f"{shape.name}: last rung beside recr1.train, relative", off, 0.03))
    return bars


def choose_steps(number: int) -> range:
    """Return the steps whose prompts a round takes; those before are a run's warm-up."""
    first = 1 + WARM_UP + number * REPEATS
    return range(first, first + REPEATS)


def count_other_texts(sampled: dict[str, list[Rollout]]) -> int:
    """Count the texts in which a way to sample differs from shared rows."""
    others = 0
    for rollouts in sampled.values():
        # Where the passes were of known texts there are none.
        for rollout, shared in zip(rollouts, sampled["shared rows"]):
            others += rollout.ids != shared.ids
    return others


def measure_round(
    shape: Shape,
    steps: range,
    sampling: dict[str, Callable],
    training: dict[str, Callable],
    sampling_s: dict[str, list[float]],
    training_s: dict[str, list[float]],
    reward_s: list[float],
) -> None:
    """Measure every way on the first step's prompts, cheap ones on all steps'."""
    T = shape.run.cfg.sampling.max_new_tokens
    num_passes = len(range(shape.token_step // 2, T, shape.token_step))
    for name, way in sampling.items():
        is_padded = name in ("plain", "our decoder")
        scale = T / num_passes if is_padded and shape.token_step > 1 else 1.0
        for step in steps:
            taken = call(way, step).seconds
            sampling_s.setdefault(name, []).append(taken * scale)
            if taken > CHEAP:
                break

    inputs = []
    for step in steps:
        rollouts = sampling["shared rows"](step)
        scored = call(shape.score, rollouts)
        reward_s.append(scored.seconds)
        inputs.append((rollouts, scored.result))
        if sampling_s["shared rows"][-1] > CHEAP:
            break
    for name, way in training.items():
        scale = shape.row_step if name in ("plain", "our decoder") else 1
        for rollouts, rewards in inputs:
            taken = call(way, rollouts, rewards).seconds
            training_s.setdefault(name, []).append(taken * scale)
            if taken > CHEAP:
                break


def measure_last_rung(shape: Shape, steps: range) -> list[float]:
    """Measure the last rung, on steps to warm up and then on these; return their seconds."""
    rung = RUNGS[-1]
    sampling, training = list_ways(shape, whole=True)
    seconds = []
    for step in range(steps.start - WARM_UP, steps.stop):
        sampled = call(sampling[rung.sampling], step)
        scored = call(shape.score, sampled.result)
        trained = call(training[rung.training], sampled.result, scored.result)
        if step in steps:
            seconds.append(sampled.seconds + scored.seconds + trained.seconds)
    return seconds


def print_table(
    shape: Shape,
    seconds: dict[str, float],
    sampling_s: dict[str, list[float]],
    training_s: dict[str, list[float]],
    reward: float,
    growth: dict[tuple[str, str], float],
) -> None:
    """Print a line for each rung."""
    print(f"{shape.name}: {shape.policy.size:,} parameters, {torch.get_num_threads()} threads")
    print(
        f"  {'rung':<18}{'s/step':>9}{'sample':>9}{'train':>9}{'speed-up':>10}{'MiB':>8}"
        f"{'+ lines':>9}"
    )
    for rung in RUNGS:
        peak = max(growth["sample", rung.sampling], growth["train", rung.training])
        lines = sum(count_code_lines(ROOT / name) for name in rung.files)
        print(
            f"  {rung.name:<18}{seconds[rung.name]:9.3f}{median(sampling_s[rung.sampling]):9.3f}"
            f"{median(training_s[rung.training]):9.3f}{seconds['plain'] / seconds[rung.name]:9.1f}x"
            f"{peak / 2**20:8.0f}{lines:9}"
        )
    print(f"  of each: reward {reward:.3f} s")


def count_code_lines(path: Path) -> int:
    """Count the lines of a Python file that hold code: no docstring, comment or empty line."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        is_docstring = (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        )
        if isinstance(node, ast.stmt) and not is_docstring:
            has_body = hasattr(node, "body")
            last = node.body[0].lineno - 1 if has_body else node.end_lineno
            lines.update(range(node.lineno, max(node.lineno, last) + 1))
    return len(lines)


class BesideLoop(NamedTuple):
    """Seconds of steps."""

    loop_s: list[float]
    last_rung_s: list[float]


def run_beside_loop(folder: str, threads: int, tiny: bool, steps: range) -> BesideLoop:
    """Run the last rung, the loop, and the last rung again, each in a process of its own."""
    before = run_last_rung(threads, tiny, steps)
    loop_s = run_quickstart(folder, threads, tiny, steps)
    after = run_last_rung(threads, tiny, steps)
    return BesideLoop(loop_s, before + after)


def run_quickstart(folder: str, threads: int, tiny: bool, steps: range) -> list[float]:
    """Run the quickstart by recr1.train with learning rate 0; return these steps' seconds."""
    run_dir = Path(folder) / f"fast_{steps.start}"
    overrides = [
        f"run.dir={run_dir}",
        f"run.threads={threads}",
        f"train.steps={steps.stop - 1}",
        "train.eval_every=0",
        "optimizer.lr=0",
        "optimizer.warmup_steps=0",
        "save.every=0",
        *write_few_queries(Path(folder)),
    ]
    if tiny:
        overrides += ["train.prompts_per_step=2", "sampling.group_size=4"]
    command = [sys.executable, "-W", "ignore", "-m", "recr1.train", "experiments/quickstart.yaml"]
    subprocess.run([*command, *overrides], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = {row["step"]: row["timing_s"]["step"] for row in map(json.loads, rows)}
    return [seconds[step] for step in steps]


def run_last_rung(threads: int, tiny: bool, steps: range) -> list[float]:
    """Run this script for the last rung alone; return the seconds of the steps."""
    command = [sys.executable, "-W", "ignore", __file__, f"--threads={threads}"]
    command += ["--last-rung", str(steps.start), str(steps.stop)]
    if tiny:
        command.append("--dry-run")
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(process.stdout.splitlines()[-1])


def make_bar(name: str, value: float, limit: float) -> dict:
    """Return a bar for the line of JSON."""
    return dict(name=name, value=round(value, 8), bar=limit, ok=bool(value <= limit))


def main() -> int:
    """Measure the shapes and print the bars."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="all", choices=["quickstart", "135m", "all"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: times mean nothing")
    parser.add_argument(
        "--last-rung", nargs=2, type=int, metavar=("FIRST", "END"), help="only its steps' seconds"
    )
    args = parser.parse_args()
    memory.keep_freed_pages()  # as a run does; plain profits too
    torch.set_num_threads(args.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)

    bars = []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if args.shape in ("quickstart", "all"):
            shape = make_quickstart(folder, args.dry_run)
            torch.set_num_threads(args.threads)
            gc.freeze()  # plain's library has made so many objects that to look at them costs 4%
            if args.last_rung:
                print(json.dumps(measure_last_rung(shape, range(*args.last_rung))))
                return 0
            run_beside = partial(run_beside_loop, folder, args.threads, args.dry_run)
            bars += measure_shape(shape, args.rounds, run_beside)
            del shape
        if args.shape in ("135m", "all"):
            rounds = args.rounds if args.dry_run else max(1, args.rounds - 1)
            bars += measure_shape(make_random(args.dry_run), rounds)
    print(json.dumps({"bars": bars}))
    return 0 if all(bar["ok"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
