"""model.batch_invariant: log-probs of sampler and trainer equal bit for bit, whatever stands beside
a row.
"""

import contextlib

import numpy as np
import pytest
import torch
from helpers.tiny_world import FAMILIES, jsonl, tiny_model, write_yaml

from recr1 import train
from recr1.data_types import Prompt
from recr1.kernels import cpu_linear
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
STOPS = frozenset(range(0, 394, 40))
# which of nine prompts are drawn again, in which order
SELECTIONS = [
    [3],
    [8, 2, 5],
    [8, 7, 6, 5, 4, 3, 2, 1, 0],
]
ROW_COUNTS = [*range(1, 40), 63, 64, 65, 192, 320, 448, 499]
# rows, inputs, outputs
PRODUCTS = [
    (1, 5, 3),
    (1, 64, 64),
    (2, 7, 1),
    (33, 64, 394),
    (300, 96, 17),
]


def draw_ids(random, length):
    """Draw the ids of a text."""
    return tuple(random.integers(394, size=length).tolist())


def draw_prompts(prompt_count, group_size, low, high, new_tokens, common):
    """Draw prompts and the uniforms (prompts, group_size, new_tokens) to sample with."""
    random = np.random.default_rng(0)
    start = draw_ids(random, common)
    prompts = []
    for i in range(prompt_count):
        length = random.integers(low, high)
        ids = start + draw_ids(random, length)
        prompts.append(Prompt(f"q{i}", i, "", ids))
    uniforms = random.random((prompt_count, group_size, new_tokens))
    return prompts, uniforms


@contextlib.contextmanager
def use_threads(count):
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def count_differences(model):
    """Count the log-probs of all BATCHES that differ between sampler and trainer."""
    differences = 0
    for *case, budget in BATCHES:
        prompts, uniforms = draw_prompts(*case)
        _, group_size, new_tokens = uniforms.shape
        rollouts = generate(model, prompts, group_size, 1.0, new_tokens, STOPS, uniforms)
        texts, _ = deduplicate(rollouts)
        for batch in pack_rollouts(texts, budget):
            logp, _ = compute_log_probs(model, batch, 1.0)
            differs = logp.detach() != batch.sampler_logp
            differences += int(differs.sum())
    return differences


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("family", [*FAMILIES, "odd widths"])
def test_sampler_and_trainer_give_the_same_bits(family, threads):
    """Odd widths and three threads: shares of rows end inside a vector."""
    settings = FAMILIES.get(family, dict(intermediate_size=37))
    model = tiny_model(seed=4, **settings)

    with use_threads(threads):
        model.set_backend(AttentionBackend(exact=True))
        with_switch = count_differences(model)
        model.set_backend(AttentionBackend(exact=False))
        without_switch = count_differences(model)

    print(f"{family}, {threads} threads: {without_switch} log-probs differ without the switch")
    assert with_switch == 0


def test_a_texts_bits_do_not_depend_on_the_batch():
    model = tiny_model(seed=4)
    model.set_backend(AttentionBackend(exact=True))
    prompts, uniforms = draw_prompts(9, 4, 30, 120, 40, 11)
    stops = frozenset([7])
    rollouts = generate(model, prompts, 4, 1.0, 40, stops, uniforms)
    texts = [(r.ids, r.sampler_logp) for r in rollouts]

    for indices in SELECTIONS:
        selected = [prompts[i] for i in indices]
        want = []
        for i in indices:
            want += texts[4 * i : 4 * i + 4]
        for room in (None, 400):
            fewer = generate(
                model,
                selected,
                4,
                1.0,
                40,
                stops,
                uniforms[indices],
                max_cache_tokens=room,
            )
            actual = [(r.ids, r.sampler_logp) for r in fewer]
            assert actual == want


@pytest.mark.parametrize("outputs", [2, 64, 65, 394, 4096, 4097])
def test_a_rows_product_does_not_depend_on_how_it_is_called(outputs):
    """Alone, beside any number of rows, packed or not, and written in slices, the last of which may
    be one column wide.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 160, generator=generator)
    weight = torch.randn(outputs, 160, generator=generator)
    packed = pack_weight(weight)
    wider = torch.zeros(500, outputs + 3)
    out = wider[:, :outputs]

    want = multiply(x, weight)

    for n in ROW_COUNTS:
        product = multiply(x[:n], weight)
        packed_product = multiply(x[:n], packed)
        written = multiply_into(out[:n], x[:n], weight)
        assert torch.equal(product, want[:n]), n
        assert torch.equal(packed_product, want[:n]), n
        assert torch.equal(written, want[:n]), n


def test_a_whole_run_has_no_gap_at_all(tmp_path):
    config = write_yaml(tmp_path)
    overrides = ["train.steps=4", "model.batch_invariant=true", "optimizer.lr=0.01"]

    status = run_guarded(train.main, [config, *overrides])

    assert status == 0
    metrics = next(tmp_path.rglob("metrics.jsonl"))
    rows = jsonl(metrics)
    assert len(rows) == 4
    for row in rows:
        assert row["sampling_logp_diff_max"] == 0.0
    assert any(row["grad_norm"] > 0 for row in rows)


def test_where_it_cannot_hold_it_is_refused(tmp_path, capsys):
    config = write_yaml(tmp_path)
    overrides = ["model.batch_invariant=true", "model.compute=bfloat16"]

    status = run_guarded(train.main, [config, *overrides])

    assert status == 2
    assert "model.batch_invariant: needs float32 on a CPU" in capsys.readouterr().err


def draw_product(rows, inputs, outputs):
    """Draw x (rows, inputs), weight (outputs, inputs) and bias (outputs,), and the generator."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    return x, weight, bias, generator


