"""recr1 explain: its numpy against float64 autograd written from the papers' formulas, and against
what runs logged; what it refuses, what it finds.
"""

import gzip
import json
import math
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.tiny_world import jsonl, runs_of, write_yaml
from test_ranks import torchrun
from transformers import AutoModelForCausalLM

from recr1 import cli, train
from recr1.commands import explain
from recr1.config.schema import Config, LossConfig, RewardConfig, SamplingConfig
from recr1.training.launch import run_guarded

GROUP_SIZE = 6


def make_rows(seed: int, with_kl: bool, on_policy: bool) -> list[dict]:
    """Return five groups of texts of unequal length and count, one group with equal rewards, ratios
    on both sides of the clip.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt in range(5):
        remaining = GROUP_SIZE
        while remaining:
            length = draw_integer(1, 9, generator)
            count = min(remaining, draw_integer(1, 4, generator))
            remaining -= count
            old_logp = -3 * torch.rand(length, generator=generator) - 0.01

            row = dict(prompt=f"q{prompt}", count=count, ids=list(range(length)), advantage=None)
            row["old_logp"] = old_logp.tolist()
            row["reward"] = 0.3
            if prompt != 2:
                row["reward"] = float(torch.rand(1, generator=generator))
            row["trainer_logp"] = old_logp.tolist()
            if not on_policy:
                noisy = add_noise(old_logp, 0.3, generator)
                row["trainer_logp"] = [min(value, -1e-3) for value in noisy]
            row["sampler_logp"] = add_noise(old_logp, 0.2, generator)
            row["reward_terms"] = dict(ndcg=row["reward"] ** 2, mrr=float(length % 3))
            row["ref_logp"] = None
            if with_kl:
                row["ref_logp"] = add_noise(old_logp, 0.4, generator)
            row["entropy"] = torch.rand(length, generator=generator).tolist()
            rows.append(row)
    return rows


def draw_integer(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (1,), generator=generator))


def add_noise(values: torch.Tensor, scale: float, generator: torch.Generator) -> list[float]:
    noise = torch.randn(len(values), generator=generator)
    return (values + scale * noise).tolist()


def compute_loss(cfg: Config, rows: list[dict], logps: list[torch.Tensor]) -> torch.Tensor:
    """Return the loss of the step from its formulas, a text at a time. logps: log-probs of each
    text, leaves.
    """
    c = cfg.loss
    has_kl = c.kl_coef and c.kl_in == "loss"
    agg_mode = get_agg_mode(c)
    divisor = compute_divisor(cfg, rows)
    loss = 0.0
    for row, logp in zip(rows, logps):
        if row["advantage"] == 0 and not has_kl:
            continue
        old = to_float64(row["old_logp"])
        sampler = to_float64(row["sampler_logp"])
        gain = compute_gain(c, logp, old, row["advantage"]) * compute_weight(c, old, sampler)
        mean_kl = (sampler - logp.detach()).mean()
        if row["advantage"] < 0 and 0 < c.off_policy_mask_threshold < mean_kl:
            gain = gain * 0
        token_loss = -gain - c.entropy_coef * to_float64(row["entropy"])
        if has_kl:
            kl = estimate_kl(c.kl_estimator, logp, to_float64(row["ref_logp"]), old)
            token_loss = token_loss + c.kl_coef * kl
        text_loss = token_loss.sum()
        if agg_mode == "seq-mean-token-mean":
            text_loss = token_loss.mean()
        loss = loss + row["count"] * text_loss / divisor
    return loss


def compute_weight(c: LossConfig, old: torch.Tensor, sampler: torch.Tensor):
    """Return the weight between sampler and trainer: of each token, or one of the text."""
    if not c.tis_cap:
        return 1
    log_weight = old - sampler
    if c.tis_level == "sequence":
        log_weight = log_weight.sum()
    weight = log_weight.exp()
    if c.tis_mode == "truncate":
        return weight.clamp(min=c.tis_floor, max=c.tis_cap)
    return weight * (weight >= c.tis_floor) * (weight <= c.tis_cap)


def to_float64(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def get_agg_mode(c: LossConfig) -> str:
    defaults = {"dr_grpo": "seq-mean-token-sum-norm", "luspo": "seq-mean-token-sum"}
    defaults |= dict.fromkeys(("gspo", "sapo", "gmpo"), "seq-mean-token-mean")
    return c.agg_mode or defaults.get(c.kind, "token-mean")


def compute_divisor(cfg: Config, rows: list[dict]) -> int:
    """Return what the sum over the texts of a step is divided by."""
    texts = sum(row["count"] for row in rows)
    agg_mode = get_agg_mode(cfg.loss)
    if agg_mode == "token-mean":
        return sum(row["count"] * len(row["ids"]) for row in rows)
    if agg_mode in ("seq-mean-token-mean", "seq-mean-token-sum"):
        return texts
    return texts * cfg.sampling.max_new_tokens


def compute_gain(
    c: LossConfig, logp: torch.Tensor, old: torch.Tensor, advantage: float
) -> torch.Tensor:
    """Return the objective of each token of a text, (n,)."""
    if c.kind in ("rloo", "reinforce"):
        return advantage * logp
    ratio = (logp - old).exp()
    if c.kind == "cispo":
        return ratio.detach().clamp(max=1 + c.upper_clip_ratio) * advantage * logp
    if c.kind == "sapo":
        tau = c.sapo_temperature_pos if advantage > 0 else c.sapo_temperature_neg
        return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage
    if c.kind == "gmpo":
        log_ratio = logp - old
        if advantage > 0:
            log_ratio = log_ratio.clamp(max=c.upper_clip_ratio)
        else:
            log_ratio = log_ratio.clamp(min=-c.clip_ratio_low)
        return log_ratio.mean().exp() * advantage * torch.ones_like(old)
    if c.kind in ("dppo_tv", "dppo_kl"):
        return ratio * advantage * ~find_stopped(c, logp.detach().exp(), old.exp(), advantage)
    if c.kind in ("gspo", "luspo"):
        ratio = (logp - old).mean().exp() * torch.ones_like(old)
    clipped_ratio = ratio.clamp(1 - c.clip_ratio_low, 1 + c.upper_clip_ratio)
    return torch.minimum(ratio * advantage, clipped_ratio * advantage)


def find_stopped(c: LossConfig, p: torch.Tensor, q: torch.Tensor, advantage: float):
    """Return which tokens DPPO stops: p and q are new and old probabilities."""
    distance = (p - q).abs()
    if c.kind == "dppo_kl":
        distance = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    if advantage > 0:
        return (p > q) & (distance > c.upper_clip_ratio)
    return (p < q) & (distance > c.clip_ratio_low)


def estimate_kl(
    estimator: str, logp: torch.Tensor, ref: torch.Tensor, old: torch.Tensor
) -> torch.Tensor:
    """Return each token's estimate of KL(policy || reference), (n,)."""
    d = ref - logp
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d * d / 2
    weight = (logp - old).exp() if estimator == "k3_unbiased" else 1
    return weight * (d.exp() - 1 - d)


