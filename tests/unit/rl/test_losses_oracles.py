"""Losses against independent implementations: TRL's trainers from rewards to d loss / d logp
(float64), Liger's chunked loss from hidden states (float32 inside). The losses of 2025's end and
2026: test_recent_losses.py.

TRL's trainers run on a stand-in `self` that hands out given log-probs; its attributes are those
that the version in experiments/constraints.txt reads. Their side is padded and masked, ours packed;
two siblings write the same text, which is one weighted row here and two there. Only theirs (no kind
of ours): vespo, delta, scale_rewards: batch. Legend: R rollouts, T longest completion, N trained
tokens, M packed rows, C width, V vocabulary.
"""

from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from recr1.config.schema import LossConfig, ModelConfig
from recr1.data_types import Prompt, Rollout
from recr1.model.varlen_attention import AttentionBackend
from recr1.rl import policy_loss
from recr1.rl.advantages import ADVANTAGES, compute_group_advantages
from recr1.rl.kl import sum_kl_by_rollout
from recr1.rl.losses import resolve_objective
from recr1.rl.packing import deduplicate, pack_rollouts
from recr1.rl.policy_loss import compute_policy_loss, count_denominator

LIMIT = 11
V = 13
C = 8
TEMPERATURE = 0.7
KL_WEIGHT = 0.04
G = 3  # TRL makes G / (G - 1) of the unbiased std in float32: exact for 3
LENGTHS = [1, 5, 5, 9, 3, 7, 2, 8, 6, 4, 9, 2]  # max_new_tokens, LIMIT, is reached by none
TRL_FLOOR = 1e-4  # written into its division by the std
EXACT = 1e-12  # float64, the same formula in another order
FLOAT32 = 1e-6

SEQUENCE = dict(importance_sampling_level="sequence")
CASES = {  # our settings, TRL's loss_type, TRL's other settings
    "grpo": (dict(kind="grpo", agg_mode="seq-mean-token-mean"), "grpo", {}),
    "grpo token mean": (dict(kind="grpo"), "bnpo", {}),
    "dr_grpo": (dict(kind="dr_grpo"), "dr_grpo", dict(scale_rewards="none")),
    "dapo": (dict(kind="dapo", clip_ratio_high=0.28), "dapo", dict(epsilon_high=0.28)),
    "gspo": (
        dict(kind="gspo", clip_ratio_low=0.1, clip_ratio_high=0.15),
        "grpo",
        SEQUENCE | dict(epsilon_low=0.1, epsilon_high=0.15),
    ),
    "gspo token mean": (dict(kind="gspo", agg_mode="token-mean"), "dapo", SEQUENCE),
    "gspo constant": (
        dict(kind="gspo", agg_mode="seq-mean-token-sum-norm", advantage="mean"),
        "dr_grpo",
        SEQUENCE | dict(scale_rewards="none"),
    ),
    # MiniMax-M1 eq. 5 cuts at 1 + eps_high, as we do; TRL and Liger call that sum epsilon_high
    "cispo": (dict(kind="cispo", clip_ratio_high=0.3), "cispo", dict(epsilon_high=1.3)),
}
CAPS_AND_KLS = [(0.0, 0.0), (0.0, KL_WEIGHT), (1.1, KL_WEIGHT)]


# --- the world ------------------------------------------------------------------------------------


