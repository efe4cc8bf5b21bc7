"""generate() against transformers' generate and softmax; its log-probs against the trainer's; what
random numbers may depend on.
"""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_world import (
    COLOURS,
    FAMILIES,
    THINGS,
    answering_model,
    oracle,
    tiny_model,
    tiny_tokenizer,
)
from transformers import GenerationConfig

from recr1.data_types import Prompt, Rollout
from recr1.evaluation.evaluate import generate_greedily
from recr1.model import packed_attention
from recr1.model.log_probs import compute_log_probs
from recr1.model.packed_attention import PackedAttention
from recr1.rl.packing import deduplicate, pack_rollouts
from recr1.sampling import generate as generate_module
from recr1.sampling.generate import count_shared_tokens, generate
from recr1.sampling.kv_cache import KVCache, count_slots
from recr1.utils.counter_rng import draw_uniforms

EOS = tiny_tokenizer().eos_token_id
EOS_ONLY = frozenset([EOS])
MANY_STOPS = frozenset(range(0, 394, 20))
NEW = 20
GROUP_SIZE = 8
HF_BATCH_SIZE = 50
# lengths of prompts, lengths of completions' inputs, the prompt of each completion
LAYOUTS = [
    ([3, 9, 1], [4, 0, 7, 2, 1], [0, 0, 1, 2, 2]),
    ([5, 2], [], []),
    ([4], [0, 0], [0, 0]),
]


def draw_prompts(n, seed=0, longest=40, vocab=394):
    """Draw n prompts of 1 to `longest` ids."""
    rng = np.random.default_rng(seed)
    prompts = []
    for i in range(n):
        length = rng.integers(1, longest + 1)
        ids = rng.integers(0, vocab, length)
        prompts.append(Prompt(f"q{i}", i, "", tuple(ids.tolist())))
    return prompts


@functools.cache
def answering():
    """A model whose siblings often agree, and prompts for it: rows are shared, split, moved and
    retired.
    """
    tokenizer = tiny_tokenizer()
    prompts = []
    for i, (color, thing) in enumerate(zip(COLOURS, THINGS)):
        text = f"find {color} {thing} {'cheap ' * i}<think>"
        ids = tokenizer(text)["input_ids"]
        prompts.append(Prompt(f"q{i}", i, text, tuple(ids)))
    return answering_model(), prompts


def sample(model, prompts, group_size=GROUP_SIZE, temperature=1.0, seed=0, step=1):
    """Sample groups of siblings with the uniforms of a seed and step."""
    indices = np.array([p.index for p in prompts])
    uniforms = draw_uniforms(seed, step, indices, group_size, NEW)
    return generate(model, prompts, group_size, temperature, NEW, EOS_ONLY, uniforms)


def decode_greedily(model, prompts, new_tokens, stops):
    """Take the most likely id at each step."""
    return generate(model, prompts, 1, 1.0, new_tokens, stops, None)


def list_texts(rollouts):
    """List what was written: prompt, sibling, ids, finished."""
    return [(r.prompt.id, r.sibling, r.ids, r.finished) for r in rollouts]


def index_texts(rollouts):
    """Index what was written by prompt and sibling."""
    texts = {}
    for rollout in rollouts:
        key = (rollout.prompt.id, rollout.sibling)
        texts[key] = (rollout.ids, rollout.finished)
    return texts


def measure_logp_gap(ours, theirs):
    """Measure the largest difference of two rollouts' log-probs."""
    difference = np.subtract(ours.sampler_logp, theirs.sampler_logp)
    return np.abs(difference).max()


def cut_after_stop(ids, stops):
    """Cut ids behind the first stop id."""
    for i, token in enumerate(ids):
        if token in stops:
            return tuple(ids[: i + 1])
    return tuple(ids)


