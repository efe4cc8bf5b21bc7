"""Any number of ranks is the same run: gradients and weights against plain autograd on one process,
and whole runs by torchrun.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import rank_jobs
from helpers.tiny_world import jsonl, write_yaml
from test_gradient import CLIP, KL, TEMPERATURE, padded_cross_entropy, reference_gradients

from recr1 import train
from recr1.model.hf_weights import load_model
from recr1.training.launch import run_guarded

HERE = Path(__file__).resolve().parents[1]


def torchrun(n: int, *arguments: str, expect: int = 0, **env) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(n),
        *arguments,
    ]
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        command,
        cwd=HERE.parent,
        env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=path) | env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert (done.returncode == 0) == (expect == 0), done.stdout + done.stderr
    return done


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids="{} ranks".format)
def ours(request, tmp_path_factory) -> dict:
    """Every case's results on so many ranks: one spawn."""
    if request.param == 1:
        return {case: rank_jobs.results(case, sharded=True) for case in rank_jobs.CASES} | dict(
            lessons={case: rank_jobs.lesson(case) for case in rank_jobs.LESSONS},
            told=[rank_jobs.one_fails()],
            shares=[list(range(7))],
        )
    out = tmp_path_factory.mktemp("ranks") / "out.pt"
    torchrun(request.param, str(HERE / "helpers/rank_jobs.py"), str(out))
    return torch.load(out, weights_only=True)


@functools.cache
def plain(case: str) -> dict:
    return rank_jobs.results(case, sharded=False)


def error(ours: torch.Tensor, want: torch.Tensor) -> float:
    return ((ours - want).norm() / want.norm().clamp(min=1e-300)).item()


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in rank_jobs.CASES
        if rank_jobs.CASES[case].compute is None and case not in rank_jobs.PADDED
    ],
)
def test_gradient_and_weights_are_those_of_one_plain_process(ours, case):
    ours = ours[case]
    want = plain(case)
    assert ours.keys() == want.keys()
    worst = {
        kind: max(
            (error(ours[name], want[name]) for name in want if name.startswith(kind)), default=0.0
        )
        for kind in ("grad", "weight")
    }
    print(
        f"{case}: largest ||a-b||/||b|| of a gradient {worst['grad']:.1e}, "
        f"of weights after 3 steps {worst['weight']:.1e}"
    )
    trained = {name.removeprefix("grad ") for name in want if name.startswith("grad")}
    still = {name.removeprefix("weight ") for name in want if name.startswith("weight")} - trained
    if case == "float64 nobody has":
        assert not trained
        assert ours["norm"] == 0
        assert worst["weight"] == 0
    elif case.startswith("float64"):
        assert trained
        assert bool(still) == bool(rank_jobs.CASES[case].frozen)
        # of terms of 1
        assert worst["grad"] <= 1e-12
        assert worst["weight"] <= 1e-9
        assert (ours["loss"] - want["loss"]).abs() <= 1e-12
        assert abs(ours["norm"] / want["norm"] - 1) < 1e-12
        start = rank_jobs.tiny_model(1, **rank_jobs.CASES[case].shape).state_dict()
        assert all(ours[f"weight {name}"].equal(start[name].double()) for name in still)
    else:
        assert worst["grad"] <= 1e-5


@pytest.mark.parametrize("case", rank_jobs.PADDED)
def test_shared_prompts_under_checkpointing_train_as_padded_rows(ours, case):
    """The gradient of test_gradient.py's reference: a padded row per sibling, a mask, float64,
    plain autograd, one process.
    """
    c = rank_jobs.CASES[case]
    cfg = rank_jobs.settings(c)
    assert (cfg.sampling.temperature, cfg.loss.clip_ratio_low, cfg.loss.kl_coef) == (
        TEMPERATURE,
        CLIP,
        KL,
    )
    rollouts, rewards = rank_jobs.rollouts_and_rewards(0, group=c.group)
    adv = rank_jobs.advantages(rewards, cfg, c.group, torch.float64)
    policy, frozen = (rank_jobs.tiny_model(seed, **c.shape).double() for seed in (1, 2))
    loss, want = reference_gradients(
        policy, frozen, rollouts, adv, sum(len(r.ids) for r in rollouts)
    )
    errors = {name: error(ours[case][f"grad {name}"], grad) for name, grad in want.items()}
    print(f"{case}: largest ||a-b||/||b|| {max(errors.values()):.1e}")
    limit = 1e-12 if c.dtype == torch.float64 else 1e-5
    assert max(errors.values()) <= limit
    assert abs(ours[case]["loss"] - loss) <= limit
    assert len({len(r.prompt.ids) for r in rollouts}) > 1
    assert len({len(r.ids) for r in rollouts}) > 2


