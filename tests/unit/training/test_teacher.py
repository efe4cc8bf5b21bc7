"""SFT's two teachers: the best of the policy's own samples by an independent recount, and a file
with all that can be wrong in it.
"""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_world import jsonl, refused, runs_of, tiny_tokenizer, write_sft_yaml

from recr1 import sft
from recr1.config import loader as configs
from recr1.data.chat_template import ChatTemplate
from recr1.data.readers import is_validation, read_qrels, read_queries
from recr1.data_types import Prompt
from recr1.model.hf_weights import load_model
from recr1.retrieval.factory import build_retriever, get_index_dir
from recr1.sampling.generate import generate
from recr1.tasks.answer_parser import parse_query
from recr1.training.launch import run_guarded
from recr1.utils.counter_rng import draw_uniforms

# what makes a run short, where only its teacher matters
ONE_STEP = ["train.steps=1", "train.eval_every=0"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_sft_yaml(tmp_path_factory.mktemp("world"), **{"sampling.max_new_tokens": 20})


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    return runs_of(sft.main, world, tmp_path_factory)


def prompts_of(cfg) -> list[Prompt]:
    """Make the prompts of the train split as a run does."""
    template = cfg.prompt
    chat = ChatTemplate(tiny_tokenizer(), template.system, template.user, template.assistant)
    queries, *_ = read_queries(cfg.data.train_queries)
    prompts = []
    for query_id, text in queries.items():
        if not is_validation(query_id):
            prompt = Prompt(query_id, len(prompts), text, chat.prompt(text))
            prompts.append(prompt)
    return prompts


# --- its own teacher ------------------------------------------------------------------------------


def compute_dcg(gains: list[float]) -> float:
    dcg = 0.0
    for rank, gain in enumerate(gains, start=1):
        dcg += gain / math.log2(rank + 1)
    return dcg


class Scorer:
    """NDCG of a query's ranking, by the formula written out."""

    def __init__(self, cfg, run_dir: Path):
        build = build_retriever(cfg.retriever)
        index_dir = get_index_dir(cfg.retriever, run_dir)
        self.retriever, _ = build(cfg.data.corpus, "stop", index_dir, print)
        self.qrels, *_ = read_qrels(cfg.data.train_qrels)
        self.k = cfg.reward.k_train

    def compute_ndcg(self, query_id: str, query: str) -> float:
        judgements = self.qrels[query_id]
        rankings, _ = self.retriever.search([query], self.k)
        gains = []
        for row in rankings[0].tolist():
            if row >= 0:
                doc_id = self.retriever.doc_ids[row]
                gains.append(judgements.get(doc_id, 0.0))
        ideal_gains = sorted(judgements.values(), reverse=True)
        return compute_dcg(gains) / compute_dcg(ideal_gains)


def sample_alone(policy, prompt: Prompt, stops: frozenset) -> list:
    """Sample the prompt's four texts again, alone."""
    uniforms = draw_uniforms(0, 0, np.array([prompt.index]), 4, 20)
    return generate(policy, [prompt], 4, 1.0, 20, stops, uniforms)


def check_line(line: dict, prompt: Prompt, samples: list, scorer: Scorer, tokenizer) -> None:
    """Compare a line of teacher.jsonl with the best of these samples, chosen by a plain loop."""
    usable = []
    for sample in samples:
        ids = list(sample.ids)
        is_finished = ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(ids[:-1] if is_finished else ids)
        query, error = parse_query(text)
        reward = -1.0
        if not error:
            reward = scorer.compute_ndcg(prompt.id, query)
        assert line["rewards"][sample.sibling] == pytest.approx(reward, abs=1e-9)
        if is_finished and not error:
            # the likeliest of the best, and the first of the likeliest
            key = (round(reward, 9), sum(sample.sampler_logp), -sample.sibling)
            usable.append((key, text, ids))

    raw_ndcg = scorer.compute_ndcg(prompt.id, prompt.text)
    assert line["raw"] == pytest.approx(raw_ndcg, abs=1e-9)
    if not usable:
        assert line["error"]
        return

    (reward, _, minus_sibling), text, ids = max(usable)
    assert line["error"] is None
    assert line["sibling"] == -minus_sibling
    assert line["text"] == text
    assert line["ids"] == ids
    assert line["score"] == pytest.approx(reward, abs=1e-8)
    assert line["reward"] == line["score"]


def test_self_keeps_the_best_of_each_prompts_samples(run, world):
    """Each prompt sampled again alone, searched and scored by the formula written out; the choice
    by a plain loop.
    """
    cfg = configs.load_config(world, [])
    tokenizer = tiny_tokenizer()
    stops = frozenset([tokenizer.eos_token_id])
    scorer = Scorer(cfg, run())
    policy = load_model(cfg.model.path)
    prompts = prompts_of(cfg)
    lines = jsonl(run() / "teacher.jsonl")

    for prompt, line in zip(prompts, lines, strict=True):
        assert line["id"] == prompt.id
        samples = sample_alone(policy, prompt, stops)
        check_line(line, prompt, samples, scorer, tokenizer)

    # what the world must have for this to test anything
    assert any(line["error"] for line in lines)
    siblings = {line["sibling"] for line in lines}
    assert len(siblings) == 4
    num_later_siblings = 0
    for line in lines:
        if line["error"] or line["rewards"].count(line["reward"]) < 2:
            continue
        # the likeliest, not the first
        first_sibling = line["rewards"].index(line["reward"])
        num_later_siblings += first_sibling != line["sibling"]
    assert num_later_siblings > 0


RULES = [
    ("all", 0.4),
    ("no_worse", 0.0),
    ("better", 0.0),
    ("better", 0.5),
]


def is_kept(line: dict, rule: str, min_score: float) -> bool:
    if line["error"] or line["score"] < min_score:
        return False
    if rule == "no_worse":
        return line["score"] >= line["raw"]
    if rule == "better":
        return line["score"] > line["raw"]
    return True


@pytest.mark.parametrize("rule, min_score", RULES)
def test_the_rule_of_what_is_kept(rule, min_score, run):
    run_dir = run(
        f"sft.filter={rule}",
        f"sft.min_score={min_score}",
        "train.prompts_per_step=2",
        *ONE_STEP,
    )

    lines = jsonl(run_dir / "teacher.jsonl")
    assert lines == jsonl(run() / "teacher.jsonl")
    num_kept = sum(is_kept(line, rule, min_score) for line in lines)
    assert 0 < num_kept < len(lines)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["teacher"]["kept"] == num_kept


def test_too_few_kept_is_said(world, tmp_path, capsys):
    argv = [world, "sft.min_score=2", f"run.dir={tmp_path / 'run'}"]
    message = refused(argv, capsys, sft.main)
    assert "0 of 56 texts are kept" in message


def test_its_lines_teach_another_run_the_same(run):
    """RUN/teacher.jsonl as a file: the same ids, so the same weights."""
    all_lines = run()
    from_self = run("sft.filter=better")
    from_file = run("sft.filter=better", f"sft.teacher={from_self / 'teacher.jsonl'}")

    assert weights(from_file) == weights(from_self)
    assert weights(from_file) != weights(all_lines)


def weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


# --- a teacher's file -----------------------------------------------------------------------------


def write_answer(query: str) -> str:
    query_json = json.dumps(dict(query=query))
    return f"</think><answer>{query_json}</answer>"


def teacher(world, path: Path, *lines: str) -> str:
    """Write a file of `lines` before one good answer to every train query, its first word; return
    the override that names it.
    """
    all_lines = list(lines)
    for prompt in prompts_of(configs.load_config(world, [])):
        first_word = prompt.text.split()[0]
        line = dict(id=prompt.id, text=write_answer(first_word))
        all_lines.append(json.dumps(line))
    text = "".join(line + "\n" for line in all_lines)
    data = text.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    path.write_bytes(data)
    return f"sft.teacher={path}"


def test_a_file_is_learned(world, tmp_path, capsys):
    """Every query answered by its first word: the loss falls, the policy comes to answer so."""
    run_dir = tmp_path / "run"
    argv = [
        world,
        teacher(world, tmp_path / "t.jsonl.gz"),
        "train.steps=100",
        "sft.epochs=40",
        "train.prompts_per_step=14",
        "train.eval_every=0",
        "optimizer.lr=0.01",
        f"run.dir={run_dir}",
    ]

    assert run_guarded(sft.main, argv) == 0

    rows = jsonl(run_dir / "metrics.jsonl")
    assert len(rows) == 40 * (56 // 14)
    assert rows[-1]["epoch"] == 40
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"]

    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["after_minus_before"] > 0
    assert summary["loop"] == "sft"
    assert summary["steps"] == len(rows)
    assert "sampling_logp_diff_max" not in summary
    assert summary["teacher"]["score"] > 0
    assert summary["teacher"]["raw"] > 0
    assert summary["memory"]["predicted"] is None

    tokenizer = tiny_tokenizer()
    lines = jsonl(run_dir / "teacher.jsonl")
    prompts = prompts_of(configs.load_config(world, []))
    for line, prompt in zip(lines, prompts, strict=True):
        ids = tokenizer(line["text"])["input_ids"]
        assert line["ids"] == [*ids, tokenizer.eos_token_id]
        first_word = prompt.text.split()[0]
        assert line["text"] == write_answer(first_word)

    output = capsys.readouterr().out
    assert "56 texts, 56 kept" in output
    assert "nothing is sampled, sampling.group_size are not read" in output


VALIDATION = next(f"train{i}" for i in range(60) if is_validation(f"train{i}"))
GOOD = write_answer("lamp")
LONG = write_answer("lamp " * 20)
BAD = {  # line 1 of the file -> what is said of it
    "unknown id": (dict(id="nobody", text=GOOD), "'nobody' is no train query of this run"),
    "no text": (dict(id="train0"), "no key 'text'"),
    "not a string": (dict(id="train0", text=[1]), "'text' is a list"),
    "end token": (dict(id="train0", text=GOOD + "<|end|>"), "holds the end token '<|end|>'"),
    "too long": (dict(id="train0", text=LONG), "sampling.max_new_tokens is 20"),
    "an empty line": (None, "empty line"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_stops_the_run_or_is_left_out(name, world, tmp_path, capsys):
    row, reason = BAD[name]
    line = ""
    if row is not None:
        line = json.dumps(row)
    override = teacher(world, tmp_path / "t.jsonl", line)

    stop_argv = [world, override, f"run.dir={tmp_path / 'run'}"]
    message = refused(stop_argv, capsys, sft.main)
    assert f"{tmp_path}/t.jsonl:1: " in message
    assert reason in message
    assert not (tmp_path / "run/teacher.jsonl").exists()

    drop_argv = [world, override, "data.on_bad_line=drop", *ONE_STEP]
    drop_argv.append(f"run.dir={tmp_path / 'drop'}")
    assert run_guarded(sft.main, drop_argv) == 0
    output = capsys.readouterr().out
    assert "1 lines of the teacher left out" in output
    assert reason in output
    assert len(jsonl(tmp_path / "drop/teacher.jsonl")) == 56


HELD_OUT = [
    (VALIDATION, "stop"),
    (VALIDATION, "drop"),
    ("test3", "drop"),
]


@pytest.mark.parametrize("query_id, on_bad_line", HELD_OUT)
def test_answers_to_what_is_held_out_are_a_leak(query_id, on_bad_line, world, tmp_path, capsys):
    line = json.dumps(dict(id=query_id, text=GOOD))
    override = teacher(world, tmp_path / "t.jsonl", line)

    argv = [world, override, f"data.on_bad_line={on_bad_line}", f"run.dir={tmp_path / 'run'}"]
    message = refused(argv, capsys, sft.main)

    assert f"t.jsonl:1: '{query_id}' is a validation or test query" in message
    assert "leak" in message


ODD_ROWS = [
    dict(id="train0", text="no answer"),
    dict(id="train0", text=GOOD),
    dict(id="train0", text=GOOD),
    dict(id="train1", text="x", error="unfinished"),
    dict(id="train2", text=GOOD, ids=[1, 2, 3]),
]


def test_what_cannot_be_parsed_or_stands_twice_is_counted_and_said(world, tmp_path, capsys):
    lines = [json.dumps(row) for row in ODD_ROWS]
    override = teacher(world, tmp_path / "t.jsonl", *lines)

    assert run_guarded(sft.main, [world, override, *ONE_STEP, f"run.dir={tmp_path / 'run'}"]) == 0

    output = capsys.readouterr().out
    assert "2 lines of the teacher left out, first: " in output
    assert "t.jsonl:3: 'train0' had the same text before" in output
    assert "'ids' of 1 lines of the teacher do not spell their text" in output
    assert "59 texts, 58 kept" in output
    assert "nothing to learn from 1 {'no_think_end': 1}" in output
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["teacher"]["format_errors"] == {"no_think_end": 1}


NO_TEACHERS = [
    (None, "no such file"),
    (b"", "the file is empty"),
    (b"\n", "empty line"),
]


@pytest.mark.parametrize("data, reason", NO_TEACHERS)
def test_no_teacher_in_the_file(data, reason, world, tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    if data is not None:
        path.write_bytes(data)

    argv = [world, f"sft.teacher={path}", f"run.dir={tmp_path / 'run'}"]
    message = refused(argv, capsys, sft.main)

    assert reason in message
