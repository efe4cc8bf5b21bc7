"""The memory plan: its verdicts on the paper's model, its prediction against what a step allocates,
and the command that prints it.
"""

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.tiny_world import jsonl, tiny_config, tiny_model, write_yaml
from test_cli import refused, run

from recr1 import cli, train
from recr1.config import loader as configs
from recr1.data_types import Prompt
from recr1.memory.estimate import MemoryEstimate, sum_bytes
from recr1.memory.plan import (
    advise_less_memory,
    apply_overrides,
    format_announcement,
    get_usable_bytes,
    make_plan,
    parse_bytes,
    try_settings,
)
from recr1.model.decoder import Decoder
from recr1.model.packed_attention import PackedAttention
from recr1.model.varlen_attention import AttentionBackend, VarlenAttention
from recr1.sampling.generate import generate, make_cache
from recr1.sampling.kv_cache import count_slots
from recr1.training.dry_run import read_model_shape
from recr1.training.launch import run_guarded

ROOT = Path(__file__).resolve().parents[3]
PAPER = str(ROOT / "experiments/configs/rec_r1/esci_bm25_3b.yaml")
NUM_WEIGHTS = 3_085_938_688  # of Qwen2.5-3B, as published


def load_config_and_shape(path=PAPER, *overrides):
    cfg = configs.load_config(path, list(overrides))
    shape = read_model_shape(cfg.model.path, path)
    return cfg, shape


def find_advice(ranks: int, memory: str, *overrides) -> dict | None:
    """Return what the plan advises; None where nothing fits."""
    cfg, shape = load_config_and_shape(PAPER, *overrides)
    usable = get_usable_bytes(parse_bytes(memory))
    options, estimate = try_settings(cfg, shape, ranks, usable)[-1]
    if estimate.peak() > usable:
        return None
    return options


def test_the_papers_3b_fits_where_it_should():
    cfg, shape = load_config_and_shape()
    assert MemoryEstimate(cfg, shape, 1).num_weights == NUM_WEIGHTS

    # nothing on the host, nothing else changed
    assert find_advice(2, "48GB") == {}
    assert find_advice(2, "80GB") == {}
    assert find_advice(1, "48GB") == {"optimizer.cpu_offload": True}
    assert find_advice(1, "80GB") == {}
    assert find_advice(1, "24GB") is None


def test_advice_goes_from_cheap_to_dear():
    many_tokens = "train.tokens_per_micro_batch=131072"
    no_checkpointing = "train.gradient_checkpointing=false"
    late_sync = "train.gradient_sync=last_micro_batch"

    advice = find_advice(2, "48GB", many_tokens)
    assert advice == {"train.tokens_per_micro_batch": 32768}

    advice = find_advice(1, "80GB", no_checkpointing)
    assert advice == {"train.gradient_checkpointing": True}

    advice = find_advice(1, "68GB", no_checkpointing)
    assert advice == {
        "train.gradient_checkpointing": True,
        "loss.reference_cpu_offload": True,
    }

    # fewer tokens before more work
    assert find_advice(1, "141GiB", no_checkpointing) == {}
    advice = find_advice(1, "110GB", no_checkpointing)
    assert advice == {"train.tokens_per_micro_batch": 8192}

    advice = find_advice(2, "41GB", late_sync)
    assert advice == {"train.gradient_sync": "every_micro_batch"}

    # no reference, and the longest text
    cfg, shape = load_config_and_shape(PAPER, "loss.kl_coef=0")
    tried_options = [options for options, _ in try_settings(cfg, shape, 1, 0.0)]
    assert tried_options[:2] == [{}, {"optimizer.cpu_offload": True}]
    assert tried_options[-1]["train.tokens_per_micro_batch"] == 768


def read_terms(estimate: MemoryEstimate, phase: str) -> dict[str, float]:
    """Return {name of the term: bytes} of one phase."""
    terms = estimate.phases()[phase]
    return {term.name: term.bytes for term in terms}


