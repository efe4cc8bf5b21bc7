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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_sft_yaml(tmp_path_factory.mktemp("world"), **{"sampling.max_new_tokens": 20})


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    return runs_of(sft.main, world, tmp_path_factory)


def prompts_of(cfg) -> list[Prompt]:
    """Of the train split, as a run makes them."""
    chat = ChatTemplate(tiny_tokenizer(), cfg.prompt.system, cfg.prompt.user, cfg.prompt.assistant)
    queries = {
        id: text
        for id, text in read_queries(cfg.data.train_queries)[0].items()
        if not is_validation(id)
    }
    return [Prompt(id, i, text, chat.prompt(text)) for i, (id, text) in enumerate(queries.items())]


# --- its own teacher ------------------------------------------------------------------------------


def test_self_keeps_the_best_of_each_prompts_samples(run, world):
    """Each prompt sampled again alone, searched and scored by the formula written out; the choice
    by a plain loop.
    """
    cfg = configs.load_config(world, [])
    tokenizer = tiny_tokenizer()
    retriever, _ = build_retriever(cfg.retriever)(
        cfg.data.corpus, "stop", get_index_dir(cfg.retriever, run()), print
    )
    qrels = read_qrels(cfg.data.train_qrels)[0]
    stops = frozenset([tokenizer.eos_token_id])

    def ndcg(id, query):
        gains = [
            qrels[id].get(retriever.doc_ids[d], 0.0)
            for d in retriever.search([query], cfg.reward.k_train)[0][0].tolist()
            if d >= 0
        ]
        ideal = sorted(qrels[id].values(), reverse=True)
        return sum(g / math.log2(i + 2) for i, g in enumerate(gains)) / sum(
            g / math.log2(i + 2) for i, g in enumerate(ideal)
        )

    policy = load_model(cfg.model.path)
    lines = jsonl(run() / "teacher.jsonl")
    unusable = 0
    prompts = prompts_of(cfg)
    assert [line["id"] for line in lines] == [p.id for p in prompts]
    for p, line in zip(prompts, lines):
        samples = generate(
            policy, [p], 4, 1.0, 20, stops, draw_uniforms(0, 0, np.array([p.index]), 4, 20)
        )
        usable = []
        for r in samples:
            text = tokenizer.decode(r.ids[:-1] if r.ids[-1] in stops else r.ids)
            query, wrong = parse_query(text)
            reward = -1.0 if wrong else ndcg(p.id, query)
            assert line["rewards"][r.sibling] == pytest.approx(reward, abs=1e-9)
            if r.ids[-1] in stops and not wrong:
                usable.append(
                    (round(reward, 9), sum(r.sampler_logp), -r.sibling, text, list(r.ids))
                )
        assert line["raw"] == pytest.approx(ndcg(p.id, p.text), abs=1e-9)
        if not usable:
            assert line["error"]
            unusable += 1
            continue
        best = max(usable)
        assert (line["error"], line["sibling"], line["text"], line["ids"]) == (
            None,
            -best[2],
            best[3],
            best[4],
        )
        assert line["reward"] == line["score"] == pytest.approx(best[0], abs=1e-8)
    assert unusable
    assert len({line["sibling"] for line in lines}) == 4
    ties = [
        line
        for line in lines
        if line["error"] is None and line["rewards"].count(line["reward"]) > 1
    ]
    # the likeliest, not the first
    assert any(line["rewards"].index(line["reward"]) != line["sibling"] for line in ties)


@pytest.mark.parametrize(
    "keep, least", [("all", 0.4), ("no_worse", 0.0), ("better", 0.0), ("better", 0.5)]
)
def test_the_rule_of_what_is_kept(keep, least, run):
    folder = run(
        f"sft.filter={keep}",
        f"sft.min_score={least}",
        "train.prompts_per_step=2",
        "train.steps=1",
        "train.eval_every=0",
    )
    lines = jsonl(folder / "teacher.jsonl")
    want = [
        line
        for line in lines
        if not line["error"]
        and line["score"] >= least
        and {
            "all": True,
            "no_worse": line["score"] >= line["raw"],
            "better": line["score"] > line["raw"],
        }[keep]
    ]
    assert lines == jsonl(run() / "teacher.jsonl")
    assert 0 < len(want) < len(lines)
    assert json.loads((folder / "summary.json").read_text())["teacher"]["kept"] == len(want)


def test_too_few_kept_is_said(world, tmp_path, capsys):
    assert "0 of 56 texts are kept" in refused(
        [world, "sft.min_score=2", f"run.dir={tmp_path / 'run'}"], capsys, sft.main
    )


def test_its_lines_teach_another_run_the_same(run):
    """RUN/teacher.jsonl as a file: the same ids, so the same weights."""
    own = run("sft.filter=better")
    again = run("sft.filter=better", f"sft.teacher={own / 'teacher.jsonl'}")
    assert weights(own) == weights(again) != weights(run())


def weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


# --- a teacher's file -----------------------------------------------------------------------------


def answer(query: str) -> str:
    return f"</think><answer>{json.dumps(dict(query=query))}</answer>"


def teacher(world, path: Path, *lines: str) -> str:
    """A file of `lines` before one good answer to every train query, its first word; the override
    that names it.
    """
    good = [
        json.dumps(dict(id=p.id, text=answer(p.text.split()[0])))
        for p in prompts_of(configs.load_config(world, []))
    ]
    text = "".join(line + "\n" for line in (*lines, *good)).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return f"sft.teacher={path}"


