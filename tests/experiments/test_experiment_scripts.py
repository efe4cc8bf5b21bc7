"""The scripts under experiments/ that stand around runs: cold starts, evaluation elsewhere, the
open questions, the table; and a config's base.
"""

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
from recr1.data_types import Rollout
from recr1.tasks import registry as tasks
from recr1.training.launch import run_guarded

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train two steps; the config, and the folder of the run."""
    folder = tmp_path_factory.mktemp("scripts")
    config = write_yaml(folder, **{"train.steps": 2, "train.eval_every": 1})
    assert run_guarded(train.main, [config, f"run.dir={folder / 'run'}"]) == 0
    return config, folder / "run"


def write_jsonl(path, rows) -> None:
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))


# -------------------------------------------------------------------------------------------- base


def test_a_base_lies_below_the_config(tmp_path):
    base = "task: product_search\nloss: {clip_ratio_low: 0.3, kl_coef: 0.5}\nreward: {k_eval: 7}\n"
    (tmp_path / "b").mkdir()
    (tmp_path / "b/base.yaml").write_text(base)
    (tmp_path / "own.yaml").write_text("base: b/base.yaml\nloss: {clip_ratio_low: 0.1}\n")

    cfg = configs.load_config(str(tmp_path / "own.yaml"), ["loss.kl_coef=0.25"])

    assert cfg.loss.clip_ratio_low == 0.1
    assert cfg.loss.kl_coef == 0.25
    assert cfg.reward.k_eval == 7


BAD_BASES = [
    ("base: nowhere.yaml", "own.yaml: base: .*nowhere.yaml: no such file"),
    ("base: two.yaml", "one level is all there is"),
    ("base: [a]", "own.yaml: base"),
    ("base: list.yaml", "list.yaml: expected `key: value` lines"),
]


@pytest.mark.parametrize("text, message", BAD_BASES)
def test_a_base_that_is_none_is_named(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    (tmp_path / "two.yaml").write_text("base: own.yaml")
    (tmp_path / "list.yaml").write_text("- a")

    with pytest.raises(ConfigError, match=message):
        configs.load_config(str(tmp_path / "own.yaml"), [])


# ------------------------------------------------------------------------------------- cold starts


COLD_STARTS = ["movielens_sequential", "esci_rerank", "movielens_list", "quickstart"]


def assert_texts_parse(task, texts, rows):
    for row in texts:
        _, error = task.parse(row["text"], rows[row["id"]])
        assert error is None


def assert_texts_are_baseline_answers(task, texts, rows):
    for row in texts:
        query = rows[row["id"]]
        answer, _ = task.parse(row["text"], query)
        assert answer == task.baseline_answer(query)


def assert_thoughts_are_shuffled_queries(texts, rows):
    for row in texts:
        thought, _, _ = row["text"].partition("</think>")
        query = rows[row["id"]]["text"]
        assert sorted(thought.split()) == sorted(query.split())


@pytest.mark.parametrize("name", COLD_STARTS)
def test_cold_start_texts_are_answers_of_the_task(name, tmp_path, script):
    cold = script("cold_start")
    out = tmp_path / "t.jsonl"
    with tiny_world(name, tmp_path) as config:

        def write_texts(*options) -> list[dict]:
            assert run_guarded(cold.main, [config, "--out", str(out), *options]) == 0
            return jsonl(out)

        cfg = configs.load_config(config, [])
        task = tasks.build_task(cfg)
        rows = {row["id"]: row for row in jsonl(Path(cfg.data.train_queries))}

        first = write_texts()
        assert write_texts() == first
        ids = {row["id"] for row in first}
        assert len(ids) == len(first)
        assert len(first) > 40
        for id in ids:
            assert not is_validation(id)

        several = write_texts("--copies", "6")
        assert len(several) > len(first)
        distinct = {(row["id"], row["text"]) for row in several}
        assert len(distinct) == len(several)
        assert_texts_parse(task, first, rows)
        assert_texts_parse(task, several, rows)

        # without stirring it is the answer that takes no policy
        calm = write_texts("--stir", "0")
        if name in ("esci_rerank", "quickstart"):
            assert_texts_are_baseline_answers(task, calm, rows)
        if name == "quickstart":
            thoughts = write_texts("--thought")
            assert [row["id"] for row in thoughts] == [row["id"] for row in first]
            assert_thoughts_are_shuffled_queries(thoughts, rows)


# ------------------------------------------------------------------------ evaluation and the table


def test_evaluate_gives_the_rows_that_the_run_wrote(run, tmp_path, script):
    config, folder = run
    out = tmp_path / "o/eval_after.jsonl"
    options = ["--model", str(folder / "model"), "--out", str(out)]

    assert run_guarded(script("evaluate").main, [config, *options]) == 0

    ours = jsonl(out)
    theirs = jsonl(folder / "eval_after.jsonl")
    assert len(ours) == len(theirs)
    for row, expected in zip(ours, theirs):
        for key in ("id", "text", "ndcg", "ndcg_raw"):
            assert row[key] == expected[key]


def print_table(table, folder, monkeypatch, capsys) -> str:
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["table.py", str(folder)])
    table.main()
    return capsys.readouterr().out


def copy_with_diversity(folder, copy) -> None:
    """Copy what the table reads, with a second metric in the rows."""
    copy.mkdir()
    (copy / "summary.json").write_text((folder / "summary.json").read_text())
    for name in ("eval_before.jsonl", "eval_after.jsonl"):
        rows = []
        for row in jsonl(folder / name):
            rows.append(row | dict(diversity_raw=0.25, diversity=0.5))
        write_jsonl(copy / name, rows)


DIVERSITY = "| copy | diversity | 0.2500 | 0.5000 | 0.5000 | +0.2500 [+0.2500, +0.2500] | +0.0000 ["


def test_table_is_of_the_rows_and_refuses_another_summary(
    run, capsys, monkeypatch, script, tmp_path
):
    _, folder = run
    table = script("table")

    line = print_table(table, folder, monkeypatch, capsys).splitlines()[2]
    after = jsonl(folder / "eval_after.jsonl")
    mean = sum(row["ndcg"] for row in after) / len(after)
    assert f"| {mean:.4f} |" in line
    assert line.startswith("| run |")

    copy = tmp_path / "copy"
    copy_with_diversity(folder, copy)
    assert DIVERSITY in print_table(table, copy, monkeypatch, capsys)

    summary = json.loads((copy / "summary.json").read_text())
    summary["after"] += 0.01
    (copy / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(SystemExit, match="summary.json says after"):
        table.main()

    (copy / "summary.json").unlink()
    assert "not finished" in print_table(table, copy, monkeypatch, capsys)


# --------------------------------------------------------------------------------------- questions


def finds_relevant_first(setting, prompt) -> bool:
    [top] = setting.retriever.search([prompt.text], 1)[0].tolist()
    judged = setting.qrels[prompt.id]
    documents = [setting.retriever.doc_ids[row] for row in top if row >= 0]
    return any(judged.get(doc, 0) > 0 for doc in documents)


def test_sparse_queries_have_no_target_near_the_top(run, tmp_path, script):
    config, _ = run
    out = tmp_path / "s.jsonl"

    options = ["--beyond", "1", "--out", str(out)]
    assert run_guarded(script("sparse_queries").main, [config, *options]) == 0

    cfg = configs.load_config(config, [])
    setting = script("evaluate").Setting(cfg, cfg.model.path)
    sparse = {row["id"] for row in jsonl(out)}
    for row in jsonl(Path(cfg.data.train_queries)):
        if is_validation(row["id"]):
            assert row["id"] in sparse
    for prompt in setting.train:
        is_hard = not finds_relevant_first(setting, prompt)
        has_relevant = any(setting.qrels[prompt.id].values())
        assert (prompt.id in sparse) == (is_hard and has_relevant)


def write_run(folder, gains, wall) -> str:
    """Write a run whose steps take two seconds; a gain of None: no validation in that step."""
    folder.mkdir()
    rows = []
    for step, gain in enumerate(gains, 1):
        row = dict(step=step, timing_s=dict(step=2.0))
        if gain is not None:
            row["val_gain"] = gain
            row["val_gain_ci95"] = [gain - 1, gain + 1]
        rows.append(row)
    write_jsonl(folder / "metrics.jsonl", rows)
    (folder / "summary.json").write_text(json.dumps(dict(wall_s=wall)))
    return str(folder)


def test_time_to_match(tmp_path, script, monkeypatch, capsys):
    sft = write_run(tmp_path / "sft", [0.5, None, 0.2], 60.0)
    grpo = write_run(tmp_path / "grpo", [None, 0.1, None, 0.2, 0.9], 90.0)

    monkeypatch.setattr("sys.argv", ["x", sft, grpo, "--json"])
    script("time_to_match").main()
    last = capsys.readouterr().out.splitlines()[-1]
    match = json.loads(last)
    assert match["sft_gain"] == 0.2
    assert match["sft_wall_s"] == 60.0
    assert match["grpo_seconds"] == 8.0
    assert match["grpo_gain"] == 0.2

    monkeypatch.setattr("sys.argv", ["x", grpo, sft])
    script("time_to_match").main()
    assert "GRPO did not reach it" in capsys.readouterr().out


SUMMARIES = {
    "grpo": dict(wall_s=300.0, steps=1000),
    "sft": dict(wall_s=120.0, steps=7),
    "long": dict(wall_s=400.0, steps=7),
}


def test_steps_left_of_grpo_beside_sft(tmp_path):
    for name, summary in SUMMARIES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))

    def print_steps_left(sft):
        path = ROOT / "experiments/analysis/steps_left.py"
        command = [sys.executable, path, tmp_path / "grpo", tmp_path / sft]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert print_steps_left("sft") == "600\n"
    assert print_steps_left("long") == "1\n"


def test_by_history(tmp_path, script, monkeypatch, capsys):
    queries = []
    rows = []
    for i, length in enumerate([0, 1, 3, 4, 10, 10]):
        history = [f"d{j}" for j in range(length)]
        queries.append(dict(id=f"q{i}", text="x", history=history))
        rows.append(dict(id=f"q{i}", ndcg=0.1 * i, ndcg_raw=0.0))
    write_jsonl(tmp_path / "q.jsonl", queries)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    argv = ["x", str(tmp_path / "rows.jsonl"), str(tmp_path / "q.jsonl"), "--json"]
    monkeypatch.setattr("sys.argv", argv)

    script("by_history").main()

    last = capsys.readouterr().out.splitlines()[-1]
    groups = json.loads(last)
    assert [row["history"] for row in groups] == ["0-1", "2-4", "10+"]
    assert [row["n"] for row in groups] == [2, 2, 2]
    gains = [row["gain"] for row in groups]
    assert gains == pytest.approx([0.05, 0.25, 0.45])


def test_thoughts_are_perturbed_and_the_rest_is_kept(run, tmp_path, script, monkeypatch):
    """A policy in whose place stands a rule: it thinks four words and answers with the last word of
    whatever thought it is given.
    """
    config, folder = run
    perturb = script("perturb_thoughts")
    cfg = configs.load_config(config, [])
    setting = script("evaluate").Setting(cfg, str(folder / "model"))
    tokenizer = setting.tokenizer
    lengths = {prompt.id: len(prompt.ids) for prompt in setting.test}
    asked = []

    def answer(prompt):
        forced = tokenizer.decode(prompt.ids[lengths[prompt.id] :])
        asked.append(forced)
        thought, _, _ = forced.partition("</think>")
        words = thought.split() or ["a", "b", "c", "lamp"]
        text = f'<answer>{{"query": "{words[-1]}"}}</answer>'
        if not forced:
            text = " a b c lamp</think>" + text
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        return Rollout(prompt, 0, 0, ids, (0.0,) * len(ids), True)

    def answer_all(policy, prompts, stops, most):
        return [answer(prompt) for prompt in prompts]

    monkeypatch.setattr(perturb, "generate_greedily", answer_all)
    out = tmp_path / "p.json"
    options = ["--model", str(folder / "model"), "--out", str(out), "--queries", "5"]

    assert run_guarded(perturb.main, [config, *options]) == 0

    result = json.loads(out.read_text())
    assert result["queries"] == 5
    assert result["with_thought"] == 5
    assert result["unchanged"]["other_answer"][0] == 0.0
    assert result["cut"]["other_answer"][0] == 1.0
    assert 0 < result["shuffled"]["other_answer"][0] <= 1.0
    assert asked[5:10] == [" a b c lamp</think>"] * 5
    assert asked[10:15] == [" a b</think>"] * 5
