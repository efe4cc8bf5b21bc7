"""Checkpoints as folders: what stands in them, which are kept, which are refused and why, and what
a full disk does.
"""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import sharded_save
from helpers.tiny_world import jsonl, refused, tiny_model, write_policy, write_yaml
from safetensors.torch import load_file, save_file
from test_ranks import torchrun
from test_resume import stop_training

from recr1 import cli, train
from recr1.config.schema import OptimizerConfig
from recr1.distributed.fsdp import Sharded
from recr1.training import checkpoint, load_model
from recr1.training.launch import run_guarded
from recr1.training.optimizer import Optimizer
from recr1.utils import files

HERE = Path(__file__).resolve().parents[1]
SHARD = "rank_00000-of-00001.safetensors"
WEIGHTS = "model/model.safetensors"
MANIFEST = "manifest.json"
STATE = "state.json"
MODEL_CONFIG = "model/config.json"
PICKLE = "model/pytorch_model.bin"


def list_names(folder: Path, pattern: str = "*") -> list[str]:
    names = [path.name for path in folder.glob(pattern)]
    return sorted(names)


def list_files(folder: Path) -> dict[str, Path]:
    """List every file below a folder: {name relative to it: path}."""
    paths = {}
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            paths[name] = path
    return paths


def read_json(path: Path):
    return json.loads(path.read_text())


def describe_file(path: Path) -> dict:
    """Describe a file as a manifest does: its size and its sha256."""
    digest = hashlib.sha256(path.read_bytes())
    return dict(size=path.stat().st_size, sha256=digest.hexdigest())


# --- what stands in a checkpoint ------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    overrides = {"train.steps": 4, "save.every": 1, "save.keep_last": 2, "train.eval_every": 0}
    return write_yaml(folder, **overrides)


@pytest.fixture(scope="module")
def stopped_run(world, tmp_path_factory):
    """A run stopped in its fourth step: checkpoints of steps 2 and 3."""
    folder = tmp_path_factory.mktemp("stopped") / "run"

    with pytest.MonkeyPatch.context() as patch:
        code = stop_training("sample@4", [world, f"run.dir={folder}"], patch)

    assert code == 0
    assert list_names(folder / "checkpoints") == ["LATEST", "step_000002", "step_000003"]
    return folder


def test_what_stands_in_a_checkpoint(stopped_run, capsys):
    folder = stopped_run / "checkpoints/step_000003"
    paths = list_files(folder)
    entries = read_json(folder / MANIFEST)["files"]

    assert paths.keys() == entries.keys() | {MANIFEST}
    assert {SHARD, STATE, "model/recr1.yaml"} < paths.keys()
    for name, entry in entries.items():
        assert entry == describe_file(paths[name])

    state = read_json(paths[STATE])
    assert state["step"] == 3
    assert state["world"] == 1
    assert state["taken"] == 3
    assert state["skipped"] == 0
    assert state["threads"] == 1
    ends = {}
    for name in ("metrics.jsonl", "rollouts.jsonl.gz"):
        ends[name] = (stopped_run / name).stat().st_size
    assert state["log"]["ends"] == ends

    check_shards(folder, state["units"])
    summary = evaluate_checkpoint(folder, state["config"]["data"], capsys)
    assert summary["n"] == 12


def check_shards(folder: Path, units: dict) -> None:
    """Check that the shards hold the weights transformers loads, and moments that are not 0."""
    from transformers import AutoModelForCausalLM

    shards = load_file(folder / SHARD)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    for unit, layout in units.items():
        weights = shards[f"{unit}.shard"]
        moments = shards[f"exp_avg_sq.{unit}.shard"]
        for name, shape, start in layout["weights"]:
            end = start + theirs[name].numel()
            ours = weights[start:end].view(shape)
            assert torch.equal(ours, theirs[name]), name
            assert moments[start:end].max() > 0
        assert shards[f"step.{unit}.shard"] == 3


def evaluate_checkpoint(folder: Path, data: dict, capsys) -> dict:
    argv = ["eval", "--model", str(folder / "model"), "--json"]
    argv += ["--corpus", data["corpus"]]
    argv += ["--queries", data["test_queries"]]
    argv += ["--qrels", data["test_qrels"]]
    capsys.readouterr()

    code = run_guarded(cli.main, argv)

    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1])


