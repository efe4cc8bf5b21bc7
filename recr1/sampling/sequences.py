"""The sequences of one `generate` call: waiting, running, finished."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from recr1.data_types import Prompt, Rollout
from recr1.sampling.kv_cache import KVCache


class SequenceBatch:
    """The R texts of a call. First they wait, then they are under way: text who[i] is in row
    row[i], both by row; then they have ended.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        group_size: int,
        max_new_tokens: int,
        stops: frozenset[int],
        vocabulary: int,
    ):
        R = len(prompts) * group_size
        self.prompts = prompts
        self.G = group_size
        self.T = max_new_tokens
        self.ids = np.zeros((R, self.T), np.int64)
        self.logp = np.zeros((R, self.T))
        self.cut = np.zeros(R)
        self.length = np.zeros(R, np.int64)
        self.ended = np.zeros(R, bool)
        self.entered = 0
        self.stops = np.isin(np.arange(vocabulary), list(stops))  # (V,)
        self.who = np.zeros(0, np.int64)
        self.row = np.zeros(0, np.int64)
        self.rows = 0
        self.groups: list[list[Rollout] | None] = [None] * len(prompts)

    def enter(self, most: int) -> list[Prompt]:
        """As many more as there may be at once, by groups where a group fits; the prompts that take
        the next rows.
        """
        start = self.entered
        while self.entered < len(self.length) and (
            unit := min(self.G - self.entered % self.G, most)
        ) <= most - len(self.who) - (self.entered - start):
            self.entered += unit
        new = np.arange(start, self.entered)
        groups, place = np.unique(new // self.G, return_inverse=True)
        self.who, self.row, self.rows = (
            np.append(self.who, new),
            np.append(self.row, self.rows + place),
            self.rows + len(groups),
        )
        return [self.prompts[p] for p in groups]

    def draws(self, uniforms: np.ndarray | None, lag: int, device) -> torch.Tensor | list[None]:
        """The uniforms of the tokens until the next look, (tokens, B, most siblings in a row), or
        None as often: shared rows may split at any.
        """
        self.column = np.arange(len(self.who)) - np.searchsorted(self.row, self.row)
        count = (
            1 if self.rows < len(self.who) else min(lag, self.T - int(self.length[self.who].max()))
        )
        if uniforms is None:
            return [None] * count
        u = np.full((count, self.rows, self.column.max() + 1), 0.5)
        u[:, self.row, self.column] = uniforms[
            self.who // self.G, self.who % self.G, self.length[self.who] + np.arange(count)[:, None]
        ]
        return torch.from_numpy(u).to(device)  # all at once: each copy would wait for the GPU

    def write(
        self,
        ids: np.ndarray,
        logp: np.ndarray,
        cut: np.ndarray,
        heard: Callable[[int, int], None] | None,
    ) -> None:
        """Chosen ids, their log-probs (tokens, B, siblings in a row; 1 where they agree) and the
        mass cut off (tokens, B): each text takes its own, up to its end.
        """
        column = self.column % ids.shape[2]
        running = np.ones(len(self.who), bool)
        for chosen, value, off in zip(
            ids[:, self.row, column], logp[:, self.row, column], cut[:, self.row]
        ):
            who = self.who[running]
            self.ids[who, self.length[who]], self.logp[who, self.length[who]] = (
                chosen[running],
                value[running],
            )
            self.cut[who] += off[running]
            self.length[who] += 1
            for r in who if heard else ():
                heard(int(r), int(self.ids[r, self.length[r] - 1]))
            running &= ~(self.stops[chosen] | (self.length[self.who] == self.T))
        self.ended[self.who[~running]] = True

    def rollouts(self, done: Callable[[list[Rollout]], None] | None) -> list[Rollout]:
        """Those of the groups that have ended, each handed to `done` when it does."""
        for p in np.flatnonzero(self.ended.reshape(-1, self.G).all(1)):
            if self.groups[p] is None:
                texts = [(r, self.length[r]) for r in range(p * self.G, (p + 1) * self.G)]
                self.groups[p] = [
                    Rollout(
                        self.prompts[p],
                        int(p),
                        s,
                        tuple(self.ids[r, :n].tolist()),
                        tuple(self.logp[r, :n].tolist()),
                        bool(self.stops[self.ids[r, n - 1]]),
                        cut=float(self.cut[r] / n),
                    )
                    for s, (r, n) in enumerate(texts)
                ]
                if done:
                    done(self.groups[p])
        return [rollout for group in self.groups for rollout in group or ()]

    def part(self, cache: KVCache) -> torch.Tensor:
        """Ended texts leave; each row becomes one row for each id that its texts chose. Returns
        these ids, (B,).
        """
        alive = ~self.ended[self.who]
        who = self.who[alive]
        row = self.row[alive]
        last = self.ids[who, self.length[who] - 1]
        V = len(self.stops)
        branches, branch = np.unique(row * V + last, return_inverse=True)
        row = cache.rearrange(branches // V)[branch]
        order = np.argsort(row, kind="stable")
        self.who = who[order]
        self.row = row[order]
        self.rows = len(branches)
        tokens = np.zeros(self.rows, np.int64)
        tokens[row] = last
        return torch.from_numpy(tokens)
