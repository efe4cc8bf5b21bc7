"""The sampler's choice as drawn: frequencies against the exact distribution, the nucleus against
transformers'.
"""

import numpy as np
import pytest
import torch
from helpers.tiny_world import oracle, tiny_model
from scipy.stats import chi2
from transformers import TopPLogitsWarper

from recr1.data_types import Prompt
from recr1.kernels.sample_token import find_nucleus_floor, sample_token
from recr1.model.log_probs import make_distribution
from recr1.sampling.generate import generate
from recr1.utils.counter_rng import draw_uniforms

DRAWS = 100_000
WAYS = [(temperature, top_p) for temperature in (0.6, 1.0, 1.5) for top_p in (1.0, 0.3, 0.8, 0.95)]


def exact(logits: torch.Tensor, temperature: float, top_p: float) -> np.ndarray:
    """float64: softmax(logits / temperature) on the smallest set of most likely ids whose mass
    reaches top_p.
    """
    p = (logits.double() / temperature).softmax(-1).numpy()
    falling = np.sort(p)[::-1]
    p[p < falling[min(np.searchsorted(falling.cumsum(), top_p), len(p) - 1)]] = 0
    return p / p.sum()


def unlikely(ids, p: np.ndarray) -> float:
    """Pearson's chi-square: the chance that draws from p differ from it as much as `ids` do. Ids of
    less than 5 expected draws are one class.
    """
    n = len(ids)
    counts = np.bincount(ids, minlength=len(p))
    assert not counts[p == 0].any()
    common = n * p >= 5
    seen, expected = (np.append(x[common], x[~common].sum()) for x in (counts, n * p))
    seen = seen[expected > 0]
    expected = expected[expected > 0]
    assert len(seen) > 2, "too few classes to tell anything"
    return chi2.sf(((seen - expected) ** 2 / expected).sum(), len(seen) - 1)


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(300, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("temperature, top_p", WAYS)
def test_draws_come_as_often_as_the_distribution_says(logits, temperature, top_p):
    u = torch.from_numpy(draw_uniforms(0, 1, np.array([7]), DRAWS, 1)[:, :, 0])
    ids = sample_token(make_distribution(logits[None], temperature), u, top_p)[0][0].numpy()
    p = exact(logits, temperature, top_p)
    chance = unlikely(ids, p)
    print(f"temperature {temperature}, top_p {top_p}: p = {chance:.3f}")
    assert chance > 1e-3
    warmer = p ** (1 / 1.1)
    assert unlikely(ids, warmer / warmer.sum()) < 1e-6  # a tenth more temperature would be seen


@pytest.mark.parametrize("temperature, top_p", WAYS)
def test_first_tokens_of_generate_come_as_often_as_transformers_softmax_says(temperature, top_p):
    model = tiny_model(seed=2, std=0.15)
    prompt = Prompt("q", 5, "", (17, 3, 250, 88))
    with torch.no_grad():
        want = oracle(model)(input_ids=torch.tensor([prompt.ids])).logits[0, -1]
    u = draw_uniforms(0, 1, np.array([prompt.index]), DRAWS, 1)
    rollouts = generate(model, [prompt], DRAWS, temperature, 1, frozenset([5]), u, top_p=top_p)
    ids = [r.ids[0] for r in rollouts]
    assert [r.sibling for r in rollouts] == list(range(DRAWS))
    chance = unlikely(ids, exact(want, temperature, top_p))
    print(f"temperature {temperature}, top_p {top_p}: p = {chance:.3f}")
    assert chance > 1e-3
    # the policy's, not renormalized over the nucleus
    log_p = (want.double() / temperature).log_softmax(-1)[ids]
    assert (log_p - torch.tensor([r.sampler_logp[0] for r in rollouts])).abs().max() < 1e-4


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.8, 0.95, 0.999])
def test_the_nucleus_is_transformers(temperature, top_p):
    """200 rows of 1000 different float64 logits: the same ids are kept, and what is cut off is what
    they lack of 1.
    """
    logits = 3 * torch.randn(
        200, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    p = make_distribution(logits, temperature)
    kept = p.weights >= find_nucleus_floor(p.weights, p.total, top_p)
    theirs = TopPLogitsWarper(top_p)(None, logits / temperature).isfinite()
    assert torch.equal(kept, theirs)
    u = torch.rand(200, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids, logp, cut = sample_token(p, u, top_p)
    assert theirs.gather(-1, ids).all()
    assert top_p > 0.1 or ids.unique().numel() > 100
    whole = (logits / temperature).softmax(-1)
    assert (cut - (1 - (whole * theirs).sum(-1))).abs().max() < 1e-12
    assert (cut <= 1 - top_p).all()
    assert (logp - whole.log().gather(-1, ids)).abs().max() < 1e-12


def test_top_p_1_cuts_nothing_and_sorts_nothing(monkeypatch):
    monkeypatch.setattr("recr1.kernels.sample_token.find_nucleus_floor", None)
    p = make_distribution(torch.randn(4, 50), 1.0)
    u = torch.rand(4, 3)
    assert not sample_token(p, u)[2].any()
    assert not sample_token(p)[2].any()


def test_what_ties_at_the_edge_stays_in():
    """p = 0.4, then four of 0.15: 0.5 takes one of the four and so all; 0.4 is reached by the first
    alone.
    """
    p = make_distribution(
        torch.tensor([[0.15, 0.15, 0.4, 0.15, 0.15]], dtype=torch.float64).log(), 1.0
    )
    u = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)[None]
    for top_p, kept, cut in ((0.39, {2}, 0.6), (0.5, {0, 1, 2, 3, 4}, 0.0)):
        ids, _, left_out = sample_token(p, u, top_p)
        assert set(ids[0].tolist()) == kept
        assert abs(left_out.item() - cut) < 1e-12
    uniform = make_distribution(torch.zeros(1, 7), 1.0)
    assert set(sample_token(uniform, u, 0.01)[0][0].tolist()) == set(range(7))


@pytest.mark.parametrize("top_p", [1.0, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_uniform_yields_an_id_of_probability_zero(dtype, top_p):
    logits = torch.randn(1, 2000, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, :50] = logits[:, 900:950] = logits[:, -50:] = -1e4
    p = make_distribution(logits, 1.0)
    ids, logp, _ = sample_token(
        p,
        torch.tensor(
            [[0.0, 2.0**-53, 1e-12, 0.5, 1 - 2.0**-25, 1 - 2.0**-53, 1.0]], dtype=torch.float64
        ),
        top_p,
    )
    assert (p.weights[0, ids[0]] > 0).all()
    assert logp.min() > -50
    assert ids[0].tolist() == sorted(ids[0].tolist())
    if top_p == 1:
        assert ids[0, 0] == 50 and ids[0, -1] == 1949  # the first and the last that have any


def test_greedy_takes_the_lowest_of_a_tie():
    p = make_distribution(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0]]), 0.7)
    ids, logp, cut = sample_token(p)
    assert ids.tolist() == [[1], [0]]
    assert torch.equal(logp, p.logp(ids))
    assert not cut.any()
