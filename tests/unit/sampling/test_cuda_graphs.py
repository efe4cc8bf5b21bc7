"""Decode steps as CUDA graphs (sampling/cuda_graphs.py) against the eager steps. Without a GPU by a
stand-in that keeps CUDA's rules on the CPU.
"""

import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from typing import Any, Callable, NamedTuple

import numpy as np
import pytest
import torch
from helpers.tiny_world import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recr1.data_types import Prompt
from recr1.evaluation.evaluate import generate_greedily
from recr1.model.varlen_attention import AttentionBackend
from recr1.sampling import cuda_graphs, generate as sampler
from recr1.sampling.cuda_graphs import DecodeGraphs, round_to_rung
from recr1.sampling.generate import generate
from recr1.sampling.kv_cache import KVCache
from recr1.sampling.sequences import SampledSteps, SequenceBatch, stack_to_host

# one text in thirteen ends at each token: rows thin out, texts end inside a look's tokens
STOPS = frozenset(range(0, 394, 30))


def list_tensors(tree):
    """List the tensors in a tree of arguments or results."""
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and not x.is_mkldnn]


def get_address(x):
    """Return where a tensor's memory begins: views share it."""
    return x.untyped_storage().data_ptr()


class Operation(NamedTuple):
    """An operation that was captured."""

    func: Callable
    args: tuple
    kwargs: dict
    outputs: list[torch.Tensor]
    is_new: list[bool]  # whether the output has memory of its own


class Capture(TorchDispatchMode):
    """A capture as CUDA makes it: each operation is noted with the very tensors it was given, none
    takes effect, and what waits for the device, or reads the host's memory, is an error.
    """

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "lift_fresh",
        "_unique2",
        "unique_dim",
        "equal",
        "is_nonzero",
    )

    def __init__(self, graph):
        super().__init__()
        self.graph = graph
        self.overwritten = {}  # address: a tensor there, and the bytes it had

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = list_tensors((args, kwargs))
        self.refuse_waiting(func, inputs)
        self.save_overwritten(func, args)
        input_addresses = {get_address(x) for x in inputs}

        result = func(*args, **kwargs)

        outputs = list_tensors(result)
        is_new = [get_address(x) not in input_addresses for x in outputs]
        for output, new in zip(outputs, is_new):
            if new:
                self.graph.created.append(output)
        self.graph.operations.append(Operation(func, args, kwargs, outputs, is_new))
        return result

    def refuse_waiting(self, func, inputs):
        """Refuse an operation that cannot be captured."""
        name = func._schema.name.split("::")[1]
        assert name not in self.FORBIDDEN, f"{name} in a capture waits for the GPU"
        if name.startswith("index"):
            has_mask = any(x.dtype == torch.bool for x in inputs)
            assert not has_mask, "a mask's size is in the GPU's memory"

    def save_overwritten(self, func, args):
        """Save the bytes that the operation will write into, unless the capture created them."""
        created = {get_address(x) for x in self.graph.created}
        for argument, value in zip(func._schema.arguments, args):
            if not argument.alias_info or not argument.alias_info.is_write:
                continue
            address = get_address(value)
            if address in created or address in self.overwritten:
                continue
            saved = value.untyped_storage().clone()
            self.overwritten[address] = (value, saved)

    def __exit__(self, *error):
        super().__exit__(*error)
        for value, saved in self.overwritten.values():
            value.untyped_storage().copy_(saved)
        self.graph.spoil()


def choose_garbage(dtype):
    """Choose a value that no result can survive."""
    if dtype.is_floating_point:
        return float("nan")
    if dtype == torch.bool:
        return True
    return 1 << 40


class Graph:
    def __init__(self):
        self.operations = []
        self.created = []
        self.replays = 0

    def replay(self):
        assert self.operations, "replayed before it was captured"
        self.replays += 1
        for operation in self.operations:
            result = operation.func(*operation.args, **operation.kwargs)
            values = list_tensors(result)
            for output, value, new in zip(operation.outputs, values, operation.is_new):
                if new:
                    output.copy_(value)
        self.spoil()

    def spoil(self):
        """The pool is the next graph's too: nobody may read what is left in it."""
        for x in self.created:
            x.fill_(choose_garbage(x.dtype))


