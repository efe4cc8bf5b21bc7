"""Convert between a Hugging Face config.json and our DecoderConfig, in both directions."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from recr1.model.rope import DecoderConfig, RopeScaling
from recr1.utils.hf_hub import ModelFolderError, read_json

ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
}

# What transformers takes where config.json leaves a key out and the families differ. None is: as
# many as query heads, hidden_size / heads.
CONFIG_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": dict(num_key_value_heads=32, head_dim=None, max_position_embeddings=32768),
    "qwen3": dict(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768),
    "llama": dict(num_key_value_heads=None, head_dim=None, max_position_embeddings=2048),
}

ROPE_TYPES = ("default", "llama3")

# Types a value of config.json may have for a field of that type.
VALUE_TYPES: dict[type, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,)}


class RopeSettings(NamedTuple):
    """Rope's settings of a config.json."""

    theta: float
    type: str
    scaling: RopeScaling | None
    unknown_keys: list[str]


def read_config(folder: str) -> DecoderConfig:
    """Read the folder's config.json; see parse_config."""
    path = Path(folder) / "config.json"
    return parse_config(read_json(path), str(path))


def parse_config(raw: dict, where: str) -> DecoderConfig:
    """Convert config.json of transformers 4 or 5 to a DecoderConfig.

    Raises ModelFolderError, which names `where`, for an architecture or an option that is not
    implemented, and for a value that is missing or wrong.
    """
    architectures = raw.get("architectures")
    family = None
    if isinstance(architectures, list) and len(architectures) == 1:
        family = ARCHITECTURES.get(architectures[0])
    if family is None:
        raise ModelFolderError(
            f"{where}: architecture {architectures} is not implemented; "
            f"known: {', '.join(ARCHITECTURES)}"
        )
    try:
        rope = _read_rope(raw)
        unsupported = _find_unsupported(raw, family, rope)
        config = _convert_config(raw, family, rope)
    except KeyError as e:
        raise ModelFolderError(f"{where}: key {e} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError) as e:
        raise ModelFolderError(f"{where}: a value is of the wrong kind: {e}") from None
    if unsupported:
        raise ModelFolderError(
            f"{where}: not implemented: {', '.join(unsupported)}; use another model"
        )
    _check_values(config, where)
    return config


def make_config_json(config: DecoderConfig) -> dict:
    """Make config.json of a config, in transformers 4's spelling of rope.

    Transformers 5 reads it too, 4 reads only it.
    """
    architecture_of = {family: name for name, family in ARCHITECTURES.items()}
    raw: dict[str, Any] = dict(
        architectures=[architecture_of[config.family]],
        model_type=config.family,
    )
    for field in fields(config):
        if field.name not in ("family", "rope_scaling"):
            raw[field.name] = getattr(config, field.name)
    if config.rope_scaling:
        raw["rope_scaling"] = dict(rope_type="llama3", **asdict(config.rope_scaling))
    raw["hidden_act"] = "silu"
    raw["use_cache"] = True
    return raw


def _read_rope(raw: dict) -> RopeSettings:
    """Read rope's settings under the names of transformers 4 and 5."""
    # transformers 4's name, then 5's; 5 too prefers 4's
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    rope_type = rope.pop("rope_type", rope.pop("type", "default"))
    scaling = None
    if rope_type == "llama3":
        values = {field.name: rope.pop(field.name) for field in fields(RopeScaling)}
        scaling = RopeScaling(**values)
    return RopeSettings(theta, rope_type, scaling, unknown_keys=list(rope))


def _convert_config(raw: dict, family: str, rope: RopeSettings) -> DecoderConfig:
    """Read the fields of a DecoderConfig, with transformers' defaults."""
    with_defaults = CONFIG_DEFAULTS[family] | raw
    num_heads = raw["num_attention_heads"]
    num_kv_heads = with_defaults["num_key_value_heads"]
    head_dim = with_defaults["head_dim"]
    if num_kv_heads is None:
        num_kv_heads = num_heads
    if head_dim is None:
        head_dim = raw["hidden_size"] // num_heads
    return DecoderConfig(
        family=family,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        max_position_embeddings=with_defaults["max_position_embeddings"],
    )


def _find_unsupported(raw: dict, family: str, rope: RopeSettings) -> list[str]:
    """List the options of config.json that the decoder does not implement, in words."""
    has_known_rope = rope.type in ROPE_TYPES
    other_layers = set(raw.get("layer_types") or ()) - {"full_attention"}
    activation = raw.get("hidden_act", "silu")
    bias = raw.get("attention_bias", raw.get("qkv_bias", family == "qwen2"))
    is_asked = {
        f"rope type {rope.type!r} (known: {', '.join(ROPE_TYPES)})": not has_known_rope,
        f"rope with {', '.join(rope.unknown_keys)}": rope.unknown_keys and has_known_rope,
        "partial_rotary_factor": raw.get("partial_rotary_factor", 1) != 1,
        "a sliding window": raw.get("use_sliding_window") or other_layers,
        f"activation {raw.get('hidden_act')!r} (known: silu)": activation != "silu",
        f"attention_bias {bias} in {raw['architectures'][0]}": bool(bias) != (family == "qwen2"),
        "mlp_bias": raw.get("mlp_bias"),
        "quantization_config": raw.get("quantization_config"),
    }
    return [option for option, asked in is_asked.items() if asked]


def _check_values(config: DecoderConfig, where: str) -> None:
    """Raise ModelFolderError for values of a wrong type, or that contradict each other."""
    _check_types(config, where)
    if config.rope_scaling:
        _check_types(config.rope_scaling, where)

    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads
    head_dim = config.head_dim
    if heads % kv_heads or head_dim % 2:
        raise ModelFolderError(
            f"{where}: num_attention_heads {heads} must be a multiple of "
            f"num_key_value_heads {kv_heads}, and head_dim {head_dim} even"
        )
    scaling = config.rope_scaling
    if scaling and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ModelFolderError(
            f"{where}: rope's high_freq_factor {scaling.high_freq_factor} must be above "
            f"low_freq_factor {scaling.low_freq_factor}"
        )


def _check_types(settings: DecoderConfig | RopeScaling, where: str) -> None:
    """Raise ModelFolderError unless numbers are positive and bools are bools."""
    for name, kind in get_type_hints(type(settings)).items():
        if kind not in VALUE_TYPES:
            continue
        value = getattr(settings, name)
        is_wrong_type = type(value) not in VALUE_TYPES[kind]
        if is_wrong_type or not isinstance(value, bool) and value <= 0:
            expected = "bool" if kind is bool else f"positive {kind.__name__}"
            raise ModelFolderError(f"{where}: {name} must be a {expected}, found {value!r}")
