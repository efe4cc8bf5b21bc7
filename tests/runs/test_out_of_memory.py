"""Memory runs out: one line, what to set, and nothing lost that could be saved."""

import numpy as np
import pytest
import torch
from helpers.interrupted import GPU_IS_FULL, at, exhaust
from helpers.tiny_world import refused, write_sft_yaml, write_yaml
from test_ranks import torchrun
from test_resume import INTERRUPTED, collect_outputs

from recr1 import sft, train
from recr1.memory.out_of_memory import describe_allocation, is_out_of_memory
from recr1.memory.plan import BUDGET, LADDER
from recr1.training.launch import run_guarded
from recr1.training.run_dir import CHANGEABLE_KEYS

PETABYTE = 1 << 50


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return write_yaml(folder, **{"train.steps": 3, "save.every": 2, "train.eval_every": 2})


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run_guarded(train.main, [world, f"run.dir={folder}"]) == 0
    return collect_outputs(folder)


def allocate_too_much(result):
    """Ask a CPU for what no machine has: torch's own error, not one that is made up."""
    torch.empty(PETABYTE, dtype=torch.uint8)


def raise_at(what: str, action, argv: list[str], capsys, main=train.main) -> str:
    """Run with an error at that moment; return the one line on stderr."""
    with pytest.MonkeyPatch.context() as patch:
        at(what, action, patch.setattr)
        return refused(argv, capsys, main)


@pytest.mark.parametrize("action", [allocate_too_much, exhaust])
@pytest.mark.parametrize("what, phase", [("sample@2", "sample"), ("batch@2", "train 1/1")])
def test_the_last_step_is_saved_and_the_run_goes_on(
    action, what, phase, world, undisturbed, tmp_path, capsys
):
    folder = tmp_path / "run"
    argv = [world, f"run.dir={folder}"]

    line = raise_at(what, action, argv, capsys)

    assert f"out of memory in phase {phase} of step 2: could not allocate" in line
    assert "; add train." in line or "; no setting needs a tenth less: take more memory" in line
    assert line.endswith(f"same command goes on from {folder}/checkpoints/step_000001\n")
    assert run_guarded(train.main, argv) == 0
    assert collect_outputs(folder) == undisturbed


def test_every_setting_that_the_plan_advises_may_change_in_a_run():
    """Else the advice would cost the steps so far."""
    advised = {key for options in LADDER for key in options}

    assert advised | {BUDGET} <= set(CHANGEABLE_KEYS)


def test_sft(tmp_path, capsys):
    argv = [write_sft_yaml(tmp_path), f"run.dir={tmp_path / 'run'}"]

    line = raise_at("lesson@3", exhaust, argv, capsys, sft.main)

    assert "set train.gradient_checkpointing=true, or a smaller train.tokens_per" in line
    assert "goes on from" in line


def test_before_the_first_step(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("recr1.training.setup.load_policy", lambda *_: exhaust(None))
    folder = tmp_path / "run"

    line = refused([world, f"run.dir={folder}"], capsys)

    assert line == (
        "recr1: out of memory: "
        "could not allocate 20.00 GiB on a GPU with 10.50 GiB free of 139.72 GiB\n"
    )
    assert not folder.exists()


def test_on_one_rank_while_all_sample(world, tmp_path):
    """All ranks learn of it and save together; rank 0 says the line, once, and names the rank."""
    folder = tmp_path / "run"

    process = torchrun(2, INTERRUPTED, "exhaust-sample@2:1", world, f"run.dir={folder}", expect=1)

    assert process.stderr.count("recr1: out of memory on rank 1 while rank 0 was in phase") == 1
    assert "goes on from" in process.stderr
    assert (folder / "checkpoints/LATEST").read_text() == "step_000001\n"


def test_on_one_rank_in_training(world, tmp_path):
    """The others wait for it in a collective: it says what happened, and they say which rank."""
    folder = tmp_path / "run"

    process = torchrun(2, INTERRUPTED, "exhaust-batch@2:1", world, f"run.dir={folder}", expect=1)

    assert process.stderr.count("recr1: out of memory in phase train") == 1
    assert "this rank alone has failed: the steps after the start are lost" in process.stderr
    assert "recr1: rank 1 (pid" in process.stderr
    assert ": OutOfMemory: out of memory in phase train" in process.stderr
    assert not (folder / "checkpoints/LATEST").exists()


def raise_and_catch(work) -> BaseException:
    with pytest.raises(Exception) as caught:
        work()
    return caught.value


def test_what_counts_as_out_of_memory():
    of_torch = raise_and_catch(lambda: torch.empty(PETABYTE, dtype=torch.uint8))
    of_numpy = raise_and_catch(lambda: np.empty(PETABYTE, np.uint8))
    of_a_gpu = torch.OutOfMemoryError(GPU_IS_FULL)
    of_pinned_memory = RuntimeError("CUDA error: out of memory\nCUDA kernel errors might ...")

    for error in (of_torch, of_numpy, of_a_gpu, of_pinned_memory):
        assert is_out_of_memory(error)
    for error in (RuntimeError("out of memory, says a user"), ValueError(GPU_IS_FULL)):
        assert not is_out_of_memory(error)

    assert describe_allocation(of_torch) == f"could not allocate {PETABYTE} bytes"
    assert describe_allocation(of_numpy) == "could not allocate 1.00 PiB"
    assert describe_allocation(of_a_gpu).endswith("on a GPU with 10.50 GiB free of 139.72 GiB")
    assert describe_allocation(of_pinned_memory).startswith("CUDA error: out of memory CUDA")
    assert describe_allocation(MemoryError()) == "MemoryError"
