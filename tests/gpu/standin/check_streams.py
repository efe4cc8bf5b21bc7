"""The product's own streams: no race as it is, and one as soon as a wait is missing."""

import ast
import gc
from pathlib import Path

import pytest
import torch
from gpu.standin import streams
from gpu.standin.streams import CallSite
from gpu.standin.workloads import make_policy, sample_texts, train_on_host

ROOT = Path(__file__).resolve().parents[3]
WAITS = {"wait_stream", "wait_event", "record_stream"}


def list_waits() -> list[CallSite]:
    """List where the product's source calls a method of WAITS."""
    sites = []
    for top in ("recr1", "kernels"):
        for path in sorted((ROOT / top).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in WAITS:
                    sites.append(CallSite(str(path), node.func.end_lineno))
    return sites


def run_all_streams() -> None:
    """Use every stream of the product: captured decode steps, and what lies in host memory."""
    with torch.no_grad():
        sample_texts(make_policy(1), num_prompts=3, group_size=1, length=12)
    train_on_host(num_steps=2)
    gc.collect()
    torch.cuda.synchronize()


@pytest.fixture(autouse=True)
def no_deleted_calls():
    yield
    streams.deleted_calls.clear()


def test_no_race(gpu_activity):
    """And the work below reaches every wait, or nothing would be learned from deleting it."""
    streams.reached_calls.clear()

    run_all_streams()

    assert not gpu_activity.races
    assert gpu_activity.num_replays > 0
    assert set(list_waits()) == streams.reached_calls


@pytest.mark.parametrize("site", list_waits(), ids=lambda s: f"{Path(s.file).name}:{s.line}")
def test_a_deleted_wait_is_found(site, gpu_activity):
    streams.deleted_calls.add(site)

    run_all_streams()

    assert gpu_activity.races