def make_world(off=True, logp=None) -> SimpleNamespace:
    """Make 12 rollouts of 4 prompts and their (R, T) tables.

    off: the policy has moved since. `logp`: what it now gives them, or random.
    """
    generator = torch.Generator().manual_seed(72)  # with it every clip bites: the test of the world

    def draw_normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    texts = []
    for length in LENGTHS:
        ids = torch.randint(V, (length,), generator=generator).tolist()
        texts.append(tuple(ids))
    texts[2] = texts[1]
    # (R,) the first rollout with this text
    elder = torch.tensor([0, 1, 1, *range(3, len(texts))])

    shape = (len(texts), max(LENGTHS))
    now = -3 + draw_normal(*shape)
    moved = 0.3 * draw_normal(*shape)
    # whole sequences move too, so that GSPO's clip bites
    moved = moved + 0.25 * draw_normal(shape[0], 1)
    ref_difference = draw_normal(*shape)
    sampler_noise = draw_normal(*shape)
    rewards = draw_normal(shape[0])
    entropy = draw_normal(*shape).exp()
    # one group of equal rewards, of which TRL's mean is exact too: 0
    rewards[2] = rewards[1]
    rewards[6:9] = 0.5

    if logp is not None:
        now = logp
    now = now[elder]
    old = now + off * moved[elder]
    sampler = (old + 0.15 * sampler_noise[elder]).float()  # both sides read it as float32
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = torch.arange(shape[1]) < lengths
    return SimpleNamespace(
        off=off,
        ids=texts,
        rollouts=make_rollouts(texts, sampler),
        elder=elder,
        now=now,
        old=old,
        ref=now + 0.2 * ref_difference[elder],
        sampler=sampler,
        rewards=rewards,
        parts=None,  # of the rewards
        entropy=entropy[elder],
        mask=mask,
    )


def make_rollouts(texts: list[tuple[int, ...]], sampler_logp: torch.Tensor) -> list[Rollout]:
    """Make rollouts of groups of G; the prompts have 3 tokens, 4, and so on."""
    rollouts = []
    for i, ids in enumerate(texts):
        group, sibling = divmod(i, G)
        prompt_ids = tuple(range(3 + group))
        prompt = Prompt(f"p{group}", group, "", prompt_ids)
        length = len(ids)
        logp = tuple(sampler_logp[i, :length].tolist())
        rollouts.append(Rollout(prompt, group, sibling, ids, logp, True))
    return rollouts


def make_objective(settings: dict, head: str = "recompute"):
    loss_config = LossConfig(**dict(advantage_eps=TRL_FLOOR) | settings)
    return resolve_objective(loss_config, ModelConfig(head=head))


def make_batches(world, objective, budget=10_000):
    """Pack the world: (batch, its tokens' places in the tables) for each micro-batch, and the
    step's total.
    """
    texts, first = deduplicate(world.rollouts)
    config = objective.config
    adv = compute_group_advantages(world.rewards, G, objective.advantage, config, world.parts)
    text_adv = adv[first]
    batches = []
    for batch in pack_rollouts(texts, budget):
        rows = torch.tensor(first)[batch.rollout]
        columns = []
        for index in batch.rollout.unique_consecutive():
            length = len(texts[index].ids)
            columns.append(torch.arange(length))
        places = (rows, torch.cat(columns))
        batch = replace(
            batch,
            weight=batch.weight.double(),
            sampler_logp=batch.sampler_logp.double(),
            advantages=text_adv[batch.rollout],
        )
        if world.off:
            batch = replace(batch, old_logp=world.old[places])
        if config.kl_coef:
            batch = replace(batch, ref_logp=world.ref[places])
        batches.append((batch, places))
    return batches, count_denominator(texts, objective.agg_mode, LIMIT)


def compute_ours(world, monkeypatch, settings, budget=10_000, total=None):
    """Compute (loss, d loss / d logp (R, T), d loss / d entropy (R, T), statistics) with the loop's
    line on the given log-probs.
    """
    logp = world.now.clone().requires_grad_()
    entropy = world.entropy.clone().requires_grad_()
    objective = make_objective(settings)
    batches, counted_total = make_batches(world, objective, budget)
    total = total or counted_total
    loss = 0.0
    stat_sums = defaultdict(float)
    for batch, places in batches:

        def look_up_logp(*_, places=places):
            return logp[places], entropy[places]

        monkeypatch.setattr(policy_loss, "compute_log_probs", look_up_logp)
        batch_loss, _, stats = compute_policy_loss(None, batch, total, 1.0, objective)
        loss = loss + batch_loss
        for name, value in stats.items():
            stat_sums[name] += value
    d_logp, d_entropy = torch.autograd.grad(loss, (logp, entropy), materialize_grads=True)
    return loss.detach(), d_logp, d_entropy, stat_sums


