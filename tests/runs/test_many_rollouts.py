"""Ten thousand rollouts with random stop points: no row is lost, no cache memory stays behind, and
a text depends on nothing but its own prompt and uniforms: not on order, on company, or on `room`,
the cache slots that may be live at once.
"""

import copy
import functools
import gc
import inspect
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers.tiny_world import oracle, tiny_model, tiny_tokenizer
from test_sampling import answering

from recr1.data_types import Prompt, Rollout
from recr1.sampling.generate import generate, make_cache
from recr1.sampling.kv_cache import count_slots
from recr1.utils.counter_rng import draw_uniforms

VOCAB = 394
EVERY = frozenset(range(VOCAB))


class Call(NamedTuple):
    prompts: list[Prompt]
    group_size: int
    new: int  # max_new_tokens
    stops: frozenset[int]
    step: int

    def uniforms(self) -> np.ndarray:
        return draw_uniforms(
            3, self.step, np.array([p.index for p in self.prompts]), self.group_size, self.new
        )

    def slots(self) -> tuple[int, int]:
        """Rows and slots of a row that the texts can come to."""
        return len(self.prompts) * self.group_size, count_slots(
            max(len(p.ids) for p in self.prompts) + self.new
        )


@functools.cache
def calls() -> list[Call]:
    rng = np.random.default_rng(0)

    def call(step, n, group, new, stops, longest=24):
        prompts = [
            Prompt(
                f"q{step}.{i}",
                int(rng.integers(10_000)) * 100 + i,
                "",
                tuple(rng.integers(0, VOCAB, rng.integers(1, longest + 1)).tolist()),
            )
            for i in range(n)
        ]
        return Call(prompts, group, new, stops, step)

    some = [
        call(0, 30, 8, 12, EVERY),
        call(1, 30, 8, 12, frozenset()),
        call(2, 7, 1, 16, frozenset(range(0, VOCAB, 9))),
        call(3, 25, 8, 9, frozenset(range(0, VOCAB, 5)), longest=1),
        call(4, 1, 1, 1, frozenset()),
        call(5, 1, 300, 6, frozenset(range(40))),
    ]
    while sum(len(c.prompts) * c.group_size for c in some) < 10_000:
        stops = frozenset(
            rng.choice(VOCAB, rng.choice([0, 1, 8, 40, 120, VOCAB]), replace=False).tolist()
        )
        some.append(
            call(
                len(some),
                int(rng.integers(1, 41)),
                int(rng.choice([1, 2, 3, 8, 12, 16])),
                int(rng.integers(1, 25)),
                stops,
            )
        )
    return some


@functools.cache
def model():
    return tiny_model(
        seed=5, num_hidden_layers=1, hidden_size=24, num_attention_heads=2, num_key_value_heads=1
    )


def run(call: Call, cache=None, mine=None, **more) -> list[Rollout]:
    return generate(
        mine or model(),
        call.prompts,
        call.group_size,
        1.0,
        call.new,
        call.stops,
        call.uniforms(),
        cache,
        **more,
    )


def is_whole(call: Call, rollouts: list[Rollout]) -> None:
    assert [(r.prompt, r.group, r.sibling) for r in rollouts] == [
        (p, g, s) for g, p in enumerate(call.prompts) for s in range(call.group_size)
    ]
    for r in rollouts:
        end = next((t for t, i in enumerate(r.ids, 1) if i in call.stops), None)
        assert len(r.ids) == (end or call.new)
        assert r.finished == (end is not None)
        assert len(r.sampler_logp) == len(r.ids)
        assert all(0 <= i < VOCAB for i in r.ids)
    logp = np.array([x for r in rollouts for x in r.sampler_logp])
    assert np.isfinite(logp).all()
    assert (logp <= 0).all()


def live_tensors() -> tuple[int, int]:
    """How many tensors there are, and their bytes."""
    gc.collect()
    found = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return len(found), sum(x.untyped_storage().nbytes() for x in found)


def held(x, seen: set | None = None) -> int:
    """Bytes of the storages that an object's attributes hold, each once."""
    seen = set() if seen is None else seen
    key = x.untyped_storage().data_ptr() if isinstance(x, torch.Tensor) else -id(x)
    if key in seen:
        return 0
    seen.add(key)
    if isinstance(x, torch.Tensor):
        return x.untyped_storage().nbytes()
    inside = (
        x.values()
        if isinstance(x, dict)
        else x
        if isinstance(x, (list, tuple))
        else vars(x).values()
        if hasattr(x, "__dict__")
        else ()
    )
    return sum(held(part, seen) for part in inside)


def slot_bytes(mine=None) -> int:
    c = (mine or model()).config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 4


def test_ten_thousand_rollouts_lose_no_row_and_leave_nothing_behind():
    run(calls()[2])  # what torch makes once is made
    before = live_tensors()
    count = 0
    tokens = 0
    finished = 0
    for call in calls():
        rollouts = run(call)
        is_whole(call, rollouts)
        count = count + len(rollouts)
        tokens = tokens + sum(len(r.ids) for r in rollouts)
        finished = finished + sum(r.finished for r in rollouts)
    del rollouts
    assert live_tensors() == before
    print(f"{len(calls())} calls, {count} rollouts, {tokens} tokens, {finished} ended by a stop id")
    assert count >= 10_000
    assert 0.2 * count < finished < 0.8 * count


