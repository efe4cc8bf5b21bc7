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
from transformers import AutoModelForCausalLM, AutoTokenizer

from recr1 import train
from recr1.config import loader as configs
from recr1.config.schema import LossConfig
from recr1.data_types import Prompt, Reward, Rollout
from recr1.rl.advantages import compute_group_advantages, normalize_by_std
from recr1.rl.kl import k3
from recr1.rl.packing import pack_rollouts
from recr1.tracking.step_metrics import StepRecord, collect_token_values, make_rollout_rows
from recr1.training.launch import run_guarded

FILES = set(
    "config.yaml metrics.jsonl rollouts.jsonl.gz eval_before.jsonl eval_after.jsonl summary.json "
    "model checkpoints heartbeats report.html versions.json".split()
)
METRICS = set(
    "reward ndcg reward_std frac_reward_zero_std kl clip_ratio entropy grad_norm lr "
    "format_error_rate completion_length truncated_ratio rollout_tokens_per_s "
    "sampling_logp_diff_mean sampling_logp_diff_p999 sampling_logp_diff_max timing_s".split()
)
ROLLOUT_KEYS = set(
    "step prompt sibling count text finished reward reward_terms error advantage".split()
)
PER_TOKEN = ["ids", "sampler_logp", "trainer_logp", "ref_logp", "old_logp", "entropy"]
EVALUATION_METRICS = ["ndcg", "recall", "mrr", "hit"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A config with its policy, data and index; every run below names its own run.dir."""
    folder = tmp_path_factory.mktemp("world")
    return write_yaml(folder)


@pytest.fixture(scope="module")
def policy(world):
    """The folder of the policy that every run starts from."""
    cfg = configs.load_config(world, [])
    return Path(cfg.model.path)


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    return runs_of(train.main, world, tmp_path_factory)


def read_weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


def load_state(folder) -> dict[str, torch.Tensor]:
    """Load a model's weights by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.state_dict()


def get_column(rows: list[dict], key: str) -> list:
    return [row[key] for row in rows]


def group_rows(rows: list[dict], key: str) -> dict[object, list[dict]]:
    """Group rows by their values of a key."""
    groups = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def repeat_by_count(rows: list[dict], key: str) -> list:
    """Repeat a row's value for each of the siblings that wrote its text."""
    values = []
    for row in rows:
        values += [row[key]] * row["count"]
    return values


# --- what a run leaves behind ---------------------------------------------------------------------


def test_files_and_config(run, world):
    folder = run()

    names = {path.name for path in folder.iterdir()}
    assert names == FILES
    path = str(folder / "config.yaml")
    want = configs.load_config(world, [f"run.dir={folder}"])
    assert configs.load_config(path, []) == want


def test_metrics(run):
    folder = run()
    rows = jsonl(folder / "metrics.jsonl")
    rollouts = jsonl(folder / "rollouts.jsonl.gz")
    texts = group_rows(rollouts, "step")

    assert get_column(rows, "step") == [1, 2, 3]
    assert sorted(texts) == [1, 2, 3]
    for row in rows:
        assert METRICS <= row.keys()
        check_reward_metrics(row, texts[row["step"]])
        check_training_metrics(row)
    validated = [row["step"] for row in rows if "val_gain" in row]
    assert validated == [2]


def check_reward_metrics(row: dict, texts: list[dict]) -> None:
    """Compute a step's metrics from its 4 groups of 4 rollouts."""
    groups = []
    for group in group_rows(texts, "prompt").values():
        groups.append(repeat_by_count(group, "reward"))
    rewards = np.array(groups)
    errors = sum(text["count"] for text in texts if text["error"])
    truncated = sum(text["count"] for text in texts if not text["finished"])
    zero_std = rewards.max(1) == rewards.min(1)
    stds = rewards.std(1, ddof=1)

    assert rewards.shape == (4, 4)
    assert row["reward"] == pytest.approx(rewards.mean(), abs=1e-6)
    assert row["reward_std"] == pytest.approx(stds.mean(), abs=1e-6)
    assert row["frac_reward_zero_std"] == zero_std.mean()
    assert row["format_error_rate"] == errors / 16
    assert row["truncated_ratio"] == truncated / 16


def check_training_metrics(row: dict) -> None:
    assert row["kl"] is None
    assert row["clip_ratio"] == 0
    assert row["grad_norm"] > 0
    assert row["lr"] == 1e-3
    assert row["rollout_tokens_per_s"] > 0

    mean = row["sampling_logp_diff_mean"]
    p999 = row["sampling_logp_diff_p999"]
    largest = row["sampling_logp_diff_max"]
    assert 0 <= mean
    assert mean <= p999
    assert p999 <= largest
    assert largest < 1e-4


def test_rollouts(run):
    folder = run()
    rows = jsonl(folder / "rollouts.jsonl.gz")

    for row in rows:
        assert ROLLOUT_KEYS <= row.keys()
        # log.tokens_every is 2
        has_tokens = row["step"] in (1, 2)
        assert ("ids" in row) == has_tokens
        assert ("prompt_ids" in row) == has_tokens
        if has_tokens:
            check_tokens(row)
        if row["error"]:
            assert row["reward"] == -1.0
        else:
            assert row["reward"] == row["reward_terms"]["ndcg"]
    groups = []
    for step_rows in group_rows(rows, "step").values():
        groups += group_rows(step_rows, "prompt").values()
    assert len(groups) == 12
    for group in groups:
        check_group(group)
    assert any(get_column(rows, "advantage"))
    assert max(get_column(rows, "count")) > 1


def check_tokens(row: dict) -> None:
    """Check what is logged of each token of a text."""
    tokenizer = tiny_tokenizer()
    ids = row["ids"]
    ends = ids[-1] == tokenizer.eos_token_id
    words = ids[:-1] if row["finished"] else ids
    difference = np.subtract(row["sampler_logp"], row["trainer_logp"])
    lengths = {len(row[name]) for name in PER_TOKEN if row[name] is not None}

    assert row["ref_logp"] is None
    assert len(lengths) == 1
    assert row["old_logp"] == row["trainer_logp"]
    assert max(row["sampler_logp"]) <= 0
    assert min(row["entropy"]) >= 0
    assert np.abs(difference).max() < 1e-4
    assert row["finished"] == ends
    assert row["finished"] or len(ids) == 12
    assert row["text"] == tokenizer.decode(words)
    prompt = tokenizer.decode(row["prompt_ids"])
    assert prompt.startswith("<|user|>find: ")


def check_group(group: list[dict]) -> None:
    """Check that a prompt's rows are 4 siblings with other texts, and their advantages."""
    texts = set(get_column(group, "text"))
    rewards = torch.tensor(repeat_by_count(group, "reward"))
    config = LossConfig(advantage_eps=0.1)
    want = compute_group_advantages(rewards, 4, normalize_by_std, config)

    assert sum(get_column(group, "count")) == 4
    assert len(texts) == len(group)
    advantages = repeat_by_count(group, "advantage")
    assert advantages == pytest.approx(want.tolist(), abs=1e-5)


def test_logged_floats_read_back_to_the_same_float32():
    # 3 rollouts of 400 tokens
    generator = torch.Generator().manual_seed(0)
    mantissas = -torch.rand(3, 400, generator=generator)
    exponents = torch.randint(-30, 3, (3, 400), generator=generator)
    values = mantissas * 10 ** exponents.float()
    prompt = Prompt("q", 0, "", (1,))
    ids = tuple(range(400))
    rollouts = []
    for sibling, logp in enumerate(values.tolist()):
        rollouts.append(Rollout(prompt, 0, sibling, ids, tuple(logp), True))
    rewards = [Reward(0.0)] * 3
    advantages = values[:, 0].tolist()
    batches = pack_rollouts(rollouts, 10_000)
    columns = [dict(trainer_logp=batch.sampler_logp, ref_logp=None) for batch in batches]
    tokens = collect_token_values(3, batches, columns)
    record = StepRecord(rollouts, rewards, advantages, rollouts, [0, 1, 2], 1, tokens)

    text = json.dumps(make_rollout_rows(1, record))

    rows = json.loads(text)
    for name in ("sampler_logp", "trainer_logp"):
        logged = np.array(get_column(rows, name), dtype=np.float32)
        assert np.array_equal(logged, values.numpy())
    logged = np.array(get_column(rows, "advantage"), dtype=np.float32)
    assert logged.tolist() == advantages
    assert rows[0]["ref_logp"] is None


def test_evaluations(run, world):
    folder = run()
    cfg = configs.load_config(world, [])
    before = jsonl(folder / "eval_before.jsonl")
    after = jsonl(folder / "eval_after.jsonl")
    test_queries = jsonl(Path(cfg.data.test_queries))
    queries = {row["id"]: row["text"] for row in test_queries}
    raw_metrics = [f"{name}_raw" for name in EVALUATION_METRICS]
    keys = {"id", "raw", "rewrite", "text", "error", *EVALUATION_METRICS, *raw_metrics}

    for rows in (before, after):
        raw_queries = {row["id"]: row["raw"] for row in rows}
        assert raw_queries == queries
        assert len(rows) == 12
        for row in rows:
            assert set(row) == keys
            assert (row["rewrite"] is None) == (row["error"] is not None)
            assert row["error"] is None or row["ndcg"] == 0
            assert row["error"] or row["rewrite"] in row["text"]
    raw_before = get_column(before, "ndcg_raw")
    raw_after = get_column(after, "ndcg_raw")
    assert raw_before == raw_after
    assert 0 < sum(raw_before) < 12


SUMMARY = dict(
    task="product_search",
    retriever="bm25",
    metric="ndcg@10",
    n_eval=12,
    seed=0,
    steps=3,
    world_size=1,
    threads=1,
)


def average_metric(rows: list[dict], key: str) -> float:
    return math.fsum(get_column(rows, key)) / 12


def test_summary(run):
    folder = run()
    summary = json.loads((folder / "summary.json").read_text())

    assert summary == summary | SUMMARY
    assert summary["wall_s"] > 0
    assert summary["rollout_tokens_per_s"] > 0

    # the figures are those of the rows
    rows_before = jsonl(folder / "eval_before.jsonl")
    rows_after = jsonl(folder / "eval_after.jsonl")
    raw = average_metric(rows_before, "ndcg_raw")
    before = average_metric(rows_before, "ndcg")
    after = average_metric(rows_after, "ndcg")
    assert summary["raw"] == pytest.approx(raw, abs=1e-12)
    assert summary["before"] == pytest.approx(before, abs=1e-12)
    assert summary["after"] == pytest.approx(after, abs=1e-12)
    assert summary["gain"] == pytest.approx(after - raw, abs=1e-12)
    assert summary["after_minus_before"] == pytest.approx(after - before, abs=1e-12)
    for name in ("gain", "after_minus_before"):
        low, high = summary[f"{name}_ci95"]
        assert low <= summary[name] <= high

    rows = jsonl(folder / "metrics.jsonl")
    gaps = get_column(rows, "sampling_logp_diff_max")
    assert summary["sampling_logp_diff_max"] == max(gaps)
    assert 0 <= summary["sampling_logp_diff_mean"] <= summary["sampling_logp_diff_p999"]
    assert summary["sampling_logp_diff_p999"] <= summary["sampling_logp_diff_max"]


def test_the_model_loads_in_transformers_and_has_moved(run, policy):
    folder = run() / "model"

    theirs = load_state(folder)
    start = load_state(policy)
    assert theirs.keys() == start.keys()
    for name, tensor in theirs.items():
        assert tensor.isfinite().all()
        assert not torch.equal(tensor, start[name])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    want = tiny_tokenizer()("find: lamp")
    assert tokenizer("find: lamp")["input_ids"] == want["input_ids"]


def compute_logp(model, row: dict) -> torch.Tensor:
    """Compute the log-probabilities of a logged text's tokens by transformers' model."""
    ids = torch.tensor(row["ids"])
    tokens = torch.tensor([row["prompt_ids"] + row["ids"]])
    start = len(row["prompt_ids"]) - 1
    logits = model(input_ids=tokens).logits[0, start:-1]
    logp = logits.log_softmax(-1)
    return logp.gather(-1, ids[:, None])[:, 0]


def test_the_first_gradient_recomputed_from_the_log(run, policy):
    """What step 1 logged, through transformers' model in rows of one text: -sum count adv logp /
    all sampled tokens, KL at 0.
    """
    folder = run()
    model = AutoModelForCausalLM.from_pretrained(policy)
    loss = 0.0
    total = 0
    for row in jsonl(folder / "rollouts.jsonl.gz"):
        if row["step"] == 1:
            logp = compute_logp(model, row)
            assert logp.tolist() == pytest.approx(row["trainer_logp"], abs=1e-4)
            loss = loss - row["count"] * row["advantage"] * logp.sum()
            total = total + row["count"] * len(row["ids"])

    (loss / total).backward()

    gradients = [parameter.grad for parameter in model.parameters()]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    first = jsonl(folder / "metrics.jsonl")[0]
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)


