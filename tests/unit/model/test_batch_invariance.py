"""model.batch_invariant: log-probs of sampler and trainer equal bit for bit, whatever stands beside
a row.
"""

import json

import numpy as np
import pytest
import torch
from helpers.tiny_world import FAMILIES, tiny_model, write_yaml

from recr1 import train
from recr1.data_types import Prompt
from recr1.kernels.cpu_linear import (
    Linear,
    multiply,
    multiply_into,
    pack_weight,
    packed_for_sampling,
)
from recr1.model.log_probs import compute_log_probs
from recr1.model.varlen_attention import AttentionBackend
from recr1.rl.packing import deduplicate, pack_rollouts
from recr1.sampling.generate import generate
from recr1.training.launch import run_guarded

# prompts, siblings, shortest and longest prompt, tokens, what all prompts begin with, tokens of a
# micro-batch
BATCHES = [
    (3, 4, 1, 20, 20, 0, 90),
    (8, 8, 3, 12, 12, 37, 4096),
    (5, 3, 60, 160, 40, 5, 700),
    (1, 1, 4, 5, 7, 0, 4096),
    (2, 2, 250, 260, 30, 0, 4096),
    (8, 1, 250, 260, 12, 0, 4096),
]


def drawn(model, prompts, group, low, high, new, common, seed=0):
    random = np.random.default_rng(seed)
    start = tuple(random.integers(394, size=common).tolist())
    questions = [
        Prompt(
            f"q{i}",
            i,
            "",
            start + tuple(random.integers(394, size=random.integers(low, high)).tolist()),
        )
        for i in range(prompts)
    ]
    return questions, random.random((prompts, group, new))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("family", [*FAMILIES, "odd widths"])
def test_sampler_and_trainer_give_the_same_bits(family, threads):
    """Odd widths and three threads: shares of rows end inside a vector."""
    before = torch.get_num_threads()
    differ = {True: 0, False: 0}
    torch.set_num_threads(threads)
    try:
        for exact in (True, False):
            model = tiny_model(seed=4, **FAMILIES.get(family, dict(intermediate_size=37)))
            model.set_backend(AttentionBackend(exact=exact))
            for *case, budget in BATCHES:
                prompts, u = drawn(model, *case)
                texts, _ = deduplicate(
                    generate(model, prompts, case[1], 1.0, case[4], frozenset(range(0, 394, 40)), u)
                )
                for batch in pack_rollouts(texts, budget):
                    differ[exact] += int(
                        (
                            compute_log_probs(model, batch, 1.0)[0].detach() != batch.sampler_logp
                        ).sum()
                    )
    finally:
        torch.set_num_threads(before)
    print(f"{family}, {threads} threads: {differ[False]} log-probs differ without the switch")
    assert differ[True] == 0


def test_a_texts_bits_do_not_depend_on_the_batch():
    model = tiny_model(seed=4)
    model.set_backend(AttentionBackend(exact=True))
    prompts, u = drawn(model, 9, 4, 30, 120, 40, 11)
    whole = generate(model, prompts, 4, 1.0, 40, frozenset([7]), u)
    for at in ([3], [8, 2, 5], list(range(9))[::-1]):
        for room in (None, 400):
            some = generate(
                model,
                [prompts[i] for i in at],
                4,
                1.0,
                40,
                frozenset([7]),
                u[at],
                max_cache_tokens=room,
            )
            assert [(r.ids, r.sampler_logp) for r in some] == [
                (whole[4 * i + s].ids, whole[4 * i + s].sampler_logp) for i in at for s in range(4)
            ]


