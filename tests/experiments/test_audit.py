"""experiments/analysis/audit.py: the standard errors by hand and against a bootstrap; with lm-eval
installed, whole audits of the tiny policy on local rows.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.tiny_world import write_policy

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
    assert audit.compute_stderr(x, np.ones(200)) == pytest.approx(
        x.std(ddof=1) / 200**0.5, rel=1e-12
    )
    assert audit.compute_stderr(np.array([1.0]), np.array([1.0])) is None
    rng = np.random.default_rng(1)
    weight = rng.integers(1, 4, 300).astype(float)  # IFEval: one to three instructions a prompt
    total = rng.binomial(weight.astype(int), rng.beta(1, 1, 300)).astype(float)
    draws = rng.integers(300, size=(20_000, 300))
    bootstrap = (total[draws].sum(1) / weight[draws].sum(1)).std()
    assert audit.compute_stderr(total, weight) == pytest.approx(bootstrap, rel=0.03)


def results(values: dict[str, list], key="acc,none", group=None) -> dict:
    """What lm-eval returns, in small. values: task -> one value per document."""
    metric, how = key.split(",")
    flat = [
        float(v)
        for row in values.values()
        for value in row
        for v in (value if isinstance(value, list) else [value])
    ]
    scores = {
        name: {
            key: float(np.mean(np.concatenate([np.atleast_1d(v) for v in row]))),
            f"{metric}_stderr,{how}": 0.1,
            "alias": name,
        }
        for name, row in values.items()
    }
    return dict(
        results=scores | ({group: {key: sum(flat) / len(flat)}} if group else {}),
        higher_is_better={},
        samples={
            name: [
                {"filter": how, "doc_id": i, "doc_hash": f"{name}{i}", metric: v}
                for i, v in enumerate(row)
            ]
            + [{"filter": "other", "doc_id": 0, "doc_hash": "", metric: 9.0}]
            for name, row in values.items()
        },
    )


def test_the_difference_is_paired():
    before = [0.0, 1.0, 1.0, 0.0, 1.0]
    after = [1.0, 1.0, 1.0, 0.0, 0.0]
    [row] = audit.compare_scores(
        "t", ["t"], dict(before=results(dict(t=before)), after=results(dict(t=after)))
    )
    difference = np.array(after) - before
    assert (row["before"], row["after"], row["n"]) == (0.6, 0.6, 5)
    assert row["difference"] == 0
    assert row["difference_stderr"] == pytest.approx(difference.std(ddof=1) / 5**0.5)
    [same] = audit.compare_scores(
        "t", ["t"], dict(before=results(dict(t=before)), after=results(dict(t=before)))
    )
    assert same["difference_stderr"] == 0  # two unpaired errors would say .35
    [alone] = audit.compare_scores("t", ["t"], dict(after=results(dict(t=after))))
    assert "difference" not in alone
    assert alone["stderr"] == pytest.approx(np.std(after, ddof=1) / 5**0.5)


def test_a_group_is_all_of_its_documents():
    values = dict(a=[1.0, 0.0, 1.0], b=[0.0, 0.0, 0.0, 0.0, 1.0])
    [row] = audit.compare_scores("g", ["a", "b"], dict(after=results(values, group="g")))
    assert row["n"] == 8
    assert row["after"] == 3 / 8
    assert row["stderr"] == pytest.approx(np.std([1, 0, 1, 0, 0, 0, 0, 1], ddof=1) / 8**0.5)


def test_several_values_a_document_and_what_is_no_mean():
    [row] = audit.compare_scores(
        "t",
        ["t"],
        dict(after=results(dict(t=[[True, False], [True], [False, False, True]]), "inst,none")),
    )
    assert row["n"] == 3
    assert row["after"] == 0.5
    assert row["stderr"] == audit.compute_stderr(
        np.array([1.0, 1.0, 1.0]), np.array([2.0, 1.0, 3.0])
    )
    strange = results(dict(t=[1.0, 2.0, 3.0]))
    strange["results"]["t"]["acc,none"] = 7.5  # a perplexity, say
    [row] = audit.compare_scores("t", ["t"], dict(before=strange, after=strange))
    assert row["stderr"] is None
    assert row["difference_stderr"] is None
    assert row["difference"] == 0
    for sample in strange["samples"]["t"]:
        sample["acc"] = ("text", 3)
    assert audit.compare_scores("t", ["t"], dict(after=strange))[0]["stderr"] is None
    other = results(dict(t=[1.0, 0.0]))
    other["samples"]["t"][0]["doc_hash"] = "another"
    with pytest.raises(ConfigError, match="same documents"):
        audit.compare_scores("t", ["t"], dict(before=results(dict(t=[1.0, 0.0])), after=other))


# asking


def test_nothing_runs_code_unasked(monkeypatch, capsys):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    monkeypatch.setattr(audit.sys, "stdin", open("/dev/null"))
    with pytest.raises(
        ConfigError,
        match="humaneval, mbpp run code that the model writes.*--confirm-unsafe-code.*--tasks "
        "ifeval,mmlu",
    ):
        audit.confirm_unsafe_code(
            ["humaneval", "mbpp"], ["ifeval", "mbpp", "humaneval", "mmlu"], False
        )
    monkeypatch.setattr(audit.sys, "stdin", type("Terminal", (), dict(isatty=lambda _: True))())
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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two tiny policies, and tasks on local rows: choices by log-likelihood (two of them a group,
    with a tag), an answer by generation, and one that runs code.
    """
    folder = tmp_path_factory.mktemp("audit")
    rows = [
        dict(question=f"a {colour} lamp is", choices=["red", "green", "blue"], answer=i % 3)
        for i, colour in enumerate(["red", "green", "blue", "black", "white"] * 2)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dict(
        dataset_path="json",
        dataset_kwargs=dict(data_files=dict(test=str(folder / "rows.jsonl"))),
        test_split="test",
        num_fewshot=0,
        metadata=dict(version=3.5),
    )
    choice = data | dict(
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[
            dict(metric=name, aggregation="mean", higher_is_better=True)
            for name in ("acc", "acc_norm")
        ],
    )
    written = data | dict(
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{choices[answer]}}",
        generation_kwargs=dict(until=["\n"], max_gen_toks=4),
        metric_list=[dict(metric="exact_match", aggregation="mean", higher_is_better=True)],
    )
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, task in dict(
        lamp_choice=choice | dict(tag="lamps"),
        lamp_again=choice | dict(doc_to_text="is it {{question}}", tag="lamps"),
        lamp_text=written,
        lamp_code=written | dict(unsafe_code=True),
    ).items():
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump(task | dict(task=name)))
    (tasks / "lamp_included.yaml").write_text(
        yaml.safe_dump(dict(include="lamp_code.yaml", task="lamp_included"))
    )
    (tasks / "lamp_group.yaml").write_text(
        yaml.safe_dump(
            dict(
                group="lamp_group",
                task=["lamp_choice", "lamp_again"],
                metadata=dict(version=1),
                aggregate_metric_list=[dict(metric="acc", weight_by_size=True)],
            )
        )
    )
    (tasks / "lamp_both.yaml").write_text(
        yaml.safe_dump(dict(group="lamp_both", task=["lamp_text", "lamp_included"]))
    )
    return dict(
        tasks=str(tasks),
        rows=folder / "rows.jsonl",
        before=write_policy(folder / "before", seed=0),
        after=write_policy(folder / "after", seed=1),
    )


