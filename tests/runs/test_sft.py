"""SFT: which tokens are learned, its loss against torch's, the two teachers, and that it is a run
like GRPO's.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import rank_jobs
from helpers.interrupted import at, infinite, nan, sigterm
from helpers.tiny_world import jsonl, refused, runs_of, tiny_model, write_sft_yaml, write_yaml
from test_gradient import padded_cross_entropy
from test_ranks import relative_error, torchrun
from test_resume import collect_outputs, list_checkpoints
from test_teacher import GOOD, prompts_of, teacher, weights

from recr1 import cli, sft, train
from recr1.config import loader as configs
from recr1.config.schema import ModelConfig, OptimizerConfig
from recr1.data_types import Prompt, Rollout
from recr1.model.hf_weights import load_model
from recr1.rl.losses import resolve_objective
from recr1.rl.packing import pack_rollouts
from recr1.sampling.generate import generate
from recr1.sft import CROSS_ENTROPY, compute_cross_entropy, make_update, select_targets
from recr1.training.launch import run_guarded
from recr1.utils.interrupts import signal_handlers

ROOT = Path(__file__).resolve().parents[2]
SMALL_BATCHES = "train.tokens_per_micro_batch=90"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    overrides = {"train.steps": 4, "save.every": 2, "train.eval_every": 2}
    return write_sft_yaml(folder, **overrides, **{"sampling.max_new_tokens": 20})


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    return runs_of(sft.main, world, tmp_path_factory)


# --- what is learned ----------------------------------------


TEXTS = [
    Rollout(Prompt("a", 0, "", (1, 2, 3)), 0, 0, (10, 11), (0.0,) * 2, True),
    Rollout(Prompt("b", 1, "", (4,)), 1, 0, (12,), (0.0,), True),
]
# sft.mask_prompt, the targets of each text
LEARNED = [
    (True, {"a": [10, 11], "b": [12]}),
    (False, {"a": [2, 3, 10, 11], "b": [12]}),
]


@pytest.mark.parametrize("mask, learned", LEARNED)
def test_which_tokens_are_learned_and_what_is_read_before_them(mask, learned):
    """Each target is predicted from the row of the token before it, which sees all that stands
    before.
    """
    targets = [select_targets(text, mask) for text in TEXTS]

    [batch] = pack_rollouts(targets, 100)

    for i, text in enumerate(TEXTS):
        tokens = [*text.prompt.ids, *text.ids]
        of_text = batch.rollout == i
        rows = batch.predict_from[of_text]
        last = len(tokens) - 1
        first = last - len(rows)
        assert batch.target[of_text].tolist() == learned[text.prompt.id]
        assert batch.tokens[rows].tolist() == tokens[first:last]
        assert batch.positions[rows].tolist() == list(range(first, last))
        assert [*targets[i].prompt.ids, *targets[i].ids] == tokens
    assert batch.weight.tolist() == [1] * len(batch.target)


def count_targets(texts: list[Rollout], mask: bool) -> int:
    """Count the tokens learned: the answers', and, unmasked, the prompts' but their first."""
    count = 0
    for text in texts:
        count = count + len(text.ids)
        if not mask:
            count = count + len(text.prompt.ids) - 1
    return count


@pytest.mark.parametrize("head", ["fused", "recompute"])
@pytest.mark.parametrize("budget", [18, 30, 10_000])
@pytest.mark.parametrize("mask, temperature", [(True, 1.0), (True, 1.3), (False, 1.0)])
def test_loss_and_gradient_are_torchs_cross_entropy(mask, temperature, budget, head):
    """The mean over all the step's targets, however they are packed; float64
    (tests/helpers/rank_jobs.py: however they are dealt out).
    """
    model = tiny_model(1).double()
    texts = rank_jobs.lesson_texts()
    want_loss, want = padded_cross_entropy(model, texts, mask, temperature)
    targets = [select_targets(text, mask) for text in texts]
    objective = resolve_objective(CROSS_ENTROPY, ModelConfig(head=head))

    total, batches = make_update(targets, budget)
    loss = 0.0
    for batch in batches:
        value, stats = compute_cross_entropy(model, batch, total, temperature, objective)
        value.backward()
        loss += value.item()
        assert stats["trained"] == len(batch.target)

    fits_one_batch = budget == 10_000
    assert (len(batches) == 1) == fits_one_batch
    assert total == count_targets(texts, mask)
    assert loss == pytest.approx(want_loss, abs=1e-12)
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, want[name]) <= 1e-12, name


@pytest.mark.parametrize("mask", [True, False])
def test_a_runs_first_loss_is_that_of_the_lines_it_keeps(mask, run, world):
    """Step 1 takes every text: from teacher.jsonl, the data's prompts and the model's folder, by
    the padded reference.
    """
    lines = []
    for line in jsonl(run() / "teacher.jsonl"):
        if line["error"] is None and line["score"] > line["raw"]:
            lines.append(line)
    overrides = ["sft.filter=better", "train.steps=1", f"sft.mask_prompt={mask}"]
    folder = run(*overrides, f"train.prompts_per_step={len(lines)}")

    cfg = configs.load_config(world, [])
    prompts = {prompt.id: prompt for prompt in prompts_of(cfg)}
    texts = []
    for i, line in enumerate(lines):
        prompt = prompts[line["id"]]
        texts.append(Rollout(prompt, i, 0, tuple(line["ids"]), (), True))
    model = load_model(cfg.model.path).double()
    want, gradients = padded_cross_entropy(model, texts, mask)
    norm = torch.nn.utils.get_total_norm(gradients.values()).item()

    [row] = jsonl(folder / "metrics.jsonl")
    assert len(lines) > 3
    assert row["loss"] == pytest.approx(want, rel=1e-5)
    assert row["epoch"] == 1
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert row["tokens"] == count_targets(texts, mask)
    summary = json.loads((folder / "summary.json").read_text())["teacher"]
    assert summary["texts"] == 56
    assert summary["kept"] == len(lines)
    assert summary["score_kept"] > summary["raw_kept"]


# --- a run like GRPO's ----------------------------------------------------------------------------


MOMENTS = {  # when SIGTERM comes: the step after which the run is saved, 0: none is
    "index@1": 0,
    "teach@3": 0,
    "evaluate@1": 0,
    "lesson@3": None,
    "evaluate@2": 2,
    "log@3": 3,
    "save@1": 2,
}


def stop_training(what: str, argv: list[str], monkeypatch) -> int:
    """Run in this process, with a SIGTERM at that moment; return the exit code."""
    with monkeypatch.context() as patch, signal_handlers():
        at(what, sigterm, patch.setattr)
        return run_guarded(sft.main, argv)


@pytest.mark.parametrize("what", MOMENTS)
def test_sigterm_then_the_same_command_is_the_undisturbed_run(
    what, world, run, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    argv = [world, SMALL_BATCHES, f"run.dir={folder}"]
    step = MOMENTS[what]

    code = stop_training(what, argv, monkeypatch)

    assert code == 0
    out = capsys.readouterr().out
    assert "recr1: stopped" in out
    assert not (folder / "summary.json").exists()
    if step is not None:
        last = list_checkpoints(folder)[-1:]
        want = [f"step_{step:06d}"] if step else []
        assert last == want
    if what == "teach@3":
        assert "teacher.jsonl, the same command goes on behind them" in out
        check_torn_teacher(folder, monkeypatch)

    code = run_guarded(sft.main, argv)

    assert code == 0
    assert "not bit for bit" not in capsys.readouterr().out
    assert collect_outputs(folder) == collect_outputs(run(SMALL_BATCHES))


def check_torn_teacher(folder: Path, monkeypatch) -> None:
    """Check the teacher's first 8 lines, tear the next, and fail if one of the 8 is made again."""

    def generate_rest(model, prompts, *arguments, **settings):
        if prompts[0].index < 8:
            pytest.fail("sampled again")
        return generate(model, prompts, *arguments, **settings)

    path = folder / "teacher.jsonl"
    assert len(jsonl(path)) == 8
    with open(path, "a") as file:
        # as a kill within a write would leave it
        file.write('{"id": "torn')
    monkeypatch.setattr("recr1.training.teacher.generate", generate_rest)


