"""The losses and corrections of 2025's end and 2026 against TRL's trainers or, where TRL has none,
the paper's formula by autograd over one text at a time; float64. Then mistakes are planted in ours,
each of which one of these comparisons must find.

Legend: R rollouts, T longest completion, n tokens of a text.
"""

import inspect
import itertools
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_losses_oracles import (
    EXACT,
    FLOAT32,
    KL_WEIGHT,
    LENGTHS,
    SEQUENCE,
    TRL_FLOOR,
    G,
    check_equal,
    compute_ours,
    compute_trl,
    make_batches,
    make_objective,
    make_world,
)

from recr1.config.schema import ConfigError, LossConfig, ModelConfig
from recr1.data_types import Reward
from recr1.rl import advantages, corrections, kl, losses, policy_loss
from recr1.rl.advantages import (
    ADVANTAGES,
    RewardParts,
    compute_group_advantages,
    reward_best_of_k,
    split_rewards,
)
from recr1.rl.losses import RECIPES, resolve_objective
from recr1.rl.policy_loss import compute_token_loss, compute_token_weights

SAPO_ARGS = dict(sapo_temperature_pos=0.75, sapo_temperature_neg=1.0625)  # float32 has them exactly
SAMPLED = dict(use_vllm=True)
BAND = dict(tis_cap=1.1, tis_floor=0.9)
TRL_BAND = SAMPLED | dict(
    vllm_importance_sampling_clip_min=0.9, vllm_importance_sampling_clip_max=1.1
)
TRL_CASES = {  # our settings, TRL's trainer, loss_type and other settings
    "sapo": (dict(kind="sapo", **SAPO_ARGS), "grpo", "sapo", dict(args=SAPO_ARGS)),
    "luspo": (dict(kind="luspo"), "grpo", "luspo", SEQUENCE),
    "gmpo": (
        dict(kind="gmpo", clip_ratio_low=0.2, clip_ratio_high=0.3),
        "gmpo",
        "grpo",
        dict(epsilon_low=0.2, epsilon_high=0.3),
    ),
    "k3_unbiased": (
        dict(kind="dapo", kl_coef=KL_WEIGHT, kl_estimator="k3_unbiased"),
        "grpo",
        "dapo",
        dict(beta=KL_WEIGHT, args=dict(use_bias_correction_kl=True)),
    ),
    "off-policy mask": (
        dict(kind="dapo", off_policy_mask_threshold=0.1),
        "grpo",
        "dapo",
        SAMPLED | dict(off_policy_mask_threshold=0.1, vllm_importance_sampling_correction=False),
    ),
    "off-policy mask, KL": (
        dict(kind="luspo", off_policy_mask_threshold=0.2, kl_coef=KL_WEIGHT),
        "grpo",
        "luspo",
        SEQUENCE
        | SAMPLED
        | dict(off_policy_mask_threshold=0.2, vllm_importance_sampling_correction=False)
        | dict(beta=KL_WEIGHT),
    ),
    "gdpo": (
        dict(kind="gdpo", clip_ratio_high=0.3),
        "grpo",
        "bnpo",
        dict(epsilon_high=0.3, multi_objective_aggregation="normalize_then_sum"),
    ),
}
for level, mode in itertools.product(("token", "sequence"), ("truncate", "mask")):
    TRL_CASES[f"{level} {mode}"] = (
        dict(kind="dapo", tis_level=level, tis_mode=mode, kl_coef=KL_WEIGHT, **BAND),
        "grpo",
        "dapo",
        TRL_BAND | dict(beta=KL_WEIGHT, vllm_importance_sampling_mode=f"{level}_{mode}"),
    )
TRL_CASES["sequence mask, gspo"] = (
    dict(kind="gspo", tis_level="sequence", tis_mode="mask", **BAND),
    "grpo",
    "grpo",
    SEQUENCE | TRL_BAND | dict(vllm_importance_sampling_mode="sequence_mask"),
)


