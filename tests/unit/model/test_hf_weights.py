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
from test_decoder import compute_our_logits, compute_their_logits, draw_prompts, measure_gap
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
NAMES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
LLAMA3 = dict(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=48,
)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"
HEAD = "lm_head.weight"
CONFIGS = [
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
]


def parse_by_transformers(family, raw):
    """Return what transformers' config class makes of a config.json.

    As our DecoderConfig's arguments, and what it knows of rope besides.
    """
    keys = {key: value for key, value in raw.items() if key != "model_type"}
    config = AutoConfig.for_model(family, **keys)
    rope = dict(config.rope_parameters)
    arguments = {}
    for name in tiny_config().__dataclass_fields__:
        if name not in ("family", "rope_theta", "rope_scaling"):
            arguments[name] = getattr(config, name, None)
    if not arguments["head_dim"]:
        arguments["head_dim"] = config.hidden_size // config.num_attention_heads
    arguments["rope_theta"] = rope.pop("rope_theta")
    return arguments, rope


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keys", CONFIGS)
def test_config_json_is_read_as_transformers_reads_it(family, keys):
    """Both spellings of rope, and every default of a key that is left out."""
    raw = SIZES | keys
    raw_with_name = raw | dict(architectures=[NAMES[family]])
    want, rope = parse_by_transformers(family, raw)

    ours = parse_config(raw_with_name, "config.json")

    actual = {name: getattr(ours, name) for name in want}
    assert actual == want
    assert ours.family == family
    if rope["rope_type"] == "llama3":
        assert vars(ours.rope_scaling) == LLAMA3
    else:
        assert ours.rope_scaling is None

    written = make_config_json(ours)
    their_arguments, _ = parse_by_transformers(family, written)
    assert parse_config(written, "config.json") == ours
    assert their_arguments == want


def list_files(folder, pattern="*"):
    """List the names of a folder's files, sorted."""
    return sorted(path.name for path in folder.glob(pattern))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_saved_loaded_and_saved_again_is_byte_equal(family, tied, tmp_path):
    model = tiny_model(**FAMILIES[family] | dict(tie_word_embeddings=tied))
    tokenizer = tiny_tokenizer()
    first = tmp_path / "first"
    second = tmp_path / "second"
    stops = frozenset([7, 3])
    save(model, first, tokenizer, stops)

    folder = str(first)
    loaded_model = load_model(folder)
    loaded_tokenizer = load_tokenizer(folder)
    stops = read_stop_token_ids(folder, tokenizer)
    save(loaded_model, second, loaded_tokenizer, stops - {tokenizer.eos_token_id})

    names = list_files(first)
    assert names == list_files(second)
    for name in names:
        first_bytes = (first / name).read_bytes()
        second_bytes = (second / name).read_bytes()
        assert first_bytes == second_bytes, name
    state = load_file(first / WEIGHTS)
    assert (HEAD in state) is not tied
    text = "find: red lamp"
    assert loaded_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]


class OneBufferModel:
    """A model whose state streams through one reused buffer."""

    def __init__(self, model):
        self.config = model.config
        self.model = model
        self.buffer = torch.empty(100_000)

    def state_dict(self):
        return self

    def items(self):
        for name, weight in self.model.state_dict().items():
            slot = self.buffer[: weight.numel()]
            slot.copy_(weight.flatten())
            yield name, slot.view(weight.shape)


def read_json(path):
    """Read a JSON file."""
    return json.loads(path.read_text())


