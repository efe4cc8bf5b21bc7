"""Files that outlive a kill: they are written under another name, forced onto the disk, then
renamed. Folders are sealed by a manifest of sizes and sha256.

A folder `x` is made as `x.partial`; what has the name `x` is complete. Nothing that is read here is
executed: JSON, and bytes to be hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Iterator

MANIFEST = "manifest.json"

PARTIAL = ".partial"

MAX_JSON_BYTES = 64 * 2**20  # the size of the largest manifest or state that is read


class WriteError(ValueError):
    """Something could not be written. The message names the place and the reason."""


class Damaged(ValueError):
    """A sealed folder is not what its manifest says. The message names the file."""


@contextmanager
def report_write_errors(place: Path) -> Iterator[None]:
    """Turn what the system refuses to a block that writes into `place` (disk full, no permission)
    into a WriteError.
    """
    try:
        yield
    except OSError as e:
        raise WriteError(
            f"cannot write {e.filename or place}: {e.strerror or e}; "
            "mend that, then the same command goes on from the last checkpoint"
        ) from None


def sync_to_disk(path: Path) -> None:
    """Force a file's bytes, or a folder's names, onto the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_text(path: Path, text: str) -> None:
    """Write the full text, or leave the file as it was. Raises WriteError."""
    partial = path.with_name(path.name + PARTIAL)
    with report_write_errors(path):
        partial.write_text(text, encoding="utf-8")
        sync_to_disk(partial)
        os.replace(partial, path)
        sync_to_disk(path.parent)


def read_json(path: Path) -> Any:
    """Return the JSON value in a file. Raises Damaged if it is no JSON, or absurdly long."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise Damaged(f"{path.name} is longer than any that was written")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise Damaged(f"{path.name} is not JSON: {type(e).__name__}") from None


def fingerprint_file(path: Path) -> dict:
    """Force a file onto the disk and return {"size": bytes, "sha256": hex}."""
    sync_to_disk(path)
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        digest = hashlib.file_digest(f, "sha256")
    return dict(size=size, sha256=digest.hexdigest())


def write_manifest(folder: Path, fingerprints: dict[str, dict], final: Path) -> None:
    """Seal a folder: write the manifest of all its files, then rename it to `final`.

    `fingerprints` are those that other ranks have computed, by name.
    """
    fingerprints = dict(fingerprints)
    for name in sorted(_list_files(folder)):
        if name not in fingerprints:
            fingerprints[name] = fingerprint_file(folder / name)
    text = json.dumps(dict(version=1, files=fingerprints), indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")

    # Everything is on the disk before the name says that it is complete.
    sync_to_disk(folder / MANIFEST)
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_to_disk(path)
    sync_to_disk(folder)
    if final.is_symlink() or final.exists():
        remove_path(final)
    os.replace(folder, final)
    sync_to_disk(final.parent)


def read_manifest(folder: Path) -> dict[str, dict]:
    """Return the manifest of a sealed folder: {name: fingerprint}. Raises Damaged.

    It checks the files' names and kinds; `check_file` checks their bytes.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged("is a link or no folder: not followed")
    existing = _list_files(folder)
    if MANIFEST not in existing:
        raise Damaged(f"{MANIFEST} is missing")
    manifest = read_json(folder / MANIFEST)
    is_dict = isinstance(manifest, dict)
    if not is_dict or manifest.get("version") != 1 or not isinstance(manifest.get("files"), dict):
        raise Damaged(f"{MANIFEST} is not of the form that this version writes")
    files = manifest["files"]
    for name, entry in sorted(files.items()):
        _check_entry(name, entry)
    missing = files.keys() - existing
    if missing:
        raise Damaged(f"{min(missing)} is missing")
    unlisted = existing - files.keys() - {MANIFEST}
    if unlisted:
        raise Damaged(f"{min(unlisted)!r} is not in its manifest: not opened")
    return files


def _check_entry(name: str, entry: Any) -> None:
    """Raise Damaged unless a manifest's entry has a name inside the folder, a size and a sha256."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name:
        raise Damaged(f"{MANIFEST} names {name!r}, a path outside: not opened")
    if (
        not isinstance(entry, dict)
        or type(entry.get("size")) is not int
        or type(entry.get("sha256")) is not str
    ):
        raise Damaged(f"{MANIFEST}: size or sha256 of {name!r} is missing")


def check_file(folder: Path, name: str, entry: dict) -> None:
    """Raise Damaged unless a file's bytes are those of its entry in the manifest."""
    size = (folder / name).stat().st_size
    if size != entry["size"]:
        raise Damaged(f"{name} has {size} bytes, its manifest says {entry['size']}")
    if fingerprint_file(folder / name)["sha256"] != entry["sha256"]:
        raise Damaged(f"{name}: its sha256 is not the manifest's")


def remove_path(path: Path) -> None:
    """Remove a file, link or folder. A folder loses its name first, so that a kill leaves none that
    looks complete.
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
    """Return the relative names of all files below a folder. Raises Damaged for what is neither a
    plain file nor a folder.
    """
    all_names = set()
    for parent, folder_names, file_names in os.walk(folder):
        for name in (*folder_names, *file_names):
            path = Path(parent) / name
            relative_name = path.relative_to(folder).as_posix()
            is_file = path.is_file()
            if path.is_symlink() or not (is_file or path.is_dir()):
                raise Damaged(f"{relative_name!r} is a link or no plain file: not followed")
            if is_file:
                all_names.add(relative_name)
    return all_names
