"""The tasks: what their prompts show, what their parsers take and refuse, how answers are ranked;
and the scoring that they share.
"""

import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.fuzz_answers import completions, wrap
from helpers.tiny_world import tiny_tokenizer

from recr1.config import loader as configs
from recr1.config.schema import Config, ConfigError, DataConfig, PromptConfig, RewardConfig
from recr1.data.chat_template import ChatTemplate
from recr1.data.readers import DataError
from recr1.data_types import Prompt, Rollout
from recr1.retrieval.interface import NoRetriever
from recr1.tasks.candidate_list import CandidateRanking, list_mentioned, read_titles
from recr1.tasks.product_search import ProductSearch
from recr1.tasks.prompts import load_prompts
from recr1.tasks.ranking_metrics import compute_ndcg
from recr1.tasks.recommend_list import RecommendList
from recr1.tasks.registry import TASKS, build_task
from recr1.tasks.rerank import Rerank
from recr1.tasks.rewards import RewardTerms
from recr1.tasks.scorer import Scorer
from recr1.tasks.sequential import Sequential

ROOT = Path(__file__).resolve().parents[3]
RULE = RewardConfig()
TITLES = dict(a="red lamp", b="green\nchair Item_3: \u2028 x", c="</think> table", d="blue shirt")


def title(id):
    return " ".join(TITLES[id].split())


# --- prompts --------------------------------------------------------------------------------------


def test_what_the_prompts_show():
    row = dict(
        text="lamps",
        profile=" likes\nlamps ",
        history=[["a", "2018-01-02"], ["d", "2018-02-03"]],
        candidates=["b", "c"],
    )
    shown = "Item_1: green chair Item_3: x\nItem_2: </think> table"
    assert ProductSearch(RULE).render(row, title) == ("lamps",)
    assert (
        Sequential(RULE).render(row, title)
        == Sequential(RULE).render(row | dict(history=["a", "d"]), title)
        == ("Item 1: red lamp\nItem 2: blue shirt",)
    )
    assert Rerank(RULE).render(row, title) == ("lamps", shown)
    assert RecommendList(RULE).render(row, title) == (
        "likes lamps",
        "2018-01-02: red lamp\n2018-02-03: blue shirt",
        shown,
    )
    assert RecommendList(RULE).render(
        dict(text="x", profile=" ", history=[], candidates=["a"]), title
    ) == ("unknown", "none", "Item_1: red lamp")
    assert list_mentioned(row) == ["a", "d", "b", "c"]
    assert list_mentioned(dict(text="x")) == []


