"""Turn texts into unit vectors by a Hugging Face encoder.

BLaIR, RoBERTa, SimCSE, BERT and sentence encoders. A text's vector is a function of the text alone:
it is padded to a multiple of 16 tokens, and batches to a multiple of 8 texts, so that the kernels
see the same shapes whatever else is in the batch. On a CPU that makes it equal to the bit (tested);
a reward then does not depend on which other queries were searched with it, and a resumed run is the
same run.

Legend: n texts, L tokens of a text, C width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recr1.utils.hf_hub import DOWNLOADED_FILES, ModelFolderError, read_json, resolve_model_folder
from recr1.utils.terminal import describe_exception

WINDOW = 8192  # texts tokenized and sorted by length together

TOKENS = {"cpu": 4096, "cuda": 65536}  # tokens of a batch

LENGTH_MULTIPLE = 16

BATCH_MULTIPLE = 8

CPU = torch.device("cpu")

CONVERT = (
    'python -c "import sys; from transformers import AutoModel, AutoTokenizer; '
    "[c.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2]) "
    'for c in (AutoModel, AutoTokenizer)]"'
)

# model types that count positions from the padding id + 1
ROBERTA_TYPES = (
    "roberta",
    "xlm-roberta",
    "camembert",
    "mpnet",
    "roberta-prelayernorm",
    "xlm-roberta-xl",
    "longformer",
)


class Encoder:
    """Encode texts as vectors of length 1.

    Args:
        path: folder or hub id.
        pooling: cls (the first token) or mean (of the text's tokens) of the last hidden state; the
            result is L2-normalized.
        max_length: tokens of a text that are read; longer ones are cut.

    width: C. digest: sha256 over the folder's files that decide a vector. Raises ModelFolderError
    for a folder that is no encoder.
    """

    def __init__(
        self,
        path: str,
        pooling: str = "cls",
        max_length: int = 512,
        dtype: str = "float32",
        device: torch.device = CPU,
    ):
        folder = resolve_model_folder(path, "retriever.encoder")
        self.pooling = pooling
        self.max_length = max_length
        self.dtype = dtype
        self.device = device
        self.path = path
        self.tokenizer, self.model = _load_encoder(folder, getattr(torch, dtype))
        self.model.to(device)
        config: Any = self.model.config
        self.width: int = config.hidden_size
        max_positions = _count_positions(config, self.tokenizer)
        if max_length > max_positions:
            raise ModelFolderError(
                f"retriever.max_length: {max_length} is more than the {max_positions} tokens "
                f"that {path} takes; set retriever.max_length={max_positions}"
            )
        self.digest = _hash_folder(Path(folder))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Encode n texts as (n, C) float32, of length 1 each."""
        no_vectors = np.empty((0, self.width), np.float32)
        return np.concatenate([no_vectors, *self.windows(texts)])

    def windows(
        self, texts: Sequence[str], on_progress: Callable[[int], object] = lambda n: None
    ) -> Iterator[np.ndarray]:
        """Yield the vectors of texts in their order, some thousands at a time.

        A window is (up to WINDOW, C) float32. on_progress is told how many more are ready. Raises
        ModelFolderError for a vector that is not finite.
        """
        for start in range(0, len(texts), WINDOW):
            window = list(texts[start : start + WINDOW])
            vectors = self._encode_window(window, on_progress)
            is_finite = np.isfinite(vectors).all(1)
            if not is_finite.all():
                bad_text = window[int(np.flatnonzero(~is_finite)[0])]
                raise ModelFolderError(
                    f"{self.path}: its vector of {bad_text[:80]!r} is not finite; "
                    "set retriever.dtype=float32, or use another encoder"
                )
            yield vectors

    def _encode_window(self, texts: list[str], on_progress: Callable[[int], object]) -> np.ndarray:
        """Return (n, C) float32: texts of one padded length share batches."""
        # split_special_tokens: "</s>" in a title is text
        encoded = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.max_length,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        token_ids = encoded["input_ids"]
        lengths = [self._pad_length(len(ids)) for ids in token_ids]
        vectors = np.empty((len(token_ids), self.width), np.float32)

        # the longest first: what does not fit in memory fails at once
        for length in sorted(set(lengths), reverse=True):
            same_length = [i for i, other in enumerate(lengths) if other == length]
            max_texts = TOKENS[self.device.type] // length // BATCH_MULTIPLE * BATCH_MULTIPLE
            batch_size = max(BATCH_MULTIPLE, max_texts)
            for first in range(0, len(same_length), batch_size):
                batch = same_length[first : first + batch_size]
                batch_ids = [token_ids[i] for i in batch]
                vectors[batch] = self._embed(batch_ids, length, batch_size)
                on_progress(len(batch))
        return vectors

    def _pad_length(self, num_tokens: int) -> int:
        padded = _round_up(max(1, num_tokens), LENGTH_MULTIPLE)
        return min(padded, self.max_length)

    @torch.inference_mode()
    def _embed(self, token_ids: list[list[int]], length: int, batch_size: int) -> np.ndarray:
        """Return the vectors (n, C) of n texts, padded to (padded n, length).

        On a GPU every batch is filled up to batch_size texts, so that there is one shape a length.
        """
        num_texts = len(token_ids)
        if self.device.type == "cuda":
            padded_size = batch_size
        else:
            padded_size = _round_up(num_texts, BATCH_MULTIPLE)

        # Copies of the first text fill up the batch.
        tokens = torch.full((padded_size, length), self.tokenizer.pad_token_id)
        mask = torch.zeros(padded_size, length, dtype=torch.long)
        for i in range(padded_size):
            ids = token_ids[i] if i < num_texts else token_ids[0]
            tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            mask[i, : max(1, len(ids))] = 1  # a text that sees nothing would be NaN
        tokens = tokens.to(self.device)
        mask = mask.to(self.device)

        output = self.model(input_ids=tokens, attention_mask=mask)
        hidden = output.last_hidden_state[:num_texts].float()  # (n, L, C)
        if self.pooling == "cls":
            pooled = hidden[:, 0]  # (n, C)
        else:
            is_token = mask[:num_texts, :, None]  # (n, L, 1)
            pooled = (hidden * is_token).sum(1) / is_token.sum(1)  # (n, C)
        return torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _load_encoder(folder: str, dtype: torch.dtype) -> tuple[Any, torch.nn.Module]:
    """Load the folder's tokenizer and model by transformers.

    Nothing pickled is opened, no code of the folder's runs, no weight is left at random. Raises
    ModelFolderError.
    """
    read_json(Path(folder) / "config.json", "retriever.encoder")
    weight_files = list(Path(folder).glob("*.safetensors"))
    if not weight_files:
        raise ModelFolderError(
            f"{folder}: no *.safetensors; pickled weights are not opened, "
            f"convert them once where you trust them: {CONVERT} {folder} NEW_FOLDER"
        )
    tokenizer, model, loading_info = _load_quietly(folder, dtype)
    _check_weights(folder, loading_info)
    _check_encoder(folder, tokenizer, model.config)
    return tokenizer, model.eval()


def _load_quietly(folder: str, dtype: torch.dtype) -> tuple[Any, torch.nn.Module, dict[str, Any]]:
    """Return tokenizer, model and what transformers says of the loaded weights."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    shows_progress = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # its table of heads that an encoder does not need
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, loading_info = AutoModel.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
        )
    # safetensors and transformers raise exceptions of their own and any of the libraries below
    except Exception as e:
        raise ModelFolderError(
            f"{folder}: no encoder could be loaded: {describe_exception(e)}"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
    return tokenizer, model, loading_info


def _check_weights(folder: str, loading_info: dict[str, Any]) -> None:
    """Raise ModelFolderError where a weight is missing or has another shape."""
    # the pooler comes after the hidden states that are read
    missing = sorted(name for name in loading_info["missing_keys"] if "pooler" not in name)
    mismatched = sorted(map(str, loading_info["mismatched_keys"]))
    if missing or mismatched:
        first, *_ = missing or mismatched
        raise ModelFolderError(
            f"{folder}: its weights are not those of its config.json: {len(missing)} are missing, "
            f"{len(mismatched)} have another shape, first: {first}"
        )


def _check_encoder(folder: str, tokenizer: Any, config: Any) -> None:
    """Raise ModelFolderError where model and tokenizer are not an encoder of texts."""
    if config.is_encoder_decoder or not hasattr(config, "hidden_size"):
        raise ModelFolderError(
            f"{folder}: {config.model_type} is no encoder of texts; "
            "use one such as BERT, RoBERTa, BLaIR or SimCSE"
        )
    if tokenizer.pad_token_id is None:
        raise ModelFolderError(
            f"{folder}: its tokenizer has no padding token; "
            "give it one (tokenizer_config.json, pad_token)"
        )
    if len(tokenizer) > config.vocab_size:
        raise ModelFolderError(
            f"{folder}: its tokenizer has {len(tokenizer)} ids, its model {config.vocab_size}; "
            "they are not of one encoder"
        )


def _count_positions(config: Any, tokenizer: Any) -> int:
    """Return how many tokens the encoder takes.

    RoBERTa and its kind count positions from the padding id + 1.
    """
    max_tokens = tokenizer.model_max_length
    max_positions = getattr(config, "max_position_embeddings", 0) or max_tokens
    if config.model_type in ROBERTA_TYPES:
        max_positions -= tokenizer.pad_token_id + 1
    return min(max_positions, max_tokens)


def _hash_folder(folder: Path) -> str:
    """Return the sha256 over the names and bytes of what is loaded from the folder."""
    paths: set[Path] = set()
    for pattern in DOWNLOADED_FILES:
        paths.update(folder.glob(pattern))
    digest = hashlib.sha256()
    for path in sorted(paths):
        if path.is_file():
            with open(path, "rb") as file:
                file_hash = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.name} {file_hash}\n".encode())
    return digest.hexdigest()
