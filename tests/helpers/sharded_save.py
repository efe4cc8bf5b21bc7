"""torchrun --nproc-per-node N tests/helpers/sharded_save.py FOLDER POLICY...: load FOLDER's newest
checkpoint, or train two steps when it has none, and save.

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
    folder, policy_folder = sys.argv[1:3]
    with process_group():
        work(Path(folder), policy_folder)
    return 0


def work(folder: Path, policy_folder: str) -> None:
    """Load or train, then write the export and the moments."""
    tokenizer = tiny_tokenizer()
    policy = load_model.load_policy(policy_folder, len(tokenizer), torch.float32)
    optimizer_config = OptimizerConfig(lr=1e-2, weight_decay=0.1)
    optimizer = Optimizer(policy, optimizer_config, 9)
    root = folder / "checkpoints"
    newest, state, refused = checkpoint.find_newest_checkpoint(
        root, policy, optimizer, lambda state: None
    )
    assert not refused, refused
    if newest is None:
        _train_and_save(root, policy, optimizer)
    else:
        checkpoint.load_checkpoint(newest, state, policy, optimizer)
        assert optimizer.num_steps == 2
        assert optimizer.num_skipped == 0

    world_size = dist.world_size()
    export = folder / f"export.{world_size}"
    load_model.save_policy(policy, tokenizer, frozenset([5]), export, "")
    moments = _gather_moments(policy, optimizer)
    if dist.rank() == 0:
        save_file(moments, folder / f"moments.{world_size}.safetensors")


def _train_and_save(root: Path, policy, optimizer: Optimizer) -> None:
    for step in range(2):
        rank_jobs.accumulate(policy, None, step, (), Config())
        optimizer.step()
    checkpoint.save_checkpoint(
        root, 2, lambda: dict(step=2), policy, optimizer, tiny_tokenizer(), frozenset([5]), ""
    )


def _gather_moments(policy, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Gather AdamW's moments of every weight from all ranks; the scalars stay as they are."""
    moments = {}
    for name, moment in checkpoint.get_moments(optimizer).items():
        if moment.ndim == 0:
            moments[name] = moment
            continue
        _, _, shard_name = name.partition(".")
        unit = policy.get_submodule(shard_name.removesuffix(".shard"))
        wait = dist.start_all_gather(moment)
        flat_moment = wait()
        for weight in unit.flat_param.weights:
            view = weight.view(flat_moment)
            moments[f"{name} {weight.name}"] = view.clone()
    return moments


if __name__ == "__main__":
    end_process(main)