def compute_advantages(cfg: Config, rows: list[dict]) -> list[float]:
    """Return one per row, by Python's own arithmetic, but for the KL."""
    if cfg.loss.kind == "gdpo":
        return compute_gdpo(cfg, rows)
    groups = {}
    for row in rows:
        rewards = groups.setdefault(row["prompt"], [])
        rewards += [compute_reward(cfg.loss, row)] * row["count"]
    advantages = []
    for row in rows:
        reward = compute_reward(cfg.loss, row)
        advantages.append(compute_advantage(cfg.loss, reward, groups[row["prompt"]]))
    return advantages


def compute_gdpo(cfg: Config, rows: list[dict]) -> list[float]:
    """Return GDPO's advantage of each row."""
    weights = {"ndcg": 1.0, "mrr": 0.5}
    parts = {name: [row["reward_terms"][name] for row in rows] for name in weights}
    weighted = [
        r["reward"] - sum(w * r["reward_terms"][n] for n, w in weights.items()) for r in rows
    ]
    parts["rest"] = weighted
    totals = [0.0] * len(rows)
    for name, values in parts.items():
        for i, row in enumerate(rows):
            group = []
            for other, value in zip(rows, values):
                group += [value] * (other["count"] if other["prompt"] == row["prompt"] else 0)
            if max(group) > min(group):
                deviation = values[i] - statistics.mean(group)
                scale = statistics.stdev(group) + cfg.loss.advantage_eps
                totals[i] += weights.get(name, 1.0) * deviation / scale
    of_siblings = []
    for row, total in zip(rows, totals):
        of_siblings += [total] * row["count"]
    scale = statistics.stdev(of_siblings) + cfg.loss.advantage_eps
    return [total / scale for total in totals]


