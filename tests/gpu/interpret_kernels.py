"""Compare the Triton kernels with float64 in Triton's interpreter.

Run by test_kernels.py in a process of its own: TRITON_INTERPRET=1 must be set before anything
imports Triton. Draws are fresh: RECR1_SEED, printed on failure, repeats them.
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
    STATISTICS,
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


TEMPERATURES_AND_SIZES = [(1.0, 1.0), (0.7, 0.01), (1.3, 10.0)]
LOOP_LOSSES = [
    dict(),
    dict(kind="dr_grpo", kl_coef=0.1, clip_ratio_low=0.1, clip_ratio_high=0.3),
    dict(kind="cispo", tis_cap=1.1),
    dict(kind="grpo", entropy_coef=0.1),
    dict(kind="gspo"),
]
# advantage, advantage_eps, clip_ratio_low, clip_ratio_high, kl_coef, cispo, sampler_cap
RULES = [
    LossRule("std", 1e-4, 0.2, 0.2, 0.0, False, 0.0),
    LossRule("std", 1e-4, 0.2, 0.28, 0.04, False, 0.0),
    LossRule("mean", 1e-4, 0.1, 0.3, 0.1, False, 1.1),
    LossRule("leave_one_out", 1e-4, 0.2, 0.2, 0.0, False, 2.0),
    LossRule("std", 1e-4, 1.0, 0.5, 0.0, True, 0.0),
    LossRule("mean", 1e-4, 0.3, 0.2, 0.1, True, 1.05),
]
RULES_AND_DTYPES = [(rule, torch.float32) for rule in RULES] + [(RULES[1], torch.bfloat16)]


def name_sums(group_loss):
    """Return all sums so far of a GroupTokenLoss, by their names."""
    return dict(zip(STATISTICS, group_loss.sums.tolist()))


def draw(*key):
    """Make a generator of the key's own."""
    key_hash = hash((SEED, *key))
    return torch.Generator().manual_seed(key_hash % 2**63)


def check_close(ours, exact, plain=None, terms=0.0):
    """Check that ours is within 1e-5 of exact; or twice as far from it as `plain` (a float32
    product over 17,003 columns alone can take 2e-5, and ours adds them up in another order); or
    within 2e-6 of the `terms` that cancel in it.
    """
    error = (ours.double() - exact).norm()
    size = exact.norm()
    plain_error = 0
    if plain is not None:
        plain_error = (plain.double() - exact).norm()
    allowed = max(1e-5 * size, 2 * plain_error, 2e-6 * terms)

    assert ours.isfinite().all(), f"seed {SEED}"
    assert error <= allowed, f"error {error:.2e} of {size:.2e}, seed {SEED}"


def copy_to_float64(tensor):
    """Make a leaf of the same numbers in float64."""
    return tensor.detach().double().requires_grad_()


@pytest.mark.parametrize("N, C, V", SIZES)
@pytest.mark.parametrize("temperature, size", TEMPERATURES_AND_SIZES)
def test_head(N, C, V, temperature, size, monkeypatch):
    generator = draw(N, V, size)
    # dyadic inputs: products and their sums are exact, so what is compared is the kernels
    hidden = (torch.randn(N, C, generator=generator) * 16).round() / 16
    weight = (torch.randn(V, C, generator=generator) * 16).round() / 16
    hidden = (hidden * size).requires_grad_()
    weight = weight.requires_grad_()
    target = torch.randint(V, (N,), generator=generator)
    grad_logp = torch.randn(N, generator=generator)
    if N > 4:
        grad_logp[1] = 0
        monkeypatch.setitem(logprob.WORKSPACE_BYTES, "cpu", N * V)
        monkeypatch.setitem(logprob.SLICE_BYTES, "cpu", N * V)
    exact = (copy_to_float64(hidden), copy_to_float64(weight))
    formula = make_token_loss(lambda logp, rows: (logp * grad_logp[rows]).sum())

    exact_logp, exact_entropy = full(*exact, target, temperature)
    plain_logp, _ = full(hidden, weight, target, temperature)
    logp, entropy = linear_log_probs(
        hidden, weight, target, temperature, make_distribution, "triton"
    )
    loss, fused_logp, fused_entropy = fused_linear_loss(
        hidden, weight, target, temperature, make_distribution, formula, "triton"
    )

    assert torch.equal(logp, fused_logp)
    assert torch.equal(entropy, fused_entropy)
    largest_logit = (hidden @ weight.T).abs().max().item() / temperature
    check_close(logp, exact_logp, terms=largest_logit)
    entropy_error = (entropy - exact_entropy).abs().max()
    assert entropy_error <= 1e-5 * max(1, exact_logp.abs().max())
    inputs = (hidden, weight)
    exact_grads = torch.autograd.grad(exact_logp, exact, grad_logp.double())
    plain_grads = torch.autograd.grad(plain_logp, inputs, grad_logp)
    grads = torch.autograd.grad(logp, inputs, grad_logp)
    fused_grads = torch.autograd.grad(loss, inputs)
    for ours in (grads, fused_grads):
        hidden_terms = (grad_logp.norm() * weight.abs().max()).item()
        weight_terms = (grad_logp.norm() * hidden.abs().max()).item()
        check_close(ours[0], exact_grads[0], plain_grads[0], hidden_terms)
        check_close(ours[1], exact_grads[1], plain_grads[1], weight_terms)


