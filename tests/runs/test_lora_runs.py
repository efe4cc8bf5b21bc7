"""Runs with LoRA: what they train, save, resume and explain; whole, from the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_world import jsonl, runs_of, write_sft_yaml, write_yaml
from safetensors.torch import load_file

from recr1 import cli, sft, train
from recr1.model.hf_weights import SafetensorsFolder
from recr1.training.launch import run_guarded

LORA = ("lora.rank=4", "lora.alpha=8", "optimizer.lr=0.01")
FILES = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return run(overrides...) -> the folder of a finished run with LoRA."""
    config = write_yaml(tmp_path_factory.mktemp("world"), **{"save.every": 1, "train.steps": 3})
    finished = runs_of(train.main, config, tmp_path_factory)
    return lambda *overrides: finished(*LORA, *overrides)


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def read_base(run_dir: Path) -> SafetensorsFolder:
    config = (run_dir / "config.yaml").read_text()
    [line] = [line for line in config.splitlines() if line.startswith("  path: ")]
    return SafetensorsFolder(line.removeprefix("  path: "))


def assert_equal_adapters(ours: Path, theirs: Path) -> None:
    ours_weights = read_adapter(ours)
    their_weights = read_adapter(theirs)
    assert ours_weights.keys() == their_weights.keys()
    for name, weight in ours_weights.items():
        assert weight.equal(their_weights[name]), name


def test_a_run_writes_the_adapter_and_the_model_that_it_is_merged_into(run):
    folder = run()

    adapter = read_adapter(folder / "adapter")
    merged = SafetensorsFolder(str(folder / "model"))
    base = read_base(folder)
    assert {path.name for path in (folder / "adapter").iterdir()} == FILES
    num_adapted = 0
    for name in base.shapes:
        A = adapter.get(f"base_model.model.{name.removesuffix('weight')}lora_A.weight")
        if A is None:
            assert merged[name].equal(base[name]), name
            continue
        B = adapter[f"base_model.model.{name.removesuffix('weight')}lora_B.weight"]
        assert B.abs().max() > 0
        assert (merged[name] - base[name] - 2.0 * B @ A).abs().max() < 1e-6
        num_adapted += 1
    assert num_adapted == 2 * 7
    assert_equal_adapters(folder / "adapter", folder / "checkpoints/step_000003/adapter")


def test_sampler_and_trainer_are_one_policy(run):
    folder = run("model.batch_invariant=true", "log.tokens_every=1", "train.steps=6")

    gaps = [row["sampling_logp_diff_max"] for row in jsonl(folder / "metrics.jsonl")]

    assert gaps == [0.0] * 6


def test_the_reference_costs_no_copy_and_is_the_model(run):
    folder = run("loss.kl_coef=0.1")

    first, *later = [row["kl"] for row in jsonl(folder / "metrics.jsonl")]

    assert first == 0
    assert all(kl > 0 for kl in later)


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_damaged_adapter_is_refused_and_the_checkpoint_before_it_taken(
    file, run, tmp_path, capsys
):
    whole = run()
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    path = tmp_path / "run/checkpoints/step_000003/adapter" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    config = str(tmp_path / "run/config.yaml")
    code = run_guarded(train.main, [config, f"run.dir={tmp_path / 'run'}"])

    assert code == 0
    out = capsys.readouterr().out
    assert f"adapter/{file}" in out
    assert "goes on after step 2" in out
    assert_equal_adapters(tmp_path / "run/adapter", whole / "adapter")


@pytest.mark.parametrize("step", [1, 2])
def test_a_logged_step_is_explained(run, step, capsys):
    folder = run("log.tokens_every=1")

    cli.main(["explain", "--run", str(folder), "--step", str(step), "--json"])

    assert json.loads(capsys.readouterr().out.splitlines()[-1])["agrees"]


def test_an_adapter_goes_on_where_it_ended(run):
    """Checkpointing changes nothing; a run from the adapter begins with its answers."""
    first = run("train.gradient_checkpointing=true", "train.num_mini_batches=2")
    second = run(f"model.adapter={first / 'adapter'}", "optimizer.lr=0", "train.steps=1")

    assert_equal_adapters(first / "adapter", second / "adapter")
    before = jsonl(second / "eval_before.jsonl")
    after = jsonl(first / "eval_after.jsonl")
    assert [row["text"] for row in before] == [row["text"] for row in after]


def test_sft_then_grpo(tmp_path):
    """The folder that SFT merges is a plain model for what comes next."""
    config = write_sft_yaml(tmp_path)
    assert run_guarded(sft.main, [config, *LORA, f"run.dir={tmp_path / 'sft'}"]) == 0
    grpo = write_yaml(tmp_path / "grpo_world")

    path = tmp_path / "sft/model"
    code = run_guarded(train.main, [grpo, *LORA, f"model.path={path}", "loss.kl_coef=0.1"])

    assert code == 0
    kl = jsonl(tmp_path / "grpo_world/run/metrics.jsonl")[0]["kl"]
    assert kl == 0