def compute_reward(c: LossConfig, row: dict) -> float:
    """Return the reward of a text, less its KL where that is part of it."""
    reward = float(np.float32(row["reward"]))
    if c.kl_coef and c.kl_in == "reward":
        sampler = to_float64(row["sampler_logp"])
        ref = to_float64(row["ref_logp"])
        kl = estimate_kl(c.kl_estimator, sampler, ref, sampler)
        reward -= c.kl_coef * sum(kl.tolist())
    return reward


def compute_advantage(c: LossConfig, reward: float, rewards: list[float]) -> float:
    """Return the advantage of a text with the reward in a group with the rewards."""
    if max(rewards) == min(rewards):
        return 0.0
    defaults = {"dr_grpo": "mean", "rloo": "leave_one_out", "reinforce": "mean"}
    defaults |= {"maxrl": "maxrl", "pass_at_k": "pass_at_k"}
    name = c.advantage or defaults.get(c.kind, "mean_std")
    if name == "leave_one_out":
        others = (sum(rewards) - reward) / (GROUP_SIZE - 1)
        return reward - others
    if name == "pass_at_k":
        others = list(rewards)
        others.remove(reward)
        return max(0.0, reward - max(others))
    mean = math.fsum(rewards) / GROUP_SIZE
    if name == "maxrl":
        return (reward - mean) / mean if mean > 0 else 0.0
    if name == "mean":
        return reward - mean
    variance = math.fsum((r - mean) ** 2 for r in rewards) / (GROUP_SIZE - 1)
    return (reward - mean) / (math.sqrt(variance) + c.advantage_eps)


VARIANTS = [
    {},
    dict(clip_ratio_low=0.1, clip_ratio_high=0.3, tis_cap=1.1),
    dict(kl_coef=0.1, kl_estimator="k3"),
    dict(kl_coef=0.2, kl_estimator="k2", kl_in="reward", agg_mode="seq-mean-token-mean"),
    dict(kl_coef=0.3, kl_estimator="k1", entropy_coef=0.05, agg_mode="seq-mean-token-sum-norm"),
]
SETTINGS = []
for kind in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce"):
    SETTINGS += [dict(kind=kind, **variant) for variant in VARIANTS]
SETTINGS += [
    dict(kind="gspo", agg_mode="token-mean", tis_cap=1.2, kl_coef=0.1),
    dict(kind="grpo", advantage="leave_one_out", agg_mode="seq-mean-token-mean", entropy_coef=0.1),
]
BAND = dict(tis_cap=1.2, tis_floor=0.8)
NARROW = dict(clip_ratio_low=0.03, clip_ratio_high=0.05)
SETTINGS += [
    dict(kind="sapo", tis_level="sequence", **BAND),
    dict(kind="gmpo", kl_coef=0.1, kl_estimator="k3_unbiased", tis_mode="mask", **BAND),
    dict(kind="gmpo", agg_mode="token-mean", off_policy_mask_threshold=0.05),
    dict(kind="luspo", off_policy_mask_threshold=0.05, kl_coef=0.1),
    dict(kind="luspo", tis_level="sequence", tis_mode="mask", **BAND),
    dict(kind="dppo_tv", entropy_coef=0.1, **NARROW),
    dict(kind="dppo_kl", clip_ratio_low=0.003, kl_coef=0.2, kl_estimator="k3_unbiased"),
    dict(kind="maxrl", agg_mode="seq-mean-token-sum"),
    dict(kind="pass_at_k", off_policy_mask_threshold=0.05, tis_mode="mask", **BAND),
    dict(kind="gdpo"),
]