class Stream:
    def __init__(self, device=None):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


class GraphLog:
    """What happened while graphs ran on the CPU."""

    def __init__(self):
        self.keys = []  # of the steps that ran without a graph or were captured, in order
        self.pools = set()
        self.graphs = []  # each DecodeGraphs with its addresses
        self.calls = 0
        self.main_stream = Stream()


def list_addresses(graphs):
    """List the addresses that must stay where they are."""
    fixed = (
        graphs.cache.kv,
        graphs.cache.lengths,
        graphs.ids,
        graphs.uniforms,
        graphs.logp,
        graphs.truncated_mass,
    )
    return [get_address(x) for x in fixed]


def replace_cuda(monkeypatch, log):
    """Put the stand-ins in the place of torch.cuda's graphs and streams."""

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        log.pools.add((id(pool), id(stream)))
        assert capture_error_mode == "thread_local"
        assert not graph.operations
        with Capture(graph):
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: log.main_stream)
    cuda_graphs.get_graph_stream.cache_clear()


def watch_graphs(monkeypatch, log):
    """Let every DecodeGraphs, and every step that it runs or captures, write into the log."""
    run_step = DecodeGraphs._step
    initialize = DecodeGraphs.__init__

    def log_step(self, *key):
        log.keys.append(key)
        rows, width, _ = key
        _, max_rows, _, max_width, _ = self.cache.kv.shape
        assert self.cache.num_rows <= rows <= max_rows
        assert self.cache.max_len < width <= max_width
        run_step(self, *key)

    def log_graphs(self, *args):
        initialize(self, *args)
        log.calls += 1
        addresses = list_addresses(self)
        log.graphs.append((self, addresses))

    monkeypatch.setattr(DecodeGraphs, "_step", log_step)
    monkeypatch.setattr(DecodeGraphs, "__init__", log_graphs)


def check_log(log):
    """Check that CUDA's rules were kept."""
    for graphs, addresses in log.graphs:
        assert addresses == list_addresses(graphs), "what graphs use has moved"
        for graph in graphs.graphs.values():
            assert graph is None or graph.replays
        waited = graphs.stream.waited
        assert waited
        assert len(waited) == log.main_stream.waited.count(graphs.stream)
        assert set(waited) == {log.main_stream}
    assert 0 < len(log.pools) <= log.calls
    assert len({stream for _, stream in log.pools}) == 1, "one stream for all calls"
    most_steps = max(Counter(log.keys).values(), default=0)
    assert most_steps <= 2 * log.calls, "a pair runs twice: to warm up, to be captured"


@pytest.fixture
def on_cpu(monkeypatch):
    """Graphs on the CPU. Yields the log of what they do; CUDA's rules are checked at the end."""
    log = GraphLog()
    replace_cuda(monkeypatch, log)
    watch_graphs(monkeypatch, log)
    # the tiny texts pass several widths
    monkeypatch.setattr(cuda_graphs, "GRAPH_SLOT_MULTIPLE", 16)
    monkeypatch.setattr(sampler, "SYNC_EVERY", {"cpu": 8})
    monkeypatch.setattr(sampler, "GRAPH_DEVICES", ("cpu",))
    yield log
    check_log(log)
    cuda_graphs.get_graph_stream.cache_clear()


class Case(NamedTuple):
    prompts: int
    siblings: int
    new_tokens: int
    options: dict[str, Any] = {}
    greedy: bool = False


CASES = {
    "siblings": Case(5, 4, 40),
    "one text": Case(1, 1, 40),
    "odd number of rows": Case(13, 1, 21),
    "top_p": Case(6, 2, 24, dict(top_p=0.8)),
    "late": Case(16, 2, 30, dict(max_cache_tokens=900)),  # 64 slots a text: 14 at once
    "late, alone": Case(25, 1, 30, dict(max_cache_tokens=900)),
    "greedy": Case(14, 1, 40, greedy=True),
    "greedy, late": Case(25, 1, 40, dict(max_cache_tokens=1000), greedy=True),
}