def check_products(x, weight):
    """Check every way that products are called, against float64.

    Strides that oneDNN has no fast loop for too.
    """
    rows = len(x)
    outputs, inputs = weight.shape
    want = x.double() @ weight.double().T
    product = multiply(x, weight)
    padded = torch.zeros(outputs, inputs + 3)
    padded[:, :inputs] = weight
    for strided in (weight, weight.T.contiguous().T, padded[:, :inputs]):
        actual = multiply(x, strided)
        assert torch.allclose(actual.double(), want, atol=1e-4)

    more_rows = torch.cat([x, x + 1])
    more_products = multiply(more_rows, weight)
    assert torch.equal(product, more_products[:rows])

    out = torch.zeros(rows, outputs + 5)
    written = multiply_into(out[:, :outputs], x, weight)
    assert torch.equal(written, product)
    assert not out[:, outputs:].any()

    repeated_row = x[:1].expand(rows, -1)
    repeated_want = want[:1].expand(rows, -1)
    repeated = multiply(repeated_row, weight)
    assert torch.allclose(repeated.double(), repeated_want, atol=1e-4)


def make_layer(weight, bias):
    """Make our Linear with these weights."""
    outputs, inputs = weight.shape
    layer = Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def check_packed_layer(layer, x, weight, bias):
    """Check that packing for sampling changes no bit, and is undone."""
    want = multiply(x, weight, bias)
    want_head = multiply(x, weight)
    with torch.no_grad():
        with packed_for_sampling(layer, weight) as head:
            out = layer(x)
            head_out = multiply(x, head)
    assert torch.equal(out, want)
    assert torch.equal(head_out, want_head)
    assert layer.packed is None


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_its_own_is_packed_once(tied, monkeypatch):
    """Its Linear is never called in sampling: `packed_for_sampling` gives its rows."""
    model = tiny_model(tie_word_embeddings=tied, reachable=390)
    packed_shapes = []

    def pack_and_record(weight):
        packed_shapes.append(tuple(weight.shape))
        return pack_weight(weight)

    monkeypatch.setattr(cpu_linear, "pack_weight", pack_and_record)
    with torch.no_grad(), packed_for_sampling(model, model.head_weight):
        pass

    width = model.config.hidden_size
    heads = [shape for shape in packed_shapes if shape[0] >= 390 and shape[1] == width]
    assert heads == [(390, width)]
    assert len(packed_shapes) == 1 + 7 * model.config.num_hidden_layers


def check_layer_gradients(layer, x, toward):
    """Check the gradients of inputs, weight and bias against torch's layer in float64."""
    outputs, inputs = layer.weight.shape
    want_layer = torch.nn.Linear(inputs, outputs).double()
    want_layer.load_state_dict(layer.state_dict())
    ours = x.clone().requires_grad_()
    theirs = x.double().requires_grad_()

    leaves = [ours, layer.weight, layer.bias]
    want_leaves = [theirs, want_layer.weight, want_layer.bias]
    out = layer(ours)
    want_out = want_layer(theirs)

    actual = torch.autograd.grad(out, leaves, toward)
    want = torch.autograd.grad(want_out, want_leaves, toward.double())

    for a, b in zip(actual, want):
        assert a.shape == b.shape
        assert torch.allclose(a.double(), b, atol=1e-3)


@pytest.mark.parametrize("rows, inputs, outputs", PRODUCTS)
def test_products_are_the_matrix_products(rows, inputs, outputs):
    """Every way they are called, values and gradients, against float64."""
    x, weight, bias, generator = draw_product(rows, inputs, outputs)
    check_products(x, weight)

    layer = make_layer(weight, bias)
    check_packed_layer(layer, x, weight, bias)

    random_toward = torch.randn(rows, outputs, generator=generator)
    expanded_toward = torch.ones(1).expand(rows, outputs)
    for toward in (random_toward, expanded_toward):
        check_layer_gradients(layer, x, toward)


def compute_float64_log_probs(model, batch, hidden):
    """Compute the log-probs of a micro-batch from its hidden states (tokens, C) in float64."""
    weight = model.head_weight.detach().double()
    rows = hidden.double().index_select(0, batch.predict_from)
    logp = (rows @ weight.T).log_softmax(-1)
    return logp.gather(1, batch.target[:, None])[:, 0]


def test_a_float32_head_on_a_bfloat16_trunk():
    """Its log-probs are closer to the float32 head's own than bfloat16 logits', in sampler and
    trainer; its gradient reaches the bfloat16 weight.
    """
    model = tiny_model(seed=4, std=0.3, tie_word_embeddings=True).bfloat16()
    prompts, uniforms = draw_prompts(3, 4, 5, 20, 12, 0)
    no_stops = frozenset()
    gaps = {}
    for float32_head in (True, False):
        model.set_backend(AttentionBackend(float32_head=float32_head))
        rollouts = generate(model, prompts, 4, 1.0, 12, no_stops, uniforms)
        texts, _ = deduplicate(rollouts)
        [batch] = pack_rollouts(texts, 4096)
        outputs = []

        def record(module, inputs, output):
            outputs.append(output.detach())

        hook = model.register_forward_hook(record)
        logp, _ = compute_log_probs(model, batch, 1.0)
        hook.remove()
        model.zero_grad()
        logp.sum().backward()

        want = compute_float64_log_probs(model, batch, outputs[0])
        difference = logp.detach() - want
        gaps[float32_head] = difference.abs().max().item()
        grad = model.model.embed_tokens.weight.grad
        assert grad.abs().max() > 0
        for rollout in rollouts:
            assert np.isfinite(rollout.sampler_logp).all()

    assert gaps[True] < 1e-5
    assert gaps[False] > 1e-3
