"""A run that was stopped, killed or refused: what it goes on from, that it then is the undisturbed
run, and what it does with values that are not finite.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.interrupted import at, infinite, nan, sigterm
from helpers.tiny_world import jsonl, refused, write_yaml
from safetensors import safe_open
from test_ranks import torchrun

from recr1 import train
from recr1.training.launch import run_guarded
from recr1.utils.interrupts import signal_handlers

HERE = Path(__file__).resolve().parents[1]
TIMES = {"timing_s", "memory", "rollout_tokens_per_s", "tokens_per_s", "reward_wait_frac", "wall_s"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_yaml(
        tmp_path_factory.mktemp("world"),
        **{"train.steps": 4, "save.every": 2, "train.eval_every": 2},
    )


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """undisturbed(ranks, overrides...) -> the folder of the run that nothing happened to."""
    done = {}

    def run(ranks, *overrides):
        if (ranks, overrides) not in done:
            done[ranks, overrides] = folder = tmp_path_factory.mktemp("runs") / "run"
            if ranks == 1:
                assert run_guarded(train.main, [world, *overrides, f"run.dir={folder}"]) == 0
            else:
                torchrun(ranks, "-m", "recr1.train", world, *overrides, f"run.dir={folder}")
        return done[ranks, overrides]

    return run


def kept(folder: Path) -> dict:
    """Everything of a finished run that may not depend on what happened on the way."""
    files = {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and not {"checkpoints", "heartbeats"} & set(p.parts)
    }
    for name in ("config.yaml", "versions.json", "report.html"):  # name run.dir, or the time
        del files[name]
    rows = [
        {k: v for k, v in json.loads(line).items() if k not in TIMES}
        for line in files.pop("metrics.jsonl").decode().splitlines()
    ]
    summary = {k: v for k, v in json.loads(files.pop("summary.json")).items() if k not in TIMES}
    return files | dict(
        rows=rows,
        summary=summary,
        best=(folder / "checkpoints/BEST").read_text(),
        last=(folder / "checkpoints/LATEST").read_text(),
    )


def stop(what: str, argv: list[str], monkeypatch) -> int:
    """The run in this process, with a SIGTERM at that moment."""
    with monkeypatch.context() as patch, signal_handlers():
        at(what, sigterm, patch.setattr)
        return run_guarded(train.main, argv)


# what is going on when SIGTERM comes: the step after which the run is saved, 0: none is
MOMENTS = {
    "index@1": 0,
    "evaluate@1": 0,
    "batch@1": 0,
    "sample@2": 1,
    "batch@4": None,
    "evaluate@2": 2,
    "log@3": 3,
    "save@1": 2,
    "evaluate@4": 4,
}


@pytest.mark.parametrize("what", MOMENTS)
def test_sigterm_then_the_same_command_is_the_undisturbed_run(
    what, world, undisturbed, tmp_path, monkeypatch, capsys
):
    argv = [world, f"run.dir={tmp_path / 'run'}"]
    step = MOMENTS[what]
    assert stop(what, argv, monkeypatch) == 0
    said = capsys.readouterr().out
    saved = sorted(p.name for p in (tmp_path / "run/checkpoints").glob("step_*"))
    assert "recr1: stopped" in said
    assert not (tmp_path / "run/summary.json").exists()
    if step == 0:
        assert "nothing new to save" in said
        assert not saved
    else:
        assert "goes on from" in said
        assert saved
        assert all(
            (tmp_path / "run/checkpoints" / name / "manifest.json").exists() for name in saved
        )
        assert step is None or saved[-1] == f"step_{step:06d}"
    assert run_guarded(train.main, argv) == 0
    said = capsys.readouterr().out
    assert (
        "starts from step 1 again"
        if step == 0
        else f"goes on after step {int(saved[-1][5:])} from {tmp_path}"
    ) in said
    assert "not bit for bit" not in said
    assert kept(tmp_path / "run") == kept(undisturbed(1))


def test_several_stops_with_all_that_a_config_can_ask_for(
    world, undisturbed, tmp_path, monkeypatch
):
    more = (
        "loss.kl_coef=0.05",
        "train.num_mini_batches=2",
        "sampling.dynamic_sampling=1",
        "data.shuffle_words=0.5",
        "optimizer.warmup_steps=2",
        "optimizer.min_lr_ratio=0.1",
        "train.eval_every=1",
        "optimizer.weight_decay=0.1",
    )
    argv = [world, *more, f"run.dir={tmp_path / 'run'}"]
    for what in ("sample@3", "evaluate@1", "evaluate@2"):
        assert stop(what, argv, monkeypatch) == 0
    assert run_guarded(train.main, argv) == 0
    ours = kept(tmp_path / "run")
    want = kept(undisturbed(1, *more))
    # of equal ones the first that was saved
    assert {ours.pop("best"), want.pop("best")} <= {"step_000001\n", "step_000002\n"}
    assert ours == want


def test_a_step_that_has_moved_weights_is_finished_first(world, tmp_path, monkeypatch, capsys):
    """Two optimizer steps of two micro-batches each: the signal comes in the second one."""
    argv = [
        world,
        "train.num_mini_batches=2",
        "train.tokens_per_micro_batch=100",
        f"run.dir={tmp_path / 'run'}",
    ]
    monkeypatch.setattr(
        train,
        "make_updates",
        lambda *a, inner=train.make_updates: counted.append(inner(*a)) or counted[-1],
    )
    counted = []
    assert (
        run_guarded(train.main, [*argv[:-1], "train.steps=1", f"run.dir={tmp_path / 'counted'}"])
        == 0
    )
    first, second = (len(batches) for _, batches in counted[0])
    assert stop(f"batch@{first + 1}", argv, monkeypatch) == 0
    assert "stopped after step 1" in capsys.readouterr().out
    assert second >= 1
    assert [row["step"] for row in jsonl(tmp_path / "run/metrics.jsonl")] == [1]


def test_two_ranks_one_of_them_is_told(world, undisturbed, tmp_path):
    """SIGTERM to rank 1 alone, in its second step's sampling; then a kill of rank 0; then to the
    end.
    """
    argv = [world, f"run.dir={tmp_path / 'run'}"]
    torchrun(2, str(HERE / "helpers/interrupted.py"), "sigterm-sample@2:1", *argv)
    assert (tmp_path / "run/checkpoints/LATEST").read_text() == "step_000001\n"
    torchrun(2, str(HERE / "helpers/interrupted.py"), "sigkill-sample@2:0", *argv, expect=1)
    done = torchrun(2, "-m", "recr1.train", *argv)
    assert "goes on after step 2" in done.stdout
    assert "not bit for bit" not in done.stdout
    assert kept(tmp_path / "run") == kept(undisturbed(2))


def test_sigterm_to_torchrun_is_a_clean_end_of_every_rank(world, tmp_path):
    """torchrun passes it on; both ranks leave with 0, so that no rank is reported as failed."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "recr1.train",
        world,
        "train.steps=100000",
        "train.eval_every=0",
        f"run.dir={tmp_path / 'run'}",
    ]
    env = os.environ | dict(
        OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent)])
    )
    process = subprocess.Popen(
        command, cwd=HERE.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step     3/"):
            process.terminate()
            break
    out, err = process.communicate(timeout=120)
    assert "recr1: stopped after step" in out
    assert "exitcode" not in err
    assert 'Traceback (most recent call last):\n  File "' + str(HERE.parent / "recr1") not in err
    name = (tmp_path / "run/checkpoints/LATEST").read_text().strip()
    assert len(jsonl(tmp_path / "run/metrics.jsonl")) == int(name[5:]) >= 3


def started(world, folder, monkeypatch, *overrides) -> Path:
    """A run stopped in its third step."""
    assert stop("sample@3", [world, *overrides, f"run.dir={folder}"], monkeypatch) == 0
    return folder


def test_the_evaluation_before_training_is_made_once(world, tmp_path, monkeypatch):
    folder = started(world, tmp_path / "run", monkeypatch)
    rows = jsonl(folder / "eval_before.jsonl")
    rows[0]["text"] = "kept"
    (folder / "eval_before.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_guarded(train.main, [world, f"run.dir={folder}"]) == 0
    assert jsonl(folder / "eval_before.jsonl")[0]["text"] == "kept"


@pytest.mark.parametrize(
    "override, message",
    [
        ("optimizer.lr=0.002", "optimizer.lr was 0.001, is 0.002"),
        ("train.steps=5", "train.steps was 4, is 5"),
        ("run.seed=1", "run.seed was 0, is 1"),
        ("train.tokens_per_micro_batch=300", "train.tokens_per_micro_batch was 256, is 300"),
        ("optimizer.betas=[0.9, 0.95]", "optimizer.betas"),
    ],
)
def test_another_config_is_refused_with_both_values(
    override, message, world, tmp_path, monkeypatch, capsys
):
    folder = started(world, tmp_path / "run", monkeypatch)
    assert message in refused([world, override, f"run.dir={folder}"], capsys)


def test_what_may_differ(world, tmp_path, monkeypatch, capsys):
    """Another kind of CPU too, but then not bit for bit; the folder may have been moved."""
    shutil.move(started(world, tmp_path / "run", monkeypatch), tmp_path / "moved")
    argv = [
        world,
        "save.every=1",
        "save.keep_last=5",
        "log.print_every=3",
        "run.collective_timeout=99",
        f"run.dir={tmp_path / 'moved'}",
    ]
    before = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert run_guarded(train.main, argv) == 0
    assert f"not bit for bit the same run: cpu {before} -> another" in capsys.readouterr().out
    assert [row["step"] for row in jsonl(tmp_path / "moved/metrics.jsonl")] == [1, 2, 3, 4]
    assert sorted(p.name for p in (tmp_path / "moved/checkpoints").glob("step_*")) == [
        f"step_{i:06d}" for i in (2, 3, 4)
    ]


def test_a_finished_run_is_refused(world, undisturbed, capsys):
    assert "finished" in refused([world, f"run.dir={undisturbed(1)}"], capsys)


def test_a_run_killed_before_its_config_was_written_starts(world, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml.partial").write_text("task: prod")
    assert run_guarded(train.main, [world, "train.steps=1", f"run.dir={tmp_path / 'run'}"]) == 0


def test_without_checkpoints_a_run_starts_again_and_its_logs_with_it(
    world, undisturbed, tmp_path, monkeypatch, capsys
):
    argv = [world, "save.every=0", f"run.dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupted(result):
            raise KeyboardInterrupt

        at("log@3", interrupted, patch.setattr)
        run_guarded(train.main, argv)
    assert not (tmp_path / "run/checkpoints").exists()
    assert jsonl(tmp_path / "run/metrics.jsonl")
    assert run_guarded(train.main, argv) == 0
    assert "no checkpoint: starts from step 1 again" in capsys.readouterr().out
    assert not (tmp_path / "run/checkpoints").exists()
    for name in ("model/model.safetensors", "rollouts.jsonl.gz"):
        assert (tmp_path / "run" / name).read_bytes() == (undisturbed(1) / name).read_bytes()


@pytest.mark.parametrize("kind, ranks", [("nan", 2), ("infinite", 1)])
def test_one_ranks_value_that_is_not_finite_stops_all_and_its_batches_are_kept(
    kind, ranks, world, tmp_path, monkeypatch, capsys
):
    """`infinite`: the loss alone, with a gradient that is finite."""
    folder = tmp_path / "run"
    argv = [world, "train.tokens_per_micro_batch=100", f"run.dir={folder}"]
    if ranks == 1:
        at("batch@1", infinite, monkeypatch.setattr)
        line = refused(argv, capsys).rstrip()
    else:
        done = torchrun(2, str(HERE / "helpers/interrupted.py"), "nan-batch@1:1", *argv, expect=1)
        [line] = [line for line in done.stderr.splitlines() if line.startswith("recr1:")]
    assert "step 1: the gradient norm is nan; no weight was changed" in line
    assert line.endswith(f"its batches are in {folder / 'nonfinite/step_000001'}")
    assert not (folder / "checkpoints").exists()
    assert not (folder / "model").exists()
    for rank in range(ranks):
        kept = json.loads((folder / f"nonfinite/step_000001/rank_{rank:05d}.json").read_text())
        bad = [i for i, loss in enumerate(kept["losses"]) if not abs(loss) < float("inf")]
        assert bad == ([0] if rank == ranks - 1 else [])
        assert kept["texts"]
        assert {"prompt", "reward", "advantage"} <= kept["texts"][0].keys()
        with safe_open(folder / f"nonfinite/step_000001/rank_{rank:05d}.safetensors", "pt") as f:
            assert {
                f"{len(kept['losses']) - 1}.{name}"
                for name in (
                    "tokens",
                    "target",
                    "advantages",
                    "sampler_logp",
                    "prompt_of",
                    "weight",
                )
            } <= set(f.keys())


def test_skipped_steps_are_counted_and_too_many_in_a_row_stop(world, tmp_path, monkeypatch, capsys):
    argv = [
        world,
        "optimizer.on_nonfinite=skip",
        "train.tokens_per_micro_batch=2000",
        "train.prompts_per_step=8",
    ]
    with monkeypatch.context() as patch:
        at("batch@2", nan, patch.setattr)
        assert run_guarded(train.main, [*argv, f"run.dir={tmp_path / 'one'}"]) == 0
    assert "no weight was changed; its batches are in" in capsys.readouterr().out
    assert [row["skipped_steps"] for row in jsonl(tmp_path / "one/metrics.jsonl")] == [0, 1, 1, 1]
    inner = train.compute_policy_loss
    monkeypatch.setattr(train, "compute_policy_loss", lambda *a: nan(inner(*a)))
    assert "3 optimizer steps in a row" in refused(
        [*argv, "optimizer.max_skips=3", f"run.dir={tmp_path / 'run'}"], capsys
    )
    assert len(jsonl(tmp_path / "run/metrics.jsonl")) == 2
    # the count outlives the process, and no more than five steps are kept
    argv = [
        *argv,
        "optimizer.max_skips=7",
        "train.steps=9",
        "save.every=1",
        f"run.dir={tmp_path / 'more'}",
    ]
    assert stop("sample@4", argv, monkeypatch) == 0
    assert (
        "step 7: 7 optimizer steps in a row" in (err := refused(argv, capsys))
        and "its batches are not kept" in err
    )
    assert sorted(p.name for p in (tmp_path / "more/nonfinite").iterdir()) == [
        f"step_{i:06d}" for i in range(1, 6)
    ]