def draw_prompts(n):
    """Draw n prompts of 2 to 29 ids."""
    random = np.random.default_rng(0)
    prompts = []
    for i in range(n):
        length = random.integers(2, 30)
        ids = random.integers(394, size=length)
        prompts.append(Prompt(f"q{i}", i, "", tuple(ids.tolist())))
    return prompts


def draw(model, case, cache=None, listen=False, temperature=0.8, **more):
    """Generate the texts of a case, and check that the callbacks heard the same texts.

    listen: hear the tokens too, one by one.
    """
    n, group_size, new_tokens, options, greedy = CASES[case]
    prompts = draw_prompts(n)
    uniforms = None
    if not greedy:
        random = np.random.default_rng(3)
        uniforms = random.random((n, group_size, new_tokens))
    streamed = {}
    finished_groups = []

    def record_token(row, token):
        streamed.setdefault(row, []).append(token)

    def record_group(group):
        finished_groups.append([r.ids for r in group])

    rollouts = generate(
        model,
        prompts,
        group_size,
        temperature,
        new_tokens,
        STOPS,
        uniforms,
        cache,
        on_token=record_token if listen else None,
        on_group_finished=record_group,
        **options,
        **more,
    )

    ids = [r.ids for r in rollouts]
    groups = [ids[start : start + group_size] for start in range(0, len(ids), group_size)]
    if listen:
        assert [tuple(streamed[row]) for row in range(n * group_size)] == ids
    assert sorted(finished_groups) == sorted(groups)
    return rollouts


def list_texts(rollouts):
    """List what was written: prompt, sibling, ids, finished."""
    return [(r.prompt.id, r.sibling, r.ids, r.finished) for r in rollouts]


def assert_same(ours, theirs, bound):
    """Compare texts, log-probs and cut mass."""
    assert list_texts(ours) == list_texts(theirs)
    for a, b in zip(ours, theirs):
        difference = np.subtract(a.sampler_logp, b.sampler_logp)
        assert np.abs(difference).max() <= bound
        assert abs(a.cut - b.cut) <= bound


def make_model(kind):
    """Make a model, and say how far its log-probs may lie apart."""
    model = tiny_model(seed=4)
    if kind == "batch_invariant":
        model.backend = AttentionBackend(exact=True)
        return model, 0
    return model.double(), 1e-11


@pytest.fixture(params=["float64", "batch_invariant"])
def world(request, monkeypatch):
    """A model, how far log-probs may lie apart, and the texts of the plain way: eager, every token
    looked at.
    """
    model, bound = make_model(request.param)

    def draw_eagerly(case, **more):
        with monkeypatch.context() as patch:
            patch.setattr(sampler, "SYNC_EVERY", {"cpu": 1})
            patch.setattr(sampler, "GRAPH_DEVICES", ())
            return draw(model, case, listen=True, **more)

    return model, bound, draw_eagerly


@pytest.mark.parametrize("case", CASES)
def test_looking_every_eight_tokens_changes_nothing(world, case, monkeypatch):
    model, bound, draw_eagerly = world
    monkeypatch.setattr(sampler, "SYNC_EVERY", {"cpu": 8})

    ours = draw(model, case)
    theirs = draw_eagerly(case)

    assert_same(ours, theirs, bound)
    if len(ours) > 1:
        assert any(r.finished and len(r.ids) % 8 for r in ours)


def count_replays(log):
    """Count the replays of all graphs."""
    replays = 0
    for graphs, _ in log.graphs:
        for graph in graphs.graphs.values():
            if graph is not None:
                replays += graph.replays
    return replays


