"""`recr1 merge`: a model and its LoRA adapter as one plain model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from recr1.config.schema import ConfigError
from recr1.model.adapter_folder import AdapterFolder
from recr1.model.decoder import Decoder
from recr1.model.hf_weights import SafetensorsFolder, make_empty_model, save_model
from recr1.model.lora import A_NAME, B_NAME, compute_scale, merge_adapters
from recr1.utils.files import report_write_errors
from recr1.utils.hf_hub import (
    ModelFolderError,
    load_tokenizer,
    read_stop_token_ids,
    resolve_model_folder,
)

WEIGHT = "weight"


def run_merge(args: argparse.Namespace) -> None:
    """Merge, and print where."""
    num_adapted = merge_folder(args.model, args.adapter, args.out)
    print(f"{args.out}: {args.model} with {args.adapter} in {num_adapted} weights, float32")


def merge_folder(model: str, adapter: str, out: str) -> int:
    """Write the Hugging Face folder `out`: W + s B A in place of each adapted W, in float32.

    One weight at a time is in memory, and what makes a file of five gigabytes.

    Args:
        model: the folder or hub id that the adapter was trained beside.
        adapter: an adapter's folder, ours or PEFT's.
        out: a new or an empty folder.

    Returns:
        The number of adapted weights. Raises ConfigError, ModelFolderError, WriteError.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out: {out} exists and is not empty; name a new folder")
    base = resolve_model_folder(model, "--model")
    decoder = make_empty_model(base)
    weights = SafetensorsFolder(base)
    weights.check(decoder)
    adapters = AdapterFolder(adapter)
    adapted = list_adapted(decoder, adapters)

    tokenizer = load_tokenizer(base)
    stops = read_stop_token_ids(base, tokenizer)
    trained_first = iterate_weights(decoder, weights, adapters, adapted)
    merged = merge_adapters(trained_first, compute_scale(adapters.config))
    with report_write_errors(folder):
        save_model(decoder.config, merged, tokenizer, stops, out)
    return len(adapted)


def list_adapted(decoder: Decoder, adapters: AdapterFolder) -> set[str]:
    """Return the modules that have an adapter. Raises ModelFolderError unless each of its weights
    is an A or a B of the right shape beside a weight of the decoder.
    """
    rank = adapters.config.rank
    expected = {}
    for name, weight in decoder.named_parameters():
        stem = name.removesuffix(WEIGHT)
        if name != stem and weight.ndim == 2:
            N, K = weight.shape
            expected[stem + A_NAME] = (rank, K)
            expected[stem + B_NAME] = (N, rank)
    adapted = set()
    for name, shape in adapters.shapes.items():
        if expected.get(name) != shape:
            raise ModelFolderError(
                f"{adapters.path}: {name} is {shape}, beside this model it would be "
                f"{expected.get(name, 'nothing')}; --model must be what the adapter was trained on"
            )
        adapted.add(name.removesuffix(f".{A_NAME}").removesuffix(f".{B_NAME}"))
    for module in sorted(adapted):
        for part in (A_NAME, B_NAME):
            if f"{module}.{part}" not in adapters.shapes:
                raise ModelFolderError(
                    f"{adapters.path}: {module}.{part} is missing; copy the adapter again"
                )
    return adapted


def iterate_weights(
    decoder: Decoder, weights: SafetensorsFolder, adapters: AdapterFolder, adapted: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, weight) of the model, a weight's adapter before it."""
    for name in decoder.state_dict():
        module = name.removesuffix(f".{WEIGHT}")
        if module in adapted:
            for part in (A_NAME, B_NAME):
                yield f"{module}.{part}", adapters[f"{module}.{part}"]
        yield name, weights[name]
