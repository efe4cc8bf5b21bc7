"""Every task from end to end: two steps on a tiny world, on one rank and on two; a task of a user's
own; a prompt that closes the thought.
"""

import importlib
import json
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tiny_world import jsonl, write_yaml
from test_ranks import torchrun
from test_report import content

from recr1 import cli, train
from recr1.config import loader as configs
from recr1.training.dry_run import shrunk_config
from recr1.training.launch import run_guarded

ROOT = Path(__file__).resolve().parents[2]
TASKS = dict(
    movielens_sequential="sequential", esci_rerank="rerank", movielens_list="recommend_list"
)
EVALUATED = {"ndcg", "recall", "mrr", "hit"}
FIGURES = ("raw", "before", "after", "gain", "after_minus_before")
SAME_ON_TWO = ("prompt", "text", "count", "reward", "reward_terms", "error")


def find_experiment(name: str) -> str:
    folder = "experiments" if name == "quickstart" else "experiments/configs/cpu"
    return str(ROOT / folder / f"{name}.yaml")


@contextmanager
def tiny_world(name: str, folder: Path):
    """Write an experiment as its dry run makes it small, as a config of two steps; the world is
    there inside the block.
    """
    path = find_experiment(name)
    with shrunk_config(configs.load_config(path, ["run.threads=1"]), path) as cfg:
        cfg = replace(
            cfg,
            train=replace(cfg.train, steps=2, eval_every=2),
            save=replace(cfg.save, every=0),
            log=replace(cfg.log, tokens_every=1),
        )
        config = folder / "config.yaml"
        config.write_text(configs.dump_config(cfg))
        yield str(config)


def read_summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


# --- the tasks of the package ---------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_two_steps_on_one_rank_and_on_two(name, tmp_path):
    one = tmp_path / "run1"
    two = tmp_path / "run2"
    has_retriever = TASKS[name] == "sequential"

    with tiny_world(name, tmp_path) as config:
        code = run_guarded(train.main, [config, f"run.dir={one}"])
        torchrun(2, "-m", "recr1.train", config, f"run.dir={two}")

    assert code == 0
    weights = configs.load_config(config, []).reward.weights
    check_reports(one, two, has_retriever)
    check_metrics(one, two, weights)
    check_rollouts(one, two, weights)
    check_evaluation(one, weights)
    summary = read_summary(one)
    assert summary["task"] == TASKS[name]
    assert (summary["retriever"] is None) == (not has_retriever)
    assert set(summary["reward_terms"]) == EVALUATED | set(weights)
    figures = summary["reward_terms"]["ndcg"]
    assert summary == summary | figures


def check_reports(one: Path, two: Path, has_retriever: bool) -> None:
    """Check that the reports' lists have the scores that the runs logged."""
    shown = content(one / "report.html")["ranking"]
    other = content(two / "report.html")["ranking"]
    assert shown["why"] == ""
    assert other["why"] == ""
    assert shown["listed"] == (not has_retriever)


def check_metrics(one: Path, two: Path, weights: dict) -> None:
    rows = jsonl(one / "metrics.jsonl")
    others = jsonl(two / "metrics.jsonl")
    first, second = rows
    assert first["step"] == 1
    assert second["step"] == 2
    for row, other in zip(rows, others, strict=True):
        assert row["grad_norm"] > 0
        assert row["reward_std"] > 0
        assert row["format_errors"] == other["format_errors"]
    num_errors = sum(first["format_errors"].values())
    assert num_errors == round(first["format_error_rate"] * 32)
    assert second["val_ndcg"] is not None
    assert set(weights) <= first.keys()


def check_rollouts(one: Path, two: Path, weights: dict) -> None:
    """Check that the texts are the same on two ranks, those of the second step too."""
    rows = jsonl(one / "rollouts.jsonl.gz")
    others = jsonl(two / "rollouts.jsonl.gz")
    num_good = 0
    for row, other in zip(rows, others, strict=True):
        for key in SAME_ON_TWO:
            assert row[key] == other[key], key
        assert set(row["reward_terms"]) == {"ndcg", *weights}
        if row["error"] is None and row["reward"] > 0:
            num_good = num_good + 1
    assert num_good > 0


def average_metric(rows: list[dict], key: str) -> float:
    return sum(row[key] for row in rows) / 8


def check_evaluation(folder: Path, weights: dict) -> None:
    """Compute the summary's figures of each term of the reward from the rows."""
    rows_before = jsonl(folder / "eval_before.jsonl")
    rows_after = jsonl(folder / "eval_after.jsonl")
    terms = EVALUATED | set(weights)
    raw_terms = {f"{term}_raw" for term in terms}
    assert rows_after[0].keys() == terms | raw_terms | {"id", "raw", "rewrite", "text", "error"}

    for term, figures in read_summary(folder)["reward_terms"].items():
        raw = average_metric(rows_before, f"{term}_raw")
        before = average_metric(rows_before, term)
        after = average_metric(rows_after, term)
        want = [raw, before, after, after - raw, after - before]
        actual = [figures[name] for name in FIGURES]
        assert actual == pytest.approx(want, abs=1e-12)
        low, high = figures["gain_ci95"]
        assert low <= figures["gain"]
        assert figures["gain"] <= high
        assert 0 < figures["gain_p"] <= 1


