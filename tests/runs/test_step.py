"""The bench of a whole step, in small: it runs, and both sides compute the same. Skipped aloud
without TRL.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip(
    "trl", reason="the package trl is not installed: the bench of a whole step was not run"
)


def test_bench_runs_dry():
    env = os.environ | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    command = [
        sys.executable,
        "experiments/benchmarks/step.py",
        "--dry-run",
        "--pairs",
        "2",
        "--threads",
        "1",
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = {
        words[0]: words[1:]
        for words in map(str.split, done.stdout.splitlines())
        if words[0] in ("seconds", "TRL", "ours") and words[1] != "/"
    }
    for who in ("TRL", "ours"):
        row = dict(zip(table["seconds"], map(float, table[who])))
        assert row["length"] == 8
        assert 0 < row["reward"] < 1
        assert row["norm"] > 0
        assert row["step"] > 0
    time, gradient = json.loads(done.stdout.splitlines()[-1])["bars"]
    assert time["ok"]
    assert gradient["ok"]
    assert gradient["value"] < 1e-5
