"""One logged batch under every loss: what each would do to the same tokens. The command is `recr1
losses`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from recr1.config import loader as configs
from recr1.config.schema import ConfigError, ModelConfig
from recr1.data_types import MicroBatch, Prompt, Rollout
from recr1.model.hf_weights import load_model
from recr1.model.log_probs import compute_log_probs
from recr1.rl.advantages import compute_group_advantages
from recr1.rl.losses import RECIPES, resolve_objective
from recr1.rl.packing import pack_rollouts
from recr1.rl.policy_loss import compute_token_loss, compute_token_weights, count_denominator
from recr1.rl.replay import Replay
from recr1.utils.hf_hub import load_tokenizer, resolve_model_folder


def compare_losses(run: str, step: int, new: str | None = None) -> dict:
    """grpo.RECIPES on the frozen batch of step `step` of a run folder, with the run's own clip, KL
    and entropy weight.

    {"tokens", "ratio": "1" or "new", "losses": {kind: figures}, "cosine": {kind: {kind: of d loss /
    d logp}}}. `weight` of a token is -d loss / d logp * total / its siblings: what its grad log p
    is multiplied by. `new`, the folder of a later model, gives the new log-probs, and then
    `grad_norm` and "parameter_cosine" are of the gradients of its parameters. Raises ConfigError,
    ReplayError, ModelFolderError.
    """
    cfg = configs.load_config(str(Path(run) / "config.yaml"), [])
    replay = Replay(str(Path(run) / "rollouts.jsonl.gz"))
    if step not in replay.steps:
        raise ConfigError(
            f"{run}: step {step} is not logged with its tokens; those are: {', '.join(map(str, replay.steps))}"
        )
    texts, batch, entropy, rewards, first = freeze_step(replay.rows[replay.steps.index(step)])
    logp = batch.old_logp
    parameters = []
    if new is not None:
        folder = resolve_model_folder(new)
        model = load_model(folder, len(load_tokenizer(folder)))
        parameters = list(model.parameters())
        logp, entropy = compute_log_probs(model, batch, cfg.sampling.temperature)
    found = {}
    slopes = {}
    gradients = {}
    for kind in RECIPES:
        c = replace(cfg.loss, kind=kind, advantage="", average="")
        o = resolve_objective(c, ModelConfig(head="recompute"))
        # (texts,)
        adv = compute_group_advantages(rewards.flatten(), rewards.shape[1], o.advantage, c)[first]
        total = count_denominator(texts, o.agg_mode, cfg.sampling.max_new_tokens)
        cast = replace(batch, advantages=adv[batch.rollout])
        loss, d_logp, d_entropy, stats = compute_token_loss(
            logp.detach(), entropy.detach(), cast, compute_token_weights(cast, o), total, o
        )
        weight = -d_logp * total / batch.weight
        siblings = batch.weight.sum()
        found[kind] = dict(
            loss=loss.item(),
            clip_share=(stats["clip_share"] / siblings).item(),
            dlogp_norm=d_logp.norm().item(),
            weight_min=weight.min().item(),
            weight_max=weight.max().item(),
            weight_abs=(batch.weight * weight.abs()).sum().item() / siblings.item(),
            untouched=(batch.weight * (d_logp == 0)).sum().item() / siblings.item(),
        )
        slopes[kind] = d_logp
        if parameters:
            outputs, pulls = zip(
                *((x, d) for x, d in ((logp, d_logp), (entropy, d_entropy)) if d is not None)
            )
            parts = torch.autograd.grad(outputs, parameters, pulls, retain_graph=True)
            gradients[kind] = torch.cat([p.flatten() for p in parts])
            found[kind]["grad_norm"] = gradients[kind].norm().item()
    more = dict(parameter_cosine=compute_cosines(gradients)) if parameters else {}
    return (
        dict(
            run=run,
            step=step,
            tokens=len(batch.target),
            ratio="new" if parameters else "1",
            losses=found,
            cosine=compute_cosines(slopes),
        )
        | more
    )


def freeze_step(
    rows: list[dict],
) -> tuple[list[Rollout], MicroBatch, torch.Tensor, torch.Tensor, list[int]]:
    """A logged step -> its texts, their batch with the old and reference log-probs, entropy (N,),
    rewards (P, G), and each text's place among them.
    """
    groups: dict[str, int] = {}
    texts = []
    rewards = []
    first = []
    for row in rows:
        group = groups.setdefault(row["prompt"], len(groups))
        first.append(len(rewards))
        rewards += [row["reward"]] * row["count"]
        texts.append(
            Rollout(
                Prompt(row["prompt"], group, "", tuple(row["prompt_ids"])),
                group,
                0,
                tuple(row["ids"]),
                tuple(row["sampler_logp"]),
                row["finished"],
                row["count"],
            )
        )
    [batch] = pack_rollouts(texts, sum(len(t.prompt.ids) + len(t.ids) for t in texts))
    order = batch.rollout.unique_consecutive().tolist()

    def column(name):
        return (
            None
            if rows[0][name] is None
            else torch.tensor(list(chain.from_iterable(rows[i][name] for i in order)))
        )

    batch = replace(batch, old_logp=column("old_logp"), ref_logp=column("ref_logp"))
    return texts, batch, column("entropy"), torch.tensor(rewards).view(len(groups), -1), first


def compute_cosines(vectors: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    unit = {kind: v / v.norm().clamp(min=1e-30) for kind, v in vectors.items()}
    return {a: {b: (u @ v).item() for b, v in unit.items()} for a, u in unit.items()}


def format_comparison(result: dict) -> str:
    """The comparison as text."""
    losses = result["losses"]
    lines = [
        f"step {result['step']} of {result['run']}: {result['tokens']} tokens of distinct texts, old log-probs as logged"
    ]
    if result["ratio"] == "1":
        lines.append(
            "new log-probs = old ones, so every ratio is 1 and every clip inert; --new MODEL takes them from a later checkpoint"
        )
    names = list(next(iter(losses.values())))
    lines.append(f"{'':<11}" + "".join(f"{name:>12}" for name in names))
    lines += [
        f"{kind:<11}" + "".join(f"{row[name]:>12.4g}" for name in names)
        for kind, row in losses.items()
    ]
    for title, key in (
        ("cosine of d loss / d logp", "cosine"),
        ("cosine of the parameters' gradients", "parameter_cosine"),
    ):
        if key in result:
            lines += ["", f"{title:<36}", f"{'':<11}" + "".join(f"{kind:>11}" for kind in losses)]
            lines += [
                f"{a:<11}" + "".join(f"{x:>11.4f}" for x in row.values())
                for a, row in result[key].items()
            ]
    return "\n".join(lines)
