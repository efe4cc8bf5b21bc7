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

SETTINGS = {"train.steps": 4, "save.every": 2, "train.eval_every": 2, "loss.kl_coef": 0.05}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return write_yaml(folder, **SETTINGS)


def interrupt(result):
    raise KeyboardInterrupt


def crash_run(argv, monkeypatch) -> None:
    """Start the run, which dies in step 4: its checkpoint is that of step 2, its log and its
    tracker have step 3.
    """
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at("sample@4", interrupt, patch.setattr)
        run_guarded(train.main, argv)


def list_steps(rows: list[dict]) -> list[int]:
    return [row["step"] for row in rows]


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


EXPECTED_TAGS = {
    "reward",
    "timing_s/step",
    "memory/train",
    "val_gain",
    "val_gain_ci95/0",
    "kl",
}


def test_tensorboard_has_every_step_once_after_a_crash(world, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    argv = [world, "log.track=tensorboard", f"run.dir={run}"]
    crash_run(argv, monkeypatch)
    rows = jsonl(run / "metrics.jsonl")
    assert list_steps(rows) == [1, 2, 3]
    assert run_guarded(train.main, argv) == 0
    # step 3 was trained again, and is not sent again
    rows += jsonl(run / "metrics.jsonl")[3:]
    assert list_steps(rows) == [1, 2, 3, 4]

    want_steps = {}
    want_values = {}
    for row in rows:
        step = row.pop("step")
        for name, value in flatten_row(row).items():
            want_steps.setdefault(name, []).append(step)
            want_values.setdefault(name, []).append(value)

    folder = str(run / "tensorboard")
    events = accumulator.EventAccumulator(folder, size_guidance=dict(scalars=0))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags == want_steps.keys()
    assert tags >= EXPECTED_TAGS
    for name in tags:
        points = events.Scalars(name)
        steps = [point.step for point in points]
        values = [point.value for point in points]
        assert steps == want_steps[name], name
        assert values == pytest.approx(want_values[name], rel=1e-6), name


class FakeTracker:
    """Stands for a tracker's module and its run, and notes what is asked of them.

    Signatures are the packages' own; a keyword they lack is a TypeError.
    """

    def __init__(self, kind: str, fails_at: int | None = None, starts=True):
        self.fails_at = fails_at
        self.starts = starts
        self.started_runs = []
        self.rows = []
        self.finishes = 0
        self.module = ModuleType(kind)
        if kind == "wandb":
            self.module.init = self.wandb_init
            self.run = SimpleNamespace(log=self.wandb_log, finish=self.finish)
        else:
            self.module.init = self.trackio_init
            self.run = SimpleNamespace(log=self.trackio_log, finish=self.finish)

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
        return self.start(project, id, resume, config)

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
        return self.start(project, name, resume, config)

    def start(self, project, id, resume, config):
        if not self.starts:
            raise RuntimeError("No API key configured.\nLog in first.")
        self.started_runs.append((project, id, resume))
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
        self.finishes += 1


def install_fake(monkeypatch, kind: str, **options) -> FakeTracker:
    """Let `import kind` give a tracker that only notes what it is sent."""
    tracker = FakeTracker(kind, **options)
    monkeypatch.setitem(sys.modules, kind, tracker.module)
    return tracker


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_wandb_and_trackio_go_on_with_the_same_run(kind, world, tmp_path, monkeypatch):
    fake = install_fake(monkeypatch, kind)
    settings = [f"log.track={kind}", f"run.dir={tmp_path / 'run'}"]
    argv = [world, *settings]
    crash_run(argv, monkeypatch)
    rows = jsonl(tmp_path / "run/metrics.jsonl")
    assert run_guarded(train.main, argv) == 0
    rows += jsonl(tmp_path / "run/metrics.jsonl")[3:]

    want = []
    for row in rows:
        step = row.pop("step")
        want.append((step, flatten_row(row)))
    assert fake.rows == want
    sent_steps = [step for step, _ in fake.rows]
    assert sent_steps == [1, 2, 3, 4]
    assert fake.finishes == 1

    first, second = fake.started_runs
    assert first == second
    project, id, resume = first
    assert project == "recr1"
    assert resume == "allow"
    config = configs.load_config(world, settings)
    assert fake.config == dataclasses.asdict(config)

    # another run is another one to the tracker
    argv = [world, f"log.track={kind}", "train.steps=1", f"run.dir={tmp_path / 'second'}"]
    assert run_guarded(train.main, argv) == 0
    _, id_of_another, _ = fake.started_runs[2]
    assert id_of_another != id


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(
    world, tmp_path, monkeypatch, capsys
):
    fake = install_fake(monkeypatch, "wandb", fails_at=2)
    run = tmp_path / "run"

    assert run_guarded(train.main, [world, "log.track=wandb", f"run.dir={run}"]) == 0

    output = capsys.readouterr().out.splitlines()
    [line] = [line for line in output if "log.track" in line]
    assert "wandb failed at step 2: ConnectionError: gone away" in line
    assert "metrics.jsonl has every step" in line
    sent_steps = [step for step, _ in fake.rows]
    assert sent_steps == [1]
    rows = jsonl(run / "metrics.jsonl")
    assert list_steps(rows) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "kind, package", [("tensorboard", "'recr1[track]'"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_one_that_is_not_installed_is_refused_before_training(
    kind, package, world, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    for name in list(sys.modules):
        if name.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, kind, None)

    line = refused([world, f"log.track={kind}", f"run.dir={run}"], capsys)

    assert f"log.track: {kind} cannot be imported" in line
    assert f"pip install {package}," in line
    assert not (run / "metrics.jsonl").exists()
    assert not (run / "eval_before.jsonl").exists()


def test_one_that_does_not_start_is_refused_and_without_it_the_same_run_starts(
    world, tmp_path, monkeypatch, capsys
):
    install_fake(monkeypatch, "wandb", starts=False)
    argv = [world, "train.steps=1", f"run.dir={tmp_path / 'run'}"]

    line = refused([*argv, "log.track=wandb"], capsys)

    reason = "RuntimeError: No API key configured. Log in first.; "
    assert f"log.track: wandb did not start: {reason}" in line
    assert run_guarded(train.main, argv) == 0


def test_another_word_is_refused(world, capsys):
    line = refused([world, "log.track=tensorbord"], capsys)
    assert "log.track: 'tensorbord' is not one of none, tensorboard, wandb, trackio" in line


DAMAGED_NOTES = (
    "",
    "[]",
    '{"tracker": "wandb", "id": "a"}',
    '{"tracker": "wandb", "id": "a", "step": []}',
)


def test_a_damaged_note_is_refused(world, tmp_path, monkeypatch, capsys):
    install_fake(monkeypatch, "wandb")
    run = tmp_path / "run"
    note = run / "tracked.json"
    place = f"run.dir={run}"
    config = configs.load_config(world, [place])
    for text in DAMAGED_NOTES:
        run.mkdir(exist_ok=True)
        (run / "config.yaml").write_text(configs.dump_config(config))
        note.write_text(text)

        line = refused([world, "log.track=wandb", place], capsys)

        assert f"{note} is damaged; remove it" in line


def test_another_tracker_begins_with_the_step_it_is_named_at(world, tmp_path, monkeypatch):
    note = tmp_path / "tracked.json"
    note_of_another = dict(tracker="trackio", id="a", step=7)
    note.write_text(json.dumps(note_of_another))
    fake = install_fake(monkeypatch, "wandb")
    config = configs.load_config(world, ["log.track=wandb"])

    tracker = Tracker(config, tmp_path)
    tracker.send(dict(step=6, reward=1.0))

    assert fake.rows == [(6, dict(reward=1.0))]
    _, id, _ = fake.started_runs[0]
    new_note = json.loads(note.read_text())
    assert new_note == dict(tracker="wandb", id=id, step=6)


def test_only_rank_0_tracks_and_a_dry_run_does_not(world, tmp_path, monkeypatch):
    fake = install_fake(monkeypatch, "wandb")
    config = configs.load_config(world, ["log.track=wandb"])

    with monkeypatch.context() as patch:
        patch.setattr(dist, "rank", lambda: 1)
        tracker = Tracker(config, tmp_path)
        tracker.send(dict(step=1, reward=1.0))
        tracker.close()
    monkeypatch.chdir(tmp_path)
    assert run_guarded(train.main, [world, "log.track=wandb", "--dry-run"]) == 0

    assert not fake.started_runs
    assert not fake.rows
    assert not list(tmp_path.glob("tracked*"))