@pytest.mark.parametrize("case", CASES)
def test_graphs_change_nothing(world, case, on_cpu):
    model, bound, draw_eagerly = world

    ours = draw(model, case)
    keys = set(on_cpu.keys)
    replays = count_replays(on_cpu)
    theirs = draw_eagerly(case)

    assert_same(ours, theirs, bound)
    # siblings that enter share a row, and shared rows take the eager step
    if case != "late":
        assert replays > len(keys)
    numbers_of_rows = {rows for rows, _, _ in keys}
    widths = {width for _, width, _ in keys}
    if len(ours) > 1:
        assert len(numbers_of_rows) > 1
    assert len(widths) > 1


def test_siblings_that_agree_do_not_keep_graphs_away(world, on_cpu, monkeypatch):
    """At a temperature at which siblings choose the same, all steps but the first are graphs."""
    model, bound, draw_eagerly = world
    eager_steps = []
    eager_step = sampler.Sampler._step

    def log_eager_step(self, *arguments):
        eager_steps.append(self.cache.num_rows)
        return eager_step(self, *arguments)

    monkeypatch.setattr(sampler.Sampler, "_step", log_eager_step)
    monkeypatch.setitem(CASES, "agreeing", Case(4, 6, 60))
    ours = draw(model, "agreeing", temperature=1e-4)
    graph_steps = count_replays(on_cpu) + len(set(on_cpu.keys))  # a pair's first step warms up
    assert len(eager_steps) == 1, "only the step in which prompts enter"
    theirs = draw_eagerly("agreeing", temperature=1e-4)

    assert_same(ours, theirs, bound * 10_000)
    assert len({r.ids for r in ours}) == 4
    assert graph_steps >= 10


def fork(share_rows, model, chosen):
    """Prefill two prompts with three siblings each, append the chosen tokens (steps, 6), and fork
    after each. Return the batch, its cache and the forks' tokens.
    """
    cache = sampler.make_cache(model)
    batch = SequenceBatch(draw_prompts(2), 3, 8, frozenset([9]), 394, share_rows)
    cache.reset(6, 64)
    new_prompts = batch.admit(6)
    with torch.no_grad():
        sampler.prefill(model, new_prompts, cache)
        for token_ids in chosen:
            batch.uniforms_until_next_sync(None, 1, torch.device("cpu"))
            by_sequence = np.array(token_ids)[batch.running]
            ids = np.zeros((1, batch.num_rows, 3), np.int64)
            ids[0, batch.row, batch.index_in_row] = by_sequence
            logp = np.zeros(ids.shape)
            batch.append_tokens(SampledSteps(ids, logp, logp[..., 0]), None)
            tokens = batch.fork_rows(cache)
    return batch, cache, tokens


