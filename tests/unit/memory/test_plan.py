"""The memory plan: its verdicts on the paper's model, its prediction against what a step allocates,
and the command that prints it.
"""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_world import jsonl, tiny_model, write_yaml
from test_cli import refused, run

from recr1 import cli, train
from recr1.config import loader as configs
from recr1.data_types import Prompt
from recr1.memory.estimate import MemoryEstimate, sum_bytes
from recr1.memory.plan import (
    apply_overrides,
    format_announcement,
    get_usable_bytes,
    make_plan,
    parse_bytes,
    try_settings,
)
from recr1.sampling.generate import generate, make_cache
from recr1.training.dry_run import read_model_shape
from recr1.training.launch import run_guarded

ROOT = Path(__file__).resolve().parents[3]
PAPER = str(ROOT / "experiments/configs/rec_r1/esci_bm25_3b.yaml")


def loaded(path=PAPER, *overrides):
    cfg = configs.load_config(path, list(overrides))
    return cfg, read_model_shape(cfg.model.path, path)


def overrides(ranks: int, memory: str, *more) -> dict | None:
    """What the plan advises; None where nothing fits."""
    options, found = try_settings(
        *loaded(PAPER, *more), ranks, get_usable_bytes(parse_bytes(memory))
    )[-1]
    return options if found.peak() <= get_usable_bytes(parse_bytes(memory)) else None


def test_the_papers_3b_fits_where_it_should():
    assert MemoryEstimate(*loaded(), 1).num_weights == 3_085_938_688  # as published
    # nothing on the host, nothing else changed
    assert overrides(2, "48GB") == overrides(2, "80GB") == {}
    assert overrides(1, "48GB") == {"optimizer.cpu_offload": True}
    assert overrides(1, "80GB") == {}
    assert overrides(1, "24GB") is None


def test_advice_goes_from_cheap_to_dear():
    assert overrides(2, "48GB", "train.tokens_per_micro_batch=131072") == {
        "train.tokens_per_micro_batch": 32768
    }
    assert overrides(1, "80GB", "train.gradient_checkpointing=false") == {
        "train.gradient_checkpointing": True
    }
    assert overrides(1, "72GB", "train.gradient_checkpointing=false") == {
        "train.gradient_checkpointing": True,
        "loss.reference_cpu_offload": True,
    }
    # fewer tokens before more work
    assert overrides(1, "141GiB", "train.gradient_checkpointing=false") == {
        "train.tokens_per_micro_batch": 8192
    }
    assert overrides(2, "41GB", "train.gradient_sync=last_micro_batch") == {
        "train.gradient_sync": "every_micro_batch"
    }
    tried = [options for options, _ in try_settings(*loaded(PAPER, "loss.kl_coef=0"), 1, 0.0)]
    # no reference, and the longest text
    assert tried[:2] == [{}, {"optimizer.cpu_offload": True}]
    assert tried[-1]["train.tokens_per_micro_batch"] == 768


def test_terms_by_hand():
    """Qwen2.5-3B on two ranks, from its config.json: what is large, computed here once more."""
    cfg, shape = loaded()
    P = 3_085_938_688
    root = 151_936 * 2048 + 2048
    phases = MemoryEstimate(cfg, shape, 2).phases()
    block = (P - root) // 36
    found = {phase: {t.name: t.bytes for t in terms} for phase, terms in phases.items()}
    assert found["update"] == {
        "master weights": 2 * P,
        "Adam's moments": 4 * P,
        "reference": P,
        "gradients": 2 * P,
        "cache, kept": 0,
        "moments on their way": 0,
        "gradient norm": 0,
    }
    slot = 36 * 2 * 2 * 128 * 2  # layers, keys and values, heads, numbers, bytes
    assert found["sampling"]["cache"] == 16 * 12 * 768 * slot
    assert found["sampling"]["cache before it grew"] == 16 * 12 * 512 * slot
    assert found["sampling"]["distribution"] == 8 * 16 * 12 * 151_936
    assert found["sampling"]["gathered root"] == 2 * root
    assert found["training"]["activations kept"] <= 36 * 16_384 * 2048 * 2
    assert found["training"]["gathered blocks"] == 2.5 * 2 * block
    assert (
        MemoryEstimate(apply_overrides(cfg, {"optimizer.cpu_offload": True}), shape, 2)
        .phases()["update"][1]
        .bytes
        == 0
    )