def test_a_teacher_that_has_changed_is_refused(world, tmp_path, monkeypatch, capsys):
    path = tmp_path / "t.jsonl"
    argv = [world, teacher(world, path), f"run.dir={tmp_path / 'run'}"]
    code = stop_training("lesson@2", argv, monkeypatch)
    assert code == 0
    line = json.dumps(dict(id="train0", text=GOOD))
    teacher(world, path, line)

    message = refused(argv, capsys, sft.main)

    assert "teacher's file or the data have changed" in message


NOT_COMPARED = {"timing_s", "memory", "tokens_per_s"}


def test_two_ranks_are_the_run_on_one(world, run, tmp_path):
    override = "train.prompts_per_step=5"
    many = tmp_path / "many"

    one = run(override)
    torchrun(2, "-m", "recr1.sft", world, override, f"run.dir={many}")

    names = {path.name for path in one.iterdir()}
    assert {path.name for path in many.iterdir()} == names
    assert jsonl(one / "teacher.jsonl") == jsonl(many / "teacher.jsonl")
    assert jsonl(one / "eval_before.jsonl") == jsonl(many / "eval_before.jsonl")
    rows = jsonl(one / "metrics.jsonl")
    others = jsonl(many / "metrics.jsonl")
    for row, other in zip(rows, others, strict=True):
        for key in row.keys() - NOT_COMPARED:
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