@torch.no_grad()
def decode_greedily_by_transformers(hf_model, prompts, new_tokens, stops):
    """transformers' own greedy decoding, left-padded batches -> one list of ids per prompt, the EOS
    kept.
    """
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        eos_token_id=sorted(stops),
        pad_token_id=0,
    )
    completions = []
    for start in range(0, len(prompts), HF_BATCH_SIZE):
        batch = prompts[start : start + HF_BATCH_SIZE]
        width = max(len(p.ids) for p in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            padding = width - len(prompt.ids)
            ids[row, padding:] = torch.tensor(prompt.ids)
            mask[row, padding:] = 1
        output = hf_model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        for new_ids in output[:, width:].tolist():
            completion = cut_after_stop(new_ids, stops)
            completions.append(completion)
    return completions


def find_first_difference(ours, theirs):
    """Find the index of the first token that differs."""
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            return i
    raise AssertionError("one text begins with the other: no token differs")


@torch.no_grad()
def compute_hf_logits(hf_model, ids):
    """Compute transformers' logits (tokens, V) of one sequence."""
    output = hf_model(input_ids=torch.tensor([ids]))
    return output.logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers_greedy_on_200_prompts_with_many_eos_ids(family):
    model = tiny_model(seed=3, **FAMILIES[family])
    hf_model = oracle(model)
    prompts = draw_prompts(200)

    ours = decode_greedily(model, prompts, 24, MANY_STOPS)
    theirs = decode_greedily_by_transformers(hf_model, prompts, 24, MANY_STOPS)

    differences = 0
    for rollout, want in zip(ours, theirs, strict=True):
        is_at_stop = rollout.ids[-1] in MANY_STOPS
        assert rollout.finished == is_at_stop
        if rollout.ids == want:
            continue
        differences += 1
        i = find_first_difference(rollout.ids, want)
        logits = compute_hf_logits(hf_model, rollout.prompt.ids + want[:i])
        best, second = logits[-1].topk(2).values
        assert best - second < 1e-4, (
            f"{rollout.prompt.id} differs at token {i}, where the best is clear"
        )
    print(
        f"greedy, {family}: {differences} of 200 differ from transformers, all at ties below 1e-4"
    )
    assert differences <= 2
    last_ids = {r.ids[-1] for r in ours if r.finished}
    assert len(last_ids) >= 3
    assert any(not r.finished for r in ours)


def test_a_text_ends_at_its_first_stop_id_or_is_cut():
    model = tiny_model(seed=3)
    prompts = draw_prompts(30)

    rollouts = decode_greedily(model, prompts, 24, MANY_STOPS)
    finished = next(r for r in rollouts if r.finished and len(r.ids) > 3)
    length = len(finished.ids)
    [exact] = decode_greedily(model, [finished.prompt], length, MANY_STOPS)
    [shorter] = decode_greedily(model, [finished.prompt], length - 1, MANY_STOPS)

    assert exact.ids == finished.ids
    assert exact.finished
    assert shorter.ids == finished.ids[:-1]
    assert not shorter.finished
    for rollout in rollouts:
        assert MANY_STOPS.isdisjoint(rollout.ids[:-1])
        assert len(rollout.ids) == len(rollout.sampler_logp)
        assert len(rollout.ids) <= 24


def test_order_and_seeds():
    model, prompts = answering()
    want_order = []
    for group, prompt in enumerate(prompts):
        for sibling in range(GROUP_SIZE):
            want_order.append((prompt.id, group, sibling))

    first = sample(model, prompts)
    again = sample(model, prompts)
    other = sample(model, prompts, seed=1)
    later = sample(model, prompts, step=2)

    order = [(r.prompt.id, r.group, r.sibling) for r in first]
    texts = list_texts(first)
    assert order == want_order
    assert first == again
    assert texts != list_texts(other)
    assert texts != list_texts(later)


def test_sharing_rows_changes_no_text():
    """Each sibling alone, with its own uniforms, writes what it wrote in the group; and rows were
    indeed shared.
    """
    model, prompts = answering()
    indices = np.arange(len(prompts))
    uniforms = draw_uniforms(0, 1, indices, GROUP_SIZE, NEW)
    rows_per_step = []

    def record_rows(module, inputs):
        rows_per_step.append(len(inputs[0]))

    hook = model.register_forward_pre_hook(record_rows)
    together = generate(model, prompts, GROUP_SIZE, 1.0, NEW, EOS_ONLY, uniforms)
    hook.remove()

    decode_rows = rows_per_step[1:]
    unshared_rows = sum(len(r.ids) - 1 for r in together)
    assert max(decode_rows) > len(prompts)
    assert sum(decode_rows) < 0.9 * unshared_rows
    for rollout in together:
        group = rollout.group
        sibling = rollout.sibling
        sibling_uniforms = uniforms[group : group + 1, sibling : sibling + 1]
        [alone] = generate(model, [rollout.prompt], 1, 1.0, NEW, EOS_ONLY, sibling_uniforms)
        assert alone.ids == rollout.ids
        assert alone.finished == rollout.finished
        assert measure_logp_gap(alone, rollout) < 1e-4


def test_a_prompts_texts_do_not_depend_on_the_rest_of_the_batch():
    model, prompts = answering()
    others = draw_prompts(9, seed=5)[len(prompts) :]
    batches = [
        prompts[::-1],
        prompts[2:4],
        prompts[4:] + prompts[:1],
        prompts + others,
    ]
    rollouts = sample(model, prompts)
    want = index_texts(rollouts)

    for batch in batches:
        rollouts = sample(model, batch)
        texts = index_texts(rollouts)
        common = want.keys() & texts.keys()
        assert common
        for key in common:
            assert texts[key] == want[key]

    # nor on how many siblings there are
    fewer = sample(model, prompts, group_size=3)
    texts = index_texts(fewer)
    for key, text in texts.items():
        assert text == want[key]


@pytest.mark.parametrize("limit", [1, 25, 60, 16_384])
def test_prompts_that_enter_together_are_computed_in_bounded_forwards(limit, monkeypatch):
    """No forward has more tokens, unless it is of one prompt; the texts stay what they were."""
    model, prompts = answering()
    want = index_texts(sample(model, prompts))
    monkeypatch.setattr(generate_module, "MAX_PREFILL_TOKENS", limit)
    forwards = []

    def prefill_and_record(model, chunk, cache):
        forwards.append(chunk)
        return prefill(model, chunk, cache)

    prefill = generate_module.prefill
    monkeypatch.setattr(generate_module, "prefill", prefill_and_record)

    texts = index_texts(sample(model, prompts))

    assert texts == want
    assert sum(forwards, []) == prompts
    longest = max(len(prompt.ids) for prompt in prompts)
    for chunk in forwards:
        num_shared = count_shared_tokens(chunk)
        num_tokens = num_shared + sum(len(prompt.ids) - num_shared for prompt in chunk)
        assert num_tokens <= max(limit, longest)
        assert num_tokens <= limit or len(chunk) == 1
    if limit == 25:
        assert 1 < len(forwards) < len(prompts)


def test_an_evaluation_keeps_to_the_caches_budget():
    """sampling.kv_cache_gib holds there too: prompts wait, and their answers are the same."""
    model, prompts = answering()
    want = generate_greedily(model, prompts, EOS_ONLY, NEW)
    longest = max(len(prompt.ids) for prompt in prompts)
    room = 2 * count_slots(longest + NEW)
    most_rows = []

    def record_steps(module, inputs):
        tokens, positions, attention = inputs
        if isinstance(attention, KVCache):  # a decode step
            most_rows.append(len(tokens))

    hook = model.register_forward_pre_hook(record_steps)
    actual = generate_greedily(model, prompts, EOS_ONLY, NEW, max_cache_tokens=room)
    hook.remove()

    assert list_texts(actual) == list_texts(want)
    assert max(most_rows) == 2


def make_model(kind):
    """Make the model of a kind, float32."""
    if kind == "answering":
        return answering_model()
    return tiny_model(
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        reachable=390,
    )


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", ["answering", "random, tied, reachable"])
def test_the_samplers_log_probs_are_the_trainers(kind, dtype, bound, temperature):
    model = make_model(kind).to(dtype)
    _, prompts = answering()
    sampled = sample(model, prompts, temperature=temperature)
    rollouts, _ = deduplicate(sampled)
    batches = pack_rollouts(rollouts, 200)
    assert len(batches) > 1

    packed = []
    for batch in batches:
        logp, _ = compute_log_probs(model, batch, temperature)

        indices = batch.rollout.unique_consecutive().tolist()
        packed += indices
        want_target = []
        want_logp = []
        for i in indices:
            want_target += rollouts[i].ids
            want_logp += rollouts[i].sampler_logp
        want_logp = torch.tensor(want_logp, dtype=torch.float64)
        assert batch.target.tolist() == want_target
        assert logp.dtype == dtype
        assert (logp.detach() - want_logp).abs().max() <= bound
        assert (batch.sampler_logp - want_logp).abs().max() <= 1e-5
    assert sorted(packed) == list(range(len(rollouts)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_transformers_log_softmax_over_reachable_ids(temperature):
    """Unreachable ids get no probability, and temperature divides the logits."""
    model = tiny_model(seed=1, reachable=300)
    hf_model = oracle(model)
    prompts = draw_prompts(4, vocab=300)

    rollouts = sample(model, prompts, group_size=16, temperature=temperature)

    sampled_ids = set()
    for rollout in rollouts:
        sampled_ids.update(rollout.ids)
    assert max(sampled_ids) < 300
    assert len(sampled_ids) > 200
    for rollout in rollouts:
        logits = compute_hf_logits(hf_model, rollout.prompt.ids + rollout.ids)
        first = len(rollout.prompt.ids) - 1
        reachable = logits[first:-1, :300] / temperature
        logp = reachable.log_softmax(-1)
        target = torch.tensor(rollout.ids)
        want = logp.gather(1, target[:, None])[:, 0]
        actual = torch.tensor(rollout.sampler_logp)
        assert (want - actual).abs().max() <= 1e-4


def attend_causally(q, k, v):
    """Attend in one causal sequence; q, k and v are (tokens, heads, head_dim)."""
    q = q.transpose(0, 1)[None]
    k = k.transpose(0, 1)[None]
    v = v.transpose(0, 1)[None]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out[0].transpose(0, 1)


def attend_naively(q, k, v, prompt_lengths, completion_lengths, prompt_of):
    """transformers' way: every completion with a copy of its prompt, one causal row, kv heads
    repeated.
    """
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    tokens = torch.arange(len(q))
    sequences = tokens.split(prompt_lengths + completion_lengths)
    prompts = sequences[: len(prompt_lengths)]
    completions = sequences[len(prompt_lengths) :]

    out = []
    for prompt in prompts:
        attended = attend_causally(q[prompt], k[prompt], v[prompt])
        out.append(attended)
    for i, completion in enumerate(completions):
        if not len(completion):
            continue
        prompt = prompts[prompt_of[i]]
        rows = torch.cat([prompt, completion])
        attended = attend_causally(q[rows], k[rows], v[rows])
        out.append(attended[len(prompt) :])
    return torch.cat(out)


@pytest.mark.parametrize("short", [0, packed_attention.SHORT_ROWS])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (5, 1)])
@pytest.mark.parametrize("lengths, completion_lengths, prompt_of", LAYOUTS)
def test_packed_attention_is_causal_attention_over_prompt_and_own_tokens(
    short, heads, kv_heads, lengths, completion_lengths, prompt_of, monkeypatch
):
    """Both ways of computing it, outputs and gradients: a prompt's gradient is the sum over its
    siblings.
    """
    monkeypatch.setattr(packed_attention, "SHORT_ROWS", short)
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths + completion_lengths)

    def draw(n):
        return torch.randn(tokens, n, 8, generator=generator, dtype=torch.float64)

    q = draw(heads)
    k = draw(kv_heads)
    v = draw(kv_heads)
    toward = draw(heads)
    inputs = (q, k, v)
    for x in inputs:
        x.requires_grad_()
    attention = PackedAttention(
        torch.tensor(lengths, dtype=torch.int64),
        torch.tensor(completion_lengths, dtype=torch.int64),
        torch.tensor(prompt_of, dtype=torch.int64),
    )

    ours = attention(0, q, k, v)
    want = attend_naively(q, k, v, lengths, completion_lengths, prompt_of)

    assert (ours - want).abs().max() < 1e-12
    our_grads = torch.autograd.grad(ours, inputs, toward)
    want_grads = torch.autograd.grad(want, inputs, toward)
    for a, b in zip(our_grads, want_grads):
        assert (a - b).abs().max() < 1e-12


def test_both_ways_of_attention_write_the_same_texts(monkeypatch):
    model, prompts = answering()
    want = sample(model, prompts)
    monkeypatch.setattr(packed_attention, "SHORT_ROWS", 0)

    rollouts = sample(model, prompts)

    assert list_texts(rollouts) == list_texts(want)
    for rollout, want_rollout in zip(rollouts, want):
        assert isinstance(rollout, Rollout)
        assert measure_logp_gap(rollout, want_rollout) < 1e-4
