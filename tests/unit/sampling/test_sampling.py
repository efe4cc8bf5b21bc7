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
from recr1.model import packed_attention
from recr1.model.log_probs import compute_log_probs
from recr1.model.packed_attention import PackedAttention
from recr1.rl.packing import deduplicate, pack_rollouts
from recr1.sampling.generate import generate
from recr1.utils.counter_rng import draw_uniforms

EOS = tiny_tokenizer().eos_token_id
NEW = 20


def prompts_of(n, seed=0, longest=40, vocab=394):
    rng = np.random.default_rng(seed)
    return [
        Prompt(f"q{i}", i, "", tuple(rng.integers(0, vocab, rng.integers(1, longest + 1)).tolist()))
        for i in range(n)
    ]


@functools.cache
def answering():
    """A model whose siblings often agree, and prompts for it: rows are shared, split, moved and
    retired.
    """
    tokenizer = tiny_tokenizer()
    texts = [f"find {c} {t} {'cheap ' * i}<think>" for i, (c, t) in enumerate(zip(COLOURS, THINGS))]
    return answering_model(), [
        Prompt(f"q{i}", i, t, tuple(tokenizer(t)["input_ids"])) for i, t in enumerate(texts)
    ]


def sample(
    model, prompts, group_size=8, temperature=1.0, new=NEW, stops=frozenset([EOS]), seed=0, step=1
):
    u = draw_uniforms(seed, step, np.array([p.index for p in prompts]), group_size, new)
    return generate(model, prompts, group_size, temperature, new, stops, u)


def greedy(model, prompts, new=NEW, stops=frozenset([EOS])):
    return generate(model, prompts, 1, 1.0, new, stops, None)


def texts(rollouts):
    return [(r.prompt.id, r.sibling, r.ids, r.finished) for r in rollouts]


@torch.no_grad()
def their_greedy(model, prompts, new, stops):
    """transformers' own greedy decoding, left-padded batches -> one list of ids per prompt, the EOS
    kept.
    """
    out = []
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=new, eos_token_id=sorted(stops), pad_token_id=0
    )
    for chunk in (prompts[i : i + 50] for i in range(0, len(prompts), 50)):
        width = max(len(p.ids) for p in chunk)
        ids = torch.tensor([(0,) * (width - len(p.ids)) + p.ids for p in chunk])
        mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in chunk])
        for row in model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[
            :, width:
        ].tolist():
            end = next((i + 1 for i, t in enumerate(row) if t in stops), len(row))
            out.append(tuple(row[:end]))
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers_greedy_on_200_prompts_with_many_eos_ids(family):
    model = tiny_model(seed=3, **FAMILIES[family])
    prompts = prompts_of(200)
    stops = frozenset(range(0, 394, 20))
    theirs = oracle(model)
    ours = greedy(model, prompts, 24, stops)
    want = their_greedy(theirs, prompts, 24, stops)
    differ = 0
    for rollout, ids in zip(ours, want, strict=True):
        if rollout.ids != ids:
            differ += 1
            at = next(i for i, (a, b) in enumerate(zip(rollout.ids, ids)) if a != b)
            top = (
                theirs(input_ids=torch.tensor([rollout.prompt.ids + ids[:at]]))
                .logits[0, -1]
                .topk(2)
                .values
            )
            assert top[0] - top[1] < 1e-4, (
                f"{rollout.prompt.id} differs at token {at}, where the best is clear"
            )
        assert rollout.finished == (rollout.ids[-1] in stops)
    print(f"greedy, {family}: {differ} of 200 differ from transformers, all at ties below 1e-4")
    assert differ <= 2
    assert len({r.ids[-1] for r in ours if r.finished}) >= 3
    assert any(not r.finished for r in ours)


def test_a_text_ends_at_its_first_stop_id_or_is_cut():
    model = tiny_model(seed=3)
    prompts = prompts_of(30)
    stops = frozenset(range(0, 394, 20))
    whole = greedy(model, prompts, 24, stops)
    finished = next(r for r in whole if r.finished and len(r.ids) > 3)
    n = len(finished.ids)
    (exact,) = greedy(model, [finished.prompt], n, stops)
    (cut,) = greedy(model, [finished.prompt], n - 1, stops)
    assert (exact.ids, exact.finished) == (finished.ids, True)
    assert (cut.ids, cut.finished) == (finished.ids[:-1], False)
    assert all(
        not set(r.ids[:-1]) & stops and len(r.ids) == len(r.sampler_logp) <= 24 for r in whole
    )


def test_order_and_seeds():
    model, prompts = answering()
    first = sample(model, prompts)
    again = sample(model, prompts)
    other = sample(model, prompts, seed=1)
    later = sample(model, prompts, step=2)
    assert [(r.prompt.id, r.group, r.sibling) for r in first] == [
        (p.id, g, s) for g, p in enumerate(prompts) for s in range(8)
    ]
    assert first == again
    assert texts(first) != texts(other)
    assert texts(first) != texts(later)


def test_sharing_rows_changes_no_text():
    """Each sibling alone, with its own uniforms, writes what it wrote in the group; and rows were
    indeed shared.
    """
    model, prompts = answering()
    group = 8
    rows = []
    u = draw_uniforms(0, 1, np.arange(len(prompts)), group, NEW)
    hook = model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    together = generate(model, prompts, group, 1.0, NEW, frozenset([EOS]), u)
    hook.remove()
    assert max(rows[1:]) > len(prompts)
    assert sum(rows[1:]) < 0.9 * sum(len(r.ids) - 1 for r in together)
    for r in together:
        (alone,) = generate(
            model,
            [r.prompt],
            1,
            1.0,
            NEW,
            frozenset([EOS]),
            u[r.group : r.group + 1, r.sibling : r.sibling + 1],
        )
        assert (alone.ids, alone.finished) == (r.ids, r.finished)
        assert np.abs(np.subtract(alone.sampler_logp, r.sampler_logp)).max() < 1e-4


