"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and the shape of a decoder."""

from dataclasses import dataclass
from functools import lru_cache
from math import pi

import torch


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's rope for contexts longer than it was first trained on ("llama3" in config.json):
    see `frequencies`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class DecoderConfig:
    """The shape, in config.json's words."""

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
def compute_inv_freq(c: DecoderConfig, device, dtype) -> torch.Tensor:
    """(D/2,): radians per position of RoPE's pairs (RoFormer, eq. 15), made once. Each operation is
    transformers' own: at position 8000 another order of them turns a pair by 5e-4 less in float32.

    Scaled (Llama 3.1): a pair that turns more often than `high_freq_factor` times in the original
    context stays, one that turns less often than `low_freq_factor` is slowed by `factor`, and the
    pairs between go from one to the other in a straight line.
    """
    speed = 1 / c.rope_theta ** (
        torch.arange(0, c.head_dim, 2, device=device, dtype=dtype) / c.head_dim
    )
    if (s := c.rope_scaling) is None:
        return speed
    turns = s.original_max_position_embeddings * speed / (2 * pi)
    stay = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return stay * speed + (1 - stay) * speed / s.factor


def compute_rope_cos_sin(
    positions: torch.Tensor, c: DecoderConfig, dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of RoPE's angles, each (M, 1, D), for halves laid out as Hugging Face does."""
    wide = torch.promote_types(dtype, torch.float32)
    angle = positions.to(wide)[:, None] * compute_inv_freq(c, positions.device, wide)  # (M, D/2)
    return tuple(
        torch.cat([x, x], dim=-1)[:, None] for x in (angle.cos().to(dtype), angle.sin().to(dtype))
    )


def apply_rotary_emb(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turns each pair (x_i, x_{i+D/2}) by its angle. x (M, heads, D)."""
    cos, sin = rope
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin
