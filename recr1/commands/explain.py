"""Explain one logged GRPO step with its real tensors, from prompt to gradient: `recr1 explain`.

The step is computed again in numpy and compared with what the run logged. The chain is checked link
by link, each with the inputs that the run itself had:

    rewards -> advantages
    advantages and per-token log-probs -> loss and d loss / d logp
    d loss / d logp, through the weights before the update, by torch -> the gradient's norm

Legend: P prompts, G group, R = P*G rollouts, D distinct texts, N their tokens. A text's identical
siblings are one row of weight `count`.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from recr1 import train
from recr1.config import loader as configs
from recr1.config.schema import Config, ConfigError, LossConfig
from recr1.distributed import collectives as dist
from recr1.distributed.fsdp import Sharded
from recr1.model.log_probs import compute_log_probs
from recr1.rl import advantages, corrections, kl, losses, packing, policy_loss
from recr1.rl.replay import Replay
from recr1.tasks.scorer import Scorer
from recr1.training.load_model import COMPUTE_DTYPES, load_policy, make_adapter_source
from recr1.training.optimizer import Optimizer
from recr1.utils.files import Damaged, check_file, read_manifest
from recr1.utils.hf_hub import ModelFolderError, load_tokenizer, resolve_model_folder
from recr1.utils.renamed import RENAMED_METRICS, rename_keys

# The allowed error of advantages, loss and d loss / d logp, relative. The terms of a loss cancel:
# its error is relative to a tenth of their sizes where that is more, float32 knows it no better.
EXACT = 1e-5

# The allowed error of the gradient's norm, relative. bfloat16: 2e-5 with other micro-batches on one
# CPU; other kernels round otherwise.
GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 1e-2}

# The surrogates that this file can compute.
KNOWN_SURROGATES = {
    losses.clipped_surrogate,
    losses.sequence_clipped_surrogate,
    losses.cispo_surrogate,
    losses.reinforce_surrogate,
    losses.soft_gated_surrogate,
    losses.geometric_surrogate,
    losses.tv_masked_surrogate,
    losses.kl_masked_surrogate,
}

# Those whose tokens share one ratio with their rollout.
SEQUENCE_SURROGATES = (losses.sequence_clipped_surrogate, losses.geometric_surrogate)

# Those whose value contains log pi itself, not only a ratio.
LOG_PROB_SURROGATES = (losses.cispo_surrogate, losses.reinforce_surrogate)

SHOWN = 16  # tokens of the text that is shown

PER_TOKEN_KEYS = ("ids", "sampler_logp", "old_logp", "trainer_logp", "entropy")


# --- what the run logged --------------------------------------------------------------------------


class Recipe(NamedTuple):
    """The loss of a run."""

    surrogate: Callable | None  # None: not one of KNOWN_SURROGATES
    advantage: str | None  # a key of ADVANTAGES; None: not one of them
    agg_mode: str


@dataclass(frozen=True)
class LoggedStep:
    """A step as its run logged it."""

    run: Path
    step: int
    cfg: Config
    replay: Replay
    rows: list[dict]  # (D,) of rollouts.jsonl.gz, siblings adjacent
    metrics: dict  # its line of metrics.jsonl


def read_logged_step(run: str, step: int) -> LoggedStep:
    """Read a logged step. Raises ReplayError, and ConfigError for what cannot be computed again."""
    folder = Path(run)
    cfg = configs.load_run_config(folder)
    replay = Replay(str(folder / "rollouts.jsonl.gz"))
    if step not in replay.steps:
        logged_steps = ", ".join(map(str, replay.steps))
        raise ConfigError(
            f"{run}: step {step} is not logged with its tokens (log.tokens_every); "
            f"those are: {logged_steps}"
        )
    _check_loss_is_known(run, cfg)

    rows = replay.rows[replay.steps.index(step)]
    metrics_path = folder / "metrics.jsonl"
    metrics = _read_metrics(metrics_path, step)
    missing = []
    for name in ("loss", "grad_logp_norm", "grad_norm"):
        if metrics.get(name) is None:
            missing.append(name)
    if missing:
        raise ConfigError(
            f"{metrics_path}: step {step} has no {', '.join(missing)}; "
            "the run was made by an older recr1, or is still at this step"
        )
    logged = LoggedStep(folder, step, cfg, replay, rows, metrics)
    _check_rows(logged)
    return logged


def _check_loss_is_known(run: str, cfg: Config) -> None:
    """Raise ConfigError for a run whose loss cannot be computed again."""
    if cfg.train.num_mini_batches > 1:
        raise ConfigError(
            f"{run}: train.num_mini_batches is {cfg.train.num_mini_batches}: the log-probs of "
            "the second optimizer step on a batch are not saved, so its loss cannot be worked "
            "again; explain a run with train.num_mini_batches=1"
        )
    recipe = get_recipe(cfg.loss)
    if recipe.surrogate is None:
        raise ConfigError(
            f"{run}: loss.kind is {cfg.loss.kind!r}, a function of yours; "
            f"explain knows {', '.join(losses.RECIPES)}"
        )
    if recipe.advantage is None:
        raise ConfigError(
            f"{run}: loss.advantage is {cfg.loss.advantage!r}, a function of yours; "
            f"explain knows {', '.join(advantages.ADVANTAGES)}"
        )


def _read_metrics(path: Path, step: int) -> dict:
    """Read the step's line of metrics.jsonl; {} where it has none. Raises ConfigError."""
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["step"] == step:
                return rename_keys(row, RENAMED_METRICS)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path}: cannot be read: {e}") from None
    return {}


def _check_rows(logged: LoggedStep) -> None:
    """Raise ConfigError unless every row has its per-token values, and they fit the config."""
    cfg = logged.cfg
    have_equal_lengths = True
    have_reference = set()
    try:
        for row in logged.rows:
            lengths = {len(row[key]) for key in PER_TOKEN_KEYS}
            have_equal_lengths &= len(lengths) == 1
            have_reference.add(row["ref_logp"] is not None)
    except (KeyError, TypeError) as e:
        raise ConfigError(
            f"{logged.replay.path}: a row of step {logged.step} lacks per-token values: {e}"
        ) from None

    needs_reference = cfg.loss.kl_coef > 0
    group_sizes = logged.replay.sizes
    fits_config = have_reference == {needs_reference} and group_sizes == {cfg.sampling.group_size}
    if not have_equal_lengths or not fits_config:
        raise ConfigError(
            f"{logged.replay.path}: step {logged.step} is not what {logged.run / 'config.yaml'} "
            "would log; the files are not of one run"
        )


