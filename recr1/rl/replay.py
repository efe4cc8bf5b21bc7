"""Steps of a run read back from its rollouts.jsonl.gz: for training without a sampler, and for
laying one batch under every loss.
"""

from __future__ import annotations

import gzip
import json
import zlib

from recr1.data_types import Prompt, Reward, Rollout
from recr1.distributed import collectives as dist


class ReplayError(ValueError):
    """The rollouts cannot be replayed. The message names the file and says what to do."""


class Replay:
    """The logged steps that kept their token ids (log.tokens_every), in order. `rows[i]`: the
    file's own rows of step `steps[i]`.
    """

    def __init__(self, path: str, group_size: int | None = None):
        by_step: dict[int, list[dict]] = {}
        try:
            with gzip.open(path, "rt", encoding="utf-8", errors="surrogatepass") as file:
                for number, line in enumerate(file, 1):
                    row = json.loads(line)
                    if "ids" in row:
                        by_step.setdefault(row["step"], []).append(row)
        except FileNotFoundError:
            raise ReplayError(f"{path}: no such file; give a run's rollouts.jsonl.gz") from None
        except (OSError, EOFError, zlib.error) as e:
            raise ReplayError(
                f"{path}: torn, or not gzip ({e}); the run's log is damaged"
            ) from None
        except (ValueError, KeyError, TypeError) as e:
            raise ReplayError(f"{path}:{number}: not a row of a rollout log: {e}") from None
        if not by_step:
            raise ReplayError(f"{path}: no step kept its token ids; run with log.tokens_every=1")
        self.path = path
        self.steps = sorted(by_step)
        self.rows = [by_step[s] for s in sorted(by_step)]
        self.sizes = {
            sum(row["count"] for row in group)
            for rows in self.rows
            for group in _split_by_prompt(rows)
        }
        if group_size and self.sizes != {group_size}:
            raise ReplayError(
                f"{path}: its groups have {sorted(self.sizes)} siblings; set sampling.group_size to that"
            )

    def step(self, step: int) -> tuple[list[Rollout], list[Reward], int]:
        """Rollouts and rewards of this rank's share of the groups of logged step number `step`
        (from 1; after the last the first again).
        """
        groups = dist.split_across_ranks(_split_by_prompt(self.rows[(step - 1) % len(self.steps)]))
        rollouts = []
        rewards = []
        for g, group in enumerate(groups):
            sibling = 0
            for row in group:
                prompt = Prompt(row["prompt"], g, "", tuple(row["prompt_ids"]))
                for _ in range(row["count"]):
                    rollouts.append(
                        Rollout(
                            prompt,
                            g,
                            sibling,
                            tuple(row["ids"]),
                            tuple(row["sampler_logp"]),
                            row["finished"],
                        )
                    )
                    rewards.append(
                        Reward(row["reward"], row["parts"], row["error"], None, row["text"])
                    )
                    sibling += 1
        return rollouts, rewards, len(groups)


def _split_by_prompt(rows: list[dict]) -> list[list[dict]]:
    """Rows of a step by prompt: no prompt comes twice in a step."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(row)
    return list(groups.values())
