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
INTERRUPTED = str(HERE / "helpers/interrupted.py")
TIMES = {"timing_s", "memory", "rollout_tokens_per_s", "tokens_per_s", "reward_wait_frac", "wall_s"}
# these name run.dir, or the time
OWN_FILES = ("config.yaml", "versions.json", "report.html")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return write_yaml(folder, **{"train.steps": 4, "save.every": 2, "train.eval_every": 2})


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """undisturbed(ranks, overrides...) -> the folder of the run that nothing happened to."""
    folders = {}

    def run_once(ranks, *overrides):
        key = (ranks, overrides)
        if key not in folders:
            folder = tmp_path_factory.mktemp("runs") / "run"
            argv = [world, *overrides, f"run.dir={folder}"]
            if ranks == 1:
                assert run_guarded(train.main, argv) == 0
            else:
                torchrun(ranks, "-m", "recr1.train", *argv)
            folders[key] = folder
        return folders[key]

    return run_once


def drop_times(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in TIMES}


def collect_outputs(folder: Path) -> dict:
    """Collect everything of a finished run that may not depend on what happened on the way."""
    outputs = {}
    for path in folder.rglob("*"):
        in_other_folder = {"checkpoints", "heartbeats"} & set(path.parts)
        if path.is_file() and not in_other_folder:
            name = path.relative_to(folder).as_posix()
            outputs[name] = path.read_bytes()
    for name in OWN_FILES:
        del outputs[name]
    del outputs["metrics.jsonl"]
    summary = json.loads(outputs.pop("summary.json"))

    rows = []
    for row in jsonl(folder / "metrics.jsonl"):
        rows.append(drop_times(row))
    outputs["rows"] = rows
    outputs["summary"] = drop_times(summary)
    outputs["best"] = (folder / "checkpoints/BEST").read_text()
    outputs["last"] = (folder / "checkpoints/LATEST").read_text()
    return outputs


def list_checkpoints(folder: Path) -> list[str]:
    names = [path.name for path in (folder / "checkpoints").glob("step_*")]
    return sorted(names)


def read_steps(folder: Path) -> list[int]:
    return [row["step"] for row in jsonl(folder / "metrics.jsonl")]


def stop_training(what: str, argv: list[str], monkeypatch) -> int:
    """Run in this process, with a SIGTERM at that moment; return the exit code."""
    with monkeypatch.context() as patch, signal_handlers():
        at(what, sigterm, patch.setattr)
        return run_guarded(train.main, argv)


# --- stopped runs ---------------------------------------------------------------------------------


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
    folder = tmp_path / "run"
    argv = [world, f"run.dir={folder}"]
    step = MOMENTS[what]

    code = stop_training(what, argv, monkeypatch)

    assert code == 0
    out = capsys.readouterr().out
    checkpoints = list_checkpoints(folder)
    assert "recr1: stopped" in out
    assert not (folder / "summary.json").exists()
    if step == 0:
        assert "nothing new to save" in out
        assert not checkpoints
        begins = "starts from step 1 again"
    else:
        assert "goes on from" in out
        assert checkpoints
        for name in checkpoints:
            assert (folder / "checkpoints" / name / "manifest.json").exists()
        last = int(checkpoints[-1].removeprefix("step_"))
        assert step is None or last == step
        begins = f"goes on after step {last} from {tmp_path}"

    code = run_guarded(train.main, argv)

    assert code == 0
    out = capsys.readouterr().out
    assert begins in out
    assert "not bit for bit" not in out
    assert collect_outputs(folder) == collect_outputs(undisturbed(1))


EVERY_SETTING = (
    "loss.kl_coef=0.05",
    "train.num_mini_batches=2",
    "sampling.dynamic_sampling=1",
    "data.shuffle_words=0.5",
    "optimizer.warmup_steps=2",
    "optimizer.min_lr_ratio=0.1",
    "train.eval_every=1",
    "optimizer.weight_decay=0.1",
)


