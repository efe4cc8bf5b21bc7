"""Read a Config from YAML and `a.b=value` overrides. Every key and type is checked before anything
else happens; nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from pathlib import Path
from typing import Any

import yaml

from recr1.config.schema import Config, ConfigError
from recr1.utils.renamed import RENAMED_SETTINGS, RENAMED_VALUES, rename_settings

# The values that a setting may have.
CHOICES = {
    "reward.metric": ("ndcg", "recall", "mrr", "hit"),
    "model.attention": ("auto", "varlen", "flash", "sdpa"),
    "model.compute": ("auto", "float32", "bfloat16"),
    "model.head": ("fused", "recompute"),
    "model.kernels": ("auto", "torch", "triton"),
    "loss.agg_mode": (
        "",
        "token-mean",
        "seq-mean-token-mean",
        "seq-mean-token-sum",
        "seq-mean-token-sum-norm",
    ),
    "loss.kl_estimator": ("k1", "k2", "k3", "k3_unbiased"),
    "loss.kl_in": ("loss", "reward"),
    "loss.tis_level": ("token", "sequence"),
    "loss.tis_mode": ("truncate", "mask"),
    "reward.bonus_if": ("accurate", "better"),
    "data.on_bad_line": ("stop", "drop"),
    "data.on_long_prompt": ("stop", "drop"),
    "retriever.variant": ("lucene", "okapi"),
    "retriever.length": ("exact", "lucene"),
    "retriever.repeat_terms": ("count", "once"),
    "retriever.scorer": ("torch", "numba"),
    "retriever.pooling": ("cls", "mean"),
    "retriever.index": ("exact", "hnsw"),
    "retriever.dtype": ("float32", "float16", "bfloat16"),
    "optimizer.kind": ("adamw", "muon"),
    "optimizer.on_nonfinite": ("stop", "skip"),
    "train.gradient_sync": ("every_micro_batch", "last_micro_batch"),
    "sft.filter": ("all", "no_worse", "better"),
    "log.track": ("none", "tensorboard", "wandb", "trackio"),
}

# The least value that a setting may have.
MINIMUMS = {
    "run.threads": 0,
    "sampling.group_size": 2,
    "sampling.temperature": 1e-3,
    "sampling.top_p": 1e-3,
    "sampling.kv_cache_gib": 0,
    "sampling.max_new_tokens": 1,
    "train.steps": 1,
    "train.prompts_per_step": 1,
    "train.tokens_per_micro_batch": 1,
    "train.eval_every": 0,
    "train.eval_queries": 0,
    "log.tokens_every": 1,
    "log.print_every": 1,
    "log.show_every": 0,
    "prompt.max_tokens": 1,
    "prompt.title_words": 0,
    "reward.k_train": 1,
    "reward.k_eval": 1,
    "reward.k_list": 1,
    "train.num_mini_batches": 1,
    "sampling.dynamic_sampling": 0,
    "reward.overlong_buffer": 0,
    "loss.clip_ratio_high": 0,
    "loss.entropy_coef": 0,
    "loss.tis_cap": 0,
    "loss.tis_floor": 0,
    "loss.off_policy_mask_threshold": 0,
    "loss.sapo_temperature_pos": 1e-3,
    "loss.sapo_temperature_neg": 1e-3,
    "loss.pass_k": 0,
    "loss.clip_ratio_low": 0,
    "loss.kl_coef": 0,
    "loss.advantage_eps": 0,
    "optimizer.lr": 0,
    "lora.rank": 0,
    "lora.alpha": 1e-6,
    "optimizer.max_grad_norm": 1e-12,
    "optimizer.warmup_steps": 0,
    "data.shuffle_words": 0,
    "optimizer.muon_lr": 0,
    "optimizer.eps": 0,
    "optimizer.weight_decay": 0,
    "optimizer.min_lr_ratio": 0,
    "optimizer.max_skips": 0,
    "run.collective_timeout": 1,
    "save.every": 0,
    "save.keep_last": 2,
    "retriever.max_length": 1,
    "retriever.ef_search": 1,
    "retriever.timeout": 0,
    "sft.epochs": 0,
}

# The greatest value that a setting may have.
MAXIMUMS = {"data.shuffle_words": 1, "sampling.top_p": 1, "optimizer.min_lr_ratio": 1}

RETRIEVERS = ("bm25", "dense", "rank_bm25")

REWARD_TERMS = (
    "ndcg",
    "recall",
    "mrr",
    "hit",
    "lcs",
    "ndcg_gain",
    "category",
    "diversity",
    "novelty",
)

# The values of loss.kind that are GRPO with the advantage of the same name.
ADVANTAGE_KINDS = ("maxrl", "pass_at_k", "gdpo")

# What only one of the loops reads: with the other one such a setting would do nothing.
READ_ONLY_BY = {
    "train": (
        "loss.",
        "sampling.dynamic_sampling",
        "train.num_mini_batches",
        "train.replay",
        "data.shuffle_words",
        "log.tokens_every",
        "log.show_every",
    ),
    "sft": ("sft.",),
}

# What reading YAML raises. ValueError is Python's, where YAML itself is well formed: bytes that are
# not UTF-8, a date that no calendar has, an integer of thousands of digits.
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)


# --- reading ----------------------------------------------------------------------------------


def load_config(path: str, overrides: list[str]) -> Config:
    """Read a YAML file, put each override `a.b=value` (value in YAML) on top, and check the result.

    `base: other.yaml`, named from the file's own folder: that file's settings, with those of this
    one on top. A base has no base. Raises ConfigError: unknown key, wrong type, bad value, no file.
    """
    folder = Path(path).parent
    tree = _read_yaml(Path(path), str(path))
    if "base" in tree:
        tree = _add_base(tree, folder, f"{path}: base")
    for override in overrides:
        _apply_override(tree, override)
    _include_prompt(tree, folder)
    config = _build_dataclass(Config, tree, "")
    return check_config(config)


def load_run_config(folder: Path) -> Config:
    """Read the config.yaml of a run, which an older version of recr1 may have written.

    Raises ConfigError as `load_config` does.
    """
    path = folder / "config.yaml"
    tree = rename_settings(_read_yaml(path, str(path)))
    config = _build_dataclass(Config, tree, "")
    return check_config(config)


def _add_base(tree: dict, folder: Path, name: str) -> dict:
    """Return the settings of the tree's `base` with those of the tree on top."""
    base_path = _check_value(str, tree.pop("base"), name)
    base = _read_yaml(folder / base_path, name)
    if "base" in base:
        raise ConfigError(f"{name}: that file has a base itself; one level is all there is")
    return _merge_trees(base, tree)