def run(world, tasks, *more, before=True) -> int:
    return run_guarded(
        audit.main,
        [
            "--model",
            world["after"],
            *(["--before", world["before"]] if before else []),
            "--include-path",
            world["tasks"],
            "--tasks",
            tasks,
            "--device",
            "cpu",
            "--dtype",
            "float32",
            *more,
        ],
    )


@needs_lm_eval
def test_before_and_after_on_local_rows(world, tmp_path, capsys):
    out = tmp_path / "audit.json"
    assert run(world, "lamp_choice,lamp_text", "--out", str(out)) == 0
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
        assert row["n"] == 10
        assert row["difference"] == pytest.approx(row["after"] - row["before"])
        assert row["difference_stderr"] is not None
        line = next(
            line
            for line in text.splitlines()
            if line.startswith(f"{row['task']} ") and f" {row['metric']} " in line
        )
        assert f"{row['difference']:+.4f}" in line
        assert f"{row['difference_stderr']:.4f}" in line
    # lm-eval's own accuracy again, from the policy's log-probs by transformers
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for which in ("before", "after"):
        model = AutoModelForCausalLM.from_pretrained(world[which], dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(world[which])
        hits = 0
        for row in map(json.loads, world["rows"].read_text().splitlines()):
            scores = []
            for choice in row["choices"]:
                prompt, whole = (
                    tokenizer(text, add_special_tokens=False)["input_ids"]
                    for text in (row["question"], f"{row['question']} {choice}")
                )
                with torch.no_grad():
                    logp = model(torch.tensor([whole])).logits[0].log_softmax(-1)
                scores.append(
                    sum(float(logp[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))
                )
            hits += int(np.argmax(scores)) == row["answer"]
        assert rows["lamp_choice", "acc"][which] == hits / 10


@needs_lm_eval
def test_groups_tags_limit_and_template(world, tmp_path, capsys):
    out = tmp_path / "audit.json"
    assert run(world, "lamp_group", "--limit", "4", "--chat-template", "--out", str(out)) == 0
    result = json.loads(out.read_text())
    [row] = result["rows"]
    assert (row["task"], row["n"]) == ("lamp_group", 8)
    assert row["difference_stderr"] is not None
    assert result["settings"]["documents"] == dict(lamp_choice=4, lamp_again=4)
    assert result["settings"]["chat_template"] is True
    assert len(set(result["settings"]["chat_template_sha256"].values())) == 1
    out.unlink()
    capsys.readouterr()
    assert run(world, "lamps", "--limit", "2", "--out", str(out), before=False) == 0
    text = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert {row["task"] for row in result["rows"]} == {"lamp_choice", "lamp_again"}
    assert all("difference" not in row for row in result["rows"])
    assert "first 2 documents" in text
    assert "difference" not in text


@needs_lm_eval
@pytest.mark.parametrize(
    "tasks", ["lamp_code", "lamp_included", "lamp_both"], ids=["task", "included", "group"]
)
def test_code_that_a_model_writes_is_asked_about_before_anything_runs(
    tasks, world, capsys, monkeypatch
):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    monkeypatch.setattr(
        audit, "load", lambda *_: pytest.fail("a task was loaded before the question")
    )
    monkeypatch.setattr(audit.sys, "stdin", open("/dev/null"))
    assert run(world, tasks) == 2
    err = capsys.readouterr().err
    assert "code that the model writes" in err
    assert "--confirm-unsafe-code" in err
    assert err.count("\n") == 1


@needs_lm_eval
def test_confirmed_code_tasks_run(world, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    out = tmp_path / "audit.json"
    assert (
        run(
            world,
            "lamp_both",
            "--limit",
            "2",
            "--confirm-unsafe-code",
            "--out",
            str(out),
            before=False,
        )
        == 0
    )
    assert json.loads(out.read_text())["settings"]["unsafe_code"] == ["lamp_included"]


@needs_lm_eval
def test_upstreams_five_tasks_are_in_lm_evals_index():
    """Read from their files, nothing loaded or downloaded: all exist, and exactly those that
    lm-eval marks run code.
    """
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    leaves = {name: audit.list_leaf_tasks(index, name) for name in audit.TASKS.split(",")}
    assert len(leaves["mmlu"]) == 57
    assert {
        name
        for name, found in leaves.items()
        if any(audit.runs_code(index, leaf) for leaf in found)
    } == {"mbpp", "humaneval"}
    assert audit.runs_code(index, "humaneval_instruct")
    assert audit.runs_code(index, "mbpp_plus")


@needs_lm_eval
def test_what_is_wrong_is_one_line(world, capsys, tmp_path):
    def refused(*argv):
        assert run(world, *argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("recr1: ")
        assert err.count("\n") == 1
        return err

    assert "no 'lampp'" in refused("lampp")
    (Path(world["tasks"]) / "lamp_gone.yaml").write_text(
        yaml.safe_dump(
            dict(
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
        )
    )
    assert "lamp_gone: lm-eval cannot load it" in refused("lamp_gone")
    world = world | dict(after=str(tmp_path / "none"))
    assert (
        run_guarded(
            audit.main,
            [
                "--model",
                str(tmp_path / "none"),
                "--include-path",
                world["tasks"],
                "--tasks",
                "lamp_text",
            ],
        )
        == 2
    )
    assert "neither a folder nor a hub id" in capsys.readouterr().err
