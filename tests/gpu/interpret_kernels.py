"""The Triton kernels against float64 in Triton's interpreter. Run by test_kernels.py in a process
of its own: TRITON_INTERPRET=1 must be set before anything imports Triton. Draws are fresh:
RECR1_SEED, printed on failure, repeats them.
"""

import os
from dataclasses import replace

import pytest
import torch
from helpers.tiny_world import tiny_model
from test_gradient import rollouts_of
from test_logprob import errors_in_bf16, full
from triton.runtime import interpreter

from recr1.config.schema import LossConfig, ModelConfig
from recr1.kernels import logprob
from recr1.kernels.group_loss import (
    ADVANTAGES,
    GroupTokenLoss,
    LossRule,
    compute_advantages,
    compute_group_loss,
)
from recr1.kernels.logprob import fused_linear_loss, linear_log_probs, make_token_loss
from recr1.model.log_probs import compute_log_probs, make_distribution
from recr1.rl.losses import resolve_objective
from recr1.rl.packing import pack_rollouts
from recr1.rl.policy_loss import compute_policy_loss

SEED = int(os.environ["RECR1_SEED"])
# the last one is two tiles and a tail
SIZES = [(1, 1, 2), (1, 7, 33), (37, 13, 101), (5, 8, 1001), (3, 4, 17_003)]


def draw(*key):
    return torch.Generator().manual_seed(hash((SEED, *key)) % 2**63)


def close(ours, exact, plain=None, terms=0.0):
    """Within 1e-5 of exact; or twice as far from it as `plain` (a float32 product over 17,003
    columns alone can take 2e-5, and ours adds them up in another order); or within 2e-6 of the
    `terms` that cancel in it.
    """
    error = (ours.double() - exact).norm()
    size = exact.norm()
    allowed = max(
        1e-5 * size, 0 if plain is None else 2 * (plain.double() - exact).norm(), 2e-6 * terms
    )
    assert ours.isfinite().all() and error <= allowed, (
        f"error {error:.2e} of {size:.2e}, seed {SEED}"
    )


@pytest.mark.parametrize("N, C, V", SIZES)
@pytest.mark.parametrize("temperature, size", [(1.0, 1.0), (0.7, 0.01), (1.3, 10.0)])
def test_head(N, C, V, temperature, size, monkeypatch):
    g = draw(N, V, size)
    # dyadic inputs: products and their sums are exact, so what is compared is the kernels
    hidden, weight = (
        (torch.randn(*shape, generator=g) * 16).round() / 16 for shape in ((N, C), (V, C))
    )
    hidden = (hidden * size).requires_grad_()
    weight = weight.requires_grad_()
    target = torch.randint(V, (N,), generator=g)
    grad_logp = torch.randn(N, generator=g)
    if N > 4:
        grad_logp[1] = 0
        for name in ("WORKSPACE_BYTES", "SLICE_BYTES"):
            monkeypatch.setitem(getattr(logprob, name), "cpu", N * V)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want, want_entropy = full(*exact, target, temperature)
    logp, entropy = linear_log_probs(
        hidden, weight, target, temperature, make_distribution, "triton"
    )
    formula = make_token_loss(lambda x, rows: (x * grad_logp[rows]).sum())
    loss, logp_again, entropy_again = fused_linear_loss(
        hidden, weight, target, temperature, make_distribution, formula, "triton"
    )
    assert torch.equal(logp, logp_again)
    assert torch.equal(entropy, entropy_again)
    close(logp, want, terms=(hidden @ weight.T).abs().max().item() / temperature)
    assert (entropy - want_entropy).abs().max() <= 1e-5 * max(1, want.abs().max())
    theirs = torch.autograd.grad(want, exact, grad_logp.double())
    plain = torch.autograd.grad(
        full(hidden, weight, target, temperature)[0], (hidden, weight), grad_logp
    )
    for ours in (
        torch.autograd.grad(logp, (hidden, weight), grad_logp),
        torch.autograd.grad(loss, (hidden, weight)),
    ):
        for a, b, c, other in zip(ours, theirs, plain, (weight, hidden)):
            close(a, b, c, (grad_logp.norm() * other.abs().max()).item())