def check_sizes(folder, files, limit):
    """Check that a file of more than one tensor keeps the limit."""
    for name in files:
        state = load_file(folder / name)
        size = sum(tensor.nbytes for tensor in state.values())
        assert size <= limit or len(state) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_go_both_ways(family, tmp_path):
    """Ours streamed from one reused buffer and read by transformers; theirs read by us. Files as
    large as asked, index as theirs.
    """
    model = tiny_model(**FAMILIES[family])
    batch = draw_prompts(3)
    limit = 40_000
    want = compute_our_logits(model, batch)
    ours = tmp_path / "ours"
    theirs = tmp_path / "theirs"
    save(model, ours)  # its single file must not outlive the shards

    save(OneBufferModel(model), ours, max_file_bytes=limit)
    oracle(model).save_pretrained(theirs, max_shard_size=limit)

    index = read_json(ours / INDEX)
    their_index = read_json(theirs / INDEX)
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 2
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert list_files(ours, "model*") == files + [INDEX]
    assert index["metadata"] == their_index["metadata"]
    assert index["weight_map"].keys() == their_index["weight_map"].keys()
    check_sizes(ours, files, limit)

    hf_model = AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32)
    their_logits = compute_their_logits(hf_model, batch)
    assert measure_gap(their_logits, want) <= 1e-4
    for folder in (ours, theirs):
        loaded = load_model(str(folder))
        logits = compute_our_logits(loaded, batch)
        assert measure_gap(logits, want) == 0

    save(model, ours)
    assert list_files(ours, "model*") == [WEIGHTS]


def test_tensors_are_read_one_by_one_and_shapes_without_reading(tmp_path):
    model = tiny_model()
    state = model.state_dict()
    folder = str(tmp_path)
    save(model, folder, max_file_bytes=30_000)

    tensors = SafetensorsFolder(folder)
    empty = make_empty_model(folder, reachable=300)

    want_shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert tensors.shapes == want_shapes
    for name, tensor in state.items():
        assert torch.equal(tensors[name], tensor)
    for parameter in empty.parameters():
        assert parameter.is_meta
    assert empty.reachable == 300
    tensors.check(empty)


def test_a_loaded_model_does_not_change_with_its_file(tmp_path):
    save(tiny_model(), tmp_path)
    model = load_model(str(tmp_path))
    path = tmp_path / WEIGHTS
    batch = draw_prompts(4)
    before = compute_our_logits(model, batch)

    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(data[:-20_000] + bytes(20_000))

    after = compute_our_logits(model, batch)
    assert measure_gap(after, before) == 0


