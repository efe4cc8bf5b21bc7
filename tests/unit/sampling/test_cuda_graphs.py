"""Decode steps as CUDA graphs (sampling/cuda_graphs.py) against the eager steps. Without a GPU by a
stand-in that keeps CUDA's rules on the CPU.
"""

import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.tiny_world import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recr1.data_types import Prompt
from recr1.model.varlen_attention import AttentionBackend
from recr1.sampling import cuda_graphs, generate as sampler
from recr1.sampling.cuda_graphs import DecodeGraphs, round_to_rung
from recr1.sampling.generate import generate
from recr1.sampling.kv_cache import KVCache

# one text in thirteen ends at each token: rows thin out, texts end inside a look's tokens
STOPS = frozenset(range(0, 394, 30))


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and not x.is_mkldnn]


def place(x):
    return x.untyped_storage().data_ptr()


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
        self.before = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        assert name not in self.FORBIDDEN, f"{name} in a capture waits for the GPU"
        given = {place(x) for x in tensors((args, kwargs))}
        assert not (
            name.startswith("index") and any(x.dtype == torch.bool for x in tensors((args, kwargs)))
        ), "a mask's size is in the GPU's memory"
        for argument, value in zip(func._schema.arguments, args):
            if (
                argument.alias_info
                and argument.alias_info.is_write
                and place(value) not in {place(x) for x in self.graph.made}
            ):
                self.before.setdefault(place(value), (value, value.untyped_storage().clone()))
        out = func(*args, **kwargs)
        new = [place(x) not in given for x in tensors(out)]
        self.graph.made += [x for x, fresh in zip(tensors(out), new) if fresh]
        self.graph.steps.append((func, args, kwargs, tensors(out), new))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for value, bytes_before in self.before.values():
            value.untyped_storage().copy_(bytes_before)
        self.graph.spoil()


class Graph:
    def __init__(self):
        self.steps = []
        self.made = []
        self.replays = 0

    def replay(self):
        assert self.steps, "replayed before it was captured"
        self.replays += 1
        for func, args, kwargs, outs, new in self.steps:
            for kept, value, fresh in zip(outs, tensors(func(*args, **kwargs)), new):
                if fresh:
                    kept.copy_(value)
        self.spoil()

    def spoil(self):
        """The pool is the next graph's too: nobody may read what is left in it."""
        for x in self.made:
            x.fill_(
                float("nan")
                if x.is_floating_point()
                else True
                if x.dtype == torch.bool
                else 1 << 40
            )


class Stream:
    def __init__(self, device=None):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


@pytest.fixture
def on_cpu(monkeypatch):
    """Graphs on the CPU. Yields the pairs whose step ran without a graph or was captured, in order,
    and each DecodeGraphs with its addresses.
    """
    seen = SimpleNamespace(ran=[], pools=set(), made=[], calls=0)
    main = Stream()

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        seen.pools.add((id(pool), id(stream)))
        assert capture_error_mode == "thread_local"
        assert not graph.steps
        with Capture(graph):
            yield

    step = DecodeGraphs._step
    made = DecodeGraphs.__init__

    def noted(self, *pair):
        seen.ran.append(pair)
        rows, width, _ = pair
        assert self.cache.num_rows <= rows <= self.cache.kv.shape[1]
        assert self.cache.max_len < width <= self.cache.kv.shape[3]
        step(self, *pair)

    def remembered(self, *args):
        made(self, *args)
        seen.calls += 1
        seen.made.append(
            (
                self,
                [
                    place(x)
                    for x in (
                        self.cache.kv,
                        self.cache.lengths,
                        self.ids,
                        self.uniforms,
                        self.logp,
                        self.truncated_mass,
                    )
                ],
            )
        )

    for name, stand_in in dict(
        CUDAGraph=Graph,
        graph=capture,
        Stream=Stream,
        stream=lambda stream: nullcontext(),
        graph_pool_handle=object,
        current_stream=lambda: main,
    ).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(
        cuda_graphs, "GRAPH_SLOT_MULTIPLE", 16
    )  # the tiny texts pass several widths
    monkeypatch.setattr(DecodeGraphs, "_step", noted)
    monkeypatch.setattr(DecodeGraphs, "__init__", remembered)
    monkeypatch.setattr(sampler, "SYNC_EVERY", {"cpu": 8})
    monkeypatch.setattr(sampler, "GRAPH_DEVICES", ("cpu",))
    yield seen
    for self, places in seen.made:
        assert places == [
            place(x)
            for x in (
                self.cache.kv,
                self.cache.lengths,
                self.ids,
                self.uniforms,
                self.logp,
                self.truncated_mass,
            )
        ], "what graphs use has moved"
        assert all(graph is None or graph.replays for graph in self.graphs.values())
        assert self.stream.waited
        assert len(self.stream.waited) == main.waited.count(self.stream)
        assert set(self.stream.waited) == {main}
    assert 0 < len(seen.pools) <= seen.calls
    assert max((seen.ran.count(pair) for pair in set(seen.ran)), default=0) <= 2 * seen.calls, (
        "a pair runs twice: to warm up, to be captured"
    )


