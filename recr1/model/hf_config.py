"""A Hugging Face config.json and our DecoderConfig, in both directions."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import get_type_hints

from recr1.model.rope import DecoderConfig, RopeScaling
from recr1.utils.hf_hub import ModelFolderError, read_json

ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
}

# what transformers takes where config.json leaves a key out and the families differ; null is: as
# many as query heads, hidden_size / heads
CONFIG_DEFAULTS = {
    "qwen2": dict(num_key_value_heads=32, head_dim=None, max_position_embeddings=32768),
    "qwen3": dict(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768),
    "llama": dict(num_key_value_heads=None, head_dim=None, max_position_embeddings=2048),
}


def read_config(folder: str) -> DecoderConfig:
    """The folder's config.json; see parse_config."""
    path = Path(folder) / "config.json"
    return parse_config(read_json(path), str(path))


def parse_config(raw: dict, where: str) -> DecoderConfig:
    """config.json of transformers 4 or 5 -> ModelConfig. Raises ModelFolderError for an
    architecture or an option that is not implemented.
    """
    named = raw.get("architectures")
    family = ARCHITECTURES.get(named[0]) if isinstance(named, list) and len(named) == 1 else None
    if family is None:
        raise ModelFolderError(
            f"{where}: architecture {named} is not implemented; known: {', '.join(ARCHITECTURES)}"
        )
    got = CONFIG_DEFAULTS[family] | raw
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
        config = DecoderConfig(
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


def _check_values(config: DecoderConfig, where: str) -> None:
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


def make_config_json(c: DecoderConfig) -> dict:
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
