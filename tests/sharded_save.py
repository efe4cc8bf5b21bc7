"""torchrun --nproc-per-node N tests/sharded_save.py FOLDER POLICY...: loads FOLDER's newest
checkpoint, or trains two steps when it has none, and saves.

The other half of test_checkpoint.py's dealing of shards among another number of ranks; writes
FOLDER/export.N and FOLDER/moments.N.safetensors.
"""

import sys
from pathlib import Path

import ranks
import torch
from safetensors.torch import save_file
from tiny import tiny_tokenizer

from recr1 import checkpoint, dist
from recr1.config import Config, Optimizer as OptimizerConfig
from recr1.exits import end_process
from recr1.optim import Optimizer
from recr1.session import session


def main() -> int:
    torch.set_num_threads(1)
    with session():
        work(Path(sys.argv[1]), sys.argv[2])
    return 0


def work(folder: Path, policy_folder: str) -> None:
    policy = checkpoint.load_policy(policy_folder, len(tiny_tokenizer()), torch.float32)
    optimizer = Optimizer(policy, OptimizerConfig(lr=1e-2, weight_decay=0.1), 9)
    root = folder / "checkpoints"
    found, state, refused = checkpoint.newest(root, policy, optimizer, lambda state: None)
    assert not refused, refused
    if found is None:
        for step in range(2):
            ranks.accumulate(policy, None, step, (), Config())
            optimizer.step()
        checkpoint.save(
            root, 2, lambda: dict(step=2), policy, optimizer, tiny_tokenizer(), frozenset([5]), ""
        )
    else:
        checkpoint.load(found, state, policy, optimizer)
        assert (optimizer.taken, optimizer.skipped) == (2, 0)
    checkpoint.save_policy(
        policy, tiny_tokenizer(), frozenset([5]), folder / f"export.{dist.world()}", ""
    )
    moments = {}
    for name, t in checkpoint.moments(optimizer).items():
        if t.ndim:
            unit = policy.get_submodule(name.split(".", 1)[1].removesuffix(".shard"))
            whole = dist.all_gather(t)()
            moments |= {f"{name} {w.name}": w.view(whole).clone() for w in unit.flat.weights}
        else:
            moments[name] = t
    if dist.rank() == 0:
        save_file(moments, folder / f"moments.{dist.world()}.safetensors")


if __name__ == "__main__":
    end_process(main)