def test_where_gradients_are_summed_changes_no_bit(run):
    want = weights(run(SMALL_BATCHES))
    overrides = ["train.gradient_sync=last_micro_batch", "optimizer.cpu_offload=true"]

    summed_once = run(SMALL_BATCHES, *overrides)
    recomputed = run(SMALL_BATCHES, "train.gradient_checkpointing=true")

    assert weights(summed_once) == want
    assert weights(recomputed) == want


@pytest.mark.parametrize("value", [nan, infinite])
def test_a_step_that_is_not_finite_moves_no_weight(value, world, tmp_path, monkeypatch, capsys):
    argv = [world, "train.steps=2", f"run.dir={tmp_path / 'run'}"]

    with monkeypatch.context() as patch:
        at("lesson@2", value, patch.setattr)
        line = refused(argv, capsys, sft.main)

    assert "optimizer step 2: the gradient norm is nan" in line
    [folder] = (tmp_path / "run/nonfinite").iterdir()
    note = json.loads((folder / "rank_00000.json").read_text())
    assert note["step"] == 2
    assert len(note["texts"]) == 4
    assert note["texts"][0].keys() == {"prompt", "ids"}


def test_sft_then_grpo(run, tmp_path):
    """The two commands of the README: GRPO begins as the policy that SFT left."""
    taught = run("sft.filter=better")
    folder = tmp_path / "grpo"
    config = write_yaml(tmp_path)
    argv = [config, f"model.path={taught / 'model'}", f"run.dir={folder}", "train.steps=2"]

    code = run_guarded(train.main, argv)

    assert code == 0
    assert jsonl(folder / "eval_before.jsonl") == jsonl(taught / "eval_after.jsonl")
    assert weights(folder) != weights(taught)


# --- settings -------------------------------------------------------------------------------------


OTHERS = {  # overrides of the SFT config -> why it is refused
    "loss": (["loss.kl_coef=0.1"], "loss.kl_coef: for python -m recr1.train only"),
    "several": (
        ["train.num_mini_batches=2", "data.shuffle_words=0.5"],
        "data.shuffle_words, train.num_mini_batches: for python -m recr1.train only",
    ),
    "no teacher": (["sft.teacher=''"], "sft.teacher: is empty"),
    "both lengths": (["sft.epochs=2"], "sft.epochs, train.steps: give one of the two"),
    "unknown rule": (["sft.filter=best"], "sft.filter: 'best' is not one of all, no_worse, better"),
    "unknown key": (
        ["sft.mask_prompts=true"],
        "unknown key sft.mask_prompts: did you mean sft.mask_prompt?",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_setting_that_it_would_not_read_is_refused(name, world, tmp_path, capsys):
    overrides, message = OTHERS[name]
    folder = tmp_path / "run"

    line = refused([world, *overrides, f"run.dir={folder}"], capsys, sft.main)

    assert message in line
    assert not folder.exists()


def test_the_other_loop_and_the_plan_refuse_its_config(world, tmp_path, capsys):
    line = refused([world, f"run.dir={tmp_path / 'run'}"], capsys)
    assert "sft.teacher: for python -m recr1.sft only" in line

    plan = ["plan", world, "--gpus", "1", "--memory", "48GB"]
    line = refused(plan, capsys, cli.main)
    assert "recr1 plan: " in line

    line = refused([], capsys, sft.main)
    assert "usage: python -m recr1.sft" in line


NO_FILE = ["sft.teacher=nowhere/t.jsonl.gz", "sampling={max_new_tokens: 20}"]
DRY_RUNS = [
    [],
    [*NO_FILE, "sft.mask_prompt=false"],
    ["sft.filter=better", "sft.min_score=0.9"],
]


@pytest.mark.parametrize("more", DRY_RUNS)
def test_a_dry_run(more, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    code = run_guarded(sft.main, [world, *more, "--dry-run"])

    assert code == 0
    out = capsys.readouterr().out
    assert "dry run passed" in out
    norm = re.search(r"grad +([\d.]+)", out)[1]
    assert float(norm) > 0
    assert list(tmp_path.iterdir()) == []


def test_make_policy_starts_from_nothing_and_learns():
    """The bundled policy's script: the same loss and packing, all weights, Muon. Two steps of
    each stage.
    """
    sys.path.insert(0, str(ROOT / "experiments/make"))
    try:
        import make_policy
    finally:
        sys.path.pop(0)
    config = OptimizerConfig(kind="muon", lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    model = make_policy.initialize_model(0)
    start = make_policy.initialize_model(0).double()

    losses = make_policy.fit(model, lambda step: TEXTS, 12, config, 1024)

    want, _ = padded_cross_entropy(start, TEXTS, True)
    assert losses[0] == pytest.approx(want, rel=1e-5)
    assert losses[-1] < 0.5 * losses[0]
