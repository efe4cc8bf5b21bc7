"""Compare the losses on one logged batch: what would each do to the same tokens? `recr1 losses`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from recr1.config import loader as configs
from recr1.config.schema import Config, ConfigError, LossConfig, ModelConfig
from recr1.data_types import MicroBatch, Prompt, Reward, Rollout
from recr1.model.hf_weights import load_model
from recr1.model.log_probs import compute_log_probs
from recr1.rl.advantages import RewardParts, compute_group_advantages, split_rewards
from recr1.rl.losses import RECIPES, resolve_objective
from recr1.rl.packing import pack_rollouts
from recr1.rl.policy_loss import compute_token_loss, compute_token_weights, count_denominator
from recr1.rl.replay import Replay
from recr1.utils.hf_hub import load_tokenizer, resolve_model_folder


class FrozenStep(NamedTuple):
    """A logged step, with its D distinct texts in one micro-batch of N tokens."""

    texts: list[Rollout]  # D
    batch: MicroBatch  # with the old and the reference log-probs
    entropy: torch.Tensor | None  # (N,); None: not logged
    rewards: torch.Tensor  # (P, G)
    parts: RewardParts  # of the P * G rewards
    first: list[int]  # (D,) the index of each text's first sibling among the P * G rollouts


class NewPolicy(NamedTuple):
    """The log-probs that the losses see, and the parameters behind them (none: logged values)."""

    logp: torch.Tensor  # (N,)
    entropy: torch.Tensor  # (N,)
    parameters: list[torch.nn.Parameter]


class LossEffect(NamedTuple):
    """What one loss does to the tokens."""

    figures: dict[str, float]
    grad_logp: torch.Tensor  # (N,) d loss / d logp
    grad_entropy: torch.Tensor | None  # (N,) d loss / d entropy


def compare_losses(run: str, step: int, new: str | None = None) -> dict:
    """Apply every loss of RECIPES to the frozen batch of one logged step.

    Clip, KL, entropy coefficient and what corrects between sampler and trainer are the run's own.
    What a kind cannot mean for the run's rewards is not refused here: one term leaves gdpo little
    to decouple, and maxrl drops the groups whose mean reward is not above 0.

    Args:
        run: the run's folder.
        new: the folder of a later model, which gives the new log-probs. The gradients of its
            parameters are then compared too.
    Returns:
        {"run", "step", "tokens", "ratio": "1" or "new", "losses": {kind: figures}, "cosine": {kind:
        {kind: cosine of d loss / d logp}}}, and with `new` the figure "grad_norm" and
        "parameter_cosine". The `weight` of a token is -d loss / d logp * denominator / its
        siblings: what its grad log p is multiplied by.
    Raises ConfigError, ReplayError, ModelFolderError.
    """
    cfg = configs.load_run_config(Path(run))
    replay = Replay(str(Path(run) / "rollouts.jsonl.gz"))
    if step not in replay.steps:
        logged_steps = ", ".join(map(str, replay.steps))
        raise ConfigError(
            f"{run}: step {step} is not logged with its tokens; those are: {logged_steps}"
        )
    frozen = freeze_step(replay.rows[replay.steps.index(step)], cfg.reward.weights)
    policy = _compute_new_log_probs(cfg, frozen, new)

    figures = {}
    grads_logp = {}
    gradients = {}
    for kind in RECIPES:
        effect = _apply_loss(cfg, frozen, policy, kind)
        figures[kind] = effect.figures
        grads_logp[kind] = effect.grad_logp
        if policy.parameters:
            gradients[kind] = _backpropagate(policy, effect)
            figures[kind]["grad_norm"] = gradients[kind].norm().item()

    result = dict(
        run=run,
        step=step,
        tokens=len(frozen.batch.target),
        ratio="new" if policy.parameters else "1",
        losses=figures,
        cosine=compute_cosines(grads_logp),
    )
    if policy.parameters:
        result["parameter_cosine"] = compute_cosines(gradients)
    return result


def freeze_step(rows: list[dict], weights: Mapping[str, float]) -> FrozenStep:
    """Rebuild the rollouts of a logged step, and pack its distinct texts into one micro-batch.

    weights: reward.weights.
    """
    groups: dict[str, int] = {}
    texts: list[Rollout] = []
    rewards: list[Reward] = []
    first: list[int] = []
    for row in rows:
        group = groups.setdefault(row["prompt"], len(groups))
        first.append(len(rewards))
        rewards += [Reward(row["reward"], row["reward_terms"])] * row["count"]
        texts.append(_rebuild_rollout(row, group))

    num_tokens = sum(len(text.prompt.ids) + len(text.ids) for text in texts)
    [batch] = pack_rollouts(texts, num_tokens)
    packed_rows = [rows[i] for i in batch.rollout.unique_consecutive().tolist()]
    batch = replace(
        batch,
        old_logp=_concatenate(packed_rows, "old_logp"),
        ref_logp=_concatenate(packed_rows, "ref_logp"),
    )
    entropy = _concatenate(packed_rows, "entropy")
    totals = torch.tensor([reward.total for reward in rewards])
    group_rewards = totals.view(len(groups), -1)
    parts = split_rewards(rewards, weights)
    return FrozenStep(texts, batch, entropy, group_rewards, parts, first)


def _rebuild_rollout(row: dict, group: int) -> Rollout:
    prompt = Prompt(row["prompt"], group, "", tuple(row["prompt_ids"]))
    return Rollout(
        prompt,
        group,
        sibling=0,
        ids=tuple(row["ids"]),
        sampler_logp=tuple(row["sampler_logp"]),
        finished=row["finished"],
        count=row["count"],
    )


def _concatenate(rows: list[dict], name: str) -> torch.Tensor | None:
    """Concatenate the rows' per-token values, (N,); None where they were not logged."""
    if rows[0][name] is None:
        return None
    values: list[float] = []
    for row in rows:
        values += row[name]
    return torch.tensor(values)