def test_the_metric_of_the_evaluation_may_be_another(tmp_path):
    folder = tmp_path / "run"
    overrides = ["reward.metric=mrr", "reward.weights={lcs: 1.0, hit: 0.0}"]
    overrides += ["train.steps=1", "train.eval_every=1"]

    with tiny_world("esci_rerank", tmp_path) as config:
        code = run_guarded(train.main, [config, f"run.dir={folder}", *overrides])

    assert code == 0
    summary = read_summary(folder)
    assert summary["metric"] == "mrr@8"
    assert summary["raw"] == summary["reward_terms"]["mrr"]["raw"]
    assert set(summary["reward_terms"]) == EVALUATED | {"lcs"}
    [row] = jsonl(folder / "metrics.jsonl")
    assert "val_mrr" in row
    assert "val_ndcg" not in row
    assert {"mrr", "lcs", "hit"} <= row.keys()


def test_answers_without_a_thought():
    """prompt.assistant closes the thought: the same completions that else have no_think_end are
    answers, in training and in evaluation.
    """
    path = find_experiment("esci_rerank")
    settings = configs.load_config(path, ["run.threads=1", "prompt.assistant=<think></think>"])

    with shrunk_config(settings, path) as cfg:
        train.train(cfg)
        rows = jsonl(Path(cfg.run.dir) / "rollouts.jsonl.gz")

    texts = [row["text"] for row in rows if row["error"] is None]
    assert texts
    for text in texts:
        assert "<answer>" in text
        assert "</think>" not in text


# --- a task or a reward of a user's own -----------------------------------------------------------


README_CLASS = re.compile(r"```python\n(# my_task.py.*?)```", re.DOTALL)


def read_readme_class() -> str:
    readme = ROOT / "recr1/tasks/README.md"
    [text] = README_CLASS.findall(readme.read_text(encoding="utf-8"))
    return text


def test_the_readmes_own_task(tmp_path, monkeypatch, capsys):
    """recr1/tasks/README.md, "A task of your own": the class as it stands there, at most 15 lines,
    trains, and its dry run passes.
    """
    text = read_readme_class()
    assert len(text.splitlines()) <= 15
    (tmp_path / "my_task.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    name = re.search(r"class (\w+)", text)[1]

    # it parses
    kind = getattr(importlib.import_module("my_task"), name)
    task = kind(None)
    answer = task.parse('so</think><answer>["red", "lamp"]</answer>', {})
    assert answer == (["red", "lamp"], None)
    answer = task.parse('so</think><answer>["red", 3]</answer>', {})
    assert answer == (None, "no_words")

    # it trains
    config = write_yaml(tmp_path, task=f"my_task:{name}")
    code = run_guarded(train.main, [config, "train.steps=1", "train.eval_every=0"])
    assert code == 0
    assert read_summary(tmp_path / "run")["task"] == f"my_task:{name}"
    check_own_rows(tmp_path / "run", configs.load_config(config, []).data.test_queries)

    # its dry run passes
    code = run_guarded(train.main, [config, "--dry-run"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "dry run passed" in printed.out, printed.err


def check_own_rows(folder: Path, test_queries: str) -> None:
    queries = {row["id"]: row["text"] for row in jsonl(Path(test_queries))}
    errors = set()
    for row in jsonl(folder / "eval_after.jsonl"):
        assert row["raw"] == queries[row["id"]].split()
        assert row["ndcg_raw"] >= 0
        errors.add(row["error"])
    assert "no_words" in errors


BROKEN_REWARD = "def part(answer, ranked, gains, row):\n    raise KeyError('x')\n"


def test_a_fault_of_ones_own_reward_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_reward.py").write_text(BROKEN_REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    weights = "reward.weights={'broken_reward:part': 1.0}"

    with tiny_world("esci_rerank", tmp_path) as config:
        capsys.readouterr()
        code = run_guarded(train.main, [config, f"run.dir={tmp_path / 'run'}", weights])

    assert code == 2
    err = capsys.readouterr().err
    assert err.startswith("recr1: reward.weights: broken_reward:part raised KeyError")
    assert err.count("\n") == 1


def test_a_policy_of_another_task_rewrites_nothing(tmp_path, capsys):
    with tiny_world("esci_rerank", tmp_path) as config:
        cfg = configs.load_config(config, [])
        settings = Path(cfg.model.path, "recr1.yaml")
        settings.write_text(configs.dump_answering_config(cfg))
        capsys.readouterr()
        code = run_guarded(cli.main, ["generate", "--model", cfg.model.path, "lamp"])

    assert code == 2
    err = capsys.readouterr().err
    assert "trained for the task rerank" in err
    assert err.count("\n") == 1
