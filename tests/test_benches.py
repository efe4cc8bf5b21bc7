"""Benches that need a quiet machine or a GPU run here in small: they work and end with their bars. Their figures mean nothing at this size."""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> tuple[str, list[dict]]:
    done = subprocess.run([sys.executable, "-W", "ignore", *arguments], cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)),
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])["bars"]


def test_sharding_against_fully_shard():
    out, bars = run("experiments/bench/fsdp.py", "--pairs=1", "--layers=2", "--width=64", "--vocabulary=256", "--rows=2", "--length=16", "--no-resident")
    assert out.count("s/step") == 4 and len(bars) == 8
    # no time, no peak of a model this small: what must hold at any size
    assert all(bar["ok"] for bar in bars if "state" in bar["name"] or "losses" in bar["name"])


def test_share_of_the_peak():
    out, [bar] = run("experiments/bench/mfu.py", "--dry-run", "--checkpointing")
    assert "44 tokens computed" in out and bar["value"] > 0        # 2 x 2 rollouts of 8 + 8, each prompt once, no row for a last token: 2 * 8 + 4 * 7


def test_dense_search():
    out, bars = run("experiments/bench/dense.py", "--dry-run")
    assert out.count("\n  efSearch ") == 5 and len(bars) == 3
    assert all(bar["ok"] for bar in bars if "time" not in bar["name"])             # 3,000 documents are searched almost wholly
