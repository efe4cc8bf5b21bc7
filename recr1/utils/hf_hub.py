"""A Hugging Face model folder: where it is, its JSON files, its tokenizer, the ids that end a text.
model/hf_weights.py reads its weights.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

# what is fetched from the hub: never pickled weights, never code
DOWNLOADED_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "*.safetensors",
    "model.safetensors.index.json",
]


class ModelFolderError(ValueError):
    """The model folder cannot be used. The message names the file and says what to do."""


def resolve_model_folder(path: str, key: str = "model.path") -> str:
    """Return the path of a model folder, its ~ expanded. For a hub id (org/name) it is the local
    folder in transformers' own cache; it is downloaded if it is not there. Raises ModelFolderError.

    key: the setting that has the path.
    """
    path = os.path.expanduser(path)
    if path and Path(path).is_dir():
        return path
    if Path(path).exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        raise ModelFolderError(
            f"{path}: neither a folder nor a hub id (org/name); "
            f"{key} must be a Hugging Face model folder or the id of one"
        )
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return snapshot_download(path, allow_patterns=DOWNLOADED_FILES)
    except errors.GatedRepoError:
        why = (
            f"gated on the hub; accept its terms at https://huggingface.co/{path}, "
            "then `hf auth login`"
        )
    except errors.RepositoryNotFoundError:
        why = (
            "no such folder, and no such model on the hub; "
            "correct the name, or `hf auth login` if the model is private"
        )
    except errors.LocalEntryNotFoundError:
        why = (
            f"no such folder, not (or not wholly) in {constants.HF_HUB_CACHE}, "
            "and the hub is out of reach; go online once, or give a folder"
        )
    except Exception as e:  # the hub's client raises its HTTP library's errors too
        message = " ".join(str(e).split())
        why = (
            f"no such folder, and the hub failed with {type(e).__name__}: {message}; "
            "give a folder, or try again"
        )
    raise ModelFolderError(f"{path}: {why}")


def read_json(path: Path, key: str = "model.path") -> dict:
    """Return the JSON object in a file. Raises ModelFolderError if there is no such file or it
    holds something else.

    key: the setting that has the folder's path.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelFolderError(
            f"{path}: no such file; {key} must be a Hugging Face model folder"
        ) from None
    except ValueError as e:
        raise ModelFolderError(f"{path}: not JSON: {e}") from None
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def load_tokenizer(folder: str) -> Any:
    """Return the folder's tokenizer, a transformers object. Raises ModelFolderError if there is
    none or it has no chat template.
    """
    from transformers import AutoTokenizer

    read_json(Path(folder) / "config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as e:
        first_line = str(e).splitlines()[0]
        raise ModelFolderError(f"{folder}: no tokenizer could be loaded: {first_line}") from None
    if not tokenizer.chat_template:
        raise ModelFolderError(
            f"{folder}: the tokenizer has no chat template; "
            "use an instruct model, or add chat_template.jinja"
        )
    # Notes on this loading, which transformers would save as if they were settings.
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def read_stop_token_ids(folder: str, tokenizer: Any) -> frozenset[int]:
    """Return the EOS ids of generation_config.json and the tokenizer's own: any of them ends a
    text. Raises ModelFolderError if there is none.
    """
    ids = {tokenizer.eos_token_id}
    path = Path(folder) / "generation_config.json"
    if path.exists():
        eos = read_json(path).get("eos_token_id")  # an id, a list of ids, or nothing
        ids.update(eos if isinstance(eos, list) else [eos])
    ids.discard(None)
    if not ids:
        raise ModelFolderError(
            f"{folder}: neither generation_config.json nor the tokenizer names an EOS token; "
            "no text could ever end"
        )
    return frozenset(ids)
