"""`recr1 merge`: the folder that it writes is the policy that the adapter was trained in."""

import json
import shutil

import pytest
import torch
from helpers.tiny_world import write_yaml
from safetensors.torch import load_file, save_file

from recr1 import cli, train
from recr1.model.hf_weights import SafetensorsFolder
from recr1.training.launch import run_guarded


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return (the model's folder, that of a run with LoRA)."""
    folder = tmp_path_factory.mktemp("world")
    config = write_yaml(folder, **{"train.steps": 1, "optimizer.lr": 0.01})
    assert run_guarded(train.main, [config, "lora.rank=2", "lora.rslora=true"]) == 0
    return folder / "policy", folder / "run"


def merge(model, adapter, out) -> int:
    arguments = ["--model", str(model), "--adapter", str(adapter), "--out", str(out)]
    return run_guarded(cli.main, ["merge", *arguments])


def test_the_merged_folder_is_the_runs_own(run, tmp_path, capsys):
    model, folder = run

    assert merge(model, folder / "adapter", tmp_path / "merged") == 0

    assert "in 14 weights" in capsys.readouterr().out
    ours = SafetensorsFolder(str(tmp_path / "merged"))
    theirs = SafetensorsFolder(str(folder / "model"))
    base = SafetensorsFolder(str(model))
    assert ours.shapes == theirs.shapes
    num_changed = 0
    for name in ours.shapes:
        assert ours[name].equal(theirs[name]), name
        num_changed += not ours[name].equal(base[name])
    assert num_changed == 14
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_text() == (folder / "model" / name).read_text()


def refused(capsys, *folders) -> str:
    capsys.readouterr()
    assert merge(*folders) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_be_merged_is_one_line(run, tmp_path, capsys):
    model, folder = run
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    weights_path = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(weights_path)
    A, B, *_ = sorted(weights)

    assert "is not empty" in refused(capsys, model, folder / "adapter", folder)
    assert "holds no adapter_config.json" in refused(capsys, model, model, tmp_path / "out")
    assert "--model must be" in refused(capsys, "nowhere", folder / "adapter", tmp_path / "out")
    save_file(weights | {A: torch.zeros(2, 5)}, weights_path)
    assert "(2, 5), beside this model" in refused(
        capsys, model, tmp_path / "adapter", tmp_path / "out"
    )
    save_file({name: weight for name, weight in weights.items() if name != B}, weights_path)
    assert "lora_B.weight is missing" in refused(
        capsys, model, tmp_path / "adapter", tmp_path / "out"
    )
    config_path = tmp_path / "adapter/adapter_config.json"
    config_path.write_text(json.dumps(dict(peft_type="VERA")))
    assert "not LORA" in refused(capsys, model, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
