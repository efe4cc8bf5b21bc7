"""Rec-R1 by GRPO, from scratch in plain PyTorch. Begin with README.md."""

import os

# Let torch's allocator take memory from a GPU in segments that can grow. Pieces of fixed size do
# not fit what comes next: sampling wants its cache in one piece, again and again, where training
# has left many. torch may read this as early as its import, so it stands here. Whoever has settings
# of their own, under this name or one that torch had before 2.9, keeps them.
_OLD_NAMES = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
if not _OLD_NAMES & os.environ.keys():
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# Let a thread that waits for the others sleep sooner. libgomp, torch's OpenMP on Linux, spins for
# milliseconds first. Beside a busy process that takes the cores from the threads that are waited
# for: on two cores a step takes 2.5 times as long, beside a second training 9 times. With 2,000
# looks it is 1.3 times, and on a quiet machine 3% (experiments/benchmarks/wait_policy.py). libgomp
# reads this when torch is imported. Whoever has settings of their own keeps them.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