@pytest.mark.parametrize("lora", [(), ("lora.rank=3",)], ids=["whole", "lora"])
def test_several_stops_with_all_that_a_config_can_ask_for(
    lora, world, undisturbed, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    settings = (*EVERY_SETTING, *lora)
    argv = [world, *settings, f"run.dir={folder}"]

    for what in ("sample@3", "evaluate@1", "evaluate@2"):
        assert stop_training(what, argv, monkeypatch) == 0
    assert run_guarded(train.main, argv) == 0

    ours = collect_outputs(folder)
    want = collect_outputs(undisturbed(1, *settings))
    # of equal ones the first that was saved
    best = {ours.pop("best"), want.pop("best")}
    assert best <= {"step_000001\n", "step_000002\n"}
    assert ours == want


def test_a_step_that_has_moved_weights_is_finished_first(world, tmp_path, monkeypatch, capsys):
    """Two optimizer steps of two micro-batches each: the signal comes in the second one."""
    argv = [world, "train.num_mini_batches=2", "train.tokens_per_micro_batch=100"]
    make_updates = train.make_updates
    calls = []

    def record_updates(*arguments):
        updates = make_updates(*arguments)
        calls.append(updates)
        return updates

    monkeypatch.setattr(train, "make_updates", record_updates)
    counting = [*argv, "train.steps=1", f"run.dir={tmp_path / 'counted'}"]
    assert run_guarded(train.main, counting) == 0
    first, second = (len(batches) for _, batches in calls[0])
    folder = tmp_path / "run"

    code = stop_training(f"batch@{first + 1}", [*argv, f"run.dir={folder}"], monkeypatch)

    assert code == 0
    assert "stopped after step 1" in capsys.readouterr().out
    assert second >= 1
    assert read_steps(folder) == [1]


def test_two_ranks_one_of_them_is_told(world, undisturbed, tmp_path):
    """SIGTERM to rank 1 alone, in its second step's sampling; then a kill of rank 0; then to the
    end.
    """
    folder = tmp_path / "run"
    argv = [world, f"run.dir={folder}"]

    torchrun(2, INTERRUPTED, "sigterm-sample@2:1", *argv)
    assert (folder / "checkpoints/LATEST").read_text() == "step_000001\n"
    torchrun(2, INTERRUPTED, "sigkill-sample@2:0", *argv, expect=1)
    process = torchrun(2, "-m", "recr1.train", *argv)

    assert "goes on after step 2" in process.stdout
    assert "not bit for bit" not in process.stdout
    assert collect_outputs(folder) == collect_outputs(undisturbed(2))


def test_sigterm_to_torchrun_is_a_clean_end_of_every_rank(world, tmp_path):
    """torchrun passes it on; both ranks leave with 0, so that no rank is reported as failed."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "recr1.train", world]
    command += ["train.steps=100000", "train.eval_every=0", f"run.dir={folder}"]
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=path)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process = subprocess.Popen(command, cwd=HERE.parent, env=env, **pipes)
    for line in process.stdout:
        if line.startswith("step     3/"):
            process.terminate()
            break
    out, err = process.communicate(timeout=120)

    assert "recr1: stopped after step" in out
    assert "exitcode" not in err
    traceback = 'Traceback (most recent call last):\n  File "' + str(HERE.parent / "recr1")
    assert traceback not in err
    latest = (folder / "checkpoints/LATEST").read_text().strip()
    step = int(latest.removeprefix("step_"))
    assert len(read_steps(folder)) == step
    assert step >= 3


# --- the same command again -----------------------------------------------------------------------


def stop_in_third_step(world: str, folder: Path, monkeypatch) -> None:
    code = stop_training("sample@3", [world, f"run.dir={folder}"], monkeypatch)
    assert code == 0


def test_the_evaluation_before_training_is_made_once(world, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    stop_in_third_step(world, folder, monkeypatch)
    path = folder / "eval_before.jsonl"
    rows = jsonl(path)
    rows[0]["text"] = "kept"
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))

    code = run_guarded(train.main, [world, f"run.dir={folder}"])

    assert code == 0
    first = jsonl(path)[0]
    assert first["text"] == "kept"


OTHER_CONFIGS = [
    ("optimizer.lr=0.002", "optimizer.lr was 0.001, is 0.002"),
    ("train.steps=5", "train.steps was 4, is 5"),
    ("run.seed=1", "run.seed was 0, is 1"),
    ("sampling.max_new_tokens=13", "sampling.max_new_tokens was 12, is 13"),
    ("optimizer.betas=[0.9, 0.95]", "optimizer.betas"),
]


@pytest.mark.parametrize("override, message", OTHER_CONFIGS)
def test_another_config_is_refused_with_both_values(
    override, message, world, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    stop_in_third_step(world, folder, monkeypatch)

    line = refused([world, override, f"run.dir={folder}"], capsys)

    assert message in line


def test_what_may_differ(world, tmp_path, monkeypatch, capsys):
    """Another kind of CPU and what saves memory too, but then not bit for bit; the folder may have
    been moved.
    """
    stop_in_third_step(world, tmp_path / "run", monkeypatch)
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "run", moved)
    argv = [world, "save.every=1", "save.keep_last=5", "log.print_every=3"]
    argv += ["run.collective_timeout=99", f"run.dir={moved}"]
    argv += ["train.tokens_per_micro_batch=128", "train.gradient_checkpointing=true"]
    argv += ["optimizer.cpu_offload=true"]
    before = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")

    code = run_guarded(train.main, argv)

    assert code == 0
    warning = (
        f"not bit for bit the same run: cpu {before} -> another, "
        "train.tokens_per_micro_batch 256 -> 128\n"
    )
    assert warning in capsys.readouterr().out
    assert read_steps(moved) == [1, 2, 3, 4]
    assert list_checkpoints(moved) == ["step_000002", "step_000003", "step_000004"]


def test_a_finished_run_is_refused(world, undisturbed, capsys):
    folder = undisturbed(1)

    line = refused([world, f"run.dir={folder}"], capsys)

    assert "finished" in line


def test_a_run_killed_before_its_config_was_written_starts(world, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml.partial").write_text("task: prod")

    code = run_guarded(train.main, [world, "train.steps=1", f"run.dir={folder}"])

    assert code == 0


def test_without_checkpoints_a_run_starts_again_and_its_logs_with_it(
    world, undisturbed, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    argv = [world, "save.every=0", f"run.dir={folder}"]

    def interrupt(result):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at("log@3", interrupt, patch.setattr)
        run_guarded(train.main, argv)
    assert not (folder / "checkpoints").exists()
    assert read_steps(folder)

    code = run_guarded(train.main, argv)

    assert code == 0
    assert "no checkpoint: starts from step 1 again" in capsys.readouterr().out
    assert not (folder / "checkpoints").exists()
    want = undisturbed(1)
    for name in ("model/model.safetensors", "rollouts.jsonl.gz"):
        assert (folder / name).read_bytes() == (want / name).read_bytes()


# --- values that are not finite -------------------------------------------------------------------


BATCH_TENSORS = ("tokens", "target", "advantages", "sampler_logp", "prompt_of", "weight")


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
        process = torchrun(2, INTERRUPTED, "nan-batch@1:1", *argv, expect=1)
        lines = process.stderr.splitlines()
        [line] = [line for line in lines if line.startswith("recr1:")]

    batches = folder / "nonfinite/step_000001"
    assert "step 1: the gradient norm is nan; no weight was changed" in line
    assert line.endswith(f"its batches are in {batches}")
    assert not (folder / "checkpoints").exists()
    assert not (folder / "model").exists()
    for rank in range(ranks):
        is_last = rank == ranks - 1
        bad = [0] if is_last else []
        check_batches(batches / f"rank_{rank:05d}", bad)


def check_batches(stem: Path, want_bad: list[int]) -> None:
    """Check a rank's note of its batches, which losses in it are not finite, and its tensors."""
    note = json.loads(Path(f"{stem}.json").read_text())
    losses = note["losses"]
    bad = [i for i, loss in enumerate(losses) if not abs(loss) < float("inf")]
    assert bad == want_bad
    assert note["texts"]
    assert {"prompt", "reward", "advantage"} <= note["texts"][0].keys()
    with safe_open(f"{stem}.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    for name in BATCH_TENSORS:
        assert f"{len(losses) - 1}.{name}" in names


SKIPPING = [
    "optimizer.on_nonfinite=skip",
    "train.tokens_per_micro_batch=2000",
    "train.prompts_per_step=8",
]


def test_skipped_steps_are_counted_and_too_many_in_a_row_stop(world, tmp_path, monkeypatch, capsys):
    argv = [world, *SKIPPING]
    one = tmp_path / "one"
    with monkeypatch.context() as patch:
        at("batch@2", nan, patch.setattr)
        assert run_guarded(train.main, [*argv, f"run.dir={one}"]) == 0
    assert "no weight was changed; its batches are in" in capsys.readouterr().out
    skipped = [row["skipped_steps"] for row in jsonl(one / "metrics.jsonl")]
    assert skipped == [0, 1, 1, 1]

    compute_policy_loss = train.compute_policy_loss

    def compute_nan_loss(*arguments):
        result = compute_policy_loss(*arguments)
        return nan(result)

    monkeypatch.setattr(train, "compute_policy_loss", compute_nan_loss)
    three = tmp_path / "three"
    line = refused([*argv, "optimizer.max_skips=3", f"run.dir={three}"], capsys)
    assert "3 optimizer steps in a row" in line
    assert len(read_steps(three)) == 2

    # the count outlives the process, and no more than five steps are kept
    seven = tmp_path / "seven"
    argv += ["optimizer.max_skips=7", "train.steps=9", "save.every=1", f"run.dir={seven}"]
    assert stop_training("sample@4", argv, monkeypatch) == 0
    line = refused(argv, capsys)
    assert "step 7: 7 optimizer steps in a row" in line
    assert "its batches are not kept" in line
    steps = [path.name for path in (seven / "nonfinite").iterdir()]
    want = [f"step_{step:06d}" for step in range(1, 6)]
    assert sorted(steps) == want
