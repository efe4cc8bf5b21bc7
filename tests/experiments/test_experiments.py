"""The experiments' configs and the README's: each passes its dry run, and what the README says to
write trains.
"""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import yaml
from helpers.tiny_world import jsonl, refused, write_yaml

from recr1 import sft, train
from recr1.config import loader as configs
from recr1.training.dry_run import find_shapes_table, read_model_shape
from recr1.training.launch import run_guarded

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_yaml(tmp_path_factory.mktemp("world"))


CONFIGS = [
    ROOT / "experiments/quickstart.yaml",
    *sorted(
        path
        for folder in ("rec_r1", "recllm_r1", "cpu")
        for path in (ROOT / "experiments/configs" / folder).glob("*.yaml")
    ),
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_experiment_passes_its_dry_run(path, capsys, monkeypatch, tmp_path):
    """One whole step, in small; whatever the config names need not be there, and nothing is asked
    of the network.
    """
    monkeypatch.setattr(
        socket.socket, "connect", lambda *_: pytest.fail("a dry run went to the network")
    )
    monkeypatch.chdir(tmp_path)
    loop = sft if configs.load_config(str(path), []).sft.teacher else train
    assert run_guarded(loop.main, [str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    figures = [
        float(re.search(rf"{name} +([\d.]+)", out)[1])
        for name in (("grad", "std") if loop is train else ("grad", "loss"))
    ]
    assert "dry run passed" in out
    assert min(figures) > 0
    assert not list(tmp_path.iterdir())


def test_the_bundled_policys_shape_is_its_own(monkeypatch):
    """Both are there, the table's entry and config.json, so they are compared."""
    monkeypatch.chdir(ROOT)
    assert (
        read_model_shape("experiments/policy", "experiments/quickstart.yaml").num_hidden_layers == 4
    )


def test_a_dry_run_needs_the_shape(world, tmp_path, capsys):
    assert (
        "somebody/model"
        in (line := refused([world, "model.path=somebody/model", "--dry-run"], capsys))
        and "shapes.yaml" in line
    )
    table = Path(world).parent / "shapes.yaml"
    policy = configs.load_config(world, []).model.path
    table.write_text(
        yaml.safe_dump(
            {policy: json.loads((Path(policy) / "config.json").read_text()) | dict(hidden_size=96)}
        )
    )
    try:
        assert "hidden_size=96" in refused([world, "--dry-run"], capsys)
    finally:
        table.unlink()


def test_a_config_finds_the_nearest_table_of_shapes(tmp_path):
    """Beside it; in configs/ beside it, as the quickstart; in the folder above, as the others."""
    (tmp_path / "configs/cpu").mkdir(parents=True)
    shared = tmp_path / "configs/shapes.yaml"
    shared.touch()

    assert find_shapes_table(str(tmp_path / "quickstart.yaml")) == shared
    assert find_shapes_table(str(tmp_path / "configs/a.yaml")) == shared
    assert find_shapes_table(str(tmp_path / "configs/cpu/a.yaml")) == shared

    for folder in (tmp_path, tmp_path / "configs/cpu"):
        own = folder / "shapes.yaml"
        own.touch()
        assert find_shapes_table(str(folder / "a.yaml")) == own


def test_the_table_of_shapes_is_found_from_the_configs_folder(tmp_path, monkeypatch):
    """Also where the config is named without a folder."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "shapes.yaml").touch()
    monkeypatch.chdir(tmp_path / "configs")

    found = find_shapes_table("a.yaml")

    assert found == Path("../shapes.yaml")


def test_no_table_of_shapes_two_folders_above_is_read(tmp_path):
    (tmp_path / "shapes.yaml").touch()
    (tmp_path / "a/b").mkdir(parents=True)

    found = find_shapes_table(str(tmp_path / "a/b/c.yaml"))

    assert found == tmp_path / "a/b/shapes.yaml"


def test_the_readmes_own_data_trains(world, tmp_path, monkeypatch):
    """README, "Your own data": the YAML as it stands there, at most 15 lines, on three small files
    and a small model of that name.
    """
    [text] = re.findall(r"```yaml\n(run: .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(text.splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text)
    cfg = configs.load_config(world, [])
    mine = configs.load_config("mine.yaml", [])
    for key in ("corpus", "train_queries", "train_qrels"):
        to = Path(getattr(mine.data, key))
        to.parent.mkdir(exist_ok=True)
        shutil.copy(getattr(cfg.data, key), to)
    assert (
        run_guarded(
            train.main,
            [
                "mine.yaml",
                f"model.path={cfg.model.path}",
                "train.steps=2",
                "sampling.max_new_tokens=12",
                "train.eval_every=1",
            ],
        )
        == 0
    )
    assert len(jsonl(Path(mine.run.dir) / "metrics.jsonl")) == 2