def get_recipe(config: LossConfig) -> Recipe:
    """Return the loss that a config names, with None for what is not ours."""
    default: tuple[Callable | None, str, str] = (None, "mean_std", "token-mean")
    surrogate: Callable | None
    advantage: str | None
    surrogate, advantage, agg_mode = losses.RECIPES.get(config.kind, default)
    if surrogate not in KNOWN_SURROGATES:
        surrogate = None
    advantage = config.advantage or advantage
    if advantage not in advantages.ADVANTAGES:
        advantage = None
    return Recipe(surrogate, advantage, config.agg_mode or agg_mode)


# --- the step in numpy ----------------------------------------------------------------------------


@dataclass(frozen=True)
class NumpyStep:
    """The step computed again in numpy: float64, from the float32 values that the run logged."""

    num_tokens: np.ndarray  # (D,)
    count: np.ndarray  # (D,) identical siblings
    text: np.ndarray  # (N,) the text of each token
    logp: np.ndarray  # (N,)
    old_logp: np.ndarray  # (N,)
    rewards: np.ndarray  # (P, G)
    mean: np.ndarray  # (P, 1)
    std: np.ndarray  # (P, 1)
    divide_by: np.ndarray  # (P, 1)
    advantages: np.ndarray  # (R,)
    token_advantages: np.ndarray  # (N,) as the run had them
    ratio: np.ndarray  # (N,)
    clipped_ratio: np.ndarray  # (N,)
    surrogate: np.ndarray  # (N,)
    denominator: int
    is_trained: np.ndarray  # (N,) bool
    loss: np.ndarray  # (N,) their sum is the loss
    grad_logp: np.ndarray  # (N,) d loss / d logp
    grad_entropy: np.ndarray  # (N,) d loss / d entropy


class NumpyAdvantages(NamedTuple):
    """The rewards of the groups, and their advantages."""

    rewards: np.ndarray  # (P, G)
    mean: np.ndarray  # (P, 1)
    std: np.ndarray  # (P, 1)
    divide_by: np.ndarray  # (P, 1)
    advantages: np.ndarray  # (R,)


class NumpySurrogate(NamedTuple):
    """The surrogate of each token before importance weights."""

    ratio: np.ndarray  # (N,)
    clipped_ratio: np.ndarray  # (N,)
    value: np.ndarray  # (N,)
    slope: np.ndarray  # (N,) d value / d logp; of the sequence's ratio: d value / d log ratio
    moves: Any = 1.0  # (N,) of SEQUENCE_SURROGATES: whether the token moves its rollout's ratio


def compute_by_hand(cfg: Config, rows: list[dict]) -> NumpyStep:
    """Compute the step in numpy, from its rewards and per-token log-probs to d loss / d logp."""
    config = cfg.loss
    recipe = get_recipe(config)
    num_tokens = np.array([len(row["ids"]) for row in rows])  # (D,)
    count = np.array([row["count"] for row in rows])  # (D,)
    text = np.repeat(np.arange(len(rows)), num_tokens)  # (N,)
    logp = _concatenate(rows, "trainer_logp")  # (N,)
    old_logp = _concatenate(rows, "old_logp")
    sampler_logp = _concatenate(rows, "sampler_logp")
    entropy = _concatenate(rows, "entropy")

    # KL to the reference: of the trained policy in the loss, of the sampler in the reward.
    kl_coef = config.kl_coef if config.kl_in == "loss" else 0.0  # in the loss
    log_ref_ratio: Any = 0.0  # d = log pi_ref - log pi
    token_kl: Any = 0.0
    if config.kl_coef > 0:
        policy_logp = logp if kl_coef else sampler_logp
        log_ref_ratio = _concatenate(rows, "ref_logp") - policy_logp  # (N,)
        token_kl = _estimate_kl(config.kl_estimator, log_ref_ratio, logp - old_logp)  # (N,)

    # Rewards and advantages.
    text_rewards = _compute_text_rewards(cfg, rows, text, token_kl)  # (D,)
    parts = _split_rewards(cfg, rows) if recipe.advantage == "gdpo" else None  # (D, K)
    group_advantages = _compute_advantages(cfg, text_rewards, count, parts)
    token_advantages = np.repeat([row["advantage"] for row in rows], num_tokens)  # (N,)

    # The surrogate, and the weight w_t / T of each token.
    surrogate = _compute_surrogate(cfg, logp - old_logp, logp, token_advantages, text, num_tokens)
    importance = _correct(config, logp, old_logp, sampler_logp, token_advantages, text, num_tokens)
    denominator = _count_denominator(cfg, count, num_tokens)
    is_trained = (token_advantages != 0) | (kl_coef > 0)  # as train.make_updates selects them
    text_weight = count / num_tokens if recipe.agg_mode == "seq-mean-token-mean" else count  # (D,)
    weight = is_trained * text_weight[text] / denominator  # (N,)

    # The loss and its derivatives.
    grad_surrogate = weight * importance * surrogate.slope  # (N,)
    if recipe.surrogate in SEQUENCE_SURROGATES:
        # A token moves the one ratio of its rollout by 1 / num_tokens.
        grad_surrogate = (np.bincount(text, grad_surrogate) / num_tokens)[text] * surrogate.moves
    token_loss = kl_coef * token_kl - importance * surrogate.value - config.entropy_coef * entropy
    kl_slope = _differentiate_kl(config.kl_estimator, log_ref_ratio, logp - old_logp)
    return NumpyStep(
        num_tokens=num_tokens,
        count=count,
        text=text,
        logp=logp,
        old_logp=old_logp,
        token_advantages=token_advantages,
        ratio=surrogate.ratio,
        clipped_ratio=surrogate.clipped_ratio,
        surrogate=surrogate.value,
        denominator=denominator,
        is_trained=is_trained,
        loss=weight * token_loss,
        grad_logp=kl_coef * weight * kl_slope - grad_surrogate,
        grad_entropy=-config.entropy_coef * weight,
        **group_advantages._asdict(),
    )


def _concatenate(rows: list[dict], name: str) -> np.ndarray:
    """Concatenate the per-token values of the rows, (N,)."""
    return np.concatenate([row[name] for row in rows])


def _estimate_kl(estimator: str, log_ref_ratio: np.ndarray, log_ratio: np.ndarray) -> np.ndarray:
    """Compute the estimate of each token; log_ratio: log pi - log pi_old."""
    if estimator == "k1":
        return -log_ref_ratio
    if estimator == "k2":
        return log_ref_ratio**2 / 2
    k3 = np.expm1(log_ref_ratio) - log_ref_ratio
    return np.exp(log_ratio) * k3 if estimator == "k3_unbiased" else k3