# --- damaged and hostile checkpoints: each function does one thing to checkpoints/step_000003 -----


def reseal(folder: Path, **changed) -> None:
    """Write a manifest that fits the files as they are now, with entries of one's own: an attacker
    can do that.
    """
    entries = {}
    for name, path in list_files(folder).items():
        if path.name != MANIFEST:
            entries[name] = describe_file(path)
    manifest = dict(version=1, files=entries | changed)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def truncate(folder: Path, name: str, size: int) -> None:
    os.truncate(folder / name, size)


def flip_bit(folder: Path, name: str, position: int) -> None:
    path = folder / name
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def delete_file(folder: Path, name: str) -> None:
    (folder / name).unlink()


def delete_model(folder: Path) -> None:
    shutil.rmtree(folder / "model")


def write_manifest(folder: Path, raw: bytes) -> None:
    (folder / MANIFEST).write_bytes(raw)


def change_entry(folder: Path, name: str, **entry) -> None:
    reseal(folder, **{name: entry})


def drop_hash(folder: Path) -> None:
    change_entry(folder, SHARD, size=3)


def list_foreign_file(folder: Path, name: str) -> None:
    change_entry(folder, name, size=1, sha256="")


def replace_by_link(folder: Path, name: str) -> None:
    target = folder.parent / "elsewhere"
    shutil.move(folder / name, target)
    (folder / name).symlink_to(target)


def replace_folder_by_link(folder: Path) -> None:
    target = folder.parent / "moved"
    shutil.move(folder, target)
    folder.symlink_to(target)


def replace_folder_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def add_pickle(folder: Path) -> None:
    raw = pickle.dumps(Payload())
    (folder / PICKLE).write_bytes(raw)


def add_listed_pickle(folder: Path) -> None:
    add_pickle(folder)
    reseal(folder)


def replace_shard_by_pickle(folder: Path) -> None:
    raw = pickle.dumps(Payload())
    (folder / SHARD).write_bytes(raw)
    reseal(folder)


