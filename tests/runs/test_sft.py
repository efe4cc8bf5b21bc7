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
from test_ranks import error, torchrun
from test_resume import kept
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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_sft_yaml(
        tmp_path_factory.mktemp("world"),
        **{"train.steps": 4, "save.every": 2, "train.eval_every": 2, "sampling.max_new_tokens": 20},
    )


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    return runs_of(sft.main, world, tmp_path_factory)


# --- what is learned ----------------------------------------


TEXTS = [
    Rollout(Prompt("a", 0, "", (1, 2, 3)), 0, 0, (10, 11), (0.0,) * 2, True),
    Rollout(Prompt("b", 1, "", (4,)), 1, 0, (12,), (0.0,), True),
]


@pytest.mark.parametrize(
    "mask, learned", [(True, {"a": [10, 11], "b": [12]}), (False, {"a": [2, 3, 10, 11], "b": [12]})]
)
def test_which_tokens_are_learned_and_what_is_read_before_them(mask, learned):
    """Each target is predicted from the row of the token before it, which sees all that stands
    before.
    """
    texts = [select_targets(r, mask) for r in TEXTS]
    [batch] = pack_rollouts(texts, 100)
    for i, r in enumerate(TEXTS):
        whole = [*r.prompt.ids, *r.ids]
        mine = batch.rollout == i
        assert batch.target[mine].tolist() == learned[r.prompt.id]
        rows = batch.predict_from[mine]
        assert batch.tokens[rows].tolist() == whole[-1 - len(rows) : -1]
        assert batch.positions[rows].tolist() == list(
            range(len(whole) - 1 - len(rows), len(whole) - 1)
        )
        assert [*texts[i].prompt.ids, *texts[i].ids] == whole
    assert batch.weight.tolist() == [1] * len(batch.target)


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
    total, batches = make_update([select_targets(r, mask) for r in texts], budget)
    assert (len(batches) == 1) == (budget == 10_000)
    assert total == sum(len(r.ids) + (not mask) * (len(r.prompt.ids) - 1) for r in texts)
    loss = 0.0
    for batch in batches:
        value, stats = compute_cross_entropy(
            model,
            batch,
            total,
            temperature,
            resolve_objective(CROSS_ENTROPY, ModelConfig(head=head)),
        )
        value.backward()
        loss += value.item()
        assert stats["trained"] == len(batch.target)
    assert loss == pytest.approx(want_loss, abs=1e-12)
    assert max(error(p.grad, want[name]) for name, p in model.named_parameters()) <= 1e-12


@pytest.mark.parametrize("mask", [True, False])
def test_a_runs_first_loss_is_that_of_the_lines_it_keeps(mask, run, world):
    """Step 1 takes every text: from teacher.jsonl, the data's prompts and the model's folder, by
    the padded reference.
    """
    lines = [
        line
        for line in jsonl(run() / "teacher.jsonl")
        if line["error"] is None and line["score"] > line["raw"]
    ]
    folder = run(
        "sft.filter=better",
        f"train.prompts_per_step={len(lines)}",
        "train.steps=1",
        f"sft.mask_prompt={mask}",
    )
    cfg = configs.load_config(world, [])
    prompts = {p.id: p for p in prompts_of(cfg)}
    texts = [
        Rollout(prompts[line["id"]], i, 0, tuple(line["ids"]), (), True)
        for i, line in enumerate(lines)
    ]
    want, grads = padded_cross_entropy(load_model(cfg.model.path).double(), texts, mask)
    [row] = jsonl(folder / "metrics.jsonl")
    assert len(lines) > 3
    assert row["loss"] == pytest.approx(want, rel=1e-5)
    assert row["epoch"] == 1
    assert row["grad_norm"] == pytest.approx(
        torch.nn.utils.get_total_norm(grads.values()).item(), rel=1e-4
    )
    assert row["tokens"] == sum(len(r.ids) + (not mask) * (len(r.prompt.ids) - 1) for r in texts)
    about = json.loads((folder / "summary.json").read_text())["teacher"]
    assert (about["texts"], about["kept"]) == (56, len(lines))
    assert about["score_kept"] > about["raw_kept"]


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


def stop(what: str, argv: list[str], monkeypatch) -> int:
    with monkeypatch.context() as patch, signal_handlers():
        at(what, sigterm, patch.setattr)
        return run_guarded(sft.main, argv)


@pytest.mark.parametrize("what", MOMENTS)
def test_sigterm_then_the_same_command_is_the_undisturbed_run(
    what, world, run, tmp_path, monkeypatch, capsys
):
    argv = [world, "train.tokens_per_micro_batch=90", f"run.dir={tmp_path / 'run'}"]
    assert stop(what, argv, monkeypatch) == 0
    said = capsys.readouterr().out
    saved = sorted(p.name for p in (tmp_path / "run/checkpoints").glob("step_*"))
    assert "recr1: stopped" in said
    assert not (tmp_path / "run/summary.json").exists()
    assert MOMENTS[what] is None or saved[-1:] == [f"step_{MOMENTS[what]:06d}"] * bool(
        MOMENTS[what]
    )
    if what == "teach@3":
        assert "teacher.jsonl, the same command goes on behind them" in said
        assert len(jsonl(tmp_path / "run/teacher.jsonl")) == 8
        with open(tmp_path / "run/teacher.jsonl", "a") as f:
            f.write('{"id": "torn')  # as a kill within a write would leave it
        monkeypatch.setattr(
            "recr1.training.teacher.generate",
            lambda model, prompts, *a, **k: (
                pytest.fail("sampled again")
                if prompts[0].index < 8
                else generate(model, prompts, *a, **k)
            ),
        )
    assert run_guarded(sft.main, argv) == 0
    assert "not bit for bit" not in capsys.readouterr().out
    assert kept(tmp_path / "run") == kept(run("train.tokens_per_micro_batch=90"))


