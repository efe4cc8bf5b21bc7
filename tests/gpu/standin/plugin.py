"""pytest -p gpu.standin.plugin: the tests of this process have a stand-in GPU."""

import gc

import pytest
from gpu.standin.install import install

install()


@pytest.fixture
def gpu_activity():
    """Count from the test's begin on; what earlier tests have left is given away first."""
    from gpu.standin.activity import activity

    gc.collect()
    activity.clear()
    yield activity
    activity.sync_debug_mode = "default"


def pytest_report_header() -> str:
    return "GPU: the stand-in of tests/gpu/standin"
