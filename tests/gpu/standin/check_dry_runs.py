"""Whole runs on the stand-in: the dry run of every experiment's config, and of one config with the
options that change what the GPU does.

A run passes when it ends with 0, has no operand on a wrong device (that would raise), mixes no
number of the host into an operation of the GPU, and has no race between streams. Without
RECR1_STANDIN=all the configs and options of EVERY_TIME run: those that take other paths.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from recr1 import sft, train
from recr1.config import loader as configs
from recr1.training import dry_run
from recr1.training.launch import run_guarded

ROOT = Path(__file__).resolve().parents[3]
RUNS_ALL = os.environ.get("RECR1_STANDIN") == "all"

CONFIGS = [ROOT / "experiments/quickstart.yaml"]
for folder in ("rec_r1", "recllm_r1", "cpu"):
    CONFIGS += sorted((ROOT / "experiments/configs" / folder).glob("*.yaml"))

ONE_CONFIG = ROOT / "experiments/configs/rec_r1/esci_bm25_3b.yaml"
OPTIONS = {
    "head recomputed": ["model.head=recompute"],
    "float32 head": ["model.head_float32=true"],
    "on the host": ["optimizer.cpu_offload=true", "loss.reference_cpu_offload=true"],
    "mini-batches": ["train.num_mini_batches=2"],
    "KL in the reward": ["loss.kl_in=reward"],
    "GSPO": ["loss.kind=gspo", "model.head=recompute"],
    "DAPO": ["loss.kind=dapo", "sampling.dynamic_sampling=2", "reward.overlong_buffer=4"],
    "CISPO": ["loss.kind=cispo", "loss.agg_mode=seq-mean-token-mean"],
    "top_p": ["sampling.top_p=0.9"],
    "frozen weights": ["train.frozen=model.embed_tokens.*, *norm.weight"],
    "SDPA": ["model.attention=sdpa"],
    "float32": ["model.compute=float32"],
    "no recomputation": ["train.gradient_checkpointing=false", "loss.tis_cap=2"],
    "small cache": ["sampling.kv_cache_gib=0.0005"],
    "small micro-batches": [],  # see `small_micro_batches`
}

# esci_bm25_3b and esci_dense_3b run in check_waits.py
EVERY_TIME = {
    "esci_sft_3b.yaml",
    "recllm_grpo_1.5b.yaml",
    "on the host",
    "float32 head",
    "small cache",
    "small micro-batches",
}


def choose(cases):
    """Choose the cases that run: all of them, or those of EVERY_TIME."""
    chosen = []
    for case in cases:
        name = case.name if isinstance(case, Path) else case
        if RUNS_ALL or name in EVERY_TIME:
            chosen.append(pytest.param(case, id=name))
    return chosen


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def check_run(arguments, activity, capsys):
    """Run a config's loop; check what it printed, and what the stand-in saw."""
    config = configs.load_config(arguments[0], [])
    loop = sft if config.sft.teacher else train

    code = run_guarded(loop.main, [*arguments, "--dry-run"])

    output = capsys.readouterr()
    assert code == 0, output.err
    assert "dry run passed" in output.out
    assert "1 x cuda" in output.out
    assert activity.count_launches() > 1000
    assert not activity.host_numbers
    assert not activity.races


@pytest.mark.parametrize("path", choose(CONFIGS))
def test_configs(path, gpu_activity, capsys):
    if path.name.endswith("dense_3b.yaml") or path.name == "msrd_dense.yaml":
        # the other index, HNSW, is faiss's: no GPU
        check_run([str(path), "retriever.index=exact"], gpu_activity, capsys)
    else:
        check_run([str(path)], gpu_activity, capsys)


@pytest.fixture
def small_micro_batches(request, monkeypatch):
    """Let the dry run of that name have many micro-batches, where others have one or two.

    Its prompts have 490 tokens: even a group is split.
    """
    shrink = dry_run._shrink

    def shrink_further(config, folder):
        small = shrink(config, folder)
        return replace(
            small,
            prompt=replace(small.prompt, max_tokens=512),
            train=replace(small.train, tokens_per_micro_batch=540),
        )

    if request.node.callspec.id == "small micro-batches":
        monkeypatch.setattr(dry_run, "_shrink", shrink_further)


@pytest.mark.parametrize("name", choose(OPTIONS))
def test_options(name, gpu_activity, capsys, small_micro_batches):
    check_run([str(ONE_CONFIG), *OPTIONS[name]], gpu_activity, capsys)


def test_every_name_of_every_time_exists():
    names = {path.name for path in CONFIGS} | OPTIONS.keys()
    assert EVERY_TIME <= names
