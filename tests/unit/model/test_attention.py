"""The attention backends. Neither FlashAttention runs on a CPU: stand-ins with their exact
signatures compute what their documentation says.
"""

import copy
import inspect
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
from helpers.tiny_world import FAMILIES, jsonl, refused, tiny_model, write_yaml
from torch.nn.attention import varlen as torch_varlen

from recr1 import train
from recr1.data_types import Prompt, Rollout
from recr1.distributed.fsdp import Sharded
from recr1.model import packed_attention, varlen_attention
from recr1.model.log_probs import compute_log_probs
from recr1.model.packed_attention import PackedAttention, attend_decode, make_decode_bias
from recr1.model.varlen_attention import (
    AttentionBackend,
    AttentionUnavailable,
    VarlenAttention,
    choose_attention,
)
from recr1.rl.packing import pack_rollouts
from recr1.sampling.generate import generate

GPU = torch.device("cuda")
CPU = torch.device("cpu")
REAL = torch_varlen.varlen_attn


def check_lengths(cumulative, longest, total):
    """Refuse what the kernels refuse of cumulative lengths."""
    lengths = cumulative.diff()
    assert cumulative.dtype == torch.int32
    assert cumulative[0] == 0
    assert cumulative[-1] == total
    assert type(longest) is int
    assert longest == lengths.max()
    assert (lengths > 0).all()  # flash-attention issues 1537 and 1619


def check_arguments(q, k, v, cu_q, cu_k, max_q, max_k):
    """Refuse what the kernels refuse."""
    for x in (q, k, v):
        assert x.ndim == 3
        assert x.stride(-1) == 1
        assert x.shape[2] == q.shape[2]
    assert k.shape == v.shape
    assert q.shape[1] % k.shape[1] == 0
    check_lengths(cu_q, max_q, len(q))
    check_lengths(cu_k, max_k, len(k))
    assert len(cu_q) == len(cu_k)


def attend_in_sequence(q, k, v, scale):
    """Compute softmax over the keys that a causal mask, aligned to the bottom right corner, leaves.

    q is (T, H, D), k and v are (S, H, D).
    """
    T = len(q)
    S = len(k)
    # seqlen_q = 2, seqlen_k = 5: 1 1 1 1 0 / 1 1 1 1 1
    ones = torch.ones(T, S, dtype=torch.bool)
    mask = ones.tril(S - T)
    scores = scale * torch.einsum("thd,shd->hts", q, k)
    masked = scores.masked_fill(~mask, -torch.inf)
    weights = masked.softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v)


def attend_as_documented(q, k, v, cu_q, cu_k, max_q, max_k, scale=None):
    """Attend in one sequence after the other."""
    check_arguments(q, k, v, cu_q, cu_k, max_q, max_k)
    # heads 0, 1, 2 of six read head 0 of two
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1)
    v = v.repeat_interleave(group, 1)
    scale = scale or q.shape[2] ** -0.5
    out = []
    for i in range(len(cu_q) - 1):
        queries = slice(cu_q[i], cu_q[i + 1])
        keys = slice(cu_k[i], cu_k[i + 1])
        attended = attend_in_sequence(q[queries], k[keys], v[keys], scale)
        out.append(attended)
    return torch.cat(out)


class Flash:
    """The package flash-attn 2.8.3."""

    def __init__(self, version="2.8.3.post2"):
        self.__version__ = version
        self.calls = []

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        assert causal
        assert dropout_p == 0.0
        assert window_size == (-1, -1)
        assert softcap == 0.0
        assert alibi_slopes is None
        assert return_attn_probs is False
        assert block_table is None
        self.calls.append((q.shape, k.shape))
        return attend_as_documented(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale
        )


def torch_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):
    raise AssertionError("outside setup.py's range: never called")


def torch_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    # (T_q, H, D) and (T_k, H, D) are what it is documented for
    assert query.shape[1] == key.shape[1]
    assert window_size == (-1, 0)
    assert isinstance(window_size, tuple)
    assert return_aux is None
    return attend_as_documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)


