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
EDGES = [0.0, 2.0**-53, 1 - 2.0**-53, 1.0]  # float64: the third becomes 1 in float32


def draw(*key):
    return torch.Generator().manual_seed(hash((SEED, *key)) % 2**63)


def rows(B, V, dtype, g, size=2.0):
    """Logits (B, V) in a workspace whose rows end in NaN."""
    workspace = torch.full((B, -(-V // 16) * 16), torch.nan, dtype=dtype)
    workspace[:, :V] = size * torch.randn(B, V, generator=g)
    return workspace[:, :V]


def distribution(logits, temperature, top_p):
    """float64: p (B, V), 0 outside the nucleus and not renormalized; log p of the whole; what p
    lacks of 1 (B,).
    """
    log_p = (logits.double() / temperature).log_softmax(-1)
    p = log_p.exp()
    kept = torch.zeros_like(p)
    for row, order, out in zip(p, p.argsort(-1, descending=True), kept):
        n = next(
            (i for i, mass in enumerate(row[order].cumsum(0).tolist(), 1) if mass >= top_p),
            len(row),
        )
        inside = row >= row[order[n - 1]]
        out[inside] = row[inside]
    return kept, log_p, 1 - kept.sum(-1)


def between(ids, u, p, slack):
    """Each u lies between the sums before and up to its id, as a share of all that is kept; and the
    id is possible.
    """
    cdf = p.cumsum(-1) / p.sum(-1, keepdim=True)
    after = cdf.gather(-1, ids)
    mine = p.gather(-1, ids)
    before = after - mine / p.sum(-1, keepdim=True)
    assert (mine > 0).all(), f"an id of probability 0, seed {SEED}"
    assert (u >= before - slack).all() and (u <= after + slack).all(), f"seed {SEED}"


@pytest.mark.parametrize(
    "dtype, top_p",
    [(torch.float32, 1.0), (torch.float32, 0.8), (torch.bfloat16, 1.0), (torch.bfloat16, 0.3)],
)
@pytest.mark.parametrize("B, K, V", SIZES)
def test_inverse_cdf(B, K, V, dtype, top_p):
    temperature = 0.7 if V % 3 else 1.0
    g = draw(B, K, V, dtype, top_p)
    logits = rows(B, V, dtype, g)
    p, log_p, cut = distribution(logits, temperature, top_p)
    # a nucleus whose edge lies within rounding of top_p may hold one id more in float32: rather
    # another top_p
    while top_p < 1 and V > 2 and ((1 - cut - top_p).abs() < 1e-5).any():
        top_p += 1e-3
        p, log_p, cut = distribution(logits, temperature, top_p)
    u = torch.rand(B, K, generator=g, dtype=torch.float64)
    u.view(-1)[: len(EDGES)] = torch.tensor(EDGES, dtype=torch.float64)[: B * K]
    ids, logp, left_out = triton_sample_token(logits, temperature, u, top_p)
    between(ids, u, p, 1e-5)
    assert ids.shape == logp.shape == (B, K)
    assert ids.dtype == torch.int64
    assert logp.dtype == torch.float32
    assert (logp - log_p.gather(-1, ids)).abs().max() <= 1e-5 * log_p.abs().max()
    assert (left_out - cut).abs().max() <= 1e-5
    assert top_p < 1 or not left_out.any()
    theirs, their_logp, their_cut = sample_token(make_distribution(logits, temperature), u, top_p)
    between(theirs, u, p, 1e-5)
    assert (their_cut - cut).abs().max() <= 1e-5
    same = ids == theirs
    torch.testing.assert_close(logp[same], their_logp[same], rtol=1e-5, atol=1e-5)
    # the trainer's kernel gives the same row the same bits
    column = torch.empty(B)
    norm = torch.empty(B)
    logprob.compute_statistics(
        logits, ids[:, 0].contiguous(), temperature, column, torch.empty(B), norm
    )
    assert torch.equal(logp[:, 0], column)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, K, V", SIZES)
def test_greedy_is_argmax_and_the_lowest_of_a_tie(B, K, V, dtype):
    logits = rows(B, V, dtype, draw("greedy", B, V))
    logits[0, [V // 2, V - 1]] = 50.0
    ids, logp, cut = triton_sample_token(logits, 1.3)
    assert torch.equal(ids[:, 0], logits.argmax(-1))
    assert ids[0] == V // 2
    assert ids.shape == (B, 1)
    assert not cut.any()
    assert (logp - (logits.double() / 1.3).log_softmax(-1).gather(-1, ids)).abs().max() <= 1e-5


@pytest.mark.parametrize("top_p", [1.0, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_uniform_yields_an_id_of_probability_zero(dtype, top_p):
    """Also where whole tiles have none, the first and the last one among them."""
    V = 26_000
    logits = rows(1, V, dtype, draw("zero"))
    logits[:, :9000] = logits[:, 15_000:17_000] = logits[:, 17_500:] = -1e4
    u = torch.tensor([[*EDGES, 0.5, 1 - 2.0**-25]], dtype=torch.float64)
    ids, logp, _ = triton_sample_token(logits, 1.0, u, top_p)
    assert (logits.gather(-1, ids) > -1e3).all()
    assert logp.min() > -50
    if top_p == 1:
        assert ids[0, 0] == ids[0, 1] == 9000
        assert ids[0, 3] == 17_499
        assert ids[0, 2] == 17_499


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
    for top_p, kept in ((float(p[3]) + 0.01, list(range(3, 12))), (float(p[3]) - 0.01, [3])):
        share = p[kept] / p[kept].sum()
        u = (share.cumsum(0) - share / 2)[None]
        ids, _, cut = triton_sample_token(logits, 1.0, u, top_p)
        assert (
            ids[0].tolist()
            == kept
            == sample_token(make_distribution(logits, 1.0), u, top_p)[0][0].tolist()
        )
        assert abs(cut.item() - (1 - p[kept].sum().item())) < 1e-6


def test_a_row_that_is_not_finite_yields_ids_of_the_vocabulary():
    logits = rows(3, 101, torch.float32, draw("nan"))
    logits[0, 50], logits[1] = torch.inf, torch.nan
    for uniforms, top_p in (
        (torch.full((3, 1), 0.5), 1.0),
        (torch.full((3, 1), 0.5), 0.9),
        (None, 1.0),
    ):
        for ids, logp, _ in (
            triton_sample_token(logits, 1.0, uniforms, top_p),
            sample_token(make_distribution(logits, 1.0), uniforms, top_p),
        ):
            assert ((ids >= 0) & (ids < 101)).all()
            assert not logp[:2].isfinite().any()
            assert logp[2].isfinite().all()


def test_no_rows():
    assert [x.shape for x in triton_sample_token(torch.empty(0, 32), 1.0, torch.empty(0, 4))] == [
        (0, 4),
        (0, 4),
        (0,),
    ]


@pytest.mark.parametrize("V", [33, 101])
def test_from_hidden_states(V):
    """Logits in rows that start at multiples of 16, from the head's weight as it is and in oneDNN's
    order.
    """
    g = draw("head", V)
    hidden = torch.randn(5, 24, generator=g)
    weight = torch.randn(V, 24, generator=g)
    u = torch.rand(5, 2, generator=g, dtype=torch.float64)
    for head in (weight, pack_weight(weight)):
        for uniforms in (u, None):
            ours, theirs = (
                sample_from_hidden(hidden, head, 0.7, make_distribution, uniforms, backend=backend)
                for backend in ("triton", "torch")
            )
            assert torch.equal(ours[0], theirs[0]) and (ours[1] - theirs[1]).abs().max() <= 1e-5, (
                f"seed {SEED}"
            )
