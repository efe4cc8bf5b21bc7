"""HF folder (config.json, safetensors, tokenizer, chat template, generation_config) <-> our
Decoder. Names are equal, so nothing is mapped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path, PurePosixPath
from typing import get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import Config, ConfigError
from .hub import ModelFolderError, read_json
from .model import Decoder, ModelConfig, RopeScaling

ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
}
# what transformers takes where config.json leaves a key out and the families differ; null is: as
# many as query heads, hidden_size / heads
DEFAULTS = {
    "qwen2": dict(num_key_value_heads=32, head_dim=None, max_position_embeddings=32768),
    "qwen3": dict(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768),
    "llama": dict(num_key_value_heads=None, head_dim=None, max_position_embeddings=2048),
}


def read_config(folder: str) -> ModelConfig:
    """The folder's config.json; see parse_config."""
    path = Path(folder) / "config.json"
    return parse_config(read_json(path), str(path))


def parse_config(raw: dict, where: str) -> ModelConfig:
    """config.json of transformers 4 or 5 -> ModelConfig. Raises ModelFolderError for an
    architecture or an option that is not implemented.
    """
    named = raw.get("architectures")
    family = ARCHITECTURES.get(named[0]) if isinstance(named, list) and len(named) == 1 else None
    if family is None:
        raise ModelFolderError(
            f"{where}: architecture {named} is not implemented; known: {', '.join(ARCHITECTURES)}"
        )
    got = DEFAULTS[family] | raw
    try:
        # transformers 4's name, 5's; 5 too prefers 4's
        rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
        theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        scaling = (
            {f.name: rope.pop(f.name) for f in fields(RopeScaling)} if kind == "llama3" else None
        )
        bias = raw.get("attention_bias", raw.get("qkv_bias", family == "qwen2"))
        refused = {
            f"rope type {kind!r} (known: default, llama3)": kind not in ("default", "llama3"),
            f"rope with {', '.join(rope)}": rope and kind in ("default", "llama3"),
            "partial_rotary_factor": raw.get("partial_rotary_factor", 1) != 1,
            "a sliding window": raw.get("use_sliding_window")
            or set(raw.get("layer_types") or ()) - {"full_attention"},
            f"activation {raw.get('hidden_act')!r} (known: silu)": raw.get("hidden_act", "silu")
            != "silu",
            f"attention_bias {bias} in {named[0]}": bool(bias) != (family == "qwen2"),
            "mlp_bias": raw.get("mlp_bias"),
            "quantization_config": raw.get("quantization_config"),
        }
        heads = raw["num_attention_heads"]
        width = raw["hidden_size"]
        config = ModelConfig(
            family=family,
            vocab_size=raw["vocab_size"],
            hidden_size=width,
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=heads
            if got["num_key_value_heads"] is None
            else got["num_key_value_heads"],
            head_dim=width // heads if got["head_dim"] is None else got["head_dim"],
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling and RopeScaling(**scaling),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            max_position_embeddings=got["max_position_embeddings"],
        )
    except KeyError as e:
        raise ModelFolderError(f"{where}: key {e} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError) as e:
        raise ModelFolderError(f"{where}: a value is of the wrong kind: {e}") from None
    if any(refused.values()):
        raise ModelFolderError(
            f"{where}: not implemented: {', '.join(what for what, asked in refused.items() if asked)}; use another model"
        )
    _check_values(config, where)
    return config


def _check_values(config: ModelConfig, where: str) -> None:
    kinds = {int: (int,), float: (int, float), bool: (bool,)}
    for part in filter(None, (config, config.rope_scaling)):
        for name, kind in get_type_hints(type(part)).items():
            value = getattr(part, name)
            if kind in kinds and (
                type(value) not in kinds[kind] or not isinstance(value, bool) and value <= 0
            ):
                raise ModelFolderError(
                    f"{where}: {name} must be a {'bool' if kind is bool else 'positive ' + kind.__name__}, found {value!r}"
                )
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads
    dim = config.head_dim
    s = config.rope_scaling
    if heads % kv_heads or dim % 2:
        raise ModelFolderError(
            f"{where}: num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}, and head_dim {dim} even"
        )
    if s and s.high_freq_factor <= s.low_freq_factor:
        raise ModelFolderError(
            f"{where}: rope's high_freq_factor {s.high_freq_factor} must be above low_freq_factor {s.low_freq_factor}"
        )


def check_room(cfg: Config, positions: int) -> None:
    """Raises ConfigError unless the longest text a run may make fits into a micro-batch and into
    the model's `positions`.
    """
    longest = cfg.prompt.max_tokens + cfg.sampling.max_new_tokens
    for what, limit in (
        ("train.tokens_per_micro_batch", cfg.train.tokens_per_micro_batch),
        ("the model's max_position_embeddings", positions),
    ):
        if longest > limit:
            raise ConfigError(
                f"prompt.max_tokens + sampling.max_new_tokens = {longest} exceeds {what} = {limit}"
            )


def config_json(c: ModelConfig) -> dict:
    """config.json of a config, in transformers 4's spelling of rope: 5 reads it too, 4 reads only
    it.
    """
    (name,) = (name for name, family in ARCHITECTURES.items() if family == c.family)
    same = {
        f.name: getattr(c, f.name) for f in fields(c) if f.name not in ("family", "rope_scaling")
    }
    scaling = (
        dict(rope_scaling=dict(rope_type="llama3", **asdict(c.rope_scaling)))
        if c.rope_scaling
        else {}
    )
    return dict(
        architectures=[name],
        model_type=c.family,
        **same,
        **scaling,
        hidden_act="silu",
        use_cache=True,
    )


class Tensors:
    """A folder's weights, one file or sharded, read lazily: `shapes` comes from the headers,
    tensors[name] reads that one, on CPU.
    """

    def __init__(self, folder: str):
        one = Path(folder) / "model.safetensors"
        index = Path(folder) / "model.safetensors.index.json"
        if one.exists() or not index.exists():  # as transformers prefers
            self.path = one
            file = _open(one)
            self.files = dict.fromkeys(file.keys(), file)
        else:
            self.path = index
            where = read_json(index).get("weight_map")
            if not isinstance(where, dict) or not all(
                isinstance(file, str) for file in where.values()
            ):
                raise ModelFolderError(
                    f"{index}: weight_map must name the file of each tensor; download the folder again"
                )
            # by its text: in the hub's cache an honest file is a link to outside
            for file in where.values():
                if ".." in PurePosixPath(file).parts or PurePosixPath(file).is_absolute():
                    raise ModelFolderError(
                        f"{index}: {file!r} lies outside the folder; do not use this model"
                    )
            opened = {file: _open(Path(folder) / file) for file in sorted({*where.values()})}
            held = {file: set(f.keys()) for file, f in opened.items()}
            for name, file in where.items():
                if name not in held[file]:
                    raise ModelFolderError(
                        f"{Path(folder) / file}: no tensor {name}, although {index.name} says so; download the folder again"
                    )
            self.files = {name: opened[file] for name, file in where.items()}
        self.shapes = {name: tuple(f.get_slice(name).get_shape()) for name, f in self.files.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.files[name].get_tensor(name)

    def check(self, model: Decoder) -> None:
        """Raises ModelFolderError unless the tensors are those of the model. A tied head's second
        copy, which some exporters write, may be there.
        """
        want = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        have = {
            name: shape
            for name, shape in self.shapes.items()
            if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
        }
        if want != have:
            wrong = sorted(
                name for name in want.keys() | have.keys() if want.get(name) != have.get(name)
            )
            raise ModelFolderError(
                f"{self.path}: {len(wrong)} tensors are missing, unknown or of another shape than config.json says, "
                f"first {wrong[0]}: expected {want.get(wrong[0])}, found {have.get(wrong[0])}"
            )


def _open(path: Path):
    """A safetensors file. Its header says how long it is, so a torn one is found here."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        pickled = sorted(
            p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".pt", ".pth")
        )
        hint = (
            f"; only safetensors is read, not {pickled[0]}: load it with transformers and save_pretrained it"
            if pickled
            else ""
        )
        raise ModelFolderError(f"{path}: no such file{hint}") from None
    except (SafetensorError, OSError) as e:
        raise ModelFolderError(
            f"{path}: not a readable safetensors file: {e}; download or copy it again"
        ) from None


def empty_model(folder: str, reachable: int | None = None) -> Decoder:
    """The Decoder of config.json on the meta device: names and shapes, no memory. `reachable`: how
    many ids the tokenizer has.
    """
    config = read_config(folder)
    if (reachable or 0) > config.vocab_size:
        raise ModelFolderError(
            f"{folder}/config.json: vocab_size {config.vocab_size} is less than the tokenizer's {reachable} ids; "
            "the tokenizer is another model's, or tokens were added without resizing the embedding"
        )
    with torch.device("meta"):
        return Decoder(config, reachable)


def load_model(folder: str, reachable: int | None = None, dtype=torch.float32) -> Decoder:
    """The folder's Decoder with its weights, in `dtype`, on CPU."""
    model = empty_model(folder, reachable)
    tensors = Tensors(folder)
    tensors.check(model)
    # copies, because what safetensors gives is the mapped file: whoever rewrites it would rewrite
    # the model
    model.load_state_dict(
        {name: tensors[name].to(dtype, copy=True) for name in model.state_dict()}, assign=True
    )
    return model


def save_model(
    config: ModelConfig,
    state: Iterable[tuple[str, torch.Tensor]],
    tokenizer,
    stops: frozenset[int],
    folder: str,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes a standard HF folder that AutoModelForCausalLM loads; a tied head is not in `state`.

    `state` gives (name, tensor) one by one, all of one dtype, on any device; at most
    `max_file_bytes` of them are held at a time, then they become a file: model.safetensors when
    there is only one, else model-0000i-of-0000n.safetensors and their index.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    held = {}
    parts = []
    dtypes = set()
    numel = 0
    size = 0

    def close_file():
        save_file(held, out / f"{len(parts)}.partial", metadata={"format": "pt"})
        parts.append(list(held))
        held.clear()

    for name, t in state:
        if held and sum(h.nbytes for h in held.values()) + t.nbytes > max_file_bytes:
            close_file()
        # a copy: the next tensor may come in the same memory
        held[name] = t.detach().to("cpu", copy=True).contiguous()
        dtypes = dtypes | {t.dtype}
        numel = numel + t.numel()
        size = size + t.nbytes
    close_file()
    if len(dtypes) != 1:
        raise ValueError(f"{folder}: the tensors of a model must have one dtype, found {dtypes}")
    for old in (
        *out.glob("model-*-of-*.safetensors"),
        out / "model.safetensors",
        out / "model.safetensors.index.json",
    ):
        # of an earlier save: a reader would prefer one file to the shards
        old.unlink(missing_ok=True)
    files = (
        ["model.safetensors"]
        if len(parts) == 1
        else [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    )
    for i, file in enumerate(files):
        os.replace(out / f"{i}.partial", out / file)
    if len(parts) > 1:
        _write(
            out / "model.safetensors.index.json",
            dict(
                metadata=dict(total_parameters=numel, total_size=size),
                weight_map={
                    name: file for names, file in zip(parts, files) for name in sorted(names)
                },
            ),
        )
    eos = sorted(stops)
    dtype = str(dtypes.pop()).removeprefix("torch.")
    _write(
        out / "config.json",
        config_json(config)
        | dict(torch_dtype=dtype, bos_token_id=tokenizer.bos_token_id, eos_token_id=eos),
    )
    _write(
        out / "generation_config.json", dict(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    )
    tokenizer.save_pretrained(out)
    Tensors(folder).check(empty_model(folder))


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
