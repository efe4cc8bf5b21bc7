"""The nouns that flow through everything.

Prompt --generate x G--> Rollout --score--> Reward --compute_group_advantages--> advantages (R,)
Rollouts --pack_rollouts--> MicroBatch --model--> hidden (M, C) --head--> logp (N,) --loss--> scalar

Legend: P prompts, G siblings of a group, R = P*G rollouts, M packed tokens, N trained tokens.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Prompt:
    """One question for the policy: its token ids end where the sampled text begins."""

    id: str  # the query's id in the data
    index: int  # its position in the split: random numbers are keyed by it
    text: str  # the user's text as the data has it
    ids: tuple[int, ...]
    # its line of the data, as far as the task needs it
    row: dict = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Rollout:
    """One sampled completion.

    `ids` are what was sampled, with the end token: they are trained as they are.
    """

    prompt: Prompt
    group: int  # which group of the step: siblings share it and are adjacent
    sibling: int  # 0..G-1
    ids: tuple[int, ...]
    sampler_logp: tuple[float, ...]  # log-prob of each id under the policy that sampled it
    finished: bool  # False: cut at max_new_tokens
    count: int = 1  # identical siblings that it represents
    cut: float = 0.0  # mean mass that top_p cut off its tokens' distributions


@dataclass(frozen=True)
class Reward:
    """What the loop maximizes.

    `terms` are logged one by one. `error` names why a completion could not be scored.
    """

    total: float
    terms: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    answer: str | list[str] | None = None  # what the parser understood of the completion
    text: str = ""  # the completion, without its end token


class PackedLayout(NamedTuple):
    """Which packed rows belong together.

    All prompts come first, each once per group, then the completions' inputs. Completion r reads
    its prompt `prompt_of[r]` and its own earlier tokens. Lengths are real tokens: no padding.
    """

    prompt_lengths: torch.Tensor  # (P,) int64
    # (R,) int64, inputs: one less than the sampled ids (the last one predicts nothing)
    completion_lengths: torch.Tensor
    prompt_of: torch.Tensor  # (R,) int64


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of real tokens: no padding, no mask.

    It is never edited in place: later passes add fields by `replace`.
    """

    tokens: torch.Tensor  # (M,) int64
    positions: torch.Tensor  # (M,) int64
    layout: PackedLayout
    target: torch.Tensor  # (N,) int64, the ids to be predicted
    predict_from: torch.Tensor  # (N,) int64, the row of `hidden` that predicts each
    # (N,) int64, index into the list that was packed; -1: an idle batch, which keeps ranks in step
    rollout: torch.Tensor
    weight: torch.Tensor  # (N,) identical siblings of the token's rollout; 0 in an idle batch
    sampler_logp: torch.Tensor  # (N,)
    # (N,); None: the new ones, detached (one optimizer step for a step's rollouts)
    old_logp: torch.Tensor | None = None
    ref_logp: torch.Tensor | None = None  # (N,)
    advantages: torch.Tensor | None = None  # (N,)

    def select_tokens(self, tokens: slice) -> "MicroBatch":
        """Return the batch with its per-token fields, (N,), cut to `tokens`; the rows stay."""
        per_token = {}
        for name, value in vars(self).items():
            if name not in ("tokens", "positions", "layout") and value is not None:
                per_token[name] = value[tokens]
        return replace(self, **per_token)
