"""Advantages and loss against numpy and worked numbers."""

import numpy as np
import pytest
import torch

from recr1.config.schema import LossConfig, ModelConfig
from recr1.data_types import MicroBatch, PackedLayout
from recr1.rl.advantages import compute_group_advantages, normalize_by_std
from recr1.rl.kl import k3
from recr1.rl.losses import resolve_objective
from recr1.rl.policy_loss import compute_token_loss


def make_doubles(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make_batch(adv, old=None, ref=None, weight=None) -> MicroBatch:
    """Make a batch of N tokens, of which a loss reads the advantages and log-probs."""
    count = len(adv)
    zeros = torch.zeros(count, dtype=torch.int64)
    if weight is None:
        weight = torch.ones(count, dtype=torch.float64)
    return MicroBatch(
        tokens=zeros,
        positions=zeros,
        layout=PackedLayout(zeros, zeros, zeros),
        target=zeros,
        predict_from=zeros,
        rollout=zeros,
        weight=weight,
        sampler_logp=torch.zeros(count),
        old_logp=old,
        ref_logp=ref,
        advantages=make_doubles(adv),
    )


def compute_loss(logp, batch, total, **settings):
    """Compute (loss, d loss / d logp, statistics) of log-probs (N,)."""
    config = LossConfig(**settings)
    objective = resolve_objective(config, ModelConfig())
    entropy = torch.zeros_like(logp)
    loss, d_logp, _, stats = compute_token_loss(
        logp, entropy, batch, batch.weight, total, objective
    )
    return loss.item(), d_logp, stats


def compute_advantages(rewards, size, floor):
    config = LossConfig(advantage_eps=floor)
    return compute_group_advantages(rewards, size, normalize_by_std, config)


def test_advantages_are_numpys():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(5, 8))
    mean = rewards.mean(1, keepdims=True)
    std = rewards.std(1, ddof=1, keepdims=True)
    want = (rewards - mean) / (std + 0.1)
    flat_rewards = torch.tensor(rewards).flatten()

    adv = compute_advantages(flat_rewards, 8, 0.1)

    table = adv.view(5, 8)
    np.testing.assert_allclose(table.numpy(), want, rtol=1e-12)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7793, 1e6])
def test_equal_rewards_are_exactly_zero(value):
    rewards = torch.full((12,), value)

    adv = compute_advantages(rewards, 6, 1e-6)

    assert (adv == 0).all()


def test_four_tokens_by_hand():
    """clip .2, total 10, old log-prob 0, so ratio = exp(logp):

    token  ratio  adv   min(ratio A, clipped A)   d loss / d logp
    0      1.5    +2    1.2 * 2    (clipped)       0
    1      0.5    -1    0.8 * -1   (clipped)       0
    2      1.1    +2    1.1 * 2                    -2 * 1.1 / 10 = -.22
    3      1.5    -1    1.5 * -1  (not clipped)    +1 * 1.5 / 10 = +.15
    loss = -(2.4 - .8 + 2.2 - 1.5) / 10 = -.23
    """
    ratio = make_doubles([1.5, 0.5, 1.1, 1.5])
    logp = ratio.log()
    batch = make_batch([2, -1, 2, -1], old=torch.zeros(4))

    loss, d_logp, stats = compute_loss(logp, batch, 10, clip_ratio_low=0.2)

    derivatives = d_logp.numpy()
    assert loss == pytest.approx(-0.23, abs=1e-12)
    assert derivatives[0] == 0.0
    assert derivatives[1] == 0.0
    np.testing.assert_allclose(derivatives[2:], [-0.22, 0.15], rtol=1e-12)
    assert stats["grad_logp_square"] == pytest.approx(0.22**2 + 0.15**2)
    assert stats["clip_ratio"] == 2


def test_one_step_per_batch_is_the_policy_gradient():
    adv = [1.0, -2.0, 0.5, 0.0, 3.0, -1.0]
    logp = torch.randn(6, dtype=torch.float64)
    batch = make_batch(adv)

    _, d_logp, _ = compute_loss(logp, batch, 7, clip_ratio_low=0.2)

    want = -np.array(adv) / 7
    np.testing.assert_allclose(d_logp.numpy(), want, rtol=1e-12)


