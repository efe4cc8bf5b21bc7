"""The Qwen2 decoder, with Hugging Face's parameter names, on packed rows: no batch dimension, no padding, no mask.

Legend: M packed tokens, C width, H query heads, K kv heads, D head dim, V vocabulary. Attention is passed in as a callable
(layer, q, k, v) -> (M, H, D): packed rows in training (attention.py), the KV cache in sampling (cache.py).
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class ModelConfig:
    """The shape, in config.json's words."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))   # at least float32; float64 stays
        return self.weight * F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=True)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=True)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=True)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, rope, attention):
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))  # (M, heads, D)
        return self.o_proj(attention(self.layer, rotate(q, rope), rotate(k, rope), v).flatten(1))             # (M, C)


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, layer), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, rope, attention):
        x = x + self.self_attn(self.input_layernorm(x), rope, attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """tokens (M,), positions (M,) -> hidden (M, C), after the last norm. The head stands apart: see `head_weight`."""

    def __init__(self, config: ModelConfig, reachable: int | None = None):
        super().__init__()
        self.config = config
        self.reachable = reachable or config.vocab_size   # ids the tokenizer has: nobody samples or scores beyond (policy.py)
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps)))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attention) -> torch.Tensor:
        x = F.embedding(tokens, self.model.embed_tokens.weight)
        rope = rotation(positions, self.config, x.dtype)
        for block in self.model.layers:
            x = block(x, rope, attention)
        return self.model.norm(x)

    @property
    def head_weight(self) -> torch.Tensor:
        """(V', C): the rows of the head that the tokenizer can reach; the embedding's own when tied."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return head.weight[:self.reachable]


def rotation(positions: torch.Tensor, c: ModelConfig, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of RoPE's angles (RoFormer, eq. 15), each (M, 1, D), for halves laid out as Hugging Face does."""
    wide = torch.promote_types(dtype, torch.float32)
    power = torch.arange(0, c.head_dim, 2, device=positions.device, dtype=wide) / c.head_dim
    angle = positions.to(wide)[:, None] / c.rope_theta ** power                  # (M, D/2)
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turns each pair (x_i, x_{i+D/2}) by its angle. x (M, heads, D)."""
    cos, sin = rope
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin
