"""Make our decoder and transformers' model with the same random weights.

The benches that compare the two use them.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from recr1.model.decoder import Decoder
from recr1.model.rope import DecoderConfig
from recr1.training.load_model import choose_model_backend


def make_qwen2_config(
    layers: int, width: int, inner: int, heads: int, vocabulary: int
) -> DecoderConfig:
    """Return the config of a small Qwen2 with two kv heads and a tied head."""
    return DecoderConfig(
        family="qwen2",
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=width // heads,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )


def make_twins(
    config: DecoderConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Decoder, PreTrainedModel]:
    """Make our decoder and transformers' model with the same random weights.

    They are transformers' own initialization. Plain rope only. Our attention is what a run would
    choose.
    """
    settings = asdict(config)
    family = settings.pop("family")
    theta = settings.pop("rope_theta")
    scaling = settings.pop("rope_scaling")
    assert scaling is None, "rope scaling is not translated"
    their_config = AutoConfig.for_model(
        family,
        **settings,
        rope_parameters=dict(rope_type="default", rope_theta=theta),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            their_config, dtype=dtype, attn_implementation="sdpa"
        )
        model.eval()
        decoder = Decoder(config).to(dtype)
    weights = model.state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    decoder.load_state_dict(weights)
    decoder.set_backend(choose_model_backend(config, "auto", dtype, torch.device(device)))
    return decoder, model
