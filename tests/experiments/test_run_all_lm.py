"""experiments/run_all_lm.sh and what it is made of: every row in small, with a tiny Llama and a
tiny encoder; stopping and going on; what its scripts and their options compute.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.encoders import write_encoder
from helpers.small_checkout import write_small_checkout
from helpers.tiny_world import jsonl, refused, write_policy, write_yaml
from helpers.warm_python import write_python

from recr1.config import loader as configs
from recr1.data.readers import is_validation
from recr1.tasks.answer_parser import parse_query
from recr1.training.launch import run_guarded
from recr1.training.run_dir import find_difference

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "experiments/configs/cpu"
SEEDED = ("plots_sft", "plots_bm25", "plots_exact", "plots_hnsw")

# key=value for every training and evaluation: two steps of two prompts. The tiny tokenizer has a
# token for two letters or so.
SMALL = (
    "run.threads=1",
    "train.steps=2",
    "train.prompts_per_step=2",
    "train.eval_every=2",
    "train.eval_queries=2",
    "prompt.max_tokens=2048",
    "sampling.group_size=4",
    "sampling.max_new_tokens=160",
    "retriever.scorer=torch",
    "retriever.max_length=64",
)


def list_settings(folder: Path) -> dict[str, str]:
    """Return the environment of a script: a virtual environment in `folder` that has everything."""
    return os.environ | dict(
        VIRTUAL_ENV=str(folder), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", LC_ALL="C.UTF-8"
    )


def write_stamp(checkout: Path, folder: Path) -> None:
    """Write what set_up leaves where everything is installed (experiments/setup_env.sh)."""
    script = 'cat "$1/setup.py" "$1/experiments/constraints.txt" | { echo "$1"; cat; } | cksum'
    command = ["bash", "-c", script, "bash", str(checkout)]
    want = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    (folder / ".recr1-setup").write_text(f"{want} dev\n")


@pytest.fixture(scope="module")
def warm_python(tmp_path_factory):
    """The folder of a virtual environment whose python starts at once."""
    folder = tmp_path_factory.mktemp("venv")
    address = folder / "socket"
    write_python(folder / "bin/python", address)
    server_file = ROOT / "tests/helpers/warm_python.py"
    server = subprocess.Popen(
        [sys.executable, str(server_file), str(address)], env=list_settings(folder)
    )
    while not address.exists():
        assert server.poll() is None
        time.sleep(0.05)
    yield folder
    server.terminate()
    server.wait()


class Rows:
    """run_all_lm.sh in a checkout in small."""

    def __init__(self, folder: Path, python: Path):
        self.checkout = write_small_checkout(folder / "checkout")
        self.out = self.checkout / "runs/small"
        write_stamp(self.checkout, python)
        model = write_policy(folder / "llama", family="llama", max_position_embeddings=4096)
        encoder = write_encoder(folder / "encoder")
        self.settings = list_settings(python) | dict(LM_MODEL=model, LM_ENCODER=encoder)

    def run(self) -> subprocess.CompletedProcess:
        script = self.checkout / "experiments/run_all_lm.sh"
        command = ["bash", str(script), "runs/small", *SMALL]
        return subprocess.run(command, env=self.settings, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rows(warm_python, tmp_path_factory):
    """All rows, run once; what the script printed."""
    rows = Rows(tmp_path_factory.mktemp("rows"), warm_python)
    rows.result = rows.run()
    return rows


# --- all rows in small ----------------------------------------------------------------------------


def test_every_row_passes_in_small(rows):
    assert rows.result.returncode == 0, rows.result.stdout
    assert "failed" not in rows.result.stdout
    assert rows.result.stderr == ""


def list_commands(rows) -> dict[str, str]:
    """List step -> command, of the steps that are done."""
    commands = {}
    for path in (rows.out / "done").iterdir():
        _, command = path.read_text().rstrip("\n").split("\t")
        commands[path.name] = command
    return commands


def test_every_training_has_two_steps(rows):
    commands = list_commands(rows)
    trainings = [name for name, command in commands.items() if command.startswith("python -m")]
    assert len(trainings) > 20
    for name in trainings:
        summary = json.loads((rows.out / name / "summary.json").read_text())
        assert summary["steps"] == 2, name


def test_every_config_of_the_language_model_has_a_row(rows):
    commands = " ".join(list_commands(rows).values())
    names = [path.name for path in CPU.glob("lm_*.yaml")]
    assert len(names) > 10
    for name in [*names, "plots_sft.yaml", "plots_grpo.yaml"]:
        assert f"experiments/configs/cpu/{name} " in commands, name


def test_the_results_have_every_run_and_the_mean_over_seeds(rows):
    text = (rows.out / "RESULTS.md").read_text()
    runs = [path.parent.name for path in rows.out.glob("*/summary.json")]
    for run in runs:
        assert f"\n| {run} | " in text, run
    assert "not finished" not in text
    for name in SEEDED:
        assert re.search(rf"\n\| {name} \| ndcg@100 \| 3 \| [\d.]+ ± [\d.]+ \|", text), name
        seeds = set()
        for seed in range(3):
            summary = json.loads((rows.out / f"{name}_seed{seed}/summary.json").read_text())
            seeds.add(summary["seed"])
        assert seeds == {0, 1, 2}
    for evaluation in ("zero_shot", "next_film_inductive"):
        assert f"\n| {evaluation} | " in text


def test_the_transfer_is_between_the_two_retrievers(rows):
    log = (rows.out / "transfer_exact_hnsw_seed1.log").read_text()
    *_, figures = log.splitlines()
    pairs = set()
    for row in json.loads(figures):
        pairs.add((Path(row["run"]).name, row["searched_with"]))
    for run in ("plots_bm25_seed1", "plots_exact_seed1", "plots_hnsw_seed1"):
        assert (run, "bm25") in pairs
        assert (run, "dense") in pairs
    assert "HNSW" in log


def test_the_sparse_rows_have_no_target_within_the_first_100(rows):
    """No plot of a film finds it but those that name the director, every third one."""
    train = jsonl(rows.out / "beyond100.jsonl")
    learned = [row for row in train if not is_validation(row["id"])]
    assert len(learned) > 50
    for row in learned:
        assert "Lee" not in row["text"]


def test_what_is_finished_is_skipped(rows):
    (rows.out / "done/esci_sft").unlink()  # as of a run that was copied there

    again = rows.run()

    assert again.returncode == 0, again.stdout
    *steps, last = again.stdout.splitlines()
    assert "RESULTS.md" in last
    for line in steps:
        assert line.endswith(": done before"), line
    assert len(steps) >= len(list_commands(rows))


# --- rows that differ in one thing differ in nothing else -----------------------------------------


def load(name: str, *overrides: str):
    return configs.load_config(str(CPU / f"{name}.yaml"), list(overrides))


def list_differing_keys(name: str, other: str) -> set[str]:
    """List the settings in which two configs differ, without their folders."""
    cfg = load(name, "run.dir=here")
    tree = dataclasses.asdict(load(other, "run.dir=here"))
    keys = set()
    while True:
        difference = find_difference(tree, cfg)
        if not difference:
            return keys
        key, _, _ = difference.partition(" was ")
        keys.add(key)
        section, _, last = key.partition(".")
        tree[section][last] = getattr(getattr(cfg, section), last)


RETRIEVER = {
    "retriever.encoder",
    "retriever.index_dir",
    "retriever.kind",
    "retriever.max_length",
    "retriever.pooling",
    "retriever.repeat_terms",
    "retriever.scorer",
}
PAIRS = [
    ("lm_plots_dense", "plots_grpo", RETRIEVER),
    ("lm_plots_sparse", "plots_grpo", {"data.train_queries", "reward.k_train"}),
    (
        "lm_plots_thought",
        "plots_grpo",
        {"prompt.assistant", "sampling.max_new_tokens", "model.path"},
    ),
    (
        "lm_plots_thought_sft",
        "plots_sft",
        {"prompt.assistant", "sampling.max_new_tokens", "sft.teacher"},
    ),
]


@pytest.mark.parametrize("name, other, expected", PAIRS)
def test_rows_that_are_compared_differ_in_what_is_asked_alone(name, other, expected):
    assert list_differing_keys(name, other) == expected


# --- steps: stopped, failed, gone on --------------------------------------------------------------


TWO_STEPS = """set -euo pipefail
source experiments/run_steps.sh
out="$1"; more=(); PYTHON="$2"
train first configs/cpu/plots_grpo
train second configs/cpu/plots_grpo
end_steps
"""
# As a training: it saves and ends with 0 when it is asked to stop, and finishes the second time.
TRAINING = """#!/bin/bash
if [[ "$1" == *table.py ]]; then echo results; exit; fi
folder="${4#run.dir=}"
mkdir -p "$folder"
if [[ -f "$folder/config.yaml" || "$folder" == */second ]]; then
    touch "$folder/config.yaml" "$folder/summary.json"
    exit
