"""Writes tiny models as GGUF, as llama.cpp's convert_hf_to_gguf.py does: names of its own, Llama's
query and key rows in its order, a config and a tokenizer as metadata.
"""

from pathlib import Path

import torch
from helpers.tiny_world import CONTRACT, ROLES, TEMPLATE, tiny_tokenizer, vocabulary

CONTROL, USER_DEFINED, NORMAL = 3, 4, 1  # llama.cpp's kinds of tokens


def permute_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of Llama's q_proj and k_proj: (first half, second half) of a
    head's rows become (first, second) pairs.
    """
    rows, width = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, width)
    return halves.swapaxes(1, 2).reshape(rows, width)


def write_tokenizer(writer, template: str | None, spaced_token: bool) -> None:
    """spaced_token: the contract's token that holds a space is an added one, as it is in
    tiny_tokenizer. transformers loses it.
    """
    tokenizer = tiny_tokenizer()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    added = [token for token in CONTRACT if spaced_token or " " not in token]
    kinds = dict.fromkeys(ROLES, CONTROL) | dict.fromkeys(added, USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(token, NORMAL) for token in tokens])
    _, merges = vocabulary()
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if template:
        writer.add_chat_template(template)


def write_gguf(
    path: Path,
    model,
    *,
    quantized: bool = False,
    template: str | None = TEMPLATE,
    architecture: str = "",
    more_tensors: tuple[str, ...] = (),
    scaling: str = "",
    spaced_token: bool = False,
) -> dict[str, torch.Tensor]:
    """Write the model of helpers.tiny_world; returns its weights as they have to be read.

    quantized: matrices in 8 bits (Q8_0), so that their values change.
    """
    import gguf

    config = model.config
    name = architecture or config.family
    writer = gguf.GGUFWriter(path, name)
    writer.add_name("Tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    write_tokenizer(writer, template, spaced_token)

    kinds = gguf.MODEL_ARCH_NAMES
    [arch] = [arch for arch in kinds if kinds[arch] == config.family]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    expected = {}
    heads = dict(q_proj=config.num_attention_heads, k_proj=config.num_key_value_heads)
    for key, weight in model.state_dict().items():
        stem, _, kind = key.rpartition(".")
        tensor = weight.detach().clone()
        projection = stem.rpartition(".")[2]
        is_permuted = config.family == "llama" and projection in heads
        if is_permuted:
            tensor = permute_rows(tensor, heads[projection])
        values = tensor.numpy()
        options = {}
        expected[key] = weight.detach().clone()
        if quantized and tensor.ndim == 2:
            q8 = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quants.quantize(values, q8)
            options = dict(raw_dtype=q8)
            # a block is a part of one row: the rows' order does not matter
            in_order = gguf.quants.quantize(weight.detach().numpy(), q8)
            expected[key] = torch.from_numpy(gguf.quants.dequantize(in_order, q8))
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", values, **options)
    for extra in more_tensors:
        writer.add_tensor(extra, torch.ones(8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