def test_a_row_forks_by_token_or_by_text():
    """Two prompts of three siblings: first 5 5 7 and 5 5 5, in which sequence 5 then ends."""
    model = tiny_model(seed=4)
    chosen = [[5, 5, 7, 5, 5, 9]]

    shared, shared_cache, shared_tokens = fork(True, model, chosen)
    alone, alone_cache, alone_tokens = fork(False, model, chosen)

    assert shared.num_rows == 3
    assert alone.num_rows == 5
    assert not alone.has_shared_rows
    assert sorted(shared.running) == sorted(alone.running) == [0, 1, 2, 3, 4]
    assert len(set(alone.row)) == 5
    for batch, cache, tokens in (
        (shared, shared_cache, shared_tokens),
        (alone, alone_cache, alone_tokens),
    ):
        assert cache.host_lengths.tolist() == cache.lengths[: cache.num_rows].tolist()
        for sequence, row in zip(batch.running, batch.row):
            prompt = batch.prompts[sequence // 3]
            assert tokens[row] == chosen[0][sequence]
            assert cache.host_lengths[row] == len(prompt.ids)
            # what the row holds is its prompt's keys and values, wherever it was copied from
            length = len(prompt.ids)
            original = shared_cache.kv[:, shared.row[list(shared.running).index(sequence)]]
            assert torch.equal(cache.kv[:, row, :, :length], original[:, :, :length])


def test_the_host_knows_the_lengths(world, on_cpu, monkeypatch):
    """What it counts is what the device counts, after prefill, steps, graphs and forks."""
    model, _, _ = world
    reorder = KVCache.reorder

    def check_and_reorder(self, parents):
        rows = reorder(self, parents)
        assert self.host_lengths.tolist() == self.lengths[: self.num_rows].tolist()
        return rows

    monkeypatch.setattr(KVCache, "reorder", check_and_reorder)
    draw(model, "late")


def test_choices_travel_to_the_host_as_they_are():
    ids = torch.tensor([[0, 151_935], [2**31 - 1, 7]])
    logp = torch.tensor([[-1e-7, -3.1], [-88.2, -torch.inf]])
    mass = torch.tensor([0.1, 1e-9])

    sampled = stack_to_host([(ids, logp, mass), (ids + 1, logp.double() / 3, mass)])

    assert np.array_equal(sampled.ids, torch.stack([ids, ids + 1]).numpy())
    assert np.array_equal(sampled.logp, torch.stack([logp.double(), logp.double() / 3]).numpy())
    assert np.array_equal(sampled.truncated_mass, torch.stack([mass, mass]).double().numpy())
    assert sampled.ids.dtype == np.int64


def test_who_listens_hears_every_token_as_it_is_chosen(world, monkeypatch):
    """Also where the host looks every eight tokens at texts that nobody listens to."""
    model, bound, draw_eagerly = world
    monkeypatch.setattr(sampler, "SYNC_EVERY", {"cpu": 8})
    looks = []
    stack = sampler.stack_to_host

    def log_look(steps):
        looks.append(len(steps))
        return stack(steps)

    monkeypatch.setattr(sampler, "stack_to_host", log_look)
    ours = draw(model, "greedy", listen=True)
    assert set(looks) == {1}
    looks.clear()
    draw(model, "greedy")

    assert 8 in looks
    theirs = draw_eagerly("greedy")
    assert_same(ours, theirs, bound)


def test_an_evaluation_keeps_its_graphs(world, on_cpu, monkeypatch):
    """Chunks of one size are decoded by the graphs of the first, with the texts of eager steps;
    a longer prompt, for which the cache must grow, has new ones made.
    """
    model, _, _ = world
    lengths = [20, 12, 9, 17, 20, 6, 28, 20]
    prompts = []
    for i, length in enumerate(lengths):
        ids = np.random.default_rng(i).integers(394, size=length)
        prompts.append(Prompt(f"q{i}", i, "", tuple(ids.tolist())))

    ours = generate_greedily(model, prompts, STOPS, 24, prompts_at_once=2)
    captures = [key for key, count in Counter(on_cpu.keys).items() if count == 2]
    calls = on_cpu.calls
    del on_cpu.graphs[0]  # its memory grew for the longer prompt
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "SYNC_EVERY", {"cpu": 1})
        patch.setattr(sampler, "GRAPH_DEVICES", ())
        theirs = generate_greedily(model, prompts, STOPS, 24, prompts_at_once=2)

    assert list_texts(ours) == list_texts(theirs)
    assert calls == 2
    assert captures


def test_a_cache_of_before_is_used_again(world, on_cpu):
    """The second call captures anew, in the first one's memory where that is enough."""
    model, bound, draw_eagerly = world
    cache = sampler.make_cache(model)

    for case in ("odd number of rows", "siblings", "odd number of rows"):
        ours = draw(model, case, cache)
        theirs = draw_eagerly(case)
        assert_same(ours, theirs, bound)

    first, second, third = [graphs for graphs, _ in on_cpu.graphs]
    assert second.cache is cache
    assert third.cache is cache
    assert len(first.ids) < len(second.ids)
    assert len(third.ids) == len(second.ids)
    del on_cpu.graphs[0]  # its memory grew for the second


