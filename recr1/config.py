"""Frozen dataclasses <- YAML + a.b=value. Every key and type is checked before anything else happens; nothing is guessed."""
from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml


class ConfigError(ValueError):
    """A setting is wrong. The message names the key and says what to do."""


@dataclass(frozen=True)
class Run:
    dir: str = "runs/run"               # everything the run writes; must be new
    seed: int = 0
    threads: int = 0                    # torch's threads per process; 0: the machine's cores, shared by its ranks


@dataclass(frozen=True)
class Model:
    path: str = ""                      # HF folder (config.json, safetensors, tokenizer, chat template) or hub id (org/name)
    attention: str = "sdpa"
    head: str = "one_shot"              # one_shot: gradients made in the forward, losses that are sums over tokens | recompute: any loss
    kernels: str = "torch"              # torch | triton (GPU)
    compute: str = "auto"               # float32 | bfloat16 | auto (bfloat16 on a GPU); masters and optimizer are float32


@dataclass(frozen=True)
class Data:
    corpus: str = ""                    # JSONL[.gz] {id, title, text}
    train_queries: str = ""             # JSONL[.gz] {id, text}; a fixed hash tenth of it is validation
    train_qrels: str = ""               # TSV[.gz] query id, document id, gain
    test_queries: str = ""              # both empty: a second hash tenth of the train queries
    test_qrels: str = ""
    on_bad_line: str = "stop"           # stop | drop (counted)
    on_long_prompt: str = "stop"        # stop | drop (counted)
    shuffle_words: float = 0.0          # share of training prompts whose words stand in random order


@dataclass(frozen=True)
class Retriever:
    kind: str = "bm25"
    variant: str = "lucene"             # lucene | okapi
    length: str = "exact"               # exact | lucene (its one-byte lengths)
    k1: float = 1.2
    b: float = 0.75
    index_dir: str = ""                 # where the index is kept; empty: beside the run


@dataclass(frozen=True)
class PromptText:
    system: str = ""                    # empty: no system message
    user: str = "{query}"               # {query} is where the user's text goes
    assistant: str = "<think>"          # what the answer begins with, given, not sampled
    max_tokens: int = 256


@dataclass(frozen=True)
class RewardRule:
    k_train: int = 1000                 # depth of the ranking that is rewarded
    k_eval: int = 100                   # depth of the ranking that is reported
    bonus: float = 0.1                  # added when the metric is above 0
    miss: float = 0.0                   # total when it is 0
    unparsable: float = -2.0            # total when there is no answer to score
    overlong: int = 0                   # DAPO: tokens before max_new_tokens over which a penalty grows to 1; 0: none


@dataclass(frozen=True)
class Sampling:
    group_size: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 512
    resample: int = 0                   # DAPO: rounds of other prompts in place of groups whose rewards are all equal


@dataclass(frozen=True)
class Loss:
    kind: str = "grpo"                  # grpo | dr_grpo | dapo | gspo | cispo | rloo | reinforce | module:function
    advantage: str = ""                 # mean_std | mean | leave_one_out | module:function; empty: the kind's own
    average: str = ""                   # token | sequence | constant; empty: the kind's own
    clip: float = 0.2
    clip_high: float = 0.0              # upper side (DAPO's clip-higher); 0: as clip
    kl: float = 0.0                     # weight of the KL to the initial policy; 0: no reference is kept
    kl_estimator: str = "k3"            # k1 | k2 | k3
    kl_in: str = "loss"                 # loss | reward
    entropy: float = 0.0                # weight of the entropy bonus
    importance_cap: float = 0.0         # cap of exp(trainer - sampler) as a weight (truncated importance sampling); 0: not applied
    std_floor: float = 1e-6             # advantage = (r - mean) / (std + std_floor)

    @property
    def high(self) -> float:
        """The clip's upper side."""
        return self.clip_high or self.clip


@dataclass(frozen=True)
class Optimizer:
    kind: str = "adamw"                 # adamw | muon (matrices by Muon, the rest by AdamW)
    lr: float = 1e-6
    muon_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 0
    final_lr: float = 1.0               # share of lr that the linear decay ends at; 1: constant
    clip_norm: float = 1.0
    on_nonfinite: str = "stop"          # stop | skip (the step; counted)


@dataclass(frozen=True)
class Train:
    steps: int = 100
    prompts_per_step: int = 32
    inner_steps: int = 1                # optimiser steps per batch of rollouts, over equal shares of its prompts
    tokens_per_micro_batch: int = 16384
    checkpointing: bool = False         # keep only each block's input and compute it again in the backward
    replay: str = ""                    # rollouts.jsonl.gz of a run: train on its logged steps, without a sampler
    eval_every: int = 100               # steps between validations; 0: none
    eval_queries: int = 0               # how many of the validation queries; 0: all


@dataclass(frozen=True)
class Log:
    tokens_every: int = 10              # steps between rollouts logged with their per-token values
    print_every: int = 1


@dataclass(frozen=True)
class Config:
    task: str = "product_search"
    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    retriever: Retriever = field(default_factory=Retriever)
    prompt: PromptText = field(default_factory=PromptText)
    reward: RewardRule = field(default_factory=RewardRule)
    sampling: Sampling = field(default_factory=Sampling)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    log: Log = field(default_factory=Log)