def test_a_prompts_texts_do_not_depend_on_the_rest_of_the_batch():
    model, prompts = answering()
    want = {(id, s): (ids, f) for id, s, ids, f in texts(sample(model, prompts))}
    for batch in (
        prompts[::-1],
        prompts[2:4],
        prompts[4:] + prompts[:1],
        prompts + prompts_of(9, seed=5)[len(prompts) :],
    ):
        got = {(id, s): (ids, f) for id, s, ids, f in texts(sample(model, batch))}
        assert all(got[key] == want[key] for key in want.keys() & got.keys())
        assert want.keys() & got.keys()
    fewer = texts(sample(model, prompts, group_size=3))  # nor on how many siblings there are
    assert all((ids, f) == want[id, s] for id, s, ids, f in fewer)


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", ["answering", "random, tied, reachable"])
def test_the_samplers_log_probs_are_the_trainers(kind, dtype, bound, temperature):
    model = (
        answering_model()
        if kind == "answering"
        else tiny_model(
            num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True, reachable=390
        )
    )
    model = model.to(dtype)
    rollouts, _ = deduplicate(sample(model, answering()[1], temperature=temperature))
    batches = pack_rollouts(rollouts, 200)
    seen = []
    assert len(batches) > 1
    for batch in batches:
        ours = compute_log_probs(model, batch, temperature)[0].detach()
        mine = batch.rollout.unique_consecutive().tolist()
        seen += mine
        assert batch.target.tolist() == [t for i in mine for t in rollouts[i].ids]
        sampler = torch.tensor(
            [x for i in mine for x in rollouts[i].sampler_logp], dtype=torch.float64
        )
        assert ours.dtype == dtype
        assert (ours - sampler).abs().max() <= bound
        assert (batch.sampler_logp - sampler).abs().max() <= 1e-5
    assert sorted(seen) == list(range(len(rollouts)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_transformers_log_softmax_over_reachable_ids(temperature):
    """Unreachable ids get no probability, and temperature divides the logits."""
    model = tiny_model(seed=1, reachable=300)
    theirs = oracle(model)
    rollouts = sample(model, prompts_of(4, vocab=300), group_size=16, temperature=temperature)
    assert max(max(r.ids) for r in rollouts) < 300
    assert len({t for r in rollouts for t in r.ids}) > 200
    for r in rollouts:
        with torch.no_grad():
            logits = theirs(input_ids=torch.tensor([r.prompt.ids + r.ids])).logits[
                0, len(r.prompt.ids) - 1 : -1, :300
            ]
        want = (logits / temperature).log_softmax(-1)[range(len(r.ids)), list(r.ids)]
        assert (want - torch.tensor(r.sampler_logp)).abs().max() <= 1e-4


def naive_attention(q, k, v, lengths, own, prompt_of):
    """transformers' way: every completion with a copy of its prompt, one causal row, kv heads
    repeated.
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))

    def causal(rows):
        return F.scaled_dot_product_attention(
            *(x[rows].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True
        )[0].transpose(0, 1)

    at = np.concatenate([[0], np.cumsum(lengths + own)]).tolist()
    rows = [list(range(a, b)) for a, b in zip(at, at[1:])]
    out = [causal(r) for r in rows[: len(lengths)]]
    out += [causal(rows[p] + r)[lengths[p] :] for p, r in zip(prompt_of, rows[len(lengths) :]) if r]
    return torch.cat(out)


@pytest.mark.parametrize("short", [0, packed_attention.SHORT_ROWS])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (5, 1)])
@pytest.mark.parametrize(
    "lengths, own, prompt_of",
    [([3, 9, 1], [4, 0, 7, 2, 1], [0, 0, 1, 2, 2]), ([5, 2], [], []), ([4], [0, 0], [0, 0])],
)
def test_packed_attention_is_causal_attention_over_prompt_and_own_tokens(
    short, heads, kv_heads, lengths, own, prompt_of, monkeypatch
):
    """Both ways of computing it, outputs and gradients: a prompt's gradient is the sum over its
    siblings.
    """
    monkeypatch.setattr(packed_attention, "SHORT_ROWS", short)
    generator = torch.Generator().manual_seed(0)

    def random(n):
        return torch.randn(sum(lengths + own), n, 8, generator=generator, dtype=torch.float64)

    inputs = [random(n).requires_grad_() for n in (heads, kv_heads, kv_heads)]
    packed = PackedAttention(
        *(torch.tensor(x, dtype=torch.int64) for x in (lengths, own, prompt_of))
    )
    ours = packed(0, *inputs)
    want = naive_attention(*inputs, lengths, own, prompt_of)
    toward = random(heads)
    assert (ours - want).abs().max() < 1e-12
    for a, b in zip(
        torch.autograd.grad(ours, inputs, toward), torch.autograd.grad(want, inputs, toward)
    ):
        assert (a - b).abs().max() < 1e-12


def test_both_ways_of_attention_write_the_same_texts(monkeypatch):
    model, prompts = answering()
    want = sample(model, prompts)
    monkeypatch.setattr(packed_attention, "SHORT_ROWS", 0)
    got = sample(model, prompts)
    assert texts(got) == texts(want)
    assert all(
        isinstance(r, Rollout) and np.abs(np.subtract(r.sampler_logp, w.sampler_logp)).max() < 1e-4
        for r, w in zip(got, want)
    )
