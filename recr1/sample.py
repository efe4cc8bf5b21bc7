"""generate(): batched KV-cache sampling with the training modules. Legend: P prompts, G siblings, R
= P*G texts, B live rows, V vocabulary.

Siblings that are still the same text are one row (DESIGN decision 13): each draws with its own
uniform, and the row splits where they choose differently. Prefill once per prompt is the case of
the empty completion. Same text as one row each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from .attention import PackedAttention
from .cache import KVCache, slots
from .decode_graph import DEVICES, DecodeGraphs
from .kernels.choose import linear_choose
from .linear import sampling
from .model import Decoder
from .policy import head_of, policy
from .records import Prompt, Rollout

# tokens between two looks at who has stopped: a GPU would wait for each look, longer than some
# tokens that nobody reads take
LAG = {"cpu": 1, "cuda": 8}


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: list[Prompt],
    group_size: int,
    temperature: float,
    max_new_tokens: int,
    stops: frozenset[int],
    uniforms: np.ndarray | None,
    cache: KVCache | None = None,
    *,
    top_p: float = 1.0,
    room: int | None = None,
    kernels: str = "torch",
    heard: Callable[[int, int], None] | None = None,
    done: Callable[[list[Rollout]], None] | None = None,
) -> list[Rollout]:
    """P prompts -> P * G rollouts, siblings adjacent, in order.

    `uniforms` (P, G, max_new_tokens) in (0, 1), one per token, chooses by inverse CDF; None is
    greedy. A text ends with any id of `stops`, which it keeps, or unfinished at max_new_tokens.
    Log-probs are those of the policy at `temperature`; top_p < 1 draws from the fewest most likely
    ids that hold so much of it.
    `kernels`, torch or triton, make the choice; on a GPU steps in which no row is shared are CUDA
    graphs (decode_graph.py). A `cache` of `new_cache` saves its memory from one call to the next:
    fresh pages cost a third of a small model's step. `room`: the cache's slots, rows times their
    length; texts beyond it wait and enter as others end. `heard(r, id)` gets every token of text r
    in order, `done(siblings)` each group once its last text has ended. Raises ValueError when
    `room` does not hold one text.
    """
    if not prompts:
        return []  # a rank without a share
    cache = cache or new_cache(model)
    texts = Texts(prompts, group_size, max_new_tokens, stops, model.config.vocab_size)
    widest = slots(max(len(p.ids) for p in prompts) + max_new_tokens)
    # texts at once
    most = len(texts.length) if room is None else min(room // widest, len(texts.length))
    if not most:
        raise ValueError(f"room for {room} slots does not hold one text of {widest}")
    graphed = cache.lengths.device.type in DEVICES
    cache.clear(most, widest, at_once=graphed)
    with sampling(model, head_of(model)) as head:
        choice = partial(
            linear_choose,
            weight=head,
            temperature=temperature,
            policy=policy,
            top_p=top_p,
            backend=kernels,
        )
        graphs = DecodeGraphs(model, cache, choice) if graphed else None
        return _generate(model, texts, most, cache, choice, graphs, uniforms, heard, done)


def _generate(model, texts, most, cache, choice, graphs, uniforms, heard, done) -> list[Rollout]:
    device = cache.lengths.device
    tokens = ()
    while True:
        entering = texts.enter(most)
        if not len(texts.who):
            return texts.rollouts(done)
        chosen = []
        for u in texts.draws(uniforms, LAG[device.type], device):
            if graphs and not entering and texts.rows == len(texts.who):
                chosen.append(graphs(tokens, u))
            else:
                hidden = [decode(model, tokens, cache)] if len(tokens) else []
                if entering:
                    hidden = [*hidden, prefill(model, entering, cache)]
                    entering = []
                chosen.append(choice(torch.cat(hidden), uniforms=u))  # of hidden (B, C)
            tokens = chosen[-1][0][:, 0]
        texts.write(*(torch.stack(x).cpu().numpy() for x in zip(*chosen)), heard)
        texts.rollouts(done)
        tokens = texts.part(cache).to(device)


class Texts:
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


def new_cache(model: Decoder) -> KVCache:
    """An empty cache in the model's shape, type and place."""
    c = model.config
    weight = model.head_weight
    return KVCache(
        c.num_hidden_layers,
        c.num_key_value_heads,
        c.head_dim,
        weight.dtype,
        weight.device,
        model.backend.exact,
    )


def prefill(model: Decoder, prompts: list[Prompt], cache: KVCache) -> torch.Tensor:
    """The prompts' packed forward, what all begin with computed once; they take the cache's next
    rows. Returns the hidden states (P, C) that predict the first tokens.
    """
    device = cache.lengths.device
    first = min(p.ids for p in prompts)
    last = max(p.ids for p in prompts)
    same = (
        next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
        if len(prompts) > 1
        else 0
    )
    same = min(same, min(len(p.ids) for p in prompts) - 1)  # each has a token of its own
    sequences = [first[:same]] * (same > 0) + [p.ids[same:] for p in prompts]
    lengths = torch.tensor([len(ids) for ids in sequences])
    if same:
        packed = PackedAttention(
            lengths[:1],
            lengths[1:],
            torch.zeros(len(prompts), dtype=torch.int64),
            device,
            model.backend,
        )
    else:
        none = torch.zeros(0, dtype=torch.int64)
        packed = PackedAttention(lengths, none, none, device, model.backend)
    tokens = torch.tensor([t for ids in sequences for t in ids], device=device)
    positions = torch.tensor(
        [
            t
            for i, ids in enumerate(sequences)
            for t in range(same * (i > 0), same * (i > 0) + len(ids))
        ],
        device=device,
    )
    hidden = model(
        tokens, positions, cache.prefill(packed, torch.tensor([len(p.ids) for p in prompts]))
    )
    return hidden.index_select(0, (lengths.cumsum(0) - 1)[-len(prompts) :].to(device))


def decode(model: Decoder, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """The live rows' next tokens (B,) -> the hidden states (B, C) that predict those after them."""
    hidden = model(tokens, cache.next(), cache)
    cache.advance()
    return hidden
