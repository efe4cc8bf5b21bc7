"""Write tiny encoders with random weights, for tests."""

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


SHAPE = dict(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=66,
)
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def write_encoder(folder, family: str = "bert", seed: int = 0, **overrides) -> str:
    """Write a tiny encoder with random weights, biases and norms; RoBERTa counts positions from its
    padding id.
    """
    shape = SHAPE | overrides
    torch.manual_seed(seed)
    if family == "bert":
        tokenizer, model = _build_bert(shape)
    else:
        tokenizer, model = _build_roberta(shape)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _build_bert(shape: dict) -> tuple[BertTokenizerFast, BertModel]:
    continuations = ["##" + letter for letter in LETTERS]
    vocab = _number([*BERT_SPECIAL, *WORDS, *LETTERS, *continuations])
    tokenizer = BertTokenizerFast(vocab=vocab, model_max_length=64)
    config = BertConfig(vocab_size=len(vocab), **shape)
    return tokenizer, BertModel(config)


def _build_roberta(shape: dict) -> tuple[RobertaTokenizerFast, RobertaModel]:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab = _number(ROBERTA_SPECIAL + sorted(alphabet))
    tokenizer = RobertaTokenizerFast(vocab=vocab, merges=[], model_max_length=64)
    config = RobertaConfig(vocab_size=len(vocab), pad_token_id=1, **shape)
    return tokenizer, RobertaModel(config)


def _number(pieces: list[str]) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(pieces)}


def some_texts(n: int, seed: int = 0, most: int = 90) -> list[str]:
    """Draw n texts of 1 to `most` words: some are cut."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(n):
        length = rng.integers(1, most)
        words = rng.choice(WORDS, length)
        texts.append(" ".join(words))
    return texts


def corpus(n: int = 300, seed: int = 0):
    """Return the ids and the texts of n documents."""
    ids = [f"d{i}" for i in range(n)]
    return ids, some_texts(n, seed)