def _differentiate_kl(estimator: str, log_ref_ratio: Any, log_ratio: np.ndarray) -> Any:
    """Compute the derivative of the estimate by log pi."""
    if estimator == "k1":
        return 1.0
    if estimator == "k2":
        return -log_ref_ratio
    if estimator == "k3_unbiased":
        return -np.exp(log_ratio) * log_ref_ratio
    return -np.expm1(log_ref_ratio)


def _correct(
    config: LossConfig,
    logp: np.ndarray,
    old_logp: np.ndarray,
    sampler_logp: np.ndarray,
    token_advantages: np.ndarray,
    text: np.ndarray,
    num_tokens: np.ndarray,
) -> np.ndarray:
    """Compute what a token's surrogate is multiplied by: importance weight and mask, (N,)."""
    factor = np.ones(len(text))
    if config.tis_cap > 0:
        log_weight = old_logp - sampler_logp
        if config.tis_level == "sequence":
            log_weight = np.bincount(text, log_weight)[text]
        factor = np.exp(log_weight)
        bounded = factor.clip(config.tis_floor, config.tis_cap)
        is_dropped = (config.tis_mode == "mask") & (factor != bounded)
        factor = np.where(is_dropped, 0.0, bounded)
    if config.off_policy_mask_threshold > 0:
        mean_kl = (np.bincount(text, sampler_logp - logp) / num_tokens)[text]
        is_off = (token_advantages < 0) & (mean_kl > config.off_policy_mask_threshold)
        factor = np.where(is_off, 0.0, factor)
    return factor


def _compute_text_rewards(
    cfg: Config, rows: list[dict], text: np.ndarray, token_kl: Any
) -> np.ndarray:
    """Return the reward of each distinct text, less its KL where loss.kl_in is "reward"."""
    text_rewards = np.array([row["reward"] for row in rows], np.float32)  # (D,)
    if cfg.loss.kl_coef == 0 or cfg.loss.kl_in == "loss":
        return text_rewards
    text_kl = np.bincount(text, token_kl).astype(np.float32)  # (D,)
    return text_rewards - np.float32(cfg.loss.kl_coef) * text_kl


def _split_rewards(cfg: Config, rows: list[dict]) -> np.ndarray:
    """Return the weighted terms of each text's reward, and the total's rest, (D, K)."""
    parts = []
    for row in rows:
        terms = []
        rest = row["reward"]
        for name, weight in cfg.reward.weights.items():
            if weight:
                terms.append(row["reward_terms"][name])
                rest -= weight * row["reward_terms"][name]
        parts.append([*terms, round(rest, 9)])
    return np.array(parts)


def _compute_advantages(
    cfg: Config, text_rewards: np.ndarray, count: np.ndarray, parts: np.ndarray | None
) -> NumpyAdvantages:
    """Compute the advantages of all siblings from the rewards of the distinct texts."""
    advantage = get_recipe(cfg.loss).advantage
    assert advantage is not None
    rewards: np.ndarray = np.repeat(text_rewards.astype(float), count)  # (R,)
    rewards = rewards.reshape(-1, cfg.sampling.group_size)  # (P, G)
    group_size = rewards.shape[1]
    mean = rewards.mean(1, keepdims=True)  # (P, 1)
    std = rewards.std(1, ddof=1, keepdims=True)
    if parts is not None:
        sibling_parts = np.repeat(parts, count, 0).reshape(len(rewards), group_size, -1)
        gdpo = _normalize_each_part(cfg, sibling_parts)
        return NumpyAdvantages(rewards, mean, std, np.ones_like(mean), gdpo)
    if advantage == "pass_at_k":
        best = _compute_pass_at_k(rewards, cfg.loss.pass_k or group_size)
        return NumpyAdvantages(rewards, mean, std, np.ones_like(mean), best.ravel())

    divisors = {
        "mean_std": std + cfg.loss.advantage_eps,
        "mean": 1.0,
        "leave_one_out": (group_size - 1) / group_size,
        "maxrl": mean,
    }
    is_zero = rewards.max(1, keepdims=True) == rewards.min(1, keepdims=True)  # (P, 1)
    if advantage == "maxrl":
        is_zero |= mean <= 0
    divide_by = np.where(is_zero, 1.0, divisors[advantage])
    advantages_by_group = np.where(is_zero, 0.0, (rewards - mean) / divide_by)
    return NumpyAdvantages(rewards, mean, std, divide_by, advantages_by_group.ravel())


def _normalize_each_part(cfg: Config, parts: np.ndarray) -> np.ndarray:
    """Compute GDPO's advantages of parts (P, G, K): (R,)."""
    weights = [weight for weight in cfg.reward.weights.values() if weight]
    eps = cfg.loss.advantage_eps
    mean = parts.mean(1, keepdims=True)
    std = parts.std(1, ddof=1, keepdims=True)
    is_equal = np.ptp(parts, 1, keepdims=True) == 0
    divide_by = np.where(is_equal, 1.0, std + eps)
    normalized = np.where(is_equal, 0.0, parts - mean) / divide_by
    total = (normalized @ np.array([*weights, 1.0])).ravel()
    batch_std = math.sqrt((total**2).sum() / max(1, len(total) - 1))
    return total / (batch_std + eps) if batch_std else total


def _compute_pass_at_k(rewards: np.ndarray, k: int) -> np.ndarray:
    """Compute how much each sibling adds to the best of k, (P, G): the best of the subsets with it
    less the best of the same subsets without it, by the place of each among its group.
    """
    num_groups, group_size = rewards.shape
    advantages = np.zeros_like(rewards)
    for group in range(num_groups):
        order = np.argsort(rewards[group])
        for place, sibling in enumerate(order):
            for second in range(place):
                lead = rewards[group, sibling] - rewards[group, order[second]]
                ways = math.comb(second, k - 2)
                advantages[group, sibling] += lead * ways / math.comb(group_size, k)
    return advantages


