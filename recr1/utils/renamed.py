"""The names that version 0.1 gave to settings and to logged values, and their names today.

A config with an old name is refused, and the message has the new one. A run that 0.1 left can still
be reported, explained and replayed: its files are read with the old names translated.
"""

from __future__ import annotations

from typing import Any

# Settings: old dotted key -> new dotted key.
RENAMED_SETTINGS = {
    "run.collective_timeout": "run.collective_timeout",
    "retriever.reproduce_upstream_query_bug": "retriever.reproduce_upstream_query_bug",
    "reward.overlong_buffer": "reward.overlong_buffer",
    "sampling.kv_cache_gib": "sampling.kv_cache_gib",
    "sampling.dynamic_sampling": "sampling.dynamic_sampling",
    "loss.agg_mode": "loss.agg_mode",
    "loss.clip_ratio_low": "loss.clip_ratio_low",
    "loss.clip_ratio_high": "loss.clip_ratio_high",
    "loss.kl_coef": "loss.kl_coef",
    "loss.entropy_coef": "loss.entropy_coef",
    "loss.reference_cpu_offload": "loss.reference_cpu_offload",
    "loss.tis_cap": "loss.tis_cap",
    "loss.advantage_eps": "loss.advantage_eps",
    "sft.filter": "sft.filter",
    "sft.min_score": "sft.min_score",
    "optimizer.min_lr_ratio": "optimizer.min_lr_ratio",
    "optimizer.max_grad_norm": "optimizer.max_grad_norm",
    "optimizer.cpu_offload": "optimizer.cpu_offload",
    "train.num_mini_batches": "train.num_mini_batches",
    "train.gradient_checkpointing": "train.gradient_checkpointing",
    "train.gradient_sync": "train.gradient_sync",
    "save.keep_last": "save.keep_last",
}

# Values of settings: new dotted key -> {old value: new value}.
RENAMED_VALUES = {
    "model.head": {"fused": "fused"},
    "loss.agg_mode": {
        "token": "token-mean",
        "sequence": "seq-mean-token-mean",
        "constant": "seq-mean-token-sum-norm",
    },
    "train.gradient_sync": {"micro_batch": "every_micro_batch", "step": "last_micro_batch"},
}

# Flags of `recr1`: old flag -> new flag.
RENAMED_FLAGS = {"--upstream-wrapping": "--reproduce-upstream-query-bug"}

# Rows of metrics.jsonl: old key -> new key.
RENAMED_METRICS = {
    "reward_std": "reward_std",
    "frac_reward_zero_std": "frac_reward_zero_std",
    "advantage_std": "advantage_std",
    "clip_ratio": "clip_ratio",
    "ratio_abs_deviation": "ratio_abs_deviation",
    "trust": "importance_sampling_ratio",
    "grad_logp_norm": "grad_logp_norm",
    "trained_token_frac": "trained_token_frac",
    "resampled": "resampled_groups",
    "distinct": "unique_completion_frac",
    "completion_length": "completion_length",
    "unfinished": "truncated_ratio",
    "unparsable": "format_error_rate",
    "errors": "format_errors",
    "val_errors": "val_format_errors",
    "skipped": "skipped_steps",
    "sampling_logp_diff_mean": "sampling_logp_diff_mean",
    "sampling_logp_diff_p999": "sampling_logp_diff_p999",
    "sampling_logp_diff_max": "sampling_logp_diff_max",
    "reward_wait_frac": "reward_wait_frac",
    "seconds": "timing_s",
}

# Rows of rollouts.jsonl.gz: old key -> new key.
RENAMED_ROLLOUT_KEYS = {"parts": "reward_terms", "adv": "advantage"}

# summary.json: old key -> new key.
RENAMED_SUMMARY_KEYS = {
    "parts": "reward_terms",
    "sampling_logp_diff_mean": "sampling_logp_diff_mean",
    "sampling_logp_diff_p999": "sampling_logp_diff_p999",
    "sampling_logp_diff_max": "sampling_logp_diff_max",
}


def rename_keys(row: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return the row with the old ones of its keys renamed; `names`: old key -> new key."""
    return {names.get(key, key): value for key, value in row.items()}


def rename_settings(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a config's tree, {section: {key: value}}, with its old keys and values renamed."""
    renamed: dict[str, Any] = {}
    for section, settings in tree.items():
        if not isinstance(settings, dict):
            renamed[section] = settings
            continue
        renamed[section] = {}
        for key, value in settings.items():
            dotted_key = f"{section}.{key}"
            new_key = RENAMED_SETTINGS.get(dotted_key, dotted_key)
            values = RENAMED_VALUES.get(new_key, {})
            if isinstance(value, str):
                value = values.get(value, value)
            renamed[section][new_key.removeprefix(f"{section}.")] = value
    return renamed