def _apply_override(tree: dict, override: str) -> None:
    """Set the value of an override `a.b=value` in the tree."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r}: write it as key=value, e.g. train.steps=10")
    try:
        value = yaml.safe_load(text)
    except UNREADABLE:
        raise ConfigError(f"override {override[:200]!r}: the value is not YAML; quote it") from None

    section = tree
    *section_names, last_name = key.split(".")
    for name in section_names:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {name} is not a section")
    section[last_name] = value


def _read_yaml(path: Path, named_by: str) -> dict:
    """Return a file's tree. `named_by`: what named the file, for messages."""
    source = named_by if str(path) == named_by else f"{named_by}: {path}"
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"{source}: no such file") from None
    except (OSError, *UNREADABLE) as e:
        message = " ".join(str(e).split())
        raise ConfigError(f"{source}: not readable as YAML: {message}") from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(
            f"{source}: expected `key: value` lines at the top, found {type(tree).__name__}"
        )
    return tree or {}


def _merge_trees(lower: dict, upper: dict) -> dict:
    """Merge two trees: sections are joined, and of two values the upper one's is taken."""
    merged = lower | upper
    for key in lower.keys() & upper.keys():
        if isinstance(lower[key], dict) and isinstance(upper[key], dict):
            merged[key] = _merge_trees(lower[key], upper[key])
    return merged


def _include_prompt(tree: dict, folder: Path) -> None:
    """Read `prompt.file`: a YAML of the section's keys, named from the config's own folder.

    Keys that the config itself has take precedence.
    """
    prompt = tree.get("prompt")
    if not isinstance(prompt, dict) or "file" not in prompt:
        return
    name = _check_value(str, prompt.pop("file"), "prompt.file")
    texts = _read_yaml(folder / name, "prompt.file")
    tree["prompt"] = texts | prompt


# --- checking ---------------------------------------------------------------------------------