def name_setting(setting):
    return " ".join(str(value) for value in setting.values())


@pytest.mark.parametrize("setting", SETTINGS, ids=name_setting)
@pytest.mark.parametrize("seed", [0, 1])
def test_numpy_is_float64_autograd(setting, seed):
    cfg = Config(
        reward=RewardConfig(weights={"ndcg": 1.0, "unused": 0.0, "mrr": 0.5}),
        loss=LossConfig(advantage_eps=0.01, **setting),
        sampling=SamplingConfig(group_size=GROUP_SIZE, max_new_tokens=9),
    )
    on_policy = seed == 1
    rows = make_rows(seed, cfg.loss.kl_coef > 0, on_policy)
    advantages = compute_advantages(cfg, rows)
    advantages_of_texts = []
    logps = []
    for row, advantage in zip(rows, advantages):
        row["advantage"] = advantage
        advantages_of_texts += [advantage] * row["count"]
        logps.append(to_float64(row["trainer_logp"]).requires_grad_())

    loss = compute_loss(cfg, rows, logps)
    gradients = torch.autograd.grad(loss, logps, materialize_grads=True)
    explained = explain.compute_by_hand(cfg, rows)

    assert explained.loss.sum() == pytest.approx(loss.item(), rel=1e-10, abs=1e-14)
    gradient_errors = explained.grad_logp - torch.cat(gradients).numpy()
    assert np.abs(gradient_errors).max() <= 1e-12
    # float32 once, where the run rounds: the KL's share of the reward
    tolerance = 1e-4 if cfg.loss.kl_in == "reward" else 1e-12
    if cfg.loss.kind == "gdpo":  # the rest of a total is rounded
        tolerance = 1e-7
    assert explained.advantages == pytest.approx(advantages_of_texts, abs=tolerance)
    if not on_policy and cfg.loss.kind not in ("rloo", "reinforce"):
        is_clipped = explained.ratio != explained.clipped_ratio
        assert is_clipped.any()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    settings = {
        "save.every": 1,
        "save.keep_last": 9,
        "log.tokens_every": 1,
        "optimizer.lr": 0.01,
    }
    return write_yaml(tmp_path_factory.mktemp("world"), **settings)


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """Return the function run(overrides...) -> the folder of a finished run; the same overrides run
    once.
    """
    return runs_of(train.main, world, tmp_path_factory)


