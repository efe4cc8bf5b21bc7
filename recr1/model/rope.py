"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and the shape of a decoder.

Legend: M packed tokens, D head dim.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import pi

import torch


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's rope for contexts longer than it was first trained on, "llama3" in config.json.

    See `compute_inv_freq`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder, in config.json's words."""

    family: str  # qwen2 | qwen3 | llama
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    max_position_embeddings: int


@lru_cache
def compute_inv_freq(
    config: DecoderConfig, device: torch.device | str, dtype: torch.dtype
) -> torch.Tensor:
    """Compute the radians per position of RoPE's pairs, (D/2,) (RoFormer, eq. 15).

    Each operation is transformers' own: at position 8000 another order of them turns a pair by 5e-4
    less in float32.

    Scaled (Llama 3.1): a pair that turns more often than `high_freq_factor` times in the original
    context keeps its frequency, one that turns less often than `low_freq_factor` times is slowed
    down by `factor`, and between them the frequency is interpolated linearly.
    """
    pair = torch.arange(0, config.head_dim, 2, device=device, dtype=dtype)
    inv_freq = 1 / config.rope_theta ** (pair / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    turns_in_context = scaling.original_max_position_embeddings * inv_freq / (2 * pi)
    smooth_range = scaling.high_freq_factor - scaling.low_freq_factor
    smooth_factor = ((turns_in_context - scaling.low_freq_factor) / smooth_range).clamp(0, 1)
    return smooth_factor * inv_freq + (1 - smooth_factor) * inv_freq / scaling.factor


def compute_rope_cos_sin(
    positions: torch.Tensor, config: DecoderConfig, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cos and sin of RoPE's angles, each (M, 1, D), for halves as Hugging Face has them."""
    angle_dtype = torch.promote_types(dtype, torch.float32)
    inv_freq = compute_inv_freq(config, positions.device, angle_dtype)
    angles = positions.to(angle_dtype)[:, None] * inv_freq  # (M, D/2)
    cos = angles.cos().to(dtype)
    sin = angles.sin().to(dtype)
    cos = torch.cat([cos, cos], dim=-1)[:, None]
    sin = torch.cat([sin, sin], dim=-1)[:, None]
    return cos, sin


def apply_rotary_emb(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn each pair (x_i, x_{i+D/2}) by its angle. x (M, heads, D)."""
    cos, sin = rope
    return x * cos + _rotate_half(x) * sin


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)
