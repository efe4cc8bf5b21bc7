"""Read steps of a run back from its rollouts.jsonl.gz.

It is used for training without a sampler, and to compute every loss of one batch.
"""

from __future__ import annotations

import gzip
import json
import zlib

from recr1.data_types import Prompt, Reward, Rollout
from recr1.distributed import collectives as dist
from recr1.utils.renamed import RENAMED_ROLLOUT_KEYS, rename_keys


class ReplayError(ValueError):
    """The rollouts cannot be replayed. The message names the file and says what to do."""


class Replay:
    """The logged steps that have their token ids (log.tokens_every), in order.

    `rows[i]` are the file's own rows of step `steps[i]`.
    """

    def __init__(self, path: str, group_size: int | None = None):
        rows_by_step = _read_rows_with_ids(path)
        if not rows_by_step:
            raise ReplayError(f"{path}: no step kept its token ids; run with log.tokens_every=1")
        self.path = path
        self.steps = sorted(rows_by_step)
        self.rows = [rows_by_step[step] for step in self.steps]
        self.sizes = _collect_group_sizes(self.rows)
        if group_size and self.sizes != {group_size}:
            raise ReplayError(
                f"{path}: its groups have {sorted(self.sizes)} siblings; "
                "set sampling.group_size to that"
            )

    def step(self, step: int) -> tuple[list[Rollout], list[Reward], int]:
        """Return the rollouts and rewards of this rank's share of a step, and its number of groups.

        Steps are counted from 1 along the logged ones; after the last comes the first again.
        """
        rows = self.rows[(step - 1) % len(self.steps)]
        groups = dist.split_across_ranks(_split_by_prompt(rows))
        rollouts: list[Rollout] = []
        rewards: list[Reward] = []
        for group_index, group in enumerate(groups):
            sibling = 0
            for row in group:
                prompt = Prompt(row["prompt"], group_index, "", tuple(row["prompt_ids"]))
                # A row stands for `count` identical siblings.
                for _ in range(row["count"]):
                    rollouts.append(_make_rollout(row, prompt, group_index, sibling))
                    rewards.append(_make_reward(row))
                    sibling += 1
        return rollouts, rewards, len(groups)


def _read_rows_with_ids(path: str) -> dict[int, list[dict]]:
    """Read the rows that have token ids, by step. Raises ReplayError when the file is damaged."""
    rows_by_step: dict[int, list[dict]] = {}
    line_number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="surrogatepass") as file:
            for line in file:
                line_number += 1
                row = rename_keys(json.loads(line), RENAMED_ROLLOUT_KEYS)
                if "ids" in row:
                    rows_by_step.setdefault(row["step"], []).append(row)
    except FileNotFoundError:
        raise ReplayError(f"{path}: no such file; give a run's rollouts.jsonl.gz") from None
    except (OSError, EOFError, zlib.error) as e:
        raise ReplayError(f"{path}: torn, or not gzip ({e}); the run's log is damaged") from None
    except (ValueError, KeyError, TypeError) as e:
        raise ReplayError(f"{path}:{line_number}: not a row of a rollout log: {e}") from None
    return rows_by_step


def _collect_group_sizes(steps: list[list[dict]]) -> set[int]:
    """Return the different numbers of siblings that the groups of all steps have."""
    sizes = set()
    for rows in steps:
        for group in _split_by_prompt(rows):
            sizes.add(sum(row["count"] for row in group))
    return sizes


def _split_by_prompt(rows: list[dict]) -> list[list[dict]]:
    """Split the rows of a step by prompt: no prompt comes twice in a step."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(row)
    return list(groups.values())


def _make_rollout(row: dict, prompt: Prompt, group: int, sibling: int) -> Rollout:
    return Rollout(
        prompt=prompt,
        group=group,
        sibling=sibling,
        ids=tuple(row["ids"]),
        sampler_logp=tuple(row["sampler_logp"]),
        finished=row["finished"],
    )


def _make_reward(row: dict) -> Reward:
    return Reward(
        total=row["reward"],
        terms=row["reward_terms"],
        error=row["error"],
        answer=None,
        text=row["text"],
    )
