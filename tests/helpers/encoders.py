"""Tiny encoders with random weights, for tests."""

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizerFast,
)

WORDS = (
    "red green blue black white lamp chair table shirt kettle guitar camera bicycle for my house "
    "and with old new"
).split()
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def write_encoder(folder, family: str = "bert", seed: int = 0, **overrides) -> str:
    """A tiny encoder with random weights, biases and norms; RoBERTa counts positions from its
    padding id.
    """
    shape = (
        dict(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=66,
        )
        | overrides
    )
    torch.manual_seed(seed)
    if family == "bert":
        pieces = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            *WORDS,
            *LETTERS,
            *("##" + c for c in LETTERS),
        ]
        tokenizer = BertTokenizerFast(
            vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=64
        )
        model = BertModel(BertConfig(vocab_size=len(pieces), **shape))
    else:
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        vocab = {
            piece: i
            for i, piece in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
        }
        tokenizer = RobertaTokenizerFast(vocab=vocab, merges=[], model_max_length=64)
        model = RobertaModel(RobertaConfig(vocab_size=len(vocab), pad_token_id=1, **shape))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def some_texts(n: int, seed: int = 0, most: int = 90) -> list[str]:
    """Of 1 to `most` words: some are cut."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, most))) for _ in range(n)]


def corpus(n: int = 300, seed: int = 0):
    return [f"d{i}" for i in range(n)], some_texts(n, seed)
