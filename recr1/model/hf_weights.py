"""Convert between a Hugging Face folder and our Decoder.

The folder holds config.json, safetensors, tokenizer, chat template and generation_config. The names
of the weights are equal, so nothing is mapped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recr1.model.decoder import Decoder
from recr1.model.hf_config import make_config_json, read_config
from recr1.model.rope import DecoderConfig
from recr1.utils.hf_hub import ModelFolderError, read_json

SINGLE_FILE = "model.safetensors"

INDEX_FILE = "model.safetensors.index.json"


class SafetensorsFolder:
    """A folder's weights, in one file or sharded, read lazily.

    `shapes` comes from the headers; tensors[name] reads that one, on CPU.
    """

    def __init__(self, folder: str):
        single = Path(folder) / SINGLE_FILE
        index = Path(folder) / INDEX_FILE
        if single.exists() or not index.exists():  # as transformers prefers
            self.path = single
            file = open_safetensors(single)
            self.files = dict.fromkeys(file.keys(), file)
        else:
            self.path = index
            self.files = _open_shards(Path(folder), index)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, file in self.files.items():
            self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.files[name].get_tensor(name)

    def check(self, model: Decoder) -> None:
        """Raise ModelFolderError unless the tensors are those of the model.

        A tied head's second copy, which some exporters write, may be there.
        """
        expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        shapes = dict(self.shapes)
        if model.config.tie_word_embeddings:
            shapes.pop("lm_head.weight", None)
        if expected == shapes:
            return

        wrong = []
        for name in expected.keys() | shapes.keys():
            if expected.get(name) != shapes.get(name):
                wrong.append(name)
        first = min(wrong)
        raise ModelFolderError(
            f"{self.path}: {len(wrong)} tensors are missing, unknown or of another shape than "
            f"config.json says, first {first}: expected {expected.get(first)}, "
            f"found {shapes.get(first)}"
        )


def make_empty_model(folder: str, reachable: int | None = None) -> Decoder:
    """Make the Decoder of config.json on the meta device: names and shapes, no memory.

    Args:
        reachable: how many ids the tokenizer has. Raises ModelFolderError where the model has
            fewer.
    """
    config = read_config(folder)
    if (reachable or 0) > config.vocab_size:
        raise ModelFolderError(
            f"{folder}/config.json: vocab_size {config.vocab_size} is less than the tokenizer's "
            f"{reachable} ids; the tokenizer is another model's, or tokens were added without "
            "resizing the embedding"
        )
    with torch.device("meta"):
        return Decoder(config, reachable)


def load_model(
    folder: str, reachable: int | None = None, dtype: torch.dtype = torch.float32
) -> Decoder:
    """Load the folder's Decoder with its weights, in `dtype`, on CPU."""
    model = make_empty_model(folder, reachable)
    tensors = SafetensorsFolder(folder)
    tensors.check(model)
    # Copies, because safetensors gives the mapped file: whoever rewrote it would rewrite the
    # model.
    state = {name: tensors[name].to(dtype, copy=True) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    return model


def save_model(
    config: DecoderConfig,
    state: Iterable[tuple[str, torch.Tensor]],
    tokenizer: Any,
    stops: frozenset[int],
    folder: str,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Write a standard HF folder that AutoModelForCausalLM loads; a tied head is not in `state`.

    Args:
        state: (name, tensor) one by one, all of one dtype, on any device.
        stops: the ids that end a text.
        max_file_bytes: at most so many bytes of tensors are held at a time, then they become a
            file: model.safetensors when there is only one, else model-0000i-of-0000n.safetensors
            and their index.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    writer = _ShardWriter(out, max_file_bytes)
    for name, tensor in state:
        writer.add(name, tensor)
    writer.write_shard()
    if len(writer.dtypes) != 1:
        raise ValueError(
            f"{folder}: the tensors of a model must have one dtype, found {writer.dtypes}"
        )
    writer.publish()

    eos_token_id = sorted(stops)
    [dtype] = writer.dtypes
    config_json = make_config_json(config)
    config_json["torch_dtype"] = str(dtype).removeprefix("torch.")
    config_json["bos_token_id"] = tokenizer.bos_token_id
    config_json["eos_token_id"] = eos_token_id
    _write_json(out / "config.json", config_json)
    generation_config = dict(eos_token_id=eos_token_id, pad_token_id=tokenizer.pad_token_id)
    _write_json(out / "generation_config.json", generation_config)
    tokenizer.save_pretrained(out)
    SafetensorsFolder(folder).check(make_empty_model(folder))


class _ShardWriter:
    """Write tensors into files of at most `max_bytes`, under temporary names until `publish`."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder = folder
        self.max_bytes = max_bytes
        self.pending: dict[str, torch.Tensor] = {}  # of the next file
        self.shards: list[list[str]] = []  # the names in each written file
        self.dtypes: set[torch.dtype] = set()
        self.num_parameters = 0
        self.num_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; write the pending ones first where it does not fit beside them."""
        pending_bytes = sum(t.nbytes for t in self.pending.values())
        if self.pending and pending_bytes + tensor.nbytes > self.max_bytes:
            self.write_shard()
        # a copy: the next tensor may come in the same memory
        self.pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self.dtypes.add(tensor.dtype)
        self.num_parameters += tensor.numel()
        self.num_bytes += tensor.nbytes

    def write_shard(self) -> None:
        """Write the pending tensors as a file."""
        save_file(self.pending, self._partial_path(len(self.shards)), metadata={"format": "pt"})
        self.shards.append(list(self.pending))
        self.pending.clear()

    def publish(self) -> None:
        """Give the files their names, in place of an earlier save's."""
        # A reader would prefer one file to the shards.
        for old in self.folder.glob("model-*-of-*.safetensors"):
            old.unlink(missing_ok=True)
        (self.folder / SINGLE_FILE).unlink(missing_ok=True)
        (self.folder / INDEX_FILE).unlink(missing_ok=True)

        num_shards = len(self.shards)
        if num_shards == 1:
            os.replace(self._partial_path(0), self.folder / SINGLE_FILE)
            return
        weight_map = {}
        for i, names in enumerate(self.shards):
            file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
            os.replace(self._partial_path(i), self.folder / file)
            for name in sorted(names):
                weight_map[name] = file
        metadata = dict(total_parameters=self.num_parameters, total_size=self.num_bytes)
        index = dict(metadata=metadata, weight_map=weight_map)
        _write_json(self.folder / INDEX_FILE, index)

    def _partial_path(self, shard: int) -> Path:
        return self.folder / f"{shard}.partial"


def _open_shards(folder: Path, index: Path) -> dict[str, Any]:
    """Open the files that an index names. Returns tensor name -> open file."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise ModelFolderError(
            f"{index}: weight_map must name the file of each tensor; download the folder again"
        )
    # By its text: in the hub's cache an honest file is a link to outside.
    for file in weight_map.values():
        if ".." in PurePosixPath(file).parts or PurePosixPath(file).is_absolute():
            raise ModelFolderError(
                f"{index}: {file!r} lies outside the folder; do not use this model"
            )

    open_files = {}
    tensor_names = {}
    for file in sorted(set(weight_map.values())):
        open_files[file] = open_safetensors(folder / file)
    for file, tensors in open_files.items():
        tensor_names[file] = set(tensors.keys())
    for name, file in weight_map.items():
        if name not in tensor_names[file]:
            raise ModelFolderError(
                f"{folder / file}: no tensor {name}, although {index.name} says so; "
                "download the folder again"
            )
    return {name: open_files[file] for name, file in weight_map.items()}


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file. Its header says how long it is: a torn one is noticed here."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        hint = ""
        pickled = [p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".pt", ".pth")]
        if pickled:
            hint = (
                f"; only safetensors is read, not {min(pickled)}: "
                "load it with transformers and save_pretrained it"
            )
        raise ModelFolderError(f"{path}: no such file{hint}") from None
    except (SafetensorError, OSError) as e:
        raise ModelFolderError(
            f"{path}: not a readable safetensors file: {e}; download or copy it again"
        ) from None


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