def test_a_cache_that_is_kept_holds_no_more_than_the_largest_call_needs():
    """Rows and slots of the largest calls, and the same texts as with a new cache; a second round
    adds nothing.
    """
    cache = make_cache(model())
    some = calls()[:14]
    most_rows, most_slots = (max(x) for x in zip(*(call.slots() for call in some)))
    for call in some:
        kept = run(call, cache)
        assert [(r.ids, r.finished) for r in kept] == [(r.ids, r.finished) for r in run(call)]
    after = held(cache)
    tensors = live_tensors()
    print(
        f"the cache holds {after / (slot_bytes() * most_rows * most_slots):.2f} "
        f"of {most_rows} rows x {most_slots} slots"
    )
    assert 0 < after <= 1.05 * slot_bytes() * most_rows * most_slots
    for call in some:
        kept = run(call, cache)
    assert held(cache) == after
    assert live_tensors() == tensors


@functools.cache
def exact_model(mine):
    return oracle(copy.deepcopy(mine).double())


def parts(mine, call: Call, ours: Rollout, other: Rollout) -> bool:
    """Whether two texts of one sibling differ. They may only where the uniform lies within 1e-5 of
    the sum of probabilities up to the lower of the two ids, by transformers' model in float64.
    """
    if (ours.ids, ours.finished) == (other.ids, other.finished):
        assert np.abs(np.subtract(ours.sampler_logp, other.sampler_logp)).max() < 1e-4
        return False
    at = next(t for t, (a, b) in enumerate(zip(ours.ids, other.ids)) if a != b)
    (place,) = (i for i, p in enumerate(call.prompts) if p.id == ours.prompt.id)
    u = call.uniforms()[place, ours.sibling, at]
    with torch.no_grad():
        logits = exact_model(mine)(
            input_ids=torch.tensor([ours.prompt.ids + ours.ids[:at]])
        ).logits[0, -1]
    cdf = logits.softmax(-1).cumsum(0)[min(ours.ids[at], other.ids[at])].item()
    assert abs(u - cdf) < 1e-5, (
        f"{ours.prompt.id}, sibling {ours.sibling} differs at token {at}, "
        f"where u = {u} is clear of {cdf}"
    )
    return True


def different(mine, call: Call, want: list[Rollout], got: list[Rollout]) -> int:
    theirs = {(r.prompt.id, r.sibling): r for r in want}
    assert got
    assert all((r.prompt.id, r.sibling) in theirs for r in got)
    return sum(parts(mine, call, theirs[r.prompt.id, r.sibling], r) for r in got)


def thinking() -> Call:
    """For the model that answers: siblings that agree for long, and end at their own times."""
    _, prompts = answering()
    return Call(prompts, 16, 20, frozenset([tiny_tokenizer().eos_token_id]), 1)


def cases() -> list[tuple[object, Call]]:
    return [(answering()[0], thinking()), *((model(), call) for call in calls()[2:12])]


def test_a_text_does_not_depend_on_order_or_company():
    rng = np.random.default_rng(1)
    rows = 0
    differ = 0
    for mine, call in cases():
        want = run(call, mine=mine)
        for some in (
            call.prompts[::-1],
            call.prompts[::3],
            [call.prompts[i] for i in rng.permutation(len(call.prompts))],
        ):
            for group_size in {call.group_size, 1 + call.group_size // 2}:
                got = run(call._replace(prompts=some, group_size=group_size), mine=mine)
                rows = rows + len(got)
                differ = differ + different(mine, call, want, got)
    print(f"{differ} of {rows} rows differ, each where |u - cdf| < 1e-5")
    assert differ <= 1e-4 * rows + 2


def test_what_counts_as_different():
    """A text drawn with another uniform is not excused."""
    mine = model()
    call = calls()[2]
    want = run(call)
    with pytest.raises(AssertionError, match="is clear of"):
        different(mine, call, want, run(call._replace(step=77)))


@pytest.mark.skipif(
    "max_cache_tokens" not in inspect.signature(generate).parameters,
    reason="generate() has no budget here",
)
def test_a_text_does_not_depend_on_the_budget():
    """Room for one group, for a little more, for all; the prompts in another order; and no more
    cache than that.
    """
    rng = np.random.default_rng(1)
    rows = 0
    differ = 0
    for mine, call in cases():
        want = run(call, mine=mine)
        one = call.group_size * call.slots()[1]
        for room in (one, int(1.7 * one), 4 * one, len(call.prompts) * one):
            for some in (
                call.prompts,
                [call.prompts[i] for i in rng.permutation(len(call.prompts))],
            ):
                cache = make_cache(mine)
                got = run(call._replace(prompts=some), cache, mine, max_cache_tokens=room)
                is_whole(call._replace(prompts=some), got)
                assert held(cache) <= 1.05 * slot_bytes(mine) * room, (room, call.slots())
                rows = rows + len(got)
                differ = differ + different(mine, call, want, got)
    print(f"{differ} of {rows} rows differ, each where |u - cdf| < 1e-5")
    assert differ <= 1e-4 * rows + 2