@pytest.mark.parametrize("outputs", [2, 64, 65, 394, 4096, 4097])
def test_a_rows_product_does_not_depend_on_how_it_is_called(outputs):
    """Alone, beside any number of rows, packed or not, and written in slices, the last of which may
    be one column wide.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 160, generator=g)
    w = torch.randn(outputs, 160, generator=g)
    want = multiply(x, w)
    order = pack_weight(w)
    out = torch.zeros(500, outputs + 3)[:, :outputs]
    for n in (*range(1, 40), 63, 64, 65, 192, 320, 448, 499):
        for got in (multiply(x[:n], w), multiply(x[:n], order), multiply_into(out[:n], x[:n], w)):
            assert torch.equal(got, want[:n]), n


def test_a_whole_run_has_no_gap_at_all(tmp_path):
    config = write_yaml(tmp_path)
    assert (
        run_guarded(
            train.main, [config, "train.steps=4", "model.batch_invariant=true", "optimizer.lr=0.01"]
        )
        == 0
    )
    rows = [
        json.loads(line) for line in next(tmp_path.rglob("metrics.jsonl")).read_text().splitlines()
    ]
    assert len(rows) == 4
    assert all(row["sampling_logp_diff_max"] == 0.0 for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)


def test_where_it_cannot_hold_it_is_refused(tmp_path, capsys):
    assert (
        run_guarded(
            train.main,
            [write_yaml(tmp_path), "model.batch_invariant=true", "model.compute=bfloat16"],
        )
        == 2
    )
    assert "model.batch_invariant: needs float32 on a CPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "rows, inputs, outputs", [(1, 5, 3), (1, 64, 64), (2, 7, 1), (33, 64, 394), (300, 96, 17)]
)
def test_products_are_the_matrix_products(rows, inputs, outputs):
    """Every way they are called, values and gradients, against float64; strides that oneDNN has no
    fast loop for too.
    """
    g = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.randn(*shape, generator=g)
        for shape in ((rows, inputs), (outputs, inputs), (outputs,))
    )
    want = x.double() @ w.double().T
    padded = torch.zeros(outputs, inputs + 3)
    padded[:, :inputs] = w
    for some in (w, w.T.contiguous().T, padded[:, :inputs]):
        assert torch.allclose(multiply(x, some).double(), want, atol=1e-4)
    assert torch.equal(multiply(x, w), multiply(torch.cat([x, x + 1]), w)[:rows])
    out = torch.zeros(rows, outputs + 5)
    assert torch.equal(multiply_into(out[:, :outputs], x, w), multiply(x, w))
    assert not out[:, outputs:].any()
    assert torch.allclose(
        multiply(x[:1].expand(rows, -1), w).double(), want[:1].expand(rows, -1), atol=1e-4
    )

    layer = Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(w), layer.bias.copy_(b)
        with packed_for_sampling(layer, w) as head:
            assert torch.equal(layer(x), multiply(x, w, b))
            assert torch.equal(multiply(x, head), multiply(x, w))
    assert layer.packed is None
    leaf = x.clone().requires_grad_()
    oracle = torch.nn.Linear(inputs, outputs).double()
    oracle.load_state_dict(layer.state_dict())
    theirs = x.double().requires_grad_()
    for toward in (torch.randn(rows, outputs, generator=g), torch.ones(1).expand(rows, outputs)):
        ours = torch.autograd.grad(layer(leaf), [leaf, layer.weight, layer.bias], toward)
        for a, e in zip(
            ours,
            torch.autograd.grad(
                oracle(theirs), [theirs, oracle.weight, oracle.bias], toward.double()
            ),
        ):
            assert a.shape == e.shape
            assert torch.allclose(a.double(), e, atol=1e-3)


def test_a_float32_head_on_a_bfloat16_trunk():
    """Its log-probs are closer to the float32 head's own than bfloat16 logits', in sampler and
    trainer; its gradient reaches the bfloat16 weight.
    """
    model = tiny_model(seed=4, std=0.3, tie_word_embeddings=True).bfloat16()
    prompts, u = drawn(model, 3, 4, 5, 20, 12, 0)
    gaps = {}
    for wide in (True, False):
        model.set_backend(AttentionBackend(float32_head=wide))
        rollouts = generate(model, prompts, 4, 1.0, 12, frozenset(), u)
        [batch] = pack_rollouts(deduplicate(rollouts)[0], 4096)
        hidden = []
        hook = model.register_forward_hook(lambda *args: hidden.append(args[-1].detach().double()))
        logp = compute_log_probs(model, batch, 1.0)[0]
        hook.remove()
        logits = (
            hidden[0].index_select(0, batch.predict_from) @ model.head_weight.detach().double().T
        )
        want = logits.log_softmax(-1).gather(1, batch.target[:, None])[:, 0]
        gaps[wide] = (logp.detach() - want).abs().max().item()
        model.zero_grad()
        logp.sum().backward()
        assert model.model.embed_tokens.weight.grad.abs().max() > 0
        assert np.isfinite([x for r in rollouts for x in r.sampler_logp]).all()
    assert gaps[True] < 1e-5 < 1e-3 < gaps[False]