# --- TRL's side -----------------------------------------------------------------------------------

ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    process_index=0,
    num_processes=1,
    gather=lambda x: x,
    reduce=lambda x, **_: x,
    sync_gradients=True,
)
TRAINER_SETTINGS = dict(
    accelerator=ACCELERATOR,
    num_generations=G,
    max_completion_length=LIMIT,
    reward_weights=torch.ones(1),
    reward_func_names=[],
    reward_funcs=[None],
    _tokenizer=SimpleNamespace(pad_token_id=0),
    pad_to_multiple_of=None,
    environment_factories=None,
    environments=None,
    tools=[],
    mask_truncated_completions=False,
    multi_objective_aggregation="sum_then_normalize",
    scale_rewards="group",
    beta=0.0,
    log_multimodal=False,
    vllm_importance_sampling_correction=True,
    vllm_importance_sampling_mode="token_truncate",
    vllm_importance_sampling_clip_min=None,
    use_vllm=False,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    aux_loss_enabled=False,
    use_adaptive_entropy=False,
    _entropy_bonus_enabled=False,
    importance_sampling_level="token",
    epsilon_low=0.2,
    epsilon_high=0.2,
    normalize_advantages=False,
    reward_clip_range=None,
    args={},
)


def make_model(logp, entropy=None) -> SimpleNamespace:
    """Make what stands for a model: it gives these tables."""
    return SimpleNamespace(
        logp=logp, entropy=entropy, training=True, is_gradient_checkpointing=False
    )


def read_model(model, *_, **__):
    return model.logp, model.entropy, None


def make_trainer(world, trainer, parts, settings) -> SimpleNamespace:
    """Make the `self` that a trainer's methods read."""
    self = SimpleNamespace(**TRAINER_SETTINGS | settings)

    def generate(prompts):
        prompt_ids = [[1]] * len(world.ids)
        if trainer.__name__ == "RLOOTrainer":
            return prompt_ids, world.ids, world.ids
        sampler_logp = None
        if self.use_vllm:
            sampler_logp = [rollout.sampler_logp for rollout in world.rollouts]
        return prompt_ids, world.ids, None, world.ids, sampler_logp, {}, None, None

    args = dict(
        per_device_train_batch_size=0,
        steps_per_generation=parts,
        gradient_accumulation_steps=parts,
        gradient_checkpointing_kwargs=None,
        delta=None,
        use_bias_correction_kl=False,
    )
    self.args = SimpleNamespace(**args | self.args)
    self.current_gradient_accumulation_steps = parts
    self.num_iterations = 2 if world.off else 1
    self.model = make_model(world.old)
    self.ref_model = make_model(world.ref)
    self._get_per_token_logps_and_entropies = read_model
    self.get_off_policy_mask = getattr(trainer, "get_off_policy_mask", None)
    self._generate = generate
    rewards = world.rewards[:, None] if world.parts is None else world.parts.values
    self._calculate_rewards = lambda *_: rewards
    self._metrics = dict(train=defaultdict(list))
    self._pending_extra_logs = {}
    self._pending_metrics = {}
    self._logs = dict(prompt=[], completion=[], advantages=[], rewards={}, extra={})
    return self


def make_trl_inputs(world, trainer, parts=1, **settings):
    """Make the `self` of a trainer and its inputs: by its own code from the world's rewards and
    log-probs.
    """
    self = make_trainer(world, trainer, parts, settings)
    examples = [dict(prompt="")] * len(world.ids)
    return self, trainer._generate_and_score_completions(self, examples)


def compute_trl(world, trainer, parts=1, **settings):
    """Compute (loss, d loss / d logp, d loss / d entropy, metrics) with TRL.

    Identical siblings' gradients are summed into the first's row.
    """
    self, inputs = make_trl_inputs(world, trainer, parts, **settings)
    logp = world.now.clone().requires_grad_()
    entropy = world.entropy.clone().requires_grad_()
    loss = 0.0
    size = len(world.ids) // parts
    for start in range(0, parts * size, size):
        rows = slice(start, start + size)
        model = make_model(logp[rows], entropy[rows])
        some_inputs = dict(inputs)
        for name, value in inputs.items():
            if value.ndim > 0:
                some_inputs[name] = value[rows]
        loss = loss + trainer._compute_loss(self, model, some_inputs)

    d_logp, d_entropy = torch.autograd.grad(loss, (logp, entropy), materialize_grads=True)
    d_logp = torch.zeros_like(d_logp).index_add(0, world.elder, d_logp)
    d_entropy = torch.zeros_like(d_entropy).index_add(0, world.elder, d_entropy)
    return loss.detach(), d_logp, d_entropy, self._metrics["train"]


