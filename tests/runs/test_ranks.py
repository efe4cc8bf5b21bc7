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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(n), *arguments]
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=path) | env
    process = subprocess.run(
        command, cwd=HERE.parent, env=env, capture_output=True, text=True, timeout=900
    )
    succeeded = process.returncode == 0
    assert succeeded == (expect == 0), process.stdout + process.stderr
    return process


def relative_error(actual: torch.Tensor, want: torch.Tensor) -> float:
    """Compute ||a-b|| / ||b||."""
    difference = (actual - want).norm()
    scale = want.norm().clamp(min=1e-300)
    return (difference / scale).item()


def find_largest(errors: list[float]) -> float:
    """Find the largest error: NaN if any of them is, which Python's max would not say; 0 without
    any.
    """
    values = torch.tensor([0.0, *errors], dtype=torch.float64)
    return values.max().item()


def worst_error(actual: dict, want: dict, prefix: str) -> float:
    """Find the largest relative error of the tensors whose names begin so."""
    errors = []
    for name, tensor in want.items():
        if name.startswith(prefix):
            errors.append(relative_error(actual[name], tensor))
    return find_largest(errors)


def worst_gradient(actual: dict, want: dict) -> float:
    """Find the largest relative error of the gradients {weight's name: gradient}."""
    errors = []
    for name, gradient in want.items():
        errors.append(relative_error(actual[f"grad {name}"], gradient))
    assert errors
    return find_largest(errors)


def strip_names(results: dict, prefix: str) -> set[str]:
    """List the names that begin so, without that beginning."""
    return {name.removeprefix(prefix) for name in results if name.startswith(prefix)}


# --- steps against one plain process --------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids="{} ranks".format)
def ours(request, tmp_path_factory) -> dict:
    """Every case's results on so many ranks: one spawn."""
    if request.param > 1:
        path = tmp_path_factory.mktemp("ranks") / "out.pt"
        torchrun(request.param, str(HERE / "helpers/rank_jobs.py"), str(path))
        return torch.load(path, weights_only=True)

    results = {}
    for case in rank_jobs.CASES:
        results[case] = rank_jobs.results(case, sharded=True)
    results["lessons"] = {case: rank_jobs.lesson(case) for case in rank_jobs.LESSONS}
    results["told"] = [rank_jobs.one_fails()]
    results["batch"] = [rank_jobs.batch_normalized()]
    results["shares"] = [list(range(7))]
    return results


@functools.cache
def compute_plain(case: str) -> dict:
    return rank_jobs.results(case, sharded=False)


PLAIN_CASES = [
    name
    for name, case in rank_jobs.CASES.items()
    if case.compute is None and name not in rank_jobs.PADDED
]


@pytest.mark.parametrize("case", PLAIN_CASES)
def test_gradient_and_weights_are_those_of_one_plain_process(ours, case):
    actual = ours[case]
    want = compute_plain(case)

    assert actual.keys() == want.keys()
    gradient_error = worst_error(actual, want, "grad")
    weight_error = worst_error(actual, want, "weight")
    print(
        f"{case}: largest ||a-b||/||b|| of a gradient {gradient_error:.1e}, "
        f"of weights after 3 steps {weight_error:.1e}"
    )
    trained = strip_names(want, "grad ")
    if case == "float64 nobody has":
        assert not trained
        assert actual["norm"] == 0
        assert weight_error == 0
    elif case.startswith("float64"):
        assert trained
        # of terms of 1
        assert gradient_error <= 1e-12
        assert weight_error <= 1e-9
        assert (actual["loss"] - want["loss"]).abs() <= 1e-12
        assert abs(actual["norm"] / want["norm"] - 1) < 1e-12
        check_still_weights(rank_jobs.CASES[case], actual, want)
    else:
        assert gradient_error <= 1e-5


def check_still_weights(case, actual: dict, want: dict) -> None:
    """Check that weights without a gradient, the frozen ones, are those of the start."""
    still = strip_names(want, "weight ") - strip_names(want, "grad ")
    start = rank_jobs.tiny_model(1, **case.shape).state_dict()
    assert bool(still) == bool(case.frozen or case.lora)
    for name in still:
        assert actual[f"weight {name}"].equal(start[name].double())


