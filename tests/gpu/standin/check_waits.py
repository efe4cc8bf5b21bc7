"""Where the host waits for the GPU: no more often than MAX_WAITS says, and nowhere else.

A wait holds back all launches behind it, so one in a loop makes a GPU idle at every turn. This
prints the table as it is today, to be pasted below where waits have become fewer:

    PYTHONPATH=.:tests python -m gpu.standin.report waits
"""

import pytest
from gpu.standin.workloads import WORKLOADS, count_waits

from recr1.model.decoder import RMSNorm

# workload (workloads.py) -> function of the product -> waits
MAX_WAITS: dict[str, dict[str, int]] = {}

# How long texts are in a dry run depends on how a machine's CPU rounds; elsewhere counts are exact.
SLACK = {"runs": 1.25}


def list_excess(workload: str) -> list[str]:
    """List the places where the host waits more often than it may."""
    allowed = MAX_WAITS[workload]
    slack = SLACK.get(workload, 1)
    excess = []
    for place, count in count_waits(workload).items():
        limit = allowed.get(place, 0)
        if count > slack * limit:
            excess.append(f"{place} waits {count} times, {limit} are allowed")
    return excess


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_host_waits_no_more_than_the_table_says(workload, gpu_activity):
    assert not list_excess(workload)


def test_a_new_wait_is_found(monkeypatch, gpu_activity):
    """One number that is read in every norm: a wait in the loop over layers."""
    forward = RMSNorm.forward

    def read_and_forward(self, x):
        x.amax().item()
        return forward(self, x)

    monkeypatch.setattr(RMSNorm, "forward", read_and_forward)

    excess = list_excess("training")

    assert any("decoder.DecoderLayer.forward" in line for line in excess)
