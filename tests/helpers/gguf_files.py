"""Write tiny models as GGUF, as llama.cpp's convert_hf_to_gguf.py does: names of its own, Llama's
query and key rows in its order, a config and a tokenizer as metadata.
"""

from pathlib import Path

import torch
from helpers.tiny_world import CONTRACT, ROLES, TEMPLATE, tiny_tokenizer, vocabulary

# llama.cpp's kinds of tokens
CONTROL = 3
USER_DEFINED = 4
NORMAL = 1


def permute_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the rows of Llama's q_proj and k_proj in llama.cpp's order: (first half, second half) of
    a head's rows become (first, second) pairs.
    """
    rows, width = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, width)
    return halves.swapaxes(1, 2).reshape(rows, width)


def write_tokenizer(writer, template: str | None, spaced_token: bool) -> None:
    """spaced_token: the contract's token that holds a space is an added one, as it is in
    tiny_tokenizer. transformers loses it.
    """
    tokenizer = tiny_tokenizer()
    id_of = tokenizer.get_vocab()
    tokens = sorted(id_of, key=id_of.get)
    added = [token for token in CONTRACT if spaced_token or " " not in token]
    kinds = dict.fromkeys(ROLES, CONTROL) | dict.fromkeys(added, USER_DEFINED)
    kind_of_tokens = [kinds.get(token, NORMAL) for token in tokens]
    _, merges = vocabulary()
    merge_lines = [" ".join(pair) for pair in merges]

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kind_of_tokens)
    writer.add_token_merges(merge_lines)
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

    name = architecture or model.config.family
    writer = gguf.GGUFWriter(path, name)
    _write_config(writer, model.config)
    if scaling:
        scaling_type = gguf.RopeScalingType(scaling)
        writer.add_rope_scaling_type(scaling_type)
    write_tokenizer(writer, template, spaced_token)
    expected = _write_weights(writer, model, quantized)
    for extra in more_tensors:
        ones = torch.ones(8)
        writer.add_tensor(extra, ones.numpy())

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _write_config(writer, config) -> None:
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


def _write_weights(writer, model, quantized: bool) -> dict[str, torch.Tensor]:
    """Write every weight under llama.cpp's name; return them as they have to be read."""
    import gguf

    config = model.config
    kinds = gguf.MODEL_ARCH_NAMES
    [arch] = [arch for arch in kinds if kinds[arch] == config.family]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    q8 = gguf.GGMLQuantizationType.Q8_0
    heads = {}
    if config.family == "llama":
        heads = dict(q_proj=config.num_attention_heads, k_proj=config.num_key_value_heads)
    expected = {}
    for key, parameter in model.state_dict().items():
        stem, _, kind = key.rpartition(".")
        name = f"{names.get_name(stem)}.{kind}"
        weight = parameter.detach().clone()
        tensor = weight
        projection = stem.rpartition(".")[2]
        if projection in heads:
            tensor = permute_rows(weight, heads[projection])
        if quantized and weight.ndim == 2:
            blocks = gguf.quants.quantize(tensor.numpy(), q8)
            writer.add_tensor(name, blocks, raw_dtype=q8)
            # a block is a part of one row: the rows' order does not matter
            blocks_in_order = gguf.quants.quantize(weight.numpy(), q8)
            values = gguf.quants.dequantize(blocks_in_order, q8)
            expected[key] = torch.from_numpy(values)
        else:
            writer.add_tensor(name, tensor.numpy())
            expected[key] = weight
    return expected