def test_terms_by_hand():
    """Qwen2.5-3B on two ranks, from its config.json: what is large, computed here once more."""
    cfg, shape = load_config_and_shape()
    estimate = MemoryEstimate(cfg, shape, 2)
    num_layers = 36
    root_weights = 151_936 * 2048 + 2048
    block_weights = (NUM_WEIGHTS - root_weights) // num_layers
    bytes_per_slot = num_layers * 2 * 2 * 128 * 2  # keys and values, heads, numbers, bytes
    num_texts = 16 * 12

    update = read_terms(estimate, "update")
    assert update == {
        "master weights": 2 * NUM_WEIGHTS,
        "Adam's moments": 4 * NUM_WEIGHTS,
        "reference": NUM_WEIGHTS,
        "gradients": 2 * NUM_WEIGHTS,
        "cache, kept": 0,
        "moments on their way": 0,
        "gradient norm": 0,
    }

    sampling = read_terms(estimate, "sampling")
    assert sampling["cache"] == num_texts * 768 * bytes_per_slot
    assert sampling["rows copied"] == (num_texts - 16) * 256 * bytes_per_slot
    assert sampling["distribution"] == 8 * num_texts * 151_936
    assert sampling["gathered root"] == 2 * root_weights

    training = read_terms(estimate, "training")
    assert training["activations kept"] <= num_layers * 16_384 * 2048 * 2
    assert training["gathered blocks"] == 2.5 * 2 * block_weights

    offloaded_cfg = apply_overrides(cfg, {"optimizer.cpu_offload": True})
    offloaded_update = MemoryEstimate(offloaded_cfg, shape, 2).phases()["update"]
    assert offloaded_update[1].bytes == 0


LORA = str(ROOT / "experiments/configs/rec_r1/esci_bm25_3b_lora.yaml")


def test_lora_fits_a_small_card():
    """As its config's header says: 24 GB as configured, 16 GB with a smaller cache or budget."""
    cfg, shape = load_config_and_shape(LORA)

    text, why_nothing_fits = make_plan(cfg, shape, 1, 24e9)
    assert not why_nothing_fits
    assert "fits as configured" in text
    assert "59,867,136 of them trained" in text

    smaller = ["sampling.kv_cache_gib=4", "train.tokens_per_micro_batch=4096"]
    cfg, shape = load_config_and_shape(LORA, *smaller)
    assert MemoryEstimate(cfg, shape, 1).peak() <= get_usable_bytes(16e9)

    # moments so small are not worth their way to the host, and there is no second reference
    cfg, shape = load_config_and_shape(LORA)
    for options, _ in try_settings(cfg, shape, 1, 0.0):
        assert "optimizer.cpu_offload" not in options
        assert "loss.reference_cpu_offload" not in options


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_state_of_lora_by_hand(ranks):
    """Bytes per rank: 2 for a frozen weight, 16 for a trained one while there are gradients."""
    cfg, shape = load_config_and_shape(LORA)
    rank = cfg.lora.rank
    width, inner, kv = 2048, 11_008, 256
    in_and_out = [
        (width, width),  # q
        (width, kv),
        (width, kv),
        (width, width),  # o
        (width, inner),
        (width, inner),
        (inner, width),
    ]
    adapters = 36 * sum(rank * (inputs + outputs) for inputs, outputs in in_and_out)

    update = read_terms(MemoryEstimate(cfg, shape, ranks), "update")

    assert update["master weights"] == (2 * NUM_WEIGHTS + 4 * adapters) / ranks
    assert update["Adam's moments"] == 8 * adapters / ranks
    assert update["gradients"] == 4 * adapters / ranks
    assert update["reference"] == 0
    assert cfg.loss.kl_coef > 0


def test_a_frozen_head_has_no_gradient():
    cfg, shape = load_config_and_shape(PAPER, "train.frozen=model.embed_tokens.*")
    estimate = MemoryEstimate(cfg, shape, 1)
    assert shape.tie_word_embeddings
    for moment in estimate.iterate_training_moments():
        for term in moment:
            if term.name.startswith("head: d weight"):
                assert term.bytes == 0
            if term.name == "root's gradient":  # the norm's only
                assert term.bytes < 1e6


def test_a_cache_that_is_limited_limits_what_runs():
    """sampling.kv_cache_gib: rows that wait are not copied, and have no distribution."""
    cfg, shape = load_config_and_shape()
    limited = apply_overrides(cfg, {"sampling.kv_cache_gib": 2.0})
    rows = 2 * 2**30 // (36_864 * 768)  # 36,864 bytes of a token's keys and values

    sampling = read_terms(MemoryEstimate(limited, shape, 1), "sampling")

    assert rows == 75
    assert sampling["cache"] == rows * 768 * 36_864
    assert sampling["distribution"] == 8 * rows * 151_936


def measure_peaks(cfg, shape, gpu: bool, option_sets: list[dict]) -> list[float]:
    """Return the predicted peak on one rank with each set of options."""
    peaks = []
    for options in option_sets:
        changed_cfg = apply_overrides(cfg, options)
        estimate = MemoryEstimate(changed_cfg, shape, 1, gpu)
        peaks.append(estimate.peak())
    return peaks


