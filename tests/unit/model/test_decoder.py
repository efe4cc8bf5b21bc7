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


def prompts(seed, lengths=LENGTHS, vocab=394):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def our_logits(model, sequences):
    """Of one packed forward: one (length, V) per sequence."""
    lengths = torch.tensor([len(s) for s in sequences])
    none = torch.zeros(0, dtype=torch.int64)
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    hidden = model(torch.cat(sequences), positions, PackedAttention(lengths, none, none))
    return (hidden @ model.head_weight.T).split(lengths.tolist())


@torch.no_grad()
def their_logits(model, sequences):
    return [model(input_ids=s[None]).logits[0] for s in sequences]


def gap(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, shape, tmp_path):
    """Theirs in memory, our folder read by them, and their folder read by us."""
    model = tiny_model(seed=len(shape), **FAMILIES[family] | SHAPES[shape])
    theirs = oracle(model)
    batch = prompts(1)
    want = their_logits(theirs, batch)
    assert torch.cat(list(want)).std() > 0.3  # else a wrong model could pass
    difference = gap(our_logits(model, batch), want)
    print(f"largest logits difference, {family}, {shape}: {difference:.2e}")
    assert difference <= 1e-4

    save(model, tmp_path / "ours")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert type(read) is type(theirs)
    assert gap(their_logits(read, batch), want) <= 1e-5

    theirs.save_pretrained(tmp_path / "theirs")
    assert (
        read_config(str(tmp_path / "theirs")) == read_config(str(tmp_path / "ours")) == model.config
    )
    assert gap(our_logits(load_model(str(tmp_path / "theirs")), batch), want) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_at_3000_positions(family):
    """Where float32 angles computed in another order are already 1e-4 apart."""
    model = tiny_model(4, **FAMILIES[family], max_position_embeddings=4096)
    batch = prompts(7, [3000])
    difference = gap(our_logits(model, batch), their_logits(oracle(model), batch))
    print(f"largest logits difference at 3000 positions, {family}: {difference:.2e}")
    assert difference <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_16_bits_lose_no_more_than_in_transformers(family):
    model = tiny_model(4, **FAMILIES[family])
    batch = prompts(7)
    truth = torch.cat(our_logits(model, batch))
    model.bfloat16()
    ours, theirs = (
        (torch.cat(list(x)) - truth).pow(2).mean().sqrt().item()
        for x in (our_logits(model, batch), their_logits(oracle(model), batch))
    )
    print(
        f"bfloat16 logits, {family}: root mean square error {ours:.4f}, transformers' {theirs:.4f}"
    )
    assert 0 < ours <= 1.2 * theirs


def test_scaled_rope_slows_the_slow_pairs_only():
    """And the scaled test models hold all three kinds of pairs: without scaling their logits would
    be other ones.
    """
    model = tiny_model(**FAMILIES["llama"])
    plain, scaled = (
        compute_inv_freq(tiny_model(**FAMILIES["llama"] | more).config, "cpu", torch.float64)
        for more in (dict(rope_scaling=None), {})
    )
    ratio = plain / scaled
    assert ratio[0] == 1
    assert 1 < ratio[1] < 8
    assert (ratio[2:] - 8).abs().max() < 1e-12
    batch = prompts(6)
    unscaled = tiny_model(**FAMILIES["llama"] | dict(rope_scaling=None))
    assert gap(our_logits(model, batch), our_logits(unscaled, batch)) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_packed_together_do_not_see_each_other(family):
    model = tiny_model(**FAMILIES[family])
    batch = prompts(2)
    alone = [our_logits(model, [s])[0] for s in batch]
    assert gap(our_logits(model, batch), alone) <= 1e-5


def test_reachable_ids_are_the_first_rows_of_the_logits(tmp_path):
    write_policy(tmp_path)
    batch = prompts(3)
    full = our_logits(load_model(str(tmp_path)), batch)
    cut = our_logits(load_model(str(tmp_path), reachable=300), batch)
    assert cut[0].shape[1] == 300
    assert gap(cut, [x[:, :300] for x in full]) <= 1e-6