def write(folder: Path, corpus, queries, gains=None) -> DataConfig:
    for name, rows in (("corpus.jsonl", corpus), ("q.jsonl", queries)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    gains = gains or [(row["id"], corpus[0]["id"], 1) for row in queries]
    (folder / "r.tsv").write_text("".join(f"{q}\t{d}\t{g}\n" for q, d, g in gains))
    return DataConfig(
        corpus=str(folder / "corpus.jsonl"),
        train_queries=str(folder / "q.jsonl"),
        train_qrels=str(folder / "r.tsv"),
    )


def splits(data: DataConfig, task: str, user: str, **prompt):
    cfg = Config(
        task=task,
        data=data,
        prompt=PromptConfig(user=user, max_tokens=4096, **prompt),
        train=Config().train.__class__(prompts_per_step=1),
    )
    made = build_task(cfg)
    return load_prompts(
        cfg, ChatTemplate(tiny_tokenizer(), "", user, "<think>", made.placeholders), made
    )


CORPUS = [dict(id=id, title=t) for id, t in TITLES.items()] + [
    dict(id="e", text="a text alone that is long")
]
USERS = dict(
    rerank="{query}|{candidates}",
    sequential="{history}",
    recommend_list="{profile}|{history}|{candidates}",
)


def test_a_titles_newlines_and_labels_do_not_make_lines(tmp_path):
    """However the data try: as many lines as items, labels in order at their beginnings, no control
    token.
    """
    rng = random.Random(0)
    scraps = [
        "\n",
        "\r",
        "\x85",
        "\u2029",
        "\v",
        "Item_2: ",
        "\nItem_1: lamp",
        "</think>",
        "<|end|>",
        "<answer>",
        " ",
        "red",
        '["Item_1"]',
    ]
    corpus = [
        dict(id=f"d{i}", title="".join(rng.choices(scraps, k=rng.randint(1, 8))) + "x")
        for i in range(40)
    ]
    queries = [
        dict(id=f"q{i}", text="lamp", candidates=[f"d{d}" for d in rng.sample(range(40), 6)])
        for i in range(60)
    ]
    tokenizer = tiny_tokenizer()
    for prompt in splits(write(tmp_path, corpus, queries), "rerank", USERS["rerank"])[0]:
        text = (
            tokenizer.decode(prompt.ids)
            .removeprefix("<|user|>lamp|")
            .removesuffix("<|end|><|assistant|><think>")
        )
        assert [line.split(":")[0] for line in text.splitlines()] == [
            f"Item_{i}" for i in range(1, 7)
        ]
        # of the template, and <think>
        assert sum(i in set(tokenizer.get_added_vocab().values()) for i in prompt.ids) == 4


def test_titles_are_cut_and_taken_from_the_text_where_there_is_none(tmp_path):
    data = write(tmp_path, CORPUS, [dict(id="q", text="x")])
    show, lacking, dropped = read_titles(data.corpus, "stop", ["b", "e", "zz"], 3)
    assert (show("b"), show("e"), lacking, dropped) == (
        "green chair Item_3:",
        "a text alone",
        {"zz"},
        [],
    )
    with pytest.raises(KeyError):
        show("a")  # titles that no prompt shows are not kept


def test_product_search_reads_no_corpus_for_its_prompts(tmp_path):
    data = write(
        tmp_path,
        CORPUS,
        [dict(id=f"q{i}", text="lamp", history=["a"], candidates=["b"]) for i in range(60)],
    )
    Path(data.corpus).write_text("no document")
    train, *_ = splits(data, "product_search", "{query}")
    assert train[0].row == dict(text="lamp")


@pytest.mark.parametrize(
    "task, broken, message",
    [
        ("rerank", dict(candidates=None), "no key 'candidates'"),
        ("rerank", dict(candidates=[]), "want a list of distinct document ids, at least one"),
        ("rerank", dict(candidates=["a", "a"]), "want a list of distinct"),
        ("rerank", dict(candidates="ab"), "want a list of distinct"),
        ("rerank", dict(candidates=["a", 3]), "want a list of distinct"),
        ("rerank", dict(candidates=["a", "zz"]), "shows document 'zz'"),
        ("sequential", dict(history="a"), "want a list of document ids"),
        ("sequential", dict(history=[["a"]]), "want a list of document ids"),
        ("sequential", dict(history=[["a", "2018", "x"]]), "want a list"),
        ("sequential", dict(history=["zz"]), "shows document 'zz'"),
        ("recommend_list", dict(profile=None), "no key 'profile'"),
        ("recommend_list", dict(profile=3), "'profile' is a int, not a string"),
    ],
)
def test_rows_that_a_task_cannot_use_are_named(tmp_path, task, broken, message):
    good = dict(text="lamp", profile="p", history=["a"], candidates=["a", "b"])
    rows = [dict(id=f"q{i}", **good) for i in range(60)]
    rows[7] = {key: value for key, value in (rows[7] | broken).items() if value is not None}
    data = write(tmp_path, CORPUS, rows)
    with pytest.raises(DataError) as e:
        splits(data, task, USERS[task])
    assert message in str(e.value)
    assert "q.jsonl:8: " in str(e.value) or "query 'q7'" in str(e.value)
    assert "\n" not in str(e.value)
    parts = splits(DataConfig(**vars(data) | dict(on_bad_line="drop")), task, USERS[task])[:3]
    assert {p.id for part in parts for p in part} == {f"q{i}" for i in range(60)} - {"q7"}


# --- parsers --------------------------------------------------------------------------------------

ROW = dict(text="lamps", candidates=["a", "b", "c"])


def listed(items, key="reranked_items"):
    return wrap(json.dumps({key: items}))


def test_lists_are_taken():
    assert Rerank(RULE).parse(listed(["Item_3", "Item_1", "Item_2"]), ROW) == (
        ["c", "a", "b"],
        None,
    )
    assert RecommendList(RULE).parse(listed(["Item_3"], "items"), ROW) == (["c"], None)
    assert RecommendList(RULE).parse(wrap('{"why": 1, "items": ["Item_2", "Item_1"]}'), ROW) == (
        ["b", "a"],
        None,
    )


LISTS = [
    ("[]", "not_object"),
    ("{}", "no_list"),
    ('{"items": ["Item_1", "Item_2", "Item_3"]}', "no_list"),
    ('{"reranked_items": null}', "not_list"),
    ('{"reranked_items": "Item_1"}', "not_list"),
    ('{"reranked_items": {"Item_1": 1}}', "not_list"),
    ('{"reranked_items": [1, 2, 3]}', "not_label"),
    ('{"reranked_items": ["Item_1", ["Item_2"], "Item_3"]}', "not_label"),
    ('{"reranked_items": ["Item_1", "Item_2", "Item_4"]}', "unknown_item"),
    ('{"reranked_items": ["Item_1", "Item_2", "Item_0"]}', "unknown_item"),
    ('{"reranked_items": ["Item_1", "Item_2", "Item_03"]}', "unknown_item"),
    ('{"reranked_items": ["Item_1", "Item_2", " Item_3"]}', "unknown_item"),
    ('{"reranked_items": ["Item_1", "Item_2", "item_3"]}', "unknown_item"),
    ('{"reranked_items": ["a", "b", "c"]}', "unknown_item"),
    ('{"reranked_items": ["Item_1", "Item_2", "Item_\u0663"]}', "unknown_item"),
    ('{"reranked_items": ["Item_1", "Item_2", "Item_' + "9" * 6000 + '"]}', "unknown_item"),
    ('{"reranked_items": ["\\ud800"]}', "unknown_item"),
    ('{"reranked_items": ["Item_1", "Item_2", "Item_1"]}', "repeated_item"),
    ('{"reranked_items": ["Item_1", "Item_2", "Item_3", "Item_3"]}', "repeated_item"),
    ('{"reranked_items": ["Item_1", "Item_2"]}', "list_length"),
    ('{"reranked_items": []}', "list_length"),
    ('{"reranked_items": ["Item_1"], "reranked_items": ["Item_1"]}', "duplicate_key"),
]


@pytest.mark.parametrize("body, error", LISTS, ids=range(len(LISTS)))
def test_lists_are_refused_by_name(body, error):
    assert Rerank(RULE).parse(wrap(body), ROW) == (None, error)
    assert error in set(re.findall(r"\b[a-z]+_[a-z]+\b", CandidateRanking.parse.__doc__)) | {
        "duplicate_key",
        "not_object",
    }


def test_an_empty_list_is_no_recommendation():
    assert RecommendList(RULE).parse(listed([], "items"), ROW) == (None, "list_length")


def test_fuzz_of_the_lists():
    """10,000 hostile completions and 3,000 broken lists: an answer is distinct candidates of the
    row, an error has a name; nothing raises.
    """
    rng = random.Random(1)
    outcomes = Counter()

    def broken_lists(n):
        scraps = [
            "Item_1",
            "Item_2",
            "Item_3",
            "Item_4",
            "Item_",
            "1",
            None,
            2,
            ["Item_1"],
            {"a": 1},
            "\ud800",
            "Item_1\n",
        ]
        for _ in range(n):
            items = rng.sample(["Item_1", "Item_2", "Item_3"], rng.randint(0, 3)) + rng.choices(
                scraps, k=rng.choice([0, 0, 0, 1])
            )
            rng.shuffle(items)
            text = listed(items, rng.choice(["reranked_items"] * 9 + ["items"]))
            yield text if rng.random() < 0.9 else text[: rng.randrange(len(text))]

    for completion in (*completions(10_000, seed=2), *broken_lists(3_000)):
        for task in (Rerank(RULE), RecommendList(RULE)):
            answer, error = task.parse(completion, ROW)
            assert (answer is None) != (error is None)
            assert (
                answer is None
                or len(set(answer)) == len(answer)
                and set(answer) <= {"a", "b", "c"}
                and (not task.whole or len(answer) == 3)
            )
            outcomes[error] += 1
    wanted = {
        None,
        "no_list",
        "not_label",
        "unknown_item",
        "repeated_item",
        "list_length",
        "no_think_end",
        "tags",
        "no_json",
        "too_deep",
        "too_long",
    }
    assert wanted <= set(outcomes) and all(outcomes[error] >= 20 for error in wanted), outcomes


# --- scoring --------------------------------------------------------------------------------------


class Words:
    """A retriever by hand: documents d0 .. d19, those that have a number of the query come first,
    in the query's order.
    """

    doc_ids = [f"d{i}" for i in range(20)]
    description = "by hand"

    def search(self, queries, k):
        rows = np.full((len(queries), k), -1)
        for q, query in enumerate(queries):
            hits = list(
                dict.fromkeys(int(w) for w in query.split() if w.isdecimal() and int(w) < 20)
            )[:k]
            rows[q, : len(hits)] = hits
        return rows, np.where(rows < 0, -np.inf, 0.0)


def scorer(task, gains, rule=RULE, k=5, closed=False, **more):
    return Scorer(
        task,
        Words() if task.uses_retriever else NoRetriever(),
        gains,
        RewardTerms(rule, k, **more),
        decode=lambda ids: texts[ids],
        stops=frozenset(),
        limit=0,
        thought_closed=closed,
    )


texts = {}  # what the test's token ids stand for


def rollout(text, id="q", row=None, sibling=0):
    ids = (len(texts) + 1,)
    texts[ids] = text
    return Rollout(Prompt(id, 0, "", (), row or dict(text="0 1")), 0, sibling, ids, (0.0,), True)


@pytest.mark.parametrize(
    "rule",
    [
        RewardConfig(),
        RewardConfig(bonus=0.0, unparsable=-1.0),
        RewardConfig(bonus=0.07, miss=-0.3, unparsable=-0.5),
    ],
)
def test_product_search_totals_are_the_published_rule_to_the_bit(rule):
    rng = random.Random(0)
    gains = dict(d3=1.0, d7=2.0, d11=1.0)
    queries = [" ".join(map(str, rng.choices(range(30), k=rng.randint(1, 9)))) for _ in range(200)]
    answers = [
        rollout(wrap(json.dumps({"query": q})) if rng.random() < 0.9 else q) for q in queries
    ]
    for r, query, reward in zip(
        answers, queries, scorer(ProductSearch(rule), {"q": gains}, rule).score(answers)
    ):
        ranked = [f"d{int(w)}" for w in dict.fromkeys(query.split()) if int(w) < 20][:5]
        value = compute_ndcg(ranked, gains, 5)
        if "<answer>" in texts[r.ids]:
            assert reward.total == (rule.bonus + value if value > 0 else rule.miss)
            assert reward.terms == {"ndcg": value}
            assert reward.answer == query
        else:
            assert (reward.total, reward.terms, reward.error, reward.answer) == (
                rule.unparsable,
                {"ndcg": 0.0},
                "no_think_end",
                None,
            )


def test_a_completion_is_searched_once_and_each_query_has_its_own_judgements():
    class Counting(Words):
        asked = []

        def search(self, queries, k):
            self.asked += queries
            return super().search(queries, k)

    s = scorer(ProductSearch(RULE), {"q": {"d1": 1.0}, "p": {"d2": 1.0}})
    s.retriever = Counting()
    one = rollout(wrap('{"query": "1 2"}'))
    other = Rollout(Prompt("p", 1, "", (), dict(text="x")), 1, 0, one.ids, (0.0,), True)
    first = s.score([one, one, other])
    assert first[0] is first[1]
    assert first[0].total == 1.1
    assert first[2].total == pytest.approx(0.1 + 1 / np.log2(3))
    assert s.retriever.asked == ["1 2", "1 2"]
    assert s.score([other, one]) == [first[2], first[0]]
    assert len(s.retriever.asked) == 2
    assert s.score([]) == []


def test_what_was_seen_is_removed_and_the_rest_moves_up():
    row = dict(text="4", history=["d0", ["d2", "2018-01-01"]])
    gains = {"q": {"d3": 1.0}}
    ranked = [f"d{i}" for i in range(8)]
    query = wrap(json.dumps({"query": " ".join(d[1:] for d in ranked)}))
    for remove, place in ((False, 4), (True, 2)):
        task = Sequential(RewardConfig(remove_seen=remove))
        [reward] = scorer(task, gains, k=4).score([rollout(query, row=row)])
        assert reward.terms["ndcg"] == pytest.approx(1 / np.log2(place + 1))
        found = task.rank(
            ["0 1 2 3 4 5", "0 1"], [row, dict(text="", history=[])], 3, scorer(task, {}).search
        )
        assert found == (
            [["d1", "d3", "d4"], ["d0", "d1"]] if remove else [["d0", "d1", "d2"], ["d0", "d1"]]
        )
    assert task.baseline_answer(row) == "4"  # the last title


def test_lists_are_scored_as_they_are_ordered_and_compared_with_the_given_order():
    gains = {"q": {"c": 2.0, "a": 1.0}}
    for task, key in ((Rerank(RULE), "reranked_items"), (RecommendList(RULE), "items")):
        s = scorer(task, gains, k=3)
        best, worst, bad = s.score(
            [
                rollout(listed([f"Item_{i}" for i in order], key), row=ROW)
                for order in ((3, 1, 2), (2, 1, 3), (1, 1, 2))
            ]
        )
        assert best.total == 1.1
        assert best.answer == ["c", "a", "b"]
        assert 0.1 < worst.total < 0.9
        assert (bad.total, bad.error) == (-2.0, "repeated_item")
        [raw] = s.score_answers([Prompt("q", 0, "", (), ROW)], [task.baseline_answer(ROW)])
        assert raw["ndcg"] == compute_ndcg(["a", "b", "c"], gains["q"], 3)


def test_where_the_prompt_has_closed_the_thought_the_answer_stands_alone():
    bare = '<answer>{"query": "1"}</answer>'
    thought = wrap('{"query": "1"}')
    for closed, want in ((False, ["no_think_end", None]), (True, [None, "tags"])):
        rewards = scorer(ProductSearch(RULE), {"q": {"d1": 1.0}}, closed=closed).score(
            [rollout(bare), rollout(thought)]
        )
        assert [r.error for r in rewards] == want
        assert [r.text for r in rewards] == [bare, thought]


# --- the config's task ----------------------------------------------------------------------------


def test_a_task_that_is_none_is_refused():
    for name, message in (
        ("search", "not one of product_search, sequential, rerank, recommend_list"),
        ("nowhere:Task", "cannot be loaded"),
        ("builtins:str", "has no placeholders, required_fields"),
        ("collections:Counter", "raised TypeError"),
        ("recr1.data_types:Nothing", "cannot be loaded"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_task(Config(task=name))
    with pytest.raises(ConfigError, match="data.shuffle_words"):
        build_task(Config(task="rerank", data=DataConfig(shuffle_words=0.5)))
    own = build_task(Config(task="recr1.tasks.rerank:Rerank"))
    assert isinstance(own.task, Rerank)
    assert (
        own.placeholders,
        own.required_fields,
        own.uses_retriever,
    ) == (
        Rerank.placeholders,
        Rerank.required_fields,
        False,
    )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments/configs/prompts").glob("*.yaml")), ids=lambda p: p.name
)
def test_the_papers_prompts_fit_their_tasks(path, tmp_path):
    task = TASKS[
        {
            "beauty_sequential": "sequential",
            "esci_rerank": "rerank",
            "recllm_list": "recommend_list",
        }.get(path.stem, "product_search")
    ](RULE)
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump(dict(prompt=dict(file=str(path), max_tokens=99)))
    )
    p = configs.load_config(str(tmp_path / "c.yaml"), ["prompt.assistant=so"]).prompt
    own = yaml.safe_load(path.read_text())
    assert (p.user, p.system, p.assistant, p.max_tokens) == (own["user"], own["system"], "so", 99)
    ChatTemplate(
        tiny_tokenizer(), own["system"], own["user"], own["assistant"], task.placeholders
    ).prompt(*["x"] * len(task.placeholders))
    example = re.search(r"<answer>\s*(\{.*?\})\s*</answer>", own["user"], re.DOTALL)[1]
    assert list(json.loads(example)) == [getattr(task, "key", "query")]


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("none.yaml", "", "no such file"),
        ("p.yaml", "- a", "expected `key: value`"),
        ("p.yaml", "a: [", "p.yaml"),
        ("p.yaml", "usr: x", "unknown key prompt.usr"),
        (3, "", "prompt.file: expected str"),
    ],
)
def test_a_prompt_file_that_is_none_is_named(tmp_path, file, text, message):
    (tmp_path / "p.yaml").write_text(text)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(dict(prompt=dict(file=file))))
    with pytest.raises(ConfigError, match=message) as e:
        configs.load_config(str(tmp_path / "c.yaml"), [])
    assert "\n" not in str(e.value)
