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

from recr1.data_types import Prompt, Rollout
from recr1.kernels.cpu_linear import packed_for_sampling
from recr1.kernels.sample_token import sample_from_hidden
from recr1.model.decoder import Decoder
from recr1.model.log_probs import get_lm_head_weight, make_distribution
from recr1.model.packed_attention import PackedAttention
from recr1.sampling.cuda_graphs import DEVICES, DecodeGraphs
from recr1.sampling.kv_cache import KVCache, count_slots
from recr1.sampling.sequences import SequenceBatch

# tokens between two looks at who has stopped: a GPU would wait for each look, longer than some
# tokens that nobody reads take
SYNC_EVERY = {"cpu": 1, "cuda": 8}


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
    graphs (sampling/cuda_graphs.py). A `cache` of `new_cache` saves its memory from one call to the next:
    fresh pages cost a third of a small model's step. `room`: the cache's slots, rows times their
    length; texts beyond it wait and enter as others end. `heard(r, id)` gets every token of text r
    in order, `done(siblings)` each group once its last text has ended. Raises ValueError when
    `room` does not hold one text.
    """
    if not prompts:
        return []  # a rank without a share
    cache = cache or make_cache(model)
    texts = SequenceBatch(prompts, group_size, max_new_tokens, stops, model.config.vocab_size)
    widest = count_slots(max(len(p.ids) for p in prompts) + max_new_tokens)
    # texts at once
    most = len(texts.length) if room is None else min(room // widest, len(texts.length))
    if not most:
        raise ValueError(f"room for {room} slots does not hold one text of {widest}")
    graphed = cache.lengths.device.type in DEVICES
    cache.clear(most, widest, at_once=graphed)
    with packed_for_sampling(model, get_lm_head_weight(model)) as head:
        choice = partial(
            sample_from_hidden,
            weight=head,
            temperature=temperature,
            policy=make_distribution,
            top_p=top_p,
            backend=kernels,
        )
        graphs = DecodeGraphs(model, cache, choice) if graphed else None
        return _decode_loop(model, texts, most, cache, choice, graphs, uniforms, heard, done)


def _decode_loop(model, texts, most, cache, choice, graphs, uniforms, heard, done) -> list[Rollout]:
    device = cache.lengths.device
    tokens = ()
    while True:
        entering = texts.enter(most)
        if not len(texts.who):
            return texts.rollouts(done)
        chosen = []
        for u in texts.draws(uniforms, SYNC_EVERY[device.type], device):
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


def make_cache(model: Decoder) -> KVCache:
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