# --- what a run repeats, and what its settings change ---------------------------------------------


def test_same_seed_same_bytes_another_seed_another_run(run):
    first = run()
    second = run(again=1)
    other = run("run.seed=1")

    assert read_weights(first) == read_weights(second)
    assert read_weights(second) != read_weights(other)
    for name in ("rollouts.jsonl.gz", "eval_before.jsonl", "eval_after.jsonl"):
        assert jsonl(first / name) == jsonl(second / name)
    assert jsonl(first / "rollouts.jsonl.gz") != jsonl(other / "rollouts.jsonl.gz")
    assert jsonl(first / "eval_before.jsonl") == jsonl(other / "eval_before.jsonl")


def test_kl_is_measured_against_the_initial_policy(run):
    folder = run("loss.kl_coef=0.05")
    rows = {row["step"]: row for row in jsonl(folder / "metrics.jsonl")}
    rollouts = jsonl(folder / "rollouts.jsonl.gz")
    texts = group_rows(rollouts, "step")

    assert rows[1]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[2]["kl"] > 1e-6
    assert rows[3]["kl"] > 0
    for text in texts[1]:
        assert text["ref_logp"] == text["trainer_logp"]
    total = 0.0
    tokens = 0
    for text in texts[2]:
        logp = torch.tensor(text["trainer_logp"], dtype=torch.float64)
        ref_logp = torch.tensor(text["ref_logp"], dtype=torch.float64)
        kl = k3(logp, ref_logp).sum()
        total = total + text["count"] * kl.item()
        tokens = tokens + text["count"] * len(logp)
    assert rows[2]["kl"] == pytest.approx(total / tokens, rel=1e-2)
    assert read_weights(folder) != read_weights(run())


