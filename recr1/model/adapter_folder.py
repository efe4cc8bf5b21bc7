"""Read and write a LoRA adapter as PEFT does: adapter_config.json, adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from recr1.config.schema import ConfigError, LoraConfig
from recr1.model.hf_weights import open_safetensors
from recr1.model.lora import A_NAME, AdapterSource, fits_target
from recr1.utils.hf_hub import ModelFolderError, read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# PEFT wraps the model twice before its own names begin.
PREFIX = "base_model.model."

# What PEFT has and model/lora.py does not: values under which these do nothing.
NEUTRAL_VALUES: dict[str, tuple] = {
    "bias": ("none",),
    "lora_bias": (False, None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
}


class AdapterFolder:
    """An adapter's folder: `config`, `shapes`, and `folder[name]`, which reads a weight on the CPU.

    Names are those of the policy: "model.layers.0.self_attn.q_proj.lora_A.weight". Raises
    ModelFolderError.
    """

    def __init__(self, folder: str):
        self.path = Path(folder)
        if not (self.path / CONFIG_FILE).is_file():
            raise ModelFolderError(
                f"{folder}: holds no {CONFIG_FILE}; name an adapter's folder, as PEFT or a run "
                "with lora.rank writes it"
            )
        self.config = read_lora_config(self.path / CONFIG_FILE)
        if not (self.path / WEIGHTS_FILE).is_file():
            raise ModelFolderError(
                f"{folder}: holds no {WEIGHTS_FILE}; save it by PEFT's "
                "save_pretrained(..., safe_serialization=True)"
            )
        self.file = open_safetensors(self.path / WEIGHTS_FILE)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for key in self.file.keys():
            name = key.removeprefix(PREFIX)
            self.shapes[name] = tuple(self.file.get_slice(key).get_shape())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.file.get_tensor(PREFIX + name)

    def check(self, source: AdapterSource, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ConfigError unless this is an adapter of the run's settings, ModelFolderError
        unless it has the weights of these names and shapes.
        """
        ours = source.config
        theirs = self.config
        wanted = []
        for key in ("rank", "alpha", "rslora"):
            value = getattr(theirs, key)
            if value != getattr(ours, key):
                wanted.append(f"lora.{key}={str(value).lower()}")
        if wanted:
            raise ConfigError(
                f"model.adapter: {self.path} was trained with other settings; "
                f"set {' '.join(wanted)}"
            )
        if self.shapes == shapes:
            return
        wrong = sorted(
            name
            for name in shapes.keys() | self.shapes.keys()
            if shapes.get(name) != self.shapes.get(name)
        )
        raise ModelFolderError(
            f"{self.path / WEIGHTS_FILE}: {len(wrong)} weights are missing, unknown or of another "
            f"shape, first {wrong[0]}: expected {shapes.get(wrong[0])}, found "
            f"{self.shapes.get(wrong[0])}; lora.targets must name what the adapter has, and "
            "model.path the model that it was trained beside"
        )


def read_lora_config(path: Path) -> LoraConfig:
    """Read PEFT's adapter_config.json. `targets` stay at their default: names of weights say them.

    Raises ModelFolderError for what model/lora.py does not compute.
    """
    tree = read_json(path)
    if tree.get("peft_type") != "LORA":
        raise ModelFolderError(f"{path}: peft_type is {tree.get('peft_type')!r}, not LORA")
    for key, neutral in NEUTRAL_VALUES.items():
        if key in tree and tree[key] not in neutral:
            raise ModelFolderError(
                f"{path}: {key} is {tree[key]!r}, which is more than LoRA here; merge the adapter "
                "by PEFT's merge_and_unload and name the result in model.path"
            )
    rank = tree.get("r")
    alpha = tree.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise ModelFolderError(f"{path}: r is {rank!r} and lora_alpha {alpha!r}, not two numbers")
    return LoraConfig(rank=rank, alpha=float(alpha or 0), rslora=bool(tree.get("use_rslora")))


def save_adapter(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    source: AdapterSource,
    linears: Iterable[str],
) -> None:
    """Write the adapter's weights, in float32, and its config.

    Args:
        tensors: (name, weight) of the adapters alone.
        linears: the names of all weights of the blocks that could have one.
    """
    weights = {}
    for name, tensor in tensors:
        weights[PREFIX + name] = tensor.detach().to("cpu", copy=True).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    adapted = [
        name.removeprefix(PREFIX).removesuffix(f".{A_NAME}") for name in weights if A_NAME in name
    ]
    text = json.dumps(make_adapter_config(source, adapted, list(linears)), indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def make_adapter_config(
    source: AdapterSource, adapted: list[str], linears: list[str]
) -> dict[str, Any]:
    """Return what PEFT's adapter_config.json says of an adapter beside the weights `adapted`."""
    alpha = source.config.alpha
    return dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=source.base_model,
        r=source.config.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        use_rslora=source.config.rslora,
        target_modules=shorten_names(adapted, linears),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=False,
        init_lora_weights=True,
        inference_mode=True,
    )


def shorten_names(adapted: list[str], linears: list[str]) -> list[str]:
    """Return the ends of names ("q_proj") where they fit the adapted weights and no other, else
    whole names. PEFT reads both.
    """
    ends = sorted({name.rpartition(".")[2] for name in adapted})
    fitting = [name for name in linears if any(fits_target(name, end) for end in ends)]
    return ends if set(fitting) == set(adapted) else sorted(adapted)