def make_parts(world) -> RewardParts:
    """Make three parts of each reward; one group has no variance in one of them, one in none."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(len(LENGTHS), 3, generator=generator, dtype=torch.float64)
    values = values * torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)
    values = values[world.elder]
    values[:G, 1] = 0.3
    values[G : 2 * G] = 0.5
    return RewardParts(values, torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64))


def make_case(name: str, off: bool) -> tuple:
    """Make the world of a case of TRL's, and the settings of both sides."""
    our_settings, trainer, loss_type, trl_settings = TRL_CASES[name]
    world = make_world(off)
    if our_settings["kind"] == "gdpo":
        world.parts = make_parts(world)
        trl_settings = trl_settings | dict(
            reward_weights=world.parts.weights, reward_funcs=[None] * 3
        )
    return world, our_settings, trainer, dict(loss_type=loss_type, **trl_settings)


def check_trl(name: str, trl, monkeypatch, off: bool = True) -> None:
    """Compare a case's loss and gradient with TRL's."""
    world, our_settings, trainer, trl_settings = make_case(name, off)
    loss, d_logp, *_ = compute_ours(world, monkeypatch, our_settings)
    want_loss, want_d_logp, *_ = compute_trl(world, getattr(trl, trainer), **trl_settings)

    # TRL makes R / (R - 1) of the batch's variance in float32
    rtol = FLOAT32 if our_settings["kind"] == "gdpo" else EXACT
    check_equal(loss, want_loss, rtol)
    check_equal(d_logp, want_d_logp, rtol)


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl", reason="the package trl is not installed: no loss is compared")
    from trl.experimental.gmpo import GMPOTrainer
    from trl.trainer.grpo_trainer import GRPOTrainer

    return SimpleNamespace(grpo=GRPOTrainer, gmpo=GMPOTrainer)


@pytest.mark.parametrize("off", [True, False])
@pytest.mark.parametrize("name", TRL_CASES)
def test_trl(name, off, trl, monkeypatch):
    """Off policy, and on policy, where old log-probs are the new ones."""
    check_trl(name, trl, monkeypatch, off)


def test_the_world_reaches_every_branch_of_these():
    world = make_world()
    weight = (world.old - world.sampler).double()
    sequence_weight = (weight * world.mask).sum(1).exp()
    token_weight = weight[world.mask].exp()
    for weights in (token_weight, sequence_weight):
        assert (weights < 0.9).any()
        assert (weights > 1.1).any()
        assert ((weights >= 0.9) & (weights <= 1.1)).any()

    adv = compute_group_advantages(world.rewards, G, ADVANTAGES["mean"], LossConfig())
    lengths = torch.tensor(LENGTHS)
    mean_kl = ((world.sampler - world.now) * world.mask).sum(1) / lengths
    for threshold in (0.1, 0.2):
        assert ((mean_kl > threshold) & (adv < 0)).any()
        assert ((mean_kl > threshold) & (adv > 0)).any()
        assert ((mean_kl <= threshold) & (adv < 0)).any()


# --- the papers' formulas -------------------------------------------------------------------------


def standardize(rewards: list[float]) -> list[float]:
    values = torch.tensor(rewards, dtype=torch.float64)
    if values.max() == values.min():
        return [0.0] * len(rewards)
    scaled = (values - values.mean()) / (values.std() + TRL_FLOOR)
    return scaled.tolist()


def scale_by_mean(rewards: list[float]) -> list[float]:
    mean = sum(rewards) / len(rewards)
    if mean <= 0:
        return [0.0] * len(rewards)
    return [(reward - mean) / mean for reward in rewards]


def count_best(k: int):
    """Return the function of a group's rewards to each one's share in the best of k."""

    def compute(rewards: list[float]) -> list[float]:
        subsets = list(itertools.combinations(range(len(rewards)), k))
        shares = [0.0] * len(rewards)
        for subset in subsets:
            for i in subset:
                others = [rewards[j] for j in subset if j != i]
                best = max(rewards[j] for j in subset)
                shares[i] += (best - max(others)) / len(subsets)
        return shares

    return compute