def check_equal(actual, want, rtol=EXACT):
    """Check each element to `rtol` of itself, or of a thousandth of the largest; a loss, which may
    cancel, of 1.
    """
    scale = 1.0
    if want.ndim > 0:
        largest = want.abs().max().item()
        assert largest > 0
        scale = 1e-3 * largest
    torch.testing.assert_close(actual, want, rtol=rtol, atol=rtol * scale)


@pytest.fixture(scope="module")
def trl():
    reason = "the package trl is not installed: no loss is compared with TRL's"
    pytest.importorskip("trl", reason=reason)
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    return SimpleNamespace(grpo=GRPOTrainer, rloo=RLOOTrainer)


# --- the tests with TRL ---------------------------------------------------------------------------


def check_clip_bites(ratio, adv, is_real, least: int):
    """Check that at least so many ratios are beyond the clip, on either side where it bites."""
    too_low = is_real & (ratio < 0.8) & (adv < 0)
    too_high = is_real & (ratio > 1.3) & (adv > 0)
    assert too_low.sum() >= least
    assert too_high.sum() >= least


def test_the_world_reaches_every_branch():
    """Tokens and whole sequences beyond the clip, on the sides where it bites; sampler's weights
    beyond the cap and not.
    """
    world = make_world()
    adv = compute_group_advantages(world.rewards, G, ADVANTAGES["mean"], LossConfig())
    adv = adv[:, None]
    log_ratio = world.now - world.old
    lengths = torch.tensor(LENGTHS)[:, None]
    mean_log_ratio = (log_ratio * world.mask).sum(1, keepdim=True) / lengths
    sampler_weight = (world.old - world.sampler).exp()
    over_cap = (sampler_weight > 1.1)[world.mask]

    check_clip_bites(log_ratio.exp(), adv, world.mask, 6)
    check_clip_bites(mean_log_ratio.exp(), adv, lengths > 0, 2)
    assert over_cap.sum() > 8
    assert over_cap.sum() < world.mask.sum() / 2
    distinct = world.elder.unique()
    assert len(distinct) == len(world.ids) - 1


