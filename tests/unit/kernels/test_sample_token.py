"""The sampler's choice as drawn: frequencies against the exact distribution, the nucleus against
transformers'.
"""

import itertools

import numpy as np
import pytest
import torch
from helpers.tiny_world import oracle, tiny_model
from scipy.stats import chi2
from transformers import TopPLogitsWarper

from recr1.data_types import Prompt
from recr1.kernels.sample_token import (
    compute_aligned_logits,
    find_nucleus_floor,
    sample_token,
)
from recr1.model.log_probs import make_distribution
from recr1.sampling.generate import generate
from recr1.utils.counter_rng import draw_uniforms

DRAWS = 100_000
TEMPERATURES = (0.6, 1.0, 1.5)
WAYS = list(itertools.product(TEMPERATURES, (1.0, 0.3, 0.8, 0.95)))
# p = 0.4, and four of 0.15
TIED = [[0.15, 0.15, 0.4, 0.15, 0.15]]
# top_p, the ids that can be drawn, the mass that is cut off
TIED_NUCLEI = [
    (0.39, {2}, 0.6),
    (0.5, {0, 1, 2, 3, 4}, 0.0),
]
EDGE_UNIFORMS = [
    0.0,
    2.0**-53,
    1e-12,
    0.5,
    1 - 2.0**-25,
    1 - 2.0**-53,
    1.0,
]


def compute_exact(logits: torch.Tensor, temperature: float, top_p: float) -> np.ndarray:
    """float64: softmax(logits / temperature) on the smallest set of most likely ids whose mass
    reaches top_p.
    """
    scaled = logits.double() / temperature
    p = scaled.softmax(-1).numpy()
    falling = np.sort(p)[::-1]
    rank = np.searchsorted(falling.cumsum(), top_p)
    last = min(rank, len(p) - 1)
    p[p < falling[last]] = 0
    return p / p.sum()


def compute_chance(ids, p: np.ndarray) -> float:
    """Pearson's chi-square: the chance that draws from p differ from it as much as `ids` do. Ids of
    less than 5 expected draws are one class.
    """
    mean_counts = len(ids) * p
    counts = np.bincount(ids, minlength=len(p))
    assert not counts[p == 0].any()

    common = mean_counts >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(mean_counts[common], mean_counts[~common].sum())
    observed = observed[expected > 0]
    expected = expected[expected > 0]
    assert len(observed) > 2, "too few classes to tell anything"

    squares = (observed - expected) ** 2
    statistic = (squares / expected).sum()
    return chi2.sf(statistic, len(observed) - 1)


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(300, generator=generator)


@pytest.mark.parametrize("temperature, top_p", WAYS)
def test_draws_come_as_often_as_the_distribution_says(logits, temperature, top_p):
    uniforms = draw_uniforms(0, 1, np.array([7]), DRAWS, 1)
    u = torch.from_numpy(uniforms[:, :, 0])
    distribution = make_distribution(logits[None], temperature)
    p = compute_exact(logits, temperature, top_p)

    ids, _, _ = sample_token(distribution, u, top_p)

    ids = ids[0].numpy()
    chance = compute_chance(ids, p)
    print(f"temperature {temperature}, top_p {top_p}: p = {chance:.3f}")
    assert chance > 1e-3
    # a tenth more temperature would be seen
    warmer = p ** (1 / 1.1)
    warmer /= warmer.sum()
    assert compute_chance(ids, warmer) < 1e-6