def test_a_tied_folder_with_a_second_copy_of_the_head_loads(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    batch = draw_prompts(4)
    want = compute_our_logits(model, batch)
    save(model, tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    state[HEAD] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / WEIGHTS)

    loaded = load_model(str(tmp_path))

    logits = compute_our_logits(loaded, batch)
    assert measure_gap(logits, want) == 0


def test_16_bit_weights_are_widened_and_kept(tmp_path):
    theirs = str(tmp_path / "theirs")
    ours = str(tmp_path / "ours")
    batch = draw_prompts(5)
    hf_model = oracle(tiny_model())
    hf_model.to(torch.bfloat16).save_pretrained(theirs)

    model = load_model(theirs)
    wide_hf_model = AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    logits = compute_our_logits(model, batch)
    want = compute_their_logits(wide_hf_model, batch)
    assert dtypes == {torch.float32}
    assert measure_gap(logits, want) <= 1e-4

    narrow_model = load_model(theirs, dtype=torch.bfloat16)
    save(narrow_model, ours)
    reloaded = AutoModelForCausalLM.from_pretrained(ours, dtype="auto")
    assert reloaded.dtype == torch.bfloat16

    mixed_model = tiny_model()
    mixed_model.model.norm.bfloat16()
    with pytest.raises(ValueError, match="one dtype"):
        save(mixed_model, tmp_path / "mixed")


def test_a_model_saved_with_a_tensor_missing_is_refused(tmp_path):
    model = tiny_model()
    state = dict(model.state_dict())
    del state["model.layers.1.mlp.up_proj.weight"]
    model.state_dict = lambda: state

    with pytest.raises(ModelFolderError, match="model.layers.1.mlp.up_proj.weight"):
        save(model, tmp_path)


def test_every_stop_id_is_found(tmp_path):
    tokenizer = tiny_tokenizer()
    eos = tokenizer.eos_token_id
    folder = str(tmp_path)
    settings = tmp_path / "generation_config.json"
    save(tiny_model(), folder, tokenizer, frozenset([9, 4]))
    assert read_stop_token_ids(folder, tokenizer) == {9, 4, eos}

    settings.write_text('{"eos_token_id": 11}')
    assert read_stop_token_ids(folder, tokenizer) == {11, eos}

    tokenizer.eos_token = None
    assert read_stop_token_ids(folder, tokenizer) == {11}

    settings.unlink()
    with pytest.raises(ModelFolderError, match="EOS"):
        read_stop_token_ids(folder, tokenizer)


def edit_json(name, **changes):
    """Set these keys of a JSON file; None: the key is left out."""

    def edit(folder):
        path = folder / name
        edited = read_json(path) | changes
        remaining = {key: value for key, value in edited.items() if value is not None}
        path.write_text(json.dumps(remaining))

    return edit


def edit_tensors(change):
    """Change the tensors of a folder of one file."""

    def edit(folder):
        path = folder / WEIGHTS
        state = load_file(path)
        change(state)
        save_file(state, path)

    return edit


def shorten_norm(state):
    norm = state["model.norm.weight"]
    state["model.norm.weight"] = norm[1:].clone()


def add_tensor(state):
    state["extra"] = torch.ones(1)


def remove_tensor(name):
    """Leave a tensor out."""
    return edit_tensors(lambda state: state.pop(name))


def remove_file(name):
    """Remove a file of the folder."""
    return lambda folder: (folder / name).unlink()


def write_file(name, data):
    """Write these bytes in place of a file."""
    return lambda folder: (folder / name).write_bytes(data)


def truncate_file(name):
    """Cut a file's last 100 bytes."""

    def truncate(folder):
        path = folder / name
        data = path.read_bytes()
        path.write_bytes(data[:-100])

    return truncate


def pickle_weights(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def save_in_shards(change):
    """Save the folder's model in three files, then change the folder."""

    def edit(folder):
        model = load_model(str(folder))
        save(model, folder, max_file_bytes=100_000)
        change(folder)

    return edit


def point_index_at(file):
    """Let the index say that this file holds the norm."""
    weight_map = {"model.norm.weight": file}
    return save_in_shards(edit_json(INDEX, weight_map=weight_map))


# changes of config.json (None: the key is left out), what the error says
BAD_CONFIGS = {
    "other architecture": (
        dict(architectures=["MistralForCausalLM"]),
        "MistralForCausalLM'] is not implemented; known: Qwen2ForCausalLM, Qwen3",
    ),
    "mixture of experts": (dict(architectures=["Qwen3MoeForCausalLM"]), "Qwen3MoeForCausalLM"),
    "no architecture": (dict(architectures=None), "None"),
    "yarn": (dict(rope_scaling=dict(type="yarn", factor=4.0)), "rope type 'yarn'"),
    "linear rope": (dict(rope_scaling=dict(rope_type="linear", factor=4.0)), "rope type 'linear'"),
    "dynamic rope": (
        dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)),
        "rope type 'dynamic'",
    ),
    "rope by layer type": (
        dict(rope_parameters=dict(full_attention=dict(rope_type="default"))),
        "full_attention",
    ),
    "partial rope": (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "llama3 rope not whole": (
        dict(rope_scaling=dict(rope_type="llama3", factor=8.0)),
        "low_freq_factor",
    ),
    "llama3 rope upside down": (
        dict(rope_scaling=dict(LLAMA3, rope_type="llama3", high_freq_factor=1.0)),
        "high_freq_factor",
    ),
    "rope not an object": (dict(rope_scaling=3), "wrong kind"),
    "sliding window": (dict(use_sliding_window=True), "sliding"),
    "sliding layer": (dict(layer_types=["full_attention", "sliding_attention"]), "sliding"),
    "other activation": (dict(hidden_act="gelu"), "silu"),
    "llama with attention bias": (
        dict(architectures=["LlamaForCausalLM"], attention_bias=True),
        "attention_bias True in LlamaForCausalLM",
    ),
    "llama with mlp bias": (dict(architectures=["LlamaForCausalLM"], mlp_bias=True), "mlp_bias"),
    "qwen3 with attention bias": (
        dict(architectures=["Qwen3ForCausalLM"], attention_bias=True),
        "attention_bias True in Qwen3ForCausalLM",
    ),
    "qwen2 without bias": (
        dict(attention_bias=False),
        "attention_bias False in Qwen2ForCausalLM",
    ),
    "quantised": (dict(quantization_config=dict(quant_method="gptq")), "quantization_config"),
    "key missing": (dict(intermediate_size=None), "intermediate_size"),
    "text for a number": (dict(hidden_size="48"), "hidden_size"),
    "no layers": (
        dict(num_hidden_layers=0),
        "num_hidden_layers must be a positive int, found 0",
    ),
    "kv heads that do not divide": (dict(num_key_value_heads=3), "num_key_value_heads 3"),
    "fewer rows than the tokenizer has ids": (
        dict(vocab_size=380),
        "vocab_size 380 is less than the tokenizer's 394 ids",
    ),
}
# what is done to the folder, the file that the error names, the cause
BAD_FOLDERS = {
    "no config": (remove_file("config.json"), "config.json", "no such file"),
    "config not JSON": (write_file("config.json", b'{"a": '), "config.json", "not JSON"),
    "config not an object": (
        write_file("config.json", b"[]"),
        "config.json",
        "expected a JSON object",
    ),
    "qwen2 said to be qwen3": (
        edit_json("config.json", architectures=["Qwen3ForCausalLM"]),
        WEIGHTS,
        "k_norm.weight: expected (12,), found None",
    ),
    "qwen2 said to be llama": (
        edit_json("config.json", architectures=["LlamaForCausalLM"]),
        WEIGHTS,
        "k_proj.bias",
    ),
    "no weights": (remove_file(WEIGHTS), WEIGHTS, "no such file"),
    "pickled weights": (
        pickle_weights,
        WEIGHTS,
        "no such file; only safetensors is read, not pytorch_model.bin",
    ),
    "torn weights": (truncate_file(WEIGHTS), WEIGHTS, "safetensors"),
    "empty weights": (write_file(WEIGHTS, b""), WEIGHTS, "safetensors"),
    "tensor of another shape": (
        edit_tensors(shorten_norm),
        WEIGHTS,
        "model.norm.weight: expected (48,), found (47,)",
    ),
    "tensor missing": (
        remove_tensor("model.layers.1.self_attn.q_proj.bias"),
        WEIGHTS,
        "model.layers.1.self_attn.q_proj.bias",
    ),
    "tensor too many": (edit_tensors(add_tensor), WEIGHTS, "extra"),
    "untied head missing": (remove_tensor(HEAD), WEIGHTS, HEAD),
    "shard missing": (save_in_shards(remove_file(SECOND)), SECOND, "no such file"),
    "shard torn": (save_in_shards(truncate_file(SECOND)), SECOND, "safetensors"),
    "shard without its tensor": (point_index_at(SECOND), SECOND, "no tensor model.norm.weight"),
    "index without map": (save_in_shards(edit_json(INDEX, weight_map=None)), INDEX, "weight_map"),
    "index not JSON": (save_in_shards(truncate_file(INDEX)), INDEX, "not JSON"),
    "index of too little": (save_in_shards(edit_json(INDEX, weight_map={})), INDEX, "missing"),
    "index out of the folder": (
        point_index_at("../model.safetensors"),
        INDEX,
        "'../model.safetensors' lies outside the folder",
    ),
    "index deep out of the folder": (
        point_index_at("a/../../model.safetensors"),
        INDEX,
        "outside the folder",
    ),
    "index with a path from the root": (
        point_index_at("/etc/passwd"),
        INDEX,
        "outside the folder",
    ),
}


def check_refused(folder, file, cause):
    """Check that the folder is refused by one line that names the file and the cause."""
    reachable = len(tiny_tokenizer())
    path = str(folder / file)
    with pytest.raises(ModelFolderError) as error:
        load_model(str(folder), reachable=reachable)
    message = str(error.value)
    assert path in message
    assert cause in message
    assert "\n" not in message


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_is_refused_by_cause(name, tmp_path):
    changes, cause = BAD_CONFIGS[name]
    write_policy(tmp_path)

    edit = edit_json("config.json", **changes)
    edit(tmp_path)

    check_refused(tmp_path, "config.json", cause)


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_is_refused_by_file_and_cause(name, tmp_path):
    spoil, file, cause = BAD_FOLDERS[name]
    write_policy(tmp_path)

    spoil(tmp_path)

    check_refused(tmp_path, file, cause)


def test_a_folder_without_tokenizer_or_chat_template_is_refused(tmp_path):
    folder = str(tmp_path)
    absent = str(tmp_path / "nowhere")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    save(tiny_model(), folder, tokenizer)
    with pytest.raises(ModelFolderError, match=f"{folder}.*chat template"):
        load_tokenizer(folder)

    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelFolderError, match=f"{folder}.*tokenizer"):
        load_tokenizer(folder)

    with pytest.raises(ModelFolderError, match="config.json: no such file"):
        load_tokenizer(absent)