def test_weight_is_identical_siblings_written_out():
    logp = make_doubles([-0.3, -1.2])
    ref = make_doubles([-0.5, -1.0])
    weight = make_doubles([1.0, 3.0])
    weighted = make_batch([2.0, -1.0], ref=ref, weight=weight)
    index = [0, 1, 1, 1]
    written_out = make_batch([2.0, -1.0, -1.0, -1.0], ref=ref[index])

    loss, d_logp, stats = compute_loss(logp, weighted, 4, kl_coef=0.1)
    want_loss, want_d_logp, want_stats = compute_loss(logp[index], written_out, 4, kl_coef=0.1)

    kl = stats["kl"].item()
    want_kl = want_stats["kl"].item()
    first, second = d_logp.tolist()
    want_first, *want_others = want_d_logp.tolist()
    assert loss == pytest.approx(want_loss, rel=1e-12)
    assert kl == pytest.approx(want_kl, rel=1e-12)
    assert first == pytest.approx(want_first, rel=1e-12)
    assert second == pytest.approx(sum(want_others), rel=1e-12)


def test_k3_survives_float32_near_the_reference():
    """After a few small steps |ref - logp| is about 1e-4: k3 is d^2 / 2 = 5e-9, below the spacing
    of float32 around 1.
    """
    size = torch.logspace(-5, -1, 2001)
    difference = torch.cat([size, -size])
    difference64 = difference.double()
    exact = torch.expm1(difference64) - difference64
    exact_sum = exact.sum()
    zeros = torch.zeros_like(difference)

    value = k3(zeros, difference)

    value_sum = value.double().sum()
    near = difference.abs() < 1e-3
    near_error = (value - exact)[near].abs()
    assert (value >= 0).all()
    assert abs(value_sum - exact_sum) < 1e-4 * exact_sum
    assert (near_error < 0.02 * exact[near] + 1e-12).all()


def test_kl_pulls_towards_the_reference():
    """Upstream's sign rewards divergence; here a descent step must bring logp nearer to ref, from
    either side.
    """
    ref = make_doubles([-1.0, -1.0])
    logp = make_doubles([-0.2, -2.5])
    batch = make_batch([0.0, 0.0], ref=ref)

    _, d_logp, _ = compute_loss(logp, batch, 1, kl_coef=0.5)

    after = logp - 0.01 * d_logp
    distance_before = (logp - ref).abs()
    distance_after = (after - ref).abs()
    assert (distance_after < distance_before).all()
    some_logp = torch.randn(1000)
    other_logp = torch.randn(1000)
    assert (k3(some_logp, other_logp) >= 0).all()
    assert (k3(ref, ref) == 0).all()


@pytest.mark.parametrize("size", [2, 3, 7])
def test_equal_rewards_are_exactly_zero_beside_unequal_ones(size):
    """Whatever the floor, 0 too: a constant group is 0 and its neighbor is not."""
    equal = [0.1] * size
    unequal = [0.0] * (size - 1) + [1.0]
    rewards = torch.tensor(equal + unequal)

    for floor in (0.0, 1e-12):
        adv = compute_advantages(rewards, size, floor)
        assert adv[:size].tolist() == [0.0] * size
        assert (adv[size:] != 0).all()
        assert adv.isfinite().all()


def test_micro_batches_sum_to_the_whole():
    adv = [1.0, -2.0, 0.5, 3.0]
    logp = make_doubles([-1.0, -2.0, -3.0, -4.0])
    batch = make_batch(adv)

    want_loss, want_d_logp, _ = compute_loss(logp, batch, 4)
    loss_sum = 0
    d_logps = []
    for i in range(4):
        token = slice(i, i + 1)
        token_batch = make_batch(adv[token])
        loss, d_logp, _ = compute_loss(logp[token], token_batch, 4)
        loss_sum += loss
        d_logps.append(d_logp)

    actual_d_logp = torch.cat(d_logps)
    assert torch.equal(actual_d_logp, want_d_logp)
    assert want_loss == pytest.approx(loss_sum, rel=1e-15)


def test_kl_by_hand():
    """d = ref - logp = 2 and -2: k3 = e^d - d - 1; d loss / d logp = kl (1 - e^d) / total. The
    other way round is another divergence.
    """
    logp = make_doubles([-3.0, -1.0, -2.0])
    ref = make_doubles([-1.0, -3.0, -2.0])
    up = np.exp(2)
    down = np.exp(-2)
    batch = make_batch([0.0] * 3, ref=ref)

    loss, d_logp, stats = compute_loss(logp, batch, 5, kl_coef=0.1)

    kl = stats["kl"].item()
    kls = k3(logp, ref).tolist()
    derivatives = d_logp.tolist()
    want_first = 0.1 * (1 - up) / 5
    want_second = 0.1 * (1 - down) / 5
    assert kls == pytest.approx([up - 3, down + 1, 0.0], rel=1e-12)
    assert derivatives == pytest.approx([want_first, want_second, 0.0], rel=1e-12)
    assert kl == pytest.approx(up + down - 2, rel=1e-12)
    assert loss == pytest.approx(0.1 * kl / 5, rel=1e-12)
