"""Checks of a config against a model and a machine, made before anything is written."""

from __future__ import annotations

import torch

from recr1.config.schema import Config, ConfigError
from recr1.distributed import collectives as dist
from recr1.kernels.availability import explain_unavailable
from recr1.memory import measure as memory
from recr1.model.rope import DecoderConfig
from recr1.sampling.kv_cache import count_slots

# of what a GPU has free: the share that the sampler's cache may take by itself
KV_CACHE_SHARE = 0.8


def check_lengths(cfg: Config, max_positions: int) -> None:
    """Raise ConfigError unless the longest text that a run may make fits.

    It must fit into a micro-batch and into the model's `max_positions`.
    """
    longest = cfg.prompt.max_tokens + cfg.sampling.max_new_tokens
    limits = {
        "train.tokens_per_micro_batch": cfg.train.tokens_per_micro_batch,
        "the model's max_position_embeddings": max_positions,
    }
    for name, limit in limits.items():
        if longest > limit:
            raise ConfigError(
                f"prompt.max_tokens + sampling.max_new_tokens = {longest} exceeds {name} = {limit}"
            )


def check_kv_cache(cfg: Config, slot_bytes: int) -> None:
    """Raise ConfigError unless the sampler's cache has room for one text of the longest kind."""
    budget = compute_kv_cache_budget(cfg, slot_bytes)
    if budget is None:
        return
    slots_per_text = count_slots(cfg.prompt.max_tokens + cfg.sampling.max_new_tokens)
    if budget < slots_per_text:
        budget_gib = budget * slot_bytes / 2**30
        text_gib = slots_per_text * slot_bytes / 2**30
        raise ConfigError(
            f"sampling.kv_cache_gib: {budget_gib:.2g} GiB do not hold one text, "
            f"which takes {text_gib:.2g}"
        )


def compute_kv_cache_budget(cfg: Config, slot_bytes: int) -> int | None:
    """Return how many slots the sampler's cache may have, None for no limit.

    The budget is sampling.kv_cache_gib, or four fifths of what a GPU has free; on a CPU there is no
    limit.
    """
    budget_bytes = cfg.sampling.kv_cache_gib * 2**30
    if not budget_bytes:
        budget_bytes = KV_CACHE_SHARE * (memory.get_free_bytes() or 0)
    return int(budget_bytes / slot_bytes) if budget_bytes else None


def count_slot_bytes(shape: DecoderConfig, compute_dtype: torch.dtype) -> int:
    """Return the bytes of one slot of the cache: keys and values of one token in every layer."""
    heads = shape.num_hidden_layers * shape.num_key_value_heads
    return 2 * heads * shape.head_dim * compute_dtype.itemsize


def check_kernels(cfg: Config) -> None:
    """Raise ConfigError where model.kernels cannot run on this rank's device."""
    reason = explain_unavailable(cfg.model.kernels, dist.device())
    if reason:
        raise ConfigError(reason)