def check_never_rises(peaks: list[float]) -> None:
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] > 0


OFFLOADS = [
    {},
    {"loss.reference_cpu_offload": True},
    {"loss.reference_cpu_offload": True, "optimizer.cpu_offload": True},
]
FROZEN = [
    {},
    {"train.frozen": "*.mlp.*"},
    {"train.frozen": "*"},
]


@pytest.mark.parametrize(
    "name",
    ["configs/rec_r1/esci_bm25_3b.yaml", "configs/cpu/esci_small.yaml", "quickstart.yaml"],
)
def test_more_of_what_saves_memory_never_needs_more(name):
    cfg, shape = load_config_and_shape(str(ROOT / "experiments" / name))
    longest = cfg.prompt.max_tokens + cfg.sampling.max_new_tokens
    budgets = []
    for tokens in (65_536, 16_384, 4096, longest):
        budgets.append({"train.tokens_per_micro_batch": tokens})

    for gpu in (True, False):
        peaks_of_ranks = []
        for ranks in (1, 2, 4, 8):
            estimate = MemoryEstimate(cfg, shape, ranks, gpu)
            peaks_of_ranks.append(estimate.peak())
        check_never_rises(peaks_of_ranks)

        for option_sets in (budgets, OFFLOADS, FROZEN):
            peaks = measure_peaks(cfg, shape, gpu, option_sets)
            check_never_rises(peaks)


def record_cache_sizes(cache) -> set[int]:
    """Return a set that gets the bytes of the cache after each time it may have grown."""
    sizes = set()
    reserve = cache._reserve

    def reserve_and_record(*need):
        reserve(*need)
        sizes.add(cache.kv.nbytes)

    cache._reserve = reserve_and_record
    return sizes


def draw_prompts(num_prompts: int, prompt_len: int, vocab_size: int) -> list[Prompt]:
    rng = torch.Generator().manual_seed(0)
    prompts = []
    for i in range(num_prompts):
        ids = torch.randint(vocab_size, (prompt_len,), generator=rng)
        prompt = Prompt(f"q{i}", i, "", tuple(ids.tolist()))
        prompts.append(prompt)
    return prompts


# prompts, samples of each, tokens of a prompt, new tokens
CACHE_SHAPES = [
    (3, 4, 9, 12),
    (2, 2, 40, 3),
    (5, 1, 17, 30),
    (1, 8, 4, 64),
]


@pytest.mark.parametrize("num_prompts, group_size, prompt_len, new_tokens", CACHE_SHAPES)
def test_the_cache_grows_as_planned(num_prompts, group_size, prompt_len, new_tokens):
    model = tiny_model(std=0.02)
    cache = make_cache(model)
    sizes = record_cache_sizes(cache)
    prompts = draw_prompts(num_prompts, prompt_len, model.config.vocab_size)
    uniforms = np.random.default_rng(0).random((num_prompts, group_size, new_tokens))

    no_stops = frozenset()
    generate(model, prompts, group_size, 1.0, new_tokens, no_stops, uniforms, cache)

    lengths = [f"prompt.max_tokens={prompt_len}", f"sampling.max_new_tokens={new_tokens}"]
    cfg = configs.load_config(str(ROOT / "experiments/quickstart.yaml"), lengths)
    train_cfg = replace(cfg.train, prompts_per_step=num_prompts)
    cfg = replace(cfg, train=train_cfg)
    estimate = MemoryEstimate(cfg, model.config, 1, gpu=False)
    assert sizes == set(estimate.count_cache_growth(num_prompts, group_size))


def test_a_gpus_cache_has_its_full_size_at_once():
    """CUDA graphs need it where it is: generate reserves it (KVCache.reset)."""
    model = tiny_model(std=0.02)
    cfg = configs.load_config(
        str(ROOT / "experiments/quickstart.yaml"),
        ["prompt.max_tokens=40", "sampling.max_new_tokens=30", "model.compute=float32"],
    )
    cache = make_cache(model)
    cache.reset(6, count_slots(40 + 30), reserve=True)

    growth = MemoryEstimate(cfg, model.config, 1, gpu=True).count_cache_growth(2, 3)

    assert set(growth) == {cache.kv.nbytes}
    sampling = MemoryEstimate(cfg, model.config, 1, gpu=True).iterate_sampling_moments(2, 3)
    names = {term.name for moment in sampling for term in moment}
    assert "cache" in names
    assert "cache before it grew" not in names


