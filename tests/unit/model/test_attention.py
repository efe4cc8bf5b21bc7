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
from recr1.model.packed_attention import PackedAttention
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


def documented(q, k, v, cu_q, cu_k, max_q, max_k, scale=None):
    """One sequence after the other: softmax over the keys that a causal mask, aligned to the bottom
    right corner, leaves. Refuses what the kernels do.
    """
    for x in (q, k, v):
        assert x.ndim == 3
        assert x.stride(-1) == 1
        assert x.shape[2] == q.shape[2]
    assert k.shape == v.shape
    assert q.shape[1] % k.shape[1] == 0
    for cu, longest, total in ((cu_q, max_q, len(q)), (cu_k, max_k, len(k))):
        lengths = cu.diff()
        assert cu.dtype == torch.int32
        assert cu[0] == 0
        assert cu[-1] == total
        assert type(longest) is int
        assert longest == lengths.max()
        assert (lengths > 0).all()  # flash-attention issues 1537 and 1619
    assert len(cu_q) == len(cu_k)
    out = []
    group = q.shape[1] // k.shape[1]
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        scores = torch.einsum("thd,shd->hts", q[a:b], k[c:d].repeat_interleave(group, 1)) * (
            scale or q.shape[2] ** -0.5
        )
        # seqlen_q = 2, seqlen_k = 5: 1 1 1 1 0 / 1 1 1 1 1
        read = torch.ones(b - a, d - c).tril(d - c - (b - a)).bool()
        weights = scores.masked_fill(~read, -torch.inf).softmax(-1)
        # heads 0, 1, 2 of six read head 0 of two
        out.append(torch.einsum("hts,shd->thd", weights, v[c:d].repeat_interleave(group, 1)))
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
        assert (
            dropout_p,
            window_size,
            softcap,
            alibi_slopes,
            return_attn_probs,
            block_table,
        ) == (0.0, (-1, -1), 0.0, None, False, None)
        self.calls.append((q.shape, k.shape))
        return documented(
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
    return documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)


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
    assert return_aux is seqused_k is block_table is num_splits is None
    return documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with an H100, as far as `choose` asks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def stand_in(monkeypatch, name, grouped, asked=None):
    """Backend of a machine whose flash-attn or varlen_attn is the stand-in `name`."""
    if name == "flash":
        monkeypatch.setitem(sys.modules, "flash_attn", Flash())
    else:
        monkeypatch.setattr(torch_varlen, "varlen_attn", globals()[name])
    return choose_attention(
        asked or ("flash" if name == "flash" else "varlen"), grouped, 64, torch.bfloat16, GPU
    )