def torch_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert window_size == (-1, 0)
    assert isinstance(window_size, tuple)
    assert return_aux is None
    assert seqused_k is None
    assert block_table is None
    assert num_splits is None
    return attend_as_documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)


# name: varlen_attn of that torch
VARLEN_STAND_INS = dict(torch_2_11=torch_2_11, torch_2_12=torch_2_12)
STAND_INS = ("flash", *VARLEN_STAND_INS)
LAYOUTS = {  # lengths of prompts, of completions' inputs, the prompt of each completion
    "groups of unequal length": ([3, 9, 1], [4, 2, 7, 2, 1], [0, 0, 1, 2, 2]),
    "completions of one token": ([3, 9, 1], [4, 0, 7, 0, 0], [0, 0, 1, 2, 2]),
    "one input each": ([2, 5], [1, 1, 1], [0, 1, 1]),
    "a long group": ([17], [20, 3, 5, 8], [0, 0, 0, 0]),
    "prompts only": ([5, 2], [], []),
    "no completion has inputs": ([4], [0, 0], [0, 0]),
    "in_step's idle batch": ([1], [0], [0]),
}


@pytest.fixture
def gpu(monkeypatch):
    """A machine with an H100, as far as `choose` asks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def choose_stand_in(monkeypatch, name, grouped, asked=None):
    """Choose the backend of a machine whose flash-attn or varlen_attn is the stand-in `name`."""
    if name == "flash":
        monkeypatch.setitem(sys.modules, "flash_attn", Flash())
    else:
        monkeypatch.setattr(torch_varlen, "varlen_attn", VARLEN_STAND_INS[name])
    if asked is None:
        asked = "flash" if name == "flash" else "varlen"
    return choose_attention(asked, grouped, 64, torch.bfloat16, GPU)


def make_layout(name):
    """Make a layout's tensors: prompt lengths, completion lengths, prompts of completions."""
    return [torch.tensor(x, dtype=torch.int64) for x in LAYOUTS[name]]


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (5, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", STAND_INS)
def test_outputs_and_gradients_are_those_of_sdpa(gpu, monkeypatch, name, layout, heads, kv_heads):
    lengths, completion_lengths, prompt_of = make_layout(layout)
    tokens = int(lengths.sum() + completion_lengths.sum())
    backend = choose_stand_in(monkeypatch, name, heads != kv_heads)
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        return torch.randn(tokens, n, 8, generator=generator, dtype=torch.float64)

    q = draw(heads)
    k = draw(kv_heads)
    v = draw(kv_heads)
    toward = draw(heads)
    inputs = (q, k, v)
    for x in inputs:
        x.requires_grad_()
    sdpa = PackedAttention(lengths, completion_lengths, prompt_of)
    packed = PackedAttention(lengths, completion_lengths, prompt_of, CPU, backend)

    want = sdpa(0, q, k, v)
    monkeypatch.setattr(packed_attention, "_attend", None)  # no second way behind it
    ours = packed(0, q, k, v)

    assert (ours - want).abs().max() < 1e-12
    grads = torch.autograd.grad(ours, inputs, toward)
    want_grads = torch.autograd.grad(want, inputs, toward)
    for a, b in zip(grads, want_grads):
        assert (a - b).norm() <= 1e-12 * b.norm()


def test_no_row_is_padded_and_no_head_repeated_where_the_kernel_groups_them(gpu, monkeypatch):
    layout = make_layout("completions of one token")
    backend = choose_stand_in(monkeypatch, "flash", True)
    packed = PackedAttention(*layout, CPU, backend)
    q = torch.randn(24, 4, 8)
    k = torch.randn(24, 2, 8)

    packed(0, q, k, k)

    flash = sys.modules["flash_attn"]
    prompts = ((13, 4, 8), (13, 2, 8))
    completions = ((11, 4, 8), (3 + 4 + 9 + 7, 2, 8))
    assert flash.calls == [prompts, completions]


def attend_in_float64(q, k, v, last):
    """Attend from one query per row in float64, every head for itself: the oracle of decoding."""
    heads_per_kv = q.shape[1] // k.shape[1]
    k = k.double().repeat_interleave(heads_per_kv, 1)  # (B, H, S, D)
    v = v.double().repeat_interleave(heads_per_kv, 1)
    scores = torch.einsum("bhd,bhsd->bhs", q.double(), k) * q.shape[2] ** -0.5
    is_beyond = torch.arange(k.shape[2]) > last[:, None]
    weights = scores.masked_fill(is_beyond[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhs,bhsd->bhd", weights, v)


# dtype, its relative rounding, the error that float32 scores leave at most
DECODE_DTYPES = [
    (torch.bfloat16, 2**-8, 4e-3),
    (torch.float16, 2**-11, 5e-4),
    (torch.float32, 2**-24, 1e-6),
]


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (7, 1)])
@pytest.mark.parametrize("dtype, rounding, bound", DECODE_DTYPES)
def test_decoding_does_not_round_its_scores(dtype, rounding, bound, heads, kv_heads):
    """Scores of up to 30, as trained models have them: rounded, they would be off by `rounding` of
    themselves, and the weights by that share times 30.
    """
    generator = torch.Generator().manual_seed(0)
    B, S, D = 16, 96, 64
    q = 8 * torch.randn(B, heads, D, generator=generator)
    k = torch.randn(B, kv_heads, S, D, generator=generator)
    v = torch.randn(B, kv_heads, S, D, generator=generator)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    last = torch.randint(S, (B,), generator=generator)
    want = attend_in_float64(q, k, v, last)

    with torch.no_grad():
        out = attend_decode(q, k, v, make_decode_bias(last, S, dtype))

    assert out.dtype == dtype
    assert (out.double() - want).norm() <= bound * want.norm()


PROMPT_LENGTHS = (3, 8, 1)
COMPLETION_LENGTHS = ((4, 1, 6), (2, 2, 9), (1, 1, 5))


def draw_rollouts():
    """Draw three prompts and three completions of each."""
    generator = torch.Generator().manual_seed(0)

    def draw_ids(n):
        ids = torch.randint(390, (n,), generator=generator)
        return tuple(ids.tolist())

    prompts = []
    for i, length in enumerate(PROMPT_LENGTHS):
        ids = draw_ids(length)
        prompts.append(Prompt(f"q{i}", i, "", ids))
    rollouts = []
    for prompt, lengths in zip(prompts, COMPLETION_LENGTHS):
        for sibling, n in enumerate(lengths):
            ids = draw_ids(n)
            logp = (0.0,) * n
            rollout = Rollout(prompt, prompt.index, sibling, ids, logp, finished=True)
            rollouts.append(rollout)
    return prompts, rollouts


def shard_model(model, backend, checkpointing):
    """Shard a copy of the model whose attention is the backend's."""
    state = dict(model.state_dict())
    decoder = copy.deepcopy(model).to("meta")
    decoder.backend = backend
    return Sharded(
        decoder,
        state.__getitem__,
        device=CPU,
        master=torch.float64,
        compute=torch.float64,
        gradient_checkpointing=checkpointing,
    )


def train_and_sample(model, backend, checkpointing):
    """Return the log-probs and gradients of drawn rollouts, and new rollouts."""
    prompts, rollouts = draw_rollouts()
    policy = shard_model(model, backend, checkpointing)
    logps = []
    for batch in pack_rollouts(rollouts, 30):
        logp, _ = compute_log_probs(policy, batch, 1.3)
        loss = logp.square().sum()
        loss.backward()
        logps.append(logp.detach())
    grads = [unit.shard.grad for unit in policy.units]

    random = np.random.default_rng(0)
    uniforms = random.uniform(size=(3, 4, 6))
    stops = frozenset([7])
    model.backend = backend
    sampled = generate(model, prompts, 4, 1.0, 6, stops, uniforms)
    return torch.cat(logps), torch.cat(grads), sampled


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", STAND_INS)
def test_a_models_gradients_and_texts_are_those_of_sdpa(
    gpu, monkeypatch, name, family, checkpointing
):
    """Sharded, through score() and generate(): every place that makes a PackedAttention asks the
    model.
    """
    model = tiny_model(1, **FAMILIES[family]).double()
    sdpa = AttentionBackend()
    want_logp, want_grad, want_sampled = train_and_sample(model, sdpa, checkpointing)
    stand_in = choose_stand_in(monkeypatch, name, True)
    kernel = stand_in.varlen.args[0]
    calls = []

    def count_call(*arguments):
        calls.append(arguments)
        return kernel(*arguments)

    varlen = partial(VarlenAttention, count_call)
    backend = AttentionBackend(varlen=varlen)
    logp, grad, sampled = train_and_sample(model, backend, checkpointing)

    ids = [r.ids for r in sampled]
    want_ids = [r.ids for r in want_sampled]
    assert (logp - want_logp).abs().max() < 1e-11
    assert (grad - want_grad).norm() <= 1e-12 * want_grad.norm()
    assert ids == want_ids
    _, rollouts = draw_rollouts()
    batches = len(pack_rollouts(rollouts, 30))
    assert batches > 1
    layers = model.config.num_hidden_layers
    # forward, recomputation; prefill
    training_calls = batches * layers * 2 * (1 + checkpointing)
    assert len(calls) == training_calls + layers


def make_qkv(device):
    """Make q of 4 heads, k and v of 2, for 24 tokens: zeros."""
    options = dict(dtype=torch.bfloat16, device=device, requires_grad=True)
    q = torch.zeros(24, 4, 64, **options)
    k = torch.zeros(24, 2, 64, **options)
    v = torch.zeros(24, 2, 64, **options)
    return q, k, v


def test_the_real_varlen_attn_takes_our_calls(gpu):
    """On the meta device: its checks of heads, its custom op's schema, its registered backward,
    shapes and types; no kernel runs.
    """
    layout = make_layout("completions of one token")
    backend = choose_attention("varlen", True, 64, torch.bfloat16, GPU)
    assert backend.name == "varlen"
    kernel = backend.varlen.args[0].func
    assert inspect.signature(REAL) == inspect.signature(kernel)
    inputs = make_qkv("meta")

    attend = backend.varlen(*layout, "meta")
    out = attend(*inputs)
    out.sum().backward()

    assert out.shape == inputs[0].shape
    assert out.dtype == torch.bfloat16
    for x in inputs:
        assert x.grad.shape == x.shape
        assert x.grad.dtype == x.dtype

    # and why it is refused on a CPU
    inputs = make_qkv("cpu")
    attend = backend.varlen(*layout, "cpu")
    with pytest.raises(NotImplementedError):
        attend(*inputs)


def list_parameters(function):
    """List a function's parameters: name, kind, default."""
    signature = inspect.signature(function)
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


def test_the_newest_stand_in_has_the_real_signature():
    assert list_parameters(torch_2_12) == list_parameters(REAL)


REPEATED = "keys and values are repeated for every query head: torch before 2.12 has no enable_gqa"
# stand-in, grouped, the options of the kernel's call, what the run prints
PROBES = [
    ("torch_2_11", False, dict(window_size=(-1, 0)), ""),
    ("torch_2_11", True, dict(window_size=(-1, 0)), REPEATED),
    ("torch_2_12", False, dict(window_size=(-1, 0)), ""),
    ("torch_2_12", True, dict(window_size=(-1, 0), enable_gqa=True), ""),
    ("flash", True, dict(causal=True), "flash-attn 2.8.3.post2"),
]


@pytest.mark.parametrize("name, grouped, options, note", PROBES)
def test_what_is_probed(gpu, monkeypatch, name, grouped, options, note):
    backend = choose_stand_in(monkeypatch, name, grouped)

    kernel = backend.varlen.args[0]
    repeats_heads = kernel.func is varlen_attention._repeat_heads
    if repeats_heads:
        kernel = kernel.args[0]
    assert kernel.keywords == options
    assert repeats_heads == (name == "torch_2_11" and grouped)
    assert backend.note == note
    want = "flash" if name == "flash" else "varlen"
    if note:
        want += f" ({note})"
    assert str(backend) == want

    if name == "flash":
        return
    auto = choose_stand_in(monkeypatch, name, grouped, "auto")
    notes = f"auto: torch {torch.__version__} has it"
    if note:
        notes += f"; {note}"
    assert str(auto) == f"varlen ({notes})"


def use_hip(patch):
    patch.setattr(torch.version, "hip", "6.4")


def use_old_gpu(patch):
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))