@pytest.mark.parametrize(
    "name",
    ["configs/rec_r1/esci_bm25_3b.yaml", "configs/cpu/esci_small.yaml", "quickstart.yaml"],
)
def test_more_of_what_saves_memory_never_needs_more(name):
    cfg, shape = loaded(str(ROOT / "experiments" / name))
    longest = cfg.prompt.max_tokens + cfg.sampling.max_new_tokens
    for gpu in (True, False):

        def peak(ranks=1, **changes):
            return MemoryEstimate(
                apply_overrides(
                    cfg, {key.replace("__", "."): value for key, value in changes.items()}
                ),
                shape,
                ranks,
                gpu,
            ).peak()

        for ladder in (
            [peak(ranks) for ranks in (1, 2, 4, 8)],
            [peak(train__tokens_per_micro_batch=b) for b in (65_536, 16_384, 4096, longest)],
            [
                peak(),
                peak(loss__reference_cpu_offload=True),
                peak(loss__reference_cpu_offload=True, optimizer__cpu_offload=True),
            ],
            [peak(), peak(train__frozen="*.mlp.*"), peak(train__frozen="*")],
        ):
            assert ladder == sorted(ladder, reverse=True)
            assert ladder[-1] > 0


@pytest.mark.parametrize(
    "prompts,group,asked,new", [(3, 4, 9, 12), (2, 2, 40, 3), (5, 1, 17, 30), (1, 8, 4, 64)]
)
def test_the_cache_grows_as_planned(prompts, group, asked, new):
    model = tiny_model(std=0.02)
    g = torch.Generator().manual_seed(0)
    cache = make_cache(model)
    sizes = set()
    reserve = cache._reserve
    cache._reserve = lambda *need: (reserve(*need), sizes.add(cache.kv.nbytes))
    texts = [
        Prompt(
            f"q{i}",
            i,
            "",
            tuple(torch.randint(model.config.vocab_size, (asked,), generator=g).tolist()),
        )
        for i in range(prompts)
    ]
    generate(
        model,
        texts,
        group,
        1.0,
        new,
        frozenset(),
        np.random.default_rng(0).random((prompts, group, new)),
        cache,
    )
    cfg = configs.load_config(
        str(ROOT / "experiments/quickstart.yaml"),
        [f"prompt.max_tokens={asked}", f"sampling.max_new_tokens={new}"],
    )
    planned = MemoryEstimate(
        replace(cfg, train=replace(cfg.train, prompts_per_step=prompts)), model.config, 1, gpu=False
    )
    assert sizes == set(planned.count_cache_growth(prompts, group))


def test_predictions_are_within_a_tenth_of_what_a_step_allocates():
    """The bench's quick cases; see there. The whole table: python experiments/benchmarks/plan.py"""
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments/benchmarks/plan.py"), "--quick"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    bars = json.loads(done.stdout.splitlines()[-1])["bars"]
    assert (
        done.returncode == 0
        and len(bars) == 4
        and all(bar["ok"] and abs(bar["value"] - 1) <= 0.1 for bar in bars)
    ), done.stdout + done.stderr