STAND_INS = ("flash", "torch_2_11", "torch_2_12")
LAYOUTS = {  # prompts, completions' inputs, whose
    "groups of unequal length": ([3, 9, 1], [4, 2, 7, 2, 1], [0, 0, 1, 2, 2]),
    "completions of one token": ([3, 9, 1], [4, 0, 7, 0, 0], [0, 0, 1, 2, 2]),
    "one input each": ([2, 5], [1, 1, 1], [0, 1, 1]),
    "a long group": ([17], [20, 3, 5, 8], [0, 0, 0, 0]),
    "prompts only": ([5, 2], [], []),
    "no completion has inputs": ([4], [0, 0], [0, 0]),
    "in_step's idle batch": ([1], [0], [0]),
}


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (5, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", STAND_INS)
def test_outputs_and_gradients_are_those_of_sdpa(gpu, monkeypatch, name, layout, heads, kv_heads):
    lengths, own, prompt_of = (torch.tensor(x, dtype=torch.int64) for x in LAYOUTS[layout])
    backend = stand_in(monkeypatch, name, heads != kv_heads)
    generator = torch.Generator().manual_seed(0)

    def random(n):
        return torch.randn(
            int(lengths.sum() + own.sum()), n, 8, generator=generator, dtype=torch.float64
        )

    inputs = [random(n).requires_grad_() for n in (heads, kv_heads, kv_heads)]
    want = PackedAttention(lengths, own, prompt_of)(0, *inputs)
    packed = PackedAttention(lengths, own, prompt_of, CPU, backend)
    monkeypatch.setattr(packed_attention, "_attend", None)  # no second way behind it
    ours = packed(0, *inputs)
    toward = random(heads)
    assert (ours - want).abs().max() < 1e-12
    for a, b in zip(
        torch.autograd.grad(ours, inputs, toward), torch.autograd.grad(want, inputs, toward)
    ):
        assert (a - b).norm() <= 1e-12 * b.norm()


def test_no_row_is_padded_and_no_head_repeated_where_the_kernel_groups_them(gpu, monkeypatch):
    lengths, own, prompt_of = (torch.tensor(x) for x in LAYOUTS["completions of one token"])
    packed = PackedAttention(lengths, own, prompt_of, CPU, stand_in(monkeypatch, "flash", True))
    q = torch.randn(24, 4, 8)
    k = torch.randn(24, 2, 8)
    packed(0, q, k, k)
    assert sys.modules["flash_attn"].calls == [
        ((13, 4, 8), (13, 2, 8)),
        ((11, 4, 8), (3 + 4 + 9 + 7, 2, 8)),
    ]


def rollouts():
    g = torch.Generator().manual_seed(0)

    def ids(n):
        return tuple(torch.randint(390, (n,), generator=g).tolist())

    prompts = [Prompt(f"q{p}", p, "", ids(n)) for p, n in enumerate((3, 8, 1))]
    return prompts, [
        Rollout(p, p.index, s, ids(n), (0.0,) * n, True)
        for p, sizes in zip(prompts, ((4, 1, 6), (2, 2, 9), (1, 1, 5)))
        for s, n in enumerate(sizes)
    ]


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
    state = dict(model.state_dict())
    prompts, texts = rollouts()
    uniforms = np.random.default_rng(0).uniform(size=(3, 4, 6))

    def outcome(backend):
        decoder = copy.deepcopy(model).to("meta")
        decoder.backend = backend
        policy = Sharded(
            decoder,
            state.__getitem__,
            device=CPU,
            master=torch.float64,
            compute=torch.float64,
            checkpointing=checkpointing,
        )
        logps = []
        for batch in pack_rollouts(texts, 30):
            logp, _ = compute_log_probs(policy, batch, 1.3)
            logp.square().sum().backward()
            logps.append(logp.detach())
        model.backend = backend
        sampled = generate(model, prompts, 4, 1.0, 6, frozenset([7]), uniforms)
        return torch.cat(logps), torch.cat([unit.shard.grad for unit in policy.units]), sampled

    logp, grad, sampled = outcome(AttentionBackend())
    kernel = stand_in(monkeypatch, name, True).varlen.args[0]
    calls = []

    def counted(*of):
        calls.append(of)
        return kernel(*of)

    ours_logp, ours_grad, ours = outcome(AttentionBackend(varlen=partial(VarlenAttention, counted)))
    assert (ours_logp - logp).abs().max() < 1e-11
    assert (ours_grad - grad).norm() <= 1e-12 * grad.norm()
    assert [r.ids for r in ours] == [r.ids for r in sampled]
    batches = len(pack_rollouts(texts, 30))
    layers = model.config.num_hidden_layers
    # forward, recomputation; prefill
    assert batches > 1
    assert len(calls) == batches * layers * 2 * (1 + checkpointing) + layers


def test_the_real_varlen_attn_takes_our_calls(gpu):
    """On the meta device: its checks of heads, its custom op's schema, its registered backward,
    shapes and types; no kernel runs.
    """
    lengths, own, prompt_of = (torch.tensor(x) for x in LAYOUTS["completions of one token"])
    backend = choose_attention("varlen", True, 64, torch.bfloat16, GPU)
    assert backend.name == "varlen"
    assert inspect.signature(REAL) == inspect.signature(backend.varlen.args[0].func)
    q, k, v = (
        torch.empty(24, n, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for n in (4, 2, 2)
    )
    out = backend.varlen(lengths, own, prompt_of, "meta")(q, k, v)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    out.sum().backward()
    assert all(x.grad.shape == x.shape and x.grad.dtype == x.dtype for x in (q, k, v))
    with pytest.raises(NotImplementedError):  # and why it is refused on a CPU
        backend.varlen(lengths, own, prompt_of, "cpu")(
            *(torch.zeros(24, n, 64, dtype=torch.bfloat16) for n in (4, 2, 2))
        )


@pytest.mark.parametrize("stand, installed", [(torch_2_12, REAL)])
def test_the_newest_stand_in_has_the_real_signature(stand, installed):
    def kinds(f):
        return [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]

    assert kinds(stand) == kinds(installed)


@pytest.mark.parametrize(
    "name, grouped, options, note",
    [
        ("torch_2_11", False, dict(window_size=(-1, 0)), ""),
        (
            "torch_2_11",
            True,
            dict(window_size=(-1, 0)),
            "keys and values are repeated for every query head: "
            "torch before 2.12 has no enable_gqa",
        ),
        ("torch_2_12", False, dict(window_size=(-1, 0)), ""),
        ("torch_2_12", True, dict(window_size=(-1, 0), enable_gqa=True), ""),
        ("flash", True, dict(causal=True), "flash-attn 2.8.3.post2"),
    ],
)
def test_what_is_probed(gpu, monkeypatch, name, grouped, options, note):
    backend = stand_in(monkeypatch, name, grouped)
    kernel = backend.varlen.args[0]
    assert (
        kernel.args[0] if kernel.func is varlen_attention._repeat_heads else kernel
    ).keywords == options
    assert backend.note == note
    assert (kernel.func is varlen_attention._repeat_heads) == (name == "torch_2_11" and grouped)
    assert str(backend) == ("flash" if name == "flash" else "varlen") + f" ({note})" * bool(note)
    if name != "flash":
        assert (
            str(stand_in(monkeypatch, name, grouped, "auto"))
            == f"varlen (auto: torch {torch.__version__} has it{note and '; ' + note})"
        )


def hip(m):
    m.setattr(torch.version, "hip", "6.4")


def old_gpu(m):
    m.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))


