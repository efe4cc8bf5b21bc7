"""Losses in whole runs: mini-batches, dynamic sampling, KL in the reward, a user's own functions,
replay; and what each recipe does to one batch.
"""

import gzip
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_world import jsonl, refused, runs_of, tiny_model, write_yaml
from test_gradient import rollouts_of

from recr1 import cli, train
from recr1.config.schema import LossConfig, ModelConfig
from recr1.data.prompt_order import choose_prompts, count_steps_per_epoch
from recr1.data_types import Prompt, Rollout
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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_yaml(
        tmp_path_factory.mktemp("world"),
        **{"log.tokens_every": 1, "train.eval_every": 0, "train.steps": 2},
    )


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    return runs_of(train.main, world, tmp_path_factory)


@pytest.mark.parametrize("kind", RECIPES)
def test_every_recipe_trains_and_gives_one_gradient_for_any_micro_batches(kind):
    """From the same rollouts, whole or cut: sequence ratios and averages survive the cutting, for a
    rollout is never split.
    """
    o = resolve_objective(
        LossConfig(kind=kind, kl_coef=0.1, entropy_coef=0.05), ModelConfig(head="recompute")
    )
    policy = tiny_model(1).double()
    rollouts = rollouts_of(3)
    texts, first = deduplicate(rollouts)
    adv = compute_group_advantages(
        torch.arange(len(rollouts), dtype=torch.float64) % 4, 3, o.advantage, o.config
    )[first]
    total = count_denominator(texts, o.agg_mode, 9)
    found = []
    assert total == count_denominator(rollouts, o.agg_mode, 9)
    for budget in (20, 10_000):
        for p in policy.parameters():
            p.grad = None
        batches = add_advantages([torch_replace(b) for b in pack_rollouts(texts, budget)], adv)
        for b in batches:
            compute_policy_loss(policy, b, total, 1.3, o)[0].backward()
        found.append({name: p.grad.clone() for name, p in policy.named_parameters()})
    for name, a in found[0].items():
        assert a.norm() > 0 and (a - found[1][name]).norm() <= 1e-12 * a.norm(), name


def torch_replace(batch):
    """The batch in float64, with old and reference log-probs that differ from the sampler's by
    known amounts.
    """
    from dataclasses import replace

    n = torch.arange(len(batch.target), dtype=torch.float64)
    key = (batch.target * 7 + batch.rollout) % 5  # of the token, not of its place in the batch
    return replace(
        batch,
        weight=batch.weight.double(),
        sampler_logp=-3 - 0.1 * key.double(),
        old_logp=-3.05 - 0.1 * key.double(),
        ref_logp=-3 + 0 * n,
    )


def test_advantages_by_hand():
    """Rewards 0, 0, 0, 4: mean 1, unbiased std 2; the mean of the others is 4/3, 4/3, 4/3, 0."""
    r = torch.tensor([0.0, 0, 0, 4, 5, 5, 5, 5])
    want = dict(
        mean_std=[-0.5, -0.5, -0.5, 1.5],
        mean=[-1, -1, -1, 3],
        leave_one_out=[-4 / 3, -4 / 3, -4 / 3, 4],
    )
    for name, f in ADVANTAGES.items():
        assert compute_group_advantages(
            r, 4, f, LossConfig(advantage_eps=0.0)
        ).tolist() == pytest.approx(want[name] + [0.0] * 4)


