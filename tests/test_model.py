"""Our decoder against transformers' Qwen2ForCausalLM, in both directions through a folder; and what a bad folder is told."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from recr1.attention import PackedAttention
from recr1.weights import ModelFolderError, load_model, load_tokenizer, read_config, save_model, stop_ids
from tiny import oracle, tiny_model, tiny_tokenizer, write_policy

SHAPES = {
    "gqa": dict(),
    "tied, one kv head": dict(tie_word_embeddings=True, num_key_value_heads=1),
    "5 heads, 1 kv": dict(num_attention_heads=5, num_key_value_heads=1, hidden_size=40, head_dim=8),
    "5 heads, 5 kv, wider than the model": dict(num_attention_heads=5, num_key_value_heads=5, hidden_size=32, head_dim=16, tie_word_embeddings=True),
    "rope 1e6": dict(rope_theta=1e6, num_hidden_layers=3),
    "large eps, 6 heads, 3 kv": dict(num_attention_heads=6, num_key_value_heads=3, head_dim=8, rms_norm_eps=1e-2, tie_word_embeddings=True, rope_theta=1e6),
    "head smaller than hidden/heads": dict(head_dim=6, intermediate_size=40),
}
LENGTHS = [1, 37, 5, 90, 12]


def prompts(seed, lengths=LENGTHS, vocab=394):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def our_logits(model, sequences):
    """Of one packed forward: one (length, V) per sequence."""
    lengths, none = torch.tensor([len(s) for s in sequences]), torch.zeros(0, dtype=torch.int64)
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    hidden = model(torch.cat(sequences), positions, PackedAttention(lengths, none, none))
    return (hidden @ model.head_weight.T).split(lengths.tolist())


@torch.no_grad()
def their_logits(model, sequences):
    return [model(input_ids=s[None]).logits[0] for s in sequences]


def gap(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(shape, tmp_path):
    """Theirs in memory, our folder read by them, and their folder read by us."""
    model = tiny_model(seed=len(shape), **SHAPES[shape])
    theirs, batch = oracle(model), prompts(1)
    want = their_logits(theirs, batch)
    assert torch.cat(list(want)).std() > 0.3                                   # else a wrong model could pass
    difference = gap(our_logits(model, batch), want)
    print(f"largest logits difference, {shape}: {difference:.2e}")
    assert difference <= 1e-4

    save_model(model, tiny_tokenizer(), frozenset([5]), str(tmp_path / "ours"))
    assert gap(their_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32), batch), want) <= 1e-5

    theirs.save_pretrained(tmp_path / "theirs")
    assert read_config(str(tmp_path / "theirs")) == model.config
    assert gap(our_logits(load_model(str(tmp_path / "theirs")), batch), want) <= 1e-4


def test_prompts_packed_together_do_not_see_each_other():
    model, batch = tiny_model(), prompts(2)
    alone = [our_logits(model, [s])[0] for s in batch]
    assert gap(our_logits(model, batch), alone) <= 1e-5


def test_reachable_ids_are_the_first_rows_of_the_logits(tmp_path):
    write_policy(tmp_path)
    batch = prompts(3)
    full, cut = our_logits(load_model(str(tmp_path)), batch), our_logits(load_model(str(tmp_path), reachable=300), batch)
    assert cut[0].shape[1] == 300
    assert gap(cut, [x[:, :300] for x in full]) <= 1e-6


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_saved_loaded_and_saved_again_is_byte_equal(tied, tmp_path):
    model, tokenizer, stops = tiny_model(tie_word_embeddings=tied), tiny_tokenizer(), frozenset([7, 3])
    one, two = tmp_path / "one", tmp_path / "two"
    save_model(model, tokenizer, stops, str(one))
    save_model(load_model(str(one)), load_tokenizer(str(one)), stop_ids(str(one), tokenizer) - {tokenizer.eos_token_id}, str(two))
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert ("lm_head.weight" in load_file(one / "model.safetensors")) is not tied
    assert load_tokenizer(str(one))("find: red lamp")["input_ids"] == tokenizer("find: red lamp")["input_ids"]


def test_a_tied_folder_with_a_second_copy_of_the_head_loads(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    save_model(model, tiny_tokenizer(), frozenset([5]), str(tmp_path))
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    assert gap(our_logits(load_model(str(tmp_path)), prompts(4)), our_logits(model, prompts(4))) == 0


def test_16_bit_weights_are_widened(tmp_path):
    oracle(tiny_model()).to(torch.bfloat16).save_pretrained(tmp_path)
    model, theirs = load_model(str(tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert gap(our_logits(model, prompts(5)), their_logits(theirs, prompts(5))) <= 1e-4


def test_every_stop_id_is_found(tmp_path):
    tokenizer = tiny_tokenizer()
    save_model(tiny_model(), tokenizer, frozenset([9, 4]), str(tmp_path))
    assert stop_ids(str(tmp_path), tokenizer) == {9, 4, tokenizer.eos_token_id}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 11}')
    assert stop_ids(str(tmp_path), tokenizer) == {11, tokenizer.eos_token_id}
    tokenizer.eos_token = None
    assert stop_ids(str(tmp_path), tokenizer) == {11}
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ModelFolderError, match="EOS"):
        stop_ids(str(tmp_path), tokenizer)


def edit(**changes):
    """config.json with these keys set; None: the key left out."""
    def change(folder):
        raw = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return change


def tensors(change):
    def apply(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")
    return apply


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def shorten(state):
    state["model.norm.weight"] = state["model.norm.weight"][1:].clone()


BAD = {   # what was done to the folder: how, the file that must be named, the cause
    "no config": (lambda f: (f / "config.json").unlink(), "config.json", "no such file"),
    "config not JSON": (lambda f: (f / "config.json").write_text('{"a": '), "config.json", "not JSON"),
    "config not an object": (lambda f: (f / "config.json").write_text("[]"), "config.json", ""),
    "other architecture": (edit(architectures=["LlamaForCausalLM"]), "config.json", "LlamaForCausalLM"),
    "no architecture": (edit(architectures=None), "config.json", "None"),
    "scaled rope": (edit(rope_scaling=dict(type="yarn", factor=4.0)), "config.json", "rope"),
    "sliding window": (edit(use_sliding_window=True), "config.json", "sliding"),
    "other activation": (edit(hidden_act="gelu"), "config.json", "silu"),
    "key missing": (edit(intermediate_size=None), "config.json", "intermediate_size"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors", "no such file"),
    "torn weights": (truncate, "model.safetensors", "safetensors"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors", "safetensors"),
    "tensor of another shape": (tensors(shorten), "model.safetensors", "model.norm.weight: expected (48,), found (47,)"),
    "tensor missing": (tensors(lambda s: s.pop("model.layers.1.self_attn.q_proj.bias")), "model.safetensors", "model.layers.1.self_attn.q_proj.bias"),
    "tensor too many": (tensors(lambda s: s.update(extra=torch.ones(1))), "model.safetensors", "extra"),
    "untied head missing": (tensors(lambda s: s.pop("lm_head.weight")), "model.safetensors", "lm_head.weight"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_folder_is_refused_by_file_and_cause(what, tmp_path):
    write_policy(tmp_path)
    spoil, file, cause = BAD[what]
    spoil(tmp_path)
    with pytest.raises(ModelFolderError) as error:
        load_model(str(tmp_path))
    assert str(tmp_path / file) in str(error.value) and cause in str(error.value)


def test_a_folder_without_tokenizer_or_chat_template_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    save_model(tiny_model(), tokenizer, frozenset([5]), str(tmp_path))
    with pytest.raises(ModelFolderError, match=f"{tmp_path}.*chat template"):
        load_tokenizer(str(tmp_path))
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelFolderError, match=f"{tmp_path}.*tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ModelFolderError, match="config.json: no such file"):
        load_tokenizer(str(tmp_path / "nowhere"))