def remove_kernels(patch):
    patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)


def remove_varlen_module(patch):
    patch.setitem(sys.modules, "torch.nn.attention.varlen", None)


def use_torch_2_10(patch):
    patch.setattr(torch_varlen, "varlen_attn", torch_2_10)


def uninstall_flash(patch):
    patch.setitem(sys.modules, "flash_attn", None)


def use_flash_4(patch):
    patch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))


def use_flash_2_0(patch):
    patch.setitem(sys.modules, "flash_attn", Flash("2.0.9"))


# what is asked for, the machine, other settings, what the error says
UNAVAILABLE = [
    (
        "varlen",
        None,
        dict(device=CPU),
        "varlen needs a GPU, this process computes on the cpu",
    ),
    (
        "flash",
        None,
        dict(device=CPU),
        "flash needs a GPU, this process computes on the cpu",
    ),
    (
        "varlen",
        None,
        dict(compute=torch.float32),
        "varlen computes in bfloat16 or float16, model.compute is float32",
    ),
    (
        "flash",
        None,
        dict(compute=torch.float32),
        "flash computes in bfloat16 or float16, model.compute is float32",
    ),
    ("varlen", use_hip, {}, "varlen is for NVIDIA's GPUs"),
    (
        "varlen",
        use_old_gpu,
        {},
        "varlen needs an Ampere GPU (compute capability 8.0) or newer, this is a GPU",
    ),
    ("varlen", None, dict(head_dim=12), "a multiple of 8; the model's is 12"),
    (
        "flash",
        None,
        dict(head_dim=264),
        "flash needs a head_dim of at most 256; the model's is 264",
    ),
    ("varlen", remove_kernels, {}, "was built without FlashAttention"),
    ("varlen", remove_varlen_module, {}, "torch 2.11's or newer; this is torch"),
    ("varlen", use_torch_2_10, {}, "torch 2.11's or newer; this is torch"),
    (
        "flash",
        uninstall_flash,
        {},
        "the package flash-attn 2.1 or newer, which is not usable here "
        "(import of flash_attn halted",
    ),
    (
        "flash",
        use_flash_4,
        {},
        "(module 'flash_attn' has no attribute 'flash_attn_varlen_func')",
    ),
    (
        "flash",
        use_flash_2_0,
        {},
        "flash-attn 2.1 or newer, which aligns a short query with the end of its keys; "
        "this is 2.0.9",
    ),
]