SMALL = "train.tokens_per_micro_batch=80"
RUNS = {
    "GRPO": (),
    "GRPO, small micro-batches": (SMALL,),
    "GRPO, recompute": ("model.head=recompute", SMALL),
    "Dr.GRPO": ("loss.kind=dr_grpo",),
    "Dr.GRPO, recompute, small micro-batches": ("loss.kind=dr_grpo", "model.head=recompute", SMALL),
    "GSPO": ("loss.kind=gspo", "model.head=recompute"),
    "GSPO, small micro-batches": ("loss.kind=gspo", "model.head=recompute", SMALL),
    "KL in the loss": ("loss.kl_coef=0.5", SMALL),
    "KL in the reward": ("loss.kl_coef=0.1", "loss.kl_in=reward", "loss.kl_estimator=k1"),
    "resampled": ("sampling.dynamic_sampling=2", "sampling.temperature=0.7"),
    "entropy, frozen": ("loss.entropy_coef=0.1", "train.frozen='model.embed_tokens.*'"),
    "CISPO, trusting": ("loss.kind=cispo", "loss.tis_cap=1.5"),
    "RLOO, by the sequence": ("loss.kind=rloo", "loss.agg_mode=seq-mean-token-mean"),
    "SAPO, masked": ("loss.kind=sapo", "loss.tis_cap=1.5", "loss.tis_mode=mask"),
    "GMPO, weighted texts": (
        "loss.kind=gmpo",
        "loss.tis_cap=2",
        "loss.tis_level=sequence",
        "loss.off_policy_mask_threshold=0.5",
        "model.head=recompute",
        SMALL,
    ),
    "LUSPO": ("loss.kind=luspo", "model.head=recompute"),
    "DPPO, unbiased KL": (
        "loss.kind=dppo_kl",
        "loss.kl_coef=0.5",
        "loss.kl_estimator=k3_unbiased",
    ),
    "MaxRL": ("loss.kind=maxrl", "reward.unparsable=0", "reward.miss=0.2"),
    "pass at 2": ("loss.kind=pass_at_k", "loss.pass_k=2"),
    "GDPO": ("loss.kind=gdpo", "reward.weights={ndcg: 1.0, mrr: 0.5}"),
}


@pytest.mark.parametrize("name", RUNS)
def test_agrees_with_the_run(name, run):
    folder = run(*RUNS[name])

    for step in (1, 3):  # the initial weights; those of a checkpoint
        text, result = explain.explain_step(str(folder), step)
        checks = result["checks"]
        print(f"{name}, step {step}: {format_errors(checks)}")
        assert result["agrees"]
        assert "not checked" not in text
        assert "DISAGREES" not in text
        assert checks["grad_logp_norm"]["off"] <= 1e-5
        assert checks["grad_norm"]["off"] <= 1e-4
        assert checks["grad_norm"]["logged"] > 0
        if (
            "GSPO" not in name and "GMPO" not in name
        ):  # whose advantages sum to 0: its loss is rounding
            loss = checks["loss"]
            assert loss["ours"] == pytest.approx(loss["logged"], rel=1e-5), "plain relative"


def format_errors(checks: dict[str, dict]) -> str:
    """Return the error of each check, and the plain relative one of the loss."""
    errors = [f"{key} {check['off']:.1e}" for key, check in checks.items()]
    loss = checks["loss"]
    difference = abs(loss["ours"] - loss["logged"])
    plain = difference / max(1e-30, abs(loss["logged"]))
    return f"{', '.join(errors)}, plain loss {plain:.1e}"


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "gspo", "gmpo"])
@pytest.mark.parametrize("budget", [(), (SMALL,)], ids=["one batch", "small batches"])
def test_off_policy(kind, budget, run):
    """A replay's ratios are not 1 and some are clipped: the loss of GSPO is then more than
    rounding.
    """
    first = run("train.steps=2")
    folder = run(
        f"loss.kind={kind}",
        "model.head=recompute",
        "loss.clip_ratio_low=0.05",
        "train.steps=4",
        f"train.replay={first}/rollouts.jsonl.gz",
        *budget,
    )

    text, result = explain.explain_step(str(folder), 4)

    checks = result["checks"]
    loss = checks["loss"]
    metrics = jsonl(folder / "metrics.jsonl")
    print(kind, format_errors(checks))
    assert result["agrees"]
    assert checks["grad_norm"]["off"] <= 1e-4
    assert "this run replays" in text
    assert " 0 tokens outside" not in text
    assert loss["ours"] == pytest.approx(loss["logged"], rel=1e-5)
    assert metrics[3]["clip_ratio"] > 0


# runs with the same rollouts in their first step, and the same loss
OF_ONE_LOSS = [
    ("GRPO", "GRPO, small micro-batches", "GRPO, recompute"),
    ("Dr.GRPO", "Dr.GRPO, recompute, small micro-batches"),
]


