"""A Hugging Face model folder: where it is, its JSON files, its tokenizer, the ids that end a text.
Its weights: model/hf_weights.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

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
    """A folder as it is; a hub id (org/name) as the local folder in transformers' own cache,
    downloaded when it is not there. key: the setting.
    """
    if path and Path(path).is_dir():
        return path
    if Path(path).exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        raise ModelFolderError(
            f"{path}: neither a folder nor a hub id (org/name); {key} must be a Hugging Face model folder or the id of one"
        )
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return snapshot_download(path, allow_patterns=DOWNLOADED_FILES)
    except errors.GatedRepoError:
        why = f"gated on the hub; accept its terms at https://huggingface.co/{path}, then `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = "no such folder, and no such model on the hub; correct the name, or `hf auth login` if the model is private"
    except errors.LocalEntryNotFoundError:
        why = f"no such folder, not (or not wholly) in {constants.HF_HUB_CACHE}, and the hub is out of reach; go online once, or give a folder"
    except Exception as e:  # the hub's client raises its HTTP library's errors too
        why = f"no such folder, and the hub failed with {type(e).__name__}: {' '.join(str(e).split())}; give a folder, or try again"
    raise ModelFolderError(f"{path}: {why}")


def read_json(path: Path, key: str = "model.path") -> dict:
    """A JSON object. Raises ModelFolderError when the file is absent or holds something else."""
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


def load_tokenizer(folder: str):
    """The folder's tokenizer, by transformers. Raises ModelFolderError when it has none or no chat
    template.
    """
    from transformers import AutoTokenizer

    read_json(Path(folder) / "config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise ModelFolderError(
            f"{folder}: no tokenizer could be loaded: {str(e).splitlines()[0]}"
        ) from None
    if not tokenizer.chat_template:
        raise ModelFolderError(
            f"{folder}: the tokenizer has no chat template; use an instruct model, or add chat_template.jinja"
        )
    # notes on this loading, which transformers would save as if they were settings
    for how in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(how, None)
    return tokenizer


def read_stop_token_ids(folder: str, tokenizer) -> frozenset[int]:
    """Every EOS id of generation_config.json and the tokenizer's own: any of them ends a text."""
    path = Path(folder) / "generation_config.json"
    eos = read_json(path).get("eos_token_id") if path.exists() else None
    ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise ModelFolderError(
            f"{folder}: neither generation_config.json nor the tokenizer names an EOS token; no text could ever end"
        )
    return frozenset(ids)