def write_hub_cache(cache):
    """Write a cache as the hub's client lays it out, shards behind links; return the snapshot."""
    store = cache / "models--org--name"
    blobs = store / "blobs"
    snapshot = store / "snapshots" / "0123abcd"
    refs = store / "refs"
    save(tiny_model(), blobs, max_file_bytes=100_000)
    snapshot.mkdir(parents=True)
    refs.mkdir()
    for path in blobs.iterdir():
        link = snapshot / path.name
        link.symlink_to(Path("../../blobs") / path.name)
    (refs / "main").write_text("0123abcd")
    return snapshot


HUB_SCRIPT = """
from recr1.utils.hf_hub import ModelFolderError, load_tokenizer, resolve_model_folder
from recr1.model.hf_weights import load_model

folder = resolve_model_folder("org/name")
print(folder)
print(load_model(folder, len(load_tokenizer(folder))).config.hidden_size)
for path in ("org/absent", "absent/folder/deep", "absent", "./absent", "", "setup.py"):
    try:
        print(resolve_model_folder(path))
    except ModelFolderError as error:
        print(error)
"""


def test_a_hub_id_is_found_in_transformers_cache_without_a_network(tmp_path):
    """In a process of its own: the hub's client reads its settings when imported."""
    cache = tmp_path / "hub"
    snapshot = write_hub_cache(cache)
    root = Path(__file__).parents[3]
    env = dict(os.environ)
    env["HF_HUB_CACHE"] = str(cache)
    env["HF_HUB_OFFLINE"] = "1"

    command = [sys.executable, "-c", HUB_SCRIPT]
    process = subprocess.run(command, capture_output=True, text=True, cwd=root, env=env)

    assert process.returncode == 0, process.stderr
    folder, width, absent, *others = process.stdout.splitlines()
    assert folder == str(snapshot)
    assert width == "48"
    assert absent.startswith("org/absent: no such folder, not (or not wholly) in ")
    assert str(cache) in absent
    assert len(others) == 5
    for line in others:
        assert "neither a folder nor a hub id (org/name)" in line


# what the hub's client raises, what the error says
HUB_ERRORS = [
    (errors.GatedRepoError, "gated"),
    (errors.RepositoryNotFoundError, "no such model on the hub"),
    (errors.LocalEntryNotFoundError, "out of reach"),
    (errors.HFValidationError, "HFValidationError: line one line two"),
    (RuntimeError, "RuntimeError: line one line two"),
]


@pytest.mark.parametrize("error, says", HUB_ERRORS)
def test_what_the_hub_refuses_is_one_line(error, says, monkeypatch):
    def refuse(*args, **more):
        # the hub's own errors want an HTTP response that these tests have not
        raised = error.__new__(error)
        raised.args = ("line one\nline two",)
        raise raised

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelFolderError, match="^org/name: ") as caught:
        resolve_model_folder("org/name")

    message = str(caught.value)
    assert says in message
    assert "\n" not in message


def test_a_folder_stays_as_it_is(tmp_path):
    path = tmp_path / "org" / "name"
    path.mkdir(parents=True)

    folder = resolve_model_folder(str(path))

    assert folder == str(path)
    with pytest.raises(ModelFolderError, match="config.json: no such file"):
        read_config(folder)
