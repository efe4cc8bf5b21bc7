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
# the kernels that round to 16 bits, and those that write too little for 128-bit stores
ROUNDING = ("gradient", "joined", "norm", "norm_grad", "rotary", "swiglu", "swiglu_grad")
NARROW_STORES = ("advantage", "statistics", "choose")
BENCHED = ("fused", "joined", "recompute", "eager")
pytest.importorskip(
    "triton", reason="the package triton is not installed: no Triton kernel was tested"
)


def run_python(tmp_path, *arguments, **variables):
    """Run Python in a process and with a cache of its own; variables: of its environment.

    Triton reads TRITON_INTERPRET once, at its import; nothing compiled earlier is looked at.
    """
    env = dict(os.environ)
    env.pop("TRITON_INTERPRET", None)
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env.update(variables)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_in_the_interpreter(tmp_path):
    random_seed = random.randrange(2**31)
    seed = os.environ.get("RECR1_SEED", str(random_seed))

    process = run_python(
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
        "tests/gpu/interpret_decoder_layer.py",
        TRITON_INTERPRET="1",
        RECR1_SEED=seed,
        PYTHONHASHSEED="0",
    )

    assert process.returncode == 0, f"RECR1_SEED={seed}\n{process.stdout}\n{process.stderr}"


def test_machine_code(tmp_path):
    """No spills; at most 128 registers; 128-bit loads and stores wherever rows of memory are
    walked; a new length compiles nothing.
    """
    process = run_python(tmp_path, "tests/gpu/compile_kernels.py", "80", "90", "100")

    assert process.returncode == 0, process.stderr
    last_line = process.stdout.splitlines()[-1]
    code_of = json.loads(last_line)
    assert code_of.pop("variants") == 1
    assert len(code_of) == 54
    for name, code in code_of.items():
        kernel = name.split()[0]
        assert code["spills"] == 0, (name, code)
        assert code["registers"] <= 128, (name, code)
        assert code["cut"] == 0, (name, code)
        if "advantage" not in name:  # it reads a dozen numbers
            assert code["wide_loads"] > 0, (name, code)
        if kernel in ROUNDING:
            assert code["rounded"] > 0, (name, code)
        if kernel not in NARROW_STORES:
            assert code["wide_stores"] > 0, (name, code)


def test_bench_runs_dry(tmp_path):
    process = run_python(tmp_path, "-W", "ignore", "experiments/benchmarks/kernels.py", "--dry-run")

    assert process.returncode == 0, process.stderr
    for name in BENCHED:
        assert name in process.stdout
    assert "fused: skipped" not in process.stdout
    last_line = process.stdout.splitlines()[-1]
    assert json.loads(last_line)["bars"]
