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
PARTS = {"ndcg", "recall", "mrr", "hit"}


@contextmanager
def tiny_world(name: str, folder: Path):
    """An experiment as its dry run makes it small, written as a config of two steps; the world is
    there inside the block.
    """
    place = "experiments" if name == "quickstart" else "experiments/configs/cpu"
    path = str(ROOT / place / f"{name}.yaml")
    with shrunk_config(configs.load_config(path, ["run.threads=1"]), path) as cfg:
        cfg = replace(
            cfg,
            train=replace(cfg.train, steps=2, eval_every=2),
            save=replace(cfg.save, every=0),
            log=replace(cfg.log, tokens_every=1),
        )
        (folder / "config.yaml").write_text(configs.dump_config(cfg))
        yield str(folder / "config.yaml")


@pytest.mark.parametrize("name", TASKS)
def test_two_steps_on_one_rank_and_on_two(name, tmp_path):
    with tiny_world(name, tmp_path) as config:
        folders = [tmp_path / f"run{n}" for n in (1, 2)]
        assert run_guarded(train.main, [config, f"run.dir={folders[0]}"]) == 0
        torchrun(2, "-m", "recr1.train", config, f"run.dir={folders[1]}")
    shown, other = (content(folder / "report.html")["ranking"] for folder in folders)
    # its lists have the scores that the run logged
    assert shown["why"] == other["why"] == ""
    assert shown["listed"] == (TASKS[name] != "sequential")
    weights = configs.load_config(config, []).reward.weights
    one, two = (jsonl(folder / "metrics.jsonl") for folder in folders)
    assert [row["step"] for row in one] == [1, 2]
    assert all(row["grad_norm"] > 0 and row["reward_std"] > 0 for row in one)
    assert [row["format_errors"] for row in one] == [row["format_errors"] for row in two]
    assert sum(one[0]["format_errors"].values()) == round(one[0]["format_error_rate"] * 32)
    assert one[1]["val_ndcg"] is not None
    assert set(weights) <= one[0].keys()
    # the second step's texts too
    for a, b in zip(*(jsonl(folder / "rollouts.jsonl.gz") for folder in folders), strict=True):
        assert {
            k: a[k] for k in ("prompt", "text", "count", "reward", "reward_terms", "error")
        } == {k: b[k] for k in ("prompt", "text", "count", "reward", "reward_terms", "error")}
        assert set(a["reward_terms"]) == {"ndcg", *weights}
    assert any(
        row["error"] is None and row["reward"] > 0
        for row in jsonl(folders[0] / "rollouts.jsonl.gz")
    )
    before = jsonl(folders[0] / "eval_before.jsonl")
    after = jsonl(folders[0] / "eval_after.jsonl")
    named = PARTS | set(weights)
    assert set(after[0]) == {
        "id",
        "raw",
        "rewrite",
        "text",
        "error",
        *named,
        *(f"{name}_raw" for name in named),
    }
    s = json.loads((folders[0] / "summary.json").read_text())
    assert s["task"] == TASKS[name]
    assert (s["retriever"] is None) == (TASKS[name] != "sequential")
    assert set(s["reward_terms"]) == named
    for part, found in s["reward_terms"].items():
        raw, b, a = (
            sum(row[key] for row in rows) / 8
            for rows, key in ((before, f"{part}_raw"), (before, part), (after, part))
        )
        assert [
            found[key] for key in ("raw", "before", "after", "gain", "after_minus_before")
        ] == pytest.approx([raw, b, a, a - raw, a - b], abs=1e-12)
        assert found["gain_ci95"][0] <= found["gain"] <= found["gain_ci95"][1]
        assert 0 < found["gain_p"] <= 1
    assert {key: s[key] for key in s["reward_terms"]["ndcg"]} == s["reward_terms"]["ndcg"]


