"""log.track: what a tracker is sent, once per step also over a stop, and that none of them can cost
a run. TensorBoard for real, the others by stubs with their own signatures (wandb 0.31, trackio
0.43, of which a real run, offline, held the same rows).
"""

import dataclasses
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from helpers.interrupted import at
from helpers.tiny_world import jsonl, refused, write_yaml

from recr1 import train
from recr1.config import loader as configs
from recr1.distributed import collectives as dist
from recr1.tracking.trackers import Tracker, flatten_row
from recr1.training.launch import run_guarded


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_yaml(
        tmp_path_factory.mktemp("world"),
        **{"train.steps": 4, "save.every": 2, "train.eval_every": 2, "loss.kl_coef": 0.05},
    )


def crash(argv, monkeypatch) -> None:
    """The run, which dies in step 4: its checkpoint is that of step 2, its log and its tracker have
    step 3.
    """

    def interrupted(result):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at("sample@4", interrupted, patch.setattr)
        run_guarded(train.main, argv)


def test_names_are_those_of_metrics_jsonl():
    row = dict(
        reward=0.5,
        kl=None,
        timing_s=dict(step=1.0, sample=0.25),
        val_gain_ci95=[-0.1, 0.2],
        memory={},
        grad_norm=float("inf"),
    )
    assert flatten_row(row) == {
        "reward": 0.5,
        "timing_s/step": 1.0,
        "timing_s/sample": 0.25,
        "val_gain_ci95/0": -0.1,
        "val_gain_ci95/1": 0.2,
        "grad_norm": float("inf"),
    }