CHOICES = {"task": ("product_search",), "model.attention": ("sdpa",), "model.compute": ("auto", "float32", "bfloat16"),
           "model.head": ("one_shot", "recompute"), "model.kernels": ("torch", "triton"), "loss.average": ("", "token", "sequence", "constant"),
           "loss.kl_estimator": ("k1", "k2", "k3"), "loss.kl_in": ("loss", "reward"),
           "data.on_bad_line": ("stop", "drop"),
           "data.on_long_prompt": ("stop", "drop"), "retriever.kind": ("bm25",), "retriever.variant": ("lucene", "okapi"),
           "retriever.length": ("exact", "lucene"), "optimizer.kind": ("adamw", "muon"),
           "optimizer.on_nonfinite": ("stop", "skip")}
AT_LEAST = {"run.threads": 0, "sampling.group_size": 2, "sampling.temperature": 1e-3, "sampling.max_new_tokens": 1, "train.steps": 1,
            "train.prompts_per_step": 1, "train.tokens_per_micro_batch": 1, "train.eval_every": 0, "train.eval_queries": 0,
            "log.tokens_every": 1, "log.print_every": 1, "prompt.max_tokens": 1, "reward.k_train": 1, "reward.k_eval": 1,
            "train.inner_steps": 1, "sampling.resample": 0, "reward.overlong": 0, "loss.clip_high": 0, "loss.entropy": 0, "loss.importance_cap": 0,
            "loss.clip": 0, "loss.kl": 0, "loss.std_floor": 0, "optimizer.lr": 0, "optimizer.clip_norm": 1e-12,
            "optimizer.warmup_steps": 0, "data.shuffle_words": 0, "optimizer.muon_lr": 0, "optimizer.eps": 0, "optimizer.weight_decay": 0,
            "optimizer.final_lr": 0}
AT_MOST = {"data.shuffle_words": 1, "optimizer.final_lr": 1}


def load(path: str, overrides: list[str]) -> Config:
    """YAML file, then each `a.b=value` (value in YAML) on top. Raises ConfigError: unknown key, wrong type, bad value, no file."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(e).split())}") from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top, found {type(tree).__name__}")
    tree = tree or {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"override {item!r}: write it as key=value, e.g. train.steps=10")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"override {item!r}: the value is not YAML; quote it") from None
        node = tree
        *sections, last = key.split(".")
        for name in sections:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {item!r}: {name} is not a section")
        node[last] = value
    config = _build(Config, tree, "")
    for key, allowed in CHOICES.items():
        if get(config, key) not in allowed:
            raise ConfigError(f"{key}: {get(config, key)!r} is not one of {', '.join(allowed)}")
    for key, least in AT_LEAST.items():
        if get(config, key) < least:
            raise ConfigError(f"{key}: must be at least {least}, is {get(config, key)}")
    for key, most in AT_MOST.items():
        if get(config, key) > most:
            raise ConfigError(f"{key}: must be at most {most}, is {get(config, key)}")
    if config.train.prompts_per_step % config.train.inner_steps:
        raise ConfigError(f"train.inner_steps: {config.train.inner_steps} must divide train.prompts_per_step = {config.train.prompts_per_step}")
    if config.reward.overlong > config.sampling.max_new_tokens:
        raise ConfigError(f"reward.overlong: {config.reward.overlong} exceeds sampling.max_new_tokens = {config.sampling.max_new_tokens}")
    if bool(config.data.test_queries) != bool(config.data.test_qrels):
        raise ConfigError("data.test_queries, data.test_qrels: give both files, or neither for a hash tenth of the train queries")
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise ConfigError(f"optimizer.betas: each must be at least 0 and below 1, is {list(config.optimizer.betas)}")
    return config


def get(config: Config, key: str):
    """The value at a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def dump(config: Config) -> str:
    """YAML that `load` reads back to an equal Config."""
    plain = {k: _plain(v) for k, v in dataclasses.asdict(config).items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def answering(config: Config) -> str:
    """YAML of what a trained policy needs to answer as it did in training: the prompt and how long the answer may be."""
    prompt = {k: _plain(v) for k, v in dataclasses.asdict(config.prompt).items()}
    return yaml.safe_dump(dict(prompt=prompt, sampling=dict(max_new_tokens=config.sampling.max_new_tokens)), sort_keys=False, allow_unicode=True)


def _plain(value):
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else list(value) if isinstance(value, tuple) else value


def _build(cls, tree, where: str):
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
        values[key] = _build(kind, value, f"{where}{key}.") if dataclasses.is_dataclass(kind) else _value(kind, value, where + key)
    return cls(**values)


def _value(kind, value, key: str):
    if kind is float and isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)                   # YAML 1.1 reads 1e-6 as a string: it is meant as a number
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, list) or len(value) != len(kinds):
            raise ConfigError(f"{key}: expected a list of {len(kinds)} values, found {value!r}")
        return tuple(_value(k, v, key) for k, v in zip(kinds, value))
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{key}: expected {kind.__name__}, found {type(value).__name__} {value!r}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{key}: must be a finite number, is {value}")
    return value