@pytest.mark.parametrize("case", rank_jobs.PADDED)
def test_shared_prompts_under_checkpointing_train_as_padded_rows(ours, case):
    """The gradient of test_gradient.py's reference: a padded row per sibling, a mask, float64,
    plain autograd, one process.
    """
    settings = rank_jobs.CASES[case]
    cfg = rank_jobs.settings(settings)
    assert cfg.sampling.temperature == TEMPERATURE
    assert cfg.loss.clip_ratio_low == CLIP
    assert cfg.loss.kl_coef == KL
    rollouts, rewards = rank_jobs.rollouts_and_rewards(0, group=settings.group)
    advantages = rank_jobs.advantages(rewards, cfg, settings.group, torch.float64)
    policy = rank_jobs.tiny_model(1, **settings.shape).double()
    reference = rank_jobs.tiny_model(2, **settings.shape).double()
    num_tokens = sum(len(rollout.ids) for rollout in rollouts)

    loss, want = reference_gradients(policy, reference, rollouts, advantages, num_tokens)

    worst = worst_gradient(ours[case], want)
    print(f"{case}: largest ||a-b||/||b|| {worst:.1e}")
    limit = 1e-12 if settings.dtype == torch.float64 else 1e-5
    assert worst <= limit
    assert abs(ours[case]["loss"] - loss) <= limit
    prompt_lengths = {len(rollout.prompt.ids) for rollout in rollouts}
    lengths = {len(rollout.ids) for rollout in rollouts}
    assert len(prompt_lengths) > 1
    assert len(lengths) > 2


@pytest.mark.parametrize("case", rank_jobs.AGAINST_FSDP2)
def test_gradient_and_loss_are_those_of_torchs_fully_shard(ours, case):
    """bfloat16: gathered weights and gradients of a rank, summed over ranks in float32 by both:
    equal but for the order of that sum.
    """
    if "fsdp2" not in ours:
        pytest.skip("one process: nothing is sharded")
    actual = ours[case]
    want = ours["fsdp2"][case]

    names = {name for name in actual if not name.startswith(("weight", "norm"))}
    assert want.keys() == names
    errors = []
    for name in names - {"loss"}:
        errors.append(relative_error(actual[name], want[name]))
    worst = find_largest(errors)
    assert errors
    print(f"{case}: against fully_shard at most {worst:.1e}")
    limit = 1e-12 if case.startswith("float64") else 1e-6
    assert worst <= limit
    assert (actual["loss"] - want["loss"]).abs() <= limit


@pytest.mark.parametrize("case", rank_jobs.LESSONS)
def test_sft_learns_the_mean_cross_entropy_of_all_ranks_targets(ours, case):
    """Against padded rows in float64, torch's cross_entropy and plain autograd."""
    model = rank_jobs.tiny_model(1, tie_word_embeddings=True).double()
    texts = rank_jobs.lesson_texts()
    mask_prompt = rank_jobs.LESSONS[case][0]

    want_loss, want = padded_cross_entropy(model, texts, mask_prompt)

    actual = ours["lessons"][case]
    names = {f"grad {name}" for name in want}
    assert actual.keys() == names | {"loss"}
    worst = worst_gradient(actual, want)
    print(f"{case}: largest ||a-b||/||b|| of a gradient {worst:.1e}")
    assert worst <= 1e-12
    assert abs(actual["loss"] - want_loss) <= 1e-12


def test_at_most_two_blocks_and_the_root_are_gathered(ours):
    for case, (most, bound) in ours.get("gathered_bytes", {}).items():
        assert 0 < most <= bound, case


def test_a_leak_of_gathered_weights_is_seen(ours):
    """The measurement above waits for what is about to be freed: it must still see what is not."""
    if "leak" not in ours:
        pytest.skip("one process: nothing is gathered")
    assert ours["leak"] == "gathered weights outlive the backward"


def test_the_budget_does_not_matter_either():
    actual = compute_plain("float64 small batches")
    for name, want in compute_plain("float64").items():
        limit = 1e-9 if name.startswith("weight") else 1e-12
        assert relative_error(actual[name], want) <= limit, name