def clip(logp, old, A):
    ratio = (logp - old).exp()
    return torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)


def gate_softly(logp, old, A):
    tau = 1.0 if A > 0 else 1.05
    ratio = (logp - old).exp()
    return 4 / tau / (1 + torch.exp(-tau * (ratio - 1))) * A


def make_trust_region(divergence, low: float, high: float):
    """Return DPPO's gain: PPO's sides, with a divergence in place of the ratio's clip."""

    def compute(logp, old, A):
        gains = []
        for new, before in zip(logp, old):
            p = new.detach().exp().item()
            q = before.exp().item()
            distance = divergence(torch.tensor(p).double(), torch.tensor(q).double())
            stopped = (A > 0 and p > q and distance > high) or (A < 0 and p < q and distance > low)
            gains.append((new - before).exp() * A * (0 if stopped else 1))
        return torch.stack(gains)

    return compute


def compute_tv(p, q):
    """Half the sum of |differences| of (p, 1 - p) and (q, 1 - q)."""
    return (abs(p - q) + abs((1 - p) - (1 - q))) / 2


def compute_kl(p, q):
    """KL of (q, 1 - q) from (p, 1 - p)."""
    return q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()


FORMULAS = {  # our settings; rewards of a group -> advantages; gain of a text's tokens; average
    "sapo": (dict(kind="sapo"), standardize, gate_softly, "text means"),
    "dppo_tv": (
        dict(kind="dppo_tv", clip_ratio_low=0.003, clip_ratio_high=0.02),
        standardize,
        make_trust_region(compute_tv, 0.003, 0.02),
        "tokens",
    ),
    "dppo_kl": (
        dict(kind="dppo_kl", clip_ratio_low=0.001, clip_ratio_high=0.002),
        standardize,
        make_trust_region(compute_kl, 0.001, 0.002),
        "tokens",
    ),
    "maxrl": (dict(kind="maxrl"), scale_by_mean, clip, "tokens"),
    "pass_at_k": (dict(kind="pass_at_k"), count_best(G), clip, "tokens"),
    "pass_at_2": (dict(kind="pass_at_k", pass_k=2), count_best(2), clip, "tokens"),
    "text sums": (dict(agg_mode="seq-mean-token-sum"), standardize, clip, "text sums"),
}