@torch.no_grad()
def decode_two_texts(model, first, second, spoil):
    """Decode a text for eleven steps, then for eighteen beside another one that enters.

    spoil: garbage stands in the cache's rows that are nobody's. Returns ids and log-probs.
    """
    cache = sampler.make_cache(model)
    cache.reset(9, 64, reserve=True)
    random = np.random.default_rng(0)
    u = torch.from_numpy(random.random((30, 2, 1)))
    sampled = []

    def sample_tokens(hidden, uniforms):
        return sampler.sample_from_hidden(
            hidden, model.head_weight, 1.0, sampler.make_distribution, uniforms
        )

    graphs = DecodeGraphs(model, cache, sample_tokens)

    def step(tokens, uniforms):
        ids, logp, _ = graphs(tokens, uniforms)
        sampled.extend(ids[:, 0].tolist())
        sampled.extend(logp[:, 0].tolist())
        return ids[:, 0]

    if spoil:
        cache.lengths[1:] = torch.arange(0, 4000, 500)
        cache.kv[:, 1:] = 1e3
    hidden = sampler.prefill(model, [first], cache)
    ids, *_ = sample_tokens(hidden, u[0, :1])
    tokens = ids[:, 0]
    for t in range(1, 12):
        tokens = step(tokens, u[t, :1])
    tokens = torch.cat([tokens, torch.tensor([7])])
    sampler.prefill(model, [second], cache)
    for t in range(12, 30):
        tokens = step(tokens, u[t])

    want_lengths = [len(first.ids) + 29, len(second.ids) + 18]
    assert cache.lengths[:2].tolist() == want_lengths
    assert cache.max_len == max(want_lengths)
    return sampled


def test_rows_that_are_nobodys_change_nothing(on_cpu):
    """Whatever stands in the cache's other rows, the live ones' tokens stay, and a row that enters
    finds its own.
    """
    model = tiny_model(seed=4).double()
    first, second = draw_prompts(2)

    clean = decode_two_texts(model, first, second, spoil=False)
    spoiled = decode_two_texts(model, first, second, spoil=True)

    assert clean == spoiled
    numbers_of_rows = {rows for rows, _, _ in on_cpu.keys}
    assert numbers_of_rows == {8}


# rows, their rung of at most 500
RUNGS = [
    (1, 8),
    (8, 8),
    (9, 12),
    (12, 12),
    (13, 16),
    (16, 16),
    (17, 24),
    (24, 24),
    (25, 32),
    (33, 48),
    (48, 48),
    (49, 64),
    (193, 256),
    (256, 256),
    (257, 384),
    (384, 384),
    (385, 500),
]


def test_the_ladder():
    for rows, want in RUNGS:
        assert round_to_rung(rows, 500) == want

    for max_rows in (1, 7, 9, 100, 384):
        for rows in range(1, max_rows + 1):
            rung = round_to_rung(rows, max_rows)
            assert rows <= rung
            assert rung <= max(8, 1.5 * rows)
            assert rung <= max_rows

    rungs = {round_to_rung(rows, 384) for rows in range(1, 385)}
    assert len(rungs) == 12  # what the docstring counts


def read_item(x):
    return x.sum().item()


def index_by_mask(x):
    return x[x > 0]


def add_from_host(x):
    return x + torch.tensor([1.0])


def list_nonzero(x):
    return x.nonzero()


def read_condition(x):
    return bool((x > 0).any())


def list_unique(x):
    return x.unique()


FORBIDDEN = [
    read_item,
    index_by_mask,
    add_from_host,
    list_nonzero,
    read_condition,
    list_unique,
]


@pytest.mark.parametrize("forbidden", FORBIDDEN)
def test_the_stand_in_refuses_what_cuda_would(forbidden):
    x = torch.ones(3)

    with pytest.raises(AssertionError):
        with Capture(Graph()):
            forbidden(x)