def test_shares_are_the_whole_and_one_failure_is_everybodys(ours):
    items = sum(ours["shares"], [])
    sizes = [len(share) for share in ours["shares"]]

    assert items == list(range(7))
    assert max(sizes) - min(sizes) <= 1
    assert set(ours["told"]) == {"only here"}


def test_gdpo_normalizes_over_all_ranks_with_empty_ones_among_them(ours):
    want = rank_jobs.batch_normalized()

    joined = sum(ours["batch"], [])

    assert joined == pytest.approx(want, rel=1e-12)
    std = torch.tensor(joined, dtype=torch.float64).std().item()
    assert std == pytest.approx(1, abs=1e-5)


# --- runs from end to end -------------------------------------------------------------------------


NOT_COMPARED = {"timing_s", "memory", "rollout_tokens_per_s", "reward_wait_frac"}
ROUNDED = ("logp", "entropy", "advantage")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_yaml(tmp_path_factory.mktemp("world"), **{"loss.kl_coef": 0.01, "run.threads": 0})


# its advantages need the other ranks' rewards
GDPO = ("loss.kind=gdpo", "reward.weights={ndcg: 1.0, mrr: 0.5}")


@pytest.mark.parametrize("n, prompts, loss", [(2, 5, ()), (3, 2, GDPO)])
def test_a_run_on_several_ranks_is_the_run_on_one(n, prompts, loss, world, tmp_path):
    """Prompts that do not divide, even fewer than ranks; the same rollouts, rewards, evaluation
    and, to rounding, the same policy.
    """
    one = tmp_path / "one"
    many = tmp_path / "many"
    argv = [world, f"train.prompts_per_step={prompts}", "train.steps=2", *loss]

    code = run_guarded(train.main, [*argv, f"run.dir={one}"])
    torchrun(n, "-m", "recr1.train", *argv, f"run.dir={many}")

    assert code == 0
    names = {path.name for path in one.iterdir()}
    assert {path.name for path in many.iterdir()} == names
    assert jsonl(one / "eval_before.jsonl") == jsonl(many / "eval_before.jsonl")
    compare_rollouts(one, many)
    compare_metrics(one, many)
    compare_policies(one, many)
    summary = json.loads((many / "summary.json").read_text())
    assert summary["world_size"] == n
    assert summary["n_eval"] == 12


def compare_rollouts(one: Path, many: Path) -> None:
    rows = jsonl(one / "rollouts.jsonl.gz")
    other_rows = jsonl(many / "rollouts.jsonl.gz")
    for row, other in zip(rows, other_rows, strict=True):
        for key, value in row.items():
            want = other[key]
            if key.endswith(ROUNDED):
                want = pytest.approx(want, abs=2e-3)
            assert value == want, key


def compare_metrics(one: Path, many: Path) -> None:
    rows = jsonl(one / "metrics.jsonl")
    other_rows = jsonl(many / "metrics.jsonl")
    for row, other in zip(rows, other_rows, strict=True):
        assert row.keys() == other.keys()
        exact = "val_ndcg" if "val_ndcg" in row else "reward"
        assert row[exact] == other[exact]
        for key in row.keys() - NOT_COMPARED:
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


def compare_policies(one: Path, many: Path) -> None:
    want = load_model(str(one / "model")).state_dict()
    actual = load_model(str(many / "model")).state_dict()
    assert actual.keys() == want.keys()
    for name, weight in want.items():
        assert relative_error(actual[name], weight) < 1e-3, name


def test_bad_input_is_one_line_on_any_number_of_ranks(world, tmp_path):
    folder = tmp_path / "run"
    argv = [world, "data.corpus=nowhere.jsonl", f"run.dir={folder}"]

    process = torchrun(2, "-m", "recr1.train", *argv, expect=1)

    message = "nowhere.jsonl: no such file; check the path, or prepare the data set first"
    lines = process.stderr.splitlines()
    [line] = [line for line in lines if line.startswith("recr1:")]
    assert line == f"recr1: {message}"
    assert "Traceback" not in process.stderr.split("recr1:")[0]
    assert not folder.exists()