def test_tensorboard_has_every_step_once_after_a_crash(world, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    argv = [world, "log.track=tensorboard", f"run.dir={tmp_path / 'run'}"]
    crash(argv, monkeypatch)
    first = jsonl(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in first] == [1, 2, 3]
    assert run_guarded(train.main, argv) == 0
    # step 3 was done again, and is not sent again
    rows = first + jsonl(tmp_path / "run/metrics.jsonl")[3:]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    events = accumulator.EventAccumulator(
        str(tmp_path / "run/tensorboard"), size_guidance=dict(scalars=0)
    ).Reload()
    want = {}
    for row in rows:
        for name, value in flatten_row(row).items():
            want.setdefault(name, []).append((row["step"], value))
    del want["step"]
    assert (
        set(events.Tags()["scalars"])
        == want.keys()
        >= {"reward", "timing_s/step", "memory/train", "val_gain", "val_gain_ci95/0", "kl"}
    )
    for name, points in want.items():
        found = [(e.step, e.value) for e in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in points], name
        assert [value for _, value in found] == pytest.approx(
            [value for _, value in points], rel=1e-6
        ), name


class Sent:
    """A tracker's module and its run: what was asked of them. Signatures are the packages' own; a
    keyword they lack is a TypeError.
    """

    def __init__(self, kind: str, fails_at: int | None = None, starts=True):
        self.kind = kind
        self.fails_at = fails_at
        self.starts = starts
        self.begun = []
        self.rows = []
        self.ended = 0
        module = ModuleType(kind)
        module.init = self.wandb_init if kind == "wandb" else self.trackio_init
        self.module = module
        self.run = SimpleNamespace(
            log=self.wandb_log if kind == "wandb" else self.trackio_log, finish=self.finish
        )

    def wandb_init(
        self,
        entity=None,
        project=None,
        dir=None,
        id=None,
        name=None,
        notes=None,
        tags=None,
        config=None,
        config_exclude_keys=None,
        config_include_keys=None,
        allow_val_change=None,
        group=None,
        job_type=None,
        mode=None,
        force=None,
        reinit=None,
        resume=None,
        resume_from=None,
        fork_from=None,
        save_code=None,
        tensorboard=None,
        sync_tensorboard=None,
        monitor_gym=None,
        settings=None,
    ):
        return self.begin(project, id, resume, config)

    def trackio_init(
        self,
        project,
        name=None,
        group=None,
        space_id=None,
        server_url=None,
        dataset_id=None,
        bucket_id=None,
        config=None,
        resume="never",
        settings=None,
        private=None,
        embed=True,
        auto_log_gpu=None,
        gpu_log_interval=10.0,
        auto_log_cpu=None,
        cpu_log_interval=10.0,
        webhook_url=None,
        webhook_min_level=None,
    ):
        return self.begin(project, name, resume, config)

    def begin(self, project, id, resume, config):
        if not self.starts:
            raise RuntimeError("No API key configured.\nLog in first.")
        self.begun.append((project, id, resume))
        self.config = config
        return self.run

    def wandb_log(self, data, step=None, commit=None):
        assert commit, (
            "wandb keeps a step back until the next one comes, unless it is told that this is all"
        )
        self.trackio_log(data, step)

    def trackio_log(self, metrics, step=None):
        if step == self.fails_at:
            raise ConnectionError("gone\naway")
        self.rows.append((step, metrics))

    def finish(self, exit_code=None):
        self.ended += 1


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_wandb_and_trackio_go_on_with_the_same_run(kind, world, tmp_path, monkeypatch):
    sent = Sent(kind)
    argv = [world, f"log.track={kind}", f"run.dir={tmp_path / 'run'}"]
    monkeypatch.setitem(sys.modules, kind, sent.module)
    crash(argv, monkeypatch)
    rows = jsonl(tmp_path / "run/metrics.jsonl")
    assert run_guarded(train.main, argv) == 0
    rows += jsonl(tmp_path / "run/metrics.jsonl")[3:]
    assert [(step, values) for step, values in sent.rows] == [
        (row["step"], flatten_row({k: v for k, v in row.items() if k != "step"})) for row in rows
    ]
    assert [step for step, _ in sent.rows] == [1, 2, 3, 4]
    assert sent.ended == 1
    assert sent.begun[0] == sent.begun[1]
    assert sent.begun[0][0] == "recr1"
    assert sent.begun[0][2] == "allow"
    assert sent.config == dataclasses.asdict(configs.load_config(world, argv[1:]))
    # another run is another one to the tracker
    assert (
        run_guarded(train.main, [*argv[:-1], "train.steps=1", f"run.dir={tmp_path / 'second'}"])
        == 0
    )
    assert sent.begun[2][1] != sent.begun[0][1]


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(
    world, tmp_path, monkeypatch, capsys
):
    sent = Sent("wandb", fails_at=2)
    monkeypatch.setitem(sys.modules, "wandb", sent.module)
    assert run_guarded(train.main, [world, "log.track=wandb", f"run.dir={tmp_path / 'run'}"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "log.track" in line]
    assert "wandb failed at step 2: ConnectionError: gone away" in line
    assert "metrics.jsonl has every step" in line
    assert [step for step, _ in sent.rows] == [1]
    assert [row["step"] for row in jsonl(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "kind, package", [("tensorboard", "'recr1[track]'"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_one_that_is_not_installed_is_refused_before_training(
    kind, package, world, tmp_path, monkeypatch, capsys
):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, kind, None)
    line = refused([world, f"log.track={kind}", f"run.dir={tmp_path / 'run'}"], capsys)
    assert f"log.track: {kind} cannot be imported" in line
    assert f"pip install {package}," in line
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert not (tmp_path / "run/eval_before.jsonl").exists()


def test_one_that_does_not_start_is_refused_and_without_it_the_same_run_starts(
    world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", Sent("wandb", starts=False).module)
    argv = [world, "train.steps=1", f"run.dir={tmp_path / 'run'}"]
    assert (
        "log.track: wandb did not start: RuntimeError: No API key configured. Log in first.; "
        in refused([*argv, "log.track=wandb"], capsys)
    )
    assert run_guarded(train.main, argv) == 0


def test_another_word_is_refused(world, capsys):
    assert "log.track: 'tensorbord' is not one of none, tensorboard, wandb, trackio" in refused(
        [world, "log.track=tensorbord"], capsys
    )


def test_a_damaged_note_is_refused(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", Sent("wandb").module)
    for text in (
        "",
        "[]",
        '{"tracker": "wandb", "id": "a"}',
        '{"tracker": "wandb", "id": "a", "step": []}',
    ):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/config.yaml").write_text(
            configs.dump_config(configs.load_config(world, [f"run.dir={tmp_path / 'run'}"]))
        )
        (tmp_path / "run/tracked.json").write_text(text)
        assert f"{tmp_path / 'run/tracked.json'} is damaged; remove it" in refused(
            [world, "log.track=wandb", f"run.dir={tmp_path / 'run'}"], capsys
        )


def test_another_tracker_begins_with_the_step_it_is_named_at(world, tmp_path, monkeypatch):
    (tmp_path / "tracked.json").write_text(json.dumps(dict(tracker="trackio", id="a", step=7)))
    sent = Sent("wandb")
    monkeypatch.setitem(sys.modules, "wandb", sent.module)
    tracker = Tracker(configs.load_config(world, ["log.track=wandb"]), tmp_path)
    tracker.send(dict(step=6, reward=1.0))
    assert sent.rows == [(6, dict(reward=1.0))]
    assert json.loads((tmp_path / "tracked.json").read_text()) == dict(
        tracker="wandb", id=sent.begun[0][1], step=6
    )


def test_only_rank_0_tracks_and_a_dry_run_does_not(world, tmp_path, monkeypatch):
    sent = Sent("wandb")
    monkeypatch.setitem(sys.modules, "wandb", sent.module)
    with monkeypatch.context() as patch:
        patch.setattr(dist, "rank", lambda: 1)
        tracker = Tracker(configs.load_config(world, ["log.track=wandb"]), tmp_path)
        tracker.send(dict(step=1, reward=1.0))
        tracker.close()
    monkeypatch.chdir(tmp_path)
    assert run_guarded(train.main, [world, "log.track=wandb", "--dry-run"]) == 0
    assert not sent.begun
    assert not sent.rows
    assert not list(tmp_path.glob("tracked*"))
