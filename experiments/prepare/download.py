"""Download files that can be cut off at any byte.

Range requests go into NAME.part, size and sha256 are compared, then it is renamed. Only the
standard library is used; it takes HTTPS_PROXY and SSL_CERT_FILE from the environment, as every HTTP
client does.
"""

import hashlib
import http.client
import shutil
import ssl
import urllib.error
import urllib.request
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

from checks import PrepareError
from tqdm import tqdm

from recr1.utils.files import fingerprint_file

# bytes, seconds without an answer, tries in a row that brought no byte
CHUNK = 2**20
TIMEOUT = 60
TRIES = 3
POINTER = b"version https://git-lfs.github.com/spec/"
HELP = (
    "behind a proxy set HTTPS_PROXY (and SSL_CERT_FILE for its certificate); "
    "offline fetch it elsewhere and give its folder with --from"
)


@dataclass(frozen=True)
class Remote:
    """Name a published file.

    Without size and sha256, those that the server states are taken (Hugging Face states both for
    large files).
    """

    name: str
    url: str
    size: int | None = None  # bytes
    sha256: str | None = None


def add_options(parser: ArgumentParser) -> None:
    """Add the options of the scripts that download."""
    parser.add_argument(
        "--downloads",
        type=Path,
        default=Path.home() / ".cache/recr1/downloads" / Path(parser.prog).stem,
        metavar="FOLDER",
        help="where downloads are kept (default: %(default)s)",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FOLDER",
        help="download nothing: the files lie in this folder under their own names",
    )


def fetch_files(remotes: list[Remote], args: Namespace) -> tuple[list[Path], list[dict]]:
    """Download the files unless they are there already.

    Returns (paths, source for prepared.json). Raises PrepareError.
    """
    paths = []
    source = []
    for remote in remotes:
        if args.source is not None:
            path = args.source / remote.name
            if not path.is_file():
                raise PrepareError(f"{path}: no such file; fetch {remote.url} into that folder")
        else:
            path = args.downloads / remote.name
            if not path.exists():
                _download(remote, path)
        with open(path, "rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise PrepareError(
                    f"{path}: a Git LFS pointer, not the file; run `git lfs pull` where it comes "
                    f"from, or fetch {remote.url}"
                )
        found = fingerprint_file(path)
        verify(
            path,
            found,
            remote.size,
            remote.sha256,
            "delete it and run again" if args.source is None else f"fetch {remote.url} again",
        )
        paths.append(path)
        source.append(dict(name=remote.name, url=remote.url, **found))
    return paths, source


def verify(path: Path, found: dict, size: int | None, sha256: str | None, remedy: str) -> None:
    """Raise PrepareError where size or sha256 are not those that are expected."""
    if size is not None and found["size"] != size:
        raise PrepareError(f"{path}: {found['size']:,} bytes, {size:,} were published; {remedy}")
    if sha256 is not None and found["sha256"] != sha256:
        raise PrepareError(
            f"{path}: its sha256 is {found['sha256'][:16]}.., {sha256[:16]}.. was published; "
            f"{remedy}"
        )


def _download(remote: Remote, path: Path) -> None:
    """Download one file, by as many connections as it takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    note = path.with_name(path.name + ".part.etag")
    total = None
    failures = 0
    while total is None or _format_size(part) < total:
        before = _format_size(part)
        try:
            total, stated = _append_connection(remote, part, note)
            reason = f"the connection ended at {_format_size(part):,} of {total:,} bytes"
        except urllib.error.HTTPError as e:
            if e.code == 416:  # more is there than the file has: not its beginning
                part.unlink(missing_ok=True)
            elif e.code < 500 and e.code != 429:
                raise PrepareError(
                    f"{remote.url}: the server answered {e.code} {e.reason}; it may have moved: "
                    "fetch it elsewhere and give its folder with --from"
                ) from None
            reason = f"the server answered {e.code} {e.reason}"
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            TimeoutError,
            ConnectionError,
            ssl.SSLError,
        ) as e:
            reason = str(getattr(e, "reason", None) or e or type(e).__name__)
        if total is None or _format_size(part) < total:
            failures = failures + 1 if _format_size(part) <= before else 0
            if failures == TRIES:
                raise PrepareError(
                    f"{remote.url}: {reason}; the same command goes on from there. Else: {HELP}"
                )
    found = fingerprint_file(part)
    try:
        verify(
            part,
            found,
            remote.size or total,
            remote.sha256 or stated,
            "it was deleted: run again, the file is fetched from its beginning",
        )
    except PrepareError:
        part.unlink()
        note.unlink(missing_ok=True)
        raise
    part.rename(path)
    note.unlink(missing_ok=True)


def _append_connection(remote: Remote, part: Path, note: Path) -> tuple[int, str | None]:
    """Adds to `part` what one connection brings. (bytes of the whole file, sha256 as the server
    states it or None).
    """
    have = _format_size(part)
    tag = note.read_text() if note.exists() else None
    headers = {"User-Agent": "recr1", "Accept-Encoding": "identity"}
    # If-Range: a file that has changed since comes whole, not as a tail that does not fit
    if have and (tag or remote.sha256):
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": tag} if tag else {})
    linked = _Linked()
    with urllib.request.build_opener(linked).open(
        urllib.request.Request(remote.url, headers=headers), timeout=TIMEOUT
    ) as answer:
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        )
        have = have if resumed else 0
        length = answer.headers.get("Content-Length")
        if length is None and remote.size is None or answer.status == 206 and not resumed:
            raise PrepareError(
                f"{remote.url}: the server does not say which bytes it sends, "
                "so a cut could not be told; fetch it elsewhere and give its folder with --from"
            )
        total = remote.size if length is None else have + int(length)
        if remote.size is not None and total != remote.size:
            raise PrepareError(
                f"{remote.url}: has {total:,} bytes, {remote.size:,} were published; "
                "it is another file now, or a page that asks to log in"
            )
        etag = answer.headers.get("ETag")
        if etag and not etag.startswith("W/"):
            note.write_text(etag)
        else:
            note.unlink(missing_ok=True)
        if shutil.disk_usage(part.parent).free < total - have:
            raise PrepareError(
                f"{part.parent}: {total - have:,} bytes are still to come and do not fit on the "
                "disk; give another folder with --downloads"
            )
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(
                total=total,
                initial=have,
                desc=remote.name,
                unit="B",
                unit_scale=True,
                disable=None,
                leave=False,
            ) as bar,
        ):
            try:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
            except http.client.IncompleteRead as e:
                file.write(e.partial)
    return total, linked.sha256


class _Linked(urllib.request.HTTPRedirectHandler):
    """Keep the headers of a redirect.

    Hugging Face states a large file's sha256 in the answer that redirects to the storage.
    """

    sha256: str | None = None

    def redirect_request(self, request, file, code, message, headers, url):
        tag = (headers.get("X-Linked-ETag") or "").strip('"')
        if len(tag) == hashlib.sha256().digest_size * 2:
            self.sha256 = tag
        return super().redirect_request(request, file, code, message, headers, url)


def _format_size(path: Path) -> int:
    """Format a number of bytes."""
    return path.stat().st_size if path.exists() else 0
