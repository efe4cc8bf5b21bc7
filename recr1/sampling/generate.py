"""Sample completions with a KV cache, by the modules that are trained.

Siblings whose tokens so far are equal share one row of the cache: each draws with its own uniform,
and the row forks where they choose differently. Computing a prompt once for its whole group is the
case of the empty completion. The texts are those of one row each. On a GPU siblings share a row
only up to their first token: a graph has one text in a row, and a step there is bound by reading
the weights, so that rows saved are not time saved.

Legend: P prompts, G siblings, R = P*G sequences, B running rows, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from recr1.data_types import Prompt, Rollout
from recr1.kernels.cpu_linear import packed_for_sampling
from recr1.kernels.sample_token import SampledTokens, sample_from_hidden
from recr1.model.decoder import AnyDecoder
from recr1.model.log_probs import get_lm_head_weight, make_distribution
from recr1.model.packed_attention import PackedAttention
from recr1.sampling.cuda_graphs import GRAPH_DEVICES, DecodeGraphs
from recr1.sampling.kv_cache import KVCache, count_slots
from recr1.sampling.sequences import SequenceBatch, stack_to_host

# Decode steps between two looks at which sequences have stopped. A GPU would wait for each look,
# longer than some tokens that nobody reads take.
SYNC_EVERY = {"cpu": 1, "cuda": 8}

# Prompts that enter together are computed in one forward up to so many tokens, in several above:
# its MLP's activations would else be the largest allocation of a run, in an evaluation of 512.
MAX_PREFILL_TOKENS = 16_384


@torch.no_grad()
def generate(
    model: AnyDecoder,
    prompts: list[Prompt],
    group_size: int,
    temperature: float,
    max_new_tokens: int,
    stop_token_ids: frozenset[int],
    uniforms: np.ndarray | None,
    cache: KVCache | None = None,
    *,
    top_p: float = 1.0,
    max_cache_tokens: int | None = None,
    kernels: str = "torch",
    on_token: Callable[[int, int], None] | None = None,
    on_group_finished: Callable[[list[Rollout]], None] | None = None,
) -> list[Rollout]:
    """Sample P * G rollouts for P prompts, siblings adjacent, in order.

    Args:
        temperature: log-probs are those of the policy at this temperature.
        max_new_tokens: a sequence that is so long ends unfinished.
        stop_token_ids: each of them ends a sequence, which keeps it.
        uniforms: (P, G, max_new_tokens) in (0, 1), choose by inverse CDF. None is greedy.
        cache: from `make_cache`, keeps its memory from one call to the next: fresh pages cost a
            third of a small model's step.
        top_p: below 1, draw from the fewest most likely ids that hold so much of the probability.
        max_cache_tokens: slots of the cache, rows times their length. Sequences that do not fit
            wait, and enter as others end. Raises ValueError when one does not fit alone.
        kernels: torch, triton or auto, what chooses the tokens. On a GPU decode steps are CUDA
            graphs (sampling/cuda_graphs.py).
        on_token: called as on_token(r, id) with every token of sequence r, in order, as soon as it
            is chosen.
        on_group_finished: called with a group's siblings once the last of them has ended.
    """
    if not prompts:
        return []  # a rank without a share
    with prepare_sampler(model, temperature, cache, top_p=top_p, kernels=kernels) as sampler:
        return sampler.generate(
            prompts,
            group_size,
            max_new_tokens,
            stop_token_ids,
            uniforms,
            max_cache_tokens=max_cache_tokens,
            on_token=on_token,
            on_group_finished=on_group_finished,
        )


@contextmanager
def prepare_sampler(
    model: AnyDecoder,
    temperature: float,
    cache: KVCache | None = None,
    *,
    top_p: float = 1.0,
    kernels: str = "torch",
) -> Iterator[Sampler]:
    """Prepare for several calls of `Sampler.generate` over the same weights.

    The weights must stay where they are inside the block: what is shared lies on their addresses.
    The arguments are those of `generate`.
    """
    cache = cache or make_cache(model)
    with packed_for_sampling(model, get_lm_head_weight(model)) as head_weight:
        sample_tokens = partial(
            sample_from_hidden,
            weight=head_weight,
            temperature=temperature,
            policy=make_distribution,
            top_p=top_p,
            backend=kernels,
        )
        yield Sampler(model, cache, sample_tokens)


class Sampler:
    """Sample from one model: prefill, decode, and who runs.

    Its calls share the packed weights, the cache, and on a GPU the CUDA graphs: see
    `prepare_sampler`.
    """

    def __init__(self, model: AnyDecoder, cache: KVCache, sample_tokens: Callable):
        """`sample_tokens(hidden (B, C), uniforms=...)` returns ids, log-probs, truncated mass."""
        self.model = model
        self.cache = cache
        self.sample_tokens = sample_tokens
        self.device = cache.lengths.device
        self.use_graphs = self.device.type in GRAPH_DEVICES
        self.graphs: DecodeGraphs | None = None

    @torch.no_grad()
    def generate(
        self,
        prompts: list[Prompt],
        group_size: int,
        max_new_tokens: int,
        stop_token_ids: frozenset[int],
        uniforms: np.ndarray | None,
        *,
        max_cache_tokens: int | None = None,
        on_token: Callable[[int, int], None] | None = None,
        on_group_finished: Callable[[list[Rollout]], None] | None = None,
    ) -> list[Rollout]:
        """Sample rollouts until every sequence is finished (continuous batching).

        Waiting sequences enter as others leave. Arguments and result are those of the function
        `generate`.
        """
        batch = SequenceBatch(
            prompts,
            group_size,
            max_new_tokens,
            stop_token_ids,
            self.model.config.vocab_size,
            # A step with a shared row is no graph, and its tokens are looked at one by one.
            share_rows=not self.use_graphs,
        )
        max_running = self._reserve_cache(batch, max_cache_tokens)
        # Somebody who listens waits for every token.
        sync_every = 1 if on_token else SYNC_EVERY[self.device.type]

        last_tokens = torch.zeros(0, dtype=torch.int64, device=self.device)
        while True:
            new_prompts = batch.admit(max_running)
            if batch.num_running == 0:
                return batch.collect_finished(on_group_finished)

            # A GPU runs several tokens ahead before the host looks which sequences have stopped.
            sampled = []
            for step_uniforms in batch.uniforms_until_next_sync(uniforms, sync_every, self.device):
                if self.graphs and not new_prompts and not batch.has_shared_rows:
                    tokens = self.graphs(last_tokens, step_uniforms)
                else:
                    tokens = self._step(last_tokens, new_prompts, step_uniforms)
                    new_prompts = []
                sampled.append(tokens)
                ids, _, _ = tokens
                last_tokens = ids[:, 0]

            batch.append_tokens(stack_to_host(sampled), on_token)  # the one wait for the device
            batch.collect_finished(on_group_finished)
            last_tokens = batch.fork_rows(self.cache).to(self.device, non_blocking=True)

    def _reserve_cache(self, batch: SequenceBatch, max_cache_tokens: int | None) -> int:
        """Make the cache ready for the sequences. Return how many of them may run at once.

        Graphs are made anew where the memory that they work on has moved.
        """
        longest_prompt = max(len(prompt.ids) for prompt in batch.prompts)
        slots_per_row = count_slots(longest_prompt + batch.max_new_tokens)
        max_running = count_max_running(batch.num_sequences, slots_per_row, max_cache_tokens)
        self.cache.reset(max_running, slots_per_row, reserve=self.use_graphs)
        if self.use_graphs and (self.graphs is None or self.graphs.has_cache_moved()):
            self.graphs = None  # first: of the graphs on one stream only these may be alive
            self.graphs = DecodeGraphs(self.model, self.cache, self.sample_tokens)
        return max_running

    def _step(
        self,
        last_tokens: torch.Tensor,
        new_prompts: list[Prompt],
        uniforms: torch.Tensor | None,
    ) -> SampledTokens:
        """Sample the next token of the running rows and of the prompts that enter, eagerly."""
        hidden = []
        if len(last_tokens):
            hidden.append(decode(self.model, last_tokens, self.cache))
        for chunk in split_prefill(new_prompts):
            hidden.append(prefill(self.model, chunk, self.cache))
        return self.sample_tokens(torch.cat(hidden), uniforms=uniforms)  # of (B, C)


def count_max_running(num_sequences: int, slots_per_row: int, max_cache_tokens: int | None) -> int:
    """Return how many sequences may run at once: each may become a row of its own.

    Raises ValueError when the cache does not hold one.
    """
    if max_cache_tokens is None:
        return num_sequences
    max_running = min(max_cache_tokens // slots_per_row, num_sequences)
    if not max_running:
        raise ValueError(
            f"room for {max_cache_tokens} slots does not hold one text of {slots_per_row}"
        )
    return max_running


def make_cache(model: AnyDecoder) -> KVCache:
    """Return an empty cache in the model's shape, dtype and device."""
    config = model.config
    weight = model.head_weight
    return KVCache(
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.head_dim,
        weight.dtype,
        weight.device,
        model.backend.exact,
    )


