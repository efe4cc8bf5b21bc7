"""The report of runs that are no product search, or no GRPO: lists, histories, other metrics, SFT,
no rollouts. Their folders are written by hand.
"""

import gzip
import json
from math import log2

import pytest
import yaml
from test_report import SECTIONS, browser, content, opened  # noqa: F401 (browser is a fixture)

from recr1 import report
from recr1.config.loader import load_config
from recr1.report import groups, ranking, rollouts
from recr1.retrieval.factory import build_retriever
from recr1.tasks.ranking_metrics import compute_ndcg, compute_reciprocal_rank

FILMS = dict(
    f0="red lamp",
    f1="red chair",
    f2="green lamp",
    f3="blue chair",
    f4="black lamp table",
    f5="white kettle",
)
MORE = dict(
    rerank=dict(candidates=["f0", "f1", "f2", "f3"]),
    sequential=dict(history=["f0", "f3"]),
    recommend_list=dict(
        profile="age 30",
        history=[["f0", "1999"], ["f4", "2000"]],
        candidates=["f5", "f1", "f2", "f3"],
    ),
)
RELEVANT = dict(t0="f2", t1="f3", t2="f1")


def write(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def folder(path, task, answers, score, metric="ndcg", sft=False, texts=(), **settings):
    """A finished run of four steps. answers: of the three test queries before and after training;
    score(query id, answer): what was logged.
    """
    data = path / "data"
    data.mkdir(parents=True)
    write(data / "corpus.jsonl", [dict(id=id, title=title, text="") for id, title in FILMS.items()])
    ids = {"train": ["q0", "q1"], "test": list(RELEVANT)}
    for split, some in ids.items():
        write(
            data / f"{split}.jsonl",
            [dict(id=id, text="lamp film", **MORE.get(task, {})) for id in some],
        )
        write(data / f"{split}.tsv", [f"{id}\t{RELEVANT.get(id, 'f1')}\t1" for id in some])
    run = path / "run"
    run.mkdir()
    files = dict(
        corpus=str(data / "corpus.jsonl"),
        **{
            f"{s}_{k}": str(data / f"{s}.{e}")
            for s in ids
            for k, e in (("queries", "jsonl"), ("qrels", "tsv"))
        },
    )
    reward = dict(k_eval=4, metric=metric, **settings)
    (run / "config.yaml").write_text(
        yaml.safe_dump(
            dict(
                task=task,
                data=files,
                reward=reward,
                train=dict(steps=4),
                **(dict(sft=dict(teacher="self")) if sft else {}),
            )
        )
    )
    raw = MORE[task]["candidates"] if "candidates" in MORE.get(task, {}) else "lamp film"
    for name, some in zip(("eval_before.jsonl", "eval_after.jsonl"), answers):
        write(
            run / name,
            [
                {
                    "id": id,
                    "raw": raw,
                    "rewrite": answer,
                    f"{metric}_raw": score(id, raw),
                    metric: score(id, answer),
                    "text": "",
                    "error": None,
                }
                for id, answer in zip(RELEVANT, some)
            ],
        )
    step = (
        dict(loss=2.0, entropy=0.5, tokens=90, tokens_per_s=9.0, epoch=0.5)
        if sft
        else dict(
            loss=1e-9,
            reward=0.5,
            ndcg=0.5,
            lcs=0.25,
            frac_reward_zero_std=0.5,
            reward_std=0.1,
            completion_length=9,
            clip_ratio=0.0,
            entropy=0.5,
            format_error_rate=0.0,
            truncated_ratio=0.0,
            sampling_logp_diff_mean=0.0,
            sampling_logp_diff_max=0.0,
            kl=None,
        )
    )
    checked = {
        f"val_{metric}": 0.5,
        "val_raw": 0.4,
        "val_gain": 0.1,
        "val_gain_ci95": [0.0, 0.2],
        "val_format_errors": 0,
    }
    write(
        run / "metrics.jsonl",
        [
            dict(
                step=i,
                **step,
                grad_norm=1.0,
                lr=1e-3,
                skipped_steps=0,
                timing_s=dict(train=1.0, step=1.5),
                **(checked if i % 2 == 0 else {}),
            )
            for i in range(1, 5)
        ],
    )
    figures = dict(raw=0.1, before=0.2, after=0.3, gain=0.2, gain_ci95=[0.1, 0.3], gain_p=0.01)
    about = (
        dict(
            loop="sft",
            teacher=dict(
                source="self",
                texts=9,
                kept=7,
                format_errors=dict(no_json=2),
                score_kept=0.5,
                raw_kept=0.25,
            ),
        )
        if sft
        else {}
    )
    (run / "summary.json").write_text(
        json.dumps(
            dict(
                steps=4,
                n_eval=3,
                unparsable_before=0,
                unparsable_after=1,
                parts={metric: figures, "recall": figures},
                **about,
            )
        )
    )
    if not sft:
        write(run / "rollouts.jsonl.gz", texts)
    return run


def judged(metric, search=lambda answer: answer):
    return lambda id, answer: (
        metric(search(answer), {RELEVANT[id]: 1.0}, 4) if answer is not None else 0.0
    )


def sampled(text, error=None, prompt="q0", reward=0.5, step=1):
    return dict(
        step=step,
        prompt=prompt,
        sibling=0,
        count=2,
        text=text,
        finished=True,
        reward=reward,
        reward_terms=dict(ndcg=reward),
        error=error,
        advantage=0.1,
    )


@pytest.fixture(scope="module")
def rerank(tmp_path_factory):
    order = ["f2", "f0", "f1", "f3"]
    texts = [
        sampled(
            '</think><answer>{"reranked_items": ["Item_1", "Item_2"]}</answer>',
            prompt=f"q{i}",
            reward=i / 2,
            step=1 + i,
        )
        for i in range(2)
    ]
    return folder(
        tmp_path_factory.mktemp("rerank"),
        "rerank",
        ([MORE["rerank"]["candidates"]] * 3, [order, None, order]),
        judged(compute_ndcg),
        texts=texts,
        weights=dict(ndcg=1.0, lcs=0.5),
    )


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    return folder(
        tmp_path_factory.mktemp("list"),
        "recommend_list",
        ([["f5"]] * 3, [["f2", "f3"], ["f3", "f1", "f2", "f5"], ["f5", "f1", "f2", "f3"]]),
        judged(compute_reciprocal_rank),
        "mrr",
    )


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    return folder(
        tmp_path_factory.mktemp("sft"),
        "product_search",
        (["lamp"] * 3, ["green lamp", "blue chair", None]),
        lambda id, answer: 0.5,
        sft=True,
    )


def test_lists_are_shown_as_orders_of_the_given_list(rerank):
    page = content(report.write_report([str(rerank)]))
    [run], shown = page["runs"], page["ranking"]
    assert shown["why"] == ""
    assert shown["listed"]
    assert not shown["explained"]
    assert shown["sides"] == run["words"] == ["given order", "new order"]
    assert run["retriever"] is None
    best = shown["queries"][0]
    assert best["id"] == "t0"
    assert best["raw"] == "lamp film"
    assert best["texts"] == ["1, 2, 3, 4", "3, 1, 2, 4"]
    assert best["scores"] == pytest.approx([0.5, 1.0])
    assert [(d["id"], d["places"]) for d in best["documents"]] == [
        ("f0", [1, 2]),
        ("f1", [2, 3]),
        ("f2", [3, 1]),
        ("f3", [4, 4]),
    ]
    assert shown["documents"]["f2"].startswith("green lamp")
    lost = next(q for q in shown["queries"] if q["id"] == "t1")
    assert lost["texts"][1] is None
    assert all(d["places"][1] is None for d in lost["documents"])
    tables = {t["title"]: {row["name"]: row["n"] for row in t["rows"]} for t in page["groups"]}
    assert tables["what the answer did"] == {"another order": 2, "no answer": 1}
    assert tables["words in the query"] == {"2": 3}
    assert "word left out" not in tables
    assert run["curves"]["lcs"]["mean"] == [0.25] * 4
    assert run["results"]["after_minus_raw"][0] == pytest.approx(
        (1.5 - 1 / log2(4) - 1 / log2(5) - 1 / log2(3)) / 3
    )
    assert [row["answer"] for row in run["rollouts"]["audit"]] == ["Item_1, Item_2"] * 2
    assert "the given order" in run["rollouts"]["audit"][0]["flags"]
    assert run["rollouts"]["recurring"][0]["prompts"] == 2


def test_histories_profiles_and_another_metric(listed):
    page = content(report.write_report([str(listed)]))
    [run], shown = page["runs"], page["ranking"]
    assert run["label"] == "MRR@4"
    assert run["evaluations"][0]["score"] == 0.5
    assert shown["why"] == ""
    assert shown["queries"][0]["about"] == dict(profile="age 30", history=["f0", "f4"], items=2)
    assert shown["documents"]["f4"].startswith("black lamp")
    tables = {t["title"]: {row["name"]: row["n"] for row in t["rows"]} for t in page["groups"]}
    assert tables["items in the history"] == {"1 to 2": 3}
    assert "first word" not in tables
    assert "MRR@4 of the raw list" in tables
    assert tables["what the answer did"] == {
        "the given order": 1,
        "another order": 1,
        "items left out": 1,
    }


def test_what_was_seen_is_no_hit(tmp_path):
    """Sequential with reward.remove_seen: f0 has the words of the query, stands in the history, and
    is not shown.
    """
    found = {"lamp film": ["f2", "f4"], "red chair": ["f1"]}  # what BM25 brings without f0 and f3
    run = folder(
        tmp_path,
        "sequential",
        (["lamp film"] * 3, ["red chair"] * 3),
        judged(compute_ndcg, found.get),
        remove_seen=True,
    )
    config = load_config(str(run / "config.yaml"), [])
    retriever, _ = build_retriever(config.retriever)(config.data.corpus, "stop", None, print)
    page = content(report.write_report([str(run)], retriever=retriever))
    shown = page["ranking"]
    assert shown["why"] == ""
    assert shown["explained"]
    assert [q["id"] for q in shown["queries"]] == ["t2", "t0", "t1"]
    for q in shown["queries"]:
        assert [d["id"] for d in q["documents"]] == ["f2", "f4", "f1"]
        assert q["about"]["history"] == ["f0", "f3"]
        assert q["documents"][2]["terms"]
        assert all(before == 0 < after for _, before, after in q["documents"][2]["terms"])
    assert "The run's index" in ranking.open_search(config, run)


def test_sft_has_no_rollouts_and_says_so(sft):
    said = report.write_report_at_end(sft, None, None)
    assert said == f"report: {sft / 'report.html'}"
    page = content(sft / "report.html")
    [run] = page["runs"]
    assert run["loop"] == "sft"
    assert run["steps"] == run["planned"] == 4
    assert "SFT samples nothing" in run["rollouts"]["why"]
    assert run["curves"]["loss"]["mean"] == [2.0] * 4
    assert "reward" not in run["curves"]
    assert not any("rollouts" in note or "tokenizer" in note for note in run["notes"])


@pytest.mark.parametrize("log, note", [(b"", ""), (None, "missing"), (b"\x1f\x8b\x08", "torn")])
def test_a_run_without_a_rollout(log, note, tmp_path):
    run = folder(tmp_path, "rerank", ([["f0"]] * 3, [["f1"]] * 3), judged(compute_ndcg))
    (run / "rollouts.jsonl.gz").unlink()
    if log is not None:
        (run / "rollouts.jsonl.gz").write_bytes(log)
    [page] = content(report.write_report([str(run)]))["runs"]
    assert page["rollouts"]["rows"] == 0
    assert page["rollouts"]["audit"] == []
    assert note in page["rollouts"]["note"]
    assert bool(note) == bool(page["rollouts"]["note"])


@pytest.mark.parametrize(
    "text, key, answer",
    [
        ('a</think> <answer>{"query": " red lamp ", "why": "x"}</answer>', "query", "red lamp"),
        ('<answer>{"query": "red"}</answer>', "query", "red"),
        ('</think><answer>{"items": ["Item_2", "Item_1"]}</answer>', "items", "Item_2, Item_1"),
        ('</think><answer>{"a": 1}</answer>', "query", '{"a": 1}'),
        (" my own format ", "query", "my own format"),
    ],
)
def test_what_a_rollout_answered(text, key, answer):
    assert rollouts.extract_answer(dict(text=text, error=None), key) == answer
    assert rollouts.extract_answer(dict(text=text, error="no_json"), key) is None


def test_what_is_conspicuous():
    def flags(answer, task, query="red lamp", prompts=1):
        return rollouts.list_flags(query, answer, dict(text="t", finished=True), prompts, task)

    assert flags("lamp lamp lamp", "product_search") == ["'lamp' 3 times"]
    assert flags("kettle", "product_search") == ["no word of the query"]
    assert flags("kettle", "sequential") == []
    assert flags("Item_1, Item_2", "rerank", prompts=3) == [
        "the given order",
        "answer to 3 queries",
    ]
    assert flags("Item_2, Item_1", "rerank") == []
    assert flags(None, "rerank") == ["no answer"]
    assert flags("!?", "sequential") == ["no letter or digit"]


def test_what_a_list_did():
    given = ["a", "b", "c"]
    assert [
        groups.classify_list(given, answer)
        for answer in (None, given, ["c", "a", "b"], ["b"], ["a", "x"], dict(a=1))
    ] == [
        "no answer",
        "the given order",
        "another order",
        "items left out",
        "another answer",
        "another answer",
    ]


@pytest.mark.parametrize(
    "name, says",
    [
        ("rerank", ["GIVEN ORDER", "3, 1, 2, 4", "lcs"]),
        ("listed", ["age 30", "MRR@4"]),
        ("sft", ["SFT samples nothing", "teacher.jsonl"]),
    ],
)
def test_a_browser_opens_it(name, says, browser, request):  # noqa: F811
    """Every section of a run without searches, without rollouts; a comparison with another kind of
    run.
    """
    run = request.getfixturevalue(name)
    browser.look(390, 844, True, phone=True)
    assert opened(browser, report.write_report([str(run)])) == SECTIONS
    assert browser.value("document.documentElement.scrollWidth") <= 390
    text = browser.value("document.querySelector('main').textContent").lower()
    assert not [word for word in says if word.lower() not in text]
    other = request.getfixturevalue("sft" if name != "sft" else "rerank")
    assert opened(browser, report.write_report([str(run), str(other)])) == SECTIONS