def check_config(config: Config) -> Config:
    """Return the config itself. Raises ConfigError for values that are out of range or contradict
    each other.
    """
    _check_ranges(config)
    _check_step(config)
    _check_reward_weights(config)
    _check_corrections(config)
    _check_advantage(config)
    _check_retriever(config)
    _check_lora(config)
    if bool(config.data.test_queries) != bool(config.data.test_qrels):
        raise ConfigError(
            "data.test_queries, data.test_qrels: give both files, "
            "or neither for a hash tenth of the train queries"
        )
    betas = config.optimizer.betas
    if not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"optimizer.betas: each must be at least 0 and below 1, is {list(betas)}")
    return config


def _check_ranges(config: Config) -> None:
    for key, allowed in CHOICES.items():
        value = get_value(config, key)
        if value not in allowed:
            new_value = RENAMED_VALUES.get(key, {}).get(value)
            hint = f"; it is called {new_value} now" if new_value else ""
            raise ConfigError(f"{key}: {value!r} is not one of {', '.join(allowed)}{hint}")
    for key, minimum in MINIMUMS.items():
        value = get_value(config, key)
        if value < minimum:
            raise ConfigError(f"{key}: must be at least {minimum}, is {value}")
    for key, maximum in MAXIMUMS.items():
        value = get_value(config, key)
        if value > maximum:
            raise ConfigError(f"{key}: must be at most {maximum}, is {value}")


def _check_step(config: Config) -> None:
    prompts = config.train.prompts_per_step
    num_mini_batches = config.train.num_mini_batches
    if prompts % num_mini_batches:
        raise ConfigError(
            f"train.num_mini_batches: {num_mini_batches} must divide "
            f"train.prompts_per_step = {prompts}"
        )
    overlong_buffer = config.reward.overlong_buffer
    max_new_tokens = config.sampling.max_new_tokens
    if overlong_buffer > max_new_tokens:
        raise ConfigError(
            f"reward.overlong_buffer: {overlong_buffer} exceeds "
            f"sampling.max_new_tokens = {max_new_tokens}"
        )


def _check_reward_weights(config: Config) -> None:
    weights = config.reward.weights
    for name in weights:
        if name not in REWARD_TERMS and ":" not in name:
            raise ConfigError(
                f"reward.weights: {name!r} is not one of {', '.join(REWARD_TERMS)}; "
                "a function of yours is written module:function"
            )
    if not any(weights.values()):
        raise ConfigError(
            "reward.weights: at least one must be other than 0, or there is nothing to learn"
        )


def _check_corrections(config: Config) -> None:
    """Check what corrects between sampler and trainer, and the KL's estimator."""
    loss = config.loss
    bounds = ("loss.tis_floor", "loss.tis_level", "loss.tis_mode")
    changed = list_changed_keys(config, bounds)
    if changed and loss.tis_cap == 0:
        raise ConfigError(
            f"{', '.join(changed)}: is of the weight that loss.tis_cap turns on; "
            "set loss.tis_cap, or leave it out"
        )
    if changed and loss.tis_floor > loss.tis_cap:
        raise ConfigError(
            f"loss.tis_floor: {loss.tis_floor:g} exceeds loss.tis_cap = {loss.tis_cap:g}; lower it"
        )
    if loss.kl_estimator == "k3_unbiased" and loss.kl_in == "reward":
        raise ConfigError(
            "loss.kl_estimator: k3_unbiased weights by the policy's ratio, which a reward does not "
            "have; set loss.kl_in=loss or loss.kl_estimator=k3"
        )


def _check_advantage(config: Config) -> None:
    """Check that the rewards are such that the advantage means something."""
    advantage = config.loss.advantage
    if not advantage and config.loss.kind in ADVANTAGE_KINDS:
        advantage = config.loss.kind
    if advantage == "maxrl":
        _check_maxrl(config)
    if advantage == "gdpo":
        _check_gdpo(config)
    group_size = config.sampling.group_size
    pass_k = config.loss.pass_k
    if advantage == "pass_at_k" and not (pass_k == 0 or 2 <= pass_k <= group_size):
        raise ConfigError(
            f"loss.pass_k: {pass_k} is not 2 to sampling.group_size = {group_size}, "
            "nor 0 for all of the group"
        )


