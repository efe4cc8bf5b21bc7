"""Losses against independent implementations: TRL's trainers from rewards to d loss / d logp
(float64), Liger's chunked loss from hidden states (float32 inside).

TRL's trainers run on a stand-in `self` that hands out given log-probs; its attributes are those
that the version in experiments/constraints.txt reads. Their side is padded and masked, ours packed;
two siblings write the same text, which is one weighted row here and two there. Only theirs (no kind
of ours): sapo, vespo, luspo, delta, sequence_* and *_mask importance weights, scale_rewards: batch,
KL times ratio. Legend: R rollouts, T longest completion, N trained tokens, M packed rows, C width,
V vocabulary.
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


def world(off=True, logp=None):
    """12 rollouts of 4 prompts and their (R, T) tables; off: the policy has moved since. `logp`:
    what it now gives them, or random.
    """
    g = torch.Generator().manual_seed(72)  # with it every clip bites: the test of the world
    ids = [tuple(torch.randint(V, (n,), generator=g).tolist()) for n in LENGTHS]
    ids[2] = ids[1]
    same = torch.tensor([0, 1, 1, *range(3, len(ids))])  # (R,) the first rollout with this text
    shape = (len(ids), max(LENGTHS))

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    now = -3 + normal(*shape)
    moved = 0.3 * normal(*shape) + 0.25 * normal(shape[0], 1)
    apart = normal(*shape)
    noise = normal(*shape)
    # `moved` has a term of whole sequences: GSPO's clip bites too
    now = (now if logp is None else logp)[same]
    old = now + off * moved[same]
    rewards = normal(shape[0])
    # one group of equal rewards, of which TRL's mean is exact too: 0
    rewards[2], rewards[6:9] = rewards[1], 0.5
    prompts = [Prompt(f"p{i}", i, "", tuple(range(3 + i))) for i in range(len(ids) // G)]
    sampler = (old + 0.15 * noise[same]).float()  # both sides read it as float32
    rollouts = [
        Rollout(prompts[i // G], i // G, i % G, t, tuple(sampler[i, : len(t)].tolist()), True)
        for i, t in enumerate(ids)
    ]
    return SimpleNamespace(
        off=off,
        ids=ids,
        rollouts=rollouts,
        same=same,
        now=now,
        old=old,
        ref=now + 0.2 * apart[same],
        sampler=sampler,
        rewards=rewards,
        entropy=normal(*shape).exp()[same],
        mask=torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None],
    )


def batches_of(w, o, budget=10_000):
    """(batch, its tokens' places in the tables) for each micro-batch, and the step's total."""
    (texts, first), made = deduplicate(w.rollouts), []
    adv = compute_group_advantages(w.rewards, G, o.advantage, o.config)[first]
    for b in pack_rollouts(texts, budget):
        at = (
            torch.tensor(first)[b.rollout],
            torch.cat([torch.arange(len(texts[r].ids)) for r in b.rollout.unique_consecutive()]),
        )
        made.append(
            (
                replace(
                    b,
                    weight=b.weight.double(),
                    sampler_logp=b.sampler_logp.double(),
                    advantages=adv[b.rollout],
                    old_logp=w.old[at] if w.off else None,
                    ref_logp=w.ref[at] if o.config.kl_coef else None,
                ),
                at,
            )
        )
    return made, count_denominator(texts, o.agg_mode, LIMIT)


def ours(w, monkeypatch, settings, budget=10_000, total=None):
    """(loss, d loss / d logp (R, T), d loss / d entropy (R, T), statistics) of the loop's line on
    the given log-probs.
    """
    o = resolve_objective(
        LossConfig(**dict(advantage_eps=TRL_FLOOR) | settings), ModelConfig(head="recompute")
    )
    logp = w.now.clone().requires_grad_()
    entropy = w.entropy.clone().requires_grad_()
    loss = 0.0
    sums = defaultdict(float)
    batches, own_total = batches_of(w, o, budget)
    for b, at in batches:
        monkeypatch.setattr(
            policy_loss, "compute_log_probs", lambda *_, at=at: (logp[at], entropy[at])
        )
        part, _, stats = compute_policy_loss(None, b, total or own_total, 1.0, o)
        loss = loss + part
        for name, value in stats.items():
            sums[name] += value
    return loss.detach(), *torch.autograd.grad(loss, (logp, entropy), materialize_grads=True), sums


def trainer_of(w, trainer, parts=1, **settings):
    """A trainer's inputs, made by its own code from the world's rewards and log-probs, and the
    `self` that it reads.
    """

    def table(x):  # stands for a model
        return SimpleNamespace(logp=x, entropy=None, training=True, is_gradient_checkpointing=False)

    base = dict(
        model=table(w.old),
        ref_model=table(w.ref),
        _get_per_token_logps_and_entropies=lambda m, *_, **__: (m.logp, m.entropy, None),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            process_index=0,
            num_processes=1,
            gather=lambda x: x,
            reduce=lambda x, **_: x,
            sync_gradients=True,
        ),
        args=SimpleNamespace(
            per_device_train_batch_size=0,
            steps_per_generation=parts,
            gradient_accumulation_steps=parts,
            gradient_checkpointing_kwargs=None,
            delta=None,
            use_bias_correction_kl=False,
        ),
        num_iterations=2 if w.off else 1,
        num_generations=G,
        current_gradient_accumulation_steps=parts,
        max_completion_length=LIMIT,
        _generate=lambda prompts: (
            ([[1]] * len(w.ids), w.ids, w.ids)
            if trainer.__name__ == "RLOOTrainer"
            else (
                [[1]] * len(w.ids),
                w.ids,
                None,
                w.ids,
                [r.sampler_logp for r in w.rollouts] if self.use_vllm else None,
                {},
                None,
                None,
            )
        ),
        _calculate_rewards=lambda *_: w.rewards[:, None],
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
        _metrics=dict(train=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
        _logs=dict(prompt=[], completion=[], advantages=[], rewards={}, extra={}),
        normalize_advantages=False,
        reward_clip_range=None,
    )
    self = SimpleNamespace(**base | settings)
    return self, trainer._generate_and_score_completions(self, [dict(prompt="")] * len(w.ids))


def theirs(w, trainer, parts=1, **settings):
    """(loss, d loss / d logp, d loss / d entropy, metrics) by TRL; identical siblings' gradients
    are summed into the first's row.
    """
    self, inputs = trainer_of(w, trainer, parts, **settings)
    logp = w.now.clone().requires_grad_()
    entropy = w.entropy.clone().requires_grad_()
    loss = 0.0
    size = len(w.ids) // parts
    for rows in (slice(i * size, (i + 1) * size) for i in range(parts)):
        part = {name: x[rows] if x.ndim else x for name, x in inputs.items()}
        loss = loss + trainer._compute_loss(
            self, SimpleNamespace(logp=logp[rows], entropy=entropy[rows]), part
        )
    gradients = torch.autograd.grad(loss, (logp, entropy), materialize_grads=True)
    return (
        loss.detach(),
        *(torch.zeros_like(d).index_add(0, w.same, d) for d in gradients),
        self._metrics["train"],
    )


def equal(a, b):
    """Each element to EXACT of itself, or of a thousandth of the largest; a loss, which may cancel,
    of 1.
    """
    assert b.ndim == 0 or b.abs().max() > 0
    torch.testing.assert_close(
        a, b, rtol=EXACT, atol=EXACT * (1e-3 * b.abs().max().item() if b.ndim else 1.0)
    )


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip(
        "trl", reason="the package trl is not installed: no loss is compared with TRL's"
    )
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    return SimpleNamespace(grpo=GRPOTrainer, rloo=RLOOTrainer)


SEQUENCE = dict(importance_sampling_level="sequence")
CASES = {  # ours, TRL's: (settings, loss_type, what else it is told)
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


def test_the_world_reaches_every_branch():
    """Tokens and whole sequences beyond the clip, on the sides where it bites; sampler's weights
    beyond the cap and not.
    """
    w = world()
    adv = compute_group_advantages(w.rewards, G, ADVANTAGES["mean"], LossConfig())[:, None]
    log_rho = w.now - w.old
    n = torch.tensor(LENGTHS)[:, None]
    for rho, real, least in (
        (log_rho.exp(), w.mask, 6),
        (((log_rho * w.mask).sum(1, keepdim=True) / n).exp(), n > 0, 2),
    ):
        assert (
            min((real & (rho < 0.8) & (adv < 0)).sum(), (real & (rho > 1.3) & (adv > 0)).sum())
            >= least
        )
    assert 8 < ((w.old - w.sampler).exp() > 1.1)[w.mask].sum() < w.mask.sum() / 2
    assert len(w.same.unique()) == len(w.ids) - 1


@pytest.mark.parametrize("cap, kl", [(0.0, 0.0), (0.0, KL_WEIGHT), (1.1, KL_WEIGHT)])
@pytest.mark.parametrize("off", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_trl(name, off, cap, kl, trl, monkeypatch):
    """Off policy and on policy (old is None there: the log-probs themselves), from rewards to the
    gradient of every token.

    tis_cap is its token_truncate: exp(old - sampler) cut from above, on the gain and not on
    the KL.
    """
    (settings, loss_type, told), w = CASES[name], world(off)
    loss, slope, _, stats = ours(w, monkeypatch, settings | dict(kl_coef=kl, tis_cap=cap))
    want, d_logp, _, metrics = theirs(
        w,
        trl.grpo,
        loss_type=loss_type,
        beta=kl,
        use_vllm=cap > 0,
        vllm_importance_sampling_clip_max=cap,
        **told,
    )
    equal(loss, want), equal(slope, d_logp)
    if kl:
        # theirs is a float32 mean
        assert stats["kl"] / stats["trained"] == pytest.approx(metrics["kl"][0], rel=1e-6)
    if settings["kind"] in ("grpo", "dr_grpo", "dapo"):
        assert stats["clip_ratio"] / stats["trained"] == pytest.approx(
            metrics["clip_ratio/region_mean"][0], rel=1e-6
        )
        assert (stats["clip_ratio"] > 0) == off


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_trl_micro_batches(name, trl, monkeypatch):
    """Ours cut by tokens, theirs into halves of equal rollouts and unequal tokens: the step's
    gradient is one.
    """
    (settings, loss_type, told), w = CASES[name], world()
    loss, slope, *_ = ours(w, monkeypatch, settings | dict(kl_coef=KL_WEIGHT), budget=30)
    want, d_logp, *_ = theirs(w, trl.grpo, parts=2, loss_type=loss_type, beta=KL_WEIGHT, **told)
    equal(loss, want), equal(slope, d_logp)


@pytest.mark.parametrize("name", ["grpo token mean", "dapo", "gspo token mean", "cispo"])
def test_trl_entropy_bonus(name, trl, monkeypatch):
    """Theirs is always a mean over tokens; with another average ours follows the loss's own, so
    only the token mean is both's.
    """
    (settings, loss_type, told), w = CASES[name], world()
    loss, slope, d_entropy, _ = ours(w, monkeypatch, settings | dict(entropy_coef=0.05))
    want, d_logp, theirs_entropy, _ = theirs(
        w, trl.grpo, loss_type=loss_type, _entropy_bonus_enabled=True, entropy_coef=0.05, **told
    )
    equal(loss, want), equal(slope, d_logp), equal(d_entropy, theirs_entropy)


def test_trl_reinforce_and_rloo(trl, monkeypatch):
    """On policy and without a bound TRL's cispo is -A logp, value and gradient; RLOO's gradient is
    A / R at each token.

    RLOO's value is that of a ratio of sequences, ours of A logp, and its total the rollouts, ours
    the tokens: no value, and our total is set.
    """
    w = world(off=False)
    loss, slope, *_ = ours(w, monkeypatch, dict(kind="reinforce", kl_coef=KL_WEIGHT))
    want, d_logp, *_ = theirs(
        w, trl.grpo, loss_type="cispo", epsilon_high=torch.inf, scale_rewards="none", beta=KL_WEIGHT
    )
    equal(loss, want), equal(slope, d_logp)
    equal(ours(w, monkeypatch, dict(kind="rloo"), total=len(w.ids))[1], theirs(w, trl.rloo)[1])


@pytest.mark.parametrize(
    "name, told",
    [
        ("mean_std", dict(scale_rewards="group")),
        ("mean", dict(scale_rewards="none")),
        ("leave_one_out", {}),
    ],
)
def test_trl_advantages(name, told, trl):
    w = world()
    _, inputs = trainer_of(w, trl.grpo if told else trl.rloo, **told)
    equal(
        compute_group_advantages(
            w.rewards, G, ADVANTAGES[name], LossConfig(advantage_eps=TRL_FLOOR)
        ),
        inputs["advantages"],
    )


def test_trl_kl_in_reward(trl):
    """RLOO takes k1, summed over a rollout's tokens, off its reward. Theirs is of the trainer's
    log-probs, ours of the sampler's, in float32.
    """
    w = world(off=False)
    _, inputs = trainer_of(w, trl.rloo, beta=KL_WEIGHT)
    [(b, at)], _ = batches_of(w, resolve_objective(LossConfig(kind="rloo"), ModelConfig()))
    kl = sum_kl_by_rollout(
        [replace(b, sampler_logp=w.now[at].float(), ref_logp=w.ref[at].float())],
        len(w.ids) - 1,
        "k1",
    )
    rewards = w.rewards - KL_WEIGHT * kl[[0, 1, *range(1, len(w.ids) - 1)]]
    torch.testing.assert_close(
        compute_group_advantages(rewards, G, ADVANTAGES["leave_one_out"], LossConfig()),
        inputs["advantages"],
        rtol=FLOAT32,
        atol=FLOAT32,
    )


@pytest.mark.parametrize("cap, kl", [(0.0, 0.0), (0.0, KL_WEIGHT), (1.1, KL_WEIGHT)])
@pytest.mark.parametrize(
    "name, head",
    [
        (name, head)
        for name, (settings, *_) in CASES.items()
        for head in ("recompute", "fused")
        # it needs whole rollouts
        if (settings["kind"], head) != ("gspo", "fused")
    ],
)
def test_liger(name, head, cap, kl):
    """Both heads against its chunked loss: value, d hidden (M, C) and d weight (V, C), relative to
    their norms. Its log-probs are float32.
    """
    liger = pytest.importorskip(
        "liger_kernel.chunked_loss",
        reason="the package liger-kernel is not installed: no loss is compared with Liger's",
    )
    settings, loss_type, told = CASES[name]
    o = resolve_objective(
        LossConfig(**dict(advantage_eps=TRL_FLOOR) | settings | dict(kl_coef=kl, tis_cap=cap)),
        ModelConfig(head=head),
    )
    w = world()
    [(b, at)], total = batches_of(w, o)
    g = torch.Generator().manual_seed(1)
    hidden, weight = (
        (0.5 * torch.randn(n, C, generator=g, dtype=torch.float64)).requires_grad_()
        for n in (len(b.tokens), V)
    )
    row, target = (
        torch.zeros(w.now.shape, dtype=torch.int64).index_put(at, x)[w.same]
        for x in (b.predict_from, b.target)
    )
    w = world(
        logp=(hidden[row] @ weight.T / TEMPERATURE)
        .log_softmax(-1)
        .gather(-1, target[..., None])[..., 0]
        .detach()
    )

    [(b, at)], _ = batches_of(w, o)

    class Policy:  # what recr1/model/log_probs.py asks of a model
        head_weight = weight
        root = staticmethod(nullcontext)
        backend = AttentionBackend()
        __call__ = staticmethod(lambda tokens, positions, attention: hidden)

    loss, logp, _ = compute_policy_loss(Policy(), b, total, TEMPERATURE, o)
    equal(logp, w.now[at])
    told = {key: value for key, value in told.items() if key != "scale_rewards"}
    chunked = liger.LigerFusedLinearGRPOLoss(
        beta=kl,
        use_ref_model=kl > 0,
        compiled=False,
        loss_type=loss_type,
        temperature=TEMPERATURE,
        max_completion_length=LIMIT,
        chunk_size=5,
        **told,
    )
    adv = compute_group_advantages(w.rewards, G, o.advantage, o.config)
    want, _ = chunked(
        hidden[row],
        weight,
        target,
        w.mask.double(),
        adv,
        ref_per_token_logps=w.ref,
        old_per_token_logps=w.old,
        vllm_is_ratio=(w.old - w.sampler.double()).exp().clamp(max=cap) if cap else None,
    )
    # abs: terms of size 1 that cancel to a tenth
    assert loss.item() == pytest.approx(want.item(), rel=FLOAT32, abs=1e-7)
    for a, b in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(want, (hidden, weight))
    ):
        assert b.norm() > 0
        assert (a - b).norm() <= FLOAT32 * b.norm()