class KeepsLikeTorchs(torch.autograd.Function):
    """A kernel that computes nothing and keeps what torch's varlen_attn keeps for its backward:
    q, k, v, out and logsumexp (setup_context in torch/nn/attention/varlen.py).
    """

    @staticmethod
    def forward(ctx, q, k, v, *lengths):
        out = torch.zeros_like(q)
        logsumexp = q.new_zeros(q.shape[1], len(q), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out


# no row is padded at these lengths: the plan counts a few slots more at others
PROMPT_LEN = 16
COMPLETION_INPUTS = 48
NUM_PROMPTS = 2
GROUP_SIZE = 3


def measure_kept_by_autograd(shape) -> int:
    """Run a decoder on packed rows with varlen attention; return the bytes that its backward would
    need, weights left out.
    """
    decoder = Decoder(shape).bfloat16()
    weights = {weight.untyped_storage().data_ptr() for weight in decoder.parameters()}
    num_completions = NUM_PROMPTS * GROUP_SIZE
    attention = PackedAttention(
        torch.full((NUM_PROMPTS,), PROMPT_LEN),
        torch.full((num_completions,), COMPLETION_INPUTS),
        torch.arange(NUM_PROMPTS).repeat_interleave(GROUP_SIZE),
        "cpu",
        AttentionBackend("varlen", partial(VarlenAttention, KeepsLikeTorchs.apply)),
    )
    num_tokens = NUM_PROMPTS * PROMPT_LEN + num_completions * COMPLETION_INPUTS
    tokens = torch.zeros(num_tokens, dtype=torch.int64)
    kept = {}

    def keep(tensor):
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder(tokens, tokens, attention)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_varlen_keeps_what_the_plan_counts(family):
    """One block's activations, as the difference of three blocks and two."""
    shape = tiny_config(family=family, head_dim=16, hidden_size=64, num_attention_heads=4)
    cfg = configs.load_config(
        PAPER,
        [
            f"prompt.max_tokens={PROMPT_LEN}",
            f"sampling.max_new_tokens={COMPLETION_INPUTS + 1}",
            f"sampling.group_size={GROUP_SIZE}",
            f"train.prompts_per_step={NUM_PROMPTS}",
        ],
    )
    estimate = MemoryEstimate(cfg, shape, 1, gpu=True)
    assert estimate.uses_varlen

    three = measure_kept_by_autograd(replace(shape, num_hidden_layers=3))
    two = measure_kept_by_autograd(replace(shape, num_hidden_layers=2))

    predicted = estimate._count_training_terms().block_activations
    assert predicted / (three - two) == pytest.approx(1, abs=0.02)


def test_which_attention_is_counted():
    def uses_varlen(*overrides, gpu=True):
        cfg, shape = load_config_and_shape(PAPER, *overrides)
        return MemoryEstimate(cfg, shape, 1, gpu).uses_varlen

    assert uses_varlen()
    assert uses_varlen("model.attention=flash")
    assert not uses_varlen("model.attention=sdpa")
    assert not uses_varlen("model.compute=float32")
    assert not uses_varlen(gpu=False)


def test_what_is_already_in_host_memory_cannot_go_there():
    """On a CPU no setting moves anything to the host, and the plan does not advise it."""
    cfg, shape = load_config_and_shape(PAPER, "optimizer.cpu_offload=true")
    offloaded = apply_overrides(cfg, {"loss.reference_cpu_offload": True})
    kept = apply_overrides(cfg, {"optimizer.cpu_offload": False})

    peaks = [MemoryEstimate(c, shape, 1, gpu=False).peak() for c in (kept, offloaded)]
    assert peaks[0] == peaks[1]


def test_who_has_run_out_of_memory_is_to_need_less():
    """Also where the plan had said that it fits, and on a CPU, whose size it does not know."""
    for overrides, gpu, memory in (
        ([], True, 200e9),
        (["train.gradient_checkpointing=false"], False, None),
    ):
        cfg, shape = load_config_and_shape(PAPER, *overrides)
        estimate = MemoryEstimate(cfg, shape, 1, gpu)

        advice = advise_less_memory(estimate, memory)

        added = dict(word.split("=") for word in advice.removeprefix("add ").split())
        settings = {key: yaml.safe_load(value) for key, value in added.items()}
        less = MemoryEstimate(apply_overrides(cfg, settings), shape, 1, gpu)
        assert less.peak() <= 0.9 * estimate.peak()

    assert "take more GPUs" in advise_less_memory(MemoryEstimate(cfg, shape, 1), 8e9)


def test_predictions_are_within_a_tenth_of_what_a_step_allocates():
    """The bench's quick cases; see there. The whole table: python experiments/benchmarks/plan.py"""
    command = [sys.executable, str(ROOT / "experiments/benchmarks/plan.py"), "--quick"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    output = process.stdout + process.stderr
    assert process.returncode == 0, output

    last_line = process.stdout.splitlines()[-1]
    bars = json.loads(last_line)["bars"]
    assert len(bars) == 6, output
    for bar in bars:
        assert bar["ok"], output
        assert abs(bar["value"] - 1) <= 0.1, output


def test_the_command_says_what_to_add(capsys):
    flags = ["--gpus", 1, "--memory", "48GB"]

    output = run(capsys, "plan", PAPER, *flags)

    assert "optimizer.cpu_offload=true" in output.splitlines()[-2]
    assert re.search(r"too much +as configured", output)
    sums = re.search(r"^sum((?: +[\d.]+)+)$", output, re.MULTILINE)[1].split()
    cfg, shape = load_config_and_shape(PAPER, "optimizer.cpu_offload=true")
    expected_sums = []
    for terms in MemoryEstimate(cfg, shape, 1).phases().values():
        gib = sum_bytes(terms) / 2**30
        expected_sums.append(round(gib, 1))
    assert [float(total) for total in sums] == expected_sums

    overrides = ["optimizer.cpu_offload=true", "train.tokens_per_micro_batch=8192"]
    output = run(capsys, "plan", PAPER, overrides[0], *flags, overrides[1])
    assert "fits as configured" in output


def test_a_plan_without_room_for_more_tokens():
    """Nothing larger than the config's token budget fits: the plan says only what to add."""
    cfg, shape = load_config_and_shape()

    text, why_nothing_fits = make_plan(cfg, shape, 4, 24e9)

    assert not why_nothing_fits
    assert "there is room for" not in text


BAD_FLAGS = [
    ["--gpus", "0", "--memory", "48GB"],
    ["--gpus", "1"],
    ["--gpus", "1", "--memory", "48GB", "--fast"],
]


def test_bad_input_is_one_line(tmp_path, capsys):
    def refuse(memory, *overrides, config=PAPER):
        return refused(capsys, "plan", config, "--gpus", 1, "--memory", memory, *overrides)

    assert "take --gpus 2" in refuse("24GB")
    assert "nor do 64" in refuse("2GiB")
    assert "--memory" in refuse("48")
    assert "48GB" in refuse("much")
    assert "shapes.yaml" in refuse("48GB", "model.path=some/model")
    assert "unknown key train.stepz" in refuse("48GB", "train.stepz=1")
    message = refuse("48GB", "train.tokens_per_micro_batch=700")
    assert "exceeds train.tokens_per_micro_batch" in message
    assert "no such file" in refuse("48GB", config=tmp_path / "none.yaml")

    for flags in BAD_FLAGS:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["plan", PAPER, *flags])
        assert stopped.value.code == 2

    assert parse_bytes("141GiB") == 141 * 2**30
    assert parse_bytes("47.5 GB") == 47.5e9


ANNOUNCEMENT = (
    r"memory predicted per rank, at most: "
    r"sample [\d,]+ MiB, train [\d,]+ MiB, evaluate [\d,]+ MiB\n"
)


def test_a_run_says_what_it_expects_and_logs_what_it_took(tmp_path, capsys):
    assert run_guarded(train.main, [write_yaml(tmp_path), "train.steps=2"]) == 0
    output = capsys.readouterr().out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    memory = summary["memory"]
    rows = jsonl(tmp_path / "run/metrics.jsonl")

    assert re.search(ANNOUNCEMENT, output)
    assert set(memory["predicted"]) == {"sample", "train", "evaluate"}
    assert set(memory["measured"]) - {"reward"} == {"sample", "train", "evaluate"}
    if torch.cuda.is_available():
        assert memory["of"] == "torch.cuda.max_memory_allocated"
    else:
        assert memory["of"] in ("VmHWM", "ru_maxrss")

    first_row = rows[0]["memory"]
    assert "sample" in first_row
    assert "train" in first_row
    assert min(first_row.values()) > 1 << 20
    for phase in ("sample", "train"):
        most = max(row["memory"][phase] for row in rows)
        assert memory["measured"][phase] == most


def test_a_run_that_may_not_fit_says_so():
    cfg, shape = load_config_and_shape()
    estimate = MemoryEstimate(cfg, shape, 1)

    assert "\n" not in format_announcement(estimate, None)
    assert "\n" not in format_announcement(estimate, 80e9)
    assert "this fits: optimizer.cpu_offload=true" in format_announcement(estimate, 48e9)
    assert "take more GPUs" in format_announcement(estimate, 8e9)
