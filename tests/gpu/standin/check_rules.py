"""The stand-in itself: does it keep CUDA's rules? Each rule is one that CUDA's or torch's
documentation states, and has a program that breaks it.
"""

import pytest
import torch
from gpu.standin.activity import HostWait
from gpu.standin.dispatch import DeviceMismatch
from gpu.standin.graphs import GraphError

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def activity(gpu_activity):
    return gpu_activity


def draw(*shape, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(GPU).to(**options)


# --- Numbers and devices --------------------------------------------------------------------------


def test_results_and_gradients_are_those_of_the_cpu():
    x = draw(5, 3).requires_grad_()
    y = draw(3, 4, seed=1).requires_grad_()

    loss = (x @ y).softmax(-1)[:, 1:3].log().sum()
    loss.backward()

    cpu_x = x.detach().cpu().requires_grad_()
    cpu_y = y.detach().cpu().requires_grad_()
    cpu_loss = (cpu_x @ cpu_y).softmax(-1)[:, 1:3].log().sum()
    cpu_loss.backward()
    assert loss.device == x.grad.device == GPU
    assert torch.equal(loss.cpu(), cpu_loss)
    assert torch.equal(x.grad.cpu(), cpu_x.grad)
    assert torch.equal(y.grad.cpu(), cpu_y.grad)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
def test_varlen_attention_is_sdpa_in_each_sequence(heads, kv_heads):
    """As many keys as queries, and more; a completion's last query reads all keys."""
    from torch.nn.attention.varlen import varlen_attn

    q_ends = [0, 3, 7, 8]
    k_ends = [0, 3, 12, 14]
    q = draw(8, heads, 16, dtype=torch.bfloat16).requires_grad_()
    k = draw(14, kv_heads, 16, dtype=torch.bfloat16, seed=1).requires_grad_()
    v = draw(14, kv_heads, 16, dtype=torch.bfloat16, seed=2).requires_grad_()
    toward = draw(8, heads, 16, dtype=torch.bfloat16, seed=3)
    cu_q = torch.tensor(q_ends, dtype=torch.int32, device=GPU)
    cu_k = torch.tensor(k_ends, dtype=torch.int32, device=GPU)

    out = varlen_attn(q, k, v, cu_q, cu_k, 4, 9, window_size=(-1, 0), enable_gqa=True)
    grads = torch.autograd.grad(out, (q, k, v), toward)

    inputs = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    want = attend_by_sdpa(*inputs, q_ends, k_ends)
    want_grads = torch.autograd.grad(want, inputs, toward.cpu().double())
    for ours, theirs in zip((out, *grads), (want, *want_grads)):
        difference = ours.cpu().double() - theirs
        assert difference.norm() <= 8e-3 * theirs.norm()  # bfloat16 has 8 bits


def attend_by_sdpa(q, k, v, q_ends, k_ends):
    pieces = []
    for i in range(len(q_ends) - 1):
        piece_q = q[q_ends[i] : q_ends[i + 1]].transpose(0, 1)
        piece_k = k[k_ends[i] : k_ends[i + 1]].transpose(0, 1)
        piece_v = v[k_ends[i] : k_ends[i + 1]].transpose(0, 1)
        T = piece_q.shape[1]
        S = piece_k.shape[1]
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        attended = torch.nn.functional.scaled_dot_product_attention(
            piece_q, piece_k, piece_v, attn_mask=mask, enable_gqa=True
        )
        pieces.append(attended.transpose(0, 1))
    return torch.cat(pieces)


def test_operands_on_two_devices_are_refused():
    with pytest.raises(DeviceMismatch, match="on the CPU"):
        draw(3) + torch.ones(3)
    with pytest.raises(DeviceMismatch, match="on the CPU"):
        draw(3).index_select(0, torch.tensor([1]))


def test_a_number_on_the_host_is_taken_and_listed(activity):
    draw(3) + torch.tensor(1.0)

    [(_, operation)] = activity.host_numbers
    assert operation == "add"


# --- Waits of the host ----------------------------------------------------------------------------

WAITS = {
    "item": (lambda x: x.sum().item(), "_local_scalar_dense"),
    "condition": (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "unique": (lambda x: x.unique(), "_unique2"),
    "read by a mask": (lambda x: x[x > 0], "index by a mask"),
    "index on the host": (lambda x: x[torch.tensor([1])], "H2D of an index"),
    "to the host": (lambda x: x.cpu(), "D2H"),
    "to a list": (lambda x: x.tolist(), "D2H"),
    "from the host": (lambda x: x + torch.tensor([1.0], device=GPU), "H2D"),
    "device": (lambda x: torch.cuda.synchronize(), "synchronize"),
}
FREE = {
    "from the host, asynchronous": lambda x: torch.ones(3).to(GPU, non_blocking=True),
    "gather": lambda x: x[torch.zeros(2, dtype=torch.int64, device=GPU)],
    "repeat, size known": lambda x: torch.repeat_interleave(x, x.long().abs(), output_size=1),
    "where": lambda x: torch.where(x > 0, x, 0),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_seen_and_refused_in_a_capture(name, activity):
    wait, kind = WAITS[name]
    x = draw(3)
    activity.clear()

    wait(x)

    kinds = [kind for _, kind in activity.waits]
    assert kind in kinds
    with pytest.raises(HostWait):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            wait(x)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(HostWait):
        wait(x)


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait_is_not_counted(name, activity):
    x = torch.tensor([1.0, 0.0, 0.0], device=GPU)
    activity.clear()

    FREE[name](x)

    assert not activity.waits


# --- Graphs ---------------------------------------------------------------------------------------


def test_a_capture_has_no_effect_and_a_replay_uses_the_same_memory():
    graph = torch.cuda.CUDAGraph()
    x = torch.arange(3.0, device=GPU)
    y = torch.zeros(3, device=GPU)

    with torch.cuda.graph(graph):
        doubled = x * 2
        y[:2] += doubled[1:] + torch.arange(2, device=GPU)

    assert y.tolist() == [0, 0, 0]
    x += 1
    for times in (1, 2):
        graph.replay()
        assert y.tolist() == [4 * times, 7 * times, 0]
        assert doubled.isnan().all()  # the pool is the next graph's too


def test_a_graph_keeps_nothing_alive():
    graph = torch.cuda.CUDAGraph()
    x = torch.ones(3, device=GPU)
    y = torch.zeros(3, device=GPU)
    with torch.cuda.graph(graph):
        y += x
    graph.replay()

    del x

    with pytest.raises(GraphError, match="given away"):
        graph.replay()


def test_a_graph_is_captured_once_and_before_its_replay():
    graph = torch.cuda.CUDAGraph()
    x = torch.ones(3, device=GPU)

    with pytest.raises(GraphError, match="before"):
        graph.replay()
    with torch.cuda.graph(graph):
        x += 1
    with pytest.raises(GraphError, match="already"):
        with torch.cuda.graph(graph):
            x += 1


# --- Streams --------------------------------------------------------------------------------------


def write_then_read(wait):
    """Write on a side stream, then read on the default one; `wait(side)` stands between."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x = torch.ones(3, device=GPU)
        x += 1
    wait(side)
    y = x * 2
    torch.cuda.synchronize()
    return y


def wait_for_stream(side):
    torch.cuda.current_stream().wait_stream(side)


def wait_for_event(side):
    torch.cuda.current_stream().wait_event(side.record_event())


def wait_on_the_host(side):
    side.synchronize()


@pytest.mark.parametrize("wait", [wait_for_stream, wait_for_event, wait_on_the_host])
def test_a_wait_orders_two_streams(wait, activity):
    write_then_read(wait)

    assert not activity.races


def test_a_read_without_a_wait_is_a_race(activity):
    write_then_read(lambda side: None)

    [race] = activity.races
    assert race.startswith("mul on the default stream")
    assert "does not wait for stream" in race


def test_an_event_is_as_old_as_its_record(activity):
    """Work that is launched behind the event is not waited for."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x = torch.ones(3, device=GPU)
        event = side.record_event()
        x += 1

    torch.cuda.current_stream().wait_event(event)
    x.clone()

    assert len(activity.races) == 1
    torch.cuda.synchronize()


def test_a_write_over_what_another_stream_reads_is_a_race(activity):
    x = torch.ones(3, device=GPU)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.clone()

    x += 1

    assert len(activity.races) == 1
    torch.cuda.synchronize()


@pytest.mark.parametrize("recorded", [False, True])
def test_memory_that_is_given_away_too_early_is_a_race(recorded, activity):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x = torch.ones(3, device=GPU)
    current = torch.cuda.current_stream()
    current.wait_stream(side)
    x.clone()
    if recorded:
        x.record_stream(current)

    del x

    assert bool(activity.races) != recorded
    torch.cuda.synchronize()


def test_an_asynchronous_copy_to_the_host_holds_its_memory(activity):
    """Two streams copy into one pinned buffer without a wait."""
    buffer = torch.zeros(3, pin_memory=True)
    x = torch.ones(3, device=GPU)
    buffer.copy_(x, non_blocking=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())

    with torch.cuda.stream(side):
        buffer.copy_(x, non_blocking=True)
    assert not activity.races
    buffer.copy_(x, non_blocking=True)

    assert len(activity.races) == 1
    torch.cuda.synchronize()


def test_memory_in_use_is_counted():
    before = torch.cuda.memory_allocated()

    x = torch.zeros(1000, device=GPU)
    view = x[10:]
    del x

    assert torch.cuda.memory_allocated() == before + 4000
    del view
    assert torch.cuda.memory_allocated() == before
