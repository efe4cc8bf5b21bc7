"""What a process sets, checks and says for a GPU: shown on a CPU by the order of calls, and by what
torch itself says that it has read.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_world import jsonl, refused, write_yaml

from recr1 import train
from recr1.tracking.run_log import RunLog
from recr1.training import checkpoint, dry_run
from recr1.training.launch import run_guarded

ROOT = Path(__file__).resolve().parents[3]

READ_ALLOCATOR_SETTINGS = """
import recr1, torch
print(torch._C._accelerator_getAllocatorSettings())
"""

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@pytest.mark.parametrize(
    "chosen, expected",
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ],
)
def test_torchs_allocator_reads_our_settings_or_the_users(chosen, expected):
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment |= chosen | dict(PYTHONPATH=str(ROOT))

    done = subprocess.run(
        [sys.executable, "-c", READ_ALLOCATOR_SETTINGS],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.strip() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is torch's OpenMP on Linux alone")
@pytest.mark.parametrize(
    "chosen, expected",
    [
        ({}, "2000"),
        ({"GOMP_SPINCOUNT": "300000"}, "300000"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
    ],
)
def test_torchs_openmp_reads_our_way_of_waiting_or_the_users(chosen, expected):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= chosen | dict(PYTHONPATH=str(ROOT), OMP_DISPLAY_ENV="VERBOSE")

    done = subprocess.run(
        [sys.executable, "-c", "import recr1, torch"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )

    assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr


def test_fewer_gpus_than_ranks_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")

    line = refused(["config.yaml"], capsys)

    assert "2 ranks on a machine with 1 GPU(s)" in line
    assert "--nproc-per-node 1" in line
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    assert run_guarded(train.main, ["config.yaml"]) == 2
    assert not capsys.readouterr().err


def test_a_dry_run_draws_an_encoder_without_a_look_at_any_gpu(tmp_path, monkeypatch):
    """torch.random.fork_rng() would open a context on each of them."""
    tokenizer = dry_run._build_tokenizer([])
    tokenizer.save_pretrained(tmp_path / "policy")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: pytest.fail("asked a GPU"))

    dry_run._write_encoder(tmp_path)

    assert (tmp_path / "encoder/model.safetensors").exists()


def test_the_most_that_the_allocator_held_is_logged(tmp_path, monkeypatch):
    log = RunLog(tmp_path)
    with log.time_phase("sample"):
        pass
    assert "memory_reserved" not in log.add_timings({})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 700)
    for reserved in (900, 800):
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: reserved)
        with log.time_phase("sample"):
            pass
    row = log.add_timings({})

    assert row["memory"] == {"sample": 700}
    assert row["memory_reserved"] == {"sample": 900}
    assert log.reserved_peaks == {"sample": 900}
    assert not log.memory_reserved


@pytest.fixture
def deterministic_afterwards_off():
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_runs(tmp_path, monkeypatch, deterministic_afterwards_off):
    """torch is asked before anything is computed, and a CPU's bits stay as they are."""
    world = write_yaml(tmp_path, **{"train.steps": 2})
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    generate = train.generate
    seen = []

    def look_and_generate(*arguments, **options):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return generate(*arguments, **options)

    monkeypatch.setattr(train, "generate", look_and_generate)
    rows = []
    for setting in ("false", "true"):
        folder = tmp_path / setting
        argv = [world, f"run.deterministic={setting}", f"run.dir={folder}"]
        assert run_guarded(train.main, argv) == 0
        rows.append(jsonl(folder / "rollouts.jsonl.gz"))

    assert seen == [False, False, True, True]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert rows[0] == rows[1]
    weights = [tmp_path / setting / "model/model.safetensors" for setting in ("false", "true")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_gpu_does_not_promise_the_same_bits(monkeypatch, deterministic_afterwards_off):
    setting = dict(world=1, threads=1, torch="2.13.0", device="cuda", cpu="AVX2")
    monkeypatch.setattr(checkpoint, "_describe_setting", lambda *_: setting)

    assert checkpoint.list_differences(setting, None, None) == [
        "a GPU adds in any order, with run.deterministic=true in one"
    ]
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert checkpoint.list_differences(setting, None, None) == []
    monkeypatch.setitem(setting, "device", "cpu")
    torch.use_deterministic_algorithms(False)
    assert checkpoint.list_differences(setting, None, None) == []


def test_tests_do_not_see_a_gpu():
    """Unless the command says -m gpu, which leaves this one out."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
