"""Losses in whole runs: mini-batches, dynamic sampling, KL in the reward, a user's own functions,
replay; and what each recipe does to one batch.
"""

import copy
import gzip
import json
import math
import re
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_world import jsonl, refused, runs_of, tiny_model, write_yaml
from test_gradient import rollouts_of

from recr1 import cli, train
from recr1.config.loader import ADVANTAGE_KINDS
from recr1.config.schema import LossConfig, ModelConfig
from recr1.data.prompt_order import choose_prompts, count_steps_per_epoch
from recr1.data_types import Prompt, Reward, Rollout
from recr1.rl.advantages import ADVANTAGES, compute_group_advantages
from recr1.rl.kl import k1
from recr1.rl.losses import RECIPES, resolve_objective
from recr1.rl.packing import deduplicate, pack_rollouts
from recr1.rl.policy_loss import compute_policy_loss, compute_token_loss, count_denominator
from recr1.rl.replay import Replay
from recr1.tasks.rewards import compute_overlong_penalty
from recr1.tracking.step_metrics import StepRecord, make_rollout_rows
from recr1.train import add_advantages, add_old_logp
from recr1.training.launch import run_guarded

README = Path(__file__).resolve().parents[3] / "README.md"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    overrides = {"log.tokens_every": 1, "train.eval_every": 0, "train.steps": 2}
    return write_yaml(folder, **overrides)


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    return runs_of(train.main, world, tmp_path_factory)


def read_metrics(folder: Path) -> list[dict]:
    return jsonl(folder / "metrics.jsonl")


def read_rollouts(folder: Path) -> list[dict]:
    return jsonl(folder / "rollouts.jsonl.gz")


def select_step(rows: list[dict], step: int) -> list[dict]:
    return [row for row in rows if row["step"] == step]


def list_column(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]


# --- the recipes on one batch ---------------------------------------------------------------------


def add_logp_tables(batch):
    """Put the batch into float64, with old and reference log-probs that differ from the sampler's
    by known amounts.
    """
    # of the token, not of its place in the batch
    key = (batch.target * 7 + batch.rollout) % 5
    difference = 0.1 * key.double()
    return replace(
        batch,
        weight=batch.weight.double(),
        sampler_logp=-3 - difference,
        old_logp=-3.05 - difference,
        ref_logp=torch.full_like(difference, -3),
    )


def compute_gradients(policy, batches, total, objective):
    """Compute the gradients of a policy's parameters over micro-batches, by name."""
    policy.zero_grad(set_to_none=True)
    for batch in batches:
        loss, *_ = compute_policy_loss(policy, batch, total, 1.3, objective)
        loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


def test_the_config_checks_every_recipe_that_is_an_advantage():
    named_alike = {kind for kind, (_, advantage, _) in RECIPES.items() if kind == advantage}
    assert set(ADVANTAGE_KINDS) == named_alike


@pytest.mark.parametrize("kind", RECIPES)
def test_every_recipe_trains_and_gives_one_gradient_for_any_micro_batches(kind):
    """From the same rollouts, whole or cut: sequence ratios and averages survive the cutting, for a
    rollout is never split.
    """
    loss_config = LossConfig(kind=kind, kl_coef=0.1, entropy_coef=0.05)
    objective = resolve_objective(loss_config, ModelConfig(head="recompute"))
    policy = tiny_model(1).double()
    rollouts = rollouts_of(3)
    texts, first = deduplicate(rollouts)
    rewards = torch.arange(len(rollouts), dtype=torch.float64) % 4
    adv = compute_group_advantages(rewards, 3, objective.advantage, objective.config)
    total = count_denominator(texts, objective.agg_mode, 9)
    assert total == count_denominator(rollouts, objective.agg_mode, 9)

    gradients = []
    for budget in (20, 10_000):
        packed = [add_logp_tables(batch) for batch in pack_rollouts(texts, budget)]
        batches = add_advantages(packed, adv[first])
        gradients.append(compute_gradients(policy, batches, total, objective))

    cut, uncut = gradients
    for name, gradient in cut.items():
        difference = gradient - uncut[name]
        assert gradient.norm() > 0, name
        assert difference.norm() <= 1e-12 * gradient.norm(), name