def no_kernels(m):
    m.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)


def no_module(m):
    m.setitem(sys.modules, "torch.nn.attention.varlen", None)


def causal_flag(m):
    m.setattr(torch_varlen, "varlen_attn", torch_2_10)


def not_installed(m):
    m.setitem(sys.modules, "flash_attn", None)


def only_version_4(m):
    m.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))


def top_left(m):
    m.setitem(sys.modules, "flash_attn", Flash("2.0.9"))


@pytest.mark.parametrize(
    "asked, machine, settings, says",
    [
        ("varlen", None, dict(device=CPU), "varlen needs a GPU, this process computes on the cpu"),
        ("flash", None, dict(device=CPU), "flash needs a GPU, this process computes on the cpu"),
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
        ("varlen", hip, {}, "varlen is for NVIDIA's GPUs"),
        (
            "varlen",
            old_gpu,
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
        ("varlen", no_kernels, {}, "was built without FlashAttention"),
        ("varlen", no_module, {}, "torch 2.11's or newer; this is torch"),
        ("varlen", causal_flag, {}, "torch 2.11's or newer; this is torch"),
        (
            "flash",
            not_installed,
            {},
            "the package flash-attn 2.1 or newer, which is not usable here "
            "(import of flash_attn halted",
        ),
        (
            "flash",
            only_version_4,
            {},
            "(module 'flash_attn' has no attribute 'flash_attn_varlen_func')",
        ),
        (
            "flash",
            top_left,
            {},
            "flash-attn 2.1 or newer, which aligns a short query with the end of its keys; "
            "this is 2.0.9",
        ),
    ],
)
def test_what_cannot_run_is_said(gpu, monkeypatch, asked, machine, settings, says):
    """By name it is an error; auto takes sdpa and says why."""
    if asked == "flash":
        monkeypatch.setitem(sys.modules, "flash_attn", Flash())
    if machine:
        machine(monkeypatch)
    how = dict(grouped=True, head_dim=64, compute=torch.bfloat16, device=GPU) | settings
    with pytest.raises(AttentionUnavailable) as e:
        choose_attention(asked, **how)
    assert says in str(e.value)
    assert "\n" not in str(e.value)
    assert choose_attention("sdpa", **how) == AttentionBackend()
    if asked == "varlen":
        assert choose_attention("auto", **how) == AttentionBackend(note=f"auto: {e.value}")


def test_flash_pads_an_odd_head_itself(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", Flash())
    assert choose_attention("flash", False, 12, torch.float16, GPU).name == "flash"


@pytest.mark.parametrize("asked", ["varlen", "flash"])
def test_a_run_refuses_what_cannot_run(no_gpu, tmp_path, capsys, asked):
    err = refused([write_yaml(tmp_path), f"model.attention={asked}"], capsys)
    assert err == (
        f"recr1: model.attention: {asked} needs a GPU, this process computes on the cpu; "
        "sdpa runs everywhere\n"
    )
    assert "model.attention: 'eager' is not one of auto, varlen, flash, sdpa" in refused(
        [write_yaml(tmp_path), "model.attention=eager"], capsys
    )


def test_a_run_says_what_it_took_and_learns_the_same(no_gpu, tmp_path, monkeypatch, capsys):
    """Two whole runs, sampler, reference and evaluation included: with SDPA, and with the stand-in
    of flash-attn in its place.
    """

    def run(folder, asked):
        train.main(
            [write_yaml(tmp_path / folder, **{"loss.kl_coef": 0.1}), f"model.attention={asked}"]
        )
        return capsys.readouterr().out, jsonl(tmp_path / folder / "run" / "metrics.jsonl")

    said, want = run("sdpa", "auto")
    assert (
        ", attention sdpa (auto: varlen needs a GPU, this process computes on the cpu), loss"
        in said
    )
    flash = Flash()
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setattr(
        varlen_attention, "_check_flash_limits", lambda *asked: None
    )  # the GPU and half precision
    said, got = run("flash", "flash")
    assert ", attention flash (flash-attn 2.8.3.post2), loss" in said
    assert len(flash.calls) > 50
    for key in ("reward", "grad_norm", "kl", "entropy", "val_ndcg"):
        assert [row[key] for row in got if key in row] == pytest.approx(
            [row[key] for row in want if key in row], rel=1e-4, abs=1e-7
        ), key
    assert max(row["sampling_logp_diff_max"] for row in got) < 2e-4


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
    except AttentionUnavailable as e:
        pytest.skip(str(e))
    generator = torch.Generator().manual_seed(0)
    for layout in LAYOUTS.values():
        lengths, own, prompt_of = (torch.tensor(x, dtype=torch.int64) for x in layout)
        lengths = lengths * 37
        own = own * 29
        exact = [
            torch.randn(int(lengths.sum() + own.sum()), n, dim, generator=generator)
            .bfloat16()
            .to(GPU)
            for n in (heads, kv_heads, kv_heads, heads)
        ]

        def outcome(dtype, of):
            *inputs, toward = (x.to(dtype, copy=True) for x in exact)
            out = PackedAttention(lengths, own, prompt_of, GPU, of)(
                0, *(x.requires_grad_() for x in inputs)
            )
            return [x.float() for x in (out, *torch.autograd.grad(out, inputs, toward))]

        for want, sdpa, ours in zip(
            outcome(torch.float32, AttentionBackend()),
            outcome(torch.bfloat16, AttentionBackend()),
            outcome(torch.bfloat16, backend),
        ):
            assert (ours - want).norm() <= 4 * (sdpa - want).norm() + 1e-3 * want.norm()
