"""HF folder (config.json, safetensors, tokenizer, chat template, generation_config) <-> our Decoder. Names are equal, so nothing is mapped."""
from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .model import Decoder, ModelConfig


class ModelFolderError(ValueError):
    """The model folder cannot be used. The message names the file and says what to do."""


def read_config(folder: str) -> ModelConfig:
    """config.json -> ModelConfig. Raises ModelFolderError for another architecture or an option that is not implemented."""
    raw = _json(Path(folder) / "config.json")
    if raw.get("architectures") != ["Qwen2ForCausalLM"]:
        raise ModelFolderError(f"{folder}/config.json: architecture {raw.get('architectures')} is not implemented; known: Qwen2ForCausalLM")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default" or raw.get("use_sliding_window") or raw.get("hidden_act", "silu") != "silu":
        raise ModelFolderError(f"{folder}/config.json: scaled rope, a sliding window or an activation other than silu is not implemented")
    try:
        heads, width = raw["num_attention_heads"], raw["hidden_size"]
        return ModelConfig(
            vocab_size=raw["vocab_size"], hidden_size=width, intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"], num_attention_heads=heads, num_key_value_heads=raw.get("num_key_value_heads", heads),
            head_dim=raw.get("head_dim") or width // heads, rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))), tie_word_embeddings=raw.get("tie_word_embeddings", False),
            max_position_embeddings=raw.get("max_position_embeddings", 32768))
    except KeyError as e:
        raise ModelFolderError(f"{folder}/config.json: key {e} is missing") from None


def load_tokenizer(folder: str):
    """The folder's tokenizer, by transformers. Raises ModelFolderError when it has none or no chat template."""
    from transformers import AutoTokenizer
    _json(Path(folder) / "config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise ModelFolderError(f"{folder}: no tokenizer could be loaded: {str(e).splitlines()[0]}") from None
    if not tokenizer.chat_template:
        raise ModelFolderError(f"{folder}: the tokenizer has no chat template; use an instruct model, or add chat_template.jinja")
    return tokenizer


def load_model(folder: str, reachable: int | None = None, dtype=torch.float32) -> Decoder:
    """Weights of a folder with one safetensors file. `reachable`: how many ids the tokenizer has."""
    config, path = read_config(folder), Path(folder) / "model.safetensors"
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise ModelFolderError(f"{path}: no such file") from None
    except SafetensorError as e:
        raise ModelFolderError(f"{path}: not a readable safetensors file: {e}") from None
    with torch.device("meta"):
        model = Decoder(config, reachable)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)            # some exporters write the tied copy
    want = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    have = {name: tuple(t.shape) for name, t in state.items()}
    if want != have:
        wrong = sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
        raise ModelFolderError(f"{path}: {len(wrong)} tensors are missing, unknown or of another shape than config.json says, first {wrong[0]}: "
                               f"expected {want.get(wrong[0])}, found {have.get(wrong[0])}")
    model.load_state_dict({name: t.to(dtype) for name, t in state.items()}, assign=True)
    return model


def stop_ids(folder: str, tokenizer) -> frozenset[int]:
    """Every EOS id of generation_config.json and the tokenizer's own: any of them ends a text."""
    path = Path(folder) / "generation_config.json"
    eos = _json(path).get("eos_token_id") if path.exists() else None
    ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise ModelFolderError(f"{folder}: neither generation_config.json nor the tokenizer names an EOS token; no text could ever end")
    return frozenset(ids)


def save_model(model: Decoder, tokenizer, stops: frozenset[int], folder: str) -> None:
    """Writes a standard HF folder that AutoModelForCausalLM loads; tied heads are stored once."""
    c, out = model.config, Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    eos = sorted(stops)
    raw = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", torch_dtype=str(model.head_weight.dtype).removeprefix("torch."),
               vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, num_hidden_layers=c.num_hidden_layers,
               num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, hidden_act="silu",
               rms_norm_eps=c.rms_norm_eps, rope_theta=c.rope_theta, max_position_embeddings=c.max_position_embeddings,
               tie_word_embeddings=c.tie_word_embeddings, eos_token_id=eos, use_cache=True)
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(dict(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id), indent=2) + "\n")
    save_file({name: t.detach().contiguous() for name, t in model.state_dict().items()}, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(out)


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelFolderError(f"{path}: no such file; model.path must be a Hugging Face model folder") from None
    except ValueError as e:
        raise ModelFolderError(f"{path}: not JSON: {e}") from None
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