@pytest.mark.parametrize("N, C, V", SIZES)
def test_entropy_has_its_gradient(N, C, V):
    g = draw("entropy", N, V)
    hidden, weight = (
        torch.randn(*shape, generator=g).requires_grad_() for shape in ((N, C), (V, C))
    )
    target = torch.randint(V, (N,), generator=g)
    grad_logp = torch.randn(N, generator=g)
    grad_entropy = torch.randn(N, generator=g)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    parts = full(*exact, target, 0.7)
    theirs = torch.autograd.grad(
        sum((x * y).sum() for x, y in zip(parts, (grad_logp.double(), grad_entropy.double()))),
        exact,
    )
    logp, entropy = linear_log_probs(hidden, weight, target, 0.7, make_distribution, "triton")
    shot, _, _ = fused_linear_loss(
        hidden,
        weight,
        target,
        0.7,
        make_distribution,
        lambda x, e, rows: (
            (x * grad_logp[rows]).sum() + (e * grad_entropy[rows]).sum(),
            grad_logp[rows],
            grad_entropy[rows],
        ),
        "triton",
    )
    for loss in ((logp * grad_logp).sum() + (entropy * grad_entropy).sum(), shot):
        for a, b, other in zip(
            torch.autograd.grad(loss, (hidden, weight)), theirs, (weight, hidden)
        ):
            close(
                a,
                b,
                terms=10
                * (
                    (grad_logp.norm() + grad_entropy.norm() * (1 + parts[1].max()))
                    * other.abs().max()
                ).item(),
            )


def test_fused_of_a_plain_sum():
    hidden = torch.randn(3, 5, generator=draw("h")).requires_grad_()
    weight = torch.randn(7, 5, generator=draw("w"))
    target = torch.tensor([0, 6, 3])
    ours, theirs = (
        fused_linear_loss(
            hidden,
            weight,
            target,
            1.0,
            make_distribution,
            make_token_loss(lambda logp, rows: -logp.sum()),
            b,
        )[0]
        for b in ("triton", "torch")
    )
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (ours, theirs)))


@pytest.mark.parametrize(
    "loss",
    [
        dict(),
        dict(kind="dr_grpo", kl_coef=0.1, clip_ratio_low=0.1, clip_ratio_high=0.3),
        dict(kind="cispo", tis_cap=1.1),
        dict(kind="grpo", entropy_coef=0.1),
        dict(kind="gspo"),
    ],
    ids=str,
)
def test_policy_loss_of_the_loop(loss):
    """Compare kernels: triton with kernels: torch on a packed batch.

    The loss is fused where kernels/group_loss.py has it, else it is torch's over Triton's head.
    """
    policy_ = tiny_model(1)
    o = [
        resolve_objective(
            LossConfig(**loss),
            ModelConfig(head="recompute" if loss.get("kind") == "gspo" else "fused", kernels=k),
        )
        for k in ("triton", "torch")
    ]
    assert o[0].fused == (loss.get("kind") != "gspo" and "entropy" not in loss)
    assert not o[1].fused
    [batch] = pack_rollouts(rollouts_of(3), 10_000)
    n = len(batch.target)
    g = draw("loop", str(loss))
    near = compute_log_probs(policy_, batch, 1.3)[0].detach()
    batch = replace(
        batch,
        advantages=torch.randn(n, generator=g),
        weight=torch.randint(1, 3, (n,), generator=g).float(),
        **{
            name: near + 0.3 * torch.randn(n, generator=g)
            for name in ("old_logp", "ref_logp", "sampler_logp")
        },
    )
    (a, x, s), (b, y, t) = (compute_policy_loss(policy_, batch, 7, 1.3, each) for each in o)
    torch.testing.assert_close((a, x), (b, y), rtol=1e-4, atol=1e-5)
    assert s == pytest.approx(t, rel=1e-3, abs=1e-3)
    for p, q in zip(*(torch.autograd.grad(value, list(policy_.parameters())) for value in (a, b))):
        assert (p - q).norm() <= 1e-4 * q.norm() + 1e-6


def test_head_with_huge_logits():
    hidden = torch.full((3, 1), 1e4)
    weight = torch.linspace(-1, 1, 33)[:, None]
    logp, entropy = linear_log_probs(
        hidden.requires_grad_(), weight, torch.tensor([32, 0, 5]), 1.0, make_distribution, "triton"
    )
    logp.sum().backward()
    assert logp[0] == 0
    assert (logp[1:] < -1e4).all()
    assert (entropy.abs() < 1e-3).all()
    assert hidden.grad.isfinite().all()


def test_bfloat16_is_as_good_as_torchs_own(monkeypatch):
    # Triton 3.7's interpreter cuts float32 off to bfloat16; the GPU's cvt.rn, which
    # compile_kernels.py counts, rounds to nearest
    def convert(data, source, to, rounding, cut=interpreter._convert_float):
        if (source.name, to.name) != ("fp32", "bf16"):
            return cut(data, source, to, rounding)
        return torch.tensor(data).to(torch.bfloat16).view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    means = errors_in_bf16("triton")
    assert max(means.values()) <= 1.25, means