def test_a_file_is_learned(world, tmp_path, capsys):
    """Every query answered by its first word: the loss falls, the policy comes to answer so."""
    argv = [
        world,
        teacher(world, tmp_path / "t.jsonl.gz"),
        "train.steps=100",
        "sft.epochs=40",
        "train.prompts_per_step=14",
        "train.eval_every=0",
        "optimizer.lr=0.01",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert run_guarded(sft.main, argv) == 0
    rows = jsonl(tmp_path / "run/metrics.jsonl")
    assert len(rows) == 40 * (56 // 14)
    assert rows[-1]["epoch"] == 40
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["after_minus_before"] > 0
    assert summary["loop"] == "sft"
    assert summary["steps"] == len(rows)
    assert "sampling_logp_diff_max" not in summary
    assert summary["teacher"]["score"] > 0 < summary["teacher"]["raw"]
    assert summary["memory"]["predicted"] is None
    tokenizer = tiny_tokenizer()
    for line, p in zip(
        jsonl(tmp_path / "run/teacher.jsonl"),
        prompts_of(configs.load_config(world, [])),
        strict=True,
    ):
        assert line["ids"] == [*tokenizer(line["text"])["input_ids"], tokenizer.eos_token_id]
        assert line["text"] == answer(p.text.split()[0])
    out = capsys.readouterr().out
    assert "56 texts, 56 kept" in out
    assert "nothing is sampled, sampling.group_size are not read" in out


VALIDATION = next(f"train{i}" for i in range(60) if is_validation(f"train{i}"))
GOOD = answer("lamp")
BAD = {  # line 1 of the file -> what is said of it
    "unknown id": (dict(id="nobody", text=GOOD), "'nobody' is no train query of this run"),
    "no text": (dict(id="train0"), "no key 'text'"),
    "not a string": (dict(id="train0", text=[1]), "'text' is a list"),
    "end token": (dict(id="train0", text=GOOD + "<|end|>"), "holds the end token '<|end|>'"),
    "too long": (dict(id="train0", text=answer("lamp " * 20)), "sampling.max_new_tokens is 20"),
    "an empty line": (None, "empty line"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_stops_the_run_or_is_left_out(name, world, tmp_path, capsys):
    line, message = BAD[name]
    override = teacher(world, tmp_path / "t.jsonl", json.dumps(line) if line else "")
    said = refused([world, override, f"run.dir={tmp_path / 'run'}"], capsys, sft.main)
    assert f"{tmp_path}/t.jsonl:1: " in said
    assert message in said
    assert not (tmp_path / "run/teacher.jsonl").exists()
    argv = [
        world,
        override,
        "data.on_bad_line=drop",
        "train.steps=1",
        "train.eval_every=0",
        f"run.dir={tmp_path / 'drop'}",
    ]
    assert run_guarded(sft.main, argv) == 0
    out = capsys.readouterr().out
    assert "1 lines of the teacher left out" in out
    assert message in out
    assert len(jsonl(tmp_path / "drop/teacher.jsonl")) == 56


@pytest.mark.parametrize(
    "id, drop", [(VALIDATION, "stop"), (VALIDATION, "drop"), ("test3", "drop")]
)
def test_answers_to_what_is_held_out_are_a_leak(id, drop, world, tmp_path, capsys):
    override = teacher(world, tmp_path / "t.jsonl", json.dumps(dict(id=id, text=GOOD)))
    said = refused(
        [world, override, f"data.on_bad_line={drop}", f"run.dir={tmp_path / 'run'}"],
        capsys,
        sft.main,
    )
    assert f"t.jsonl:1: '{id}' is a validation or test query" in said
    assert "leak" in said


def test_what_cannot_be_parsed_or_stands_twice_is_counted_and_said(world, tmp_path, capsys):
    rows = [
        dict(id="train0", text="no answer"),
        dict(id="train0", text=GOOD),
        dict(id="train0", text=GOOD),
        dict(id="train1", text="x", error="unfinished"),
        dict(id="train2", text=GOOD, ids=[1, 2, 3]),
    ]
    argv = [
        world,
        teacher(world, tmp_path / "t.jsonl", *map(json.dumps, rows)),
        "train.steps=1",
        "train.eval_every=0",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert run_guarded(sft.main, argv) == 0
    out = capsys.readouterr().out
    assert "2 lines of the teacher left out, first: " in out
    assert "t.jsonl:3: 'train0' had the same text before" in out
    assert "'ids' of 1 lines of the teacher do not spell their text" in out
    assert "59 texts, 58 kept" in out
    assert "nothing to learn from 1 {'no_think_end': 1}" in out
    assert json.loads((tmp_path / "run/summary.json").read_text())["teacher"]["format_errors"] == {
        "no_think_end": 1
    }


@pytest.mark.parametrize(
    "text, message", [(None, "no such file"), (b"", "the file is empty"), (b"\n", "empty line")]
)
def test_no_teacher_in_the_file(text, message, world, tmp_path, capsys):
    if text is not None:
        (tmp_path / "t.jsonl").write_bytes(text)
    assert message in refused(
        [world, f"sft.teacher={tmp_path / 't.jsonl'}", f"run.dir={tmp_path / 'run'}"],
        capsys,
        sft.main,
    )
