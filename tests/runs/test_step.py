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


def run_bench() -> list[str]:
    """Run two pairs of the bench on the tiny model; return the lines it prints."""
    env = os.environ | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    command = [sys.executable, "experiments/benchmarks/step.py", "--dry-run"]
    command += ["--pairs", "2", "--threads", "1"]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def read_table(lines: list[str]) -> dict[str, list[str]]:
    """Read the rows of the table: {the row's first word: its other words}."""
    table = {}
    for line in lines:
        head, *cells = line.split()
        if head in ("seconds", "TRL", "ours") and cells[0] != "/":
            table[head] = cells
    return table


def test_bench_runs_dry():
    lines = run_bench()

    table = read_table(lines)
    for who in ("TRL", "ours"):
        values = map(float, table[who])
        row = dict(zip(table["seconds"], values))
        assert row["length"] == 8
        assert 0 < row["reward"] < 1
        assert row["norm"] > 0
        assert row["step"] > 0
    time, gradient = json.loads(lines[-1])["bars"]
    assert time["ok"]
    assert gradient["ok"]
    assert gradient["value"] < 1e-5