def questions(n, longest=30, seed=0):
    random = np.random.default_rng(seed)
    return [
        Prompt(
            f"q{i}", i, "", tuple(random.integers(394, size=random.integers(2, longest)).tolist())
        )
        for i in range(n)
    ]


CASES = {  # prompts, siblings, new tokens, what else
    "siblings": (5, 4, 40, {}),
    "one text": (1, 1, 40, {}),
    "odd number of rows": (13, 1, 21, {}),
    "top_p": (6, 2, 24, dict(top_p=0.8)),
    "late": (16, 2, 30, dict(max_cache_tokens=900)),  # 64 slots a text: 14 at once
    "late, alone": (25, 1, 30, dict(max_cache_tokens=900)),
    "greedy": (14, 1, 40, dict(greedy=True)),
    "greedy, late": (25, 1, 40, dict(greedy=True, max_cache_tokens=1000)),
}


def draw(model, case, cache=None, **more):
    n, group, new, options = CASES[case]
    options = dict(options)
    prompts = questions(n)
    u = None if options.pop("greedy", False) else np.random.default_rng(3).random((n, group, new))
    heard = {}
    done = []
    rollouts = generate(
        model,
        prompts,
        group,
        0.8,
        new,
        STOPS,
        u,
        cache,
        on_token=lambda r, t: heard.setdefault(r, []).append(t),
        on_group_finished=lambda group: done.append([r.ids for r in group]),
        **options,
        **more,
    )
    assert [tuple(heard[r]) for r in range(n * group)] == [r.ids for r in rollouts]
    assert sorted(done) == sorted(
        [r.ids for r in rollouts[i : i + group]] for i in range(0, n * group, group)
    )
    return rollouts


def same(ours, theirs, bound):
    assert [(r.prompt.id, r.sibling, r.ids, r.finished) for r in ours] == [
        (r.prompt.id, r.sibling, r.ids, r.finished) for r in theirs
    ]
    off = [
        abs(a - b)
        for x, y in zip(ours, theirs)
        for a, b in zip((*x.sampler_logp, x.cut), (*y.sampler_logp, y.cut))
    ]
    assert max(off) <= bound, max(off)


def model_of(kind):
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
    model, bound = model_of(request.param)

    def plain(case, **more):
        with monkeypatch.context() as m:
            m.setattr(sampler, "SYNC_EVERY", {"cpu": 1})
            m.setattr(sampler, "GRAPH_DEVICES", ())
            return draw(model, case, **more)

    return model, bound, plain


@pytest.mark.parametrize("case", CASES)
def test_looking_every_eight_tokens_changes_nothing(world, case, monkeypatch):
    model, bound, plain = world
    monkeypatch.setattr(sampler, "SYNC_EVERY", {"cpu": 8})
    ours = draw(model, case)
    same(ours, plain(case), bound)
    assert any(r.finished and len(r.ids) % 8 for r in ours) or len(ours) == 1


@pytest.mark.parametrize("case", CASES)
def test_graphs_change_nothing(world, case, on_cpu):
    model, bound, plain = world
    ours = draw(model, case)
    ran = set(on_cpu.ran)
    replays = sum(g.replays for self, _ in on_cpu.made for g in self.graphs.values() if g)
    same(ours, plain(case), bound)
    # new siblings share a row, and shared rows take the eager step
    assert replays > len(ran) or case == "late"
    assert len({rows for rows, _, _ in ran}) > 1 or len(ours) == 1
    assert len({width for _, width, _ in ran}) > 1


def test_a_cache_of_before_is_used_again(world, on_cpu):
    """The second call captures anew, in the first one's memory where that is enough."""
    model, bound, plain = world
    cache = sampler.make_cache(model)
    for case in ("odd number of rows", "siblings", "odd number of rows"):
        same(draw(model, case, cache), plain(case), bound)
    (first, _), (second, _), (third, _) = on_cpu.made
    assert second.cache is cache
    assert third.cache.kv.shape == second.cache.kv.shape != first.ids.shape
    del on_cpu.made[0]  # its memory grew for the second


def test_rows_that_are_nobodys_change_nothing(on_cpu):
    """Whatever stands in the cache's other rows, the live ones' tokens stay, and a row that enters
    finds its own.
    """
    model, (a, b) = tiny_model(seed=4).double(), questions(2)
    with torch.no_grad():
        runs = []
        for spoil in (False, True):
            cache = sampler.make_cache(model)
            cache.reset(9, 64, reserve=True)
            graphs = DecodeGraphs(
                model,
                cache,
                lambda hidden, uniforms: sampler.sample_from_hidden(
                    hidden, model.head_weight, 1.0, sampler.make_distribution, uniforms
                ),
            )
            if spoil:
                cache.lengths[1:] = torch.arange(0, 4000, 500)
                cache.kv[:, 1:] = 1e3
            u = torch.from_numpy(np.random.default_rng(0).random((30, 2, 1)))
            tokens = sampler.sample_from_hidden(
                sampler.prefill(model, [a], cache),
                model.head_weight,
                1.0,
                sampler.make_distribution,
                u[0, :1],
            )[0][:, 0]
            seen = []
            for t in range(1, 12):
                ids, logp, _ = graphs(tokens, u[t, :1])
                tokens = ids[:, 0]
                seen += [ids[0].item(), logp[0].item()]
            tokens = torch.cat([tokens, torch.tensor([7])])
            sampler.prefill(model, [b], cache)
            for t in range(12, 30):
                ids, logp, _ = graphs(tokens, u[t])
                tokens = ids[:, 0]
                seen += ids[:, 0].tolist() + logp[:, 0].tolist()
            runs.append(seen)
            assert cache.lengths[:2].tolist() == [
                len(a.ids) + 29,
                len(b.ids) + 18,
            ]
            assert cache.max_len == max(cache.lengths[:2].tolist())
    assert runs[0] == runs[1]
    assert {rows for rows, _, _ in on_cpu.ran} == {8}