def test_dlogp_norm_does_not_depend_on_the_heads_nor_on_micro_batches(run):
    """Nor the loss: the first step of each run has the same rollouts."""
    for names in OF_ONE_LOSS:
        first, *others = [jsonl(run(*RUNS[name]) / "metrics.jsonl")[0] for name in names]
        for row in others:
            assert row["loss"] == pytest.approx(first["loss"], rel=1e-6)
            assert row["grad_logp_norm"] == pytest.approx(first["grad_logp_norm"], rel=1e-6)


def test_several_ranks(run, world, tmp_path):
    """Groups of two ranks, idle micro-batches among them: the merged log is the step's, and its
    figures are those of one rank.
    """
    folder = tmp_path / "run"
    overrides = (SMALL, "train.prompts_per_step=3")
    torchrun(2, "-m", "recr1.train", world, *overrides, f"run.dir={folder}")

    text, result = explain.explain_step(str(folder), 2)

    assert result["agrees"]
    assert "not checked" not in text
    assert result["shapes"]["P"] == 3
    of_two_ranks = jsonl(folder / "metrics.jsonl")[0]
    of_one_rank = jsonl(run(*overrides) / "metrics.jsonl")[0]
    for key in ("loss", "grad_logp_norm", "grad_norm"):
        assert of_two_ranks[key] == pytest.approx(of_one_rank[key], rel=1e-5)


def test_the_gradient_by_transformers_in_float64(run):
    """The whole chain without our model, head, packing or numpy: transformers, rows of one text,
    autograd of the formulas.
    """
    for name, kind in (
        ("GRPO", "grpo"),
        ("GSPO", "gspo"),
        ("KL in the loss", "grpo"),
    ):
        folder = run(*RUNS[name])
        model = AutoModelForCausalLM.from_pretrained(folder / "checkpoints/step_000002/model")
        model = model.double()
        step = explain.read_logged_step(str(folder), 3)
        cfg = replace(step.cfg, loss=replace(step.cfg.loss, kind=kind))
        rows = []
        logps = []
        for row in step.rows:
            logp = compute_logp(model, row["prompt_ids"], row["ids"])
            rows.append(row | dict(old_logp=logp.tolist()))
            logps.append(logp)

        compute_loss(cfg, rows, logps).backward()
        explained = explain.compute_by_hand(step.cfg, step.rows)
        check, gap = explain.compute_gradient(step, explained)

        gradients = [parameter.grad for parameter in model.parameters()]
        want = torch.nn.utils.get_total_norm(gradients).item()
        assert check.ours == pytest.approx(want, rel=1e-5)
        assert gap < 1e-5


def compute_logp(model, prompt_ids: list[int], ids: list[int]) -> torch.Tensor:
    """Return the log-probs of the ids behind the prompt by transformers' model, (len(ids),)."""
    logits = model(input_ids=torch.tensor([prompt_ids + ids])).logits[0]
    of_ids = logits[len(prompt_ids) - 1 : -1].log_softmax(-1)
    index = torch.tensor(ids)[:, None]
    return of_ids.gather(-1, index)[:, 0]


def test_a_step_without_variance(run):
    """One token is no answer: every advantage, the loss and the gradient are 0, and a floor of 0
    divides nothing.
    """
    folder = run("sampling.max_new_tokens=1", "train.steps=1", "loss.advantage_eps=0")

    _, result = explain.explain_step(str(folder), 1)

    assert result["agrees"]
    for check in result["checks"].values():
        assert check["ours"] == 0
        assert check["logged"] == 0


LINKS = [
    "prompt",
    "group",
    "rewards",
    "mean and std",
    "advantages",
    "ratio",
    "clip",
    "loss",
    "d loss/d logp",
    "gradient",
]
RLOO_LINKS = [
    "prompt",
    "group",
    "rewards",
    "mean and std",
    "advantages",
    "gain",
    "loss",
    "d loss/d logp",
    "gradient",
]