fi
trap 'echo saved; exit 0' TERM
touch "$folder/config.yaml"
for _ in {1..1000}; do sleep 0.01; done
exit 3
"""


@pytest.fixture
def steps(tmp_path):
    """The command of a script of two trainings."""
    python = tmp_path / "python"
    python.write_text(TRAINING)
    python.chmod(0o755)
    script = tmp_path / "two_steps.sh"
    script.write_text(TWO_STEPS)
    return ["bash", str(script), str(tmp_path / "out"), str(python)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_script_that_is_asked_to_stop_goes_on_from_there(steps, tmp_path, number):
    out = tmp_path / "out"
    process = subprocess.Popen(steps, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (out / "first/config.yaml").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "run the same command again" in printed
    assert (out / "first.log").read_text() == "saved\n"
    assert not (out / "done/first").exists()
    assert not (out / "second").exists()

    again = subprocess.run(steps, cwd=ROOT, capture_output=True, text=True)

    assert again.returncode == 0
    assert (out / "done/first").exists()
    assert (out / "done/second").exists()
    assert (out / "RESULTS.md").read_text() == "results\n"


def test_a_training_without_a_summary_has_failed(steps, tmp_path):
    """It ends with 3 here; the steps behind it run all the same."""
    python = Path(steps[3])
    python.write_text(TRAINING.replace("{1..1000}", "1"))

    result = subprocess.run(steps, cwd=ROOT, capture_output=True, text=True)

    assert result.returncode == 1
    assert result.stdout.endswith("failed: first\n")
    assert not (tmp_path / "out/done/first").exists()
    assert (tmp_path / "out/done/second").exists()


# --- scripts and options --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A config, and its train queries without validation."""
    config = write_yaml(tmp_path_factory.mktemp("world"))
    queries = {}
    for row in jsonl(Path(configs.load_config(config, []).data.train_queries)):
        if not is_validation(row["id"]):
            queries[row["id"]] = row["text"]
    return config, queries