@pytest.mark.parametrize("cap, kl", CAPS_AND_KLS)
@pytest.mark.parametrize("off", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_trl(name, off, cap, kl, trl, monkeypatch):
    """Off policy and on policy (old is None there: the log-probs themselves), from rewards to the
    gradient of every token.

    tis_cap is its token_truncate: exp(old - sampler) cut from above, on the gain and not on
    the KL.
    """
    settings, loss_type, trl_settings = CASES[name]
    world = make_world(off)

    our_settings = settings | dict(kl_coef=kl, tis_cap=cap)
    loss, d_logp, _, stats = compute_ours(world, monkeypatch, our_settings)
    want_loss, want_d_logp, _, metrics = compute_trl(
        world,
        trl.grpo,
        loss_type=loss_type,
        beta=kl,
        use_vllm=cap > 0,
        vllm_importance_sampling_clip_max=cap,
        **trl_settings,
    )

    check_equal(loss, want_loss)
    check_equal(d_logp, want_d_logp)
    if kl:
        # theirs is a float32 mean
        mean_kl = stats["kl"] / stats["trained"]
        assert mean_kl == pytest.approx(metrics["kl"][0], rel=1e-6)
    if settings["kind"] in ("grpo", "dr_grpo", "dapo"):
        clip_ratio = stats["clip_ratio"] / stats["trained"]
        want_clip_ratio = metrics["clip_ratio/region_mean"][0]
        assert clip_ratio == pytest.approx(want_clip_ratio, rel=1e-6)
        assert (stats["clip_ratio"] > 0) == off


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_trl_micro_batches(name, trl, monkeypatch):
    """Ours cut by tokens, theirs into halves of equal rollouts and unequal tokens: the step's
    gradient is one.
    """
    settings, loss_type, trl_settings = CASES[name]
    world = make_world()

    our_settings = settings | dict(kl_coef=KL_WEIGHT)
    loss, d_logp, *_ = compute_ours(world, monkeypatch, our_settings, budget=30)
    want_loss, want_d_logp, *_ = compute_trl(
        world, trl.grpo, parts=2, loss_type=loss_type, beta=KL_WEIGHT, **trl_settings
    )

    check_equal(loss, want_loss)
    check_equal(d_logp, want_d_logp)


@pytest.mark.parametrize("name", ["grpo token mean", "dapo", "gspo token mean", "cispo"])
def test_trl_entropy_bonus(name, trl, monkeypatch):
    """Theirs is always a mean over tokens; with another average ours follows the loss's own, so
    only the token mean is both's.
    """
    settings, loss_type, trl_settings = CASES[name]
    world = make_world()

    our_settings = settings | dict(entropy_coef=0.05)
    loss, d_logp, d_entropy, _ = compute_ours(world, monkeypatch, our_settings)
    want_loss, want_d_logp, want_d_entropy, _ = compute_trl(
        world,
        trl.grpo,
        loss_type=loss_type,
        _entropy_bonus_enabled=True,
        entropy_coef=0.05,
        **trl_settings,
    )

    check_equal(loss, want_loss)
    check_equal(d_logp, want_d_logp)
    check_equal(d_entropy, want_d_entropy)


def test_trl_reinforce_and_rloo(trl, monkeypatch):
    """On policy and without a bound TRL's cispo is -A logp, value and gradient; RLOO's gradient is
    A / R at each token.

    RLOO's value is that of a ratio of sequences, ours of A logp, and its total the rollouts, ours
    the tokens: no value, and our total is set.
    """
    world = make_world(off=False)

    our_settings = dict(kind="reinforce", kl_coef=KL_WEIGHT)
    loss, d_logp, *_ = compute_ours(world, monkeypatch, our_settings)
    unbounded = dict(loss_type="cispo", epsilon_high=torch.inf, scale_rewards="none")
    want_loss, want_d_logp, *_ = compute_trl(world, trl.grpo, beta=KL_WEIGHT, **unbounded)

    check_equal(loss, want_loss)
    check_equal(d_logp, want_d_logp)

    rollouts = len(world.ids)
    _, d_logp, *_ = compute_ours(world, monkeypatch, dict(kind="rloo"), total=rollouts)
    _, want_d_logp, *_ = compute_trl(world, trl.rloo)

    check_equal(d_logp, want_d_logp)


@pytest.mark.parametrize(
    "name, trl_settings",
    [
        ("mean_std", dict(scale_rewards="group")),
        ("mean", dict(scale_rewards="none")),
        ("leave_one_out", {}),
    ],
)
def test_trl_advantages(name, trl_settings, trl):
    world = make_world()
    trainer = trl.grpo if trl_settings else trl.rloo
    config = LossConfig(advantage_eps=TRL_FLOOR)

    adv = compute_group_advantages(world.rewards, G, ADVANTAGES[name], config)
    _, inputs = make_trl_inputs(world, trainer, **trl_settings)

    check_equal(adv, inputs["advantages"])


def test_trl_kl_in_reward(trl):
    """RLOO takes k1, summed over a rollout's tokens, off its reward. Theirs is of the trainer's
    log-probs, ours of the sampler's, in float32.
    """
    world = make_world(off=False)
    objective = resolve_objective(LossConfig(kind="rloo"), ModelConfig())
    [(batch, places)], _ = make_batches(world, objective)
    now = world.now[places].float()
    ref = world.ref[places].float()
    logged = replace(batch, sampler_logp=now, ref_logp=ref)
    texts = len(world.ids) - 1
    text_of = [0, 1, *range(1, texts)]

    kl = sum_kl_by_rollout([logged], texts, "k1")
    rewards = world.rewards - KL_WEIGHT * kl[text_of]
    adv = compute_group_advantages(rewards, G, ADVANTAGES["leave_one_out"], LossConfig())
    _, inputs = make_trl_inputs(world, trl.rloo, beta=KL_WEIGHT)

    torch.testing.assert_close(adv, inputs["advantages"], rtol=FLOAT32, atol=FLOAT32)


# --- Liger ----------------------------------------------------------------------------------------


class HiddenStates:
    """Give hidden states (M, C) and a head (V, C): what recr1/model/log_probs.py asks of a
    model.
    """

    root = staticmethod(nullcontext)
    backend = AttentionBackend()

    def __init__(self, hidden, head_weight):
        self.hidden = hidden
        self.head_weight = head_weight

    def __call__(self, tokens, positions, attention):
        return self.hidden


def draw_leaf(rows: int, generator) -> torch.Tensor:
    values = torch.randn(rows, C, generator=generator, dtype=torch.float64)
    return (0.5 * values).requires_grad_()


def fill_table(world, places, values) -> torch.Tensor:
    """Put packed integers (N,) into a table (R, T), with the rows of both identical siblings."""
    table = torch.zeros(world.now.shape, dtype=torch.int64)
    return table.index_put(places, values)[world.elder]


def make_liger_loss(loss_type, kl, trl_settings):
    reason = "the package liger-kernel is not installed: no loss is compared with Liger's"
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason=reason)
    settings = {key: value for key, value in trl_settings.items() if key != "scale_rewards"}
    return liger.LigerFusedLinearGRPOLoss(
        beta=kl,
        use_ref_model=kl > 0,
        compiled=False,
        loss_type=loss_type,
        temperature=TEMPERATURE,
        max_completion_length=LIMIT,
        chunk_size=5,
        **settings,
    )