def test_the_story(run):
    """Every link is there, with shapes and a place in the source where that very line stands."""
    root = Path(explain.__file__).parents[2]
    for overrides in RUNS.values():
        text, result = explain.explain_step(str(run(*overrides)), 3)

        shapes = result["shapes"]
        assert f"(P, G) = ({shapes['P']}, 4)" in text
        assert f"(N,) = ({shapes['N']},)" in text
        links = RLOO_LINKS if "loss.kind=rloo" in overrides else LINKS
        heads = [head for head in list_heads(text) if head in links]
        assert heads[: len(links)] == links
        places = list_places(text)
        assert len(places) >= 12
        for path, line_number, code in places:
            source = (root / path).read_text().splitlines()
            assert code in source[line_number - 1]

    text, _ = explain.explain_step(str(run(*RUNS["KL in the loss"])), 3)
    assert "KL_t = e^d - 1 - d" in text
    text, _ = explain.explain_step(str(run(*RUNS["KL in the reward"])), 3)
    assert "- 0.1 sum_t KL_t (k1" in text


def list_heads(text: str) -> list[str]:
    """Return the names in the first column, from the top to the bottom."""
    heads = []
    for line in text.splitlines():
        if line and not line.startswith(("step", "tokens", " ")):
            heads.append(line[:14].strip())
    return heads


def list_places(text: str) -> list[tuple[str, int, str]]:
    """Return (path, number of the line, what it holds) of each place in the source."""
    places = []
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("recr1/") and ".py:" in line:
            place, code = line.split("  ", 1)
            path, line_number = place.split(":")
            places.append((path, int(line_number), code))
    return places


def copy_run(folder: Path, tmp_path, change_rows=None, change_metrics=None) -> Path:
    """Copy the run into tmp_path, with the rows of its logs changed; return the copy."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    if change_rows:
        rows = jsonl(folder / "rollouts.jsonl.gz")
        change_rows(rows)
        text = format_jsonl(rows)
        (copy / "rollouts.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    if change_metrics:
        rows = jsonl(folder / "metrics.jsonl")
        change_metrics(rows)
        (copy / "metrics.jsonl").write_text(format_jsonl(rows))
    return copy


def format_jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def scale_value(key: str, factor: float) -> Callable[[list[dict]], None]:
    """Return a function that scales a value of the first row of step 3 that has an advantage."""

    def change(rows):
        for row in rows:
            if row["step"] == 3 and row.get("advantage", 1) != 0:
                row[key] *= factor
                return
        raise AssertionError("step 3 has no such row")

    return change


# how the rollouts' rows are changed; how those of the metrics; which checks must fail, which may
WRONG = {
    "a reward": (scale_value("reward", 1.01), None, {"advantages"}, set()),
    "an advantage": (
        scale_value("advantage", 1.01),
        None,
        {"advantages", "grad_logp_norm"},
        {"loss", "grad_norm"},
    ),
    "the loss": (None, scale_value("loss", 1.0001), {"loss"}, set()),
    "grad_logp_norm": (
        None,
        scale_value("grad_logp_norm", 1.0001),
        {"grad_logp_norm"},
        set(),
    ),
    "grad_norm": (None, scale_value("grad_norm", 1.001), {"grad_norm"}, set()),
    "not finite": (None, scale_value("loss", math.nan), {"loss"}, set()),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_disagrees_is_named(name, run, tmp_path, capsys):
    change_rows, change_metrics, must_fail, may_fail = WRONG[name]
    folder = copy_run(run(), tmp_path, change_rows, change_metrics)

    with pytest.raises(SystemExit) as exit:
        run_guarded(cli.main, ["explain", "--run", str(folder), "--step", "3", "--json"])

    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    wrong = [key for key, check in result["checks"].items() if not check["agrees"]]
    assert exit.value.code == 1
    assert not result["agrees"]
    assert must_fail <= set(wrong)
    assert set(wrong) <= must_fail | may_fail
    assert f"{', '.join(wrong)}: not what the run logged" in out


def test_another_step_s_weights_are_noticed(run, tmp_path):
    folder = copy_run(run(), tmp_path)
    weights_before_step_3 = folder / "checkpoints/step_000002"
    shutil.rmtree(weights_before_step_3)
    text, result = explain.explain_step(str(folder), 3)
    assert result["agrees"]
    assert "not checked: the weights before the step are gone" in text

    model = folder / "checkpoints/step_000001/model/model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"\x00")
    text, _ = explain.explain_step(str(folder), 2)
    assert "not checked: model/model.safetensors" in text

    # undamaged, but of another step
    shutil.copytree(run() / "checkpoints/step_000003", weights_before_step_3)
    _, result = explain.explain_step(str(folder), 3)
    assert not result["checks"]["grad_norm"]["agrees"]
    assert result["checks"]["loss"]["agrees"]


def test_bfloat16(run):
    """Its log-probs depend on the micro-batch, so what they enter is known less well."""
    for overrides in ((), ("loss.kl_coef=0.5",)):
        folder = run("model.compute=bfloat16", SMALL, *overrides)

        _, result = explain.explain_step(str(folder), 3)

        for key, check in result["checks"].items():
            print(f"{key}: {check['off']:.1e} of {check['allowed']:.1e}")
        assert result["agrees"]
        assert result["checks"]["advantages"]["off"] <= 1e-5


def test_shown(run, capsys):
    rows = jsonl(run() / "rollouts.jsonl.gz")
    ids = [row["prompt"] for row in rows if row["step"] == 3]
    argv = ["explain", "--run", str(run()), "--step", "3", "--prompt"]

    exit_code = run_guarded(cli.main, [*argv, ids[-1]])
    assert exit_code == 0
    assert f"shown: prompt {ids[-1]}\n" in capsys.readouterr().out

    exit_code = run_guarded(cli.main, [*argv, "nobody"])
    assert exit_code == 2
    assert "'nobody' is not in step 3; there are" in capsys.readouterr().err


FUNCTIONS = """
def gain(logp, old, batch, c):
    return batch.advantages * logp
