"""Compare the kernel of kernels/sample_token.py with float64 in Triton's interpreter.

Run by test_kernels.py, as interpret_kernels.py is.
"""

import os

import pytest
import torch

from recr1.kernels import logprob
from recr1.kernels.cpu_linear import pack_weight
from recr1.kernels.sample_token import sample_from_hidden, sample_token, triton_sample_token
from recr1.model.log_probs import make_distribution

SEED = int(os.environ["RECR1_SEED"])
# B, K, V; the last one is two tiles and a tail
SIZES = [(1, 1, 2), (1, 5, 33), (7, 2, 101), (3, 3, 1001), (2, 2, 17_003)]


# float64: the third becomes 1 in float32
EDGES = [0.0, 2.0**-53, 1 - 2.0**-53, 1.0]
DTYPES_AND_TOP_P = [
    (torch.float32, 1.0),
    (torch.float32, 0.8),
    (torch.bfloat16, 1.0),
    (torch.bfloat16, 0.3),
]


def draw(*key):
    """Make a generator of the key's own."""
    key_hash = hash((SEED, *key))
    return torch.Generator().manual_seed(key_hash % 2**63)


def draw_rows(B, V, dtype, generator, size=2.0):
    """Draw logits (B, V) in a workspace whose rows end in NaN."""
    width = -(-V // 16) * 16
    workspace = torch.full((B, width), torch.nan, dtype=dtype)
    workspace[:, :V] = size * torch.randn(B, V, generator=generator)
    return workspace[:, :V]


def compute_distribution(logits, temperature, top_p):
    """Compute in float64: p (B, V), 0 outside the nucleus and not renormalized; log p of the whole;
    what p lacks of 1 (B,).
    """
    scaled = logits.double() / temperature
    log_p = scaled.log_softmax(-1)
    p = log_p.exp()
    nucleus = torch.zeros_like(p)
    for row, row_nucleus in zip(p, nucleus):
        edge = find_nucleus_edge(row, top_p)
        inside = row >= edge
        row_nucleus[inside] = row[inside]
    return nucleus, log_p, 1 - nucleus.sum(-1)


def find_nucleus_edge(row, top_p):
    """Return the probability of the last id that the nucleus needs to reach top_p."""
    descending = row[row.argsort(-1, descending=True)]
    masses = descending.cumsum(0).tolist()
    for probability, mass in zip(descending, masses):
        if mass >= top_p:
            return probability
    return descending[-1]


def check_between(ids, u, p, slack):
    """Check that each u lies between the sums before and up to its id, as a share of the whole
    nucleus; and that the id is possible.
    """
    total = p.sum(-1, keepdim=True)
    cdf = p.cumsum(-1) / total
    after = cdf.gather(-1, ids)
    probability = p.gather(-1, ids)
    before = after - probability / total

    assert (probability > 0).all(), f"an id of probability 0, seed {SEED}"
    assert (u >= before - slack).all(), f"seed {SEED}"
    assert (u <= after + slack).all(), f"seed {SEED}"


@pytest.mark.parametrize("dtype, top_p", DTYPES_AND_TOP_P)
@pytest.mark.parametrize("B, K, V", SIZES)
def test_inverse_cdf(B, K, V, dtype, top_p):
    temperature = 0.7 if V % 3 else 1.0
    generator = draw(B, K, V, dtype, top_p)
    logits = draw_rows(B, V, dtype, generator)
    p, log_p, cut = compute_distribution(logits, temperature, top_p)
    # a nucleus whose edge lies within rounding of top_p may hold one id more in float32: rather
    # another top_p
    while top_p < 1 and V > 2 and ((1 - cut - top_p).abs() < 1e-5).any():
        top_p += 1e-3
        p, log_p, cut = compute_distribution(logits, temperature, top_p)
    u = torch.rand(B, K, generator=generator, dtype=torch.float64)
    edges = torch.tensor(EDGES, dtype=torch.float64)
    u.view(-1)[: len(EDGES)] = edges[: B * K]

    ids, logp, our_cut = triton_sample_token(logits, temperature, u, top_p)
    torch_distribution = make_distribution(logits, temperature)
    torch_ids, torch_logp, torch_cut = sample_token(torch_distribution, u, top_p)

    check_between(ids, u, p, 1e-5)
    assert ids.shape == (B, K)
    assert logp.shape == (B, K)
    assert ids.dtype == torch.int64
    assert logp.dtype == torch.float32
    logp_error = (logp - log_p.gather(-1, ids)).abs().max()
    assert logp_error <= 1e-5 * log_p.abs().max()
    assert (our_cut - cut).abs().max() <= 1e-5
    if top_p >= 1:
        assert not our_cut.any()
    check_between(torch_ids, u, p, 1e-5)
    assert (torch_cut - cut).abs().max() <= 1e-5
    same = ids == torch_ids
    torch.testing.assert_close(logp[same], torch_logp[same], rtol=1e-5, atol=1e-5)
    # the trainer's kernel gives the same row the same bits
    first_ids = ids[:, 0].contiguous()
    trainer_logp = torch.empty(B)
    entropy = torch.empty(B)
    logsumexp = torch.empty(B)
    logprob.compute_statistics(logits, first_ids, temperature, trainer_logp, entropy, logsumexp)
    assert torch.equal(logp[:, 0], trainer_logp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, K, V", SIZES)
def test_greedy_is_argmax_and_the_lowest_of_a_tie(B, K, V, dtype):
    generator = draw("greedy", B, V)
    logits = draw_rows(B, V, dtype, generator)
    logits[0, [V // 2, V - 1]] = 50.0

    ids, logp, cut = triton_sample_token(logits, 1.3)

    assert torch.equal(ids[:, 0], logits.argmax(-1))
    assert ids[0] == V // 2
    assert ids.shape == (B, 1)
    assert not cut.any()
    log_p = (logits.double() / 1.3).log_softmax(-1)
    assert (logp - log_p.gather(-1, ids)).abs().max() <= 1e-5


@pytest.mark.parametrize("top_p", [1.0, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_uniform_yields_an_id_of_probability_zero(dtype, top_p):
    """Also where whole tiles have none, the first and the last one among them."""
    V = 26_000
    generator = draw("zero")
    logits = draw_rows(1, V, dtype, generator)
    logits[:, :9000] = -1e4
    logits[:, 15_000:17_000] = -1e4
    logits[:, 17_500:] = -1e4
    u = torch.tensor([[*EDGES, 0.5, 1 - 2.0**-25]], dtype=torch.float64)

    ids, logp, _ = triton_sample_token(logits, 1.0, u, top_p)

    assert (logits.gather(-1, ids) > -1e3).all()
    assert logp.min() > -50
    if top_p == 1:
        assert ids[0, :4].tolist() == [9000, 9000, 17_499, 17_499]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", [[0.0, -0.0], [1.5, 1.5], [-2.5, -2.5]], ids=str)
def test_what_ties_at_the_nucleus_edge_stays_in_it(dtype, ties):
    """Eight ids tie for the last place, 0 and -0 among them: one uniform in the middle of each id's
    share draws all, and with a top_p that the first one reaches, it alone.
    """
    logits = torch.full((1, 16), min(ties) - 20, dtype=dtype)
    logits[0, 3] = ties[0] + 3
    logits[0, 4:12] = torch.tensor(ties * 4, dtype=dtype)
    p = logits[0].double().softmax(-1)
    first_p = float(p[3])

    check_nucleus(logits, p, first_p + 0.01, list(range(3, 12)))
    check_nucleus(logits, p, first_p - 0.01, [3])


def check_nucleus(logits, p, top_p, nucleus):
    """Check that uniforms in the middle of the ids' shares draw the nucleus, here and in torch."""
    share = p[nucleus] / p[nucleus].sum()
    u = (share.cumsum(0) - share / 2)[None]

    ids, _, cut = triton_sample_token(logits, 1.0, u, top_p)
    torch_ids, _, _ = sample_token(make_distribution(logits, 1.0), u, top_p)

    assert ids[0].tolist() == nucleus
    assert torch_ids[0].tolist() == nucleus
    expected_cut = 1 - p[nucleus].sum().item()
    assert abs(cut.item() - expected_cut) < 1e-6


def test_a_row_that_is_not_finite_yields_ids_of_the_vocabulary():
    generator = draw("nan")
    logits = draw_rows(3, 101, torch.float32, generator)
    logits[0, 50] = torch.inf
    logits[1] = torch.nan
    half = torch.full((3, 1), 0.5)

    for uniforms, top_p in ((half, 1.0), (half, 0.9), (None, 1.0)):
        ids, logp, _ = triton_sample_token(logits, 1.0, uniforms, top_p)
        torch_distribution = make_distribution(logits, 1.0)
        torch_ids, torch_logp, _ = sample_token(torch_distribution, uniforms, top_p)

        check_row_that_is_not_finite(ids, logp)
        check_row_that_is_not_finite(torch_ids, torch_logp)


def check_row_that_is_not_finite(ids, logp):
    assert (ids >= 0).all()
    assert (ids < 101).all()
    assert not logp[:2].isfinite().any()
    assert logp[2].isfinite().all()


def test_no_rows():
    logits = torch.empty(0, 32)
    uniforms = torch.empty(0, 4)

    ids, logp, cut = triton_sample_token(logits, 1.0, uniforms)

    assert ids.shape == (0, 4)
    assert logp.shape == (0, 4)
    assert cut.shape == (0,)


@pytest.mark.parametrize("V", [33, 101])
def test_from_hidden_states(V):
    """Logits in rows that start at multiples of 16, from the head's weight as it is and in oneDNN's
    order.
    """
    generator = draw("head", V)
    hidden = torch.randn(5, 24, generator=generator)
    weight = torch.randn(V, 24, generator=generator)
    u = torch.rand(5, 2, generator=generator, dtype=torch.float64)

    for head in (weight, pack_weight(weight)):
        for uniforms in (u, None):
            ids, logp, _ = sample_from_hidden(
                hidden, head, 0.7, make_distribution, uniforms, backend="triton"
            )
            torch_ids, torch_logp, _ = sample_from_hidden(
                hidden, head, 0.7, make_distribution, uniforms, backend="torch"
            )
            assert torch.equal(ids, torch_ids), f"seed {SEED}"
            assert (logp - torch_logp).abs().max() <= 1e-5, f"seed {SEED}"