@pytest.mark.parametrize(
    "length, want", [(10, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (101, -1.05)]
)
def test_overlong_by_hand(length, want):
    assert compute_overlong_penalty(length, 100, 20) == pytest.approx(want)
    assert compute_overlong_penalty(length, 100, 0) == 0.0


def test_overlong_answers_lose_reward_and_it_is_logged_apart(run):
    rows = jsonl(
        run("train.steps=1", "reward.overlong_buffer=10", "sampling.max_new_tokens=12")
        / "rollouts.jsonl.gz"
    )
    for row in rows:
        late = compute_overlong_penalty(len(row["ids"]), 12, 10)
        assert row["reward_terms"]["overlong"] == pytest.approx(late)
        assert row["reward"] == pytest.approx(
            (-1.0 if row["error"] else row["reward_terms"]["ndcg"]) + late
        )
    assert len({row["reward_terms"]["overlong"] for row in rows}) > 1


def test_mini_batches_move_the_ratio_and_the_clip_bites(run, world):
    """The first of the four finds ratio 1, the others do not; a clipped token has gradient exactly
    0, any other -A ratio / total.
    """
    rows = jsonl(
        run(
            "train.num_mini_batches=4",
            "train.prompts_per_step=4",
            "optimizer.lr=0.01",
            "loss.clip_ratio_low=0.05",
        )
        / "metrics.jsonl"
    )
    assert all(row["ratio_abs_deviation"] > 1e-3 for row in rows)
    assert any(row["clip_ratio"] > 0 for row in rows)
    assert all(
        row["ratio_abs_deviation"] == 0 and row["clip_ratio"] == 0
        for row in jsonl(run("train.prompts_per_step=4") / "metrics.jsonl")
    )

    policy = tiny_model(1).double()
    moved = tiny_model(1).double()
    o = resolve_objective(LossConfig(clip_ratio_low=0.1, clip_ratio_high=0.2), ModelConfig())
    with torch.no_grad():
        for p in moved.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    [batch] = add_advantages(
        add_old_logp(policy, pack_rollouts(rollouts_of(3), 10_000), 1.0),
        torch.linspace(-1, 1, 15, dtype=torch.float64),
    )
    _, logp, stats = compute_policy_loss(moved, batch, 7, 1.0, o)
    ratio = (logp - batch.old_logp).exp()
    adv = batch.advantages
    d = compute_token_loss(logp, torch.zeros_like(logp), batch, batch.weight, 7, o)[1]
    cut = ((adv > 0) & (ratio > 1.2)) | ((adv < 0) & (ratio < 0.9))
    assert cut.any()
    assert (~cut).any()
    assert (d[cut] == 0).all()
    assert stats["clip_ratio"] == cut.sum()
    torch.testing.assert_close(d[~cut], (-adv * ratio / 7)[~cut], rtol=1e-12, atol=0)


def test_mini_batches_must_divide_the_prompts(world, tmp_path, capsys):
    assert "train.num_mini_batches" in refused(
        [world, "train.num_mini_batches=3", f"run.dir={tmp_path / 'run'}"], capsys
    )


def test_dynamic_sampling_draws_other_prompts_for_groups_without_variance(run):
    plain, more = (
        jsonl(run("reward.k_train=1", "sampling.group_size=2", *extra) / "metrics.jsonl")
        for extra in ((), ("sampling.dynamic_sampling=4",))
    )
    assert all(row["resampled_groups"] == 0 for row in plain)
    assert sum(row["frac_reward_zero_std"] for row in plain) > 0
    assert sum(row["resampled_groups"] for row in more) > 0
    assert sum(row["frac_reward_zero_std"] for row in more) < sum(
        row["frac_reward_zero_std"] for row in plain
    )


def test_further_turns_of_a_step_are_other_prompts():
    n = 50
    per_step = 7
    turns = 4
    assert count_steps_per_epoch(n, per_step) >= turns
    for step in range(9):
        drawn = [
            choose_prompts(n, per_step, 3, step, turn, turns).tolist() for turn in range(turns)
        ]
        assert drawn[0] == choose_prompts(n, per_step, 3, step).tolist()
        assert len({i for d in drawn for i in d}) == turns * per_step


def test_kl_in_the_reward_is_taken_off_before_the_advantage(run):
    """Recomputed from the log: A of (reward - kl * sum of the sampler's log-prob over the
    reference's).
    """
    folder = run(
        "loss.kl_coef=0.5", "loss.kl_in=reward", "loss.kl_estimator=k1", "optimizer.lr=0.01"
    )
    groups = {}
    tokens = 0
    divergence = 0.0
    for row in jsonl(folder / "rollouts.jsonl.gz"):
        if row["step"] == 2:
            tokens = tokens + row["count"] * len(row["ids"])
            divergence = divergence + row["count"] * (
                sum(row["sampler_logp"]) - sum(row["ref_logp"])
            )
            groups.setdefault(row["prompt"], []).append(row)
    seen = 0.0
    for group in groups.values():
        penalties = [
            0.5
            * k1(*(torch.tensor(row[name]) for name in ("sampler_logp", "ref_logp"))).sum().item()
            for row in group
        ]
        totals = torch.tensor(
            [row["reward"] - p for row, p in zip(group, penalties) for _ in range(row["count"])]
        )
        want = (totals - totals.mean()) / (totals.std() + 0.1)
        assert [row["advantage"] for row in group for _ in range(row["count"])] == pytest.approx(
            want.tolist(), abs=1e-4
        )
        seen = max(seen, *map(abs, penalties))
    assert seen > 1e-3
    assert jsonl(folder / "metrics.jsonl")[1]["kl"] == pytest.approx(divergence / tokens, rel=1e-3)


def test_a_users_loss_and_advantage_are_named_in_the_config(
    run, world, tmp_path, capsys, monkeypatch
):
    """README, "Change the loss": its file as it stands there."""
    [text] = re.findall(
        r"```python\n(# my_loss.py.*?)```",
        (Path(__file__).resolve().parents[3] / "README.md").read_text(),
        re.DOTALL,
    )
    (tmp_path / "my_loss.py").write_text(
        text
        + "\n\ndef whole(logp, old, batch, c):\n    return (logp - old).exp() * batch.advantages\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = run("loss.kind='my_loss:soft'", "loss.advantage='my_loss:ranks'")
    groups = {}
    for row in jsonl(folder / "rollouts.jsonl.gz"):
        siblings = groups.setdefault((row["step"], row["prompt"]), [])
        siblings += [(row["reward"], row["advantage"])] * row["count"]
    assert any(advantage for group in groups.values() for _, advantage in group)
    for group in groups.values():
        assert len(group) == 4
        rewards = [reward for reward, _ in group]
        for reward, advantage in group:
            lower = sum(other < reward for other in rewards)
            assert advantage == lower + (rewards.count(reward) - 1) / 2 - 1.5
    assert run("loss.kind='my_loss:whole'", "model.head=recompute").exists()
    for override, part in (
        ("loss.kind='my_loss:whole'", "model.head=recompute"),
        ("loss.kind='my_loss:nothing'", "nothing"),
        ("loss.kind='absent:gain'", "absent"),
        ("loss.kind=grop", "grpo, dr_grpo"),
        ("loss.advantage=median", "mean_std"),
        ("loss.kind=gspo", "model.head=recompute"),
        ("model.kernels=triton", "kernels: triton"),
    ):
        assert part in refused([world, override, f"run.dir={tmp_path / 'run'}"], capsys), override
    sys.modules.pop("my_loss")


def test_replay_takes_the_same_step_without_a_sampler(run, world, tmp_path, capsys, monkeypatch):
    first = run("train.steps=1")
    monkeypatch.setattr(train, "generate", lambda *_: pytest.fail("a replay samples nothing"))
    again = run("train.steps=3", "optimizer.lr=0.01", f"train.replay={first}/rollouts.jsonl.gz")
    (a,), (b, *later) = (jsonl(folder / "metrics.jsonl") for folder in (first, again))
    # the file's step again, off-policy
    assert b["ratio_abs_deviation"] < 1e-5
    assert all(row["ratio_abs_deviation"] > 1e-3 and row["reward"] == b["reward"] for row in later)
    assert b["rollout_tokens_per_s"] is None
    assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
    assert {
        k: b[k]
        for k in (
            "reward",
            "frac_reward_zero_std",
            "advantage_std",
            "unique_completion_frac",
            "completion_length",
        )
    } == pytest.approx(
        {
            k: a[k]
            for k in (
                "reward",
                "frac_reward_zero_std",
                "advantage_std",
                "unique_completion_frac",
                "completion_length",
            )
        }
    )
    for name in ("nowhere.gz", world):
        assert name in refused(
            [world, f"train.replay={name}", f"run.dir={tmp_path / 'run'}"], capsys
        )
    assert "sampling.group_size" in refused(
        [
            world,
            f"train.replay={first}/rollouts.jsonl.gz",
            "sampling.group_size=3",
            f"run.dir={tmp_path / 'run'}",
        ],
        capsys,
    )


def test_a_replayed_step_is_what_was_logged(tmp_path):
    rollouts = [
        Rollout(Prompt(f"q{g}", g, "", (1, 2, g)), g, s, (3, 4 + s // 2), (-0.5, -1.0), True)
        for g in range(2)
        for s in range(4)
    ]
    from recr1.data_types import Reward

    rewards = [Reward(float(r.ids[1]), {"ndcg": 0.5}, None, None, "t") for r in rollouts]
    texts, first = deduplicate(rollouts)
    rows = make_rollout_rows(
        5, StepRecord(rollouts, rewards, [0.0] * 8, texts, first, 2, [{} for _ in texts])
    )
    (tmp_path / "r.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    )
    got, given, drawn = Replay(str(tmp_path / "r.jsonl.gz")).step(1)
    assert [(r.group, r.sibling, r.ids, r.sampler_logp, r.prompt.ids) for r in got] == [
        (r.group, r.sibling, r.ids, r.sampler_logp, r.prompt.ids) for r in rollouts
    ]
    assert [r.total for r in given] == [r.total for r in rewards]
    assert drawn == 2


def test_dlogp_norm_is_the_norm_of_the_derivative(run):
    """GRPO, one step per batch, no KL: d loss / d logp = -weight A / total at each token that is
    trained.
    """
    folder = run("train.steps=1")
    [row], rows = jsonl(folder / "metrics.jsonl"), jsonl(folder / "rollouts.jsonl.gz")
    total = sum(r["count"] * len(r["ids"]) for r in rows)
    assert row["grad_logp_norm"] == pytest.approx(
        math.sqrt(sum(len(r["ids"]) * (r["count"] * r["advantage"] / total) ** 2 for r in rows)),
        rel=1e-5,
    )
    assert row["importance_sampling_ratio"] == pytest.approx(1, abs=1e-4)
    assert np.isfinite(row["ratio_abs_deviation"])


def test_the_log_prob_gap_of_mini_batches_is_that_of_the_policy_that_sampled(run):
    row = jsonl(
        run("train.num_mini_batches=4", "train.prompts_per_step=4", "optimizer.lr=0.01")
        / "metrics.jsonl"
    )[0]
    assert row["sampling_logp_diff_max"] < 1e-4


def test_one_batch_under_every_loss(run, capsys):
    """GRPO's weights are the logged advantages; Dr. GRPO points where GRPO does not; a later model
    moves the ratio, and its gradients are compared too.
    """
    folder = run("train.steps=2", "optimizer.lr=0.01", "loss.clip_ratio_low=0.05")
    assert run_guarded(cli.main, ["losses", "--run", str(folder), "--step", "2", "--json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert "every ratio is 1" in out
    assert result["losses"].keys() == RECIPES.keys()
    assert all(row["clip_ratio"] == 0 for row in result["losses"].values())
    rows = [row for row in jsonl(folder / "rollouts.jsonl.gz") if row["step"] == 2]
    assert result["losses"]["grpo"]["weight_max"] == pytest.approx(
        max(row["advantage"] for row in rows), rel=1e-4
    )
    assert result["losses"]["grpo"]["weight_min"] == pytest.approx(
        min(row["advantage"] for row in rows), rel=1e-4
    )
    [logged] = [row for row in jsonl(folder / "metrics.jsonl") if row["step"] == 2]
    assert result["losses"]["grpo"]["grad_logp_norm"] == pytest.approx(
        logged["grad_logp_norm"], rel=1e-4
    )
    assert result["tokens"] == sum(len(row["ids"]) for row in rows)
    for a, row in result["cosine"].items():
        assert row[a] == pytest.approx(1, abs=1e-5)
        assert row == pytest.approx({b: result["cosine"][b][a] for b in row}, abs=1e-5)
    assert result["cosine"]["grpo"]["dapo"] == pytest.approx(1, abs=1e-5)
    assert result["cosine"]["grpo"]["dr_grpo"] < 0.9999
    assert result["cosine"]["rloo"]["reinforce"] == pytest.approx(1, abs=1e-5)
    assert (
        run_guarded(
            cli.main,
            [
                "losses",
                "--run",
                str(folder),
                "--step",
                "2",
                "--new",
                str(folder / "model"),
                "--json",
            ],
        )
        == 0
    )
    later = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert later["losses"]["grpo"]["clip_ratio"] > 0
    assert later["losses"]["cispo"]["clip_ratio"] == 0
    assert all(row["grad_norm"] > 0 for row in later["losses"].values())
    assert later["parameter_cosine"]["grpo"]["gspo"] < 0.9999
    assert run_guarded(cli.main, ["losses", "--run", str(folder), "--step", "9"]) == 2
    assert "step 9" in capsys.readouterr().err
