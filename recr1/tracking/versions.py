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

CHECKOUT = Path(__file__).resolve().parents[2]


def record_versions(folder: Path) -> None:
    """Add this start to the folder's versions.json, a list. Raises WriteError."""
    path = folder / "versions.json"
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or a kill or a full disk has spoilt it
        starts = []
    if not isinstance(starts, list):
        starts = []
    write_text(path, json.dumps([*starts, collect_versions()], indent=1) + "\n")


def collect_versions() -> dict:
    """Collect the versions of this process.

    Returns {"started", "commit", "changed", "python", "machine", "devices", "packages"}; what is
    not there is None or left out.
    """
    commit, is_changed = _read_commit(CHECKOUT)
    return dict(
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        commit=commit,
        changed=is_changed,
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        devices=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        packages=_read_package_versions(),
    )


def _read_package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    versions["torch"] = torch.__version__  # with its build: 2.13.0+cpu
    return versions


def _read_commit(root: Path) -> tuple[str | None, bool | None]:
    """Read the checkout's commit and whether tracked files differ from it.

    (None, None) where the code is no checkout or git is not there.
    """

    def run_git(*argv: str) -> str:
        command = ["git", "-C", str(root), *argv]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return result.stdout.strip()

    if not (root / ".git").exists():
        return None, None
    try:
        commit = run_git("rev-parse", "HEAD")
        changes = run_git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, bool(changes)