def _check_maxrl(config: Config) -> None:
    """Raise ConfigError where a reward below 0 is possible: maxrl divides by the group's mean."""
    reward = config.reward
    below = [
        f"reward.{name}" for name in ("bonus", "miss", "unparsable") if getattr(reward, name) < 0
    ]
    if reward.overlong_buffer:
        below.append("reward.overlong_buffer")
    for name, weight in reward.weights.items():
        if weight < 0 or (weight and name == "ndcg_gain"):
            below.append(f"reward.weights {name}")
    if config.loss.kl_coef > 0 and config.loss.kl_in == "reward":
        below.append("loss.kl_in=reward")
    if below:
        raise ConfigError(
            "loss.advantage: maxrl divides by the mean reward of a group, which must not be below "
            f"0; {', '.join(below)} can make it so: set that to 0, or leave it out"
        )


def _check_gdpo(config: Config) -> None:
    """Raise ConfigError where gdpo has nothing to decouple, or would not see what is said."""
    weighted = [name for name, weight in config.reward.weights.items() if weight]
    if len(weighted) < 2:
        raise ConfigError(
            "loss.advantage: gdpo normalizes each term of the reward by itself and "
            f"reward.weights has one, {weighted[0]}; add another, or use mean_std"
        )
    if config.loss.kl_coef > 0 and config.loss.kl_in == "reward":
        raise ConfigError(
            "loss.kl_in: reward takes the KL off the total, and gdpo looks at the reward's terms; "
            "set loss.kl_in=loss"
        )
    if config.sampling.dynamic_sampling:
        raise ConfigError(
            "sampling.dynamic_sampling: replaces groups whose totals are equal, and gdpo learns "
            "from terms that differ under equal totals; leave it out"
        )


def _check_retriever(config: Config) -> None:
    retriever = config.retriever
    kind = retriever.kind
    if kind not in RETRIEVERS and ":" not in kind:
        raise ConfigError(
            f"retriever.kind: {kind!r} is not one of {', '.join(RETRIEVERS)}; "
            "a function of yours is written module:function"
        )
    has_encoder = bool(retriever.encoder)
    if has_encoder != (kind == "dense"):
        raise ConfigError(
            "retriever.encoder: goes with retriever.kind=dense, which needs one: "
            "a Hugging Face encoder's folder or hub id"
        )
    if retriever.repeat_terms == "once" and kind not in ("bm25", "rank_bm25"):
        raise ConfigError(
            f"retriever.repeat_terms: once is for bm25 and rank_bm25; {kind} does not count terms"
        )
    if retriever.timeout and kind in RETRIEVERS:
        raise ConfigError(
            f"retriever.timeout: is for a function of yours (module:function); {kind} takes none"
        )


def _check_lora(config: Config) -> None:
    if not config.lora.rank:
        changed = list_changed_keys(config, ("lora.", "model.adapter"))
        if changed:
            raise ConfigError(f"{', '.join(changed)}: is for LoRA; set lora.rank, or leave it out")
        return
    if config.train.frozen:
        raise ConfigError(
            "train.frozen: with lora.rank every weight of the model is frozen; leave it out"
        )
    if config.loss.reference_cpu_offload:
        raise ConfigError(
            "loss.reference_cpu_offload: with lora.rank the reference is the policy's own weights, "
            "no second copy; leave it out"
        )
    if config.model.adapter and config.loss.kl_coef > 0:
        raise ConfigError(
            "model.adapter: with loss.kl_coef the reference would be the model without that "
            "adapter, not the policy that the run begins with; merge it first (recr1 merge) and "
            "name the result in model.path"
        )