def _compute_surrogate(
    cfg: Config,
    log_ratio: np.ndarray,
    logp: np.ndarray,
    token_advantages: np.ndarray,
    text: np.ndarray,
    num_tokens: np.ndarray,
) -> NumpySurrogate:
    """Compute the surrogate of each token, and its derivative by log pi."""
    config = cfg.loss
    A = token_advantages
    kind = get_recipe(config).surrogate
    ratio = np.exp(log_ratio)
    low = config.clip_ratio_low
    high = config.upper_clip_ratio
    if kind is losses.geometric_surrogate:
        return _compute_geometric(config, log_ratio, A, text, num_tokens)
    if kind is losses.soft_gated_surrogate:
        tau = np.where(A > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
        share = 1 / (1 + np.exp(-tau * (ratio - 1)))
        gate = 4 / tau * share
        return NumpySurrogate(ratio, gate, gate * A, 4 * share * (1 - share) * ratio * A)
    if kind in (losses.tv_masked_surrogate, losses.kl_masked_surrogate):
        divergence = _compute_divergence(kind, logp, logp - log_ratio)
        is_stopped = np.where(
            A > 0, (ratio > 1) & (divergence > high), (ratio < 1) & (divergence > low)
        )
        kept = np.where(is_stopped, 0.0, ratio)
        return NumpySurrogate(ratio, kept, kept * A, kept * A)
    if kind is losses.sequence_clipped_surrogate:
        mean_log_ratio = np.bincount(text, log_ratio) / num_tokens  # (D,)
        ratio = np.exp(mean_log_ratio)[text]  # (N,)

    lowest = 0.0 if kind is losses.cispo_surrogate else 1 - low
    clipped_ratio = ratio.clip(lowest, 1 + high)
    if kind is losses.cispo_surrogate:
        slope = clipped_ratio * A
        return NumpySurrogate(ratio, clipped_ratio, slope * logp, slope)
    if kind is losses.reinforce_surrogate:
        return NumpySurrogate(ratio, clipped_ratio, A * logp, A)

    unclipped = ratio * A
    clipped = clipped_ratio * A
    value = np.minimum(unclipped, clipped)
    slope = np.where(unclipped <= clipped, unclipped, 0.0)
    return NumpySurrogate(ratio, clipped_ratio, value, slope)


def _compute_geometric(
    config: LossConfig, log_ratio: np.ndarray, A: np.ndarray, text: np.ndarray, num_tokens: Any
) -> NumpySurrogate:
    """Compute GMPO's surrogate: the geometric mean of a text's clipped ratios, times A."""
    bounded = log_ratio.clip(-config.clip_ratio_low, config.upper_clip_ratio)
    stops = np.where(A > 0, log_ratio > bounded, log_ratio < bounded)
    clipped_log_ratio = np.where(stops, bounded, log_ratio)
    mean_log_ratio = np.bincount(text, clipped_log_ratio) / num_tokens  # (D,)
    value = np.exp(mean_log_ratio)[text] * A
    clipped_ratio = np.exp(clipped_log_ratio)
    return NumpySurrogate(np.exp(log_ratio), clipped_ratio, value, value, moves=~stops)


def _compute_divergence(kind: Callable, logp: np.ndarray, old_logp: np.ndarray) -> np.ndarray:
    """Compute the TV, or the KL, of "this token or another one" from the old policy to the new."""
    p = np.exp(logp)
    old_p = np.exp(old_logp)
    if kind is losses.tv_masked_surrogate:
        return np.abs(p - old_p)
    rest = np.maximum(1 - p, 1e-8)
    old_rest = np.maximum(1 - old_p, 1e-8)
    return old_p * (old_logp - logp) + old_rest * np.log(old_rest / rest)


def _count_denominator(cfg: Config, count: np.ndarray, num_tokens: np.ndarray) -> int:
    """Count what the loss is divided by: tokens, rollouts, or the tokens there could be."""
    num_rollouts = count.sum()
    denominators = {
        "token-mean": (count * num_tokens).sum(),
        "seq-mean-token-mean": num_rollouts,
        "seq-mean-token-sum": num_rollouts,
        "seq-mean-token-sum-norm": num_rollouts * cfg.sampling.max_new_tokens,
    }
    return max(1, denominators[get_recipe(cfg.loss).agg_mode])


# --- the comparison with the log ------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A figure of the run beside ours.

    `off` is the relative error (advantages: the largest error of one), `allowed` what it may be;
    `why` says why the figure was not checked.
    """

    name: str
    logged: float | None = None
    ours: float | None = None
    off: float | None = None
    allowed: float | None = None
    why: str = ""

    @property
    def agrees(self) -> bool:
        if self.why:
            return True
        assert self.off is not None and self.allowed is not None
        return bool(self.off <= self.allowed)  # NaN: no

    def to_json(self) -> dict:
        """Return the figures as JSON holds them."""
        figures = {}
        for name, value in vars(self).items():
            figures[name] = float(value) if isinstance(value, np.floating) else value
        figures["agrees"] = self.agrees
        return figures


def estimate_noise(step: LoggedStep) -> float:
    """Estimate by how much a token's log-prob in training may differ from the logged one.

    The logged one was computed in another micro-batch. The estimate is the gap that the run
    measured between its sampler and its trainer (1e-7 in float32, 1e-3 and more in bfloat16), and 0
    where the value of the loss does not depend on it.
    """
    config = step.cfg.loss
    depends_on_logp = (
        get_recipe(config).surrogate in LOG_PROB_SURROGATES
        or config.tis_cap > 0
        or config.off_policy_mask_threshold > 0
        or config.entropy_coef > 0
        or (config.kl_coef > 0 and config.kl_in == "loss")
    )
    if not depends_on_logp or step.cfg.train.replay:
        return 0.0
    return step.metrics["sampling_logp_diff_mean"]


def compare_with_log(step: LoggedStep, numpy_step: NumpyStep) -> list[Check]:
    """Compare the advantages, the loss and the norm of d loss / d logp with the run's."""
    noise = estimate_noise(step)
    term_sizes = np.abs(numpy_step.loss).sum()
    loss = _make_check(
        "loss",
        step.metrics["loss"],
        numpy_step.loss.sum(),
        allowed=EXACT + 10 * noise,
        min_scale=max(1e-30, term_sizes / 10),
    )
    grad_logp_norm = _make_check(
        "grad_logp_norm",
        step.metrics["grad_logp_norm"],
        math.sqrt((numpy_step.grad_logp**2).sum()),
        allowed=EXACT + noise,
    )
    return [_compare_advantages(step, numpy_step), loss, grad_logp_norm]


def _compare_advantages(step: LoggedStep, numpy_step: NumpyStep) -> Check:
    """Compare the advantage that is furthest off, beyond what float32 rounds."""
    logged = np.repeat([row["advantage"] for row in step.rows], numpy_step.count)  # (R,)

    # A difference of rewards in float32, divided by how far they are apart.
    max_rewards = np.abs(numpy_step.rewards).max(1)  # (P,)
    group_rounding = 4 * 2.0**-24 * max_rewards / numpy_step.divide_by[:, 0]
    group_size = numpy_step.rewards.shape[1]
    rounding = np.repeat(group_rounding, group_size)  # (R,)

    error = np.abs(numpy_step.advantages - logged) / np.maximum(1.0, np.abs(logged))
    worst = int(np.argmax(error - rounding))
    return Check(
        "advantages",
        logged[worst],
        numpy_step.advantages[worst],
        error[worst],
        EXACT + rounding[worst],
    )


def _make_check(
    name: str, logged: float, ours: float, allowed: float, min_scale: float = 1e-30
) -> Check:
    """Make a check by the error relative to the logged figure, or to `min_scale` where more."""
    scale = max(abs(logged), min_scale)
    return Check(name, logged, ours, abs(ours - logged) / scale, allowed)


# --- the gradient of the parameters, by torch -----------------------------------------------------


def compute_gradient(step: LoggedStep, numpy_step: NumpyStep) -> tuple[Check, float | None]:
    """Compute the norm of the parameters' gradient from numpy's d loss / d logp.

    The weights are those before the step.

    Returns:
        The check of the norm, and the largest |log-prob - logged| on the way; None where the
        weights are gone.
    """
    cfg = step.cfg
    try:
        policy, compute_dtype = _load_policy_before(step)
    except (ModelFolderError, Damaged, OSError) as e:
        return Check("grad_norm", step.metrics["grad_norm"], why=str(e)), None

    # The distinct texts, as the run packed them: only those that it trained on.
    rollouts, _, _ = step.replay.step(step.replay.steps.index(step.step) + 1)
    texts, _ = packing.deduplicate(rollouts)
    assert [text.ids for text in texts] == [tuple(row["ids"]) for row in step.rows]
    first_tokens = numpy_step.num_tokens.cumsum()[:-1]
    all_tokens = np.arange(len(numpy_step.text))
    tokens_of_text = np.split(all_tokens, first_tokens)
    trained = [i for i, tokens in enumerate(tokens_of_text) if numpy_step.is_trained[tokens[0]]]
    batches = packing.pack_rollouts(
        [texts[i] for i in trained], cfg.train.tokens_per_micro_batch, dist.device()
    )

    gap = 0.0
    for batch in batches:
        packed_texts = batch.rollout.unique_consecutive().tolist()
        tokens = np.concatenate([tokens_of_text[trained[i]] for i in packed_texts])  # (n,)
        logp, entropy = compute_log_probs(policy, batch, cfg.sampling.temperature)
        our_logp = logp.detach().cpu().double().numpy()
        batch_gap = np.abs(our_logp - numpy_step.logp[tokens]).max()
        gap = max(gap, float(batch_gap))
        torch.autograd.backward(
            [logp, entropy],
            [
                _to_tensor(numpy_step.grad_logp[tokens], logp),
                _to_tensor(numpy_step.grad_entropy[tokens], entropy),
            ],
        )

    norm = Optimizer(policy, cfg.optimizer, 1).compute_norm()
    check = _make_check("grad_norm", step.metrics["grad_norm"], norm, GRADIENT[compute_dtype])
    return check, gap


def _to_tensor(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)


def _load_policy_before(step: LoggedStep) -> tuple[Sharded, torch.dtype]:
    """Load the policy as it was before the step, in the type that the run computed in.

    Raises ModelFolderError, Damaged, OSError.
    """
    model = step.cfg.model
    folder, adapter_folder, device_type = _find_weights_before(step)
    dtype_name = model.compute
    if dtype_name == "auto":
        dtype_name = "bfloat16" if device_type == "cuda" else "float32"
    compute_dtype = COMPUTE_DTYPES[dtype_name]
    policy = load_policy(
        folder,
        len(load_tokenizer(folder)),
        compute_dtype,
        step.cfg.train.gradient_checkpointing,
        step.cfg.train.frozen,
        "sdpa",
        False,
        model.head_float32,
        adapter=make_adapter_source(step.cfg, adapter_folder),
    )
    return policy, compute_dtype


def _find_weights_before(step: LoggedStep) -> tuple[str, str, str]:
    """Find the weights that the step began with.

    Returns:
        The model's folder, its adapter's ("" without LoRA, and where the config says it), and the
        kind of device that the run computed on. Raises ModelFolderError, Damaged.
    """
    if step.step == 1:
        return resolve_model_folder(step.cfg.model.path), "", dist.device().type
    checkpoint = step.run / f"checkpoints/step_{step.step - 1:06d}"
    if not checkpoint.is_dir():
        raise ModelFolderError(
            f"the weights before the step are gone: no {checkpoint} (save.every, save.keep_last)"
        )
    manifest = read_manifest(checkpoint)
    for name, entry in manifest.items():
        if name.startswith(("model/", "adapter/")) or name == "state.json":
            check_file(checkpoint, name, entry)
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    if step.cfg.lora.rank:
        base = resolve_model_folder(step.cfg.model.path)
        return base, str(checkpoint / "adapter"), state["device"]
    return str(checkpoint / "model"), "", state["device"]


# --- the text -------------------------------------------------------------------------------------


def explain_step(run: str, step: int, prompt: str | None = None) -> tuple[str, dict]:
    """Explain a logged step.

    Args:
        prompt: the id of the prompt to show; None: the one whose rewards differ most.
    Returns:
        The text of `recr1 explain`, and {"run", "step", "shapes", "checks": {name: figures},
        "agrees"}.
    """
    logged = read_logged_step(run, step)
    numpy_step = compute_by_hand(logged.cfg, logged.rows)
    gradient_check, gap = compute_gradient(logged, numpy_step)
    checks = [*compare_with_log(logged, numpy_step), gradient_check]

    story = StepStory(logged, numpy_step, _choose_shown(logged, numpy_step, prompt))
    lines = [*story.tell(), "", *_format_verdict(checks, gap)]

    P, G = numpy_step.rewards.shape
    result = dict(
        run=run,
        step=step,
        shapes=dict(P=P, G=G, R=P * G, D=len(logged.rows), N=len(numpy_step.text)),
        checks={check.name: check.to_json() for check in checks},
        agrees=all(check.agrees for check in checks),
    )
    return "\n".join(lines), result


def _choose_shown(step: LoggedStep, numpy_step: NumpyStep, prompt: str | None) -> list[int]:
    """Choose the rows to show: the named prompt's, or those of the group with the largest std."""
    if prompt is None:
        group = int(numpy_step.std.argmax())
        first_rollout = np.cumsum(numpy_step.count) - numpy_step.count  # (D,)
        first_row = int(np.searchsorted(first_rollout, group * numpy_step.rewards.shape[1]))
        prompt = step.rows[first_row]["prompt"]
    shown_rows = [i for i, row in enumerate(step.rows) if row["prompt"] == prompt]
    if not shown_rows:
        prompts = dict.fromkeys(row["prompt"] for row in step.rows)
        raise ConfigError(
            f"--prompt: {prompt!r} is not in step {step.step}; there are {', '.join(prompts)}"
        )
    return shown_rows


def locate_source(function: Callable, text: str) -> str:
    """Find the line of `function` that holds `text`.

    Returns:
        Its place and the line: "recr1/rl/policy_loss.py:66  rho = (logp - old).exp()".
    """
    function = inspect.unwrap(function)
    lines, start = inspect.getsourcelines(function)
    [index] = [i for i, line in enumerate(lines) if text in line]
    source_path = inspect.getsourcefile(function)
    assert source_path is not None  # its lines were found
    path = Path(source_path).relative_to(Path(__file__).parents[2])
    code = lines[index].split("  # ")[0].strip()
    return f"{path.as_posix()}:{start + index}  {code}"


class StepStory:
    """The text of a step from prompt to gradient.

    Each link of the chain has its equation, its shape, an example from the group that is shown, and
    its place in the source.
    """

    def __init__(self, step: LoggedStep, numpy_step: NumpyStep, shown_rows: list[int]):
        self.step = step
        self.numpy_step = numpy_step
        self.shown_rows = shown_rows
        self.config = step.cfg.loss
        self.recipe = get_recipe(step.cfg.loss)
        self.decode = _make_decoder(step)
        self.num_prompts, self.group_size = numpy_step.rewards.shape
        self.num_rollouts = self.num_prompts * self.group_size
        first_rollout = np.cumsum(numpy_step.count) - numpy_step.count  # (D,)
        self.group = int(first_rollout[shown_rows[0]]) // self.group_size
        self.per_token = f"(N,) = ({len(numpy_step.text)},)"
        self.per_rollout = f"(R,) = ({self.num_rollouts},)"
        self.lines: list[str] = []

    def tell(self) -> list[str]:
        """Return the lines of the story, link by link."""
        self.lines = [self._format_title(), ""]
        self._add_prompt()
        self._add_group()
        self._add_rewards()
        self._add_advantages()
        if self.recipe.surrogate is losses.reinforce_surrogate:
            source = locate_source(self.recipe.surrogate, "return")
            self._add("gain", "gain_t = A log pi_t", self.per_token, "", source)
        else:
            self._add_ratio()
            self._add_clip()
        self._add_importance()
        self._add_kl_and_entropy()
        self._add_loss()
        self._add_gradient()
        self.lines += ["", *self._format_tokens()]
        return self.lines

    def _add(self, name: str, equation: str, shape: str, example: str = "", *sources: str) -> None:
        """Add a link of the chain; what is empty has no line."""
        first_line = f"{name:<14}{equation}"
        if shape:
            first_line += f"   {shape}"
        self.lines.append(first_line)
        for line in (example, *sources):
            if line:
                self.lines.append(" " * 14 + line)

    def _format_title(self) -> str:
        num_texts = len(self.step.rows)
        surrogate, advantage, agg_mode = self.recipe
        assert surrogate is not None
        prompt = self.step.rows[self.shown_rows[0]]["prompt"]
        return (
            f"step {self.step.step} of {self.step.run}: loss {self.config.kind} "
            f"({surrogate.__name__}, {advantage}, {agg_mode}), "
            f"P = {self.num_prompts} prompts x G = {self.group_size} siblings "
            f"= {self.num_rollouts} rollouts, "
            f"D = {num_texts} distinct texts, N = {len(self.numpy_step.text)} tokens of them; "
            f"shown: prompt {prompt}"
        )

    def _add_prompt(self) -> None:
        prompt_ids = self.step.rows[self.shown_rows[0]]["prompt_ids"]
        equation = "token ids, chat template around the query"
        if self.step.cfg.train.replay:
            equation += "; this run replays logged rollouts"
            source = locate_source(train.sample_and_score, "run.replay.step")
        else:
            source = locate_source(train.sample_once, "generate(")
        self._add("prompt", equation, f"({len(prompt_ids)},)", self.decode(prompt_ids), source)

    def _add_group(self) -> None:
        num_texts = len(self.step.rows)
        self._add(
            "group",
            f"{self.group_size} completions of it; identical siblings are one row, counted",
            f"{self.per_rollout}, distinct ({num_texts},)",
            "",
            locate_source(packing.deduplicate, "counts[text] += "),
        )
        for i in self.shown_rows:
            row = self.step.rows[i]
            self.lines.append(
                f"{'':<14}{i:>5}: x {row['count']}, {self.numpy_step.num_tokens[i]:>3} tokens, "
                f"reward {row['reward']:.4g}  {_fit_line(row['text'])}"
            )

    def _add_rewards(self) -> None:
        numpy_step = self.numpy_step
        equation = "r = reward of the text"
        sources = [locate_source(Scorer.score_texts, "self.terms.make_reward(")]
        if self.config.kl_coef > 0 and self.config.kl_in == "reward":
            estimator = self.config.kl_estimator
            equation += (
                f" - {self.config.kl_coef:g} sum_t KL_t ({estimator}, of the sampler's log-probs)"
            )
            sources.append(locate_source(train.train, "divergence = "))
        self._add(
            "rewards",
            equation,
            f"(P, G) = {numpy_step.rewards.shape}",
            _format_vector(numpy_step.rewards[self.group]),
            *sources,
        )
        mean = numpy_step.mean[self.group, 0]
        std = numpy_step.std[self.group, 0]
        self._add(
            "mean and std",
            "mean_G r, std_G r (divided by G - 1)",
            f"(P, 1) = {self.num_prompts, 1}",
            f"{mean:.6g}, {std:.6g}",
            locate_source(advantages.subtract_mean, "return"),
        )

    def _add_advantages(self) -> None:
        equations = {
            "mean_std": f"A = (r - mean) / (std + {self.config.advantage_eps:g})",
            "mean": "A = r - mean",
            "leave_one_out": "A = (r - mean) G / (G - 1)",
            "maxrl": "A = (r - mean) / mean, 0 where the mean is not above 0",
            "pass_at_k": "A = mean over subsets I of k siblings of max(I) - max(I without i), "
            f"k = {self.config.pass_k or self.group_size}",
            "gdpo": "A = A' / (std of A' over the step + "
            f"{self.config.advantage_eps:g}), A' = sum_k w_k (r_k - mean_k) / (std_k + "
            f"{self.config.advantage_eps:g}) of {self._name_parts()}",
        }
        advantage = self.recipe.advantage
        assert advantage is not None
        equation = equations[advantage]
        group_advantages = self.numpy_step.advantages.reshape(-1, self.group_size)  # (P, G)
        self._add(
            "advantages",
            equation + ", exactly 0 where a group's rewards are equal",
            self.per_rollout,
            _format_vector(group_advantages[self.group]),
            *self._locate_advantage(advantage),
        )

    def _name_parts(self) -> str:
        """Name the parts of the reward, with their weights."""
        weights = self.step.cfg.reward.weights
        names = [f"{weight:g} {name}" for name, weight in weights.items() if weight]
        return ", ".join([*names, "1 the rest of the total"])

    def _locate_advantage(self, advantage: str) -> list[str]:
        """Locate the lines that make the advantage."""
        function = advantages.ADVANTAGES[advantage]
        if advantage == "gdpo":
            return [
                locate_source(function, "normalized = "),
                locate_source(function, "return advantages / "),
            ]
        last_lines = {"pass_at_k": "advantages = lead"}
        return [
            locate_source(function, last_lines.get(advantage, "return")),
            locate_source(advantages.compute_group_advantages, "torch.where"),
        ]

    def _add_ratio(self) -> None:
        surrogate = self.recipe.surrogate
        assert surrogate is not None
        by_rollout = surrogate is losses.sequence_clipped_surrogate
        if by_rollout:
            equation = "rho = exp(mean_t (log pi_t - log pi_old,t)), one per rollout"
        else:
            equation = "rho_t = exp(log pi_t - log pi_old,t)"
        if not self.step.cfg.train.replay:
            equation += "; one optimizer step per batch: log pi_old is log pi, "
            equation += "every ratio is exactly 1"
        ratio = self.numpy_step.ratio
        lines = {
            losses.sequence_clipped_surrogate: (surrogate, "mean_log_ratio = "),
            losses.geometric_surrogate: (surrogate, "log_ratio = logp"),
            losses.tv_masked_surrogate: (losses.mask_divergence, "exp()"),
            losses.kl_masked_surrogate: (losses.mask_divergence, "exp()"),
        }
        self._add(
            "ratio",
            equation,
            self.per_token,
            f"from {ratio.min():.6g} to {ratio.max():.6g}",
            locate_source(*lines.get(surrogate, (surrogate, "exp()"))),
        )

    def _add_clip(self) -> None:
        """Add what the surrogate makes of the ratio."""
        surrogate = self.recipe.surrogate
        config = self.config
        low = config.clip_ratio_low
        high = config.upper_clip_ratio
        numpy_step = self.numpy_step
        is_outside = numpy_step.is_trained & (numpy_step.ratio != numpy_step.clipped_ratio)  # (N,)
        example = f"{int(is_outside.sum())} tokens outside"
        if surrogate in (losses.clipped_surrogate, losses.sequence_clipped_surrogate):
            self._add_min_clip(is_outside, example)
            return
        stops = "0 where D_t > {:g} and rho_t {} 1"
        beyond = f"{stops.format(high, '>')} (A > 0), {stops.format(low, '<')} (A < 0)"
        equations = {
            losses.cispo_surrogate: f"gain_t = sg(min(rho_t, {1 + high:g})) A log pi_t",
            losses.soft_gated_surrogate: "gain_t = 4 / tau sigmoid(tau (rho_t - 1)) A, tau = "
            f"{config.sapo_temperature_pos:g} (A > 0), {config.sapo_temperature_neg:g} (else)",
            losses.geometric_surrogate: "gain = A exp(mean_t clip(log rho_t)), one per rollout, "
            f"clip: at most {high:g} (A > 0), at least {-low:g} (else)",
            losses.tv_masked_surrogate: f"gain_t = rho_t A, {beyond}, D_t = |pi_t - pi_old,t|",
            losses.kl_masked_surrogate: f"gain_t = rho_t A, {beyond}, "
            "D_t = KL(pi_old,t or not, pi_t or not)",
        }
        if surrogate is losses.soft_gated_surrogate:
            example = ""
        sources = {
            losses.soft_gated_surrogate: "gate = ",
            losses.tv_masked_surrogate: "divergence = ",
            losses.kl_masked_surrogate: "divergence = ",
        }
        assert surrogate is not None
        source = locate_source(surrogate, sources.get(surrogate, "return"))
        self._add("clip", equations[surrogate], self.per_token, example, source)

    def _add_min_clip(self, is_outside: np.ndarray, example: str) -> None:
        """Add GRPO's clip, of a token or a rollout."""
        numpy_step = self.numpy_step
        low = 1 - self.config.clip_ratio_low
        high = 1 + self.config.upper_clip_ratio
        # Of the tokens outside, those where the minimum is the clipped term have gradient 0.
        clipped = numpy_step.clipped_ratio * numpy_step.token_advantages
        takes_clipped = (numpy_step.surrogate == clipped) & (numpy_step.token_advantages != 0)
        siblings = numpy_step.count[numpy_step.text]  # (N,)
        num_inert = int((siblings * (is_outside & takes_clipped)).sum())
        self._add(
            "clip",
            f"gain_t = min(rho_t A, clip(rho_t, {low:g}, {high:g}) A)",
            self.per_token,
            f"{example}; the clip takes the gradient of {num_inert} (siblings counted)",
            locate_source(losses.clipped_surrogate, "torch.minimum"),
        )

    def _add_importance(self) -> None:
        config = self.config
        if config.tis_cap > 0:
            weight = "exp(log pi_old,t - log pi_sampler,t)"
            if config.tis_level == "sequence":
                weight = "exp(sum_t (log pi_old,t - log pi_sampler,t))"
            if config.tis_mode == "mask":
                bounded = f"{weight}, 0 outside [{config.tis_floor:g}, {config.tis_cap:g}]"
            elif config.tis_floor > 0:
                bounded = f"clip({weight}, {config.tis_floor:g}, {config.tis_cap:g})"
            else:
                bounded = f"min({weight}, {config.tis_cap:g})"
            self._add(
                "importance_sampling_ratio",
                f"gain_t *= {bounded}",
                self.per_token,
                "",
                locate_source(policy_loss.compute_token_loss, "* correction"),
            )
        if config.off_policy_mask_threshold > 0:
            self._add(
                "off-policy mask",
                "gain_t = 0 where A < 0 and mean_t(log pi_sampler,t - log pi_t) > "
                f"{config.off_policy_mask_threshold:g}",
                self.per_token,
                "",
                locate_source(corrections.mask_off_policy, "is_off = "),
            )

    def _add_kl_and_entropy(self) -> None:
        if self._has_kl_in_loss():
            formulas = {
                "k1": "-d",
                "k2": "d^2 / 2",
                "k3": "e^d - 1 - d",
                "k3_unbiased": "rho_t (e^d - 1 - d)",
            }
            formula = formulas[self.config.kl_estimator]
            estimator = getattr(kl, self.config.kl_estimator)  # it has the name of its function
            self._add(
                "KL",
                f"KL_t = {formula},  d = log pi_ref,t - log pi_t",
                self.per_token,
                "",
                locate_source(estimator, "return"),
            )
        if self.config.entropy_coef > 0:
            self._add(
                "entropy",
                "H_t of the policy at the token",
                self.per_token,
                "",
                locate_source(policy_loss.compute_token_loss, "grad_entropy = "),
            )

    def _has_kl_in_loss(self) -> bool:
        return self.config.kl_coef > 0 and self.config.kl_in == "loss"

    def _add_loss(self) -> None:
        terms = "gain_t"
        if self._has_kl_in_loss():
            terms += f" - {self.config.kl_coef:g} KL_t"
        if self.config.entropy_coef > 0:
            terms += f" + {self.config.entropy_coef:g} H_t"
        max_new_tokens = self.step.cfg.sampling.max_new_tokens
        limit = f"{max_new_tokens} (sampling.max_new_tokens)"
        weights = {
            "token-mean": "w = siblings; T = tokens of all rollouts",
            "seq-mean-token-mean": "w = siblings / tokens of the text; T = rollouts",
            "seq-mean-token-sum": "w = siblings; T = rollouts",
            "seq-mean-token-sum-norm": f"w = siblings; T = rollouts x {limit}",
        }
        agg_mode = self.recipe.agg_mode
        self._add(
            "loss",
            f"L = sum_t -w_t ({terms}) / T,  {weights[agg_mode]}",
            f"T = {self.numpy_step.denominator}, L = {self.numpy_step.loss.sum():.9g}",
            "",
            locate_source(policy_loss.count_denominator, '"seq-mean-token-sum-norm":'),
            locate_source(
                policy_loss.compute_token_weights,
                "batch.weight / num_tokens"
                if agg_mode == "seq-mean-token-mean"
                else "return batch.weight\n",
            ),
            locate_source(policy_loss.compute_token_loss, "loss = -("),
        )

    def _add_gradient(self) -> None:
        norm = math.sqrt((self.numpy_step.grad_logp**2).sum())
        self._add(
            "d loss/d logp",
            "dL / d log pi_t, what each token's grad log pi_t is multiplied by",
            f"{self.per_token}, norm {norm:.9g}",
            "",
            locate_source(policy_loss.compute_token_loss, "[grad_logp] = "),
        )
        equation = "dL / d theta = sum_t dL / d log pi_t  d log pi_t / d theta"
        if self.config.entropy_coef > 0:
            equation += f" - {self.config.entropy_coef:g} sum_t w_t / T  dH_t / d theta"
        self._add(
            "gradient",
            equation,
            "",
            "",
            locate_source(train.train, "loss.backward()"),
            locate_source(Optimizer.compute_norm, "_foreach_norm"),
        )

    def _format_tokens(self) -> list[str]:
        """Format the tokens of the shown text whose advantage is largest, a line each."""
        shown = max(self.shown_rows, key=lambda i: abs(self.step.rows[i]["advantage"]))
        row = self.step.rows[shown]
        tokens = np.flatnonzero(self.numpy_step.text == shown)
        lines = [
            f"tokens of text {shown}, A = {row['advantage']:.6g}, "
            f"{row['count']} of its group wrote it:",
            f"{'t':>4}{'id':>9} {'token':<16}{'log pi':>11}{'log pi_old':>11}{'rho':>10}"
            f"{'clip(rho)':>10}{'gain':>11}{'loss_t':>12}{'dL/dlogp_t':>12}",
        ]
        for position, token in enumerate(tokens[:SHOWN]):
            lines.append(self._format_token(row["ids"][position], position, token))
        if len(tokens) > SHOWN:
            lines.append(f"{'':>4}... {len(tokens) - SHOWN} more")
        return lines

    def _format_token(self, token_id: int, position: int, token: int) -> str:
        """Format one token: its place in the text, and its row `token` of the N tokens."""
        numpy_step = self.numpy_step
        word = _fit_line(self.decode([token_id]), 15)
        return (
            f"{position:>4}{token_id:>9} {word:<16}"
            f"{numpy_step.logp[token]:>11.5f}{numpy_step.old_logp[token]:>11.5f}"
            f"{numpy_step.ratio[token]:>10.5f}{numpy_step.clipped_ratio[token]:>10.5f}"
            f"{numpy_step.surrogate[token]:>11.5f}{numpy_step.loss[token]:>12.4e}"
            f"{numpy_step.grad_logp[token]:>12.4e}"
        )


def _format_verdict(checks: list[Check], gap: float | None) -> list[str]:
    """Format the table of checks, how they were made, and what disagrees."""
    lines = [f"{'':<14}{'logged':>18}{'here':>18}{'off by':>10}{'allowed':>10}"]
    for check in checks:
        line = f"{check.name:<14}{check.logged:>18.9g}"
        if check.why:
            line += f"{'-':>18}  not checked: {check.why}"
        else:
            verdict = "agrees" if check.agrees else "DISAGREES"
            line += f"{check.ours:>18.9g}{check.off:>10.1e}{check.allowed:>10.1e}  {verdict}"
        lines.append(line)

    method = (
        "advantages, loss, grad_logp_norm: numpy, float64, from the logged values; "
        "grad_norm: torch, from numpy's d loss / d logp and the weights before the step"
    )
    if gap is not None:
        method += f" (their log-probs differ from the logged ones by {gap:.1e} at most)"
    lines.append(method)

    wrong = [check.name for check in checks if not check.agrees]
    if wrong:
        lines.append(
            f"{', '.join(wrong)}: not what the run logged. Either the files were changed since, "
            "or the code was, or the loss is not what it says"
        )
    return lines


def _make_decoder(step: LoggedStep) -> Callable[[Sequence[int]], str]:
    """Make a function of ids to text on one line; without a tokenizer it shows the ids."""
    for folder in (step.run / "model", Path(step.cfg.model.path)):
        if not folder.is_dir():
            continue
        try:
            tokenizer = load_tokenizer(str(folder))
        except ModelFolderError:
            continue
        return lambda ids: _fit_line(
            tokenizer.decode(ids, clean_up_tokenization_spaces=False), max_chars=200
        )
    return lambda ids: " ".join(map(str, ids))


def _format_vector(values: np.ndarray) -> str:
    numbers = " ".join(f"{value:.4g}" for value in values)
    return f"[{numbers}]"


def _fit_line(text: str, max_chars: int = 80) -> str:
    """Escape the text to one line, and cut it."""
    escaped = repr(text)[1:-1]
    if len(escaped) <= max_chars:
        return escaped
    return escaped[: max_chars - 3] + "..."
