"""Files that outlive a kill: written beside their name, forced onto the disk, then renamed; and
folders sealed by a manifest of sizes and sha256.

A folder `x` is made as `x.partial`; what has the name `x` is complete. Nothing read here is
executed: JSON, and bytes to be hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST = "manifest.json"

PARTIAL = ".partial"

MAX_JSON_BYTES = 64 * 2**20  # bytes: what a manifest or a state may have


class WriteError(ValueError):
    """Something could not be written. The message names the place and the reason."""


class Damaged(ValueError):
    """A sealed folder is not what its manifest says. The message names the file."""


@contextmanager
def report_write_errors(place: Path):
    """A block that writes into `place`: what the system refuses (disk full, no permission) is a
    WriteError.
    """
    try:
        yield
    except OSError as e:
        raise WriteError(
            f"cannot write {e.filename or place}: {e.strerror or e}; mend that, then the same command goes on from the last checkpoint"
        ) from None


def sync_to_disk(path: Path) -> None:
    """Forces a file's bytes, or a folder's names, onto the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_text(path: Path, text: str) -> None:
    """The whole text, or the file as it was. Raises WriteError."""
    partial = path.with_name(path.name + PARTIAL)
    with report_write_errors(path):
        partial.write_text(text, encoding="utf-8")
        sync_to_disk(partial)
        os.replace(partial, path)
        sync_to_disk(path.parent)


def read_json(path: Path) -> Any:
    """Raises Damaged for what is no JSON, or absurdly long."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise Damaged(f"{path.name} is longer than any that was written")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise Damaged(f"{path.name} is not JSON: {type(e).__name__}") from None


def fingerprint_file(path: Path) -> dict:
    """{"size": bytes, "sha256": hex} of a file, which is forced onto the disk first."""
    sync_to_disk(path)
    with open(path, "rb") as f:
        return dict(
            size=os.fstat(f.fileno()).st_size, sha256=hashlib.file_digest(f, "sha256").hexdigest()
        )


def write_manifest(folder: Path, found: dict[str, dict], final: Path) -> None:
    """Writes the manifest of all files of `folder` last and gives it its name. `found`:
    fingerprints that other ranks have taken.
    """
    found = found | {
        name: fingerprint_file(folder / name)
        for name in sorted(_list_files(folder))
        if name not in found
    }
    (folder / MANIFEST).write_text(
        json.dumps(dict(version=1, files=found), indent=1) + "\n", encoding="utf-8"
    )
    sync_to_disk(folder / MANIFEST)
    for below in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync_to_disk(below)
    if final.is_symlink() or final.exists():
        remove_path(final)
    os.replace(folder, final)
    sync_to_disk(final.parent)


def read_manifest(folder: Path) -> dict[str, dict]:
    """The manifest of a sealed folder: {name: fingerprint}. Names and kinds of files are checked
    here, their bytes by `check`. Raises Damaged.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged("is a link or no folder: not followed")
    there = _list_files(folder)
    if MANIFEST not in there:
        raise Damaged(f"{MANIFEST} is missing")
    raw = read_json(folder / MANIFEST)
    if (
        not isinstance(raw, dict)
        or raw.get("version") != 1
        or not isinstance(files := raw.get("files"), dict)
    ):
        raise Damaged(f"{MANIFEST} is not of the form that this version writes")
    for name, entry in sorted(files.items()):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name:
            raise Damaged(f"{MANIFEST} names {name!r}, a path outside: not opened")
        if (
            not isinstance(entry, dict)
            or type(entry.get("size")) is not int
            or type(entry.get("sha256")) is not str
        ):
            raise Damaged(f"{MANIFEST}: size or sha256 of {name!r} is missing")
    for name in sorted(files.keys() - there):
        raise Damaged(f"{name} is missing")
    for name in sorted(there - files.keys() - {MANIFEST}):
        raise Damaged(f"{name!r} is not in its manifest: not opened")
    return files


def check_file(folder: Path, name: str, entry: dict) -> None:
    """Raises Damaged unless the file's bytes are those of the manifest."""
    size = (folder / name).stat().st_size
    if size != entry["size"]:
        raise Damaged(f"{name} has {size} bytes, its manifest says {entry['size']}")
    if fingerprint_file(folder / name)["sha256"] != entry["sha256"]:
        raise Damaged(f"{name}: its sha256 is not the manifest's")


def remove_path(path: Path) -> None:
    """Removes a file, link or folder; a folder loses its name first, so that a kill leaves none
    that looks whole.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    if not path.name.endswith(PARTIAL):
        aside = path.with_name(path.name + ".old" + PARTIAL)
        if aside.exists():
            shutil.rmtree(aside)
        os.replace(path, aside)
        path = aside
    shutil.rmtree(path)


def _list_files(folder: Path) -> set[str]:
    """Every file below, by its relative name. Raises Damaged for what is neither a plain file nor a
    folder.
    """
    names = set()
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(at) / name
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise Damaged(
                    f"{path.relative_to(folder).as_posix()!r} is a link or no plain file: not followed"
                )
        names |= {(Path(at) / name).relative_to(folder).as_posix() for name in files}
    return names
