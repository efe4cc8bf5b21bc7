"""Our decoder against transformers' own Qwen2, Qwen3 and Llama, from memory and in both directions
through a folder.
"""

import pytest
import torch
from helpers.tiny_world import FAMILIES, oracle, save, tiny_model, write_policy
from transformers import AutoModelForCausalLM

from recr1.model.hf_config import read_config
from recr1.model.hf_weights import load_model
from recr1.model.packed_attention import PackedAttention
from recr1.model.rope import RopeScaling, compute_inv_freq

SHAPES = {
    "gqa": dict(),
    "tied, one kv head": dict(tie_word_embeddings=True, num_key_value_heads=1),
    "5 heads, 1 kv": dict(num_attention_heads=5, num_key_value_heads=1, hidden_size=40, head_dim=8),
    "5 heads, 5 kv, wider than the model": dict(
        num_attention_heads=5,
        num_key_value_heads=5,
        hidden_size=40,
        head_dim=16,
        tie_word_embeddings=True,
    ),
    "rope 1e6": dict(rope_theta=1e6, num_hidden_layers=3),
    "large eps, 6 heads, 3 kv": dict(
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        rms_norm_eps=1e-2,
        tie_word_embeddings=True,
    ),
    "small head, 9 heads, untied": dict(
        num_attention_heads=9,
        num_key_value_heads=3,
        hidden_size=72,
        head_dim=6,
        tie_word_embeddings=False,
    ),
    "rope as it was first trained": dict(rope_scaling=None),
    "rope of Llama 3.2, theta 500000": dict(
        rope_theta=5e5, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 64), head_dim=24
    ),
}
LENGTHS = [1, 37, 5, 90, 12]


def draw_prompts(seed, lengths=LENGTHS, vocab=394):
    """Draw one prompt (length,) per length."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for length in lengths:
        sequence = torch.randint(vocab, (length,), generator=generator)
        sequences.append(sequence)
    return sequences


@torch.no_grad()
def compute_our_logits(model, sequences):
    """Compute the logits of one packed forward: one (length, V) per sequence."""
    lengths = [len(s) for s in sequences]
    no_completions = torch.zeros(0, dtype=torch.int64)
    attention = PackedAttention(torch.tensor(lengths), no_completions, no_completions)
    positions = torch.cat([torch.arange(length) for length in lengths])
    hidden = model(torch.cat(sequences), positions, attention)
    logits = hidden @ model.head_weight.T
    return list(logits.split(lengths))


@torch.no_grad()
def compute_their_logits(model, sequences):
    """Compute the logits of transformers' model, sequence by sequence."""
    logits = []
    for sequence in sequences:
        output = model(input_ids=sequence[None])
        logits.append(output.logits[0])
    return logits


def measure_gap(ours, theirs):
    """Measure the largest difference of two lists of tensors."""
    differences = []
    for a, b in zip(ours, theirs, strict=True):
        difference = (a - b).abs().max()
        assert not difference.isnan()
        differences.append(difference.item())
    return max(differences)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, shape, tmp_path):
    """Theirs in memory, our folder read by them, and their folder read by us."""
    model = tiny_model(seed=len(shape), **FAMILIES[family] | SHAPES[shape])
    hf_model = oracle(model)
    batch = draw_prompts(1)
    ours = str(tmp_path / "ours")
    theirs = str(tmp_path / "theirs")
    want = compute_their_logits(hf_model, batch)
    assert torch.cat(want).std() > 0.3  # else a wrong model could pass

    logits = compute_our_logits(model, batch)
    difference = measure_gap(logits, want)
    print(f"largest logits difference, {family}, {shape}: {difference:.2e}")
    assert difference <= 1e-4

    save(model, ours)
    reloaded = AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32)
    logits = compute_their_logits(reloaded, batch)
    assert type(reloaded) is type(hf_model)
    assert measure_gap(logits, want) <= 1e-5

    hf_model.save_pretrained(theirs)
    loaded = load_model(theirs)
    logits = compute_our_logits(loaded, batch)
    assert read_config(theirs) == model.config
    assert read_config(ours) == model.config
    assert measure_gap(logits, want) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_at_3000_positions(family):
    """Where float32 angles computed in another order are already 1e-4 apart."""
    model = tiny_model(4, **FAMILIES[family], max_position_embeddings=4096)
    hf_model = oracle(model)
    batch = draw_prompts(7, [3000])

    ours = compute_our_logits(model, batch)
    theirs = compute_their_logits(hf_model, batch)

    difference = measure_gap(ours, theirs)
    print(f"largest logits difference at 3000 positions, {family}: {difference:.2e}")
    assert difference <= 1e-5


def compute_rms_error(logits, truth):
    """Compute the root mean square of what the logits are off by."""
    difference = torch.cat(logits) - torch.cat(truth)
    mean_square = difference.pow(2).mean()
    return mean_square.sqrt().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_16_bits_lose_no_more_than_in_transformers(family):
    model = tiny_model(4, **FAMILIES[family])
    batch = draw_prompts(7)
    truth = compute_our_logits(model, batch)
    model.bfloat16()
    hf_model = oracle(model)

    our_logits = compute_our_logits(model, batch)
    their_logits = compute_their_logits(hf_model, batch)

    ours = compute_rms_error(our_logits, truth)
    theirs = compute_rms_error(their_logits, truth)
    print(
        f"bfloat16 logits, {family}: root mean square error {ours:.4f}, transformers' {theirs:.4f}"
    )
    assert 0 < ours <= 1.2 * theirs


def test_scaled_rope_slows_the_slow_pairs_only():
    """And the scaled test models hold all three kinds of pairs: without scaling their logits would
    be other ones.
    """
    llama = FAMILIES["llama"]
    scaled = tiny_model(**llama)
    unscaled = tiny_model(**llama | dict(rope_scaling=None))
    batch = draw_prompts(6)

    scaled_freq = compute_inv_freq(scaled.config, "cpu", torch.float64)
    unscaled_freq = compute_inv_freq(unscaled.config, "cpu", torch.float64)
    scaled_logits = compute_our_logits(scaled, batch)
    unscaled_logits = compute_our_logits(unscaled, batch)

    ratio = unscaled_freq / scaled_freq
    assert ratio[0] == 1
    assert 1 < ratio[1] < 8
    assert (ratio[2:] - 8).abs().max() < 1e-12
    assert measure_gap(scaled_logits, unscaled_logits) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_packed_together_do_not_see_each_other(family):
    model = tiny_model(**FAMILIES[family])
    batch = draw_prompts(2)

    together = compute_our_logits(model, batch)
    alone = []
    for prompt in batch:
        alone += compute_our_logits(model, [prompt])

    assert measure_gap(together, alone) <= 1e-5


def test_reachable_ids_are_the_first_rows_of_the_logits(tmp_path):
    folder = write_policy(tmp_path)
    batch = draw_prompts(3)
    model = load_model(folder)
    reachable_model = load_model(folder, reachable=300)

    logits = compute_our_logits(model, batch)
    reachable_logits = compute_our_logits(reachable_model, batch)

    assert reachable_logits[0].shape[1] == 300
    want = [x[:, :300] for x in logits]
    assert measure_gap(reachable_logits, want) <= 1e-6