def test_a_teacher_that_has_changed_is_refused(world, tmp_path, monkeypatch, capsys):
    argv = [world, teacher(world, tmp_path / "t.jsonl"), f"run.dir={tmp_path / 'run'}"]
    assert stop("lesson@2", argv, monkeypatch) == 0
    teacher(world, tmp_path / "t.jsonl", json.dumps(dict(id="train0", text=GOOD)))
    assert "teacher's file or the data have changed" in refused(argv, capsys, sft.main)


def test_two_ranks_are_the_run_on_one(world, run, tmp_path):
    argv = [world, "train.prompts_per_step=5"]
    one = run(*argv[1:])
    many = tmp_path / "many"
    torchrun(2, "-m", "recr1.sft", *argv, f"run.dir={many}")
    assert {p.name for p in one.iterdir()} == {p.name for p in many.iterdir()}
    assert jsonl(one / "teacher.jsonl") == jsonl(many / "teacher.jsonl")
    assert jsonl(one / "eval_before.jsonl") == jsonl(many / "eval_before.jsonl")
    for a, b in zip(jsonl(one / "metrics.jsonl"), jsonl(many / "metrics.jsonl"), strict=True):
        for key in a.keys() - {"timing_s", "memory", "tokens_per_s"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key


def test_where_gradients_are_summed_changes_no_bit(run):
    budget = "train.tokens_per_micro_batch=90"
    assert (
        weights(run(budget, "train.gradient_sync=last_micro_batch", "optimizer.cpu_offload=true"))
        == weights(run(budget))
        == weights(run(budget, "train.gradient_checkpointing=true"))
    )


@pytest.mark.parametrize("value", [nan, infinite])
def test_a_step_that_is_not_finite_moves_no_weight(value, world, tmp_path, monkeypatch, capsys):
    argv = [world, "train.steps=2", f"run.dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        at("lesson@2", value, patch.setattr)
        assert "optimizer step 2: the gradient norm is nan" in refused(argv, capsys, sft.main)
    [folder] = (tmp_path / "run/nonfinite").iterdir()
    note = json.loads((folder / "rank_00000.json").read_text())
    assert note["step"] == 2
    assert len(note["texts"]) == 4
    assert {"prompt", "ids"} == note["texts"][0].keys()


def test_sft_then_grpo(run, tmp_path):
    """The two commands of the README: GRPO begins as the policy that SFT left."""
    taught = run("sft.filter=better")
    argv = [
        write_yaml(tmp_path),
        f"model.path={taught / 'model'}",
        f"run.dir={tmp_path / 'grpo'}",
        "train.steps=2",
    ]
    assert run_guarded(train.main, argv) == 0
    assert jsonl(tmp_path / "grpo/eval_before.jsonl") == jsonl(taught / "eval_after.jsonl")
    assert weights(tmp_path / "grpo") != weights(taught)


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
    assert message in refused(
        [world, *(o for o in overrides if "=" in o), f"run.dir={tmp_path / 'run'}"],
        capsys,
        sft.main,
    )
    assert not (tmp_path / "run").exists()


def test_the_other_loop_and_the_plan_refuse_its_config(world, tmp_path, capsys):
    assert "sft.teacher: for python -m recr1.sft only" in refused(
        [world, f"run.dir={tmp_path / 'run'}"], capsys
    )
    assert "recr1 plan: " in refused(
        ["plan", world, "--gpus", "1", "--memory", "48GB"], capsys, cli.main
    )
    assert "usage: python -m recr1.sft" in refused([], capsys, sft.main)


@pytest.mark.parametrize(
    "more",
    [
        [],
        [
            "sft.teacher=nowhere/t.jsonl.gz",
            "sampling={max_new_tokens: 20}",
            "sft.mask_prompt=false",
        ],
        ["sft.filter=better", "sft.min_score=0.9"],
    ],
)
def test_a_dry_run(more, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_guarded(sft.main, [world, *more, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "dry run passed" in out
    assert float(re.search(r"grad +([\d.]+)", out)[1]) > 0
    assert not list(tmp_path.iterdir())


def test_make_policy_starts_from_nothing_and_learns(tmp_path, capsys):
    """The bundled policy's script: the same loss and packing, whole weights, Muon. Two steps of
    each stage.
    """
    sys.path.insert(0, str(ROOT / "experiments/make"))
    try:
        import make_policy
    finally:
        sys.path.pop(0)
    model = make_policy.initialize_model(0)
    losses = make_policy.fit(
        model,
        lambda step: TEXTS,
        12,
        OptimizerConfig(kind="muon", lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0),
        1024,
    )
    want, _ = padded_cross_entropy(make_policy.initialize_model(0).double(), TEXTS, True)
    assert losses[0] == pytest.approx(want, rel=1e-5)
    assert losses[-1] < 0.5 * losses[0]
