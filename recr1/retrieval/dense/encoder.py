"""A Hugging Face encoder (BLaIR, RoBERTa, SimCSE, BERT and sentence encoders) as texts -> unit
vectors.

A text's vector is a function of the text alone: it is padded to a multiple of 16 tokens, and
batches to a multiple of 8 texts, so that the kernels see the same shapes whatever else is in the
batch. On a CPU that makes it equal to the bit (tested); a reward then does not depend on which
other queries were asked with it, and a resumed run is the same run.

Legend: n texts, L tokens of a text, C width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from recr1.utils.hf_hub import DOWNLOADED_FILES, ModelFolderError, read_json, resolve_model_folder
from recr1.utils.terminal import describe_exception

WINDOW = 8192  # texts tokenised and sorted by length together

TOKENS = {"cpu": 4096, "cuda": 65536}  # tokens of a batch

CONVERT = (
    'python -c "import sys; from transformers import AutoModel, AutoTokenizer; '
    '[c.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2]) for c in (AutoModel, AutoTokenizer)]"'
)


class Encoder:
    """`path`: folder or hub id. pooling: cls (the first token) or mean (of the text's tokens) of
    the last hidden state; then L2-normalised.

    width: C. digest: sha256 over the folder's files that decide a vector. Raises ModelFolderError
    for a folder that is no encoder.
    """

    def __init__(
        self,
        path: str,
        pooling: str = "cls",
        max_length: int = 512,
        dtype: str = "float32",
        device: torch.device = torch.device("cpu"),
    ):
        folder = resolve_model_folder(path, "retriever.encoder")
        self.pooling = pooling
        self.max_length = max_length
        self.dtype = dtype
        self.device = device
        self.path = path
        self.tokenizer, self.model = _load_encoder(folder, getattr(torch, dtype))
        self.model.to(device)
        self.width = self.model.config.hidden_size
        if max_length > (most := _count_positions(self.model.config, self.tokenizer)):
            raise ModelFolderError(
                f"retriever.max_length: {max_length} is more than the {most} tokens that {path} takes; set retriever.max_length={most}"
            )
        self.digest = _hash_folder(Path(folder))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """n texts -> (n, C) float32, of length 1 each."""
        return np.concatenate([np.empty((0, self.width), np.float32), *self.windows(texts)])

    def windows(
        self, texts: Sequence[str], done: Callable[[int], None] = lambda n: None
    ) -> Iterator[np.ndarray]:
        """The vectors of texts in their order, some thousands at a time: (up to WINDOW, C) float32.
        done: told how many more are ready.
        """
        for start in range(0, len(texts), WINDOW):
            # split_special_tokens: "</s>" in a title is text
            ids = self.tokenizer(
                list(texts[start : start + WINDOW]),
                truncation=True,
                max_length=self.max_length,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
            vectors = np.empty((len(ids), self.width), np.float32)
            lengths = [min(-(-max(1, len(text)) // 16) * 16, self.max_length) for text in ids]
            # the largest first: what does not fit fails at once
            for length in sorted(set(lengths), reverse=True):
                same = [i for i, n in enumerate(lengths) if n == length]
                rows = max(8, TOKENS[self.device.type] // length // 8 * 8)
                for at in range(0, len(same), rows):
                    batch = same[at : at + rows]
                    vectors[batch] = self._embed([ids[i] for i in batch], length, rows)
                    done(len(batch))
            if not np.isfinite(vectors).all():
                bad = start + int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
                raise ModelFolderError(
                    f"{self.path}: its vector of {texts[bad][:80]!r} is not finite; set retriever.dtype=float32, or use another encoder"
                )
            yield vectors

    @torch.inference_mode()
    def _embed(self, ids: list[list[int]], length: int, most: int) -> np.ndarray:
        """(n, C) of n texts, padded to (rows, length)."""
        rows = most if self.device.type == "cuda" else -(-len(ids) // 8) * 8
        tokens = torch.full((rows, length), self.tokenizer.pad_token_id)
        mask = torch.zeros(rows, length, dtype=torch.long)
        for i in range(rows):
            text = ids[i] if i < len(ids) else ids[0]
            tokens[i, : len(text)] = torch.tensor(text, dtype=torch.long)
            mask[i, : max(1, len(text))] = 1  # a row that sees nothing would be NaN
        tokens = tokens.to(self.device)
        mask = mask.to(self.device)
        # (n, L, C)
        hidden = (
            self.model(input_ids=tokens, attention_mask=mask).last_hidden_state[: len(ids)].float()
        )
        seen = mask[: len(ids), :, None]
        # (n, C)
        pooled = hidden[:, 0] if self.pooling == "cls" else (hidden * seen).sum(1) / seen.sum(1)
        return torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()


def _load_encoder(folder: str, dtype: torch.dtype):
    """The folder's tokenizer and model by transformers: nothing pickled, no code of the folder's,
    no weight left at random.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    read_json(Path(folder) / "config.json", "retriever.encoder")
    if not list(Path(folder).glob("*.safetensors")):
        raise ModelFolderError(
            f"{folder}: no *.safetensors; pickled weights are not opened, convert them once where you trust them: {CONVERT} {folder} NEW_FOLDER"
        )
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # its table of heads that an encoder does not need
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, found = AutoModel.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
        )
    except Exception as e:  # safetensors and transformers raise their own and whatever lies beneath
        raise ModelFolderError(
            f"{folder}: no encoder could be loaded: {describe_exception(e)}"
        ) from None
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    # the pooler stands behind what is read
    absent = sorted(name for name in found["missing_keys"] if "pooler" not in name)
    if absent or found["mismatched_keys"]:
        raise ModelFolderError(
            f"{folder}: its weights are not those of its config.json: {len(absent)} are missing, {len(found['mismatched_keys'])} "
            f"have another shape, first: {(absent or sorted(map(str, found['mismatched_keys'])))[0]}"
        )
    if model.config.is_encoder_decoder or not hasattr(model.config, "hidden_size"):
        raise ModelFolderError(
            f"{folder}: {model.config.model_type} is no encoder of texts; use one such as BERT, RoBERTa, BLaIR or SimCSE"
        )
    if tokenizer.pad_token_id is None:
        raise ModelFolderError(
            f"{folder}: its tokenizer has no padding token; give it one (tokenizer_config.json, pad_token)"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise ModelFolderError(
            f"{folder}: its tokenizer has {len(tokenizer)} ids, its model {model.config.vocab_size}; they are not of one encoder"
        )
    return tokenizer, model.eval()


def _count_positions(config, tokenizer) -> int:
    """How many tokens the encoder takes. RoBERTa and its kind count positions from the padding id +
    1.
    """
    most = getattr(config, "max_position_embeddings", 0) or tokenizer.model_max_length
    if config.model_type in (
        "roberta",
        "xlm-roberta",
        "camembert",
        "mpnet",
        "roberta-prelayernorm",
        "xlm-roberta-xl",
        "longformer",
    ):
        most -= tokenizer.pad_token_id + 1
    return min(most, tokenizer.model_max_length)


def _hash_folder(folder: Path) -> str:
    """sha256 over the names and bytes of what is loaded from the folder."""
    digest = hashlib.sha256()
    for path in sorted(
        {p for pattern in DOWNLOADED_FILES for p in folder.glob(pattern) if p.is_file()}
    ):
        with open(path, "rb") as f:
            digest.update(f"{path.name} {hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