def read_prompts(folder: Path) -> dict[str, str]:
    """Read the texts of the first step's prompts."""
    tokenizer = tiny_tokenizer()
    prompts = {}
    for row in jsonl(folder / "rollouts.jsonl.gz"):
        if row["step"] == 1:
            prompts[row["prompt"]] = tokenizer.decode(row["prompt_ids"])
    return prompts


def sort_words(prompt: str) -> list[str]:
    """Sort the words of a prompt's query."""
    query = prompt.removeprefix("<|user|>find: ").split("<|end|>")[0]
    return sorted(query.split())


def test_shuffled_words_are_the_same_words(run):
    folder = run()
    shuffled_folder = run("data.shuffle_words=1.0", "train.steps=1")

    plain = read_prompts(folder)
    shuffled = read_prompts(shuffled_folder)
    assert plain.keys() == shuffled.keys()
    assert plain != shuffled
    for name, prompt in plain.items():
        assert sort_words(prompt) == sort_words(shuffled[name])


def test_steps_without_any_variance_change_nothing(run, policy):
    """One token cannot be an answer: all rewards are -1, all advantages 0, no gradient, and weight
    decay does not act.
    """
    folder = run("sampling.max_new_tokens=1", "optimizer.weight_decay=0.5")

    rows = jsonl(folder / "metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert row["reward"] == -1
        assert row["frac_reward_zero_std"] == 1
        assert row["grad_norm"] == 0
        assert row["trained_token_frac"] == 0
        assert row["format_error_rate"] == 1
    start = (policy / "model.safetensors").read_bytes()
    assert read_weights(folder) == start


def test_where_things_lie_changes_no_bit(run):
    """The reference and AdamW's moments in host memory, gradients summed once a step, blocks
    computed again: the same weights, on one rank.
    """
    plain = ["loss.kl_coef=0.5", "train.tokens_per_micro_batch=80"]
    offload = ["loss.reference_cpu_offload=true", "optimizer.cpu_offload=true"]
    on_device = run(*plain)
    want = read_weights(on_device)

    offloaded = run(*plain, *offload, "train.gradient_sync=last_micro_batch")
    recomputed = run(*plain, "train.gradient_checkpointing=true")

    assert read_weights(offloaded) == want
    assert read_weights(recomputed) == want


def test_frozen_weights_stay(run, policy):
    pattern = "model.embed_tokens.*, *layernorm.weight"

    folder = run(f"train.frozen={pattern}", "optimizer.weight_decay=0.5")

    start = load_state(policy)
    for name, tensor in load_state(folder / "model").items():
        frozen = name.startswith("model.embed_tokens") or name.endswith("layernorm.weight")
        assert torch.equal(tensor, start[name]) == frozen, name


# --- how a run refuses ----------------------------------------------------------------------------


BAD_LINE = '{"id": "x", "text": \n'
# what is wrong: (the override, what the line says)
REFUSED = {
    "unknown key": ("train.step=3", "unknown key train.step: did you mean train.steps?"),
    "wrong type": ("train.steps=many", "train.steps: expected int"),
    "no data file": ("data.corpus=nowhere/corpus.jsonl", "nowhere/corpus.jsonl"),
    "no model": ("model.path=nowhere", "nowhere"),
    "long prompt": ("prompt.max_tokens=5", "prompt.max_tokens is 5"),
    "too few queries": ("train.prompts_per_step=1000", "1000"),
    "no place for the query": ("prompt.user=find", "prompt.user"),
    "shuffle_words above 1": ("data.shuffle_words=1.5", "shuffle_words"),
    "frozen fits nothing": (
        "train.frozen=embed",
        "train.frozen: 'embed' fits the name of no weight",
    ),
    "all frozen": ("train.frozen='*'", "every weight is frozen"),
    "beta above 1": ("optimizer.betas=[0.9, 1.5]", "optimizer.betas"),
    "micro-batch below a rollout": (
        "train.tokens_per_micro_batch=8",
        "train.tokens_per_micro_batch",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_before_training(name, world, tmp_path, capsys):
    override, message = REFUSED[name]
    folder = tmp_path / "run"

    line = refused([world, override, f"run.dir={folder}"], capsys)

    assert message in line
    assert not (folder / "metrics.jsonl").exists()
    assert not (folder / "eval_before.jsonl").exists()


def read_train_queries(world: str) -> str:
    cfg = configs.load_config(world, [])
    path = Path(cfg.data.train_queries)
    return path.read_text(encoding="utf-8")


def test_a_corrupt_line_is_named(world, tmp_path, capsys):
    text = read_train_queries(world).replace("\n", "\n" + BAD_LINE, 1)
    queries = tmp_path / "train.queries.jsonl"
    queries.write_text(text, encoding="utf-8")
    folder = tmp_path / "run"

    line = refused([world, f"data.train_queries={queries}", f"run.dir={folder}"], capsys)

    assert f"{queries}:2: " in line
    assert not folder.exists()


def test_a_tokenizer_without_a_chat_template(world, policy, tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    other_policy = tmp_path / "policy"
    tokenizer.save_pretrained(other_policy)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        raw = (policy / name).read_bytes()
        (other_policy / name).write_bytes(raw)
    folder = tmp_path / "run"

    line = refused([world, f"model.path={other_policy}", f"run.dir={folder}"], capsys)

    assert "no chat template" in line
    assert not folder.exists()


def test_a_folder_that_is_not_empty_is_left_alone(world, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")

    line = refused([world, f"run.dir={folder}"], capsys)

    assert "not empty" in line
    [path] = folder.iterdir()
    assert path.name == "mine.txt"
    assert path.read_text() == "mine"


def test_no_arguments(capsys):
    assert "usage" in refused([], capsys)


def test_dropped_prompts_and_lines_are_counted(world, tmp_path, capsys):
    query = dict(id="long", text="lamp " * 100)
    long = json.dumps(query)
    text = f"{long}\n{BAD_LINE}" + read_train_queries(world)
    queries = tmp_path / "train.queries.jsonl"
    queries.write_text(text, encoding="utf-8")
    folder = tmp_path / "run"
    argv = [world, f"data.train_queries={queries}", f"run.dir={folder}"]
    argv += ["data.on_long_prompt=drop", "data.on_bad_line=drop"]
    argv += ["train.steps=1", "train.eval_every=0"]

    code = run_guarded(train.main, argv)

    assert code == 0
    out = capsys.readouterr().out
    assert "1 prompts over the limit left out, first: query 'long'" in out
    assert "1 data lines left out" in out
    assert "train.queries.jsonl:2" in out
    rows = jsonl(folder / "metrics.jsonl")
    assert len(rows) == 1


def hash_tenth(query: str) -> int:
    """Compute which tenth of the queries one belongs to, by its hash."""
    digest = hashlib.sha256(query.encode()).hexdigest()
    return int(digest, 16) % 10


def test_three_files_are_enough(world, tmp_path):
    """Without a test split of its own a second hash tenth of the queries is test; the three parts
    never overlap.
    """
    tree = yaml.safe_load(Path(world).read_text())
    del tree["data"]["test_queries"]
    del tree["data"]["test_qrels"]
    config = tmp_path / "three.yaml"
    config.write_text(yaml.safe_dump(tree))
    folder = tmp_path / "run"

    code = run_guarded(train.main, [str(config), f"run.dir={folder}"])

    assert code == 0
    queries = [f"train{i}" for i in range(60)]
    want = [query for query in queries if hash_tenth(query) == 1]
    tested = jsonl(folder / "eval_after.jsonl")
    assert get_column(tested, "id") == want
    rollouts = jsonl(folder / "rollouts.jsonl.gz")
    trained = set(get_column(rollouts, "prompt"))
    assert trained
    for query in trained:
        assert hash_tenth(query) not in (0, 1)


def test_half_a_test_split_is_refused(world, tmp_path, capsys):
    line = refused([world, "data.test_qrels=''", f"run.dir={tmp_path / 'run'}"], capsys)

    assert "data.test_qrels" in line


def test_muon_is_refused_for_a_sharded_policy(world, tmp_path, capsys):
    line = refused([world, "optimizer.kind=muon", f"run.dir={tmp_path / 'run'}"], capsys)

    assert "optimizer.kind" in line


def test_a_gradient_that_is_not_finite_stops_the_run(world, tmp_path, capsys, monkeypatch):
    def compute_nan_loss(policy, batch, *_):
        total = sum(parameter.sum() for parameter in policy.parameters())
        return total * float("nan"), batch.sampler_logp, {}

    monkeypatch.setattr(train, "compute_policy_loss", compute_nan_loss)
    folder = tmp_path / "run"

    line = refused([world, f"run.dir={folder}"], capsys)

    assert "step 1: the gradient norm is nan" in line
    assert not (folder / "model").exists()
