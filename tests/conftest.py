"""Order the test files and let them import each other.

The longest files come first, so that run.sh's two workers, which take whole files in turn, end at
about the same time. Helpers are imported as `helpers.NAME`; a few test files use functions of
another one, by its file name, which is unique: all folders with tests are on the path.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
LONGEST = [
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


def pytest_collection_modifyitems(items):
    """Sort stably: inside a file, and among the other files, the tests stay as they were found."""
    items.sort(key=get_position)


def get_position(item) -> int:
    return POSITIONS.get(item.path.stem, len(LONGEST))