@pytest.mark.parametrize("asked, machine, settings, says", UNAVAILABLE)
def test_what_cannot_run_is_said(gpu, monkeypatch, asked, machine, settings, says):
    """By name it is an error; auto takes sdpa and says why."""
    if asked == "flash":
        monkeypatch.setitem(sys.modules, "flash_attn", Flash())
    if machine:
        machine(monkeypatch)
    usual = dict(grouped=True, head_dim=64, compute=torch.bfloat16, device=GPU)
    arguments = usual | settings

    with pytest.raises(AttentionUnavailable) as error:
        choose_attention(asked, **arguments)

    message = str(error.value)
    assert says in message
    assert "\n" not in message
    assert choose_attention("sdpa", **arguments) == AttentionBackend()
    if asked == "varlen":
        auto = choose_attention("auto", **arguments)
        assert auto == AttentionBackend(note=f"auto: {message}")


def test_flash_pads_an_odd_head_itself(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", Flash())

    backend = choose_attention("flash", False, 12, torch.float16, GPU)

    assert backend.name == "flash"


@pytest.mark.parametrize("asked", ["varlen", "flash"])
def test_a_run_refuses_what_cannot_run(no_gpu, tmp_path, capsys, asked):
    config = write_yaml(tmp_path)

    unavailable = refused([config, f"model.attention={asked}"], capsys)
    unknown = refused([config, "model.attention=eager"], capsys)

    assert unavailable == (
        f"recr1: model.attention: {asked} needs a GPU, this process computes on the cpu; "
        "sdpa runs everywhere\n"
    )
    assert "model.attention: 'eager' is not one of auto, varlen, flash, sdpa" in unknown


def train_in(folder, asked):
    """Train in a folder with the attention that is asked for; return the metrics' rows."""
    config = write_yaml(folder, **{"loss.kl_coef": 0.1})
    train.main([config, f"model.attention={asked}"])
    return jsonl(folder / "run" / "metrics.jsonl")


def test_a_run_says_what_it_took_and_learns_the_same(no_gpu, tmp_path, monkeypatch, capsys):
    """Two whole runs, sampler, reference and evaluation included: with SDPA, and with the stand-in
    of flash-attn in its place.
    """
    flash = Flash()

    want_rows = train_in(tmp_path / "sdpa", "auto")
    sdpa_output = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    # the GPU and half precision
    monkeypatch.setattr(varlen_attention, "_check_flash_limits", lambda *asked: None)
    rows = train_in(tmp_path / "flash", "flash")
    flash_output = capsys.readouterr().out

    sdpa_note = "auto: varlen needs a GPU, this process computes on the cpu"
    assert f", attention sdpa ({sdpa_note}), loss" in sdpa_output
    assert ", attention flash (flash-attn 2.8.3.post2), loss" in flash_output
    assert len(flash.calls) > 50
    for key in ("reward", "grad_norm", "kl", "entropy", "val_ndcg"):
        values = [row[key] for row in rows if key in row]
        want = [row[key] for row in want_rows if key in row]
        assert values == pytest.approx(want, rel=1e-4, abs=1e-7), key
    for row in rows:
        assert row["sampling_logp_diff_max"] < 2e-4


def compute_on_gpu(layout, exact, dtype, backend):
    """Compute output and gradients, as float32, of q, k, v and the output's gradient in a dtype."""
    q, k, v, toward = [x.to(dtype, copy=True) for x in exact]
    inputs = (q, k, v)
    for x in inputs:
        x.requires_grad_()
    attend = PackedAttention(*layout, GPU, backend)
    out = attend(0, q, k, v)
    grads = torch.autograd.grad(out, inputs, toward)
    return [x.float() for x in (out, *grads)]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: the real varlen_attn and flash-attn were not run"
)
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 4, 64), (14, 2, 64), (16, 2, 128)])
@pytest.mark.parametrize("asked", ["varlen", "flash"])
def test_on_a_gpu(asked, heads, kv_heads, dim):
    """bfloat16 against SDPA in float32: no further away than four times SDPA in bfloat16 is,
    outputs and gradients.
    """
    try:
        backend = choose_attention(asked, heads != kv_heads, dim, torch.bfloat16, GPU)
    except AttentionUnavailable as error:
        pytest.skip(str(error))
    sdpa = AttentionBackend()
    generator = torch.Generator().manual_seed(0)
    for name in LAYOUTS:
        lengths, completion_lengths, prompt_of = make_layout(name)
        layout = (37 * lengths, 29 * completion_lengths, prompt_of)
        tokens = int(layout[0].sum() + layout[1].sum())
        exact = []
        for n in (heads, kv_heads, kv_heads, heads):
            x = torch.randn(tokens, n, dim, generator=generator)
            exact.append(x.bfloat16().to(GPU))

        want = compute_on_gpu(layout, exact, torch.float32, sdpa)
        theirs = compute_on_gpu(layout, exact, torch.bfloat16, sdpa)
        ours = compute_on_gpu(layout, exact, torch.bfloat16, backend)

        for exact_x, sdpa_x, our_x in zip(want, theirs, ours):
            sdpa_error = (sdpa_x - exact_x).norm()
            rounding = 1e-3 * exact_x.norm()
            assert (our_x - exact_x).norm() <= 4 * sdpa_error + rounding
