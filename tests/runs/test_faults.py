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
    env = os.environ | dict(
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent)]),
    )
    done = subprocess.run(
        [sys.executable, str(HERE / "faults/faults.py"), "1"],
        cwd=HERE.parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    bars = json.loads(done.stdout.splitlines()[-1])["bars"]
    assert len(bars) == 17
    assert all(bar["value"] == bar["bar"] == 1 for bar in bars)


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
                orphan = subprocess.run(
                    ["bash", "-c", "setsid sleep 1000 > /dev/null & echo $!"],
                    stdout=subprocess.PIPE,
                    text=True,
                ).stdout
                stopped = subprocess.Popen(["sleep", "1000"])
                os.kill(stopped.pid, signal.SIGSTOP)
                os.write(writer, f"{orphan.strip()} {stopped.pid}".encode())
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
        except KeyboardInterrupt:
            os._exit(42)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    left = [int(number) for number in os.read(reader, 100).split()]
    assert len(left) == 2
    assert not any(Path(f"/proc/{number}").exists() for number in left)


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """ranks(states of all ranks but the last...) -> what the last says; a state is (changes, is its
    process alive).
    """
    monkeypatch.setattr(heartbeat, "GRACE_SECONDS", 0.05)
    held = []

    def ranks(*others):
        for rank, (state, alive) in enumerate(others):
            held.append(heartbeat.Heartbeat(tmp_path, rank, len(others) + 1))
            held[-1].state |= (
                dict(pid=100 + rank, host="h", step=7, phase="reward", calls=7) | state
            )
            held[-1].write()
            if not alive:
                os.close(held.pop().file)
        heartbeat.start_heartbeat(tmp_path, len(others), len(others) + 1)
        heartbeat._heartbeat.state["calls"] = 7
        return heartbeat.name_lost_ranks("Connection closed by peer")

    yield ranks
    heartbeat.stop_heartbeat()
    for other in held:
        os.close(other.file)


@pytest.mark.parametrize(
    "others, line",
    [
        ([({}, False)], "rank 0 (pid 100, h) is gone; it was in phase reward of step 7"),
        (
            [(dict(left="IndexError: no"), True)],
            "rank 0 (pid 100, h) failed in phase reward of step 7: IndexError: no",
        ),
        (
            [(dict(calls=6), True)],
            "rank 0 (pid 100, h) has not moved for 0 s: phase reward of step 7",
        ),
        # both stand still, rank 1 has begun one collective less: rank 0 says so
        ([({}, True), (dict(calls=6), True)], None),
        # rank 0 is gone because it had given up on rank 1
        ([(dict(gives_up=True), False), (dict(calls=6), True)], None),
        ([(dict(gives_up=True), True)], "the ranks lost each other: Connection closed by peer"),
        ([(dict(calls=5), True), (dict(left="ValueError: x"), False)], None),
    ],
)
def test_who_is_named_and_by_whom(ranks, others, line):
    """Only the lowest-numbered rank that is not at fault speaks."""
    assert ranks(*others) == line


def test_two_ranks_gone_are_both_named(ranks):
    assert ranks(({}, False), ({}, False)) == (
        "rank 0 (pid 100, h) is gone; it was in phase reward of step 7; "
        "rank 1 (pid 101, h) is gone; it was in phase reward of step 7"
    )


def test_heartbeat_file(tmp_path):
    folder = tmp_path / "run/heartbeats"
    folder.parent.mkdir()
    heartbeat.enter_phase("nobody listens")
    heartbeat.start_heartbeat(folder, 0, 1)
    heartbeat.enter_phase("train 10/12", 3)
    heartbeat.count_collective()
    state = heartbeat.read_heartbeat(folder, 0)
    assert state == state | dict(
        pid=os.getpid(), step=3, phase="train 10/12", calls=1, left="", gives_up=False, alive=True
    )
    heartbeat.enter_phase("step")
    state = heartbeat.read_heartbeat(folder, 0)
    assert (state["phase"], state["step"]) == ("step", 3)
    error = ValueError("one\ntwo")
    assert heartbeat.explain_exit(error) is error
    heartbeat.stop_heartbeat()
    state = heartbeat.read_heartbeat(folder, 0)
    assert not state["alive"]
    assert state["left"] == "ValueError: one"
    assert heartbeat.read_heartbeat(folder, 1) is None
    (folder / "rank_00001.json").write_text("{")
    assert heartbeat.read_heartbeat(folder, 1) is None
    heartbeat.start_heartbeat(folder, 0, 2)
    assert not (folder / "rank_00001.json").exists()  # an earlier job's
    heartbeat.stop_heartbeat()


def test_a_second_job_in_the_folder_is_refused(tmp_path, monkeypatch):
    first = heartbeat.Heartbeat(tmp_path, 0, 1)
    monkeypatch.setattr(heartbeat.time, "sleep", lambda s: None)
    with pytest.raises(heartbeat.RunDirBusy, match=f"in use by another job \\(pid {os.getpid()}"):
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
