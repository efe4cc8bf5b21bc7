"""The scripts under experiments/ that stand around runs: cold starts, evaluation elsewhere, the
open questions, the table; and a config's base.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_world import jsonl, write_yaml
from test_task_runs import tiny_world

from recr1 import train
from recr1.config import loader as configs
from recr1.config.schema import ConfigError
from recr1.data.readers import is_validation
from recr1.tasks import registry as tasks
from recr1.training.launch import run_guarded

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    """A script of experiments/ as a module; a script finds its neighbours in its own folder."""
    for folder in ("analysis", "make"):
        monkeypatch.syspath_prepend(ROOT / "experiments" / folder)
    monkeypatch.delitem(__import__("sys").modules, "evaluate", raising=False)
    return importlib.import_module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    config = write_yaml(folder, **{"train.steps": 2, "train.eval_every": 1})
    assert run_guarded(train.main, [config, f"run.dir={folder / 'run'}"]) == 0
    return config, folder / "run"


# -------------------------------------------------------------------------------------------- base


def test_a_base_lies_below_the_config(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/base.yaml").write_text(
        "task: product_search\nloss: {clip: 0.3, kl: 0.5}\nreward: {k_eval: 7}\n"
    )
    (tmp_path / "own.yaml").write_text("base: b/base.yaml\nloss: {clip: 0.1}\n")
    cfg = configs.load_config(str(tmp_path / "own.yaml"), ["loss.kl_coef=0.25"])
    assert (cfg.loss.clip_ratio_low, cfg.loss.kl_coef, cfg.reward.k_eval) == (0.1, 0.25, 7)


@pytest.mark.parametrize(
    "text, message",
    [
        ("base: nowhere.yaml", "own.yaml: base: .*nowhere.yaml: no such file"),
        ("base: two.yaml", "one level is all there is"),
        ("base: [a]", "own.yaml: base"),
        ("base: list.yaml", "list.yaml: expected `key: value` lines"),
    ],
)
def test_a_base_that_is_none_is_named(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    (tmp_path / "two.yaml").write_text("base: own.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ConfigError, match=message):
        configs.load_config(str(tmp_path / "own.yaml"), [])


# ------------------------------------------------------------------------------------- cold starts


@pytest.mark.parametrize(
    "name", ["movielens_sequential", "esci_rerank", "movielens_list", "quickstart"]
)
def test_cold_start_texts_are_answers_of_the_task(name, tmp_path, script):
    cold = script("cold_start")
    with tiny_world(name, tmp_path) as config:

        def made(*more) -> list[dict]:
            assert run_guarded(cold.main, [config, "--out", str(tmp_path / "t.jsonl"), *more]) == 0
            return jsonl(tmp_path / "t.jsonl")

        cfg = configs.load_config(config, [])
        task = tasks.build_task(cfg)
        rows = {row["id"]: row for row in jsonl(Path(cfg.data.train_queries))}
        first = made()
        again = made()
        several = made("--copies", "6")
        calm = made("--stir", "0")
        assert first == again
        assert not any(is_validation(row["id"]) for row in first)
        assert len({row["id"] for row in first}) == len(first) > 40
        assert len(several) > len(first)
        assert len({(row["id"], row["text"]) for row in several}) == len(several)
        parsed = [task.parse(row["text"], rows[row["id"]]) for row in [*first, *several]]
        assert all(error is None for _, error in parsed)
        # without stirring it is the answer that takes no policy
        if name in ("esci_rerank", "quickstart"):
            assert all(
                task.parse(row["text"], rows[row["id"]])[0] == task.baseline_answer(rows[row["id"]])
                for row in calm
            )
        if name == "quickstart":
            thoughts = [row["text"].partition("</think>")[0] for row in made("--thought")]
            assert all(
                sorted(thought.split()) == sorted(rows[row["id"]]["text"].split())
                for thought, row in zip(thoughts, first)
            )


# ------------------------------------------------------------------------ evaluation and the table


def test_evaluate_gives_the_rows_that_the_run_wrote(run, tmp_path, script):
    config, folder = run
    assert (
        run_guarded(
            script("evaluate").main,
            [
                config,
                "--model",
                str(folder / "model"),
                "--out",
                str(tmp_path / "o/eval_after.jsonl"),
            ],
        )
        == 0
    )
    ours = jsonl(tmp_path / "o/eval_after.jsonl")
    theirs = jsonl(folder / "eval_after.jsonl")
    assert [(row["id"], row["text"], row["ndcg"], row["ndcg_raw"]) for row in ours] == [
        (row["id"], row["text"], row["ndcg"], row["ndcg_raw"]) for row in theirs
    ]


def test_table_is_of_the_rows_and_refuses_another_summary(
    run, capsys, monkeypatch, script, tmp_path
):
    _, folder = run
    table = script("table")
    monkeypatch.setattr("sys.argv", ["table.py", str(folder)])
    table.main()
    line = capsys.readouterr().out.splitlines()[2]
    after = jsonl(folder / "eval_after.jsonl")
    assert f"| {sum(row['ndcg'] for row in after) / len(after):.4f} |" in line
    assert line.startswith("| run |")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("summary.json", "eval_before.jsonl", "eval_after.jsonl"):
        (copy / name).write_text((folder / name).read_text())
    for name in ("eval_before.jsonl", "eval_after.jsonl"):
        (copy / name).write_text(
            "".join(
                json.dumps(row | dict(diversity_raw=0.25, diversity=0.5)) + "\n"
                for row in jsonl(folder / name)
            )
        )
    monkeypatch.setattr("sys.argv", ["table.py", str(copy)])
    table.main()
    assert (
        "| copy | diversity | 0.2500 | 0.5000 | 0.5000 | +0.2500 [+0.2500, +0.2500] | +0.0000 ["
        in capsys.readouterr().out
    )
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | dict(after=summary["after"] + 0.01)))
    monkeypatch.setattr("sys.argv", ["table.py", str(copy)])
    with pytest.raises(SystemExit, match="summary.json says after"):
        table.main()
    (copy / "summary.json").unlink()
    table.main()
    assert "not finished" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- questions


def test_sparse_queries_have_no_target_near_the_top(run, tmp_path, script):
    config, _ = run
    assert (
        run_guarded(
            script("sparse_queries").main,
            [config, "--beyond", "1", "--out", str(tmp_path / "s.jsonl")],
        )
        == 0
    )
    cfg = configs.load_config(config, [])
    setting = script("evaluate").Setting(cfg, cfg.model.path)
    kept = {row["id"] for row in jsonl(tmp_path / "s.jsonl")}
    every = {row["id"] for row in jsonl(Path(cfg.data.train_queries))}
    assert {id for id in every if is_validation(id)} <= kept
    for prompt in setting.train:
        [top] = setting.retriever.search([prompt.text], 1)[0].tolist()
        found = any(
            setting.qrels[prompt.id].get(setting.retriever.doc_ids[row], 0) > 0
            for row in top
            if row >= 0
        )
        assert (prompt.id in kept) == (not found and any(setting.qrels[prompt.id].values()))


def test_time_to_match(tmp_path, script, monkeypatch, capsys):
    def run_of(name, gains, wall):
        (tmp_path / name).mkdir()
        rows = [
            dict(
                step=i,
                timing_s=dict(step=2.0),
                **(dict(val_gain=g, val_gain_ci95=[g - 1, g + 1]) if g is not None else {}),
            )
            for i, g in enumerate(gains, 1)
        ]
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
        (tmp_path / name / "summary.json").write_text(json.dumps(dict(wall_s=wall)))
        return str(tmp_path / name)

    sft = run_of("sft", [0.5, None, 0.2], 60.0)
    grpo = run_of("grpo", [None, 0.1, None, 0.2, 0.9], 90.0)
    monkeypatch.setattr("sys.argv", ["x", sft, grpo, "--json"])
    script("time_to_match").main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["sft_gain"] == 0.2
    assert found["sft_wall_s"] == 60.0
    assert found["grpo_seconds"] == 8.0
    assert found["grpo_gain"] == 0.2
    monkeypatch.setattr("sys.argv", ["x", grpo, sft])
    script("time_to_match").main()
    assert "GRPO did not reach it" in capsys.readouterr().out


def test_steps_left_of_grpo_beside_sft(tmp_path):
    for name, summary in (
        ("grpo", dict(wall_s=300.0, steps=1000)),
        ("sft", dict(wall_s=120.0, steps=7)),
        ("long", dict(wall_s=400.0, steps=7)),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))

    def said(sft):
        return subprocess.run(
            [
                sys.executable,
                Path(__file__).parents[2] / "experiments/analysis/steps_left.py",
                tmp_path / "grpo",
                tmp_path / sft,
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert said("sft") == "600\n"
    assert said("long") == "1\n"


def test_by_history(tmp_path, script, monkeypatch, capsys):
    lengths = [0, 1, 3, 4, 10, 10]
    (tmp_path / "q.jsonl").write_text(
        "".join(
            json.dumps(dict(id=f"q{i}", text="x", history=[f"d{j}" for j in range(n)])) + "\n"
            for i, n in enumerate(lengths)
        )
    )
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(dict(id=f"q{i}", ndcg=0.1 * i, ndcg_raw=0.0)) + "\n" for i in range(6))
    )
    monkeypatch.setattr(
        "sys.argv", ["x", str(tmp_path / "rows.jsonl"), str(tmp_path / "q.jsonl"), "--json"]
    )
    script("by_history").main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["history"], row["n"], pytest.approx(row["gain"])) for row in found] == [
        ("0-1", 2, 0.05),
        ("2-4", 2, 0.25),
        ("10+", 2, 0.45),
    ]


def test_thoughts_are_perturbed_and_the_rest_is_kept(run, tmp_path, script, monkeypatch):
    """A policy in whose place stands a rule: it thinks four words and answers with the last word of
    whatever thought it is given.
    """
    config, folder = run
    perturb = script("perturb_thoughts")
    asked = []

    def greedy(policy, prompts, stops, most):
        tokenizer = setting.tokenizer
        rollouts = []
        for p in prompts:
            forced = tokenizer.decode(p.ids[own[p.id] :])
            asked.append(forced)
            thought = forced.partition("</think>")[0].split() or ["a", "b", "c", "lamp"]
            text = (
                "" if forced else " a b c lamp</think>"
            ) + f'<answer>{{"query": "{thought[-1]}"}}</answer>'
            rollouts.append(
                perturb_rollout(p, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
            )
        return rollouts

    from recr1.data_types import Rollout

    def perturb_rollout(p, ids):
        return Rollout(p, 0, 0, ids, (0.0,) * len(ids), True)

    setting = script("evaluate").Setting(configs.load_config(config, []), str(folder / "model"))
    own = {p.id: len(p.ids) for p in setting.test}
    monkeypatch.setattr(perturb, "generate_greedily", greedy)
    assert (
        run_guarded(
            perturb.main,
            [
                config,
                "--model",
                str(folder / "model"),
                "--out",
                str(tmp_path / "p.json"),
                "--queries",
                "5",
            ],
        )
        == 0
    )
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["queries"] == found["with_thought"] == 5
    assert found["unchanged"]["other_answer"][0] == 0.0
    assert found["cut"]["other_answer"][0] == 1.0
    assert 0 < found["shuffled"]["other_answer"][0] <= 1.0
    assert asked[5:10] == [" a b c lamp</think>"] * 5
    assert asked[10:15] == [" a b</think>"] * 5