@pytest.mark.parametrize("N, C, V", SIZES)
def test_entropy_has_its_gradient(N, C, V):
    generator = draw("entropy", N, V)
    hidden = torch.randn(N, C, generator=generator).requires_grad_()
    weight = torch.randn(V, C, generator=generator).requires_grad_()
    target = torch.randint(V, (N,), generator=generator)
    grad_logp = torch.randn(N, generator=generator)
    grad_entropy = torch.randn(N, generator=generator)
    exact = (copy_to_float64(hidden), copy_to_float64(weight))

    def weigh(logp, entropy, rows):
        loss = (logp * grad_logp[rows]).sum() + (entropy * grad_entropy[rows]).sum()
        return loss, grad_logp[rows], grad_entropy[rows]

    exact_logp, exact_entropy = full(*exact, target, 0.7)
    exact_logp_loss = (exact_logp * grad_logp.double()).sum()
    exact_entropy_loss = (exact_entropy * grad_entropy.double()).sum()
    exact_grads = torch.autograd.grad(exact_logp_loss + exact_entropy_loss, exact)
    logp, entropy = linear_log_probs(hidden, weight, target, 0.7, make_distribution, "triton")
    loss = (logp * grad_logp).sum() + (entropy * grad_entropy).sum()
    fused_loss, _, _ = fused_linear_loss(
        hidden, weight, target, 0.7, make_distribution, weigh, "triton"
    )

    largest_entropy = exact_entropy.max()
    grad_size = grad_logp.norm() + grad_entropy.norm() * (1 + largest_entropy)
    hidden_terms = 10 * (grad_size * weight.abs().max()).item()
    weight_terms = 10 * (grad_size * hidden.abs().max()).item()
    for our_loss in (loss, fused_loss):
        hidden_grad, weight_grad = torch.autograd.grad(our_loss, (hidden, weight))
        check_close(hidden_grad, exact_grads[0], terms=hidden_terms)
        check_close(weight_grad, exact_grads[1], terms=weight_terms)


def test_fused_of_a_plain_sum():
    hidden = torch.randn(3, 5, generator=draw("h")).requires_grad_()
    weight = torch.randn(7, 5, generator=draw("w"))
    target = torch.tensor([0, 6, 3])
    formula = make_token_loss(lambda logp, rows: -logp.sum())

    loss, _, _ = fused_linear_loss(
        hidden, weight, target, 1.0, make_distribution, formula, "triton"
    )
    torch_loss, _, _ = fused_linear_loss(
        hidden, weight, target, 1.0, make_distribution, formula, "torch"
    )

    [grad] = torch.autograd.grad(loss, hidden)
    [torch_grad] = torch.autograd.grad(torch_loss, hidden)
    torch.testing.assert_close(grad, torch_grad)


@pytest.mark.parametrize("loss", LOOP_LOSSES, ids=str)
def test_policy_loss_of_the_loop(loss):
    """Compare kernels: triton with kernels: torch on a packed batch.

    The loss runs in kernels/group_loss.py where it has it, else it is torch's over Triton's head.
    """
    policy = tiny_model(1)
    is_gspo = loss.get("kind") == "gspo"
    head = "recompute" if is_gspo else "fused"
    cfg = LossConfig(**loss)
    objective = resolve_objective(cfg, ModelConfig(head=head, kernels="triton"))
    torch_objective = resolve_objective(cfg, ModelConfig(head=head, kernels="torch"))
    batch = draw_batch(policy, str(loss))

    value, logp, stats = compute_policy_loss(policy, batch, 7, 1.3, objective)
    torch_value, torch_logp, torch_stats = compute_policy_loss(
        policy, batch, 7, 1.3, torch_objective
    )

    has_kernel = not is_gspo and "entropy_coef" not in loss
    assert objective.runs_in_kernel == has_kernel
    assert not torch_objective.runs_in_kernel
    torch.testing.assert_close((value, logp), (torch_value, torch_logp), rtol=1e-4, atol=1e-5)
    assert stats == pytest.approx(torch_stats, rel=1e-3, abs=1e-3)
    weights = list(policy.parameters())
    grads = torch.autograd.grad(value, weights)
    torch_grads = torch.autograd.grad(torch_value, weights)
    for grad, torch_grad in zip(grads, torch_grads):
        assert (grad - torch_grad).norm() <= 1e-4 * torch_grad.norm() + 1e-6