def test_the_metric_of_the_evaluation_may_be_another(tmp_path):
    with tiny_world("esci_rerank", tmp_path) as config:
        assert (
            run_guarded(
                train.main,
                [
                    config,
                    f"run.dir={tmp_path / 'run'}",
                    "reward.metric=mrr",
                    "reward.weights={lcs: 1.0, hit: 0.0}",
                    "train.steps=1",
                    "train.eval_every=1",
                ],
            )
            == 0
        )
    s, [row] = (
        json.loads((tmp_path / "run/summary.json").read_text()),
        jsonl(tmp_path / "run/metrics.jsonl"),
    )
    assert s["metric"] == "mrr@8"
    assert s["raw"] == s["reward_terms"]["mrr"]["raw"]
    assert set(s["reward_terms"]) == PARTS | {"lcs"}
    assert "val_mrr" in row
    assert "val_ndcg" not in row
    assert {"mrr", "lcs", "hit"} <= row.keys()


def test_answers_without_a_thought(tmp_path):
    """prompt.assistant closes the thought: the same completions that else have no_think_end are
    answers, in training and in evaluation.
    """
    path = str(ROOT / "experiments/configs/cpu/esci_rerank.yaml")
    with shrunk_config(
        configs.load_config(path, ["run.threads=1", "prompt.assistant=<think></think>"]), path
    ) as cfg:
        train.train(cfg)
        rows = jsonl(Path(cfg.run.dir) / "rollouts.jsonl.gz")
    good = [row for row in rows if row["error"] is None]
    assert good
    assert all("<answer>" in row["text"] and "</think>" not in row["text"] for row in good)


def test_the_readmes_own_task(tmp_path, monkeypatch, capsys):
    """recr1/tasks/README.md, "A task of your own": the class as it stands there, at most 15 lines,
    trains, and its dry run passes.
    """
    [text] = re.findall(
        r"```python\n(# my_task.py.*?)```",
        (ROOT / "recr1/tasks/README.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert len(text.splitlines()) <= 15
    (tmp_path / "my_task.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    task = re.search(r"class (\w+)", text)[1]
    kind = getattr(importlib.import_module("my_task"), task)
    assert kind(None).parse('so</think><answer>["red", "lamp"]</answer>', {}) == (
        ["red", "lamp"],
        None,
    )
    assert kind(None).parse('so</think><answer>["red", 3]</answer>', {}) == (None, "no_words")
    config = write_yaml(tmp_path, task=f"my_task:{task}")
    assert run_guarded(train.main, [config, "train.steps=1", "train.eval_every=0"]) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["task"] == f"my_task:{task}"
    rows = jsonl(tmp_path / "run/eval_after.jsonl")
    queries = {
        row["id"]: row["text"]
        for row in jsonl(Path(configs.load_config(config, []).data.test_queries))
    }
    assert all(row["raw"] == queries[row["id"]].split() and row["ndcg_raw"] >= 0 for row in rows)
    assert "no_words" in {row["error"] for row in rows}
    code = run_guarded(train.main, [config, "--dry-run"])
    said = capsys.readouterr()
    assert code == 0 and "dry run passed" in said.out, said.err


def test_a_fault_of_ones_own_reward_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_reward.py").write_text(
        "def part(answer, ranked, gains, row):\n    raise KeyError('x')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with tiny_world("esci_rerank", tmp_path) as config:
        capsys.readouterr()
        assert (
            run_guarded(
                train.main,
                [
                    config,
                    f"run.dir={tmp_path / 'run'}",
                    "reward.weights={'broken_reward:part': 1.0}",
                ],
            )
            == 2
        )
    err = capsys.readouterr().err
    assert err.startswith("recr1: reward.weights: broken_reward:part raised KeyError")
    assert err.count("\n") == 1


def test_a_policy_of_another_task_rewrites_nothing(tmp_path, capsys):
    with tiny_world("esci_rerank", tmp_path) as config:
        cfg = configs.load_config(config, [])
        Path(cfg.model.path, "recr1.yaml").write_text(configs.dump_answering_config(cfg))
        capsys.readouterr()
        assert run_guarded(cli.main, ["generate", "--model", cfg.model.path, "lamp"]) == 2
    assert "trained for the task rerank" in (err := capsys.readouterr().err)
    assert err.count("\n") == 1
