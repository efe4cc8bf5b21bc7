"""Where the host waits for the GPU: no more often than MAX_WAITS says, and nowhere else.

A wait holds back all launches behind it, so one in a loop makes a GPU idle at every turn. This
prints the table as it is today, to be pasted below where waits have become fewer:

    PYTHONPATH=.:tests python -m gpu.standin.report waits
"""

import pytest
from gpu.standin.workloads import WORKLOADS, count_waits

from recr1.model.decoder import RMSNorm

# workload (workloads.py) -> function of the product -> waits
MAX_WAITS = {
    "sampling": {
        "sampling.cuda_graphs.DecodeGraphs._capture": 1,
        "sampling.generate.prefill": 3,
        "sampling.sequences.stack_to_host": 5,
    },
    "training": {
        "distributed.flat_param.FlatParam.fill": 52,
        "kernels.logprob._FusedLinearLoss.backward": 1,
        "kernels.logprob._find_rows_with_gradient": 1,
        "rl.packing._build_micro_batch": 7,
        "rl.policy_loss.compute_policy_loss": 1,
        "train.add_advantages": 1,
        "training.optimizer.Optimizer._clip_and_update": 1,
        "training.optimizer.Optimizer.compute_norm": 1,
    },
    "runs": {
        "distributed.cpu_offload.wait_on_host": 24,
        "distributed.flat_param.FlatParam.fill": 104,
        "kernels.logprob._FusedLinearLoss.backward": 2,
        "kernels.logprob._find_rows_with_gradient": 2,
        "model.hf_weights._ShardWriter.add": 104,
        "retrieval.bm25.torch_scorer.TorchScorer.__init__": 4,
        "retrieval.bm25.torch_scorer.TorchScorer._add_terms": 10,
        "retrieval.bm25.torch_scorer.TorchScorer._find_top_k": 10,
        "retrieval.bm25.torch_scorer._find_true": 10,
        "retrieval.bm25.torch_scorer._select_top_k": 25,
        "retrieval.dense.encoder.Encoder.__init__": 25,
        "retrieval.dense.encoder.Encoder._embed": 24,
        "retrieval.dense.searcher.make_torch_search": 2,
        "retrieval.dense.searcher.make_torch_search.<locals>.search": 15,
        "rl.packing._build_micro_batch": 28,
        "rl.policy_loss.compute_policy_loss": 2,
        "sampling.cuda_graphs.DecodeGraphs._capture": 8,
        "sampling.generate.prefill": 24,
        "sampling.sequences.stack_to_host": 10,
        "tracking.step_metrics.StepRecord.add": 6,
        "tracking.step_metrics.collect_token_values": 160,
        "train.add_advantages": 2,
        "training.checkpoint._write_shards": 24,
        "training.load_model._compare_tensor": 104,
        "training.optimizer.Optimizer._clip_and_update": 2,
        "training.optimizer.Optimizer.compute_norm": 2,
    },
}

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
    assert not gpu_activity.host_numbers
    assert not gpu_activity.races


def test_a_new_wait_is_found(monkeypatch, gpu_activity):
    """One number that is read in every norm: a wait in the loop over layers."""
    forward = RMSNorm.forward

    def read_and_forward(self, x):
        x.amax().item()
        return forward(self, x)

    monkeypatch.setattr(RMSNorm, "forward", read_and_forward)

    excess = list_excess("training")

    assert any("decoder.DecoderLayer.forward" in line for line in excess)
