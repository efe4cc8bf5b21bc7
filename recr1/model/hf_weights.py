"""HF folder (config.json, safetensors, tokenizer, chat template, generation_config) <-> our
Decoder. Names are equal, so nothing is mapped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recr1.model.decoder import Decoder
from recr1.model.hf_config import make_config_json, read_config
from recr1.model.rope import DecoderConfig
from recr1.utils.hf_hub import ModelFolderError, read_json


class SafetensorsFolder:
    """A folder's weights, one file or sharded, read lazily: `shapes` comes from the headers,
    tensors[name] reads that one, on CPU.
    """

    def __init__(self, folder: str):
        one = Path(folder) / "model.safetensors"
        index = Path(folder) / "model.safetensors.index.json"
        if one.exists() or not index.exists():  # as transformers prefers
            self.path = one
            file = _open_safetensors(one)
            self.files = dict.fromkeys(file.keys(), file)
        else:
            self.path = index
            where = read_json(index).get("weight_map")
            if not isinstance(where, dict) or not all(
                isinstance(file, str) for file in where.values()
            ):
                raise ModelFolderError(
                    f"{index}: weight_map must name the file of each tensor; download the folder again"
                )
            # by its text: in the hub's cache an honest file is a link to outside
            for file in where.values():
                if ".." in PurePosixPath(file).parts or PurePosixPath(file).is_absolute():
                    raise ModelFolderError(
                        f"{index}: {file!r} lies outside the folder; do not use this model"
                    )
            opened = {
                file: _open_safetensors(Path(folder) / file) for file in sorted({*where.values()})
            }
            held = {file: set(f.keys()) for file, f in opened.items()}
            for name, file in where.items():
                if name not in held[file]:
                    raise ModelFolderError(
                        f"{Path(folder) / file}: no tensor {name}, although {index.name} says so; download the folder again"
                    )
            self.files = {name: opened[file] for name, file in where.items()}
        self.shapes = {name: tuple(f.get_slice(name).get_shape()) for name, f in self.files.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.files[name].get_tensor(name)

    def check(self, model: Decoder) -> None:
        """Raises ModelFolderError unless the tensors are those of the model. A tied head's second
        copy, which some exporters write, may be there.
        """
        want = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        have = {
            name: shape
            for name, shape in self.shapes.items()
            if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
        }
        if want != have:
            wrong = sorted(
                name for name in want.keys() | have.keys() if want.get(name) != have.get(name)
            )
            raise ModelFolderError(
                f"{self.path}: {len(wrong)} tensors are missing, unknown or of another shape than config.json says, "
                f"first {wrong[0]}: expected {want.get(wrong[0])}, found {have.get(wrong[0])}"
            )


def _open_safetensors(path: Path):
    """A safetensors file. Its header says how long it is, so a torn one is found here."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        pickled = sorted(
            p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".pt", ".pth")
        )
        hint = (
            f"; only safetensors is read, not {pickled[0]}: load it with transformers and save_pretrained it"
            if pickled
            else ""
        )
        raise ModelFolderError(f"{path}: no such file{hint}") from None
    except (SafetensorError, OSError) as e:
        raise ModelFolderError(
            f"{path}: not a readable safetensors file: {e}; download or copy it again"
        ) from None


def make_empty_model(folder: str, reachable: int | None = None) -> Decoder:
    """The Decoder of config.json on the meta device: names and shapes, no memory. `reachable`: how
    many ids the tokenizer has.
    """
    config = read_config(folder)
    if (reachable or 0) > config.vocab_size:
        raise ModelFolderError(
            f"{folder}/config.json: vocab_size {config.vocab_size} is less than the tokenizer's {reachable} ids; "
            "the tokenizer is another model's, or tokens were added without resizing the embedding"
        )
    with torch.device("meta"):
        return Decoder(config, reachable)


def load_model(folder: str, reachable: int | None = None, dtype=torch.float32) -> Decoder:
    """The folder's Decoder with its weights, in `dtype`, on CPU."""
    model = make_empty_model(folder, reachable)
    tensors = SafetensorsFolder(folder)
    tensors.check(model)
    # copies, because what safetensors gives is the mapped file: whoever rewrites it would rewrite
    # the model
    model.load_state_dict(
        {name: tensors[name].to(dtype, copy=True) for name in model.state_dict()}, assign=True
    )
    return model


def save_model(
    config: DecoderConfig,
    state: Iterable[tuple[str, torch.Tensor]],
    tokenizer,
    stops: frozenset[int],
    folder: str,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes a standard HF folder that AutoModelForCausalLM loads; a tied head is not in `state`.

    `state` gives (name, tensor) one by one, all of one dtype, on any device; at most
    `max_file_bytes` of them are held at a time, then they become a file: model.safetensors when
    there is only one, else model-0000i-of-0000n.safetensors and their index.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    held = {}
    parts = []
    dtypes = set()
    numel = 0
    size = 0

    def close_file():
        save_file(held, out / f"{len(parts)}.partial", metadata={"format": "pt"})
        parts.append(list(held))
        held.clear()

    for name, t in state:
        if held and sum(h.nbytes for h in held.values()) + t.nbytes > max_file_bytes:
            close_file()
        # a copy: the next tensor may come in the same memory
        held[name] = t.detach().to("cpu", copy=True).contiguous()
        dtypes = dtypes | {t.dtype}
        numel = numel + t.numel()
        size = size + t.nbytes
    close_file()
    if len(dtypes) != 1:
        raise ValueError(f"{folder}: the tensors of a model must have one dtype, found {dtypes}")
    for old in (
        *out.glob("model-*-of-*.safetensors"),
        out / "model.safetensors",
        out / "model.safetensors.index.json",
    ):
        # of an earlier save: a reader would prefer one file to the shards
        old.unlink(missing_ok=True)
    files = (
        ["model.safetensors"]
        if len(parts) == 1
        else [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    )
    for i, file in enumerate(files):
        os.replace(out / f"{i}.partial", out / file)
    if len(parts) > 1:
        _write_json(
            out / "model.safetensors.index.json",
            dict(
                metadata=dict(total_parameters=numel, total_size=size),
                weight_map={
                    name: file for names, file in zip(parts, files) for name in sorted(names)
                },
            ),
        )
    eos = sorted(stops)
    dtype = str(dtypes.pop()).removeprefix("torch.")
    _write_json(
        out / "config.json",
        make_config_json(config)
        | dict(torch_dtype=dtype, bos_token_id=tokenizer.bos_token_id, eos_token_id=eos),
    )
    _write_json(
        out / "generation_config.json", dict(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    )
    tokenizer.save_pretrained(out)
    SafetensorsFolder(folder).check(make_empty_model(folder))


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
