"""Runs from end to end on a tiny world: what a run leaves behind, what it repeats, and how it
refuses.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.tiny_world import jsonl, refused, runs_of, tiny_tokenizer, write_yaml
from transformers import AutoModelForCausalLM

from recr1 import train
from recr1.config import loader as configs
from recr1.config.schema import LossConfig
from recr1.data_types import Prompt, Reward, Rollout
from recr1.rl.advantages import compute_group_advantages, normalize_by_std
from recr1.rl.kl import k3
from recr1.rl.packing import pack_rollouts
from recr1.tracking.step_metrics import StepRecord, collect_token_values, make_rollout_rows
from recr1.training.launch import run_guarded

FILES = {
    "config.yaml",
    "metrics.jsonl",
    "rollouts.jsonl.gz",
    "eval_before.jsonl",
    "eval_after.jsonl",
    "summary.json",
    "model",
    "checkpoints",
    "heartbeats",
    "report.html",
    "versions.json",
}
METRICS = set(
    "reward ndcg reward_std frac_reward_zero_std kl clip_ratio entropy grad_norm lr "
    "format_error_rate completion_length truncated_ratio rollout_tokens_per_s "
    "sampling_logp_diff_mean sampling_logp_diff_p999 sampling_logp_diff_max timing_s".split()
)
ROLLOUT_KEYS = set(
    "step prompt sibling count text finished reward reward_terms error advantage".split()
)
PER_TOKEN = ["ids", "sampler_logp", "trainer_logp", "ref_logp", "old_logp", "entropy"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A config with its policy, data and index; every run below names its own run.dir."""
    return write_yaml(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    return runs_of(train.main, world, tmp_path_factory)


def test_files_and_config(run, world):
    folder = run()
    assert {p.name for p in folder.iterdir()} == FILES
    assert configs.load_config(str(folder / "config.yaml"), []) == configs.load_config(
        world, [f"run.dir={folder}"]
    )


def test_metrics(run):
    rows = jsonl(run() / "metrics.jsonl")
    steps = {}
    for row in jsonl(run() / "rollouts.jsonl.gz"):
        steps.setdefault(row["step"], []).append(row)
    assert [row["step"] for row in rows] == [1, 2, 3] == sorted(steps)
    for row in rows:
        assert METRICS <= row.keys()
        texts = steps[row["step"]]
        groups = {}
        for t in texts:
            groups.setdefault(t["prompt"], []).extend([t["reward"]] * t["count"])
        rewards = np.array(list(groups.values()))
        assert rewards.shape == (4, 4)
        assert row["reward"] == pytest.approx(rewards.mean(), abs=1e-6)
        assert row["reward_std"] == pytest.approx(rewards.std(1, ddof=1).mean(), abs=1e-6)
        assert row["frac_reward_zero_std"] == (rewards.max(1) == rewards.min(1)).mean()
        assert row["format_error_rate"] == sum(t["count"] for t in texts if t["error"]) / 16
        assert row["truncated_ratio"] == sum(t["count"] for t in texts if not t["finished"]) / 16
        assert row["kl"] is None
        assert row["clip_ratio"] == 0
        assert row["grad_norm"] > 0
        assert row["lr"] == 1e-3
        assert row["rollout_tokens_per_s"] > 0
        assert (
            0
            <= row["sampling_logp_diff_mean"]
            <= row["sampling_logp_diff_p999"]
            <= row["sampling_logp_diff_max"]
            < 1e-4
        )
    assert [row["step"] for row in rows if "val_gain" in row] == [2]


def test_rollouts(run):
    rows = jsonl(run() / "rollouts.jsonl.gz")
    tokenizer = tiny_tokenizer()
    groups = {}
    for row in rows:
        assert ROLLOUT_KEYS <= row.keys()
        groups.setdefault((row["step"], row["prompt"]), []).append(row)
        # log.tokens_every is 2
        assert ("ids" in row) == ("prompt_ids" in row) == (row["step"] in (1, 2))
        assert row["reward"] == (-1.0 if row["error"] else row["reward_terms"]["ndcg"])
        if "ids" in row:
            assert row["ref_logp"] is None
            assert len({len(row[name]) for name in PER_TOKEN if row[name] is not None}) == 1
            assert row["old_logp"] == row["trainer_logp"]
            assert max(row["sampler_logp"]) <= 0
            assert min(row["entropy"]) >= 0
            assert np.abs(np.subtract(row["sampler_logp"], row["trainer_logp"])).max() < 1e-4
            assert row["finished"] == (row["ids"][-1] == tokenizer.eos_token_id)
            assert row["finished"] or len(row["ids"]) == 12
            assert row["text"] == tokenizer.decode(
                row["ids"][:-1] if row["finished"] else row["ids"]
            )
            assert tokenizer.decode(row["prompt_ids"]).startswith("<|user|>find: ")
    assert len(groups) == 12
    for group in groups.values():
        assert sum(row["count"] for row in group) == 4
        assert len({row["text"] for row in group}) == len(group)
        rewards = torch.tensor([row["reward"] for row in group for _ in range(row["count"])])
        want = compute_group_advantages(rewards, 4, normalize_by_std, LossConfig(advantage_eps=0.1))
        assert [row["advantage"] for row in group for _ in range(row["count"])] == pytest.approx(
            want.tolist(), abs=1e-5
        )
    assert any(row["advantage"] != 0 for row in rows)
    assert any(row["count"] > 1 for row in rows)


def test_logged_floats_read_back_to_the_same_float32():
    g = torch.Generator().manual_seed(0)
    values = (
        -torch.rand(3, 400, generator=g)
        * 10 ** torch.randint(-30, 3, (3, 400), generator=g).float()
    )
    rollouts = [
        Rollout(Prompt("q", 0, "", (1,)), 0, s, tuple(range(400)), tuple(values[s].tolist()), True)
        for s in range(3)
    ]
    batches = pack_rollouts(rollouts, 10_000)
    columns = [dict(trainer_logp=b.sampler_logp, ref_logp=None) for b in batches]
    rows = make_rollout_rows(
        1,
        StepRecord(
            rollouts,
            [Reward(0.0)] * 3,
            values[:, 0].tolist(),
            rollouts,
            [0, 1, 2],
            1,
            collect_token_values(3, batches, columns),
        ),
    )
    rows = json.loads(json.dumps(rows))
    for name in ("sampler_logp", "trainer_logp"):
        assert np.array_equal(
            np.array([row[name] for row in rows], dtype=np.float32), values.numpy()
        )
    assert [np.float32(row["advantage"]) for row in rows] == values[:, 0].tolist()
    assert rows[0]["ref_logp"] is None


def test_evaluations(run, world):
    folder = run()
    cfg = configs.load_config(world, [])
    before = jsonl(folder / "eval_before.jsonl")
    after = jsonl(folder / "eval_after.jsonl")
    queries = {row["id"]: row["text"] for row in jsonl(Path(cfg.data.test_queries))}
    metrics = ["ndcg", "recall", "mrr", "hit"]
    raw_metrics = [f"{name}_raw" for name in metrics]
    for rows in (before, after):
        assert {row["id"]: row["raw"] for row in rows} == queries
        assert len(rows) == 12
        for row in rows:
            assert set(row) == {"id", "raw", "rewrite", "text", "error", *metrics, *raw_metrics}
            assert (row["rewrite"] is None) == (row["error"] is not None)
            assert row["error"] is None or row["ndcg"] == 0
            assert row["error"] or row["rewrite"] in row["text"]

    raw_before = [row["ndcg_raw"] for row in before]
    assert raw_before == [row["ndcg_raw"] for row in after]
    assert 0 < sum(raw_before) < 12


def test_summary(run):
    folder = run()
    summary = json.loads((folder / "summary.json").read_text())
    expected = dict(
        task="product_search",
        retriever="bm25",
        metric="ndcg@10",
        n_eval=12,
        seed=0,
        steps=3,
        world_size=1,
        threads=1,
    )
    assert {name: summary[name] for name in expected} == expected
    assert summary["wall_s"] > 0
    assert summary["rollout_tokens_per_s"] > 0

    # the figures are those of the rows
    rows_before = jsonl(folder / "eval_before.jsonl")
    rows_after = jsonl(folder / "eval_after.jsonl")
    raw = math.fsum(row["ndcg_raw"] for row in rows_before) / 12
    before = math.fsum(row["ndcg"] for row in rows_before) / 12
    after = math.fsum(row["ndcg"] for row in rows_after) / 12
    figures = dict(
        raw=raw, before=before, after=after, gain=after - raw, after_minus_before=after - before
    )
    for name, value in figures.items():
        assert summary[name] == pytest.approx(value, abs=1e-12), name
    for name in ("gain", "after_minus_before"):
        low, high = summary[f"{name}_ci95"]
        assert low <= summary[name] <= high

    gaps = [row["sampling_logp_diff_max"] for row in jsonl(folder / "metrics.jsonl")]
    assert summary["sampling_logp_diff_max"] == max(gaps)
    assert 0 <= summary["sampling_logp_diff_mean"] <= summary["sampling_logp_diff_p999"]
    assert summary["sampling_logp_diff_p999"] <= summary["sampling_logp_diff_max"]


def weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


def test_the_model_loads_in_transformers_and_has_moved(run, world):
    from transformers import AutoTokenizer

    folder = run()
    theirs, start = (
        AutoModelForCausalLM.from_pretrained(p).state_dict()
        for p in (folder / "model", configs.load_config(world, []).model.path)
    )
    assert theirs.keys() == start.keys()
    assert all(t.isfinite().all() for t in theirs.values())
    assert all(not torch.equal(t, start[name]) for name, t in theirs.items())
    assert (
        AutoTokenizer.from_pretrained(folder / "model")("find: lamp")["input_ids"]
        == tiny_tokenizer()("find: lamp")["input_ids"]
    )


def test_the_first_gradient_recomputed_from_the_log(run, world):
    """What step 1 logged, through transformers' model in rows of one text: -sum count adv logp /
    all sampled tokens, KL at 0.
    """
    model = AutoModelForCausalLM.from_pretrained(configs.load_config(world, []).model.path)
    loss = 0.0
    total = 0
    for row in jsonl(run() / "rollouts.jsonl.gz"):
        if row["step"] == 1:
            logits = model(input_ids=torch.tensor([row["prompt_ids"] + row["ids"]])).logits[
                0, len(row["prompt_ids"]) - 1 : -1
            ]
            logp = logits.log_softmax(-1).gather(-1, torch.tensor(row["ids"])[:, None])[:, 0]
            assert logp.tolist() == pytest.approx(row["trainer_logp"], abs=1e-4)
            loss = loss - row["count"] * row["advantage"] * logp.sum()
            total = total + row["count"] * len(row["ids"])
    (loss / total).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    assert jsonl(run() / "metrics.jsonl")[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_same_seed_same_bytes_another_seed_another_run(run):
    a = run()
    b = run(again=1)
    c = run("run.seed=1")
    assert weights(a) == weights(b) != weights(c)
    for name in ("rollouts.jsonl.gz", "eval_before.jsonl", "eval_after.jsonl"):
        assert jsonl(a / name) == jsonl(b / name)
    assert jsonl(a / "rollouts.jsonl.gz") != jsonl(c / "rollouts.jsonl.gz")
    assert jsonl(a / "eval_before.jsonl") == jsonl(c / "eval_before.jsonl")


def test_kl_is_measured_against_the_initial_policy(run):
    folder = run("loss.kl_coef=0.05")
    rows = {row["step"]: row for row in jsonl(folder / "metrics.jsonl")}
    assert rows[1]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[2]["kl"] > 1e-6
    assert rows[3]["kl"] > 0
    total = 0.0
    tokens = 0
    for row in jsonl(folder / "rollouts.jsonl.gz"):
        if row["step"] == 1:
            assert row["ref_logp"] == row["trainer_logp"]
        if row["step"] == 2:
            new, ref = (
                torch.tensor(row[name], dtype=torch.float64)
                for name in ("trainer_logp", "ref_logp")
            )
            total = total + row["count"] * k3(new, ref).sum().item()
            tokens = tokens + row["count"] * len(new)
    assert rows[2]["kl"] == pytest.approx(total / tokens, rel=1e-2)
    assert weights(folder) != weights(run())


def test_shuffled_words_are_the_same_words(run):
    plain, mixed = (
        {
            row["prompt"]: tiny_tokenizer().decode(row["prompt_ids"])
            for row in jsonl(folder / "rollouts.jsonl.gz")
            if row["step"] == 1
        }
        for folder in (run(), run("data.shuffle_words=1.0", "train.steps=1"))
    )
    assert plain.keys() == mixed.keys()
    assert plain != mixed

    def words(text):
        return sorted(text.removeprefix("<|user|>find: ").split("<|end|>")[0].split())

    assert all(words(plain[id]) == words(mixed[id]) for id in plain)


def test_steps_without_any_variance_change_nothing(run, world):
    """One token cannot be an answer: all rewards are -1, all advantages 0, no gradient, and weight
    decay does not act.
    """
    folder = run("sampling.max_new_tokens=1", "optimizer.weight_decay=0.5")
    rows = jsonl(folder / "metrics.jsonl")
    assert [
        (
            row["reward"],
            row["frac_reward_zero_std"],
            row["grad_norm"],
            row["trained_token_frac"],
            row["format_error_rate"],
        )
        for row in rows
    ] == [(-1, 1, 0, 0, 1)] * 3
    assert (
        weights(folder)
        == Path(configs.load_config(world, []).model.path, "model.safetensors").read_bytes()
    )


def test_where_things_lie_changes_no_bit(run):
    """The reference and AdamW's moments in host memory, gradients summed once a step, blocks
    computed again: the same weights, on one rank.
    """
    kl = "loss.kl_coef=0.5"
    budget = "train.tokens_per_micro_batch=80"
    want = weights(run(kl, budget))
    assert (
        weights(
            run(
                kl,
                budget,
                "loss.reference_cpu_offload=true",
                "optimizer.cpu_offload=true",
                "train.gradient_sync=last_micro_batch",
            )
        )
        == want
    )
    assert weights(run(kl, budget, "train.gradient_checkpointing=true")) == want


def test_frozen_weights_stay(run, world):
    pattern = "model.embed_tokens.*, *layernorm.weight"
    start = AutoModelForCausalLM.from_pretrained(
        configs.load_config(world, []).model.path
    ).state_dict()
    for name, t in (
        AutoModelForCausalLM.from_pretrained(
            run(f"train.frozen={pattern}", "optimizer.weight_decay=0.5") / "model"
        )
        .state_dict()
        .items()
    ):
        assert torch.equal(t, start[name]) == (
            name.startswith("model.embed_tokens") or name.endswith("layernorm.weight")
        ), name


def edited(world, key, folder, change) -> str:
    """An override that points data.KEY at a changed copy of its file."""
    source = Path(getattr(configs.load_config(world, []).data, key))
    (folder / source.name).write_text(change(source.read_text(encoding="utf-8")), encoding="utf-8")
    return f"data.{key}={folder / source.name}"


BAD_LINE = '{"id": "x", "text": \n'
REFUSED = {
    "unknown key": (["train.step=3"], "unknown key train.step: did you mean train.steps?"),
    "wrong type": (["train.steps=many"], "train.steps: expected int"),
    "no data file": (["data.corpus=nowhere/corpus.jsonl"], "nowhere/corpus.jsonl"),
    "no model": (["model.path=nowhere"], "nowhere"),
    "long prompt": (["prompt.max_tokens=5"], "prompt.max_tokens is 5"),
    "too few queries": (["train.prompts_per_step=1000"], "1000"),
    "no place for the query": (["prompt.user=find"], "prompt.user"),
    "shuffle_words above 1": (["data.shuffle_words=1.5"], "shuffle_words"),
    "frozen fits nothing": (
        ["train.frozen=embed"],
        "train.frozen: 'embed' fits the name of no weight",
    ),
    "all frozen": (["train.frozen='*'"], "every weight is frozen"),
    "beta above 1": (["optimizer.betas=[0.9, 1.5]"], "optimizer.betas"),
    "micro-batch below a rollout": (
        ["train.tokens_per_micro_batch=8"],
        "train.tokens_per_micro_batch",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_before_training(name, world, tmp_path, capsys):
    overrides, message = REFUSED[name]
    assert message in refused([world, *overrides, f"run.dir={tmp_path / 'run'}"], capsys)
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert not (tmp_path / "run/eval_before.jsonl").exists()


def test_a_corrupt_line_is_named(world, tmp_path, capsys):
    override = edited(
        world, "train_queries", tmp_path, lambda text: text.replace("\n", "\n" + BAD_LINE, 1)
    )
    assert f"{tmp_path}/train.queries.jsonl:2: " in refused(
        [world, override, f"run.dir={tmp_path / 'run'}"], capsys
    )
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_a_chat_template(world, tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    source = Path(configs.load_config(world, []).model.path)
    tokenizer.save_pretrained(tmp_path / "policy")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / "policy" / name).write_bytes((source / name).read_bytes())
    assert "no chat template" in refused(
        [world, f"model.path={tmp_path / 'policy'}", f"run.dir={tmp_path / 'run'}"], capsys
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_empty_is_left_alone(world, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("mine")
    assert "not empty" in refused([world, f"run.dir={tmp_path / 'run'}"], capsys)
    assert [(p.name, p.read_text()) for p in (tmp_path / "run").iterdir()] == [("mine.txt", "mine")]


def test_no_arguments(capsys):
    assert "usage" in refused([], capsys)


def test_dropped_prompts_and_lines_are_counted(world, tmp_path, capsys):
    long = json.dumps(dict(id="long", text="lamp " * 100))
    override = edited(world, "train_queries", tmp_path, lambda text: f"{long}\n{BAD_LINE}{text}")
    argv = [
        world,
        override,
        f"run.dir={tmp_path / 'run'}",
        "data.on_long_prompt=drop",
        "data.on_bad_line=drop",
        "train.steps=1",
        "train.eval_every=0",
    ]
    assert run_guarded(train.main, argv) == 0
    out = capsys.readouterr().out
    assert "1 prompts over the limit left out, first: query 'long'" in out
    assert "1 data lines left out" in out
    assert "train.queries.jsonl:2" in out
    assert len(jsonl(tmp_path / "run/metrics.jsonl")) == 1


def test_three_files_are_enough(world, tmp_path):
    """Without a test split of its own a second hash tenth of the queries is test; the three parts
    never overlap.
    """
    tree = yaml.safe_load(Path(world).read_text())
    del tree["data"]["test_queries"], tree["data"]["test_qrels"]
    (tmp_path / "three.yaml").write_text(yaml.safe_dump(tree))
    assert (
        run_guarded(train.main, [str(tmp_path / "three.yaml"), f"run.dir={tmp_path / 'run'}"]) == 0
    )
    tested = [row["id"] for row in jsonl(tmp_path / "run/eval_after.jsonl")]
    queries = [f"train{i}" for i in range(60)]
    assert tested == [
        q for q in queries if int(hashlib.sha256(q.encode()).hexdigest(), 16) % 10 == 1
    ]
    trained = {row["prompt"] for row in jsonl(tmp_path / "run/rollouts.jsonl.gz")}
    assert trained
    assert not any(int(hashlib.sha256(q.encode()).hexdigest(), 16) % 10 in (0, 1) for q in trained)


def test_half_a_test_split_is_refused(world, tmp_path, capsys):
    assert "data.test_qrels" in refused(
        [world, "data.test_qrels=''", f"run.dir={tmp_path / 'run'}"], capsys
    )


def test_muon_is_refused_for_a_sharded_policy(world, tmp_path, capsys):
    assert "optimizer.kind" in refused(
        [world, "optimizer.kind=muon", f"run.dir={tmp_path / 'run'}"], capsys
    )


def test_a_gradient_that_is_not_finite_stops_the_run(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        train,
        "compute_policy_loss",
        lambda policy, batch, *_: (
            sum(p.sum() for p in policy.parameters()) * float("nan"),
            batch.sampler_logp,
            {},
        ),
    )
    assert "step 1: the gradient norm is nan" in refused(
        [world, f"run.dir={tmp_path / 'run'}"], capsys
    )
    assert not (tmp_path / "run/model").exists()
