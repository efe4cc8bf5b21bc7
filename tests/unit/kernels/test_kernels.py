"""Triton without a GPU: the kernels in its interpreter, and their machine code for GPUs that are
not here. Skipped aloud without Triton.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytest.importorskip(
    "triton", reason="the package triton is not installed: no Triton kernel was tested"
)


def run(tmp_path, *command, **more):
    # a process of its own: Triton reads TRITON_INTERPRET once, at its import; a cache of its own:
    # nothing compiled earlier is looked at
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= (
        dict(
            TRITON_CACHE_DIR=str(tmp_path),
            PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        )
        | more
    )
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True
    )


def test_in_the_interpreter(tmp_path):
    seed = os.environ.get("RECR1_SEED", str(random.randrange(2**31)))
    done = run(
        tmp_path,
        "-m",
        "pytest",
        "-q",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        "tests/gpu/interpret_kernels.py",
        "tests/gpu/interpret_sample_token.py",
        TRITON_INTERPRET="1",
        RECR1_SEED=seed,
        PYTHONHASHSEED="0",
    )
    assert done.returncode == 0, f"RECR1_SEED={seed}\n{done.stdout}\n{done.stderr}"


def test_machine_code(tmp_path):
    """No spills; at most 128 registers; 128-bit loads and stores wherever rows of memory are
    walked; a new length compiles nothing.
    """
    done = run(tmp_path, "tests/gpu/compile_kernels.py", "80", "90", "100")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("variants") == 1
    assert len(found) == 36
    for name, code in found.items():
        assert code["spills"] == 0 and code["registers"] <= 128, (name, code)
        # advantage reads a dozen numbers
        assert code["wide_loads"] > 0 or "advantage" in name, (name, code)
        assert code["cut"] == 0 and (
            code["rounded"] > 0 or name.split()[0] not in ("gradient", "joined")
        ), (name, code)
        assert code["wide_stores"] > 0 or name.split()[0] in (
            "advantage",
            "statistics",
            "choose",
        ), (name, code)


def test_bench_runs_dry(tmp_path):
    done = run(tmp_path, "-W", "ignore", "experiments/benchmarks/kernels.py", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("fused", "joined", "recompute", "eager"))
    assert "fused: skipped" not in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["bars"]