def test_the_stand_in_captures_without_effect_and_replays_into_the_same_memory():
    graph = Graph()
    x = torch.arange(3.0)
    y = torch.zeros(3)

    with Capture(graph):
        z = x * 2
        y[:2] += z[1:]

    assert y.tolist() == [0, 0, 0]
    assert z.isnan().all()
    x += 1
    for times in (1, 2):
        graph.replay()
        assert y.tolist() == [4 * times, 6 * times, 0]
        assert z.isnan().all()


def test_a_cache_that_moves_is_noticed(on_cpu, monkeypatch):
    """The stand-in is no rubber stamp: graphs over a cache that moves write other texts."""
    model = tiny_model(seed=4).double()
    want = draw(model, "greedy")
    reserve = KVCache._reserve

    def reserve_and_move(self, rows, room):
        reserve(self, rows, room)
        self.kv = self.kv.clone()

    monkeypatch.setattr(KVCache, "_reserve", reserve_and_move)
    rollouts = draw(model, "greedy")

    ids = [r.ids for r in rollouts]
    want_ids = [r.ids for r in want]
    assert ids != want_ids
    on_cpu.graphs.clear()


def test_nothing_of_the_graphs_is_left(on_cpu):
    model = tiny_model(seed=4)
    draw(model, "siblings")

    graphs, _ = on_cpu.graphs.pop()
    reference = weakref.ref(graphs)
    del graphs

    assert reference() is None, (
        "a circle of references keeps the graphs, and their memory, until the collector comes"
    )


def test_the_cpu_keeps_its_growing_cache_and_has_no_graphs():
    model = tiny_model(seed=4)
    cache = sampler.make_cache(model)
    assert cuda_graphs.GRAPH_DEVICES == ("cuda",)
    assert sampler.SYNC_EVERY["cpu"] == 1
    draw(model, "one text", cache)

    cache.reset(1000, 1024)
    assert cache.kv.shape[1] < 1000

    cache.reset(1000, 1024, reserve=True)
    assert cache.kv.shape[1] == 1000
    assert cache.kv.shape[3] == 1024


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: no CUDA graph was captured"
)
# kernels, dtype, how far log-probs may lie apart
GPU_WAYS = [
    ("torch", torch.float64, 1e-11),
    ("torch", torch.float32, 1e-4),
    ("triton", torch.float32, 1e-4),
]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kernels, dtype, bound", GPU_WAYS)
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_graphs_change_nothing(case, kernels, dtype, bound, monkeypatch):
    model = tiny_model(seed=4).to("cuda", dtype)
    monkeypatch.setattr(cuda_graphs, "GRAPH_SLOT_MULTIPLE", 16)

    ours = draw(model, case, kernels=kernels)
    monkeypatch.setattr(sampler, "GRAPH_DEVICES", ())
    monkeypatch.setattr(sampler, "SYNC_EVERY", {"cuda": 1})
    theirs = draw(model, case, kernels=kernels)

    assert_same(ours, theirs, bound)


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_nothing_of_the_graphs_is_left():
    model = tiny_model(seed=4).to("cuda")
    draw(model, "siblings")
    before = torch.cuda.memory_allocated()

    draw(model, "siblings")

    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_on_a_gpu_a_replayed_step_waits_for_nothing(kernels, monkeypatch):
    """In bfloat16; every step but a pair's first two, under torch's own check for synchronising
    calls.
    """
    model = tiny_model(seed=4).to("cuda", torch.bfloat16)
    case = "greedy" if kernels == "torch" else "odd number of rows"
    run_step = DecodeGraphs.__call__
    checked = []

    def check_waiting(self, ids, uniforms):
        key = self.choose_graph(len(ids), uniforms is not None)
        is_captured = self.graphs.get(key) is not None
        torch.cuda.set_sync_debug_mode("error" if is_captured else "default")
        try:
            return run_step(self, ids, uniforms)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            checked.append(is_captured)

    monkeypatch.setattr(DecodeGraphs, "__call__", check_waiting)
    rollouts = draw(model, case, kernels=kernels)

    assert sum(checked) > 8
    for rollout in rollouts:
        assert np.isfinite(rollout.sampler_logp).all()