def list_liger_cases() -> list[tuple[str, str]]:
    cases = []
    for name, (settings, *_) in CASES.items():
        cases.append((name, "recompute"))
        # gspo needs whole rollouts
        if settings["kind"] != "gspo":
            cases.append((name, "fused"))
    return cases


@pytest.mark.parametrize("cap, kl", CAPS_AND_KLS)
@pytest.mark.parametrize("name, head", list_liger_cases())
def test_liger(name, head, cap, kl):
    """Both heads against its chunked loss: value, d hidden (M, C) and d weight (V, C), relative to
    their norms. Its log-probs are float32.
    """
    settings, loss_type, trl_settings = CASES[name]
    liger_loss = make_liger_loss(loss_type, kl, trl_settings)
    objective = make_objective(settings | dict(kl_coef=kl, tis_cap=cap), head)
    world = make_world()
    [(batch, places)], total = make_batches(world, objective)
    generator = torch.Generator().manual_seed(1)
    hidden = draw_leaf(len(batch.tokens), generator)
    weight = draw_leaf(V, generator)
    row = fill_table(world, places, batch.predict_from)
    target = fill_table(world, places, batch.target)

    # the world again, with the log-probs that the hidden states give
    logits = hidden[row] @ weight.T / TEMPERATURE
    target_logp = logits.log_softmax(-1).gather(-1, target[..., None])
    world = make_world(logp=target_logp[..., 0].detach())
    [(batch, places)], _ = make_batches(world, objective)
    adv = compute_group_advantages(world.rewards, G, objective.advantage, objective.config)
    log_weight = world.old - world.sampler.double()
    sampler_weight = log_weight.exp().clamp(max=cap)

    policy = HiddenStates(hidden, weight)
    loss, logp, _ = compute_policy_loss(policy, batch, total, TEMPERATURE, objective)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    want_loss, _ = liger_loss(
        hidden[row],
        weight,
        target,
        world.mask.double(),
        adv,
        ref_per_token_logps=world.ref,
        old_per_token_logps=world.old,
        vllm_is_ratio=sampler_weight if cap else None,
    )
    want_gradients = torch.autograd.grad(want_loss, (hidden, weight))

    check_equal(logp, world.now[places])
    want_value = want_loss.item()
    # abs: terms of size 1 that cancel to a tenth
    assert loss.item() == pytest.approx(want_value, rel=FLOAT32, abs=1e-7)
    for gradient, want in zip(gradients, want_gradients, strict=True):
        difference = gradient - want
        assert want.norm() > 0
        assert difference.norm() <= FLOAT32 * want.norm()