def draw_batch(policy, key):
    """Pack five groups of three; advantages, weights and log-probs near the policy's are random."""
    [batch] = pack_rollouts(rollouts_of(3), 10_000)
    N = len(batch.target)
    generator = draw("loop", key)
    logp = compute_log_probs(policy, batch, 1.3)[0].detach()
    return replace(
        batch,
        advantages=torch.randn(N, generator=generator),
        weight=torch.randint(1, 3, (N,), generator=generator).float(),
        old_logp=logp + 0.3 * torch.randn(N, generator=generator),
        ref_logp=logp + 0.3 * torch.randn(N, generator=generator),
        sampler_logp=logp + 0.3 * torch.randn(N, generator=generator),
    )


def test_head_with_huge_logits():
    hidden = torch.full((3, 1), 1e4).requires_grad_()
    weight = torch.linspace(-1, 1, 33)[:, None]
    target = torch.tensor([32, 0, 5])

    logp, entropy = linear_log_probs(hidden, weight, target, 1.0, make_distribution, "triton")
    logp.sum().backward()

    assert logp[0] == 0
    assert (logp[1:] < -1e4).all()
    assert (entropy.abs() < 1e-3).all()
    assert hidden.grad.isfinite().all()


def test_bfloat16_is_as_good_as_torchs_own(monkeypatch):
    # Triton 3.7's interpreter cuts float32 off to bfloat16; the GPU's cvt.rn, which
    # compile_kernels.py counts, rounds to nearest
    convert_float = interpreter._convert_float

    def convert(data, source, to, rounding):
        if (source.name, to.name) != ("fp32", "bf16"):
            return convert_float(data, source, to, rounding)
        rounded = torch.tensor(data).to(torch.bfloat16)
        return rounded.view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    means = errors_in_bf16("triton")
    assert max(means.values()) <= 1.25, means


def compute_exact_advantages(rewards, kind, floor):
    """Compute in float64, from the formulas of kernels/group_loss.py's head."""
    exact_rewards = rewards.double()
    G = rewards.shape[1]
    total = exact_rewards.sum(1, keepdim=True)
    advantages = exact_rewards - exact_rewards.mean(1, keepdim=True)
    if kind == "std" and G > 1:
        advantages = advantages / (exact_rewards.std(1, keepdim=True) + floor)
    if kind == "leave_one_out" and G > 1:
        mean_of_others = (total - exact_rewards) / (G - 1)
        advantages = exact_rewards - mean_of_others
    all_equal = (exact_rewards == exact_rewards[:, :1]).all(1, keepdim=True)
    return torch.where(all_equal, 0.0, advantages).flatten()


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("P, G", [(1, 1), (3, 2), (5, 12), (2, 16), (0, 4)])
def test_advantages(P, G, kind):
    rewards = torch.rand(P, G, generator=draw(P, G))
    rewards[:1] = 0.1  # all equal, and no power of two: its mean is not exactly it
    rule = LossRule(kind, advantage_eps=1e-4)

    ours = compute_advantages(rewards, rule)

    exact = compute_exact_advantages(rewards, kind, 1e-4)
    check_close(ours, exact)
    assert (ours[:G] == 0).all()


