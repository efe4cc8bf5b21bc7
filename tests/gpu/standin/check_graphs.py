"""Captured decode steps against eager ones. A wait inside a capture would raise (graphs.py)."""

import pytest
from gpu.standin.activity import HostWait
from gpu.standin.workloads import make_policy, sample_texts

from recr1.model.decoder import RMSNorm
from recr1.sampling import cuda_graphs, generate as sampler

# greedy, prompts, siblings: one text a row, several, several that part
CASES = [(True, 5, 1), (False, 1, 1), (False, 5, 4)]


@pytest.mark.parametrize("greedy, num_prompts, group_size", CASES)
def test_graphs_change_no_text(greedy, num_prompts, group_size, gpu_activity, monkeypatch):
    """In bfloat16, sharded, through varlen attention: as runs sample on a GPU. The same kernels on
    the same memory: not a bit changes.
    """
    policy = make_policy(2)
    monkeypatch.setattr(cuda_graphs, "GRAPH_SLOT_MULTIPLE", 16)

    ours = sample_texts(policy, num_prompts, group_size, length=30, greedy=greedy)
    num_replays = gpu_activity.num_replays
    monkeypatch.setattr(sampler, "GRAPH_DEVICES", ())
    monkeypatch.setattr(sampler, "SYNC_EVERY", {"cuda": 1})
    theirs = sample_texts(policy, num_prompts, group_size, length=30, greedy=greedy)

    assert num_replays > 20
    assert gpu_activity.num_replays == num_replays
    assert [r.ids for r in ours] == [r.ids for r in theirs]
    assert [r.sampler_logp for r in ours] == [r.sampler_logp for r in theirs]
    assert not gpu_activity.races


def test_a_wait_in_a_captured_step_is_refused(monkeypatch, gpu_activity):
    forward = RMSNorm.forward

    def read_and_forward(self, x):
        x.amax().item()
        return forward(self, x)

    monkeypatch.setattr(RMSNorm, "forward", read_and_forward)

    with pytest.raises(HostWait, match="inside a capture"):
        sample_texts(make_policy(2), num_prompts=5, group_size=1, length=30)
