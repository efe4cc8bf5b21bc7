"""Rec-R1 by GRPO, from scratch in plain PyTorch. Begin with README.md."""

import os

# Let torch's allocator take memory from a GPU in segments that can grow. Pieces of fixed size do
# not fit what comes next: sampling wants its cache in one piece, again and again, where training
# has left many. torch may read this as early as its import, so it stands here. Whoever has settings
# of their own, under this name or one that torch had before 2.9, keeps them.
_OLD_NAMES = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
if not _OLD_NAMES & os.environ.keys():
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
