"""Downloads from a server on localhost that cuts, lies, changes its file or is away: what was got
is kept, and every failure is one line.
"""

import hashlib
import http.server
import threading
from argparse import Namespace

import pytest
from helpers.prepared import refused, script

download = script("download")
DATA = bytes(range(256)) * 4000  # 1,024,000 bytes
SHA = hashlib.sha256(DATA).hexdigest()
RESUMES = "the connection ended at 2,000 of 1,024,000 bytes; the same command goes on from there"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.data with Range and If-Range; hangs up after server.cut bytes of a body (None:
    never; the first bodies have `cuts` of their own). Notes every request.
    """

    def do_GET(self):
        s = self.server
        s.asked.append(dict(self.headers))
        if self.path == "/hub":
            self.send_response(302)
            self.send_header("X-Linked-ETag", f'"{s.linked}"')
            self.send_header("Location", "/file")
            return self.end_headers()
        if s.status:
            return self.send_error(s.status)
        start = 0
        given = self.headers.get("Range")
        if given and self.headers.get("If-Range", s.etag) == s.etag:
            start = int(given.removeprefix("bytes=").removesuffix("-"))
        if start >= len(s.data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(s.data) - 1}/{len(s.data)}")
        if s.etag:
            self.send_header("ETag", s.etag)
        if s.sized:
            self.send_header("Content-Length", str(len(s.data) - start))
        self.end_headers()
        cut = s.cuts.pop(0) if s.cuts else s.cut
        self.wfile.write(s.data[start:] if cut is None else s.data[start : start + cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as s:
        s.data = DATA
        s.cut = None
        s.cuts = []
        s.etag = '"one"'
        s.status = None
        s.sized = True
        s.linked = SHA
        s.asked = []
        s.url = f"http://127.0.0.1:{s.server_address[1]}"
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield s
        s.shutdown()


@pytest.fixture
def fetch(server, tmp_path):
    """Fetches /file (or another path) as `got`; the path of the file."""

    def fetch(path="/file", source=None, **published):
        remote = download.Remote("got", server.url + path, **published)
        args = Namespace(downloads=tmp_path / "down", source=source)
        [fetched], _ = download.fetch_files([remote], args)
        return fetched

    return fetch


def list_sizes(tmp_path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (tmp_path / "down").iterdir()}


def test_whole_and_then_not_again(server, fetch, tmp_path):
    for _ in range(2):
        assert fetch(size=len(DATA), sha256=SHA).read_bytes() == DATA
    assert list_sizes(tmp_path) == {"got": len(DATA)}
    assert len(server.asked) == 1


def test_every_cut_goes_on_where_it_was(server, fetch, tmp_path):
    server.cut = 300_000
    assert fetch(sha256=SHA).read_bytes() == DATA
    ranges = [headers.get("Range") for headers in server.asked]
    assert ranges == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]
    for headers in server.asked[1:]:
        assert headers["If-Range"] == '"one"'
    assert list_sizes(tmp_path) == {"got": len(DATA)}


def test_a_truncated_download_is_one_line_and_the_same_command_resumes(
    server, fetch, tmp_path, capsys, monkeypatch
):
    remote = download.Remote("got", f"{server.url}/file", sha256=SHA)
    monkeypatch.setattr(script("amazon_c4"), "FILES", [remote, remote])
    server.cuts = [1000, 1000]
    server.cut = 0
    said = refused(capsys, "amazon_c4", tmp_path / "out", "--downloads", tmp_path / "down")
    assert RESUMES in said
    assert "HTTPS_PROXY" in said
    assert "--from" in said
    assert list_sizes(tmp_path)["got.part"] == 2000
    assert "got" not in list_sizes(tmp_path)

    server.cut = None
    server.asked.clear()
    assert fetch(sha256=SHA).read_bytes() == DATA
    assert server.asked[0]["Range"] == "bytes=2000-"


def test_a_file_that_changed_in_between_is_fetched_anew(server, fetch, tmp_path):
    (tmp_path / "down").mkdir()
    (tmp_path / "down/got.part").write_bytes(b"old" * 100)
    (tmp_path / "down/got.part.etag").write_text('"zero"')
    assert fetch().read_bytes() == DATA
    assert server.asked[0]["If-Range"] == '"zero"'


def test_a_part_longer_than_the_file_is_dropped(server, fetch, tmp_path):
    (tmp_path / "down").mkdir()
    (tmp_path / "down/got.part").write_bytes(DATA + b"x")
    assert fetch(sha256=SHA).read_bytes() == DATA
    assert len(server.asked) == 2


def test_the_hubs_hash_is_taken_from_the_redirect(server, fetch, tmp_path):
    assert fetch("/hub").read_bytes() == DATA
    server.linked = "0" * 64
    (tmp_path / "down/got").unlink()
    with pytest.raises(
        download.PrepareError, match="its sha256 is .* was published; it was deleted: run again"
    ):
        fetch("/hub")
    assert list_sizes(tmp_path) == {}


@pytest.mark.parametrize(
    "change, published, why",
    [
        (
            dict(),
            dict(sha256="0" * 64),
            "got.part: its sha256 is .*, 0000000000000000.. was published; it was deleted",
        ),
        (dict(), dict(size=7), "has 1,024,000 bytes, 7 were published; it is another file now"),
        (dict(status=404), {}, "the server answered 404 Not Found; it may have moved"),
        (
            dict(status=503),
            {},
            "the server answered 503 Service Unavailable; the same command goes on",
        ),
        (dict(sized=False), {}, "does not say which bytes it sends"),
        (dict(cut=0), {}, "the connection ended at 0 of 1,024,000 bytes"),
    ],
)
def test_what_cannot_be_fetched(server, fetch, tmp_path, change, published, why):
    vars(server).update(change)
    with pytest.raises(download.PrepareError, match=why) as e:
        fetch(**published)
    assert "\n" not in str(e.value)
    assert "got" not in list_sizes(tmp_path)


def test_nobody_answers(server, fetch):
    server.shutdown()
    server.server_close()
    with pytest.raises(
        download.PrepareError,
        match="Connection refused.*behind a proxy set HTTPS_PROXY.*offline fetch it elsewhere and "
        "give its folder with --from",
    ):
        fetch()


def test_from_a_folder(server, fetch, tmp_path):
    (tmp_path / "got").write_bytes(DATA)
    assert fetch(source=tmp_path, sha256=SHA) == tmp_path / "got"
    assert not server.asked
    (tmp_path / "got").write_bytes(DATA[:-1])
    with pytest.raises(
        download.PrepareError, match="1,023,999 bytes, 1,024,000 were published; fetch .* again"
    ):
        fetch(source=tmp_path, size=len(DATA))
    (tmp_path / "got").unlink()
    with pytest.raises(
        download.PrepareError, match="no such file; fetch http.*/file into that folder"
    ):
        fetch(source=tmp_path)
