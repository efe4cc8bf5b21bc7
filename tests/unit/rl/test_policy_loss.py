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


def batch_of(adv, old=None, ref=None, weight=None):
    n = len(adv)
    zeros = torch.zeros(n, dtype=torch.int64)
    return MicroBatch(
        zeros,
        zeros,
        PackedLayout(zeros, zeros, zeros),
        zeros,
        zeros,
        zeros,
        torch.ones(n, dtype=torch.float64) if weight is None else weight,
        torch.zeros(n),
        old,
        ref,
        torch.tensor(adv, dtype=torch.float64),
    )


def loss_of(logp, batch, total, **settings):
    """(loss, d loss / d logp, statistics) of log-probs (N,)."""
    loss, d_logp, _, stats = compute_token_loss(
        logp,
        torch.zeros_like(logp),
        batch,
        batch.weight,
        total,
        resolve_objective(LossConfig(**settings), ModelConfig()),
    )
    return loss, d_logp, stats


def advantages(rewards, size, floor):
    return compute_group_advantages(
        rewards, size, normalize_by_std, LossConfig(advantage_eps=floor)
    )


def test_advantages_are_numpys():
    r = np.random.default_rng(0).normal(size=(5, 8))
    want = (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 0.1)
    got = advantages(torch.tensor(r).flatten(), 8, 0.1).view(5, 8)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7793, 1e6])
def test_equal_rewards_are_exactly_zero(value):
    assert (advantages(torch.full((12,), value), 6, 1e-6) == 0).all()


def test_four_tokens_by_hand():
    """clip .2, total 10, old log-prob 0, so ratio = exp(logp):

    token  ratio  adv   min(ratio A, clipped A)   d loss / d logp
    0      1.5    +2    1.2 * 2    (clipped)       0
    1      0.5    -1    0.8 * -1   (clipped)       0
    2      1.1    +2    1.1 * 2                    -2 * 1.1 / 10 = -.22
    3      1.5    -1    1.5 * -1  (not clipped)    +1 * 1.5 / 10 = +.15
    loss = -(2.4 - .8 + 2.2 - 1.5) / 10 = -.23
    """
    logp = torch.tensor([1.5, 0.5, 1.1, 1.5], dtype=torch.float64).log()
    loss, slope, stats = loss_of(
        logp, batch_of([2, -1, 2, -1], old=torch.zeros(4)), 10, clip_ratio_low=0.2
    )
    assert loss.item() == pytest.approx(-0.23, abs=1e-12)
    assert slope[:2].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(slope[2:].numpy(), [-0.22, 0.15], rtol=1e-12)
    assert stats["grad_logp_square"] == pytest.approx(0.22**2 + 0.15**2)
    assert stats["clip_ratio"] == 2


def test_one_step_per_batch_is_the_policy_gradient():
    adv = [1.0, -2.0, 0.5, 0.0, 3.0, -1.0]
    slope = loss_of(torch.randn(6, dtype=torch.float64), batch_of(adv), 7, clip_ratio_low=0.2)[1]
    np.testing.assert_allclose(slope.numpy(), -np.array(adv) / 7, rtol=1e-12)


def test_weight_is_identical_siblings_written_out():
    logp = torch.tensor([-0.3, -1.2], dtype=torch.float64)
    ref = torch.tensor([-0.5, -1.0], dtype=torch.float64)
    out = []
    for index, weight in (([0, 1], [1.0, 3.0]), ([0, 1, 1, 1], [1.0] * 4)):
        batch = batch_of(
            [2.0 if i == 0 else -1.0 for i in index],
            ref=ref[index],
            weight=torch.tensor(weight, dtype=torch.float64),
        )
        loss, slope, stats = loss_of(logp[index], batch, 4, kl_coef=0.1)
        out.append(
            (
                loss.item(),
                stats["kl"].item(),
                *(slope[[i == j for i in index]].sum().item() for j in (0, 1)),
            )
        )
    assert out[0] == pytest.approx(out[1], rel=1e-12)


def test_k3_survives_float32_near_the_reference():
    """After a few small steps |ref - logp| is about 1e-4: k3 is d^2 / 2 = 5e-9, below the spacing
    of float32 around 1.
    """
    d = torch.cat([sign * torch.logspace(-5, -1, 2001) for sign in (1, -1)])
    value = k3(torch.zeros_like(d), d)
    exact = torch.expm1(d.double()) - d.double()
    assert (value >= 0).all()
    assert abs(value.double().sum() - exact.sum()) < 1e-4 * exact.sum()
    near = d.abs() < 1e-3
    assert ((value - exact)[near].abs() < 0.02 * exact[near] + 1e-12).all()


def test_kl_pulls_towards_the_reference():
    """Upstream's sign rewards divergence; here a descent step must bring logp nearer to ref, from
    either side.
    """
    ref = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    logp = torch.tensor([-0.2, -2.5], dtype=torch.float64)
    after = logp - 0.01 * loss_of(logp, batch_of([0.0, 0.0], ref=ref), 1, kl_coef=0.5)[1]
    assert ((after - ref).abs() < (logp - ref).abs()).all()
    assert (k3(torch.randn(1000), torch.randn(1000)) >= 0).all()
    assert k3(ref, ref).abs().max() == 0


@pytest.mark.parametrize("size", [2, 3, 7])
def test_equal_rewards_are_exactly_zero_beside_unequal_ones(size):
    """Whatever the floor, 0 too: a constant group is 0 and its neighbour is not."""
    for floor in (0.0, 1e-12):
        adv = advantages(torch.tensor([0.1] * size + [0.0] * (size - 1) + [1.0]), size, floor)
        assert adv[:size].tolist() == [0.0] * size
        assert (adv[size:] != 0).all()
        assert adv.isfinite().all()


def test_micro_batches_sum_to_the_whole():
    adv = [1.0, -2.0, 0.5, 3.0]
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    whole, slope, _ = loss_of(logp, batch_of(adv), 4)
    parts = [loss_of(logp[i : i + 1], batch_of(adv[i : i + 1]), 4) for i in range(4)]
    assert torch.equal(slope, torch.cat([d for _, d, _ in parts]))
    assert whole.item() == pytest.approx(sum(loss.item() for loss, _, _ in parts), rel=1e-15)


def test_kl_by_hand():
    """d = ref - logp = 2 and -2: k3 = e^d - d - 1; d loss / d logp = kl (1 - e^d) / total. The
    other way round is another divergence.
    """
    logp = torch.tensor([-3.0, -1.0, -2.0], dtype=torch.float64)
    ref = torch.tensor([-1.0, -3.0, -2.0], dtype=torch.float64)
    assert k3(logp, ref).tolist() == pytest.approx([np.exp(2) - 3, np.exp(-2) + 1, 0.0], rel=1e-12)
    loss, slope, stats = loss_of(logp, batch_of([0.0] * 3, ref=ref), 5, kl_coef=0.1)
    assert slope.tolist() == pytest.approx(
        [0.1 * (1 - np.exp(2)) / 5, 0.1 * (1 - np.exp(-2)) / 5, 0.0], rel=1e-12
    )
    assert stats["kl"].item() == pytest.approx(np.exp(2) + np.exp(-2) - 2, rel=1e-12)
    assert loss.item() == pytest.approx(0.1 * stats["kl"].item() / 5, rel=1e-12)