def exact_advantages(rewards, kind, floor):
    """float64, written from the formulas of kernels/group_loss.py's head."""
    r = rewards.double()
    G = rewards.shape[1]
    a = r - r.mean(1, keepdim=True)
    if kind == "std" and G > 1:
        a = a / (r.std(1, keepdim=True) + floor)
    if kind == "leave_one_out" and G > 1:
        a = r - (r.sum(1, keepdim=True) - r) / (G - 1)
    return torch.where((r == r[:, :1]).all(1, keepdim=True), 0.0, a).flatten()


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("P, G", [(1, 1), (3, 2), (5, 12), (2, 16), (0, 4)])
def test_advantages(P, G, kind):
    rewards = torch.rand(P, G, generator=draw(P, G))
    rewards[:1] = 0.1  # all equal, and no power of two: its mean is not exactly it
    ours = compute_advantages(rewards, LossRule(kind, advantage_eps=1e-4))
    close(ours, exact_advantages(rewards, kind, 1e-4))
    assert (ours[:G] == 0).all()


def exact_loss(logp, p: GroupTokenLoss):
    """float64, in autograd, from the formulas of kernels/group_loss.py's head; and the sums."""
    rule = p.rule
    rewards = p.rewards
    sampler, old, ref, weight = (
        x if x is None else x.double() for x in (p.sampler_logp, p.old_logp, p.ref_logp, p.weight)
    )
    old = logp.detach() if old is None else old
    adv = exact_advantages(rewards, rule.advantage, rule.advantage_eps)
    adv = torch.where(p.rollout >= 0, adv[p.rollout], 0.0)
    ratio = (logp - old).exp()
    clipped = ratio.clamp(1 - rule.clip_ratio_low, 1 + rule.clip_ratio_high)
    gain = (
        clipped.detach() * adv * logp if rule.cispo else torch.minimum(ratio * adv, clipped * adv)
    )
    outside = clipped != ratio if rule.cispo else clipped * adv < ratio * adv
    if rule.sampler_cap:
        gain = gain * (old - sampler).exp().clamp(max=rule.sampler_cap)
    k3 = torch.zeros_like(logp) if ref is None else torch.expm1(ref - logp) - (ref - logp)
    loss = (weight * (rule.kl_coef * k3 - gain)).sum() / p.denominator
    [slope] = torch.autograd.grad(loss, logp, retain_graph=True)
    return loss, [
        x.item()
        for x in (
            loss,
            (weight * outside).sum(),
            (weight * k3).sum(),
            weight.sum(),
            (weight * (logp - sampler).abs()).sum(),
            slope.square().sum(),
        )
    ]


def tokens(N, key, gap=0.2, P=4, G=5):
    """rewards with an all-equal group, a group without tokens (the last), tokens of no rollout,
    weights with 0; log-probs `gap` apart.
    """
    g = draw(N, *key)

    def near(x, by):
        return x + by * torch.randn(N, generator=g)

    rewards = torch.rand(P, G, generator=g)
    rewards[0] = 0.1
    rollout = torch.randint((P - 1) * G, (N,), generator=g)
    weight = torch.randint(0, 4, (N,), generator=g).float()
    if N > 3:
        rollout[2], weight[2] = -1, 0
    logp = -3 + torch.randn(N, generator=g)
    old = near(logp, gap)
    ref = near(logp, gap)
    return logp, dict(
        rewards=rewards,
        rollout=rollout,
        weight=weight,
        sampler_logp=near(old, 0.1),
        old_logp=old,
        ref_logp=ref,
        denominator=float(max(N, 1) + 3),
    )


def off_the_edge(logp, old, rule):
    """Where the ratio is so near a clip bound that float32 and float64 may fall on two sides, it
    becomes 1.
    """
    ratio = (logp.double() - old.double()).exp()
    near = ((ratio - 1 + rule.clip_ratio_low).abs() < 1e-4) | (
        (ratio - 1 - rule.clip_ratio_high).abs() < 1e-4
    )
    return torch.where(near, logp.detach().to(old.dtype), old)


