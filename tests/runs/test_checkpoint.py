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
from test_resume import stop

from recr1 import cli, train
from recr1.config.schema import OptimizerConfig
from recr1.distributed.fsdp import Sharded
from recr1.training import checkpoint, load_model
from recr1.training.launch import run_guarded
from recr1.training.optimizer import Optimizer
from recr1.utils import files

HERE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_yaml(
        tmp_path_factory.mktemp("world"),
        **{"train.steps": 4, "save.every": 1, "save.keep_last": 2, "train.eval_every": 0},
    )


@pytest.fixture(scope="module")
def begun(world, tmp_path_factory):
    """A run stopped in its fourth step: checkpoints of steps 2 and 3."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert stop("sample@4", [world, f"run.dir={folder}"], patch) == 0
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "LATEST",
        "step_000002",
        "step_000003",
    ]
    return folder


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def resealed(folder: Path, **changed) -> None:
    """A manifest that fits the files as they are now, with entries of one's own: an attacker can do
    that.
    """
    entries = {
        p.relative_to(folder).as_posix(): dict(
            size=p.stat().st_size, sha256=hashlib.sha256(p.read_bytes()).hexdigest()
        )
        for p in folder.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps(dict(version=1, files=entries | changed)))


def test_what_stands_in_a_checkpoint(begun, world, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    folder = begun / "checkpoints/step_000003"
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    entries = manifest(folder)["files"]
    assert found.keys() == entries.keys() | {"manifest.json"}
    assert {"rank_00000-of-00001.safetensors", "state.json", "model/recr1.yaml"} < found.keys()
    for name, entry in entries.items():
        assert (entry["size"], entry["sha256"]) == (
            found[name].stat().st_size,
            hashlib.sha256(found[name].read_bytes()).hexdigest(),
        )
    state = json.loads(found["state.json"].read_text())
    shards = load_file(found["rank_00000-of-00001.safetensors"])
    assert (state["step"], state["world"], state["taken"], state["skipped"], state["threads"]) == (
        3,
        1,
        3,
        0,
        1,
    )
    assert state["log"]["ends"] == {
        name: (begun / name).stat().st_size for name in ("metrics.jsonl", "rollouts.jsonl.gz")
    }
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    for unit, layout in state["units"].items():
        for name, shape, start in layout["weights"]:
            assert torch.equal(
                shards[f"{unit}.shard"][start : start + theirs[name].numel()].view(shape),
                theirs[name],
            ), name
            assert (
                shards[f"exp_avg_sq.{unit}.shard"][start : start + theirs[name].numel()].max() > 0
            )
        assert shards[f"step.{unit}.shard"] == 3
    data = json.loads((begun / "checkpoints/step_000003/state.json").read_text())["config"]["data"]
    argv = [
        "eval",
        "--model",
        str(folder / "model"),
        "--corpus",
        data["corpus"],
        "--queries",
        data["test_queries"],
        "--qrels",
        data["test_qrels"],
        "--json",
    ]
    capsys.readouterr()
    assert run_guarded(cli.main, argv) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 12


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


SHARD = "rank_00000-of-00001.safetensors"
WEIGHTS = "model/model.safetensors"


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def extra_pickle(folder: Path, listed: bool) -> None:
    (folder / "model/pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    if listed:
        resealed(folder)


def rewritten(folder: Path, **changed) -> None:
    """state.json with other values, and a manifest that fits."""
    (folder / "state.json").write_text(
        json.dumps(json.loads((folder / "state.json").read_text()) | changed)
    )
    resealed(folder)


def link(folder: Path, name: str) -> None:
    shutil.move(folder / name, folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


CORRUPTIONS = {  # what happens to checkpoints/step_000003 -> what is said about it
    "shard truncated": (
        lambda f: os.truncate(f / SHARD, 1000),
        f"{SHARD} has 1000 bytes, its manifest says",
    ),
    "shard emptied": (lambda f: os.truncate(f / SHARD, 0), f"{SHARD} has 0 bytes"),
    "bit in the shard": (
        lambda f: flip(f / SHARD, -1000),
        f"{SHARD}: its sha256 is not the manifest's",
    ),
    "bit in the shard's header": (lambda f: flip(f / SHARD, 20), f"{SHARD}: its sha256"),
    "bit in the model": (lambda f: flip(f / WEIGHTS, 5000), f"{WEIGHTS}: its sha256"),
    "bit in the state": (lambda f: flip(f / "state.json", 9), "state.json: its sha256"),
    "shard deleted": (lambda f: (f / SHARD).unlink(), f"{SHARD} is missing"),
    "state deleted": (lambda f: (f / "state.json").unlink(), "state.json is missing"),
    "config of the model deleted": (
        lambda f: (f / "model/config.json").unlink(),
        "model/config.json is missing",
    ),
    "model deleted": (lambda f: shutil.rmtree(f / "model"), "model/"),
    "manifest deleted": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest truncated": (
        lambda f: os.truncate(f / "manifest.json", 100),
        "manifest.json is not JSON",
    ),
    "manifest no text": (
        lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"),
        "manifest.json is not JSON",
    ),
    "manifest deep": (
        lambda f: (f / "manifest.json").write_text("[" * 100_000),
        "manifest.json is not JSON",
    ),
    "manifest of another form": (
        lambda f: (f / "manifest.json").write_text("[1]"),
        "manifest.json is not of the form",
    ),
    "entry without a hash": (lambda f: resealed(f, **{SHARD: dict(size=3)}), "size or sha256"),
    "path outside": (
        lambda f: resealed(f, **{"../../config.yaml": dict(size=1, sha256="")}),
        "'../../config.yaml', a path outside",
    ),
    "absolute path": (
        lambda f: resealed(f, **{"/etc/passwd": dict(size=1, sha256="")}),
        "'/etc/passwd', a path outside",
    ),
    "symlink in place of the shard": (lambda f: link(f, SHARD), f"'{SHARD}' is a link"),
    "symlink in place of the model": (lambda f: link(f, "model"), "'model' is a link"),
    "symlink in place of the folder": (
        lambda f: (shutil.move(f, f.parent / "moved"), f.symlink_to(f.parent / "moved")),
        "is a link",
    ),
    "file in place of the folder": (lambda f: (shutil.rmtree(f), f.write_text("")), "no folder"),
    "pickle beside it": (
        lambda f: extra_pickle(f, listed=False),
        "'model/pytorch_model.bin' is not in its manifest: not opened",
    ),
    "pickle in the manifest": (
        lambda f: extra_pickle(f, listed=True),
        "'model/pytorch_model.bin' is no file of a checkpoint: not opened",
    ),
    "pickle as the shard": (
        lambda f: ((f / SHARD).write_bytes(pickle.dumps(Payload())), resealed(f)),
        "Error",
    ),
    "unknown file": (
        lambda f: ((f / "notes.txt").write_text("x"), resealed(f)),
        "'notes.txt' is no file of a checkpoint",
    ),
    "state not JSON": (
        lambda f: ((f / "state.json").write_text("{"), resealed(f)),
        "state.json is not JSON",
    ),
    "state of another step": (lambda f: rewritten(f, step=2), "of another step"),
    "state of more ranks": (
        lambda f: rewritten(f, world=2),
        f"'{SHARD}' is no file of a checkpoint",
    ),
    "state of absurdly many ranks": (lambda f: rewritten(f, world=10**12), "state.json"),
    "state of another model": (lambda f: rewritten(f, units={}), "another model's"),
    "state of another config": (lambda f: rewritten(f, config={}), "another config's"),
    "state with a log from the future": (
        lambda f: rewritten(
            f,
            log=json.loads((f / "state.json").read_text())["log"]
            | dict(ends={"metrics.jsonl": 10**9, "rollouts.jsonl.gz": 0}),
        ),
        "metrics.jsonl is shorter",
    ),
    "shards cut short": (
        lambda f: rewritten(
            f, shapes={name: [1] for name in json.loads((f / "state.json").read_text())["shapes"]}
        ),
        "not all of it",
    ),
    "moments in half precision": (
        lambda f: (
            save_file({n: t.half() for n, t in load_file(f / SHARD).items()}, f / SHARD),
            resealed(f),
        ),
        "its tensors are not",
    ),
    "counter that is none": (lambda f: rewritten(f, taken="3"), "a counter is no whole number"),
    "state with words for numbers": (lambda f: rewritten(f, wall_s="long"), "state.json"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_damaged_or_hostile_checkpoint_is_named_and_the_one_before_is_used(
    name, begun, world, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(begun, folder := tmp_path / "run")
    damage, message = CORRUPTIONS[name]
    damage(folder / "checkpoints/step_000003")
    capsys.readouterr()
    assert stop("sample@1", [world, f"run.dir={folder}"], monkeypatch) == 0
    [line] = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("recr1: checkpoint refused: ")
    ]
    assert line.startswith("recr1: checkpoint refused: step_000003: ")
    assert message in line
    assert [row["step"] for row in jsonl(folder / "metrics.jsonl")] == [1, 2]
    assert not (tmp_path / "executed").exists()
    root = folder / "checkpoints"
    assert (root / "LATEST").read_text() == "step_000002\n"
    assert "step_000003.refused" in {p.name for p in root.iterdir()}


@pytest.mark.parametrize(
    "text, message",
    [
        ("../../x", "'../../x': no checkpoint's name, not followed"),
        ("step_000009", "'step_000009': it is not there"),
        ("/etc\x1b[2J", r"'/etc\x1b[2J': no checkpoint's name"),
    ],
)
def test_what_LATEST_says_is_never_followed(
    text, message, begun, world, tmp_path, monkeypatch, capsys
):
    shutil.copytree(begun, folder := tmp_path / "run")
    (folder / "checkpoints/LATEST").write_text(text)
    assert stop("sample@1", [world, f"run.dir={folder}"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert f"checkpoint refused: LATEST names {message}" in out
    assert "goes on after step 3" in out
    assert (folder / "checkpoints/LATEST").read_text() == "step_000003\n"


def test_without_any_that_is_valid_nothing_is_started_anew(begun, world, tmp_path, capsys):
    shutil.copytree(begun, folder := tmp_path / "run")
    for step in (2, 3):
        (folder / f"checkpoints/step_{step:06d}/state.json").unlink()

    def contents():
        return {
            p: p.read_bytes()
            for p in folder.rglob("*")
            if p.is_file() and p.name != "config.yaml" and "heartbeats" not in p.parts
        }

    kept = contents()
    assert (
        "no checkpoint there is valid (the newest: step_000003: state.json is missing)"
        in refused([world, f"run.dir={folder}"], capsys)
    )
    assert kept == contents()


def test_what_a_dead_run_was_writing_is_removed(begun, world, tmp_path, monkeypatch):
    shutil.copytree(begun, folder := tmp_path / "run")
    shutil.copytree(begun / "checkpoints/step_000003", folder / "checkpoints/step_000004.partial")
    assert stop("sample@1", [world, f"run.dir={folder}"], monkeypatch) == 0
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "LATEST",
        "step_000002",
        "step_000003",
    ]


def test_the_last_and_the_best_are_kept(tmp_path):
    root = tmp_path / "checkpoints"
    for step in range(1, 7):
        (root / f"step_{step:06d}").mkdir(parents=True)
        files.write_text(root / "LATEST", f"step_{step:06d}\n")
        checkpoint.prune_checkpoints(root, 2, [0.5, 2] if step >= 2 else None)
    assert sorted(p.name for p in root.iterdir()) == [
        "BEST",
        "LATEST",
        "step_000002",
        "step_000005",
        "step_000006",
    ]
    checkpoint.prune_checkpoints(root, 2, [0.6, 6])
    assert sorted(p.name for p in root.iterdir()) == [
        "BEST",
        "LATEST",
        "step_000005",
        "step_000006",
    ]
    assert (root / "BEST").read_text() == "step_000006\n"
    files.write_text(root / "LATEST", "step_000005\n")
    (root / "step_000007").mkdir(), (root / "step_000008").mkdir()
    checkpoint.prune_checkpoints(root, 2, None)  # never what LATEST and BEST name
    assert sorted(p.name for p in root.glob("step*")) == [f"step_{i:06d}" for i in (5, 6, 7, 8)]


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from recr1 import train
from recr1.training.launch import run_guarded
sys.exit(run_guarded(train.main, sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "limit, place, every",
    [
        (500_000, "rank_00000-of-00001.safetensors", 2),
        (5_000, "rollouts.jsonl.gz", 0),
        (200, "config.yaml", 0),
    ],
)
def test_a_full_disk_is_one_line_and_costs_nothing_that_stood(
    limit, place, every, world, undisturbed, tmp_path
):
    """No file may grow beyond `limit` bytes: shards have 850,000, the rollout log passes 5,000 in
    its second step.
    """
    folder = tmp_path / "run"
    argv = [world, "log.tokens_every=1", f"save.every={every}", f"run.dir={folder}"]
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(limit), *argv],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(HERE.parent), OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("recr1:")]
    assert "cannot write" in line
    assert place in line
    assert "File too large" in line
    assert not list((folder / "checkpoints").glob("step_??????"))
    assert run_guarded(train.main, argv) == 0
    for name in ("model/model.safetensors", "rollouts.jsonl.gz"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_guarded(train.main, [world, "log.tokens_every=1", f"run.dir={folder}"]) == 0
    return folder


def test_a_failing_disk_is_found_by_reading_back(begun, world, tmp_path, monkeypatch, capsys):
    shutil.copytree(begun, folder := tmp_path / "run")
    monkeypatch.setattr(
        load_model,
        "save_model",
        lambda *a, write=load_model.save_model: (
            write(*a),
            flip(Path(a[-1]) / "model.safetensors", -1),
        ),
    )
    assert "reads back otherwise" in refused([world, f"run.dir={folder}"], capsys)
    assert (folder / "checkpoints/LATEST").read_text() == "step_000003\n"
    assert not (folder / "checkpoints/step_000004").exists()


def test_four_ranks_shards_dealt_to_two_three_and_one(tmp_path):
    """Weights and both moments to the bit, and the Hugging Face folder to the byte."""
    from transformers import AutoModelForCausalLM

    policy = write_policy(tmp_path / "policy", num_hidden_layers=3, intermediate_size=65)
    torchrun(4, str(HERE / "helpers/sharded_save.py"), str(tmp_path), policy)
    assert len(list((tmp_path / "checkpoints/step_000002").glob("rank_*"))) == 4
    sharded_save.work(tmp_path, policy)
    for n in (2, 3):
        torchrun(n, str(HERE / "helpers/sharded_save.py"), str(tmp_path), policy)
    want = {p.name: p.read_bytes() for p in (tmp_path / "checkpoints/step_000002/model").iterdir()}
    moments = load_file(tmp_path / "moments.4.safetensors")
    assert any(t.ndim and t.any() for t in moments.values())
    for n in (1, 2, 3, 4):
        assert {p.name: p.read_bytes() for p in (tmp_path / f"export.{n}").iterdir()} == want
        ours = load_file(tmp_path / f"moments.{n}.safetensors")
        assert ours.keys() == moments.keys()
        assert all(torch.equal(t, moments[name]) for name, t in ours.items())
    theirs, start = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "export.3", policy)
    )
    assert theirs.keys() == start.keys()
    assert not any(torch.equal(t, start[name]) for name, t in theirs.items())
    ours = load_file(tmp_path / "checkpoints/step_000002/model/model.safetensors")
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


def test_adamws_state_goes_out_and_in(tmp_path):
    """A run of torch's AdamW, cut in two with a step without gradients before the cut, moves as the
    whole one.
    """

    def sharded():
        model = tiny_model(0)
        return Sharded(model, dict(model.state_dict()).__getitem__, device=torch.device("cpu"))

    def steps(policy, optimizer, numbers):
        for step in numbers:
            for i, p in enumerate(policy.parameters()):
                p.grad = (
                    None
                    if step == 1
                    else torch.randn(
                        p.shape, generator=torch.Generator().manual_seed(100 * step + i)
                    )
                )
            optimizer.step()

    config = OptimizerConfig(lr=0.1, weight_decay=0.1, warmup_steps=2)
    whole = sharded()
    first = sharded()
    second = sharded()
    steps(whole, Optimizer(whole, config, 5), range(5))
    optimizer = Optimizer(first, config, 5)
    resumed = Optimizer(second, config, 5)
    assert all(not t.any() for t in checkpoint.get_moments(optimizer).values())
    steps(first, optimizer, range(3))
    with torch.no_grad():
        for a, b in zip(second.parameters(), first.parameters()):
            a.copy_(b)
    checkpoint.restore_optimizer(
        resumed,
        {name: t.clone() for name, t in checkpoint.get_moments(optimizer).items()},
        optimizer.num_steps,
        optimizer.num_skipped,
    )
    steps(second, resumed, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters()))
    assert checkpoint.get_moments(resumed)["step.units.0.shard"] == 4
