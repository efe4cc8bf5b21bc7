"""A sample of the faults of tests/faults, and what the heartbeats say of ranks that are gone,
failed or hang.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recr1.distributed import heartbeat

HERE = Path(__file__).parents[1]


def test_a_sample_of_the_faults():
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    env = os.environ | dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", PYTHONPATH=path)
    command = [sys.executable, str(HERE / "faults/faults.py"), "1"]

    process = subprocess.run(
        command, cwd=HERE.parent, env=env, capture_output=True, text=True, timeout=900
    )

    print(process.stdout)
    assert process.returncode == 0, process.stdout + process.stderr
    lines = process.stdout.splitlines()
    bars = json.loads(lines[-1])["bars"]
    assert len(bars) == 17
    for bar in bars:
        assert bar["value"] == 1
        assert bar["bar"] == 1


ORPHAN = ["bash", "-c", "setsid sleep 1000 > /dev/null & echo $!"]


def leave_two_running(writer: int) -> None:
    """Start an orphan and a process that is stopped, write their ids, and get a SIGTERM."""
    orphan = subprocess.run(ORPHAN, stdout=subprocess.PIPE, text=True).stdout
    stopped = subprocess.Popen(["sleep", "1000"])
    os.kill(stopped.pid, signal.SIGSTOP)
    line = f"{orphan.strip()} {stopped.pid}"
    os.write(writer, line.encode())
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def test_nothing_is_left_running(monkeypatch):
    """Not what has been stopped in its tracks, and not what a process has started that is gone
    itself; SIGTERM is as good as Ctrl-C.
    """
    monkeypatch.syspath_prepend(str(HERE / "faults"))
    from jobs import none_left

    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with none_left():
                leave_two_running(writer)
        except KeyboardInterrupt:
            os._exit(42)
        finally:
            os._exit(1)

    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 42
    orphan, stopped = os.read(reader, 100).decode().split()
    assert not Path(f"/proc/{orphan}").exists()
    assert not Path(f"/proc/{stopped}").exists()


@pytest.fixture
def name_lost(tmp_path, monkeypatch):
    """name_lost(states of all ranks but the last...) -> what the last says; a state is (changes, is
    its process alive).
    """
    monkeypatch.setattr(heartbeat, "GRACE_SECONDS", 0.05)
    alive_beats = []

    def name_lost(*others):
        num_ranks = len(others) + 1
        for rank, (changes, alive) in enumerate(others):
            beat = heartbeat.Heartbeat(tmp_path, rank, num_ranks)
            beat.state |= dict(pid=100 + rank, host="h", step=7, phase="reward", calls=7)
            beat.state |= changes
            beat.write()
            if alive:
                alive_beats.append(beat)
            else:
                os.close(beat.file)
        heartbeat.start_heartbeat(tmp_path, len(others), num_ranks)
        heartbeat._heartbeat.state["calls"] = 7
        return heartbeat.name_lost_ranks("Connection closed by peer")

    yield name_lost
    heartbeat.stop_heartbeat()
    for beat in alive_beats:
        os.close(beat.file)


STANDS = ({}, True)
GONE = ({}, False)
FAILED = (dict(left="IndexError: no"), True)
BEHIND = (dict(calls=6), True)
GIVES_UP = (dict(gives_up=True), True)
GAVE_UP = (dict(gives_up=True), False)
FAR_BEHIND = (dict(calls=5), True)
FAILED_AND_GONE = (dict(left="ValueError: x"), False)
# the other ranks, what the last one says
LOST_RANKS = [
    ([GONE], "rank 0 (pid 100, h) is gone; it was in phase reward of step 7"),
    ([FAILED], "rank 0 (pid 100, h) failed in phase reward of step 7: IndexError: no"),
    ([BEHIND], "rank 0 (pid 100, h) has not moved for 0 s: phase reward of step 7"),
    # both stand still, rank 1 has begun one collective less: rank 0 says so
    ([STANDS, BEHIND], None),
    # rank 0 is gone because it had given up on rank 1
    ([GAVE_UP, BEHIND], None),
    ([GIVES_UP], "the ranks lost each other: Connection closed by peer"),
    ([FAR_BEHIND, FAILED_AND_GONE], None),
]


@pytest.mark.parametrize("others, line", LOST_RANKS)
def test_who_is_named_and_by_whom(name_lost, others, line):
    """Only the lowest-numbered rank that is not at fault speaks."""
    assert name_lost(*others) == line


def test_two_ranks_gone_are_both_named(name_lost):
    line = name_lost(GONE, GONE)

    assert line == (
        "rank 0 (pid 100, h) is gone; it was in phase reward of step 7; "
        "rank 1 (pid 101, h) is gone; it was in phase reward of step 7"
    )


def test_heartbeat_file(tmp_path):
    folder = tmp_path / "run/heartbeats"
    folder.parent.mkdir()
    heartbeat.enter_phase("nobody listens")
    heartbeat.start_heartbeat(folder, 0, 1)

    # a rank in a phase
    heartbeat.enter_phase("train 10/12", 3)
    heartbeat.count_collective()
    state = heartbeat.read_heartbeat(folder, 0)
    assert state["pid"] == os.getpid()
    assert state["step"] == 3
    assert state["phase"] == "train 10/12"
    assert state["calls"] == 1
    assert state["left"] == ""
    assert state["gives_up"] is False
    assert state["alive"] is True
    heartbeat.enter_phase("step")
    state = heartbeat.read_heartbeat(folder, 0)
    assert state["phase"] == "step"
    assert state["step"] == 3

    # a rank that failed
    error = ValueError("one\ntwo")
    assert heartbeat.explain_exit(error) is error
    heartbeat.stop_heartbeat()
    state = heartbeat.read_heartbeat(folder, 0)
    assert not state["alive"]
    assert state["left"] == "ValueError: one"

    # no file of the other rank, half a file, and one of an earlier job
    other = folder / "rank_00001.json"
    assert heartbeat.read_heartbeat(folder, 1) is None
    other.write_text("{")
    assert heartbeat.read_heartbeat(folder, 1) is None
    heartbeat.start_heartbeat(folder, 0, 2)
    assert not other.exists()
    heartbeat.stop_heartbeat()


def test_a_second_job_in_the_folder_is_refused(tmp_path, monkeypatch):
    first = heartbeat.Heartbeat(tmp_path, 0, 1)
    monkeypatch.setattr(heartbeat.time, "sleep", lambda s: None)
    message = f"in use by another job \\(pid {os.getpid()}"

    with pytest.raises(heartbeat.RunDirBusy, match=message):
        heartbeat.start_heartbeat(tmp_path, 0, 1)

    os.close(first.file)
    heartbeat.start_heartbeat(tmp_path, 0, 1)
    heartbeat.stop_heartbeat()


def test_a_job_that_has_not_written_its_state_yet_has_the_folder_too(tmp_path, monkeypatch):
    first = heartbeat.Heartbeat(tmp_path, 0, 1)
    os.ftruncate(first.file, 0)
    monkeypatch.setattr(heartbeat.time, "sleep", lambda s: None)

    with pytest.raises(heartbeat.RunDirBusy, match="in use by another job; wait for it"):
        heartbeat.start_heartbeat(tmp_path, 0, 1)

    os.close(first.file)
