"""experiments/analysis/audit.py: the standard errors by hand and against a bootstrap; with lm-eval
installed, whole audits of the tiny policy on local rows.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.tiny_world import write_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from recr1.config.schema import ConfigError
from recr1.training.launch import run_guarded

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments/analysis"))
import audit  # noqa: E402

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason='lm-eval is not installed: pip install "recr1[audit]"',
)


# figures


def test_standard_error_of_a_mean_and_of_clusters():
    x = np.random.default_rng(0).integers(0, 2, 200).astype(float)
    expected = x.std(ddof=1) / 200**0.5
    assert audit.compute_stderr(x, np.ones(200)) == pytest.approx(expected, rel=1e-12)
    assert audit.compute_stderr(np.array([1.0]), np.array([1.0])) is None

    rng = np.random.default_rng(1)
    weight = rng.integers(1, 4, 300).astype(float)  # IFEval: one to three instructions a prompt
    total = rng.binomial(weight.astype(int), rng.beta(1, 1, 300)).astype(float)
    draws = rng.integers(300, size=(20_000, 300))
    means = total[draws].sum(1) / weight[draws].sum(1)
    assert audit.compute_stderr(total, weight) == pytest.approx(means.std(), rel=0.03)


def flatten(values) -> list[float]:
    """Flatten one value, or several, per document."""
    flat = []
    for value in values:
        flat += value if isinstance(value, list) else [value]
    return [float(value) for value in flat]


def make_samples(name, values, metric, how) -> list[dict]:
    samples = []
    for i, value in enumerate(values):
        sample = {"filter": how, "doc_id": i, "doc_hash": f"{name}{i}", metric: value}
        samples.append(sample)
    samples.append({"filter": "other", "doc_id": 0, "doc_hash": "", metric: 9.0})
    return samples


def make_results(tasks: dict[str, list], key="acc,none", group=None) -> dict:
    """Make what lm-eval returns, in small. tasks: one value per document, or a list of several."""
    metric, how = key.split(",")
    scores = {}
    samples = {}
    every = []
    for name, values in tasks.items():
        flat = flatten(values)
        every += flat
        scores[name] = {key: float(np.mean(flat)), f"{metric}_stderr,{how}": 0.1, "alias": name}
        samples[name] = make_samples(name, values, metric, how)
    if group:
        scores[group] = {key: sum(every) / len(every)}
    return dict(results=scores, higher_is_better={}, samples=samples)


def test_the_difference_is_paired():
    before = [0.0, 1.0, 1.0, 0.0, 1.0]
    after = [1.0, 1.0, 1.0, 0.0, 0.0]
    first = make_results(dict(t=before))
    second = make_results(dict(t=after))

    [row] = audit.compare_scores("t", ["t"], dict(before=first, after=second))
    difference = np.array(after) - before
    expected = difference.std(ddof=1) / 5**0.5
    assert row["before"] == 0.6
    assert row["after"] == 0.6
    assert row["n"] == 5
    assert row["difference"] == 0
    assert row["difference_stderr"] == pytest.approx(expected)

    [same] = audit.compare_scores("t", ["t"], dict(before=first, after=first))
    assert same["difference_stderr"] == 0  # two unpaired errors would say .35

    [alone] = audit.compare_scores("t", ["t"], dict(after=second))
    expected = np.std(after, ddof=1) / 5**0.5
    assert "difference" not in alone
    assert alone["stderr"] == pytest.approx(expected)


def test_a_group_is_all_of_its_documents():
    values = dict(a=[1.0, 0.0, 1.0], b=[0.0, 0.0, 0.0, 0.0, 1.0])
    after = make_results(values, group="g")

    [row] = audit.compare_scores("g", ["a", "b"], dict(after=after))

    expected = np.std([1, 0, 1, 0, 0, 0, 0, 1], ddof=1) / 8**0.5
    assert row["n"] == 8
    assert row["after"] == 3 / 8
    assert row["stderr"] == pytest.approx(expected)


def test_several_values_a_document_and_what_is_no_mean():
    several = [[True, False], [True], [False, False, True]]
    after = make_results(dict(t=several), "inst,none")
    [row] = audit.compare_scores("t", ["t"], dict(after=after))
    totals = np.array([1.0, 1.0, 1.0])
    weights = np.array([2.0, 1.0, 3.0])
    assert row["n"] == 3
    assert row["after"] == 0.5
    assert row["stderr"] == audit.compute_stderr(totals, weights)

    strange = make_results(dict(t=[1.0, 2.0, 3.0]))
    strange["results"]["t"]["acc,none"] = 7.5  # a perplexity, say
    [row] = audit.compare_scores("t", ["t"], dict(before=strange, after=strange))
    assert row["stderr"] is None
    assert row["difference_stderr"] is None
    assert row["difference"] == 0

    for sample in strange["samples"]["t"]:
        sample["acc"] = ("text", 3)
    rows = audit.compare_scores("t", ["t"], dict(after=strange))
    assert rows[0]["stderr"] is None

    before = make_results(dict(t=[1.0, 0.0]))
    other = make_results(dict(t=[1.0, 0.0]))
    other["samples"]["t"][0]["doc_hash"] = "another"
    with pytest.raises(ConfigError, match="same documents"):
        audit.compare_scores("t", ["t"], dict(before=before, after=other))


# asking


class Terminal:
    def isatty(self):
        return True


UNSAFE_MESSAGE = (
    "humaneval, mbpp run code that the model writes.*--confirm-unsafe-code.*--tasks ifeval,mmlu"
)


def test_nothing_runs_code_unasked(monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    tasks = ["ifeval", "mbpp", "humaneval", "mmlu"]
    monkeypatch.setattr(audit.sys, "stdin", open("/dev/null"))
    with pytest.raises(ConfigError, match=UNSAFE_MESSAGE):
        audit.confirm_unsafe_code(["humaneval", "mbpp"], tasks, False)

    monkeypatch.setattr(audit.sys, "stdin", Terminal())
    for answer in ("", "y", "no", "YES"):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        with pytest.raises(ConfigError, match="--confirm-unsafe-code"):
            audit.confirm_unsafe_code(["mbpp"], ["mbpp"], False)
    assert "HF_ALLOW_CODE_EVAL" not in audit.os.environ

    monkeypatch.setattr("builtins.input", lambda _: "yes ")
    audit.confirm_unsafe_code(["mbpp"], ["mbpp"], False)
    assert audit.os.environ.pop("HF_ALLOW_CODE_EVAL") == "1"

    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked although confirmed"))
    audit.confirm_unsafe_code(["mbpp"], ["mbpp"], True)
    assert audit.os.environ.pop("HF_ALLOW_CODE_EVAL") == "1"


def test_without_lm_eval_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run_guarded(audit.main, ["--model", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert 'pip install "recr1[audit]"' in err
    assert err.count("\n") == 1


# with lm-eval


COLORS = ["red", "green", "blue", "black", "white"]
ACCURACIES = [
    dict(metric="acc", aggregation="mean", higher_is_better=True),
    dict(metric="acc_norm", aggregation="mean", higher_is_better=True),
]
CHOICE = dict(
    output_type="multiple_choice",
    doc_to_text="{{question}}",
    doc_to_choice="{{choices}}",
    doc_to_target="{{answer}}",
    metric_list=ACCURACIES,
)
GENERATED = dict(
    output_type="generate_until",
    doc_to_text="{{question}}",
    doc_to_target="{{choices[answer]}}",
    generation_kwargs=dict(until=["\n"], max_gen_toks=4),
    metric_list=[dict(metric="exact_match", aggregation="mean", higher_is_better=True)],
)
# tasks on the rows
TASKS = dict(
    lamp_choice=CHOICE | dict(tag="lamps"),
    lamp_again=CHOICE | dict(doc_to_text="is it {{question}}", tag="lamps"),
    lamp_text=GENERATED,
    lamp_code=GENERATED | dict(unsafe_code=True),
)
# files that name other tasks
GROUPS = dict(
    lamp_included=dict(include="lamp_code.yaml", task="lamp_included"),
    lamp_group=dict(
        group="lamp_group",
        task=["lamp_choice", "lamp_again"],
        metadata=dict(version=1),
        aggregate_metric_list=[dict(metric="acc", weight_by_size=True)],
    ),
    lamp_both=dict(group="lamp_both", task=["lamp_text", "lamp_included"]),
)


def write_rows(path) -> None:
    """Write ten questions with three choices each."""
    lines = []
    for i, color in enumerate(COLORS * 2):
        choices = ["red", "green", "blue"]
        row = dict(question=f"a {color} lamp is", choices=choices, answer=i % 3)
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))


def write_task(folder, name, task) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two tiny policies, and tasks on local rows: choices by log-likelihood (two of them a group,
    with a tag), an answer by generation, and one that runs code.
    """
    folder = tmp_path_factory.mktemp("audit")
    rows = folder / "rows.jsonl"
    write_rows(rows)
    data = dict(
        dataset_path="json",
        dataset_kwargs=dict(data_files=dict(test=str(rows))),
        test_split="test",
        num_fewshot=0,
        metadata=dict(version=3.5),
    )
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, task in TASKS.items():
        write_task(tasks, name, data | task | dict(task=name))
    for name, group in GROUPS.items():
        write_task(tasks, name, group)
    before = write_policy(folder / "before", seed=0)
    after = write_policy(folder / "after", seed=1)
    return dict(tasks=str(tasks), rows=rows, before=before, after=after)