def write_listed_file(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    reseal(folder)


def change_state(folder: Path, **changed) -> None:
    """Write state.json with other values, and a manifest that fits."""
    state = read_json(folder / STATE) | changed
    write_listed_file(folder, STATE, json.dumps(state))


def set_state(folder: Path, key: str, value) -> None:
    change_state(folder, **{key: value})


def lengthen_log(folder: Path) -> None:
    log = read_json(folder / STATE)["log"]
    log["ends"] = {"metrics.jsonl": 10**9, "rollouts.jsonl.gz": 0}
    change_state(folder, log=log)


def shorten_shapes(folder: Path) -> None:
    shapes = read_json(folder / STATE)["shapes"]
    change_state(folder, shapes=dict.fromkeys(shapes, [1]))


def halve_precision(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    for name, tensor in tensors.items():
        tensors[name] = tensor.half()
    save_file(tensors, folder / SHARD)
    reseal(folder)


# what happens: (the function, its arguments, what is said about it)
DAMAGED_FILES = {
    "shard truncated": (truncate, (SHARD, 1000), f"{SHARD} has 1000 bytes, its manifest says"),
    "shard emptied": (truncate, (SHARD, 0), f"{SHARD} has 0 bytes"),
    "bit in the shard": (flip_bit, (SHARD, -1000), f"{SHARD}: its sha256 is not the manifest's"),
    "bit in the shard's header": (flip_bit, (SHARD, 20), f"{SHARD}: its sha256"),
    "bit in the model": (flip_bit, (WEIGHTS, 5000), f"{WEIGHTS}: its sha256"),
    "bit in the state": (flip_bit, (STATE, 9), "state.json: its sha256"),
    "shard deleted": (delete_file, (SHARD,), f"{SHARD} is missing"),
    "state deleted": (delete_file, (STATE,), "state.json is missing"),
    "config of the model deleted": (delete_file, (MODEL_CONFIG,), f"{MODEL_CONFIG} is missing"),
    "model deleted": (delete_model, (), "model/"),
}
DAMAGED_MANIFESTS = {
    "manifest deleted": (delete_file, (MANIFEST,), "manifest.json is missing"),
    "manifest truncated": (truncate, (MANIFEST, 100), "manifest.json is not JSON"),
    "manifest no text": (write_manifest, (b"\xff\xfe",), "manifest.json is not JSON"),
    "manifest deep": (write_manifest, (b"[" * 100_000,), "manifest.json is not JSON"),
    "manifest of another form": (write_manifest, (b"[1]",), "manifest.json is not of the form"),
    "entry without a hash": (drop_hash, (), "size or sha256"),
    "path outside": (
        list_foreign_file,
        ("../../config.yaml",),
        "'../../config.yaml', a path outside",
    ),
    "absolute path": (list_foreign_file, ("/etc/passwd",), "'/etc/passwd', a path outside"),
}
FOREIGN_FILES = {
    "symlink in place of the shard": (replace_by_link, (SHARD,), f"'{SHARD}' is a link"),
    "symlink in place of the model": (replace_by_link, ("model",), "'model' is a link"),
    "symlink in place of the folder": (replace_folder_by_link, (), "is a link"),
    "file in place of the folder": (replace_folder_by_file, (), "no folder"),
    "pickle beside it": (add_pickle, (), f"'{PICKLE}' is not in its manifest: not opened"),
    "pickle in the manifest": (
        add_listed_pickle,
        (),
        f"'{PICKLE}' is no file of a checkpoint: not opened",
    ),
    "pickle as the shard": (replace_shard_by_pickle, (), "Error"),
    "unknown file": (
        write_listed_file,
        ("notes.txt", "x"),
        "'notes.txt' is no file of a checkpoint",
    ),
}
WRONG_STATES = {
    "state not JSON": (write_listed_file, (STATE, "{"), "state.json is not JSON"),
    "state of another step": (set_state, ("step", 2), "of another step"),
    "state of more ranks": (set_state, ("world", 2), f"'{SHARD}' is no file of a checkpoint"),
    "state of absurdly many ranks": (set_state, ("world", 10**12), "state.json"),
    "state of another model": (set_state, ("units", {}), "another model's"),
    "state of another config": (set_state, ("config", {}), "another config's"),
    "state with a log from the future": (lengthen_log, (), "metrics.jsonl is shorter"),
    "shards cut short": (shorten_shapes, (), "not all of it"),
    "moments in half precision": (halve_precision, (), "its tensors are not"),
    "counter that is none": (set_state, ("taken", "3"), "a counter is no whole number"),
    "state with words for numbers": (set_state, ("wall_s", "long"), "state.json"),
}
CORRUPTIONS = DAMAGED_FILES | DAMAGED_MANIFESTS | FOREIGN_FILES | WRONG_STATES


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_damaged_or_hostile_checkpoint_is_named_and_the_one_before_is_used(
    name, stopped_run, world, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(stopped_run, folder)
    root = folder / "checkpoints"
    damage, arguments, message = CORRUPTIONS[name]
    damage(root / "step_000003", *arguments)
    capsys.readouterr()

    code = stop_training("sample@1", [world, f"run.dir={folder}"], monkeypatch)

    assert code == 0
    prefix = "recr1: checkpoint refused: "
    lines = capsys.readouterr().out.splitlines()
    [refusal] = [line for line in lines if line.startswith(prefix)]
    assert refusal.startswith(f"{prefix}step_000003: ")
    assert message in refusal
    steps = [row["step"] for row in jsonl(folder / "metrics.jsonl")]
    assert steps == [1, 2]
    assert not (tmp_path / "executed").exists()
    assert (root / "LATEST").read_text() == "step_000002\n"
    assert "step_000003.refused" in list_names(root)


LATEST_TEXTS = [
    ("../../x", "'../../x': no checkpoint's name, not followed"),
    ("step_000009", "'step_000009': it is not there"),
    ("/etc\x1b[2J", r"'/etc\x1b[2J': no checkpoint's name"),
]


@pytest.mark.parametrize("text, message", LATEST_TEXTS)
def test_what_LATEST_says_is_never_followed(
    text, message, stopped_run, world, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(stopped_run, folder)
    latest = folder / "checkpoints/LATEST"
    latest.write_text(text)

    code = stop_training("sample@1", [world, f"run.dir={folder}"], monkeypatch)

    assert code == 0
    out = capsys.readouterr().out
    assert f"checkpoint refused: LATEST names {message}" in out
    assert "goes on after step 3" in out
    assert latest.read_text() == "step_000003\n"


def read_contents(folder: Path) -> dict[str, bytes]:
    """Read every file of a run but those that each start writes."""
    contents = {}
    for name, path in list_files(folder).items():
        if path.name != "config.yaml" and "heartbeats" not in path.parts:
            contents[name] = path.read_bytes()
    return contents


def test_without_any_that_is_valid_nothing_is_started_anew(stopped_run, world, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(stopped_run, folder)
    for step in (2, 3):
        delete_file(folder / f"checkpoints/step_{step:06d}", STATE)
    contents = read_contents(folder)

    line = refused([world, f"run.dir={folder}"], capsys)

    newest = "(the newest: step_000003: state.json is missing)"
    assert f"no checkpoint there is valid {newest}" in line
    assert read_contents(folder) == contents


def test_what_a_dead_run_was_writing_is_removed(stopped_run, world, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    root = folder / "checkpoints"
    shutil.copytree(stopped_run, folder)
    shutil.copytree(root / "step_000003", root / "step_000004.partial")

    code = stop_training("sample@1", [world, f"run.dir={folder}"], monkeypatch)

    assert code == 0
    assert list_names(root) == ["LATEST", "step_000002", "step_000003"]


# --- which are kept, and what a bad disk does -----------------------------------------------------


def test_the_last_and_the_best_are_kept(tmp_path):
    root = tmp_path / "checkpoints"

    for step in range(1, 7):
        (root / f"step_{step:06d}").mkdir(parents=True)
        files.write_text(root / "LATEST", f"step_{step:06d}\n")
        best = [0.5, 2] if step >= 2 else None
        checkpoint.prune_checkpoints(root, 2, best)
    assert list_names(root) == ["BEST", "LATEST", "step_000002", "step_000005", "step_000006"]

    checkpoint.prune_checkpoints(root, 2, [0.6, 6])
    assert list_names(root) == ["BEST", "LATEST", "step_000005", "step_000006"]
    assert (root / "BEST").read_text() == "step_000006\n"

    # never what LATEST and BEST name
    files.write_text(root / "LATEST", "step_000005\n")
    (root / "step_000007").mkdir()
    (root / "step_000008").mkdir()
    checkpoint.prune_checkpoints(root, 2, None)
    steps = list_names(root, "step*")
    assert steps == ["step_000005", "step_000006", "step_000007", "step_000008"]


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from recr1 import train
from recr1.training.launch import run_guarded
sys.exit(run_guarded(train.main, sys.argv[2:]))
"""
# the largest file in bytes, the file that does not fit, save.every
FULL_DISKS = [
    (500_000, "rank_00000-of-00001.safetensors", 2),
    (5_000, "rollouts.jsonl.gz", 0),
    (200, "config.yaml", 0),
]


@pytest.mark.parametrize("limit, place, every", FULL_DISKS)
def test_a_full_disk_is_one_line_and_costs_nothing_that_stood(
    limit, place, every, world, undisturbed, tmp_path
):
    """No file may grow beyond `limit` bytes: shards have 850,000, the rollout log passes 5,000 in
    its second step.
    """
    folder = tmp_path / "run"
    argv = [world, "log.tokens_every=1", f"save.every={every}", f"run.dir={folder}"]
    command = [sys.executable, "-c", FULL, str(limit), *argv]
    env = os.environ | dict(PYTHONPATH=str(HERE.parent), OMP_NUM_THREADS="1")

    process = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, env=env)

    assert process.returncode == 2, process.stderr
    lines = process.stderr.splitlines()
    [line] = [line for line in lines if line.startswith("recr1:")]
    assert "cannot write" in line
    assert place in line
    assert "File too large" in line
    assert list_names(folder / "checkpoints", "step_??????") == []

    code = run_guarded(train.main, argv)

    assert code == 0
    for name in ("model/model.safetensors", "rollouts.jsonl.gz"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    code = run_guarded(train.main, [world, "log.tokens_every=1", f"run.dir={folder}"])
    assert code == 0
    return folder


def test_a_failing_disk_is_found_by_reading_back(stopped_run, world, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(stopped_run, folder)
    save_model = load_model.save_model

    def save_damaged_model(*arguments):
        save_model(*arguments)
        target = Path(arguments[-1])
        flip_bit(target, "model.safetensors", -1)

    monkeypatch.setattr(load_model, "save_model", save_damaged_model)

    line = refused([world, f"run.dir={folder}"], capsys)

    assert "reads back otherwise" in line
    assert (folder / "checkpoints/LATEST").read_text() == "step_000003\n"
    assert not (folder / "checkpoints/step_000004").exists()


# --- other numbers of ranks, and the optimizer's state --------------------------------------------


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_four_ranks_shards_dealt_to_two_three_and_one(tmp_path):
    """Weights and both moments to the bit, and the Hugging Face folder to the byte."""
    policy = write_policy(tmp_path / "policy", num_hidden_layers=3, intermediate_size=65)
    script = str(HERE / "helpers/sharded_save.py")
    saved = tmp_path / "checkpoints/step_000002"

    torchrun(4, script, str(tmp_path), policy)
    shards = list_names(saved, "rank_*")
    assert len(shards) == 4
    sharded_save.work(tmp_path, policy)
    torchrun(2, script, str(tmp_path), policy)
    torchrun(3, script, str(tmp_path), policy)

    model_files = read_files(saved / "model")
    moments = load_file(tmp_path / "moments.4.safetensors")
    assert any(tensor.ndim and tensor.any() for tensor in moments.values())
    for num_ranks in (1, 2, 3, 4):
        assert read_files(tmp_path / f"export.{num_ranks}") == model_files
        ours = load_file(tmp_path / f"moments.{num_ranks}.safetensors")
        assert ours.keys() == moments.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, moments[name])
    check_export(tmp_path / "export.3", policy, saved / "model/model.safetensors")


def check_export(export: Path, policy: str, weights: Path) -> None:
    """Check that transformers loads our weights, and that every one of them has moved."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(export).state_dict()
    start = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    assert theirs.keys() == start.keys()
    for name, tensor in theirs.items():
        assert not torch.equal(tensor, start[name])
    for name, tensor in load_file(weights).items():
        assert torch.equal(tensor, theirs[name])


def make_sharded_policy() -> Sharded:
    model = tiny_model(0)
    state = dict(model.state_dict())
    return Sharded(model, state.__getitem__, device=torch.device("cpu"))


def take_steps(policy: Sharded, optimizer: Optimizer, numbers: range) -> None:
    """Take optimizer steps on random gradients; step 1 has none."""
    for step in numbers:
        for i, parameter in enumerate(policy.parameters()):
            parameter.grad = None
            if step != 1:
                generator = torch.Generator().manual_seed(100 * step + i)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_adamws_state_goes_out_and_in():
    """A run of torch's AdamW, cut in two with a step without gradients before the cut, moves as the
    uncut one.
    """
    config = OptimizerConfig(lr=0.1, weight_decay=0.1, warmup_steps=2)
    uncut = make_sharded_policy()
    first = make_sharded_policy()
    second = make_sharded_policy()
    take_steps(uncut, Optimizer(uncut, config, 5), range(5))
    optimizer = Optimizer(first, config, 5)
    resumed = Optimizer(second, config, 5)
    for moment in checkpoint.get_moments(optimizer).values():
        assert not moment.any()

    take_steps(first, optimizer, range(3))
    with torch.no_grad():
        for target, source in zip(second.parameters(), first.parameters()):
            target.copy_(source)
    moments = {}
    for name, moment in checkpoint.get_moments(optimizer).items():
        moments[name] = moment.clone()
    checkpoint.restore_optimizer(resumed, moments, optimizer.num_steps, optimizer.num_skipped)
    take_steps(second, resumed, range(3, 5))

    for want, actual in zip(uncut.parameters(), second.parameters()):
        assert torch.equal(want, actual)
    assert checkpoint.get_moments(resumed)["step.units.0.shard"] == 4
