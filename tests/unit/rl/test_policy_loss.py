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
    objective = resolve_objective(LossConfig(**settings), ModelConfig())
    entropy = torch.zeros_like(logp)
    loss, d_logp, _, stats = compute_token_loss(
        logp, entropy, batch, batch.weight, total, objective
    )
    return loss, d_logp, stats


def compute_advantages(rewards, size, floor):
    config = LossConfig(advantage_eps=floor)
    return compute_group_advantages(rewards, size, normalize_by_std, config)


def test_advantages_are_numpys():
    rewards = np.random.default_rng(0).normal(size=(5, 8))
    mean = rewards.mean(1, keepdims=True)
    std = rewards.std(1, ddof=1, keepdims=True)
    want = (rewards - mean) / (std + 0.1)

    adv = compute_advantages(torch.tensor(rewards).flatten(), 8, 0.1)

    np.testing.assert_allclose(adv.view(5, 8).numpy(), want, rtol=1e-12)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7793, 1e6])
def test_equal_rewards_are_exactly_zero(value):
    adv = compute_advantages(torch.full((12,), value), 6, 1e-6)

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
    logp = make_doubles([1.5, 0.5, 1.1, 1.5]).log()
    batch = make_batch([2, -1, 2, -1], old=torch.zeros(4))

    loss, d_logp, stats = compute_loss(logp, batch, 10, clip_ratio_low=0.2)

    assert loss.item() == pytest.approx(-0.23, abs=1e-12)
    assert d_logp[:2].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(d_logp[2:].numpy(), [-0.22, 0.15], rtol=1e-12)
    assert stats["grad_logp_square"] == pytest.approx(0.22**2 + 0.15**2)
    assert stats["clip_ratio"] == 2


def test_one_step_per_batch_is_the_policy_gradient():
    adv = [1.0, -2.0, 0.5, 0.0, 3.0, -1.0]
    logp = torch.randn(6, dtype=torch.float64)

    _, d_logp, _ = compute_loss(logp, make_batch(adv), 7, clip_ratio_low=0.2)

    want = -np.array(adv) / 7
    np.testing.assert_allclose(d_logp.numpy(), want, rtol=1e-12)


def test_weight_is_identical_siblings_written_out():
    logp = make_doubles([-0.3, -1.2])
    ref = make_doubles([-0.5, -1.0])
    weighted = make_batch([2.0, -1.0], ref=ref, weight=make_doubles([1.0, 3.0]))
    index = [0, 1, 1, 1]
    written_out = make_batch([2.0, -1.0, -1.0, -1.0], ref=ref[index])

    loss, d_logp, stats = compute_loss(logp, weighted, 4, kl_coef=0.1)
    want_loss, want_d_logp, want_stats = compute_loss(logp[index], written_out, 4, kl_coef=0.1)

    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-12)
    assert stats["kl"].item() == pytest.approx(want_stats["kl"].item(), rel=1e-12)
    assert d_logp[0].item() == pytest.approx(want_d_logp[0].item(), rel=1e-12)
    assert d_logp[1].item() == pytest.approx(want_d_logp[1:].sum().item(), rel=1e-12)


def test_k3_survives_float32_near_the_reference():
    """After a few small steps |ref - logp| is about 1e-4: k3 is d^2 / 2 = 5e-9, below the spacing
    of float32 around 1.
    """
    size = torch.logspace(-5, -1, 2001)
    difference = torch.cat([size, -size])
    exact = torch.expm1(difference.double()) - difference.double()

    value = k3(torch.zeros_like(difference), difference)

    error_of_sum = value.double().sum() - exact.sum()
    near = difference.abs() < 1e-3
    near_error = (value - exact)[near].abs()
    assert (value >= 0).all()
    assert abs(error_of_sum) < 1e-4 * exact.sum()
    assert (near_error < 0.02 * exact[near] + 1e-12).all()


def test_kl_pulls_towards_the_reference():
    """Upstream's sign rewards divergence; here a descent step must bring logp nearer to ref, from
    either side.
    """
    ref = make_doubles([-1.0, -1.0])
    logp = make_doubles([-0.2, -2.5])

    _, d_logp, _ = compute_loss(logp, make_batch([0.0, 0.0], ref=ref), 1, kl_coef=0.5)

    after = logp - 0.01 * d_logp
    distance_before = (logp - ref).abs()
    distance_after = (after - ref).abs()
    assert (distance_after < distance_before).all()
    random = k3(torch.randn(1000), torch.randn(1000))
    assert (random >= 0).all()
    assert k3(ref, ref).abs().max() == 0


@pytest.mark.parametrize("size", [2, 3, 7])
def test_equal_rewards_are_exactly_zero_beside_unequal_ones(size):
    """Whatever the floor, 0 too: a constant group is 0 and its neighbor is not."""
    equal = [0.1] * size
    unequal = [0.0] * (size - 1) + [1.0]

    for floor in (0.0, 1e-12):
        adv = compute_advantages(torch.tensor(equal + unequal), size, floor)
        assert adv[:size].tolist() == [0.0] * size
        assert (adv[size:] != 0).all()
        assert adv.isfinite().all()


def test_micro_batches_sum_to_the_whole():
    adv = [1.0, -2.0, 0.5, 3.0]
    logp = make_doubles([-1.0, -2.0, -3.0, -4.0])

    want_loss, want_d_logp, _ = compute_loss(logp, make_batch(adv), 4)
    loss_sum = 0
    d_logps = []
    for i in range(4):
        token = slice(i, i + 1)
        loss, d_logp, _ = compute_loss(logp[token], make_batch(adv[token]), 4)
        loss_sum += loss.item()
        d_logps.append(d_logp)

    assert torch.equal(want_d_logp, torch.cat(d_logps))
    assert want_loss.item() == pytest.approx(loss_sum, rel=1e-15)


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

    want_d_logp = [0.1 * (1 - up) / 5, 0.1 * (1 - down) / 5, 0.0]
    kl = stats["kl"].item()
    assert k3(logp, ref).tolist() == pytest.approx([up - 3, down + 1, 0.0], rel=1e-12)
    assert d_logp.tolist() == pytest.approx(want_d_logp, rel=1e-12)
    assert kl == pytest.approx(up + down - 2, rel=1e-12)
    assert loss.item() == pytest.approx(0.1 * kl / 5, rel=1e-12)