def test_the_command_says_what_to_add(capsys):
    out = run(capsys, "plan", PAPER, "--gpus", 1, "--memory", "48GB")
    assert "optimizer.cpu_offload=true" in out.splitlines()[-2]
    assert re.search(r"too much +as configured", out)
    sums = re.search(r"^sum((?: +[\d.]+)+)$", out, re.MULTILINE)[1].split()
    assert [float(x) for x in sums] == [
        round(sum_bytes(terms) / 2**30, 1)
        for terms in MemoryEstimate(*loaded(PAPER, "optimizer.cpu_offload=true"), 1)
        .phases()
        .values()
    ]
    again = run(
        capsys,
        "plan",
        PAPER,
        "optimizer.cpu_offload=true",
        "--gpus",
        1,
        "--memory",
        "48GB",
        "train.tokens_per_micro_batch=8192",
    )
    assert "fits as configured" in again


def test_a_plan_without_room_for_more_tokens():
    """Nothing larger than the config's token budget fits: the plan says only what to add."""
    text, why = make_plan(*loaded(), 4, 24e9)
    assert not why
    assert "there is room for" not in text


def test_bad_input_is_one_line(tmp_path, capsys):
    def plan(*argv):
        return refused(capsys, "plan", *argv)

    assert "take --gpus 3" in plan(PAPER, "--gpus", 1, "--memory", "24GB")
    assert "nor do 64" in plan(PAPER, "--gpus", 1, "--memory", "2GiB")
    assert "--memory" in plan(PAPER, "--gpus", 1, "--memory", "48")
    assert "48GB" in plan(PAPER, "--gpus", 1, "--memory", "much")
    assert "shapes.yaml" in plan(PAPER, "--gpus", 1, "--memory", "48GB", "model.path=some/model")
    assert "unknown key train.stepz" in plan(
        PAPER, "--gpus", 1, "--memory", "48GB", "train.stepz=1"
    )
    assert "exceeds train.tokens_per_micro_batch" in plan(
        PAPER, "--gpus", 1, "--memory", "48GB", "train.tokens_per_micro_batch=700"
    )
    assert "no such file" in plan(tmp_path / "none.yaml", "--gpus", 1, "--memory", "48GB")
    for argv in (
        ["--gpus", "0", "--memory", "48GB"],
        ["--gpus", "1"],
        ["--gpus", "1", "--memory", "48GB", "--fast"],
    ):
        with pytest.raises(SystemExit) as e:
            cli.main(["plan", PAPER, *argv])
        assert e.value.code == 2
    assert parse_bytes("141GiB") == 141 * 2**30
    assert parse_bytes("47.5 GB") == 47.5e9


def test_a_run_says_what_it_expects_and_logs_what_it_took(tmp_path, capsys):
    assert run_guarded(train.main, [write_yaml(tmp_path), "train.steps=2"]) == 0
    assert re.search(
        r"memory predicted per rank, at most: "
        r"sample [\d,]+ MiB, train [\d,]+ MiB, evaluate [\d,]+ MiB\n",
        capsys.readouterr().out,
    )
    summary = json.loads((tmp_path / "run/summary.json").read_text())["memory"]
    rows = jsonl(tmp_path / "run/metrics.jsonl")
    assert (
        summary["predicted"].keys()
        == {"sample", "train", "evaluate"}
        == summary["measured"].keys() - {"reward"}
    )
    assert (
        summary["of"] == "torch.cuda.max_memory_allocated"
        if torch.cuda.is_available()
        else summary["of"] in ("VmHWM", "ru_maxrss")
    )
    assert {"sample", "train"} <= rows[0]["memory"].keys()
    assert min(rows[0]["memory"].values()) > 1 << 20
    assert all(
        summary["measured"][phase] == max(row["memory"][phase] for row in rows)
        for phase in ("sample", "train")
    )


def test_a_run_that_may_not_fit_says_so():
    found = MemoryEstimate(*loaded(), 1)
    assert "\n" not in format_announcement(found, None)
    assert "\n" not in format_announcement(found, 80e9)
    assert "this fits: optimizer.cpu_offload=true" in format_announcement(found, 48e9)
    assert "take more GPUs" in format_announcement(found, 8e9)