def test_advantages_by_hand():
    """Rewards 0, 0, 0, 4: mean 1, unbiased std 2; the mean of the others is 4/3, 4/3, 4/3, 0."""
    rewards = torch.tensor([0.0, 0, 0, 4, 5, 5, 5, 5])
    want = {
        "mean_std": [-0.5, -0.5, -0.5, 1.5],
        "mean": [-1, -1, -1, 3],
        "leave_one_out": [-4 / 3, -4 / 3, -4 / 3, 4],
        "maxrl": [-1, -1, -1, 3],
        "pass_at_k": [0, 0, 0, 4],
        # the group's -0.5 -0.5 -0.5 1.5, divided by the std of all eight: (3 / 7) ** 0.5
        "gdpo": [-0.5 * (7 / 3) ** 0.5] * 3 + [1.5 * (7 / 3) ** 0.5],
    }
    equal_group = [0.0] * 4

    for name, normalize in ADVANTAGES.items():
        config = LossConfig(advantage_eps=0.0)
        adv = compute_group_advantages(rewards, 4, normalize, config)
        wanted = want[name] + equal_group
        assert adv.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(
    "length, want", [(10, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (101, -1.05)]
)
def test_overlong_by_hand(length, want):
    assert compute_overlong_penalty(length, 100, 20) == pytest.approx(want)
    assert compute_overlong_penalty(length, 100, 0) == 0.0


def test_overlong_answers_lose_reward_and_it_is_logged_apart(run):
    folder = run("train.steps=1", "reward.overlong_buffer=10", "sampling.max_new_tokens=12")

    penalties = set()
    for row in read_rollouts(folder):
        terms = row["reward_terms"]
        penalty = compute_overlong_penalty(len(row["ids"]), 12, 10)
        score = -1.0 if row["error"] else terms["ndcg"]
        assert terms["overlong"] == pytest.approx(penalty)
        assert row["reward"] == pytest.approx(score + penalty)
        penalties.add(terms["overlong"])
    assert len(penalties) > 1


# --- mini-batches and dynamic sampling ------------------------------------------------------------


def move_policy(policy) -> None:
    """Move each parameter by noise that its size determines."""
    with torch.no_grad():
        for parameter in policy.parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def check_one_step_per_batch_keeps_the_ratio(folder: Path) -> None:
    for row in read_metrics(folder):
        assert row["ratio_abs_deviation"] == 0
        assert row["clip_ratio"] == 0


def test_mini_batches_move_the_ratio_and_the_clip_bites(run, world):
    """The first of the four finds ratio 1, the others do not; a clipped token has gradient exactly
    0, any other -A ratio / total.
    """
    folder = run(
        "train.num_mini_batches=4",
        "train.prompts_per_step=4",
        "optimizer.lr=0.01",
        "loss.clip_ratio_low=0.05",
    )
    rows = read_metrics(folder)
    assert min(list_column(rows, "ratio_abs_deviation")) > 1e-3
    assert max(list_column(rows, "clip_ratio")) > 0
    check_one_step_per_batch_keeps_the_ratio(run("train.prompts_per_step=4"))

    policy = tiny_model(1).double()
    moved = copy.deepcopy(policy)
    move_policy(moved)
    loss_config = LossConfig(clip_ratio_low=0.1, clip_ratio_high=0.2)
    objective = resolve_objective(loss_config, ModelConfig())
    packed = pack_rollouts(rollouts_of(3), 10_000)
    packed = add_old_logp(policy, packed, 1.0)
    advantages = torch.linspace(-1, 1, 15, dtype=torch.float64)
    [batch] = add_advantages(packed, advantages)

    _, logp, stats = compute_policy_loss(moved, batch, 7, 1.0, objective)
    entropy = torch.zeros_like(logp)
    _, d_logp, *_ = compute_token_loss(logp, entropy, batch, batch.weight, 7, objective)

    adv = batch.advantages
    ratio = (logp - batch.old_logp).exp()
    clipped_above = (adv > 0) & (ratio > 1.2)
    clipped_below = (adv < 0) & (ratio < 0.9)
    clipped = clipped_above | clipped_below
    assert clipped.any()
    assert (~clipped).any()
    assert (d_logp[clipped] == 0).all()
    assert stats["clip_ratio"] == clipped.sum()
    want = -adv * ratio / 7
    torch.testing.assert_close(d_logp[~clipped], want[~clipped], rtol=1e-12, atol=0)


def test_mini_batches_must_divide_the_prompts(world, tmp_path, capsys):
    argv = [world, "train.num_mini_batches=3", f"run.dir={tmp_path / 'run'}"]

    assert "train.num_mini_batches" in refused(argv, capsys)


def test_dynamic_sampling_draws_other_prompts_for_groups_without_variance(run):
    overrides = ("reward.k_train=1", "sampling.group_size=2")
    plain_run = run(*overrides)
    dynamic_run = run(*overrides, "sampling.dynamic_sampling=4")
    plain = read_metrics(plain_run)
    dynamic = read_metrics(dynamic_run)

    plain_equal = sum(list_column(plain, "frac_reward_zero_std"))
    dynamic_equal = sum(list_column(dynamic, "frac_reward_zero_std"))
    for row in plain:
        assert row["resampled_groups"] == 0
    assert plain_equal > 0
    assert sum(list_column(dynamic, "resampled_groups")) > 0
    assert dynamic_equal < plain_equal


def test_further_turns_of_a_step_are_other_prompts():
    count = 50
    per_step = 7
    turns = 4
    assert count_steps_per_epoch(count, per_step) >= turns

    for step in range(9):
        drawn = []
        for turn in range(turns):
            drawn += choose_prompts(count, per_step, 3, step, turn, turns).tolist()
        without_turns = choose_prompts(count, per_step, 3, step).tolist()
        assert drawn[:per_step] == without_turns
        assert len(set(drawn)) == turns * per_step


# --- KL in the reward, and a user's own functions -------------------------------------------------


def repeat_by_count(group: list[dict], values: list[float]) -> list[float]:
    """Repeat the value of each distinct text for the siblings that wrote it."""
    repeated = []
    for row, value in zip(group, values, strict=True):
        repeated += [value] * row["count"]
    return repeated


def compute_k1_penalty(row: dict) -> float:
    sampler_logp = torch.tensor(row["sampler_logp"])
    ref_logp = torch.tensor(row["ref_logp"])
    kl = k1(sampler_logp, ref_logp).sum()
    return 0.5 * kl.item()


def check_advantages_of_penalized_rewards(group: list[dict], penalties: list[float]) -> None:
    rewards = np.array(list_column(group, "reward"))
    totals = repeat_by_count(group, rewards - penalties)
    totals = torch.tensor(totals)
    want = (totals - totals.mean()) / (totals.std() + 0.1)
    advantages = list_column(group, "advantage")
    logged = repeat_by_count(group, advantages)
    assert logged == pytest.approx(want.tolist(), abs=1e-4)


def test_kl_in_the_reward_is_taken_off_before_the_advantage(run):
    """Recomputed from the log: A of (reward - kl * sum of the sampler's log-prob over the
    reference's).
    """
    folder = run(
        "loss.kl_coef=0.5", "loss.kl_in=reward", "loss.kl_estimator=k1", "optimizer.lr=0.01"
    )
    rows = select_step(read_rollouts(folder), 2)

    groups = defaultdict(list)
    tokens = 0
    divergence = 0.0
    for row in rows:
        groups[row["prompt"]].append(row)
        difference = sum(row["sampler_logp"]) - sum(row["ref_logp"])
        tokens += row["count"] * len(row["ids"])
        divergence += row["count"] * difference
    largest_penalty = 0.0
    for group in groups.values():
        penalties = [compute_k1_penalty(row) for row in group]
        check_advantages_of_penalized_rewards(group, penalties)
        largest_penalty = max(largest_penalty, max(penalties), -min(penalties))

    assert largest_penalty > 1e-3
    metrics = read_metrics(folder)[1]
    assert metrics["kl"] == pytest.approx(divergence / tokens, rel=1e-3)


WHOLE_SEQUENCE_LOSS = """

def whole(logp, old, batch, c):
    return (logp - old).exp() * batch.advantages
"""
REFUSED_LOSSES = [
    ("loss.kind='my_loss:whole'", "model.head=recompute"),
    ("loss.kind='my_loss:nothing'", "nothing"),
    ("loss.kind='absent:gain'", "absent"),
    ("loss.kind=grop", "grpo, dr_grpo"),
    ("loss.advantage=median", "mean_std"),
    ("loss.kind=gspo", "model.head=recompute"),
    ("model.kernels=triton", "kernels: triton"),
]


def check_rank_advantages(group: list[tuple[float, float]]) -> None:
    """Check that a rollout's advantage is its rank by reward, from -1.5 to 1.5, ties shared."""
    rewards = [reward for reward, _ in group]
    assert len(group) == 4
    for reward, advantage in group:
        lower = sum(other < reward for other in rewards)
        ties = rewards.count(reward) - 1
        assert advantage == lower + ties / 2 - 1.5


def test_a_users_loss_and_advantage_are_named_in_the_config(
    run, world, tmp_path, capsys, monkeypatch
):
    """README, "Change the loss": its file as it stands there."""
    pattern = r"```python\n(# my_loss.py.*?)```"
    [text] = re.findall(pattern, README.read_text(), re.DOTALL)
    (tmp_path / "my_loss.py").write_text(text + WHOLE_SEQUENCE_LOSS)
    monkeypatch.syspath_prepend(tmp_path)

    folder = run("loss.kind='my_loss:soft'", "loss.advantage='my_loss:ranks'")
    groups = defaultdict(list)
    advantages = set()
    for row in read_rollouts(folder):
        siblings = [(row["reward"], row["advantage"])] * row["count"]
        groups[row["step"], row["prompt"]] += siblings
        advantages.add(row["advantage"])
    assert any(advantages)
    for group in groups.values():
        check_rank_advantages(group)

    assert run("loss.kind='my_loss:whole'", "model.head=recompute").exists()
    for override, message in REFUSED_LOSSES:
        argv = [world, override, f"run.dir={tmp_path / 'run'}"]
        assert message in refused(argv, capsys), override
    sys.modules.pop("my_loss")


# --- replay ---------------------------------------------------------------------------------------

REPLAYED = (
    "reward",
    "frac_reward_zero_std",
    "advantage_std",
    "unique_completion_frac",
    "completion_length",
)


def test_replay_takes_the_same_step_without_a_sampler(run, world, tmp_path, capsys, monkeypatch):
    logged_run = run("train.steps=1")
    monkeypatch.setattr(train, "generate", lambda *_: pytest.fail("a replay samples nothing"))
    replay = f"train.replay={logged_run}/rollouts.jsonl.gz"
    replayed_run = run("train.steps=3", "optimizer.lr=0.01", replay)
    [logged] = read_metrics(logged_run)
    replayed, *later = read_metrics(replayed_run)

    # the file's step again, off-policy
    assert replayed["ratio_abs_deviation"] < 1e-5
    for row in later:
        assert row["ratio_abs_deviation"] > 1e-3
        assert row["reward"] == replayed["reward"]
    assert replayed["rollout_tokens_per_s"] is None
    assert replayed["grad_norm"] == pytest.approx(logged["grad_norm"], rel=1e-5)
    for name in REPLAYED:
        assert replayed[name] == pytest.approx(logged[name]), name

    run_dir = f"run.dir={tmp_path / 'run'}"
    for name in ("nowhere.gz", world):
        assert name in refused([world, f"train.replay={name}", run_dir], capsys)
    other_group_size = [world, replay, "sampling.group_size=3", run_dir]
    assert "sampling.group_size" in refused(other_group_size, capsys)


def make_step(folder: Path) -> tuple[list[Rollout], list[Reward]]:
    """Make two groups of four, in which pairs write the same text, and log them as step 5."""
    rollouts = []
    for group in range(2):
        prompt = Prompt(f"q{group}", group, "", (1, 2, group))
        for sibling in range(4):
            ids = (3, 4 + sibling // 2)
            rollouts.append(Rollout(prompt, group, sibling, ids, (-0.5, -1.0), True))
    rewards = []
    for rollout in rollouts:
        total = float(rollout.ids[1])
        rewards.append(Reward(total, {"ndcg": 0.5}, None, None, "t"))
    texts, first = deduplicate(rollouts)
    token_values = [{} for _ in texts]
    record = StepRecord(rollouts, rewards, [0.0] * 8, texts, first, 2, token_values)
    lines = [json.dumps(row) + "\n" for row in make_rollout_rows(5, record)]
    text = "".join(lines)
    compressed = gzip.compress(text.encode())
    (folder / "r.jsonl.gz").write_bytes(compressed)
    return rollouts, rewards


def test_a_replayed_step_is_what_was_logged(tmp_path):
    rollouts, rewards = make_step(tmp_path)

    replay = Replay(str(tmp_path / "r.jsonl.gz"))
    replayed_rollouts, replayed_rewards, drawn = replay.step(1)

    for rollout, replayed in zip(rollouts, replayed_rollouts, strict=True):
        assert replayed.group == rollout.group
        assert replayed.sibling == rollout.sibling
        assert replayed.ids == rollout.ids
        assert replayed.sampler_logp == rollout.sampler_logp
        assert replayed.prompt.ids == rollout.prompt.ids
    totals = [reward.total for reward in rewards]
    assert [reward.total for reward in replayed_rewards] == totals
    assert drawn == 2


# --- what is logged, and `recr1 losses` -----------------------------------------------------------


def test_dlogp_norm_is_the_norm_of_the_derivative(run):
    """GRPO, one step per batch, no KL: d loss / d logp = -weight A / total at each token that is
    trained.
    """
    folder = run("train.steps=1")
    [metrics] = read_metrics(folder)
    rows = read_rollouts(folder)

    total = 0
    square = 0.0
    for row in rows:
        tokens = len(row["ids"])
        total += row["count"] * tokens
        square += tokens * (row["count"] * row["advantage"]) ** 2
    want = math.sqrt(square) / total
    assert metrics["grad_logp_norm"] == pytest.approx(want, rel=1e-5)
    assert metrics["importance_sampling_ratio"] == pytest.approx(1, abs=1e-4)
    assert np.isfinite(metrics["ratio_abs_deviation"])


def test_the_log_prob_gap_of_mini_batches_is_that_of_the_policy_that_sampled(run):
    folder = run("train.num_mini_batches=4", "train.prompts_per_step=4", "optimizer.lr=0.01")

    first_step = read_metrics(folder)[0]
    assert first_step["sampling_logp_diff_max"] < 1e-4


def compare_losses(folder: Path, capsys, *options: str) -> tuple[dict, str]:
    """Run `recr1 losses` on step 2 of a run: what its JSON says, and all that it prints."""
    argv = ["losses", "--run", str(folder), "--step", "2", *options, "--json"]
    assert run_guarded(cli.main, argv) == 0
    out = capsys.readouterr().out
    *_, last_line = out.splitlines()
    return json.loads(last_line), out


def check_cosines(cosine: dict) -> None:
    """Check the gradients' cosines: symmetric, 1 with itself, and who points where."""
    for name, row in cosine.items():
        column = {other: cosine[other][name] for other in row}
        assert row[name] == pytest.approx(1, abs=1e-5)
        assert row == pytest.approx(column, abs=1e-5)
    assert cosine["grpo"]["dapo"] == pytest.approx(1, abs=1e-5)
    assert cosine["grpo"]["dr_grpo"] < 0.9999
    assert cosine["rloo"]["reinforce"] == pytest.approx(1, abs=1e-5)


def test_one_batch_under_every_loss(run, capsys):
    """GRPO's weights are the logged advantages; Dr. GRPO points where GRPO does not; a later model
    moves the ratio, and its gradients are compared too.
    """
    folder = run(
        "train.steps=2",
        "optimizer.lr=0.003",
        "loss.clip_ratio_low=0.05",
        "reward.unparsable=0",
        "loss.pass_k=2",
    )
    rows = select_step(read_rollouts(folder), 2)
    advantages = list_column(rows, "advantage")
    [logged] = select_step(read_metrics(folder), 2)

    result, out = compare_losses(folder, capsys)

    losses = result["losses"]
    assert "every ratio is 1" in out
    assert losses.keys() == RECIPES.keys()
    for row in losses.values():
        assert row["clip_ratio"] == 0
    grpo = losses["grpo"]
    highest = max(advantages)
    lowest = min(advantages)
    assert grpo["weight_max"] == pytest.approx(highest, rel=1e-4)
    assert grpo["weight_min"] == pytest.approx(lowest, rel=1e-4)
    assert grpo["grad_logp_norm"] == pytest.approx(logged["grad_logp_norm"], rel=1e-4)
    assert result["tokens"] == sum(len(row["ids"]) for row in rows)
    check_cosines(result["cosine"])

    later, _ = compare_losses(folder, capsys, "--new", str(folder / "model"))

    assert later["losses"]["grpo"]["clip_ratio"] > 0
    assert later["losses"]["cispo"]["clip_ratio"] == 0
    for kind, row in later["losses"].items():
        assert row["grad_norm"] > 0, kind
    assert later["parameter_cosine"]["grpo"]["gspo"] < 0.9999

    absent_step = ["losses", "--run", str(folder), "--step", "9"]
    assert run_guarded(cli.main, absent_step) == 2
    assert "step 9" in capsys.readouterr().err