def make_cold_start(script, config: str, out: Path, *options: str) -> dict[str, str]:
    """Return {query id: text} of the file that cold_start.py writes."""
    arguments = [config, "--out", str(out), *options]
    assert run_guarded(script("cold_start").main, arguments) == 0
    return {row["id"]: row["text"] for row in jsonl(out)}


def list_targets(config: str) -> dict[str, str]:
    """Return {query id: title of its one relevant product}."""
    data = configs.load_config(config, []).data
    titles = {row["id"]: row["title"] for row in jsonl(Path(data.corpus))}
    targets = {}
    for line in Path(data.train_qrels).read_text().splitlines():
        query, product, _ = line.split("\t")
        targets[query] = titles[product]
    return targets


def test_a_query_of_the_target_is_its_title(world, script, tmp_path):
    config, queries = world
    titles = list_targets(config)
    texts = make_cold_start(script, config, tmp_path / "t.jsonl", "--target", "--stir", "0")
    assert texts.keys() == queries.keys()
    for id, text in texts.items():
        assert parse_query(text) == (titles[id], None)


def test_a_thought_names_the_target_before_a_given_answer(world, script, tmp_path):
    config, queries = world
    titles = list_targets(config)
    given = {id: f'<answer>{{"query": "q{id}"}}</answer>' for id in list(queries)[:9]}
    answers = tmp_path / "answers.jsonl"
    lines = [json.dumps(dict(id=id, text=f"</think>{text}")) + "\n" for id, text in given.items()]
    answers.write_text("".join(lines))

    texts = make_cold_start(
        script, config, tmp_path / "t.jsonl", "--answers", str(answers), "--thought", "title"
    )

    assert texts == {id: f" {titles[id]}</think>{text}" for id, text in given.items()}


