"""YAML + a.b=value -> Config. Every key and type is checked before anything else happens; nothing
is guessed.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from pathlib import Path

import yaml

from recr1.config.schema import Config, ConfigError

CHOICES = {
    "reward.metric": ("ndcg", "recall", "mrr", "hit"),
    "model.attention": ("auto", "varlen", "flash", "sdpa"),
    "model.compute": ("auto", "float32", "bfloat16"),
    "model.head": ("one_shot", "recompute"),
    "model.kernels": ("torch", "triton"),
    "loss.average": ("", "token", "sequence", "constant"),
    "loss.kl_estimator": ("k1", "k2", "k3"),
    "loss.kl_in": ("loss", "reward"),
    "data.on_bad_line": ("stop", "drop"),
    "data.on_long_prompt": ("stop", "drop"),
    "retriever.variant": ("lucene", "okapi"),
    "retriever.length": ("exact", "lucene"),
    "retriever.scorer": ("torch", "numba"),
    "retriever.pooling": ("cls", "mean"),
    "retriever.index": ("exact", "hnsw"),
    "retriever.dtype": ("float32", "float16", "bfloat16"),
    "optimizer.kind": ("adamw", "muon"),
    "optimizer.on_nonfinite": ("stop", "skip"),
    "train.reduce": ("micro_batch", "step"),
    "sft.keep": ("all", "no_worse", "better"),
    "log.track": ("none", "tensorboard", "wandb", "trackio"),
}

MINIMUMS = {
    "run.threads": 0,
    "sampling.group_size": 2,
    "sampling.temperature": 1e-3,
    "sampling.top_p": 1e-3,
    "sampling.cache_gib": 0,
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
    "train.inner_steps": 1,
    "sampling.resample": 0,
    "reward.overlong": 0,
    "loss.clip_high": 0,
    "loss.entropy": 0,
    "loss.importance_cap": 0,
    "loss.clip": 0,
    "loss.kl": 0,
    "loss.std_floor": 0,
    "optimizer.lr": 0,
    "optimizer.clip_norm": 1e-12,
    "optimizer.warmup_steps": 0,
    "data.shuffle_words": 0,
    "optimizer.muon_lr": 0,
    "optimizer.eps": 0,
    "optimizer.weight_decay": 0,
    "optimizer.final_lr": 0,
    "optimizer.max_skips": 0,
    "run.patience": 1,
    "save.every": 0,
    "save.keep": 2,
    "retriever.max_length": 1,
    "retriever.ef_search": 1,
    "retriever.timeout": 0,
    "sft.epochs": 0,
}

RETRIEVERS = ("bm25", "dense", "rank_bm25")

REWARD_TERMS = ("ndcg", "recall", "mrr", "hit", "lcs", "category", "diversity", "novelty")

# what only one of the loops reads: elsewhere such a setting would do nothing
READ_ONLY_BY = {
    "train": (
        "loss.",
        "sampling.resample",
        "train.inner_steps",
        "train.replay",
        "data.shuffle_words",
        "log.tokens_every",
        "log.show_every",
    ),
    "sft": ("sft.",),
}

# ValueError: of Python, where YAML itself is well formed: bytes that are no UTF-8, a date that no
# calendar has, an integer of thousands of digits
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)

MAXIMUMS = {"data.shuffle_words": 1, "sampling.top_p": 1, "optimizer.final_lr": 1}


def load_config(path: str, overrides: list[str]) -> Config:
    """YAML file, then each `a.b=value` (value in YAML) on top. Raises ConfigError: unknown key,
    wrong type, bad value, no file.

    `base: other.yaml` (named from the file's own folder): that file's settings, those of this one
    on top. A base has no base.
    """
    tree = _read_yaml(Path(path), str(path))
    if "base" in tree:
        name = f"{path}: base"
        below = _read_yaml(Path(path).parent / _check_value(str, tree.pop("base"), name), name)
        if "base" in below:
            raise ConfigError(f"{name}: that file has a base itself; one level is all there is")
        tree = _merge_trees(below, tree)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"override {item!r}: write it as key=value, e.g. train.steps=10")
        try:
            value = yaml.safe_load(text)
        except UNREADABLE:
            raise ConfigError(f"override {item[:200]!r}: the value is not YAML; quote it") from None
        node = tree
        *sections, last = key.split(".")
        for name in sections:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {item!r}: {name} is not a section")
        node[last] = value
    _include_prompt(tree, Path(path).parent)
    return check_config(_build_dataclass(Config, tree, ""))


def _read_yaml(path: Path, said: str) -> dict:
    """A file's tree; said: what named it."""
    said = said if str(path) == said else f"{said}: {path}"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{said}: no such file") from None
    except (OSError, *UNREADABLE) as e:
        raise ConfigError(f"{said}: not readable as YAML: {' '.join(str(e).split())}") from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(
            f"{said}: expected `key: value` lines at the top, found {type(tree).__name__}"
        )
    return tree or {}


def _merge_trees(below: dict, above: dict) -> dict:
    """The two trees as one; where both have a key the upper one's value stands, sections are
    joined.
    """
    both = {
        key: _merge_trees(below[key], above[key])
        for key in below.keys() & above.keys()
        if isinstance(below[key], dict) and isinstance(above[key], dict)
    }
    return below | above | both


def _include_prompt(tree: dict, beside: Path) -> None:
    """`prompt.file`: a YAML of the section's keys, named from the config's own folder; keys that
    the config itself has stand.
    """
    prompt = tree.get("prompt")
    if not isinstance(prompt, dict) or "file" not in prompt:
        return
    name = prompt.pop("file")
    texts = _read_yaml(beside / _check_value(str, name, "prompt.file"), "prompt.file")
    tree["prompt"] = texts | prompt


def check_config(config: Config) -> Config:
    """The config itself. Raises ConfigError for values that are out of range or do not go together."""
    for key, allowed in CHOICES.items():
        if get_value(config, key) not in allowed:
            raise ConfigError(
                f"{key}: {get_value(config, key)!r} is not one of {', '.join(allowed)}"
            )
    for key, least in MINIMUMS.items():
        if get_value(config, key) < least:
            raise ConfigError(f"{key}: must be at least {least}, is {get_value(config, key)}")
    for key, most in MAXIMUMS.items():
        if get_value(config, key) > most:
            raise ConfigError(f"{key}: must be at most {most}, is {get_value(config, key)}")
    if config.train.prompts_per_step % config.train.inner_steps:
        raise ConfigError(
            f"train.inner_steps: {config.train.inner_steps} must divide train.prompts_per_step = {config.train.prompts_per_step}"
        )
    if config.reward.overlong > config.sampling.max_new_tokens:
        raise ConfigError(
            f"reward.overlong: {config.reward.overlong} exceeds sampling.max_new_tokens = {config.sampling.max_new_tokens}"
        )
    weights = config.reward.weights
    for name in weights:
        if name not in REWARD_TERMS and ":" not in name:
            raise ConfigError(
                f"reward.weights: {name!r} is not one of {', '.join(REWARD_TERMS)}; a function of yours is written module:function"
            )
    if not any(weights.values()):
        raise ConfigError(
            "reward.weights: at least one must be other than 0, or there is nothing to learn"
        )
    r = config.retriever
    if r.kind not in RETRIEVERS and ":" not in r.kind:
        raise ConfigError(
            f"retriever.kind: {r.kind!r} is not one of {', '.join(RETRIEVERS)}; a function of yours is written module:function"
        )
    if bool(r.encoder) != (r.kind == "dense"):
        raise ConfigError(
            "retriever.encoder: goes with retriever.kind=dense, which needs one: a Hugging Face encoder's folder or hub id"
        )
    if r.timeout and r.kind in RETRIEVERS:
        raise ConfigError(
            f"retriever.timeout: is for a function of yours (module:function); {r.kind} takes none"
        )
    if bool(config.data.test_queries) != bool(config.data.test_qrels):
        raise ConfigError(
            "data.test_queries, data.test_qrels: give both files, or neither for a hash tenth of the train queries"
        )
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise ConfigError(
            f"optimizer.betas: each must be at least 0 and below 1, is {list(config.optimizer.betas)}"
        )
    return config


def get_value(config: Config, key: str):
    """The value at a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def check_settings_used(config: Config, loop: str) -> None:
    """Raises ConfigError for what `python -m recr1.LOOP`, train or sft, would not read and that is
    not at its default.
    """
    [(other, foreign)] = [item for item in READ_ONLY_BY.items() if item[0] != loop]
    if keys := list_changed_keys(config, foreign):
        raise ConfigError(
            f"{', '.join(keys)}: for python -m recr1.{other} only, recr1.{loop} does not read that; leave it out"
        )
    if loop == "sft":
        if not config.sft.teacher:
            raise ConfigError(
                'sft.teacher: is empty; name a JSONL file of {"id", "text"}, or self for the best of the policy\'s own samples'
            )
        if config.sft.epochs and list_changed_keys(config, ("train.steps",)):
            raise ConfigError("sft.epochs, train.steps: give one of the two")


def list_changed_keys(config: Config, prefixes: tuple[str, ...]) -> list[str]:
    """Keys that begin with one of `prefixes` and are not at their default."""
    keys = (
        f"{section.name}.{f.name}"
        for section in dataclasses.fields(Config)
        if dataclasses.is_dataclass(getattr(config, section.name))
        for f in dataclasses.fields(getattr(config, section.name))
    )
    return [
        key
        for key in keys
        if key.startswith(prefixes) and get_value(config, key) != get_value(Config(), key)
    ]


def dump_config(config: Config) -> str:
    """YAML that `load` reads back to an equal Config."""
    plain = {k: _to_plain(v) for k, v in dataclasses.asdict(config).items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def dump_answering_config(config: Config) -> str:
    """YAML of what a trained policy needs to answer as it did in training: the task, the prompt and
    how long the answer may be.
    """
    prompt = {k: _to_plain(v) for k, v in dataclasses.asdict(config.prompt).items()}
    return yaml.safe_dump(
        dict(
            task=config.task,
            prompt=prompt,
            sampling=dict(max_new_tokens=config.sampling.max_new_tokens),
        ),
        sort_keys=False,
        allow_unicode=True,
    )


def _to_plain(value):
    return (
        {k: _to_plain(v) for k, v in value.items()}
        if isinstance(value, dict)
        else list(value)
        if isinstance(value, tuple)
        else value
    )


def _build_dataclass(cls, tree, where: str):
    if not isinstance(tree, dict):
        raise ConfigError(f"{where[:-1]}: expected a section of key: value lines, found {tree!r}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known here: {', '.join(hints)}"
            raise ConfigError(f"unknown key {where}{key}: {hint}")
        kind = hints[key]
        values[key] = (
            _build_dataclass(kind, value, f"{where}{key}.")
            if dataclasses.is_dataclass(kind)
            else _check_value(kind, value, where + key)
        )
    return cls(**values)


def _check_value(kind, value, key: str):
    if (
        kind is float
        and isinstance(value, str)
        and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)
    ):
        value = float(value)  # YAML 1.1 reads 1e-6 as a string: it is meant as a number
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, list) or len(value) != len(kinds):
            raise ConfigError(f"{key}: expected a list of {len(kinds)} values, found {value!r}")
        return tuple(_check_value(k, v, key) for k, v in zip(kinds, value))
    if typing.get_origin(kind) is dict:
        names, kinds = typing.get_args(kind)
        if not isinstance(value, dict):
            raise ConfigError(f"{key}: expected name: value pairs, found {value!r}")
        return {
            _check_value(names, name, key): _check_value(kinds, v, f"{key}.{name}")
            for name, v in value.items()
        }
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(
            f"{key}: expected {kind.__name__}, found {type(value).__name__} {value!r}"
        )
    if kind is str and re.search("[\0\ud800-\udfff]", value):
        raise ConfigError(
            f"{key}: {value[:80]!r} holds the character 0, or half of a character, which no path or file can hold; delete it"
        )
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{key}: must be a finite number, is {value}")
    return value
