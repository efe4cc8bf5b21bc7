"""The Qwen2, Qwen3 and Llama 3 decoder, with Hugging Face's parameter names, on packed rows.

There is no batch dimension, no padding and no mask. One block serves the three families: Qwen2 has
a bias on q, k, v; Qwen3 a norm over each head of q and k; Llama 3 neither, and its rope may be
scaled.

Attention is passed in as a callable (layer, q, k, v) -> (M, H, D): over packed rows in training
(model/packed_attention.py), over the KV cache in sampling (sampling/kv_cache.py).

Legend: M packed tokens, C width, H query heads, K kv heads, D head dim, V vocabulary.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from recr1.distributed.fsdp import Sharded
from recr1.kernels.cpu_linear import Linear
from recr1.kernels.decoder_layer import apply_fused_rms_norm, apply_fused_rope, apply_fused_swiglu
from recr1.model.lora import AdapterSource, FrozenReference
from recr1.model.rope import DecoderConfig, apply_rotary_emb, compute_rope_cos_sin
from recr1.model.varlen_attention import AttentionBackend

# (layer, q (M, H, D), k (M, K, D), v (M, K, D)) -> (M, H, D)
AttentionFunction = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

RopeCosSin = tuple[torch.Tensor, torch.Tensor]


class RMSNorm(nn.RMSNorm):
    """Compute torch's RMSNorm, in float32 at least (float64 stays) up to the weight."""

    fused = False  # model.kernels: triton

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused:
            return apply_fused_rms_norm(x, self.weight, self.eps)
        upcast = x.to(torch.promote_types(x.dtype, torch.float32))
        normalized = F.rms_norm(upcast, self.normalized_shape, eps=self.eps).to(x.dtype)
        return self.weight * normalized


class Attention(nn.Module):
    """Self-attention of one layer: projections, rope, and the attention callable between them."""

    fused = False  # model.kernels: triton

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        width = config.hidden_size
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        has_bias = config.family == "qwen2"

        self.q_proj = Linear(width, q_size, bias=has_bias)
        self.k_proj = Linear(width, kv_size, bias=has_bias)
        self.v_proj = Linear(width, kv_size, bias=has_bias)
        self.o_proj = Linear(q_size, width, bias=False)

        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.family == "qwen3":
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, rope: RopeCosSin, attention: AttentionFunction
    ) -> torch.Tensor:
        q = self._split_heads(self.q_proj(x))  # (M, H, D)
        k = self._split_heads(self.k_proj(x))  # (M, K, D)
        v = self._split_heads(self.v_proj(x))  # (M, K, D)
        q = self.q_norm(q)
        k = self.k_norm(k)
        if self.fused:
            q = apply_fused_rope(q, *rope)
            k = apply_fused_rope(k, *rope)
        else:
            q = apply_rotary_emb(q, rope)
            k = apply_rotary_emb(k, rope)
        out = attention(self.layer, q, k, v)  # (M, H, D)
        return self.o_proj(out.flatten(1))  # (M, C)

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):
    """The gated feed-forward network of one layer (SwiGLU)."""

    exact = False  # model.batch_invariant
    fused = False  # model.kernels: triton

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused:
            return self.down_proj(apply_fused_swiglu(self.gate_proj(x), self.up_proj(x)))
        activated = self._activate(self.gate_proj(x))
        return self.down_proj(activated * self.up_proj(x))

    def _activate(self, gate: torch.Tensor) -> torch.Tensor:
        """Return gate * sigmoid(gate). Without autograd the gate is freed here, before `up` is."""
        if self.exact:
            # torch's silu gives other bits to the rest of a thread's share than to full vectors;
            # exp does not.
            return gate / (1 + (-gate).exp())
        return F.silu(gate)


class DecoderLayer(nn.Module):
    """One transformer block, with norms before attention and MLP."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, rope: RopeCosSin, attention: AttentionFunction
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class Embedding(nn.Embedding):
    """Look up rows of a weight (V, C). On the meta device, nothing is drawn for it.

    There torch's normal_ draws no number either, but imports torch._dynamo: half of a small run's
    time before its first step.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class DecoderBody(nn.ModuleDict):
    """The decoder without its head, under Hugging Face's names."""

    embed_tokens: Embedding
    layers: nn.ModuleList  # of DecoderLayer
    norm: RMSNorm


class Decoder(nn.Module):
    """Compute hidden states: tokens (M,), positions (M,) -> hidden (M, C), after the last norm.

    The head is applied outside: see `head_weight`.

    Args:
        reachable: how many ids the tokenizer has: those below this number. The head ends there, so
            nobody samples or scores ids beyond (model/log_probs.py). None: all of the vocabulary.
    """

    # The block in which `head_weight` may be used together with the forward. distributed/fsdp.py
    # gathers the weight there.
    root = nullcontext

    def __init__(self, config: DecoderConfig, reachable: int | None = None):
        super().__init__()
        self.config = config
        self.backend = AttentionBackend()  # set_backend changes it
        self.adapter: AdapterSource | None = None  # of LoRA; training/load_model.py sets it
        self.reachable = reachable or config.vocab_size
        # The order in which modules are made is the order of their random numbers.
        embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        layers = [DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)]
        self.model = DecoderBody(
            dict(
                embed_tokens=embed_tokens,
                layers=nn.ModuleList(layers),
                norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
            )
        )
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, attention: AttentionFunction
    ) -> torch.Tensor:
        x = F.embedding(tokens, self.model.embed_tokens.weight)
        rope = compute_rope_cos_sin(positions, self.config, x.dtype)
        for layer in self.model.layers:
            x = layer(x, rope, attention)
        return self.model.norm(x)

    def set_backend(self, backend: AttentionBackend) -> None:
        """Set how attention is computed, whether all is exact, and what is one kernel
        (AttentionBackend of model/varlen_attention.py).

        Call it before the decoder is sharded.
        """
        self.backend = backend
        for module in self.modules():
            if isinstance(module, MLP):
                module.exact = backend.exact
            if isinstance(module, (RMSNorm, Attention, MLP)):
                module.fused = backend.fused_layers

    @property
    def head_weight(self) -> torch.Tensor:
        """Return the head's rows that the tokenizer can reach, (V', C).

        They are the embedding's own when tied.
        """
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return head.weight[: self.reachable]


# what trains and what samples: sharded over ranks, or whole
AnyDecoder = Decoder | Sharded
# what log-probs are computed of: these, or a policy's own weights without its adapters
ScoredDecoder = AnyDecoder | FrozenReference
