"""Checks of a config against a model, made before anything is written."""

from __future__ import annotations

from recr1.config.schema import Config, ConfigError


def check_lengths(cfg: Config, positions: int) -> None:
    """Raises ConfigError unless the longest text a run may make fits into a micro-batch and into
    the model's `positions`.
    """
    longest = cfg.prompt.max_tokens + cfg.sampling.max_new_tokens
    for what, limit in (
        ("train.tokens_per_micro_batch", cfg.train.tokens_per_micro_batch),
        ("the model's max_position_embeddings", positions),
    ):
        if longest > limit:
            raise ConfigError(
                f"prompt.max_tokens + sampling.max_new_tokens = {longest} exceeds {what} = {limit}"
            )