def get_value(config: Config, key: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def check_settings_used(config: Config, loop: str) -> None:
    """Raise ConfigError for a setting that is not at its default and that `python -m recr1.LOOP`
    (train or sft) would not read.
    """
    other = "sft" if loop == "train" else "train"
    unused_keys = list_changed_keys(config, READ_ONLY_BY[other])
    if unused_keys:
        raise ConfigError(
            f"{', '.join(unused_keys)}: for python -m recr1.{other} only, "
            f"recr1.{loop} does not read that; leave it out"
        )
    if loop == "train":
        return
    if not config.sft.teacher:
        raise ConfigError(
            'sft.teacher: is empty; name a JSONL file of {"id", "text"}, '
            "or self for the best of the policy's own samples"
        )
    if config.sft.epochs and list_changed_keys(config, ("train.steps",)):
        raise ConfigError("sft.epochs, train.steps: give one of the two")


def list_changed_keys(config: Config, prefixes: tuple[str, ...]) -> list[str]:
    """Return the keys that begin with one of `prefixes` and are not at their default."""
    defaults = Config()
    changed = []
    for section_field in dataclasses.fields(Config):
        section = getattr(config, section_field.name)
        if not dataclasses.is_dataclass(section):
            continue
        for setting in dataclasses.fields(section):
            key = f"{section_field.name}.{setting.name}"
            if key.startswith(prefixes) and get_value(config, key) != get_value(defaults, key):
                changed.append(key)
    return changed


# --- writing ----------------------------------------------------------------------------------


def dump_config(config: Config) -> str:
    """Return YAML that `load_config` reads back to an equal Config."""
    tree = _to_plain(dataclasses.asdict(config))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def dump_answering_config(config: Config) -> str:
    """Return YAML of what a trained policy needs to answer as it did in training: the task, the
    prompt and how long the answer may be.
    """
    tree = {
        "task": config.task,
        "prompt": _to_plain(dataclasses.asdict(config.prompt)),
        "sampling": {"max_new_tokens": config.sampling.max_new_tokens},
    }
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _to_plain(value: Any) -> Any:
    """Return the value with tuples as lists, which YAML can write."""
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return value


# --- trees to dataclasses ---------------------------------------------------------------------


def _build_dataclass(cls: type, tree: Any, prefix: str) -> Any:
    """Make a `cls` of a tree, whose keys and types are checked. `prefix`: its dotted key and a dot,
    for messages.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix[:-1]}: expected a section of key: value lines, found {tree!r}")
    types = typing.get_type_hints(cls)
    values = {}
    for name, value in tree.items():
        if name not in types:
            hint = _suggest_key(f"{prefix}{name}", prefix, list(types))
            raise ConfigError(f"unknown key {prefix}{name}: {hint}")
        if dataclasses.is_dataclass(types[name]):
            values[name] = _build_dataclass(types[name], value, f"{prefix}{name}.")
        else:
            values[name] = _check_value(types[name], value, prefix + name)
    return cls(**values)


def _suggest_key(key: str, prefix: str, known: list[str]) -> str:
    """Return what to do about an unknown dotted key; known: the keys of its section."""
    if key in RENAMED_SETTINGS:
        return f"it is called {RENAMED_SETTINGS[key]} now"
    similar = difflib.get_close_matches(key.removeprefix(prefix), known, 1)
    if similar:
        return f"did you mean {prefix}{similar[0]}?"
    return f"known here: {', '.join(known)}"


def _check_value(expected: Any, value: Any, key: str) -> Any:
    """Return the value as the type `expected`. Raises ConfigError where it is none."""
    if expected is float:
        value = _to_float(value)
    origin = typing.get_origin(expected)
    if origin is tuple:
        return _check_tuple(expected, value, key)
    if origin is dict:
        return _check_dict(expected, value, key)

    # A bool is an int in Python, but not in a config.
    is_stray_bool = isinstance(value, bool) and expected is not bool
    if is_stray_bool or not isinstance(value, expected):
        raise ConfigError(
            f"{key}: expected {expected.__name__}, found {type(value).__name__} {value!r}"
        )
    if expected is str and re.search("[\0\ud800-\udfff]", value):
        raise ConfigError(
            f"{key}: {value[:80]!r} holds the character 0, or half of a character, "
            "which no path or file can hold; delete it"
        )
    if expected is float and not math.isfinite(value):
        raise ConfigError(f"{key}: must be a finite number, is {value}")
    return value


def _to_float(value: Any) -> Any:
    """Return a number as float, any other value as it is.

    YAML 1.1 reads 1e-6 as a string: it is meant as a number.
    """
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if is_integer:
        return float(value)
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def _check_tuple(expected: Any, value: Any, key: str) -> tuple:
    types = typing.get_args(expected)
    if not isinstance(value, list) or len(value) != len(types):
        raise ConfigError(f"{key}: expected a list of {len(types)} values, found {value!r}")
    return tuple(_check_value(type, item, key) for type, item in zip(types, value))


def _check_dict(expected: Any, value: Any, key: str) -> dict:
    name_type, value_type = typing.get_args(expected)
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: expected name: value pairs, found {value!r}")
    checked = {}
    for name, item in value.items():
        name = _check_value(name_type, name, key)
        checked[name] = _check_value(value_type, item, f"{key}.{name}")
    return checked
