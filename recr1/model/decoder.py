"""The Qwen2, Qwen3 and Llama 3 decoder, with Hugging Face's parameter names, on packed rows: no
batch dimension, no padding, no mask.

One block for the three: Qwen2 has a bias on q, k, v; Qwen3 a norm over each head of q and k; Llama
3 neither, and may have scaled rope.

Legend: M packed tokens, C width, H query heads, K kv heads, D head dim, V vocabulary. Attention is
passed in as a callable (layer, q, k, v) -> (M, H, D): packed rows in training (model/packed_attention.py), the
KV cache in sampling (sampling/kv_cache.py).
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from recr1.kernels.cpu_linear import Linear
from recr1.model.rope import DecoderConfig, apply_rotary_emb, compute_rope_cos_sin
from recr1.model.varlen_attention import AttentionBackend


class RMSNorm(nn.RMSNorm):
    """torch's, in float32 at least (float64 stays) up to the weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * F.rms_norm(wide, self.normalized_shape, eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: DecoderConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = c.head_dim
        bias = c.family == "qwen2"
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=bias)
        self.k_proj, self.v_proj = (
            Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias) for _ in "kv"
        )
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(c.head_dim, c.rms_norm_eps) if c.family == "qwen3" else nn.Identity()
            for _ in "qk"
        )

    def forward(self, x, rope, attention):
        # (M, heads, D)
        q, k, v = (
            f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = self.q_norm(q)
        k = self.k_norm(k)
        # (M, C)
        return self.o_proj(
            attention(self.layer, apply_rotary_emb(q, rope), apply_rotary_emb(k, rope), v).flatten(
                1
            )
        )


class MLP(nn.Module):
    exact = False  # model.batch_invariant

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.gate_proj, self.up_proj = (
            Linear(c.hidden_size, c.intermediate_size, bias=False) for _ in range(2)
        )
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        gate = self.gate_proj(x)
        # torch's silu takes other bits for what is left of a thread's share than for whole vectors;
        # exp does not
        return self.down_proj(
            (gate / (1 + (-gate).exp()) if self.exact else F.silu(gate)) * self.up_proj(x)
        )


class DecoderLayer(nn.Module):
    def __init__(self, c: DecoderConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(c, layer)
        self.mlp = MLP(c)
        self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(c.hidden_size, c.rms_norm_eps) for _ in range(2)
        )

    def forward(self, x, rope, attention):
        x = x + self.self_attn(self.input_layernorm(x), rope, attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """tokens (M,), positions (M,) -> hidden (M, C), after the last norm. The head stands apart: see
    `head_weight`.
    """

    # the block in which `head_weight` may be used together with the forward; distributed/fsdp.py gathers it
    # there
    root = nullcontext

    def __init__(self, config: DecoderConfig, reachable: int | None = None):
        super().__init__()
        # set_backend changes it
        self.config = config
        self.backend = AttentionBackend()
        # ids the tokenizer has: nobody samples or scores beyond (model/log_probs.py)
        self.reachable = reachable or config.vocab_size
        self.model = nn.ModuleDict(
            dict(
                embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
                layers=nn.ModuleList(
                    DecoderLayer(config, i) for i in range(config.num_hidden_layers)
                ),
                norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
            )
        )
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attention) -> torch.Tensor:
        x = F.embedding(tokens, self.model.embed_tokens.weight)
        rope = compute_rope_cos_sin(positions, self.config, x.dtype)
        for block in self.model.layers:
            x = block(x, rope, attention)
        return self.model.norm(x)

    def set_backend(self, backend: AttentionBackend) -> None:
        """How attention is computed, and whether all is exact (model/varlen_attention.py). Before it is sharded."""
        self.backend = backend
        for block in self.model.layers:
            block.mlp.exact = backend.exact

    @property
    def head_weight(self) -> torch.Tensor:
        """(V', C): the rows of the head that the tokenizer can reach; the embedding's own when
        tied.
        """
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return head.weight[: self.reachable]