def test_the_ladder():
    assert [
        round_to_rung(n, 500)
        for n in (1, 8, 9, 12, 13, 16, 17, 24, 25, 33, 48, 49, 193, 256, 257, 384, 385)
    ] == [8, 8, 12, 12, 16, 16, 24, 24, 32, 48, 48, 64, 256, 256, 384, 384, 500]
    assert all(
        n <= round_to_rung(n, most) <= max(8, 1.5 * n) and round_to_rung(n, most) <= most
        for most in (1, 7, 9, 100, 384)
        for n in range(1, most + 1)
    )
    assert len({round_to_rung(n, 384) for n in range(1, 385)}) == 12  # what the docstring counts


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x + torch.tensor([1.0]),
        lambda x: x.nonzero(),
        lambda x: bool((x > 0).any()),
        lambda x: x.unique(),
    ],
)
def test_the_stand_in_refuses_what_cuda_would(forbidden):
    with pytest.raises(AssertionError):
        with Capture(Graph()):
            forbidden(torch.ones(3))


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
    reserve = KVCache._reserve
    want = draw(model, "greedy")

    def moving(self, rows, room):
        reserve(self, rows, room)
        self.kv = self.kv.clone()

    monkeypatch.setattr(KVCache, "_reserve", moving)
    got = draw(model, "greedy")
    assert [r.ids for r in got] != [r.ids for r in want]
    on_cpu.made.clear()


def test_nothing_of_the_graphs_is_left(on_cpu):
    draw(tiny_model(seed=4), "siblings")
    graphs = weakref.ref(on_cpu.made.pop()[0])
    assert graphs() is None, (
        "a circle of references keeps the graphs, and their memory, until the collector comes"
    )


def test_the_cpu_keeps_its_growing_cache_and_has_no_graphs():
    model = tiny_model(seed=4)
    cache = sampler.make_cache(tiny_model(seed=4))
    assert cuda_graphs.GRAPH_DEVICES == ("cuda",)
    assert sampler.SYNC_EVERY["cpu"] == 1
    draw(model, "one text", cache)
    cache.reset(1000, 1024)
    assert cache.kv.shape[1] < 1000
    cache.reset(1000, 1024, reserve=True)
    assert cache.kv.shape[1] == 1000
    assert cache.kv.shape[3] == 1024


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: no CUDA graph was captured")


@gpu
@pytest.mark.parametrize(
    "kernels, dtype, bound",
    [
        ("torch", torch.float64, 1e-11),
        ("torch", torch.float32, 1e-4),
        ("triton", torch.float32, 1e-4),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_graphs_change_nothing(case, kernels, dtype, bound, monkeypatch):
    model = tiny_model(seed=4).to("cuda", dtype)
    monkeypatch.setattr(cuda_graphs, "GRAPH_SLOT_MULTIPLE", 16)
    ours = draw(model, case, kernels=kernels)
    monkeypatch.setattr(sampler, "GRAPH_DEVICES", ())
    monkeypatch.setattr(sampler, "SYNC_EVERY", {"cuda": 1})
    same(ours, draw(model, case, kernels=kernels), bound)


@gpu
def test_on_a_gpu_nothing_of_the_graphs_is_left():
    model = tiny_model(seed=4).to("cuda")
    draw(model, "siblings")
    before = torch.cuda.memory_allocated()
    draw(model, "siblings")
    assert torch.cuda.memory_allocated() == before


@gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_on_a_gpu_a_replayed_step_waits_for_nothing(kernels, monkeypatch):
    """In bfloat16; every step but a pair's first two, under torch's own check for synchronising
    calls.
    """
    model = tiny_model(seed=4).to("cuda", torch.bfloat16)
    step = DecodeGraphs.__call__
    checked = []

    def quiet(self, *inputs):
        known = (
            self.graphs.get(self.choose_graph(len(inputs[0]), inputs[1] is not None)) is not None
        )
        torch.cuda.set_sync_debug_mode("error" if known else "default")
        try:
            return step(self, *inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            checked.append(known)

    monkeypatch.setattr(DecodeGraphs, "__call__", quiet)
    rollouts = draw(
        model, "greedy" if kernels == "torch" else "odd number of rows", kernels=kernels
    )
    assert sum(checked) > 8
    assert all(np.isfinite(r.sampler_logp).all() for r in rollouts)
