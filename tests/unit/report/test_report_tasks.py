"""The report of runs that are no product search, or no GRPO: lists, histories, other metrics, SFT,
no rollouts. Their folders are written by hand.
"""

import json
import shutil
from math import log2

import pytest
import yaml
from test_report import (  # noqa: F401 (browser is a fixture)
    PAGE_WIDTH,
    SECTIONS,
    browser,
    content,
    open_page,
    write_rows,
)

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
SPLITS = dict(train=["q0", "q1"], test=["t0", "t1", "t2"])
RELEVANT = dict(q0="f1", q1="f1", t0="f2", t1="f3", t2="f1")
TEXT = "lamp film"
CANDIDATES = ["f0", "f1", "f2", "f3"]
HISTORY_WITH_YEARS = [["f0", "1999"], ["f4", "2000"]]
LISTED = dict(
    profile="age 30",
    history=HISTORY_WITH_YEARS,
    candidates=["f5", "f1", "f2", "f3"],
)
# task -> what its queries have beside a text
CONTEXTS = dict(
    product_search={},
    rerank=dict(candidates=CANDIDATES),
    sequential=dict(history=["f0", "f3"]),
    recommend_list=LISTED,
)

GRPO_STEP = dict(
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
SFT_STEP = dict(loss=2.0, entropy=0.5, tokens=90, tokens_per_s=9.0, epoch=0.5)
ANY_STEP = dict(grad_norm=1.0, lr=1e-3, skipped_steps=0, timing_s=dict(train=1.0, step=1.5))
VALIDATION = dict(val_raw=0.4, val_gain=0.1, val_gain_ci95=[0.0, 0.2], val_format_errors=0)
FIGURES = dict(raw=0.1, before=0.2, after=0.3, gain=0.2, gain_ci95=[0.1, 0.3], gain_p=0.01)
SUMMARY = dict(steps=4, n_eval=3, unparsable_before=0, unparsable_after=1)
TEACHER = dict(
    source="self",
    texts=9,
    kept=7,
    format_errors=dict(no_json=2),
    score_kept=0.5,
    raw_kept=0.25,
)


# ---- A finished run of four steps ----------------------------------------------------------------


def write_data(folder, task: str) -> dict[str, str]:
    """Write the corpus and both splits; give the settings that name them."""
    folder.mkdir(parents=True)
    corpus = folder / "corpus.jsonl"
    films = []
    for id, title in FILMS.items():
        films.append(dict(id=id, title=title, text=""))
    write_rows(corpus, films)

    files = dict(corpus=str(corpus))
    for split, ids in SPLITS.items():
        queries = folder / f"{split}.jsonl"
        qrels = folder / f"{split}.tsv"
        rows = [dict(id=id, text=TEXT, **CONTEXTS[task]) for id in ids]
        lines = [f"{id}\t{RELEVANT[id]}\t1\n" for id in ids]
        write_rows(queries, rows)
        qrels.write_text("".join(lines))
        files[f"{split}_queries"] = str(queries)
        files[f"{split}_qrels"] = str(qrels)
    return files


def write_evaluation(path, task: str, answers: list, score, metric: str) -> None:
    """Write the scores of the test queries' raw texts or lists, and of the answers to them."""
    raw = CONTEXTS[task].get("candidates", TEXT)
    rows = []
    for id, answer in zip(SPLITS["test"], answers):
        row = dict(id=id, raw=raw, rewrite=answer, text="", error=None)
        row[f"{metric}_raw"] = score(id, raw)
        row[metric] = score(id, answer)
        rows.append(row)
    write_rows(path, rows)


def write_metrics(path, metric: str, values: dict) -> None:
    """Write four steps with these values; the second and the fourth are evaluated."""
    rows = []
    for step in range(1, 5):
        row = dict(step=step, **values, **ANY_STEP)
        if step % 2 == 0:
            row |= VALIDATION
            row[f"val_{metric}"] = 0.5
        rows.append(row)
    write_rows(path, rows)


def write_run(path, task, answers, score, metric="ndcg", loop="grpo", **reward_settings):
    """Write a finished run of four steps, without a rollout; give its folder.

    answers: of the three test queries, before and after training. score(query id, answer): what
    was logged.
    """
    files = write_data(path / "data", task)
    reward = dict(k_eval=4, metric=metric, **reward_settings)
    config = dict(task=task, data=files, reward=reward, train=dict(steps=4))
    figures = {metric: FIGURES, "recall": FIGURES}
    summary = dict(reward_terms=figures, **SUMMARY)
    run = path / "run"
    run.mkdir()
    if loop == "sft":
        config["sft"] = dict(teacher="self")
        summary |= dict(loop="sft", teacher=TEACHER)
        write_metrics(run / "metrics.jsonl", metric, SFT_STEP)
    else:
        write_metrics(run / "metrics.jsonl", metric, GRPO_STEP)
        write_rows(run / "rollouts.jsonl.gz", [])

    answers_before, answers_after = answers
    write_evaluation(run / "eval_before.jsonl", task, answers_before, score, metric)
    write_evaluation(run / "eval_after.jsonl", task, answers_after, score, metric)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def make_score(metric, hits: dict[str, list[str]] | None = None):
    """Make a score of (query id, answer).

    hits: answer -> what a search with it brings. Without hits an answer is itself a list.
    """

    def score(id, answer) -> float:
        if answer is None:
            return 0.0
        ranked = answer
        if hits is not None:
            ranked = hits[answer]
        return metric(ranked, {RELEVANT[id]: 1.0}, 4)

    return score


def make_rollout(text: str, prompt: str, reward: float, step: int) -> dict:
    """Make a row of the log of rollouts."""
    return dict(
        step=step,
        prompt=prompt,
        sibling=0,
        count=2,
        text=text,
        finished=True,
        reward=reward,
        reward_terms=dict(ndcg=reward),
        error=None,
        advantage=0.1,
    )


@pytest.fixture(scope="module")
def rerank(tmp_path_factory):
    order = ["f2", "f0", "f1", "f3"]
    before = [CANDIDATES] * 3
    after = [order, None, order]
    path = tmp_path_factory.mktemp("rerank")
    weights = dict(ndcg=1.0, lcs=0.5)
    score = make_score(compute_ndcg)
    run = write_run(path, "rerank", (before, after), score, weights=weights)

    text = '</think><answer>{"reranked_items": ["Item_1", "Item_2"]}</answer>'
    first = make_rollout(text, "q0", 0.0, 1)
    second = make_rollout(text, "q1", 0.5, 2)
    write_rows(run / "rollouts.jsonl.gz", [first, second])
    return run


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    before = [["f5"]] * 3
    after = [["f2", "f3"], ["f3", "f1", "f2", "f5"], ["f5", "f1", "f2", "f3"]]
    path = tmp_path_factory.mktemp("list")
    score = make_score(compute_reciprocal_rank)
    return write_run(path, "recommend_list", (before, after), score, "mrr")


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    before = ["lamp"] * 3
    after = ["green lamp", "blue chair", None]
    path = tmp_path_factory.mktemp("sft")
    return write_run(path, "product_search", (before, after), lambda id, answer: 0.5, loop="sft")


# ---- What their pages have -----------------------------------------------------------------------


def count_groups(page: dict) -> dict[str, dict[str, int]]:
    """Give {title of a table: {name of a group: its queries}}."""
    counts = {}
    for table in page["groups"]:
        counts[table["title"]] = {row["name"]: row["n"] for row in table["rows"]}
    return counts


def test_lists_are_shown_as_orders_of_the_given_list(rerank):
    page = content(report.write_report([str(rerank)]))

    [run] = page["runs"]
    shown = page["ranking"]
    assert shown["why"] == ""
    assert shown["listed"]
    assert not shown["explained"]
    assert shown["sides"] == ["given order", "new order"]
    assert run["words"] == shown["sides"]
    assert run["retriever"] is None

    best = shown["queries"][0]
    assert best["id"] == "t0"
    assert best["raw"] == "lamp film"
    assert best["texts"] == ["1, 2, 3, 4", "3, 1, 2, 4"]
    assert best["scores"] == pytest.approx([0.5, 1.0])
    places = [(document["id"], document["places"]) for document in best["documents"]]
    assert places == [("f0", [1, 2]), ("f1", [2, 3]), ("f2", [3, 1]), ("f3", [4, 4])]
    assert shown["documents"]["f2"].startswith("green lamp")

    [lost] = [query for query in shown["queries"] if query["id"] == "t1"]
    assert lost["texts"][1] is None
    for document in lost["documents"]:
        assert document["places"][1] is None

    counts = count_groups(page)
    assert counts["what the answer did"] == {"another order": 2, "no answer": 1}
    assert counts["words in the query"] == {"2": 3}
    assert "word left out" not in counts

    assert run["curves"]["lcs"]["mean"] == [0.25] * 4
    after = 1.0 + 0.0 + 0.5  # f2 is first, no answer, f1 is third
    raw = 1 / log2(4) + 1 / log2(5) + 1 / log2(3)  # f2 is third, f3 fourth, f1 second
    gain = run["results"]["after_minus_raw"][0]
    assert gain == pytest.approx((after - raw) / 3)

    audit = run["rollouts"]["audit"]
    answers = [row["answer"] for row in audit]
    assert answers == ["Item_1, Item_2", "Item_1, Item_2"]
    assert "the given order" in audit[0]["flags"]
    assert run["rollouts"]["recurring"][0]["prompts"] == 2


def test_histories_profiles_and_another_metric(listed):
    page = content(report.write_report([str(listed)]))

    [run] = page["runs"]
    shown = page["ranking"]
    assert run["label"] == "MRR@4"
    assert run["evaluations"][0]["score"] == 0.5
    assert shown["why"] == ""
    about = shown["queries"][0]["about"]
    assert about == dict(profile="age 30", history=["f0", "f4"], items=2)
    assert shown["documents"]["f4"].startswith("black lamp")

    counts = count_groups(page)
    assert counts["items in the history"] == {"1 to 2": 3}
    assert "first word" not in counts
    assert "MRR@4 of the raw list" in counts
    answers = counts["what the answer did"]
    assert answers == {"the given order": 1, "another order": 1, "items left out": 1}


def test_what_was_seen_is_no_hit(tmp_path):
    """Sequential with reward.remove_seen: f0 has the words of the query, stands in the history, and
    is not shown.
    """
    hits = {"lamp film": ["f2", "f4"], "red chair": ["f1"]}  # what BM25 brings without f0 and f3
    score = make_score(compute_ndcg, hits)
    answers = (["lamp film"] * 3, ["red chair"] * 3)
    run = write_run(tmp_path, "sequential", answers, score, remove_seen=True)
    config = load_config(str(run / "config.yaml"), [])
    build = build_retriever(config.retriever)
    retriever, _ = build(config.data.corpus, "stop", None, print)

    page = content(report.write_report([str(run)], retriever=retriever))

    shown = page["ranking"]
    assert shown["why"] == ""
    assert shown["explained"]
    query_ids = [query["id"] for query in shown["queries"]]
    assert query_ids == ["t2", "t0", "t1"]
    for query in shown["queries"]:
        documents = query["documents"]
        document_ids = [document["id"] for document in documents]
        assert document_ids == ["f2", "f4", "f1"]
        assert query["about"]["history"] == ["f0", "f3"]
        assert documents[2]["terms"]
        for _, before, after in documents[2]["terms"]:
            assert before == 0
            assert after > 0
    assert "The run's index" in ranking.open_search(config, run)


def test_sft_has_no_rollouts_and_says_so(sft):
    message = report.write_report_at_end(sft, None, None)
    assert message == f"report: {sft / 'report.html'}"

    [run] = content(sft / "report.html")["runs"]
    assert run["loop"] == "sft"
    assert run["steps"] == 4
    assert run["planned"] == 4
    assert "SFT samples nothing" in run["rollouts"]["why"]
    assert run["curves"]["loss"]["mean"] == [2.0] * 4
    assert "reward" not in run["curves"]
    for note in run["notes"]:
        assert "rollouts" not in note
        assert "tokenizer" not in note


def test_the_teacher_of_a_run_of_version_0_1_has_its_errors(sft, tmp_path):
    old_run = tmp_path / "run"
    shutil.copytree(sft, old_run)
    summary = json.loads((sft / "summary.json").read_text())
    teacher = summary["teacher"]
    teacher["errors"] = teacher.pop("format_errors")
    (old_run / "summary.json").write_text(json.dumps(summary))

    [run] = content(report.write_report([str(old_run)]))["runs"]
    assert run["summary"]["teacher"]["format_errors"] == TEACHER["format_errors"]
    assert "errors" not in run["summary"]["teacher"]


@pytest.mark.parametrize("log, note", [(b"", ""), (None, "missing"), (b"\x1f\x8b\x08", "torn")])
def test_a_run_without_a_rollout(log, note, tmp_path):
    answers = ([["f0"]] * 3, [["f1"]] * 3)
    run = write_run(tmp_path, "rerank", answers, make_score(compute_ndcg))
    (run / "rollouts.jsonl.gz").unlink()
    if log is not None:
        (run / "rollouts.jsonl.gz").write_bytes(log)

    [page_run] = content(report.write_report([str(run)]))["runs"]

    shown = page_run["rollouts"]
    assert shown["rows"] == 0
    assert shown["audit"] == []
    assert note in shown["note"]
    assert bool(note) == bool(shown["note"])


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
    parsed = dict(text=text, error=None)
    refused = dict(text=text, error="no_json")
    assert rollouts.extract_answer(parsed, key) == answer
    assert rollouts.extract_answer(refused, key) is None


def list_flags(answer, task: str, prompts: int = 1) -> list[str]:
    """List what is conspicuous about an answer to "red lamp" that so many prompts got."""
    rollout = dict(text="t", finished=True)
    return rollouts.list_flags("red lamp", answer, rollout, prompts, task)


def test_what_is_conspicuous():
    assert list_flags("lamp lamp lamp", "product_search") == ["'lamp' 3 times"]
    assert list_flags("kettle", "product_search") == ["no word of the query"]
    assert list_flags("kettle", "sequential") == []
    repeated = list_flags("Item_1, Item_2", "rerank", prompts=3)
    assert repeated == ["the given order", "answer to 3 queries"]
    assert list_flags("Item_2, Item_1", "rerank") == []
    assert list_flags(None, "rerank") == ["no answer"]
    assert list_flags("!?", "sequential") == ["no letter or digit"]


def test_what_a_list_did():
    given = ["a", "b", "c"]
    assert groups.classify_list(given, None) == "no answer"
    assert groups.classify_list(given, given) == "the given order"
    assert groups.classify_list(given, ["c", "a", "b"]) == "another order"
    assert groups.classify_list(given, ["b"]) == "items left out"
    assert groups.classify_list(given, ["a", "x"]) == "another answer"
    assert groups.classify_list(given, dict(a=1)) == "another answer"


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

    path = report.write_report([str(run)])
    assert open_page(browser, path) == SECTIONS
    assert browser.value(PAGE_WIDTH) <= 390
    text = browser.value("document.querySelector('main').textContent").lower()
    for word in says:
        assert word.lower() in text

    other_name = "rerank" if name == "sft" else "sft"
    other = request.getfixturevalue(other_name)
    path = report.write_report([str(run), str(other)])
    assert open_page(browser, path) == SECTIONS