RULES = [
    LossRule(kind, 1e-4, low, high, kl, cispo, cap)
    for kind, (low, high), kl, cispo, cap in [
        ("std", (0.2, 0.2), 0.0, False, 0.0),
        ("std", (0.2, 0.28), 0.04, False, 0.0),
        ("mean", (0.1, 0.3), 0.1, False, 1.1),
        ("leave_one_out", (0.2, 0.2), 0.0, False, 2.0),
        ("std", (1.0, 0.5), 0.0, True, 0.0),
        ("mean", (0.3, 0.2), 0.1, True, 1.05),
    ]
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("gap", [1e-5, 0.2, 5.0])
@pytest.mark.parametrize("N", [1, 17, 1023, 1024, 2500])
def test_group_loss(N, gap, rule):
    for first_step in (False, True):
        logp, given = tokens(N, (gap,), gap)
        given["old_logp"] = None if first_step else off_the_edge(logp, given["old_logp"], rule)
        p = GroupTokenLoss(rule, **given)
        x = logp.clone().requires_grad_()
        y = logp.double().requires_grad_()
        loss = compute_group_loss(x, p)
        want, sums = exact_loss(y, p)
        ratio = 1 if first_step else (logp - given["old_logp"]).exp()
        # an advantage is a difference of rewards of size 1, in float32
        close(
            torch.autograd.grad(loss * 3, x)[0],
            torch.autograd.grad(want * 3, y)[0],
            terms=10 * (p.weight * ratio).norm().item() / p.denominator,
        )
        # a loss is a difference of gains: its error is small beside them, not beside itself
        scale = (p.weight * (0.1 + p.advantages[p.rollout].abs())).sum().item() / p.denominator * (
            1 + (sums[2] + 5) * (gap > 1)
        ) + sums[2]
        assert abs(loss.item() - want.item()) <= 1e-5 * scale
        for name, ours, theirs in zip(p.named_sums(), p.named_sums().values(), sums):
            assert name == "loss" or ours == pytest.approx(theirs, rel=1e-5, abs=1e-6 * gap * N), (
                name
            )


def test_huge_gaps_end_in_no_nan_for_tokens_that_do_not_count():
    logp, given = tokens(8, ("huge",))
    given["old_logp"] = logp - 200  # e^200 is infinite in float32
    given["weight"][:4], given["rollout"][4:] = 0, 0  # group 0 has no advantage
    x = logp.clone().requires_grad_()
    compute_group_loss(x, GroupTokenLoss(LossRule(), **given)).backward()
    assert (x.grad == 0).all()


def test_clip_takes_the_gradient_exactly():
    """Advantages +1, -1 from rewards 1, -1 (mean only); ratios 1.5 and 0.5 on each: only (+, 1.5)
    and (-, 0.5) are clipped.
    """
    old = torch.zeros(4)
    logp = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    p = GroupTokenLoss(
        LossRule("mean"),
        torch.tensor([[1.0, -1.0]]),
        torch.tensor([0, 0, 1, 1]),
        torch.ones(4),
        old,
        4.0,
        old,
    )
    compute_group_loss(logp, p).backward()
    assert logp.grad[0] == 0
    assert logp.grad[3] == 0
    assert p.named_sums()["clipped"] == 2
    torch.testing.assert_close(logp.grad[1:3], torch.tensor([-0.5 / 4, 1.5 / 4]))


def test_empty_batch():
    logp, given = tokens(0, ())
    x = logp.requires_grad_()
    loss = compute_group_loss(x, GroupTokenLoss(LossRule(), **given))
    loss.backward()
    assert loss == 0
    assert x.grad.shape == (0,)


@pytest.mark.parametrize(
    "rule, dtype", [(r, torch.float32) for r in RULES] + [(RULES[1], torch.bfloat16)], ids=str
)
def test_joined(rule, dtype, monkeypatch):
    """Rewards and hidden states in, gradients out, in chunks of 4 rows: as the separate kernels,
    and as float64 all through.
    """
    N = 37
    C = 13
    V = 101
    temperature = 0.7
    monkeypatch.setitem(logprob.WORKSPACE_BYTES, "cpu", 2048)
    g = draw("joined")
    hidden, weight = (
        torch.randn(*shape, generator=g).to(dtype).requires_grad_() for shape in ((N, C), (V, C))
    )
    target = torch.randint(V, (N,), generator=g)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want_logp = full(*exact, target, temperature)[0]
    _, given = tokens(N, ("joined",))
    shift = want_logp.detach().float() - given["old_logp"]
    given |= {name: given[name] + shift for name in ("old_logp", "ref_logp", "sampler_logp")}
    given["old_logp"] = off_the_edge(
        want_logp, given["old_logp"] + 0.2 * torch.randn(N, generator=g), rule
    )
    p = GroupTokenLoss(rule, **given)
    apart = GroupTokenLoss(rule, **given)
    loss, logp, entropy = fused_linear_loss(
        hidden, weight, target, temperature, make_distribution, p, "triton"
    )
    ours = torch.autograd.grad(loss, (hidden, weight))
    separate, logp_, entropy_ = fused_linear_loss(
        hidden,
        weight,
        target,
        temperature,
        make_distribution,
        lambda x, e, rows: apart(x, e, rows),
        "triton",
    )
    torch.testing.assert_close(
        (loss, logp, entropy, *ours),
        (separate, logp_, entropy_, *torch.autograd.grad(separate, (hidden, weight))),
    )
    assert p.named_sums() == pytest.approx(apart.named_sums(), rel=1e-5, abs=1e-6)
    if dtype == torch.float32:  # in bfloat16 a token may fall on the other side of the clip
        want, _ = exact_loss(want_logp, p)
        for a, b in zip((logp, *ours), (want_logp, *torch.autograd.grad(want, exact))):
            close(a, b)