def split_prefill(prompts: list[Prompt]) -> list[list[Prompt]]:
    """Split prompts, in order, into as few forwards as MAX_PREFILL_TOKENS allows; a longer prompt
    is one by itself. What all begin with counts once.
    """
    if not prompts:
        return []
    num_shared = count_shared_tokens(prompts)
    chunks: list[list[Prompt]] = [[]]
    num_tokens = num_shared
    for prompt in prompts:
        num_own = len(prompt.ids) - num_shared
        if chunks[-1] and num_tokens + num_own > MAX_PREFILL_TOKENS:
            chunks.append([])
            num_tokens = num_shared
        chunks[-1].append(prompt)
        num_tokens += num_own
    return chunks


def prefill(model: AnyDecoder, prompts: list[Prompt], cache: KVCache) -> torch.Tensor:
    """Compute the prompts in one packed forward, and put them into the next rows of the cache.

    What all prompts begin with is computed once. Returns the hidden states (P, C) that predict the
    first tokens.
    """
    device = cache.lengths.device
    prompt_lengths = torch.tensor([len(prompt.ids) for prompt in prompts])

    # Pack the shared prefix, if there is one, then each prompt's remainder.
    num_shared = count_shared_tokens(prompts)
    sequences = [prompt.ids[num_shared:] for prompt in prompts]
    starts = [num_shared] * len(prompts)  # the position of each sequence's first token
    if num_shared:
        sequences.insert(0, prompts[0].ids[:num_shared])
        starts.insert(0, 0)

    token_ids: list[int] = []
    positions: list[int] = []
    for ids, start in zip(sequences, starts):
        token_ids += ids
        positions += range(start, start + len(ids))

    # The shared prefix is the one "prompt", which every remainder continues.
    lengths = torch.tensor([len(ids) for ids in sequences])
    if num_shared:
        prompt_of = torch.zeros(len(prompts), dtype=torch.int64)
        packed = PackedAttention(lengths[:1], lengths[1:], prompt_of, device, model.backend)
    else:
        none = torch.zeros(0, dtype=torch.int64)
        packed = PackedAttention(lengths, none, none, device, model.backend)

    hidden = model(
        torch.tensor(token_ids, device=device),
        torch.tensor(positions, device=device),
        cache.prefill(packed, prompt_lengths),
    )
    last_token = (lengths.cumsum(0) - 1)[-len(prompts) :]  # (P,)
    return hidden.index_select(0, last_token.to(device))


def count_shared_tokens(prompts: list[Prompt]) -> int:
    """Return how many tokens all prompts begin with, at most all but one token of each.

    The longest common prefix of all is that of the first and the last in lexicographic order.
    """
    if len(prompts) == 1:
        return 0
    first = min(prompt.ids for prompt in prompts)
    last = max(prompt.ids for prompt in prompts)
    num_shared = 0
    for first_id, last_id in zip(first, last):
        if first_id != last_id:
            break
        num_shared += 1
    shortest = min(len(prompt.ids) for prompt in prompts)
    return min(num_shared, shortest - 1)  # each has a token of its own


def decode(model: AnyDecoder, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Run the tokens (B,) that were just chosen, one of each running row.

    Returns the hidden states (B, C) that predict the next ones.
    """
    positions = cache.begin_decode_step()
    hidden = model(tokens, positions, cache)
    cache.advance()
    return hidden
