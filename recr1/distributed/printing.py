"""Print on rank 0 alone, above a progress bar."""

from __future__ import annotations

import sys

from tqdm import tqdm

from recr1.distributed import collectives as dist


def print_rank0(text: str) -> None:
    """Print above a progress bar, on rank 0 only. What the terminal cannot write becomes a question
    mark.
    """
    if dist.rank() != 0:
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    printable = text.encode(encoding, "replace").decode(encoding)
    tqdm.write(printable)
