"""Model folders: transformers' config classes and loaders are the oracle; what a bad folder is
told; the hub's cache without a network.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_world import (
    FAMILIES,
    oracle,
    save,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    write_policy,
)
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from test_decoder import gap, our_logits, prompts, their_logits
from transformers import AutoConfig, AutoModelForCausalLM

from recr1.model.hf_config import make_config_json, parse_config, read_config
from recr1.model.hf_weights import SafetensorsFolder, load_model, make_empty_model
from recr1.utils.hf_hub import (
    ModelFolderError,
    load_tokenizer,
    read_stop_token_ids,
    resolve_model_folder,
)

SIZES = dict(
    vocab_size=394,
    hidden_size=256,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=64,
)
NAMES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
LLAMA3 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=48
)


def theirs_in_our_words(family, raw):
    """Return what transformers' config class makes of a config.json, as our DecoderConfig's
    arguments.
    """
    c = AutoConfig.for_model(
        family, **{key: value for key, value in raw.items() if key != "model_type"}
    )
    rope = dict(c.rope_parameters)
    words = {
        name: getattr(c, name, None)
        for name in tiny_config().__dataclass_fields__
        if name not in ("family", "rope_theta", "rope_scaling")
    }
    return words | dict(
        head_dim=words["head_dim"] or c.hidden_size // c.num_attention_heads,
        rope_theta=rope.pop("rope_theta"),
    ), rope


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "keys",
    [
        dict(),
        dict(num_key_value_heads=None),
        dict(head_dim=6),
        dict(rope_theta=5e5),
        dict(rope_parameters=dict(rope_type="default", rope_theta=7e3)),
        dict(rope_theta=5e5, rope_scaling=None),
        dict(rope_theta=5e5, rope_scaling=dict(rope_type="llama3", **LLAMA3)),
        dict(rope_theta=5e5, rope_scaling=dict(type="llama3", **LLAMA3)),
        dict(rope_parameters=dict(rope_type="llama3", rope_theta=3e5, **LLAMA3)),
        dict(
            rope_theta=2e4,
            rope_scaling=dict(rope_type="llama3", rope_theta=3e5, **LLAMA3),
            rope_parameters=dict(rope_type="default", rope_theta=7e3),
        ),
        dict(rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=77),
        dict(use_sliding_window=False, sliding_window=4096),
    ],
)
def test_config_json_is_read_as_transformers_reads_it(family, keys):
    """Both spellings of rope, and every default of a key that is left out."""
    raw = SIZES | keys
    ours = parse_config(raw | dict(architectures=[NAMES[family]]), "config.json")
    want, rope = theirs_in_our_words(family, raw)
    assert {name: getattr(ours, name) for name in want} == want
    assert ours.family == family
    assert (vars(ours.rope_scaling) if ours.rope_scaling else None) == (
        LLAMA3 if rope["rope_type"] == "llama3" else None
    )
    assert parse_config(make_config_json(ours), "config.json") == ours
    assert theirs_in_our_words(family, make_config_json(ours))[0] == want


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_saved_loaded_and_saved_again_is_byte_equal(family, tied, tmp_path):
    model = tiny_model(**FAMILIES[family] | dict(tie_word_embeddings=tied))
    tokenizer = tiny_tokenizer()
    stops = frozenset([7, 3])
    one = tmp_path / "one"
    two = tmp_path / "two"
    save(model, one, tokenizer, stops)
    save(
        load_model(str(one)),
        two,
        load_tokenizer(str(one)),
        read_stop_token_ids(str(one), tokenizer) - {tokenizer.eos_token_id},
    )
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert ("lm_head.weight" in load_file(one / "model.safetensors")) is not tied
    assert (
        load_tokenizer(str(one))("find: red lamp")["input_ids"]
        == tokenizer("find: red lamp")["input_ids"]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_go_both_ways(family, tmp_path):
    """Ours streamed from one reused buffer and read by transformers; theirs read by us. Files as
    large as asked, index as theirs.
    """
    model = tiny_model(**FAMILIES[family])
    batch = prompts(3)
    limit = 40_000
    want = our_logits(model, batch)
    ours = tmp_path / "ours"
    theirs = tmp_path / "theirs"
    save(model, ours)  # its single file must not outlive the shards

    class Reused:
        config = model.config
        buffer = torch.empty(100_000)

        def state_dict(self):
            return self

        def items(self):
            for name, p in model.state_dict().items():
                self.buffer[: p.numel()] = p.flatten()
                yield name, self.buffer[: p.numel()].view(p.shape)

    save(Reused(), ours, max_file_bytes=limit)
    oracle(model).save_pretrained(theirs, max_shard_size=limit)
    index, their_index = (
        json.loads((f / "model.safetensors.index.json").read_text()) for f in (ours, theirs)
    )
    files = sorted({*index["weight_map"].values()})
    assert files == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 2
    assert sorted(p.name for p in ours.glob("model*")) == files + ["model.safetensors.index.json"]
    assert index["metadata"] == their_index["metadata"]
    assert index["weight_map"].keys() == their_index["weight_map"].keys()
    assert all(
        sum(t.nbytes for t in held.values()) <= limit or len(held) == 1
        for held in map(load_file, map(ours.joinpath, files))
    )
    assert (
        gap(
            their_logits(AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32), batch),
            want,
        )
        <= 1e-4
    )
    for folder in (ours, theirs):
        assert gap(our_logits(load_model(str(folder)), batch), want) == 0
    save(model, ours)
    assert [p.name for p in ours.glob("model*")] == ["model.safetensors"]


def test_tensors_are_read_one_by_one_and_shapes_without_reading(tmp_path):
    model = tiny_model()
    save(model, tmp_path, max_file_bytes=30_000)
    tensors = SafetensorsFolder(str(tmp_path))
    empty = make_empty_model(str(tmp_path), reachable=300)
    assert tensors.shapes == {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert all(torch.equal(tensors[name], t) for name, t in model.state_dict().items())
    assert all(p.is_meta for p in empty.parameters())
    assert empty.reachable == 300
    tensors.check(empty)


def test_a_loaded_model_does_not_change_with_its_file(tmp_path):
    save(tiny_model(), tmp_path)
    model = load_model(str(tmp_path))
    path = tmp_path / "model.safetensors"
    before = our_logits(model, prompts(4))
    data = path.read_bytes()
    with path.open("r+b") as f:
        f.write(data[:-20_000] + bytes(20_000))
    assert gap(our_logits(model, prompts(4)), before) == 0


def test_a_tied_folder_with_a_second_copy_of_the_head_loads(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    save(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()},
        tmp_path / "model.safetensors",
    )
    assert (
        gap(our_logits(load_model(str(tmp_path)), prompts(4)), our_logits(model, prompts(4))) == 0
    )


def test_16_bit_weights_are_widened_and_kept(tmp_path):
    oracle(tiny_model()).to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    model = load_model(str(tmp_path / "theirs"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert gap(our_logits(model, prompts(5)), their_logits(theirs, prompts(5))) <= 1e-4
    save(load_model(str(tmp_path / "theirs"), dtype=torch.bfloat16), tmp_path / "ours")
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").dtype
        == torch.bfloat16
    )
    half = tiny_model()
    half.model.norm.bfloat16()
    with pytest.raises(ValueError, match="one dtype"):
        save(half, tmp_path / "mixed")


def test_a_model_saved_with_a_tensor_missing_is_refused(tmp_path):
    model = tiny_model()
    state = dict(model.state_dict())
    del state["model.layers.1.mlp.up_proj.weight"]
    model.state_dict = lambda: state
    with pytest.raises(ModelFolderError, match="model.layers.1.mlp.up_proj.weight"):
        save(model, tmp_path)


def test_every_stop_id_is_found(tmp_path):
    tokenizer = tiny_tokenizer()
    save(tiny_model(), tmp_path, tokenizer, frozenset([9, 4]))
    assert read_stop_token_ids(str(tmp_path), tokenizer) == {9, 4, tokenizer.eos_token_id}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 11}')
    assert read_stop_token_ids(str(tmp_path), tokenizer) == {11, tokenizer.eos_token_id}
    tokenizer.eos_token = None
    assert read_stop_token_ids(str(tmp_path), tokenizer) == {11}
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ModelFolderError, match="EOS"):
        read_stop_token_ids(str(tmp_path), tokenizer)


def edit(name="config.json", **changes):
    """A JSON file with these keys set; None: the key left out."""

    def change(folder):
        raw = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))

    return change


def tensors(change):
    def apply(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return apply


def truncate(folder, name="model.safetensors"):
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def shorten(state):
    state["model.norm.weight"] = state["model.norm.weight"][1:].clone()


def sharded(change):
    def apply(folder):
        save(load_model(str(folder)), folder, max_file_bytes=100_000)
        change(folder)

    return apply


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def in_file(file):
    return sharded(edit("model.safetensors.index.json", weight_map={"model.norm.weight": file}))


def like(name, **changes):
    return edit(architectures=[name], **changes)


INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"
BAD = {  # what was done to the folder: how, the file that must be named, the cause
    "no config": (lambda f: (f / "config.json").unlink(), "config.json", "no such file"),
    "config not JSON": (
        lambda f: (f / "config.json").write_text('{"a": '),
        "config.json",
        "not JSON",
    ),
    "config not an object": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json",
        "expected a JSON object",
    ),
    "other architecture": (
        like("MistralForCausalLM"),
        "config.json",
        "MistralForCausalLM'] is not implemented; known: Qwen2ForCausalLM, Qwen3",
    ),
    "mixture of experts": (like("Qwen3MoeForCausalLM"), "config.json", "Qwen3MoeForCausalLM"),
    "no architecture": (edit(architectures=None), "config.json", "None"),
    "yarn": (edit(rope_scaling=dict(type="yarn", factor=4.0)), "config.json", "rope type 'yarn'"),
    "linear rope": (
        edit(rope_scaling=dict(rope_type="linear", factor=4.0)),
        "config.json",
        "rope type 'linear'",
    ),
    "dynamic rope": (
        edit(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)),
        "config.json",
        "rope type 'dynamic'",
    ),
    "rope by layer type": (
        edit(rope_parameters=dict(full_attention=dict(rope_type="default"))),
        "config.json",
        "full_attention",
    ),
    "partial rope": (edit(partial_rotary_factor=0.5), "config.json", "partial_rotary_factor"),
    "llama3 rope not whole": (
        edit(rope_scaling=dict(rope_type="llama3", factor=8.0)),
        "config.json",
        "low_freq_factor",
    ),
    "llama3 rope upside down": (
        edit(rope_scaling=dict(LLAMA3, rope_type="llama3", high_freq_factor=1.0)),
        "config.json",
        "high_freq_factor",
    ),
    "rope not an object": (edit(rope_scaling=3), "config.json", "wrong kind"),
    "sliding window": (edit(use_sliding_window=True), "config.json", "sliding"),
    "sliding layer": (
        edit(layer_types=["full_attention", "sliding_attention"]),
        "config.json",
        "sliding",
    ),
    "other activation": (edit(hidden_act="gelu"), "config.json", "silu"),
    "llama with attention bias": (
        like("LlamaForCausalLM", attention_bias=True),
        "config.json",
        "attention_bias True in LlamaForCausalLM",
    ),
    "llama with mlp bias": (like("LlamaForCausalLM", mlp_bias=True), "config.json", "mlp_bias"),
    "qwen3 with attention bias": (
        like("Qwen3ForCausalLM", attention_bias=True),
        "config.json",
        "attention_bias True in Qwen3ForCausalLM",
    ),
    "qwen2 without bias": (
        edit(attention_bias=False),
        "config.json",
        "attention_bias False in Qwen2ForCausalLM",
    ),
    "quantised": (
        edit(quantization_config=dict(quant_method="gptq")),
        "config.json",
        "quantization_config",
    ),
    "key missing": (edit(intermediate_size=None), "config.json", "intermediate_size"),
    "text for a number": (edit(hidden_size="48"), "config.json", "hidden_size"),
    "no layers": (
        edit(num_hidden_layers=0),
        "config.json",
        "num_hidden_layers must be a positive int, found 0",
    ),
    "kv heads that do not divide": (
        edit(num_key_value_heads=3),
        "config.json",
        "num_key_value_heads 3",
    ),
    "qwen2 said to be qwen3": (
        like("Qwen3ForCausalLM"),
        "model.safetensors",
        "k_norm.weight: expected (12,), found None",
    ),
    "qwen2 said to be llama": (like("LlamaForCausalLM"), "model.safetensors", "k_proj.bias"),
    "fewer rows than the tokenizer has ids": (
        edit(vocab_size=380),
        "config.json",
        "vocab_size 380 is less than the tokenizer's 394 ids",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "model.safetensors",
        "no such file",
    ),
    "pickled weights": (
        only_pickles,
        "model.safetensors",
        "no such file; only safetensors is read, not pytorch_model.bin",
    ),
    "torn weights": (truncate, "model.safetensors", "safetensors"),
    "empty weights": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "model.safetensors",
        "safetensors",
    ),
    "tensor of another shape": (
        tensors(shorten),
        "model.safetensors",
        "model.norm.weight: expected (48,), found (47,)",
    ),
    "tensor missing": (
        tensors(lambda s: s.pop("model.layers.1.self_attn.q_proj.bias")),
        "model.safetensors",
        "model.layers.1.self_attn.q_proj.bias",
    ),
    "tensor too many": (
        tensors(lambda s: s.update(extra=torch.ones(1))),
        "model.safetensors",
        "extra",
    ),
    "untied head missing": (
        tensors(lambda s: s.pop("lm_head.weight")),
        "model.safetensors",
        "lm_head.weight",
    ),
    "shard missing": (sharded(lambda f: (f / SECOND).unlink()), SECOND, "no such file"),
    "shard torn": (sharded(lambda f: truncate(f, SECOND)), SECOND, "safetensors"),
    "shard without its tensor": (in_file(SECOND), SECOND, "no tensor model.norm.weight"),
    "index without map": (sharded(edit(INDEX, weight_map=None)), INDEX, "weight_map"),
    "index not JSON": (sharded(lambda f: truncate(f, INDEX)), INDEX, "not JSON"),
    "index of too little": (sharded(edit(INDEX, weight_map={})), INDEX, "missing"),
    "index out of the folder": (
        in_file("../model.safetensors"),
        INDEX,
        "'../model.safetensors' lies outside the folder",
    ),
    "index deep out of the folder": (
        in_file("a/../../model.safetensors"),
        INDEX,
        "outside the folder",
    ),
    "index with a path from the root": (in_file("/etc/passwd"), INDEX, "outside the folder"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_folder_is_refused_by_file_and_cause(what, tmp_path):
    write_policy(tmp_path)
    spoil, file, cause = BAD[what]
    spoil(tmp_path)
    with pytest.raises(ModelFolderError) as error:
        load_model(str(tmp_path), reachable=len(tiny_tokenizer()))
    assert str(tmp_path / file) in str(error.value)
    assert cause in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_tokenizer_or_chat_template_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    save(tiny_model(), tmp_path, tokenizer)
    with pytest.raises(ModelFolderError, match=f"{tmp_path}.*chat template"):
        load_tokenizer(str(tmp_path))
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelFolderError, match=f"{tmp_path}.*tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ModelFolderError, match="config.json: no such file"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_a_hub_id_is_found_in_transformers_cache_without_a_network(tmp_path):
    """A cache as the hub's client lays it out, shards behind links. In a process of its own: the
    client reads its settings when imported.
    """
    store = tmp_path / "hub" / "models--org--name"
    blobs = store / "blobs"
    snapshot = store / "snapshots" / "0123abcd"
    save(tiny_model(), blobs, max_file_bytes=100_000)
    for folder in (snapshot, store / "refs"):
        folder.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (store / "refs" / "main").write_text("0123abcd")
    code = (
        "from recr1.utils.hf_hub import ModelFolderError, load_tokenizer\n"
        "from recr1.utils.hf_hub import resolve_model_folder\n"
        "from recr1.model.hf_weights import load_model\n"
        "folder = resolve_model_folder('org/name')\n"
        "print(folder)\n"
        "print(load_model(folder, len(load_tokenizer(folder))).config.hidden_size)\n"
        "for path in ('org/absent', 'absent/folder/deep', 'absent', './absent', '', 'setup.py'):\n"
        "    try: print(resolve_model_folder(path))\n"
        "    except ModelFolderError as e: print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env=os.environ | dict(HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1"),
    )
    assert done.returncode == 0, done.stderr
    folder, width, absent, *others = done.stdout.splitlines()
    assert (folder, width) == (str(snapshot), "48")
    assert absent.startswith("org/absent: no such folder, not (or not wholly) in ")
    assert str(tmp_path / "hub") in absent
    assert len(others) == 5
    assert all("neither a folder nor a hub id (org/name)" in line for line in others)


@pytest.mark.parametrize(
    "error, says",
    [
        (errors.GatedRepoError, "gated"),
        (errors.RepositoryNotFoundError, "no such model on the hub"),
        (errors.LocalEntryNotFoundError, "out of reach"),
        (errors.HFValidationError, "HFValidationError: line one line two"),
        (RuntimeError, "RuntimeError: line one line two"),
    ],
)
def test_what_the_hub_refuses_is_one_line(error, says, monkeypatch):
    def refuse(*args, **more):
        # the hub's own errors want an HTTP response that these tests have not
        raised = error.__new__(error)
        raised.args = ("line one\nline two",)
        raise raised

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelFolderError, match="^org/name: ") as caught:
        resolve_model_folder("org/name")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_stays_as_it_is(tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_model_folder(str(tmp_path / "org" / "name")) == str(tmp_path / "org" / "name")
    with pytest.raises(ModelFolderError, match="config.json: no such file"):
        read_config(resolve_model_folder(str(tmp_path / "org" / "name")))


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert resolve_model_folder("~/models") == str(tmp_path / "models")
