"""The sequences of one `generate` call: waiting, running, finished.

Legend: R sequences, n running ones, B cache rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from recr1.data_types import Prompt, Rollout
from recr1.sampling.kv_cache import KVCache


class SampledSteps(NamedTuple):
    """Hold the choices of several decode steps, on the host."""

    ids: np.ndarray  # (steps, B, siblings in a row; 1 where they all choose the same)
    logp: np.ndarray  # the same shape
    truncated_mass: np.ndarray  # (steps, B), the probability that top_p cut off


class SequenceBatch:
    """Keep the R sequences of a `generate` call: each is waiting, then running, then finished.

    Siblings whose tokens so far are equal share one row of the KV cache; without `share_rows` only
    until their first token.

    Attributes:
        running: (n,), the indices of the running sequences, sorted by row.
        row: (n,), the cache row that each of them is in.
        index_in_row: (n,), their number among those in the same row, 0 for the first; set by
            `uniforms_until_next_sync`.
        num_rows: B, how many rows they are in.
        length: (R,), how many tokens each sequence has so far.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        group_size: int,
        max_new_tokens: int,
        stop_token_ids: frozenset[int],
        vocab_size: int,
        share_rows: bool = True,
    ):
        self.prompts = prompts
        self.group_size = group_size
        self.max_new_tokens = max_new_tokens
        self.vocab_size = vocab_size
        self.share_rows = share_rows
        self.is_stop_token = np.isin(np.arange(vocab_size), list(stop_token_ids))  # (V,)

        # What each sequence has sampled.
        self.num_sequences = len(prompts) * group_size  # R
        shape = (self.num_sequences, max_new_tokens)
        self.ids = np.zeros(shape, np.int64)
        self.logp = np.zeros(shape)
        self.truncated_mass = np.zeros(self.num_sequences)
        self.length = np.zeros(self.num_sequences, np.int64)

        # Where it is: sequences from num_admitted on are waiting.
        self.num_admitted = 0
        self.running = np.zeros(0, np.int64)
        self.row = np.zeros(0, np.int64)
        self.num_rows = 0
        self.finished = np.zeros(self.num_sequences, bool)
        self.rollouts_by_group: list[list[Rollout] | None] = [None] * len(prompts)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def has_shared_rows(self) -> bool:
        return self.num_rows < self.num_running

    def admit(self, max_running: int) -> list[Prompt]:
        """Move waiting sequences to running, whole groups where they fit.

        Returns the prompts to prefill; they take the next rows of the cache.
        """
        first = self.num_admitted
        while self.num_admitted < self.num_sequences:
            left_in_group = self.group_size - self.num_admitted % self.group_size
            step = min(left_in_group, max_running)
            free = max_running - self.num_running - (self.num_admitted - first)
            if step > free:
                break
            self.num_admitted += step

        # The siblings of a group begin in one row.
        admitted = np.arange(first, self.num_admitted)
        groups, group_index = np.unique(admitted // self.group_size, return_inverse=True)
        self.running = np.append(self.running, admitted)
        self.row = np.append(self.row, self.num_rows + group_index)
        self.num_rows += len(groups)
        return [self.prompts[group] for group in groups]

    def uniforms_until_next_sync(
        self, uniforms: np.ndarray | None, sync_every: int, device: torch.device
    ) -> torch.Tensor | list[None]:
        """Return the uniforms of the decode steps until the host looks at the tokens again.

        Their shape is (steps, B, most siblings in a row); a list of as many None is greedy. A
        shared row may fork at any token, so with one there is a single step.
        """
        first_in_row = np.searchsorted(self.row, self.row)
        self.index_in_row = np.arange(self.num_running) - first_in_row

        num_steps = 1
        if not self.has_shared_rows:
            longest = int(self.length[self.running].max())
            num_steps = min(sync_every, self.max_new_tokens - longest)
        if uniforms is None:
            return [None] * num_steps

        prompt, sibling = np.divmod(self.running, self.group_size)
        token = self.length[self.running] + np.arange(num_steps)[:, None]  # (steps, n)
        padded = np.full((num_steps, self.num_rows, self.index_in_row.max() + 1), 0.5)
        padded[:, self.row, self.index_in_row] = uniforms[prompt, sibling, token]
        return torch.from_numpy(padded).to(device, non_blocking=True)

    def append_tokens(
        self, sampled: SampledSteps, on_token: Callable[[int, int], None] | None
    ) -> None:
        """Append to each sequence the tokens that it chose, up to its end.

        Calls on_token(sequence, id) for every token that is appended.
        """
        # A row's siblings have one column each, or all the same one.
        column = self.index_in_row % sampled.ids.shape[2]
        ids = sampled.ids[:, self.row, column]  # (steps, n)
        logp = sampled.logp[:, self.row, column]
        truncated_mass = sampled.truncated_mass[:, self.row]

        is_running = np.ones(self.num_running, bool)
        for step_ids, step_logp, step_mass in zip(ids, logp, truncated_mass):
            sequences = self.running[is_running]
            position = self.length[sequences]
            self.ids[sequences, position] = step_ids[is_running]
            self.logp[sequences, position] = step_logp[is_running]
            self.truncated_mass[sequences] += step_mass[is_running]
            self.length[sequences] += 1
            if on_token:
                for sequence, token_id in zip(sequences, step_ids[is_running]):
                    on_token(int(sequence), int(token_id))

            is_full = self.length[self.running] == self.max_new_tokens
            is_running &= ~(self.is_stop_token[step_ids] | is_full)
        self.finished[self.running[~is_running]] = True

    def collect_finished(
        self, on_group_finished: Callable[[list[Rollout]], None] | None
    ) -> list[Rollout]:
        """Return the rollouts of the groups that are finished, in the order of the prompts.

        Calls on_group_finished(siblings) once for each group, as soon as its last one is finished.
        """
        is_group_finished = self.finished.reshape(-1, self.group_size).all(1)
        for group in np.flatnonzero(is_group_finished):
            if self.rollouts_by_group[group] is not None:
                continue
            siblings = range(self.group_size)
            new_rollouts = [self._make_rollout(int(group), s) for s in siblings]
            self.rollouts_by_group[group] = new_rollouts
            if on_group_finished:
                on_group_finished(new_rollouts)

        rollouts: list[Rollout] = []
        for group_rollouts in self.rollouts_by_group:
            rollouts += group_rollouts or []
        return rollouts

    def _make_rollout(self, group: int, sibling: int) -> Rollout:
        sequence = group * self.group_size + sibling
        length = self.length[sequence]
        ids = self.ids[sequence, :length]
        logp = self.logp[sequence, :length]
        return Rollout(
            self.prompts[group],
            group,
            sibling,
            ids=tuple(ids.tolist()),
            sampler_logp=tuple(logp.tolist()),
            finished=bool(self.is_stop_token[ids[-1]]),
            cut=float(self.truncated_mass[sequence] / length),
        )

    def fork_rows(self, cache: KVCache) -> torch.Tensor:
        """Drop finished sequences and fork each row into one row per distinct next token; without
        `share_rows` into one row per sequence.

        Returns these tokens, (B,), on the CPU.
        """
        is_running = ~self.finished[self.running]
        running = self.running[is_running]
        row = self.row[is_running]
        last_token = self.ids[running, self.length[running] - 1]

        # The cache copies a row that continues as several.
        if self.share_rows:
            # A fork is a distinct pair (row, token), encoded as one integer: row * V + token.
            forks, fork_index = np.unique(row * self.vocab_size + last_token, return_inverse=True)
            new_row = cache.reorder(forks // self.vocab_size)[fork_index]
        else:
            new_row = cache.reorder(row)

        by_row = np.argsort(new_row, kind="stable")
        self.running = running[by_row]
        self.row = new_row[by_row]
        self.num_rows = cache.num_rows

        tokens = np.zeros(self.num_rows, np.int64)
        tokens[new_row] = last_token
        return torch.from_numpy(tokens)


def stack_to_host(
    steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> SampledSteps:
    """Stack the choices (ids, log-probs, truncated mass) of several steps and copy them to the
    host, all in one: each copy waits for the device.

    They travel as float64, which holds an id, and a log-prob of any type, as it is.
    """
    ids, logp, truncated_mass = (torch.stack(tensors) for tensors in zip(*steps))
    packed = torch.cat([ids.double(), logp.double(), truncated_mass.double()[..., None]], dim=-1)
    on_host = packed.cpu().numpy()  # (steps, B, 2 K + 1)
    K = ids.shape[2]
    return SampledSteps(
        ids=on_host[..., :K].astype(np.int64),
        logp=on_host[..., K : 2 * K],
        truncated_mass=on_host[..., 2 * K],
    )
