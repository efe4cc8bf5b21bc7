"""The names that version 0.1 gave to settings and to logged values, and their names today.

A config with an old name is refused, and the message has the new one. A run that 0.1 left can still
be reported, explained and replayed: its files are read with the old names translated.
"""

from __future__ import annotations

from typing import Any

# Settings: old dotted key -> new dotted key.
RENAMED_SETTINGS = {
    "run.patience": "run.collective_timeout",
    "retriever.upstream_wrapping": "retriever.reproduce_upstream_query_bug",
    "reward.overlong": "reward.overlong_buffer",
    "sampling.cache_gib": "sampling.kv_cache_gib",
    "sampling.resample": "sampling.dynamic_sampling",
    "loss.average": "loss.agg_mode",
    "loss.clip": "loss.clip_ratio_low",
    "loss.clip_high": "loss.clip_ratio_high",
    "loss.kl": "loss.kl_coef",
    "loss.entropy": "loss.entropy_coef",
    "loss.reference_on_host": "loss.reference_cpu_offload",
    "loss.importance_cap": "loss.tis_cap",
    "loss.std_floor": "loss.advantage_eps",
    "sft.keep": "sft.filter",
    "sft.least": "sft.min_score",
    "optimizer.final_lr": "optimizer.min_lr_ratio",
    "optimizer.clip_norm": "optimizer.max_grad_norm",
    "optimizer.on_host": "optimizer.cpu_offload",
    "train.inner_steps": "train.num_mini_batches",
    "train.checkpointing": "train.gradient_checkpointing",
    "train.reduce": "train.gradient_sync",
    "save.keep": "save.keep_last",
}

# Values of settings: new dotted key -> {old value: new value}.
RENAMED_VALUES = {
    "model.head": {"one_shot": "fused"},
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
    "reward_spread": "reward_std",
    "zero_variance": "frac_reward_zero_std",
    "adv_std": "advantage_std",
    "clip_share": "clip_ratio",
    "ratio_off": "ratio_abs_deviation",
    "trust": "importance_sampling_ratio",
    "dlogp_norm": "grad_logp_norm",
    "trained_share": "trained_token_frac",
    "resampled": "resampled_groups",
    "distinct": "unique_completion_frac",
    "completion_tokens": "completion_length",
    "unfinished": "truncated_ratio",
    "unparsable": "format_error_rate",
    "errors": "format_errors",
    "val_errors": "val_format_errors",
    "skipped": "skipped_steps",
    "logprob_gap_mean": "sampling_logp_diff_mean",
    "logprob_gap_p999": "sampling_logp_diff_p999",
    "max_logprob_gap": "sampling_logp_diff_max",
    "reward_wait": "reward_wait_frac",
    "seconds": "timing_s",
}

# Rows of rollouts.jsonl.gz: old key -> new key.
RENAMED_ROLLOUT_KEYS = {"parts": "reward_terms", "adv": "advantage"}

# summary.json: old key -> new key.
RENAMED_SUMMARY_KEYS = {
    "parts": "reward_terms",
    "logprob_gap_mean": "sampling_logp_diff_mean",
    "logprob_gap_p999": "sampling_logp_diff_p999",
    "max_logprob_gap": "sampling_logp_diff_max",
}


# The object "teacher" of summary.json: old key -> new key.
RENAMED_TEACHER_KEYS = {"errors": "format_errors"}


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
