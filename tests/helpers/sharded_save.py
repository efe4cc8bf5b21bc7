"""torchrun --nproc-per-node N tests/helpers/sharded_save.py FOLDER POLICY...: loads FOLDER's newest
checkpoint, or trains two steps when it has none, and saves.

The other half of test_checkpoint.py's dealing of shards among another number of ranks; writes
FOLDER/export.N and FOLDER/moments.N.safetensors.
"""

import sys
from pathlib import Path

import torch
from helpers import rank_jobs
from helpers.tiny_world import tiny_tokenizer
from safetensors.torch import save_file

from recr1.config.schema import Config, OptimizerConfig
from recr1.distributed import collectives as dist
from recr1.distributed.process_group import process_group
from recr1.training import checkpoint, load_model
from recr1.training.optimizer import Optimizer
from recr1.utils.exits import end_process


def main() -> int:
    torch.set_num_threads(1)
    with process_group():
        work(Path(sys.argv[1]), sys.argv[2])
    return 0


def work(folder: Path, policy_folder: str) -> None:
    policy = load_model.load_policy(policy_folder, len(tiny_tokenizer()), torch.float32)
    optimizer = Optimizer(policy, OptimizerConfig(lr=1e-2, weight_decay=0.1), 9)
    root = folder / "checkpoints"
    found, state, refused = checkpoint.find_newest_checkpoint(
        root, policy, optimizer, lambda state: None
    )
    assert not refused, refused
    if found is None:
        for step in range(2):
            rank_jobs.accumulate(policy, None, step, (), Config())
            optimizer.step()
        checkpoint.save_checkpoint(
            root, 2, lambda: dict(step=2), policy, optimizer, tiny_tokenizer(), frozenset([5]), ""
        )
    else:
        checkpoint.load_checkpoint(found, state, policy, optimizer)
        assert (optimizer.num_steps, optimizer.num_skipped) == (2, 0)
    load_model.save_policy(
        policy, tiny_tokenizer(), frozenset([5]), folder / f"export.{dist.world_size()}", ""
    )
    moments = {}
    for name, t in checkpoint.get_moments(optimizer).items():
        if t.ndim:
            unit = policy.get_submodule(name.split(".", 1)[1].removesuffix(".shard"))
            whole = dist.start_all_gather(t)()
            moments |= {f"{name} {w.name}": w.view(whole).clone() for w in unit.flat_param.weights}
        else:
            moments[name] = t
    if dist.rank() == 0:
        save_file(moments, folder / f"moments.{dist.world_size()}.safetensors")


if __name__ == "__main__":
    end_process(main)