def compute_exact_loss(logp, group_loss: GroupTokenLoss):
    """Compute in float64, in autograd, from the formulas of kernels/group_loss.py's head: the loss,
    and the sums.
    """
    rule = group_loss.rule
    weight = group_loss.weight.double()
    sampler = group_loss.sampler_logp.double()
    old = logp.detach()
    if group_loss.old_logp is not None:
        old = group_loss.old_logp.double()
    group_advantages = compute_exact_advantages(
        group_loss.rewards, rule.advantage, rule.advantage_eps
    )
    rollout = group_loss.rollout
    advantages = torch.where(rollout >= 0, group_advantages[rollout], 0.0)

    ratio = (logp - old).exp()
    clipped = ratio.clamp(1 - rule.clip_ratio_low, 1 + rule.clip_ratio_high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    outside = clipped * advantages < ratio * advantages
    if rule.cispo:
        gain = clipped.detach() * advantages * logp
        outside = clipped != ratio
    if rule.sampler_cap:
        sampler_ratio = (old - sampler).exp()
        gain = gain * sampler_ratio.clamp(max=rule.sampler_cap)
    k3 = torch.zeros_like(logp)
    if group_loss.ref_logp is not None:
        gap = group_loss.ref_logp.double() - logp
        k3 = torch.expm1(gap) - gap
    loss = (weight * (rule.kl_coef * k3 - gain)).sum() / group_loss.denominator
    [slope] = torch.autograd.grad(loss, logp, retain_graph=True)
    sums = [
        loss.item(),
        (weight * outside).sum().item(),
        (weight * k3).sum().item(),
        weight.sum().item(),
        (weight * (logp - sampler).abs()).sum().item(),
        slope.square().sum().item(),
    ]
    return loss, sums


def draw_tokens(N, key, gap=0.2, P=4, G=5):
    """Draw log-probs (N,) and GroupTokenLoss's arguments: rewards with an all-equal group, a group
    without tokens (the last), tokens of no rollout, weights with 0; log-probs `gap` apart.
    """
    generator = draw(N, *key)
    rewards = torch.rand(P, G, generator=generator)
    rewards[0] = 0.1
    rollout = torch.randint((P - 1) * G, (N,), generator=generator)
    weight = torch.randint(0, 4, (N,), generator=generator).float()
    if N > 3:
        rollout[2] = -1
        weight[2] = 0
    logp = -3 + torch.randn(N, generator=generator)
    old_logp = logp + gap * torch.randn(N, generator=generator)
    ref_logp = logp + gap * torch.randn(N, generator=generator)
    sampler_logp = old_logp + 0.1 * torch.randn(N, generator=generator)
    arguments = dict(
        rewards=rewards,
        rollout=rollout,
        weight=weight,
        sampler_logp=sampler_logp,
        old_logp=old_logp,
        ref_logp=ref_logp,
        denominator=float(max(N, 1) + 3),
    )
    return logp, arguments


def move_off_the_edge(logp, old, rule):
    """Set the ratio to 1 where it is so near a clip bound that float32 and float64 may fall on two
    sides.
    """
    ratio = (logp.double() - old.double()).exp()
    is_near_low = (ratio - 1 + rule.clip_ratio_low).abs() < 1e-4
    is_near_high = (ratio - 1 - rule.clip_ratio_high).abs() < 1e-4
    return torch.where(is_near_low | is_near_high, logp.detach().to(old.dtype), old)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("gap", [1e-5, 0.2, 5.0])
@pytest.mark.parametrize("N", [1, 17, 1023, 1024, 2500])
def test_group_loss(N, gap, rule):
    logp, arguments = draw_tokens(N, (gap,), gap)

    check_group_loss(N, gap, rule, logp, arguments)
    first_step = arguments | dict(old_logp=None)
    check_group_loss(N, gap, rule, logp, first_step)


def check_group_loss(N, gap, rule, logp, arguments):
    """Check the loss, its gradient and its sums; old_logp None is the first step."""
    ratio = 1
    if arguments["old_logp"] is not None:
        old_logp = move_off_the_edge(logp, arguments["old_logp"], rule)
        arguments = arguments | dict(old_logp=old_logp)
        ratio = (logp - old_logp).exp()
    group_loss = GroupTokenLoss(rule, **arguments)
    leaf = logp.clone().requires_grad_()
    exact_leaf = logp.double().requires_grad_()

    loss = compute_group_loss(leaf, group_loss)
    exact_loss, exact_sums = compute_exact_loss(exact_leaf, group_loss)

    weight = group_loss.weight
    [grad] = torch.autograd.grad(loss * 3, leaf)
    [exact_grad] = torch.autograd.grad(exact_loss * 3, exact_leaf)
    # an advantage is a difference of rewards of size 1, in float32
    grad_terms = 10 * (weight * ratio).norm().item() / group_loss.denominator
    check_close(grad, exact_grad, terms=grad_terms)
    # a loss is a difference of gains: its error is small beside them, not beside itself
    exact_k3 = exact_sums[2]
    token_advantages = group_loss.advantages[group_loss.rollout]
    gains = (weight * (0.1 + token_advantages.abs())).sum().item() / group_loss.denominator
    largest_ratio = 1
    if gap > 1:
        largest_ratio = 1 + exact_k3 + 5
    scale = gains * largest_ratio + exact_k3
    assert abs(loss.item() - exact_loss.item()) <= 1e-5 * scale
    sums = name_sums(group_loss)
    for name, exact_sum in zip(sums, exact_sums):
        if name != "loss":
            assert sums[name] == pytest.approx(exact_sum, rel=1e-5, abs=1e-6 * gap * N), name


def test_huge_gaps_end_in_no_nan_for_tokens_that_do_not_count():
    logp, arguments = draw_tokens(8, ("huge",))
    arguments["old_logp"] = logp - 200  # e^200 is infinite in float32
    arguments["weight"][:4] = 0
    arguments["rollout"][4:] = 0  # group 0 has no advantage
    leaf = logp.clone().requires_grad_()

    loss = compute_group_loss(leaf, GroupTokenLoss(LossRule(), **arguments))
    loss.backward()

    assert (leaf.grad == 0).all()


def test_clip_takes_the_gradient_exactly():
    """Advantages +1, -1 from rewards 1, -1 (mean only); ratios 1.5 and 0.5 on each: only (+, 1.5)
    and (-, 0.5) are clipped.
    """
    old_logp = torch.zeros(4)
    logp = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    group_loss = GroupTokenLoss(
        LossRule("mean"),
        rewards=torch.tensor([[1.0, -1.0]]),
        rollout=torch.tensor([0, 0, 1, 1]),
        weight=torch.ones(4),
        sampler_logp=old_logp,
        denominator=4.0,
        old_logp=old_logp,
    )

    loss = compute_group_loss(logp, group_loss)
    loss.backward()

    assert logp.grad[0] == 0
    assert logp.grad[3] == 0
    assert name_sums(group_loss)["clipped"] == 2
    unclipped = torch.tensor([-0.5 / 4, 1.5 / 4])
    torch.testing.assert_close(logp.grad[1:3], unclipped)


def test_empty_batch():
    logp, arguments = draw_tokens(0, ())
    leaf = logp.requires_grad_()
    group_loss = GroupTokenLoss(LossRule(), **arguments)

    loss = compute_group_loss(leaf, group_loss)
    loss.backward()

    assert loss == 0
    assert leaf.grad.shape == (0,)


@pytest.mark.parametrize("rule, dtype", RULES_AND_DTYPES, ids=str)
def test_joined(rule, dtype, monkeypatch):
    """Rewards and hidden states in, gradients out, in chunks of 4 rows: as the separate kernels,
    and as float64 all through.
    """
    N = 37
    C = 13
    V = 101
    temperature = 0.7
    monkeypatch.setitem(logprob.WORKSPACE_BYTES, "cpu", 2048)
    generator = draw("joined")
    hidden = torch.randn(N, C, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(V, (N,), generator=generator)
    exact = (copy_to_float64(hidden), copy_to_float64(weight))
    exact_logp, _ = full(*exact, target, temperature)
    arguments = draw_tokens_near(exact_logp, rule, generator)
    joined_loss = GroupTokenLoss(rule, **arguments)
    separate_loss = GroupTokenLoss(rule, **arguments)

    def call_separate_loss(logp, entropy, rows):
        # a plain function has no `on_logits_`
        return separate_loss(logp, entropy, rows)

    joined = fused_linear_loss(
        hidden, weight, target, temperature, make_distribution, joined_loss, "triton"
    )
    separate = fused_linear_loss(
        hidden, weight, target, temperature, make_distribution, call_separate_loss, "triton"
    )

    inputs = (hidden, weight)
    joined_grads = torch.autograd.grad(joined[0], inputs)
    separate_grads = torch.autograd.grad(separate[0], inputs)
    torch.testing.assert_close((*joined, *joined_grads), (*separate, *separate_grads))
    separate_sums = name_sums(separate_loss)
    assert name_sums(joined_loss) == pytest.approx(separate_sums, rel=1e-5, abs=1e-6)
    if dtype == torch.float32:  # in bfloat16 a token may fall on the other side of the clip
        exact_loss, _ = compute_exact_loss(exact_logp, joined_loss)
        exact_grads = torch.autograd.grad(exact_loss, exact)
        check_close(joined[1], exact_logp)
        check_close(joined_grads[0], exact_grads[0])
        check_close(joined_grads[1], exact_grads[1])


def draw_tokens_near(logp, rule, generator):
    """Draw GroupTokenLoss's arguments with old, reference and sampler log-probs near logp."""
    N = len(logp)
    _, arguments = draw_tokens(N, ("joined",))
    shift = logp.detach().float() - arguments["old_logp"]
    for name in ("old_logp", "ref_logp", "sampler_logp"):
        arguments[name] = arguments[name] + shift
    old_logp = arguments["old_logp"] + 0.2 * torch.randn(N, generator=generator)
    arguments["old_logp"] = move_off_the_edge(logp, old_logp, rule)
    return arguments
