"""Build and load device_guard.cpp. It must be there before torch is imported."""

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("device_guard.cpp")


def load_library() -> None:
    """Load the library into this process.

    Raises RuntimeError where torch is imported already: it has asked for a GPU by then.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the stand-in GPU must be installed before torch is imported")
    torch_folder = locate_torch()
    library = build_library(torch_folder)
    for path in (torch_folder / "lib/libtorch_cpu.so", library):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def locate_torch() -> Path:
    """Return torch's folder, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def build_library(torch_folder: Path) -> Path:
    """Compile the library for this torch, or find the one of before. Takes seconds, once.

    Several processes may build it at once: each writes a file of its own and renames it.
    """
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update((torch_folder / "version.py").read_bytes())
    folder = locate_cache()
    library = folder / f"{key.hexdigest()[:16]}.so"
    if library.exists():
        return library

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "device_guard.so"
        command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20"]
        command += [f"-I{torch_folder / 'include'}", str(SOURCE), "-o", str(built)]
        command += [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        os.replace(built, library)
    return library


def locate_cache() -> Path:
    """Return the folder of this user's built libraries."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "recr1-standin"