def _compute_new_log_probs(cfg: Config, frozen: FrozenStep, new: str | None) -> NewPolicy:
    """Take the new log-probs from the model `new`, or from the log: then every ratio is 1."""
    if new is None:
        if frozen.batch.old_logp is None or frozen.entropy is None:
            raise ConfigError(
                "--run: the step was logged without the policy's log-probs or entropy; "
                "name a later model with --new, or another step"
            )
        return NewPolicy(frozen.batch.old_logp, frozen.entropy, [])
    folder = resolve_model_folder(new)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, len(tokenizer))
    logp, entropy = compute_log_probs(model, frozen.batch, cfg.sampling.temperature)
    return NewPolicy(logp, entropy, list(model.parameters()))


def _apply_loss(cfg: Config, frozen: FrozenStep, policy: NewPolicy, kind: str) -> LossEffect:
    """Compute the loss `kind` of the frozen batch, and figures of what it does to the tokens."""
    config: LossConfig = replace(cfg.loss, kind=kind, advantage="", agg_mode="")
    objective = resolve_objective(config, ModelConfig(head="recompute"))

    group_size = frozen.rewards.shape[1]
    rewards = frozen.rewards.flatten()  # (P * G,)
    advantages = compute_group_advantages(
        rewards, group_size, objective.advantage, config, frozen.parts
    )
    text_advantages = advantages[frozen.first]  # (D,)
    batch = replace(frozen.batch, advantages=text_advantages[frozen.batch.rollout])
    denominator = count_denominator(frozen.texts, objective.agg_mode, cfg.sampling.max_new_tokens)

    loss, grad_logp, grad_entropy, stats = compute_token_loss(
        policy.logp.detach(),
        policy.entropy.detach(),
        batch,
        compute_token_weights(batch, objective),
        denominator,
        objective,
    )

    siblings = batch.weight  # (N,)
    num_tokens = siblings.sum()
    weight = -grad_logp * denominator / siblings  # (N,)
    weight_sum = (siblings * weight.abs()).sum()
    untouched_sum = (siblings * (grad_logp == 0)).sum()
    figures = dict(
        loss=loss.item(),
        clip_ratio=(stats["clip_ratio"] / num_tokens).item(),
        grad_logp_norm=grad_logp.norm().item(),
        weight_min=weight.min().item(),
        weight_max=weight.max().item(),
        weight_abs=weight_sum.item() / num_tokens.item(),
        untouched=untouched_sum.item() / num_tokens.item(),
    )
    return LossEffect(figures, grad_logp, grad_entropy)


def _backpropagate(policy: NewPolicy, effect: LossEffect) -> torch.Tensor:
    """Pull the loss's derivatives through the model: the gradient of its parameters, flat."""
    outputs = [policy.logp]
    output_grads = [effect.grad_logp]
    if effect.grad_entropy is not None:
        outputs.append(policy.entropy)
        output_grads.append(effect.grad_entropy)
    # The graph is kept: the next loss goes through it too.
    parameter_grads = torch.autograd.grad(
        outputs, policy.parameters, output_grads, retain_graph=True
    )
    return torch.cat([grad.flatten() for grad in parameter_grads])


def compute_cosines(vectors: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Compute the cosine of every pair of vectors, {kind: {kind: cosine}}."""
    unit_vectors = {}
    for kind, vector in vectors.items():
        unit_vectors[kind] = vector / vector.norm().clamp(min=1e-30)

    cosines: dict[str, dict[str, float]] = {}
    for kind, unit in unit_vectors.items():
        cosines[kind] = {}
        for other_kind, other_unit in unit_vectors.items():
            cosines[kind][other_kind] = (unit @ other_unit).item()
    return cosines


def format_comparison(result: dict) -> str:
    """Format the comparison as text."""
    losses = result["losses"]
    lines = [
        f"step {result['step']} of {result['run']}: {result['tokens']} tokens of distinct texts, "
        "old log-probs as logged"
    ]
    if result["ratio"] == "1":
        lines.append(
            "new log-probs = old ones, so every ratio is 1 and every clip inert; "
            "--new MODEL takes them from a later checkpoint"
        )
    lines += _format_figures(losses)
    lines += _format_cosines("cosine of d loss / d logp", result["cosine"])
    if "parameter_cosine" in result:
        title = "cosine of the parameters' gradients"
        lines += _format_cosines(title, result["parameter_cosine"])
    return "\n".join(lines)


def _format_figures(losses: dict[str, dict[str, float]]) -> list[str]:
    """Format a line per loss, a column per figure."""
    names = list(next(iter(losses.values())))
    lines = [" " * 11 + "".join(f"{name:>12}" for name in names)]
    for kind, figures in losses.items():
        cells = [f"{figures[name]:>12.4g}" for name in names]
        lines.append(f"{kind:<11}" + "".join(cells))
    return lines


def _format_cosines(title: str, cosines: dict[str, dict[str, float]]) -> list[str]:
    """Format the cosines as a square, below an empty line and the title."""
    lines = ["", f"{title:<36}", " " * 11 + "".join(f"{kind:>11}" for kind in cosines)]
    for kind, row in cosines.items():
        cells = [f"{cosine:>11.4f}" for cosine in row.values()]
        lines.append(f"{kind:<11}" + "".join(cells))
    return lines
