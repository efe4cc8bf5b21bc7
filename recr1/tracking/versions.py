"""What a run was made with: packages, Python, machine, and the commit of the code. Kept in its
folder as versions.json, one entry per start.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

from recr1.utils.files import write_text

PACKAGES = (
    "recr1",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "safetensors",
    "triton",
    "flash-attn",
    "faiss-cpu",
    "faiss-gpu",
    "numba",
)


def record_versions(folder: Path) -> None:
    """Adds this start to the folder's versions.json, a list. Raises WriteError."""
    path = folder / "versions.json"
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or a kill or a full disk has spoilt it
        starts = []
    write_text(
        path,
        json.dumps([*(starts if isinstance(starts, list) else []), collect_versions()], indent=1)
        + "\n",
    )


def collect_versions() -> dict:
    """{"started", "commit", "changed", "python", "machine", "devices", "packages"}; what is not
    there is None or left out.
    """
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    packages["torch"] = torch.__version__  # with its build: 2.13.0+cpu
    commit, changed = _read_commit(Path(__file__).resolve().parents[1])
    return dict(
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        commit=commit,
        changed=changed,
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        devices=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        packages=packages,
    )


def _read_commit(root: Path) -> tuple[str | None, bool | None]:
    """The checkout's commit and whether tracked files differ from it; (None, None) where the code
    is no checkout or git is not there.
    """

    def git(*argv: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *argv], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    if not (root / ".git").exists():
        return None, None
    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None