def compute_by_formula(world, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute loss and d loss / d logp (R, T), a text at a time, every sibling on its own."""
    _, score_group, gain, average = FORMULAS[name]
    logp = world.now.clone().requires_grad_()
    texts = []
    for first in range(0, len(LENGTHS), G):
        siblings = range(first, first + G)
        scores = score_group([world.rewards[i].item() for i in siblings])
        for i, A in zip(siblings, scores):
            tokens = slice(0, LENGTHS[i])
            texts.append(gain(logp[i, tokens], world.old[i, tokens], A))
    averages = {
        "tokens": torch.cat(texts).mean(),
        "text means": torch.stack([text.mean() for text in texts]).mean(),
        "text sums": torch.stack([text.sum() for text in texts]).mean(),
    }
    loss = -averages[average]
    [d_logp] = torch.autograd.grad(loss, logp)
    return loss.detach(), torch.zeros_like(d_logp).index_add(0, world.elder, d_logp)


def check_formula(name: str, monkeypatch) -> None:
    """Compare a case's loss and gradient with the paper's formula."""
    world = make_world()
    # maxrl: one group's mean is below 0
    world.rewards = world.rewards.abs() * torch.tensor([1, 1, 1, -1] * G)[world.elder]
    loss, d_logp, *_ = compute_ours(world, monkeypatch, FORMULAS[name][0])
    want_loss, want_d_logp = compute_by_formula(world, name)

    check_equal(loss, want_loss)
    check_equal(d_logp, want_d_logp)


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name, monkeypatch):
    check_formula(name, monkeypatch)


@pytest.mark.parametrize("k", range(2, 7))
def test_best_of_k_is_the_mean_over_all_subsets(k):
    """Ties share, in whatever order they stand."""
    rewards = [[0.3, -1.0, 0.7, 0.7, 0.1, 0.3], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]
    config = LossConfig(pass_k=k)

    adv = reward_best_of_k(torch.tensor(rewards, dtype=torch.float64), config)

    for group, row in zip(rewards, adv.tolist()):
        assert row == pytest.approx(count_best(k)(group), abs=1e-12)
    assert adv[0, 2] == adv[0, 3]


def test_gdpo_by_pythons_statistics():
    """Each part of a group by its own mean and std, weighted, over the std of all."""
    world = make_world()
    values, weights = make_parts(world)
    summed = [0.0] * len(LENGTHS)
    for first in range(0, len(LENGTHS), G):
        for part, weight in zip(values[first : first + G].T.tolist(), weights.tolist()):
            mean = statistics.mean(part)
            std = statistics.stdev(part)
            for i, value in enumerate(part):
                summed[first + i] += weight * (value - mean) / (std + TRL_FLOOR)
    batch_std = statistics.stdev(summed)
    want = [(value - statistics.mean(summed)) / (batch_std + TRL_FLOOR) for value in summed]
    config = LossConfig(advantage_eps=TRL_FLOOR)

    adv = compute_group_advantages(
        world.rewards, G, ADVANTAGES["gdpo"], config, RewardParts(values, weights)
    )

    assert adv.tolist() == pytest.approx(want, rel=1e-12, abs=1e-14)
    assert (adv[G : 2 * G] == 0).all()


def test_the_rest_of_a_reward_is_a_part():
    """0.5 ndcg + 2 diversity + bonus, and an answer that could not be parsed."""
    weights = {"ndcg": 0.5, "mrr": 0.0, "diversity": 2.0}
    terms = dict(ndcg=0.4, mrr=0.9, diversity=0.3, overlong=-0.25)
    rewards = [Reward(0.2 + 0.6 + 0.1 - 0.25, terms), Reward(-2.0, dict.fromkeys(terms, 0.0))]

    parts = split_rewards(rewards, weights)

    assert parts.weights.tolist() == [0.5, 2.0, 1.0]
    assert parts.values.tolist() == [[0.4, 0.3, -0.15], [0.0, 0.0, -2.0]]
    totals = parts.values @ parts.weights
    assert totals.tolist() == pytest.approx([reward.total for reward in rewards])
    with pytest.raises(ConfigError, match="have no novelty"):
        split_rewards(rewards, weights | {"novelty": 1.0})


# --- what holds for every loss --------------------------------------------------------------------

CORRECTED = {name: TRL_CASES[name][0] for name in TRL_CASES if TRL_CASES[name][0]["kind"] != "gdpo"}


@pytest.mark.parametrize("name", CORRECTED)
def test_micro_batches_do_not_matter(name, monkeypatch):
    world = make_world()
    loss, d_logp, *_ = compute_ours(world, monkeypatch, CORRECTED[name])
    cut_loss, cut_d_logp, *_ = compute_ours(world, monkeypatch, CORRECTED[name], budget=20)

    check_equal(cut_loss, loss)
    check_equal(cut_d_logp, d_logp)


def to_float32(batch):
    """Return the batch in float32."""
    fields = {}
    for name, value in vars(batch).items():
        if torch.is_tensor(value) and value.dtype == torch.float64:
            fields[name] = value.float()
    return replace(batch, **fields)


@pytest.mark.parametrize(
    "settings", [dict(kind=kind) for kind in RECIPES] + list(CORRECTED.values())
)
def test_float32_is_float64_to_its_rounding(settings):
    world = make_world()
    objective = make_objective(settings)
    [(batch, places)], total = make_batches(world, objective)
    results = []
    for some_batch in (batch, to_float32(batch)):
        dtype = some_batch.advantages.dtype
        logp = world.now[places].to(dtype)
        entropy = world.entropy[places].to(dtype)
        weight = compute_token_weights(some_batch, objective)
        results.append(compute_token_loss(logp, entropy, some_batch, weight, total, objective))

    exact, rounded = results
    difference = rounded.grad_logp - exact.grad_logp
    assert rounded.grad_logp.dtype == torch.float32
    assert difference.norm() <= FLOAT32 * exact.grad_logp.norm()
    assert rounded.loss.item() == pytest.approx(exact.loss.item(), rel=FLOAT32, abs=FLOAT32)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(kind="gmpo"), "loss.kind: gmpo needs whole rollouts"),
        (dict(kind="luspo"), "loss.kind: luspo needs whole rollouts"),
        (dict(tis_cap=2.0, tis_level="sequence"), "loss.tis_level: sequence needs whole rollouts"),
        (dict(off_policy_mask_threshold=0.1), "loss.off_policy_mask_threshold: needs whole"),
    ],
)
def test_what_needs_whole_rollouts_is_refused_with_the_fused_head(settings, message):
    config = LossConfig(**settings)

    with pytest.raises(ConfigError, match=f"^{message}.*; set model.head=recompute$"):
        resolve_objective(config, ModelConfig(head="fused"))
    resolve_objective(config, ModelConfig(head="recompute"))


def test_the_kernel_is_not_asked_for_what_it_does_not_have(monkeypatch):
    monkeypatch.setattr(losses, "choose_backend", lambda *_: "triton")
    has_it = [dict(), dict(tis_cap=2.0), dict(kind="dapo", kl_coef=0.1), dict(kind="maxrl")]
    for settings in has_it:
        assert make_objective(settings).runs_in_kernel, settings
    for settings in CORRECTED.values():
        assert not make_objective(settings).runs_in_kernel, settings
    for kind in ("sapo", "gmpo", "luspo", "dppo_tv", "dppo_kl"):
        assert not make_objective(dict(kind=kind)).runs_in_kernel, kind


def test_one_bound_is_the_truncation_that_it_was():
    """loss.tis_cap alone: to the bit."""
    [(batch, _)], _ = make_batches(make_world(), make_objective({}))
    old_logp = batch.old_logp

    weight = corrections.weigh_by_importance(old_logp, batch, LossConfig(tis_cap=1.1))

    want = (old_logp - batch.sampler_logp).exp().clamp(max=1.1)
    assert torch.equal(weight, want)


# --- planted mistakes -----------------------------------------------------------------------------

MODULES = (advantages, corrections, kl, losses, policy_loss)


def plant(monkeypatch, module, name: str, old: str, new: str) -> None:
    """Put a function in place of a module's, with `new` where its source has `old`."""
    function = getattr(module, name)
    signature, _, body = inspect.getsource(function).split('"""')
    assert body.count(old) == 1, body
    namespace = dict(vars(module))
    exec(f"{signature}pass{body.replace(old, new)}", namespace)
    mutant = namespace[name]
    for other in MODULES:
        if getattr(other, name, None) is function:
            monkeypatch.setattr(other, name, mutant)
    for kind, (surrogate, *rest) in RECIPES.items():
        if surrogate is function:
            monkeypatch.setitem(RECIPES, kind, (mutant, *rest))
    for kind, advantage in ADVANTAGES.items():
        if advantage is function:
            monkeypatch.setitem(ADVANTAGES, kind, mutant)


MISTAKES = {  # module, function, what it says, what it must not say, the comparison that finds it
    "wrong tau": (losses, "soft_gated_surrogate", "advantages > 0", "advantages < 0", "sapo"),
    "no 4 / tau": (losses, "soft_gated_surrogate", "4 / tau", "4", "sapo"),
    "gmpo clips the other side": (
        losses,
        "geometric_surrogate",
        "advantages > 0",
        "advantages < 0",
        "gmpo",
    ),
    "gmpo clips the ratio": (
        losses,
        "geometric_surrogate",
        "max=config.upper_clip_ratio",
        "max=0.2",
        "gmpo",
    ),
    "luspo averages": (
        policy_loss,
        "compute_token_weights",
        '!= "seq-mean-token-mean"',
        '== "no"',
        "luspo",
    ),
    "dppo masks the wrong side": (
        losses,
        "mask_divergence",
        "(ratio > 1)",
        "(ratio < 1)",
        "dppo_tv",
    ),
    "dppo's deltas exchanged": (
        losses,
        "mask_divergence",
        "> config.clip_ratio_low",
        "> config.upper_clip_ratio",
        "dppo_tv",
    ),
    "dppo forgets the ratio": (
        losses,
        "mask_divergence",
        "ratio * batch",
        "(1 + logp - old_logp) * batch",
        "dppo_kl",
    ),
    "dppo's KL the other way": (
        losses,
        "kl_masked_surrogate",
        "old_logp.exp() *",
        "new_logp.exp() *",
        "dppo_kl",
    ),
    "maxrl divides by std": (
        advantages,
        "divide_by_mean",
        "/ mean",
        "/ rewards.std(1, keepdim=True)",
        "maxrl",
    ),
    "best of k counts k - 1": (
        advantages,
        "reward_best_of_k",
        "num_below, k - 2",
        "num_below, k - 1",
        "pass_at_2",
    ),
    "gdpo sums unweighted": (
        advantages,
        "normalize_each_part",
        "@ parts.weights",
        "@ torch.ones_like(parts.weights)",
        "gdpo",
    ),
    "gdpo leaves the batch out": (
        advantages,
        "normalize_each_part",
        "advantages / (batch_std + config.advantage_eps)",
        "advantages",
        "gdpo",
    ),
    "gdpo's std of the batch": (
        advantages,
        "normalize_each_part",
        "values.std(1, keepdim=True)",
        "values.std((0, 1), keepdim=True)",
        "gdpo",
    ),
    "a product that is a mean": (
        corrections,
        "weigh_by_importance",
        "sum_over_rollout(",
        "average_over_rollout(",
        "sequence mask",
    ),
    "the sampler's ratio upside down": (
        corrections,
        "weigh_by_importance",
        "old_logp - batch.sampler_logp",
        "batch.sampler_logp - old_logp",
        "token truncate",
    ),
    "the mask keeps what is outside": (
        corrections,
        "weigh_by_importance",
        "(is_inside, weight, 0.0)",
        "(is_inside, 0.0, weight)",
        "token mask",
    ),
    "the mask truncates": (
        corrections,
        "weigh_by_importance",
        "weight, 0.0)",
        "weight, config.tis_cap)",
        "sequence mask",
    ),
    "the mask drops good ones": (
        corrections,
        "mask_off_policy",
        "advantages < 0",
        "advantages > 0",
        "off-policy mask",
    ),
    "the mask's KL upside down": (
        corrections,
        "mask_off_policy",
        "batch.sampler_logp - logp",
        "logp - batch.sampler_logp",
        "off-policy mask",
    ),
    "the mask's KL is a sum": (
        corrections,
        "mask_off_policy",
        "average_over_rollout(",
        "3 * average_over_rollout(",
        "off-policy mask",
    ),
    "the ratio of the KL detached": (
        kl,
        "k3_unbiased",
        "(logp - old_logp).exp()",
        "(logp - old_logp).detach().exp()",
        "k3_unbiased",
    ),
    "the KL masked too": (
        policy_loss,
        "compute_token_loss",
        "new_logp, batch.ref_logp, old_logp)",
        "new_logp, batch.ref_logp, old_logp) * correction",
        "off-policy mask, KL",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name, trl, monkeypatch):
    *where, case = MISTAKES[name]
    plant(monkeypatch, *where)

    with pytest.raises(AssertionError):
        if case in FORMULAS and case not in TRL_CASES:
            check_formula(case, monkeypatch)
        else:
            check_trl(case, trl, monkeypatch)