def test_no_thought_is_ended_where_the_prompt_ends_it(world, script, tmp_path, capsys):
    config, _ = world
    closed = "prompt.assistant=<think></think>"
    for text in make_cold_start(script, config, tmp_path / "t.jsonl", closed).values():
        assert text.startswith("<answer>")

    cold = script("cold_start")
    line = refused(
        [config, closed, "--out", str(tmp_path / "u.jsonl"), "--thought"], capsys, cold.main
    )
    assert "prompt.assistant" in line


def test_some_queries_are_drawn_by_the_seed(world, script, tmp_path):
    config, queries = world

    def draw(*options: str) -> list[str]:
        return list(make_cold_start(script, config, tmp_path / "t.jsonl", *options))

    some = draw("--queries", "10")
    assert len(some) == 10
    assert some == [id for id in queries if id in some]
    assert draw("--queries", "10") == some
    assert draw("--queries", "10", "--seed", "1") != some
    assert draw("--queries", "1000") == list(queries)


def test_a_sample_has_all_of_validation(world, script, tmp_path):
    config, queries = world
    out = tmp_path / "s.jsonl"
    arguments = [config, "--queries", "7", "--out", str(out)]
    assert run_guarded(script("sample_queries").main, arguments) == 0

    all_rows = jsonl(Path(configs.load_config(config, []).data.train_queries))
    validation = [row["id"] for row in all_rows if is_validation(row["id"])]
    sample = [row["id"] for row in jsonl(out)]
    drawn = [id for id in sample if id in queries]
    assert len(drawn) == 7
    assert [id for id in sample if id not in queries] == validation


def write_evaluation(path: Path, scores: list[float], raw_ranks: list[int]) -> str:
    """Write rows of an evaluation; a raw rank of 0: nothing was found."""
    lines = []
    for number, (score, rank) in enumerate(zip(scores, raw_ranks)):
        row = dict(id=f"q{number}", ndcg=score, ndcg_raw=0.25)
        row |= dict(mrr=score, mrr_raw=1 / rank if rank else 0.0)
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return str(path)


def run_with_json(module, monkeypatch, capsys, *arguments: str) -> list[dict]:
    monkeypatch.setattr("sys.argv", ["x", *arguments, "--json"])
    capsys.readouterr()
    module.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_gains_by_the_raw_answers_rank(script, tmp_path, monkeypatch, capsys):
    rows = write_evaluation(
        tmp_path / "e.jsonl", [0.5, 0.25, 0.75, 1.0, 0.0, 0.25], [1, 2, 10, 11, 100, 0]
    )
    bands = run_with_json(script("by_raw_rank"), monkeypatch, capsys, rows)
    assert [band["raw_rank"] for band in bands] == [[1, 1], [2, 10], [11, 100], None]
    assert [band["n"] for band in bands] == [1, 2, 2, 1]
    assert [band["gain"] for band in bands] == pytest.approx([0.25, 0.25, 0.25, 0.0])


def test_runs_are_compared_with_the_first_one(script, tmp_path, monkeypatch, capsys):
    ranks = [1, 1, 1, 1]
    first = write_evaluation(tmp_path / "a.jsonl", [0.5, 0.5, 0.0, 1.0], ranks)
    same = write_evaluation(tmp_path / "b.jsonl", [0.5, 0.5, 0.0, 1.0], ranks)
    better = write_evaluation(tmp_path / "c.jsonl", [0.75, 0.75, 0.25, 1.0], ranks)
    compare = script("compare_runs")

    equal, higher = run_with_json(compare, monkeypatch, capsys, first, same, better)

    assert equal["difference"] == 0
    assert equal["p"] == 1
    assert higher["compared_with"] == first
    assert higher["difference"] == pytest.approx(0.1875)
    low, high = higher["difference_ci95"]
    assert 0 <= low < 0.1875 < high <= 0.25

    short = write_evaluation(tmp_path / "d.jsonl", [0.5], [1])
    with pytest.raises(SystemExit, match="other test queries"):
        run_with_json(compare, monkeypatch, capsys, first, short)
