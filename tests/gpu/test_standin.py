"""The GPU path on a CPU: the program on a stand-in GPU (standin/README.md). The checks run in
processes of their own, where the stand-in is there before torch.

Skipped aloud where the stand-in cannot be built: it takes private parts of one torch.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
STANDIN = ROOT / "tests/gpu/standin"
# what is tested on a GPU where there is one; Triton's kernels do not run on the stand-in
GPU_TESTS = ("unit/sampling/test_cuda_graphs.py", "unit/model/test_attention.py")


def explain_unavailable() -> str | None:
    """Say why there is no stand-in GPU here; None: there is one."""
    pins = (ROOT / "experiments/constraints.txt").read_text(encoding="utf-8")
    [pinned] = re.findall(r"^torch==(\S+)", pins, re.MULTILINE)
    release = torch.__version__.split("+")[0]
    if not sys.platform.startswith("linux"):
        return f"the stand-in GPU is built on Linux only, this is {sys.platform}"
    if release != pinned:
        return f"the stand-in GPU takes private parts of torch {pinned}, this is {release}"
    if torch.version.cuda or torch.version.hip:
        return f"the stand-in GPU needs a torch without GPUs, this is {torch.__version__}"
    if shutil.which("g++") is None:
        return "the stand-in GPU needs g++, which is not installed"
    return None


REASON = explain_unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    """Run Python where the product and the stand-in are found."""
    env = dict(os.environ, OMP_NUM_THREADS="1")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def run_pytest(*arguments: str) -> str:
    """Run tests on the stand-in; return pytest's last line."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "gpu.standin.plugin"]
    process = run_python("-m", "pytest", *options, *arguments)
    assert process.returncode == 0, f"{process.stdout}\n{process.stderr}"
    return process.stdout.splitlines()[-1]


def locate_checks(*names: str) -> list[str]:
    return [str(STANDIN / f"check_{name}.py") for name in names]


def test_rules_streams_graphs_and_waits():
    checks = locate_checks("rules", "streams", "graphs", "waits")

    summary = run_pytest(*checks)

    assert "skipped" not in summary


def test_whole_runs():
    checks = locate_checks("dry_runs")

    summary = run_pytest(*checks)

    assert "skipped" not in summary


def test_the_tests_that_need_a_gpu():
    """Those of captured decode steps and of varlen attention; flash-attn is not installed."""
    paths = [str(ROOT / "tests" / path) for path in GPU_TESTS]

    summary = run_pytest(*paths, "-k", "on_a_gpu and not triton")

    num_passed = int(re.search(r"(\d+) passed", summary)[1])
    assert num_passed >= 21


def test_two_ranks():
    """ZeRO-3 with the reference and AdamW's moments in host memory."""
    process = run_python(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "gpu.standin.run",
        "train",
        "experiments/configs/rec_r1/esci_bm25_3b.yaml",
        "optimizer.cpu_offload=true",
        "loss.reference_cpu_offload=true",
        "--dry-run",
    )

    assert process.returncode == 0, f"{process.stdout}\n{process.stderr}"
    assert "2 x cuda" in process.stdout
    for rank in (0, 1):
        assert f"rank {rank}: " in process.stdout
