"""Order the test files, let them import each other, and keep them off a GPU unless they are for it.

The longest files come first, so that run.sh's two workers, which take whole files in turn, end at
about the same time. Helpers are imported as `helpers.NAME`; a few test files use functions of
another one, by its file name, which is unique: all folders with tests are on the path.

A test without the mark `gpu` is about a CPU: its tolerances are, and ranks that it starts would ask
for a GPU each. So a GPU is hidden, from the processes that a test starts too, unless the command
says -m gpu.
"""

import importlib
import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
LONGEST = [
    "test_standin",
    "test_gpu_day",
    "test_run_all_lm",
    "test_benches",
    "test_ranks",
    "test_resume",
    "test_checkpoint",
    "test_kernels",
    "test_faults",
    "test_plan",
    "test_doctor",
    "test_walkthrough",
    "test_report",
    "test_packaging",
    "test_dense_index",
    "test_task_runs",
    "test_sft",
    "test_plain",
    "test_train",
    "test_many_rollouts",
]

POSITIONS = {}
for index, name in enumerate(LONGEST):
    POSITIONS[name] = index

# Behind everything else, and without tests/faults: its modules have common names (values, inputs).
FOLDERS = {path.parent for path in TESTS.rglob("test_*.py")}
for folder in sorted(FOLDERS):
    sys.path.append(str(folder))


@pytest.fixture
def script(monkeypatch):
    """A script of experiments/ as a module; a script finds its neighbours in its own folder."""
    for folder in ("analysis", "make"):
        monkeypatch.syspath_prepend(TESTS.parent / "experiments" / folder)
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    return importlib.import_module


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "gpu: runs on a GPU, with -m gpu; skipped where there is none"
    )
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    """Sort stably: inside a file, and among the other files, the tests stay as they were found."""
    items.sort(key=get_position)


def get_position(item) -> int:
    return POSITIONS.get(item.path.stem, len(LONGEST))