@pytest.mark.parametrize("case", rank_jobs.AGAINST_FSDP2)
def test_gradient_and_loss_are_those_of_torchs_fully_shard(ours, case):
    """bfloat16: gathered weights and gradients of a rank, summed over ranks in float32 by both:
    equal but for the order of that sum.
    """
    if "fsdp2" not in ours:
        pytest.skip("one process: nothing is sharded")
    want = ours["fsdp2"][case]
    assert want.keys() == {name for name in ours[case] if not name.startswith(("weight", "norm"))}
    worst = max(error(ours[case][name], want[name]) for name in want if name != "loss")
    print(f"{case}: against fully_shard at most {worst:.1e}")
    limit = 1e-12 if case.startswith("float64") else 1e-6
    assert worst <= limit
    assert (ours[case]["loss"] - want["loss"]).abs() <= limit


@pytest.mark.parametrize("case", rank_jobs.LESSONS)
def test_sft_learns_the_mean_cross_entropy_of_all_ranks_targets(ours, case):
    """Against padded rows in float64, torch's cross_entropy and plain autograd."""
    want_loss, want = padded_cross_entropy(
        rank_jobs.tiny_model(1, tie_word_embeddings=True).double(),
        rank_jobs.lesson_texts(),
        rank_jobs.LESSONS[case][0],
    )
    got = ours["lessons"][case]
    assert got.keys() == {*(f"grad {name}" for name in want), "loss"}
    worst = max(error(got[f"grad {name}"], grad) for name, grad in want.items())
    print(f"{case}: largest ||a-b||/||b|| of a gradient {worst:.1e}")
    assert worst <= 1e-12
    assert abs(got["loss"] - want_loss) <= 1e-12


def test_at_most_two_blocks_and_the_root_are_gathered(ours):
    for case, (most, bound) in ours.get("gathered_bytes", {}).items():
        assert 0 < most <= bound, case


def test_a_leak_of_gathered_weights_is_seen(ours):
    """The measurement above waits for what is about to be freed: it must still see what is not."""
    if "leak" not in ours:
        pytest.skip("one process: nothing is gathered")
    assert ours["leak"] == "gathered weights outlive the backward"


def test_the_budget_does_not_matter_either():
    for name, want in plain("float64").items():
        assert error(plain("float64 small batches")[name], want) <= (
            1e-9 if name.startswith("weight") else 1e-12
        ), name


def test_shares_are_the_whole_and_one_failure_is_everybodys(ours):
    assert sum(ours["shares"], []) == list(range(7))
    assert max(map(len, ours["shares"])) - min(map(len, ours["shares"])) <= 1
    assert set(ours["told"]) == {"only here"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_yaml(tmp_path_factory.mktemp("world"), **{"loss.kl_coef": 0.01, "run.threads": 0})


@pytest.mark.parametrize("n, prompts", [(2, 5), (3, 2)])
def test_a_run_on_several_ranks_is_the_run_on_one(n, prompts, world, tmp_path):
    """Prompts that do not divide, even fewer than ranks; the same rollouts, rewards, evaluation
    and, to rounding, the same policy.
    """
    one = tmp_path / "one"
    many = tmp_path / "many"
    argv = [world, f"train.prompts_per_step={prompts}", "train.steps=2"]
    assert run_guarded(train.main, [*argv, f"run.dir={one}"]) == 0
    torchrun(n, "-m", "recr1.train", *argv, f"run.dir={many}")
    assert {p.name for p in one.iterdir()} == {p.name for p in many.iterdir()}
    assert jsonl(one / "eval_before.jsonl") == jsonl(many / "eval_before.jsonl")
    for a, b in zip(
        jsonl(one / "rollouts.jsonl.gz"), jsonl(many / "rollouts.jsonl.gz"), strict=True
    ):
        for key in a:
            assert a[key] == (
                pytest.approx(b[key], abs=2e-3)
                if key.endswith(("logp", "entropy", "advantage"))
                else b[key]
            ), key
    rows = [[json.loads(line) for line in open(folder / "metrics.jsonl")] for folder in (one, many)]
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        assert (
            a["val_ndcg" if "val_ndcg" in a else "reward"]
            == b["val_ndcg" if "val_ndcg" in a else "reward"]
        )
        for key in (
            a.keys()
            - {"timing_s", "memory", "rollout_tokens_per_s", "reward_wait_frac"}
            - {key for key in a if "gap" in key}
        ):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key
    summary = json.loads((many / "summary.json").read_text())
    assert summary["world_size"] == n
    assert summary["n_eval"] == 12
    theirs, ours = (load_model(str(folder / "model")).state_dict() for folder in (one, many))
    assert max(((ours[k] - theirs[k]).norm() / theirs[k].norm()).item() for k in theirs) < 1e-3


def test_bad_input_is_one_line_on_any_number_of_ranks(world, tmp_path):
    done = torchrun(
        2,
        "-m",
        "recr1.train",
        world,
        "data.corpus=nowhere.jsonl",
        f"run.dir={tmp_path / 'run'}",
        expect=1,
    )
    assert [line for line in done.stderr.splitlines() if line.startswith("recr1:")] == [
        "recr1: nowhere.jsonl: no such file; check the path, or prepare the data set first"
    ]
    assert "Traceback" not in done.stderr.split("recr1:")[0]
    assert not (tmp_path / "run").exists()
