"""Make a small text encoder with RANDOM weights.

python experiments/make/make_encoder.py [FOLDER] [--corpus F] [--seed N]

A stand-in where no trained encoder is at hand: a BERT of 2 layers x 256 whose word pieces come from
the corpus and whose weights are drawn and never trained. Mean-pooled, it is a random projection of
the words with a little of their context: it matches texts that share words, knows no meaning, and
ranks worse than BM25. What it is good for is to have a second, dense retriever with another order.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel, BertTokenizerFast

from recr1.data.readers import read_corpus

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Write the encoder's folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default="runs/encoder")
    parser.add_argument("--corpus", default=str(ROOT / "experiments/data/msrd/corpus.jsonl.gz"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    _, texts, _ = read_corpus(args.corpus)
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)

    word_pieces = BertWordPieceTokenizer(lowercase=True)
    word_pieces.train_from_iterator(texts, vocab_size=16_000, min_frequency=2, show_progress=False)
    tokenizer = BertTokenizerFast(vocab=word_pieces.get_vocab(), model_max_length=256)

    torch.manual_seed(args.seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=256,
    )
    model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():  # a word's position must not drown which word it is
        model.embeddings.position_embeddings.weight.mul_(0.1)
        model.embeddings.token_type_embeddings.weight.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    corpus = Path(args.corpus).name
    origin = dict(weights="random, never trained", seed=args.seed, corpus=corpus)
    text = json.dumps(origin)
    (folder / "ORIGIN.json").write_text(text + "\n")
    num_weights = sum(weight.numel() for weight in model.parameters())
    num_pieces = len(tokenizer)
    print(f"{folder}: {num_weights:,} random weights, never trained; {num_pieces} word pieces")


if __name__ == "__main__":
    main()