gain.per_token = True
def adv(r, c):
    return r - r.mean(1, keepdim=True)
"""


def test_refused(run, tmp_path, capsys, monkeypatch):
    def read_refusal(folder, step=1):
        capsys.readouterr()
        argv = ["explain", "--run", str(folder), "--step", str(step)]
        exit_code = run_guarded(cli.main, argv)
        assert exit_code == 2
        err = capsys.readouterr().err
        assert err.startswith("recr1: ")
        assert err.count("\n") == 1
        return err

    assert "step 9 is not logged" in read_refusal(run(), 9)
    assert "no such file" in read_refusal(tmp_path / "nowhere")

    folder = run("train.num_mini_batches=2", "train.steps=1")
    assert "train.num_mini_batches is 2" in read_refusal(folder)

    (tmp_path / "my_gain.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    folder = run("loss.kind='my_gain:gain'", "train.steps=1")
    assert "loss.kind is 'my_gain:gain', a function of yours" in read_refusal(folder)
    folder = run("loss.advantage='my_gain:adv'", "train.steps=1")
    assert "loss.advantage is 'my_gain:adv'" in read_refusal(folder)

    folder = copy_run(run(), tmp_path, change_metrics=remove_loss)
    err = read_refusal(folder)
    assert "step 1 has no loss; the run was made by an older recr1" in err

    shutil.copy(run() / "metrics.jsonl", folder)
    config = folder / "config.yaml"
    tree = yaml.safe_load(config.read_text())
    tree["sampling"]["group_size"] = 8
    config.write_text(yaml.safe_dump(tree))
    assert "the files are not of one run" in read_refusal(folder)

    (folder / "metrics.jsonl").write_text("{\n")
    assert "cannot be read" in read_refusal(folder)


def remove_loss(rows):
    for row in rows:
        row.pop("loss")