@pytest.mark.parametrize("temperature, top_p", WAYS)
def test_first_tokens_of_generate_come_as_often_as_transformers_softmax_says(temperature, top_p):
    model = tiny_model(seed=2, std=0.15)
    hf_model = oracle(model)
    prompt = Prompt("q", 5, "", (17, 3, 250, 88))
    with torch.no_grad():
        output = hf_model(input_ids=torch.tensor([prompt.ids]))
    want = output.logits[0, -1]
    p = compute_exact(want, temperature, top_p)
    stops = frozenset([5])
    u = draw_uniforms(0, 1, np.array([prompt.index]), DRAWS, 1)

    rollouts = generate(model, [prompt], DRAWS, temperature, 1, stops, u, top_p=top_p)

    siblings = [r.sibling for r in rollouts]
    ids = [r.ids[0] for r in rollouts]
    assert siblings == list(range(DRAWS))
    chance = compute_chance(ids, p)
    print(f"temperature {temperature}, top_p {top_p}: p = {chance:.3f}")
    assert chance > 1e-3
    # the policy's, not renormalized over the nucleus
    scaled = want.double() / temperature
    want_logp = scaled.log_softmax(-1)[ids]
    logp = torch.tensor([r.sampler_logp[0] for r in rollouts])
    assert (want_logp - logp).abs().max() < 1e-4


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.8, 0.95, 0.999])
def test_the_nucleus_is_transformers(temperature, top_p):
    """200 rows of 1000 different float64 logits: the same ids are kept, and what is cut off is what
    they lack of 1.
    """
    logits_generator = torch.Generator().manual_seed(0)
    uniform_generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(200, 1000, generator=logits_generator, dtype=torch.float64)
    u = torch.rand(200, 50, generator=uniform_generator, dtype=torch.float64)
    scaled = logits / temperature
    p = scaled.softmax(-1)
    warp = TopPLogitsWarper(top_p)
    nucleus = warp(None, scaled).isfinite()
    distribution = make_distribution(logits, temperature)

    floor = find_nucleus_floor(distribution.weights, distribution.total, top_p)
    ids, logp, cut = sample_token(distribution, u, top_p)

    assert torch.equal(distribution.weights >= floor, nucleus)
    assert nucleus.gather(-1, ids).all()
    if top_p <= 0.1:
        assert ids.unique().numel() > 100
    want_cut = 1 - (p * nucleus).sum(-1)
    assert (cut - want_cut).abs().max() < 1e-12
    assert (cut <= 1 - top_p).all()
    want_logp = p.log().gather(-1, ids)
    assert (logp - want_logp).abs().max() < 1e-12


def test_top_p_1_cuts_nothing_and_sorts_nothing(monkeypatch):
    monkeypatch.setattr("recr1.kernels.sample_token.find_nucleus_floor", None)
    logits = torch.randn(4, 50)
    distribution = make_distribution(logits, 1.0)
    u = torch.rand(4, 3)

    _, _, cut = sample_token(distribution, u)
    _, _, greedy_cut = sample_token(distribution)

    assert not cut.any()
    assert not greedy_cut.any()


def test_what_ties_at_the_edge_stays_in():
    """p = 0.4, then four of 0.15: 0.5 takes one of the four and so all; 0.4 is reached by the first
    alone.
    """
    u = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)[None]
    p = torch.tensor(TIED, dtype=torch.float64)
    distribution = make_distribution(p.log(), 1.0)
    uniform = make_distribution(torch.zeros(1, 7), 1.0)

    for top_p, want_ids, want_cut in TIED_NUCLEI:
        ids, _, cut = sample_token(distribution, u, top_p)
        assert set(ids[0].tolist()) == want_ids
        assert abs(cut.item() - want_cut) < 1e-12

    ids, _, _ = sample_token(uniform, u, 0.01)
    assert set(ids[0].tolist()) == set(range(7))


@pytest.mark.parametrize("top_p", [1.0, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_uniform_yields_an_id_of_probability_zero(dtype, top_p):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2000, generator=generator).to(dtype)
    for impossible in (slice(50), slice(900, 950), slice(-50, None)):
        logits[:, impossible] = -1e4
    distribution = make_distribution(logits, 1.0)
    u = torch.tensor([EDGE_UNIFORMS], dtype=torch.float64)

    ids, logp, _ = sample_token(distribution, u, top_p)

    weights = distribution.weights[0, ids[0]]
    drawn = ids[0].tolist()
    assert (weights > 0).all()
    assert logp.min() > -50
    assert drawn == sorted(drawn)
    if top_p == 1:
        # the first and the last that have any
        assert drawn[0] == 50
        assert drawn[-1] == 1949


def test_greedy_takes_the_lowest_of_a_tie():
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0]])
    distribution = make_distribution(logits, 0.7)

    ids, logp, cut = sample_token(distribution)

    assert ids.tolist() == [[1], [0]]
    assert torch.equal(logp, distribution.logp(ids))
    assert not cut.any()


@pytest.mark.parametrize("V", [300, 151])
def test_aligned_logits_are_the_products(V):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 24, generator=generator)
    weight = torch.randn(V, 24, generator=generator)

    logits = compute_aligned_logits(hidden, weight)

    assert logits.shape == (5, V)
    assert logits.stride(1) == 1
    assert logits.stride(0) % 16 == 0
    want = hidden.double() @ weight.double().T
    assert (logits - want).abs().max() < 1e-4