def run_audit(world, tasks, *more, before=True) -> int:
    argv = ["--model", world["after"], "--include-path", world["tasks"], "--tasks", tasks]
    argv += ["--device", "cpu", "--dtype", "float32"]
    if before:
        argv += ["--before", world["before"]]
    return run_guarded(audit.main, [*argv, *more])


def score_choice(model, tokenizer, question, choice) -> float:
    """Sum the log-probabilities of the choice's tokens behind the question, by transformers."""
    prompt = tokenizer(question, add_special_tokens=False)["input_ids"]
    ids = tokenizer(f"{question} {choice}", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    logps = logits.log_softmax(-1)
    total = 0.0
    for i in range(len(prompt), len(ids)):
        total += float(logps[i - 1, ids[i]])
    return total


def compute_accuracy(path, rows) -> float:
    """Compute lm-eval's accuracy again, from the policy's log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    hits = 0
    for row in rows:
        question = row["question"]
        scores = [score_choice(model, tokenizer, question, choice) for choice in row["choices"]]
        hits += int(np.argmax(scores)) == row["answer"]
    return hits / len(rows)


def find_line(text, row) -> str:
    """Find the printed line of a row of the result."""
    for line in text.splitlines():
        if line.startswith(f"{row['task']} ") and f" {row['metric']} " in line:
            return line
    pytest.fail(f"no line of {row['task']}, {row['metric']}")


@needs_lm_eval
def test_before_and_after_on_local_rows(world, tmp_path, capsys):
    out = tmp_path / "audit.json"

    assert run_audit(world, "lamp_choice,lamp_text", "--out", str(out)) == 0

    text = capsys.readouterr().out
    result = json.loads(out.read_text())
    settings = result["settings"]
    assert settings["tasks"]["lamp_choice"] == dict(version=3.5, fewshot=0)
    assert settings["documents"] == dict(lamp_choice=10, lamp_text=10)
    assert settings["chat_template"] is False
    assert settings["limit"] is None
    assert settings["unsafe_code"] == []
    assert "chat template off" in text

    rows = {(row["task"], row["metric"].split(",")[0]): row for row in result["rows"]}
    assert set(rows) == {
        ("lamp_choice", "acc"),
        ("lamp_choice", "acc_norm"),
        ("lamp_text", "exact_match"),
    }
    for row in rows.values():
        line = find_line(text, row)
        assert row["n"] == 10
        assert row["difference"] == pytest.approx(row["after"] - row["before"])
        assert row["difference_stderr"] is not None
        assert f"{row['difference']:+.4f}" in line
        assert f"{row['difference_stderr']:.4f}" in line

    documents = [json.loads(line) for line in world["rows"].read_text().splitlines()]
    accuracy = rows["lamp_choice", "acc"]
    assert len(documents) == 10
    for which in ("before", "after"):
        assert accuracy[which] == compute_accuracy(world[which], documents)


@needs_lm_eval
def test_groups_tags_limit_and_template(world, tmp_path, capsys):
    out = tmp_path / "audit.json"
    options = ["--limit", "4", "--chat-template", "--out", str(out)]
    assert run_audit(world, "lamp_group", *options) == 0
    result = json.loads(out.read_text())
    settings = result["settings"]
    [row] = result["rows"]
    assert row["task"] == "lamp_group"
    assert row["n"] == 8
    assert row["difference_stderr"] is not None
    assert settings["documents"] == dict(lamp_choice=4, lamp_again=4)
    assert settings["chat_template"] is True
    hashes = set(settings["chat_template_sha256"].values())
    assert len(hashes) == 1

    out.unlink()
    capsys.readouterr()
    assert run_audit(world, "lamps", "--limit", "2", "--out", str(out), before=False) == 0
    text = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert {row["task"] for row in result["rows"]} == {"lamp_choice", "lamp_again"}
    for row in result["rows"]:
        assert "difference" not in row
    assert "first 2 documents" in text
    assert "difference" not in text


@needs_lm_eval
@pytest.mark.parametrize(
    "tasks", ["lamp_code", "lamp_included", "lamp_both"], ids=["task", "included", "group"]
)
def test_code_that_a_model_writes_is_asked_about_before_anything_runs(
    tasks, world, capsys, monkeypatch
):
    def fail_to_load(*_):
        pytest.fail("a task was loaded before the question")

    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    monkeypatch.setattr(audit, "load_task", fail_to_load)
    monkeypatch.setattr(audit.sys, "stdin", open("/dev/null"))

    assert run_audit(world, tasks) == 2

    err = capsys.readouterr().err
    assert "code that the model writes" in err
    assert "--confirm-unsafe-code" in err
    assert err.count("\n") == 1


@needs_lm_eval
def test_confirmed_code_tasks_run(world, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    out = tmp_path / "audit.json"
    options = ["--limit", "2", "--confirm-unsafe-code", "--out", str(out)]

    assert run_audit(world, "lamp_both", *options, before=False) == 0

    settings = json.loads(out.read_text())["settings"]
    assert settings["unsafe_code"] == ["lamp_included"]


@needs_lm_eval
def test_upstreams_five_tasks_are_in_lm_evals_index():
    """Read from their files, nothing loaded or downloaded: all exist, and exactly those that
    lm-eval marks run code.
    """
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    unsafe = set()
    for name in audit.TASKS.split(","):
        leaves = audit.list_leaf_tasks(index, name)
        if any(audit.runs_code(index, leaf) for leaf in leaves):
            unsafe.add(name)

    assert unsafe == {"mbpp", "humaneval"}
    assert len(audit.list_leaf_tasks(index, "mmlu")) == 57
    assert audit.runs_code(index, "humaneval_instruct")
    assert audit.runs_code(index, "mbpp_plus")


def read_only_line(capsys) -> str:
    """Read the one line that was said of an error."""
    err = capsys.readouterr().err
    assert err.startswith("recr1: ")
    assert err.count("\n") == 1
    return err


@needs_lm_eval
def test_what_is_wrong_is_one_line(world, capsys, tmp_path):
    assert run_audit(world, "lampp") == 2
    assert "no 'lampp'" in read_only_line(capsys)

    task = dict(
        task="lamp_gone",
        dataset_path="json",
        dataset_kwargs=dict(data_files=dict(test=str(tmp_path / "gone.jsonl"))),
        test_split="test",
        output_type="multiple_choice",
        doc_to_text="x",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[dict(metric="acc")],
    )
    write_task(Path(world["tasks"]), "lamp_gone", task)
    assert run_audit(world, "lamp_gone") == 2
    assert "lamp_gone: lm-eval cannot load it" in read_only_line(capsys)

    argv = ["--model", str(tmp_path / "none"), "--include-path", world["tasks"]]
    assert run_guarded(audit.main, [*argv, "--tasks", "lamp_text"]) == 2
    assert "neither a folder nor a hub id" in capsys.readouterr().err
