"""A `python` for shell scripts under test that start many small programs: each is a fork of one
process that has imported torch and transformers already, which takes the seconds of every start.

    python warm_python.py SOCKET     serves until it is ended
    write_python(path, SOCKET)       writes the `python` that asks it

What a program sees is as always: its arguments, folder, environment, output, exit code.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
import traceback
from pathlib import Path

# Sends what it was started with, and its three streams; ends with the code that comes back. -S: it
# starts at once, because no site-packages are looked for.
CLIENT = """#!{python} -S
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    job = dict(argv=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))
    message = json.dumps(job).encode()
    socket.send_fds(server, [len(message).to_bytes(4)], [0, 1, 2])
    server.sendall(message)
    code = server.recv(1)
sys.exit(code[0] if code else 1)
"""


def write_python(path: Path, address: Path) -> None:
    """Write an executable file that stands for `python`."""
    path.parent.mkdir(parents=True)
    path.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    path.chmod(0o755)


def serve(address: str) -> None:
    """Run the programs that come in, one after the other."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        while True:
            client, _ = listener.accept()
            with client:
                code = run_forked(client)
                client.sendall(bytes([code]))


def run_forked(client: socket.socket) -> int:
    """Run one program in a fork of this process and return its exit code."""
    head, streams, _, _ = socket.recv_fds(client, 4, 3)
    size = int.from_bytes(head)
    message = b""
    while len(message) < size:
        message += client.recv(size - len(message))
    job = json.loads(message)

    process = os.fork()
    if process == 0:
        os._exit(run_job(job, streams))
    for stream in streams:
        os.close(stream)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status) & 0xFF


def run_job(job: dict, streams: list[int]) -> int:
    """Be the program."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    try:
        run_program(job["argv"])
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def run_program(argv: list[str]) -> None:
    """Run `-c CODE`, `-m MODULE ...` or `FILE ...` as Python would."""
    kind, *rest = argv
    if kind == "-c":
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        sys.path[0] = os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path[0] = str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    import faiss  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModel, AutoTokenizer  # noqa: F401

    import recr1.sft
    import recr1.train  # noqa: F401

    for name in ("recr1.sft", "recr1.train"):
        del sys.modules[name]  # run anew as __main__
    serve(sys.argv[1])
