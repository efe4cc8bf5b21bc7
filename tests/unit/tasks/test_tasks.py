"""The tasks: what their prompts show, what their parsers take and refuse, how answers are ranked;
and the scoring that they share.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.fuzz_answers import completions, wrap
from helpers.tiny_world import tiny_tokenizer

from recr1.config import loader as configs
from recr1.config.schema import (
    Config,
    ConfigError,
    DataConfig,
    PromptConfig,
    RewardConfig,
    TrainConfig,
)
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
CORPUS = [
    *(dict(id=id, title=title) for id, title in TITLES.items()),
    dict(id="e", text="a text alone that is long"),
]
USERS = dict(
    rerank="{query}|{candidates}",
    sequential="{history}",
    recommend_list="{profile}|{history}|{candidates}",
)


# --- prompts --------------------------------------------------------------------------------------


def show_title(id: str) -> str:
    return " ".join(TITLES[id].split())


def test_what_the_prompts_show():
    row = dict(
        text="lamps",
        profile=" likes\nlamps ",
        history=[["a", "2018-01-02"], ["d", "2018-02-03"]],
        candidates=["b", "c"],
    )
    undated = row | dict(history=["a", "d"])
    empty = dict(text="x", profile=" ", history=[], candidates=["a"])

    product_search = ProductSearch(RULE)
    sequential = Sequential(RULE)
    rerank = Rerank(RULE)
    recommend_list = RecommendList(RULE)

    history = "Item 1: red lamp\nItem 2: blue shirt"
    dated_history = "2018-01-02: red lamp\n2018-02-03: blue shirt"
    candidates = "Item_1: green chair Item_3: x\nItem_2: </think> table"
    shown = recommend_list.render(row, show_title)
    shown_of_empty = recommend_list.render(empty, show_title)
    assert product_search.render(row, show_title) == ("lamps",)
    assert sequential.render(row, show_title) == (history,)
    assert sequential.render(undated, show_title) == (history,)
    assert rerank.render(row, show_title) == ("lamps", candidates)
    assert shown == ("likes lamps", dated_history, candidates)
    assert shown_of_empty == ("unknown", "none", "Item_1: red lamp")
    assert list_mentioned(row) == ["a", "d", "b", "c"]
    assert list_mentioned(dict(text="x")) == []


def write_rows(path: Path, rows: list[dict]) -> str:
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))
    return str(path)


def write_data(folder: Path, corpus: list[dict], queries: list[dict]) -> DataConfig:
    """Write a corpus, queries and judgements: each query looks for the first document."""
    relevant = corpus[0]["id"]
    judgements = [f"{query['id']}\t{relevant}\t1\n" for query in queries]
    qrels = folder / "r.tsv"
    qrels.write_text("".join(judgements))
    return DataConfig(
        corpus=write_rows(folder / "corpus.jsonl", corpus),
        train_queries=write_rows(folder / "q.jsonl", queries),
        train_qrels=str(qrels),
    )


def make_queries(**fields) -> list[dict]:
    """Make 60 queries q0, q1, ... with the same fields."""
    return [dict(id=f"q{i}", **fields) for i in range(60)]


def load_splits(data: DataConfig, task_name: str, user: str):
    prompt = PromptConfig(user=user, max_tokens=4096)
    train = TrainConfig(prompts_per_step=1)
    cfg = Config(task=task_name, data=data, prompt=prompt, train=train)
    task = build_task(cfg)
    template = ChatTemplate(tiny_tokenizer(), "", user, "<think>", task.placeholders)
    return load_prompts(cfg, template, task)


SCRAPS_OF_TITLES = [
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


def draw_hostile_data(folder: Path) -> DataConfig:
    """Draw 40 documents whose titles are scraps, and 60 queries of six candidates each."""
    rng = random.Random(0)
    corpus = []
    for i in range(40):
        scraps = rng.choices(SCRAPS_OF_TITLES, k=rng.randint(1, 8))
        title = "".join(scraps) + "x"
        corpus.append(dict(id=f"d{i}", title=title))
    queries = []
    for i in range(60):
        candidates = [f"d{d}" for d in rng.sample(range(40), 6)]
        queries.append(dict(id=f"q{i}", text="lamp", candidates=candidates))
    return write_data(folder, corpus, queries)


def test_a_titles_newlines_and_labels_do_not_make_lines(tmp_path):
    """However the data try: as many lines as items, labels in order at their beginnings, no control
    token.
    """
    data = draw_hostile_data(tmp_path)
    tokenizer = tiny_tokenizer()
    control_tokens = tokenizer.get_added_vocab()
    control_ids = set(control_tokens.values())

    train, *_ = load_splits(data, "rerank", USERS["rerank"])

    for prompt in train:
        text = tokenizer.decode(prompt.ids)
        text = text.removeprefix("<|user|>lamp|")
        text = text.removesuffix("<|end|><|assistant|><think>")
        labels = [line.split(":")[0] for line in text.splitlines()]
        assert labels == ["Item_1", "Item_2", "Item_3", "Item_4", "Item_5", "Item_6"]
        # of the template, and <think>
        assert sum(i in control_ids for i in prompt.ids) == 4


def test_titles_are_cut_and_taken_from_the_text_where_there_is_none(tmp_path):
    data = write_data(tmp_path, CORPUS, [dict(id="q", text="x")])

    show, lacking, dropped = read_titles(data.corpus, "stop", ["b", "e", "zz"], 3)

    assert show("b") == "green chair Item_3:"
    assert show("e") == "a text alone"
    assert lacking == {"zz"}
    assert dropped == []
    with pytest.raises(KeyError):
        show("a")  # titles that no prompt shows are not kept


def test_product_search_reads_no_corpus_for_its_prompts(tmp_path):
    queries = make_queries(text="lamp", history=["a"], candidates=["b"])
    data = write_data(tmp_path, CORPUS, queries)
    Path(data.corpus).write_text("no document")

    train, *_ = load_splits(data, "product_search", "{query}")

    assert train[0].row == dict(text="lamp")


BROKEN_ROWS = [  # task, key, its value (None: without it), message
    ("rerank", "candidates", None, "no key 'candidates'"),
    ("rerank", "candidates", [], "want a list of distinct document ids, at least one"),
    ("rerank", "candidates", ["a", "a"], "want a list of distinct"),
    ("rerank", "candidates", "ab", "want a list of distinct"),
    ("rerank", "candidates", ["a", 3], "want a list of distinct"),
    ("rerank", "candidates", ["a", "zz"], "shows document 'zz'"),
    ("sequential", "history", "a", "want a list of document ids"),
    ("sequential", "history", [["a"]], "want a list of document ids"),
    ("sequential", "history", [["a", "2018", "x"]], "want a list"),
    ("sequential", "history", ["zz"], "shows document 'zz'"),
    ("recommend_list", "profile", None, "no key 'profile'"),
    ("recommend_list", "profile", 3, "'profile' is a int, not a string"),
]


@pytest.mark.parametrize("task, key, value, message", BROKEN_ROWS)
def test_rows_that_a_task_cannot_use_are_named(tmp_path, task, key, value, message):
    rows = make_queries(text="lamp", profile="p", history=["a"], candidates=["a", "b"])
    rows[7][key] = value
    if value is None:
        del rows[7][key]
    data = write_data(tmp_path, CORPUS, rows)

    with pytest.raises(DataError) as error:
        load_splits(data, task, USERS[task])
    text = str(error.value)
    assert message in text
    assert "q.jsonl:8: " in text or "query 'q7'" in text
    assert "\n" not in text

    tolerant = replace(data, on_bad_line="drop")
    train, validation, test, *_ = load_splits(tolerant, task, USERS[task])
    ids = {prompt.id for prompt in [*train, *validation, *test]}
    assert ids == {row["id"] for row in rows} - {"q7"}


# --- parsers --------------------------------------------------------------------------------------

ROW = dict(text="lamps", candidates=["a", "b", "c"])


def write_list(items: list, key: str = "reranked_items") -> str:
    body = json.dumps({key: items})
    return wrap(body)


def test_lists_are_taken():
    complete = write_list(["Item_3", "Item_1", "Item_2"])
    short = write_list(["Item_3"], "items")
    with_reason = wrap('{"why": 1, "items": ["Item_2", "Item_1"]}')

    recommend_list = RecommendList(RULE)
    rerank = Rerank(RULE)
    assert rerank.parse(complete, ROW) == (["c", "a", "b"], None)
    assert recommend_list.parse(short, ROW) == (["c"], None)
    assert recommend_list.parse(with_reason, ROW) == (["b", "a"], None)


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
    documented = re.findall(r"\b[a-z]+_[a-z]+\b", CandidateRanking.parse.__doc__)

    answer = wrap(body)
    assert Rerank(RULE).parse(answer, ROW) == (None, error)
    assert error in [*documented, "duplicate_key", "not_object"]


def test_an_empty_list_is_no_recommendation():
    empty = write_list([], "items")

    assert RecommendList(RULE).parse(empty, ROW) == (None, "list_length")


LABELS = ["Item_1", "Item_2", "Item_3"]
SCRAPS_OF_LISTS = [
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
FUZZ_OUTCOMES = {
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


def draw_broken_lists(count: int, rng: random.Random) -> Iterator[str]:
    """Draw lists of labels with now and then a scrap among them, the other task's key, or a cut."""
    for _ in range(count):
        items = rng.sample(LABELS, rng.randint(0, 3))
        scraps = rng.choice([0, 0, 0, 1])
        items += rng.choices(SCRAPS_OF_LISTS, k=scraps)
        rng.shuffle(items)
        key = rng.choice(["reranked_items"] * 9 + ["items"])
        text = write_list(items, key)
        if rng.random() >= 0.9:
            end = rng.randrange(len(text))
            text = text[:end]
        yield text


def check_parsed(task, answer, error) -> None:
    """Check that an answer is distinct candidates of the row, or that the error has a name."""
    assert (answer is None) != (error is None)
    if answer is None:
        return
    distinct = set(answer)
    assert len(distinct) == len(answer)
    assert distinct <= {"a", "b", "c"}
    if task.whole:
        assert len(answer) == 3


def test_fuzz_of_the_lists():
    """Parse 10,000 hostile completions and 3,000 broken lists; nothing raises."""
    rng = random.Random(1)
    hostile = list(completions(10_000, seed=2))
    hostile += draw_broken_lists(3_000, rng)
    tasks = (Rerank(RULE), RecommendList(RULE))

    outcomes = Counter()
    for completion in hostile:
        for task in tasks:
            answer, error = task.parse(completion, ROW)
            check_parsed(task, answer, error)
            outcomes[error] += 1

    for error in FUZZ_OUTCOMES:
        assert outcomes[error] >= 20, (error, outcomes)


# --- scoring --------------------------------------------------------------------------------------


class NumberRetriever:
    """Retrieve by hand: documents d0 .. d19, those that have a number of the query come first, in
    the query's order.
    """

    doc_ids = [f"d{i}" for i in range(20)]
    description = "by hand"

    def search(self, queries: list[str], k: int):
        shape = (len(queries), k)
        rows = np.full(shape, -1)
        for i, query in enumerate(queries):
            hits = find_numbers(query)[:k]
            rows[i, : len(hits)] = hits
        scores = np.where(rows < 0, -np.inf, 0.0)
        return rows, scores


class CountingRetriever(NumberRetriever):
    def __init__(self):
        self.queries = []

    def search(self, queries: list[str], k: int):
        self.queries += queries
        return super().search(queries, k)


def find_numbers(query: str) -> list[int]:
    """Find the distinct numbers below 20 in a query, in its order."""
    numbers = []
    for word in query.split():
        if not word.isdecimal():
            continue
        number = int(word)
        if number < 20 and number not in numbers:
            numbers.append(number)
    return numbers


TEXTS = {}  # what the tests' token ids stand for


def make_scorer(task, gains, rule=RULE, k=5, closed=False) -> Scorer:
    retriever = NumberRetriever() if task.uses_retriever else NoRetriever()
    return Scorer(
        task,
        retriever,
        gains,
        RewardTerms(rule, k),
        decode=TEXTS.__getitem__,
        stops=frozenset(),
        limit=0,
        thought_closed=closed,
    )


def write_query(query: str) -> str:
    body = json.dumps({"query": query})
    return wrap(body)


def make_prompt(id="q", row=None) -> Prompt:
    default = dict(text="0 1")
    return Prompt(id, 0, "", (), row or default)


def make_rollout(text: str, row=None) -> Rollout:
    """Make a rollout whose one token stands for the text."""
    ids = (len(TEXTS) + 1,)
    TEXTS[ids] = text
    return Rollout(make_prompt(row=row), 0, 0, ids, (0.0,), True)


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
    queries = []
    for _ in range(200):
        length = rng.randint(1, 9)
        numbers = rng.choices(range(30), k=length)
        query = " ".join(map(str, numbers))
        queries.append(query)
    rollouts = []
    for query in queries:
        text = query
        if rng.random() < 0.9:
            text = write_query(query)
        rollouts.append(make_rollout(text))

    scorer = make_scorer(ProductSearch(rule), {"q": gains}, rule)
    rewards = scorer.score(rollouts)

    for rollout, query, reward in zip(rollouts, queries, rewards, strict=True):
        if "<answer>" in TEXTS[rollout.ids]:
            ranked = [f"d{number}" for number in find_numbers(query)[:5]]
            ndcg = compute_ndcg(ranked, gains, 5)
            assert reward.total == (rule.bonus + ndcg if ndcg > 0 else rule.miss)
            assert reward.terms == {"ndcg": ndcg}
            assert reward.answer == query
        else:
            assert reward.total == rule.unparsable
            assert reward.terms == {"ndcg": 0.0}
            assert reward.error == "no_think_end"
            assert reward.answer is None


def test_a_completion_is_searched_once_and_each_query_has_its_own_judgements():
    scorer = make_scorer(ProductSearch(RULE), {"q": {"d1": 1.0}, "p": {"d2": 1.0}})
    scorer.retriever = CountingRetriever()
    one = make_rollout(write_query("1 2"))
    other_prompt = Prompt("p", 1, "", (), dict(text="x"))
    other = Rollout(other_prompt, 1, 0, one.ids, (0.0,), True)

    rewards = scorer.score([one, one, other])

    assert rewards[0] is rewards[1]
    assert rewards[0].total == 1.1
    assert rewards[2].total == pytest.approx(0.1 + 1 / np.log2(3))
    assert scorer.retriever.queries == ["1 2", "1 2"]
    assert scorer.score([other, one]) == [rewards[2], rewards[0]]
    assert len(scorer.retriever.queries) == 2
    assert scorer.score([]) == []


def test_what_was_seen_is_removed_and_the_rest_moves_up():
    row = dict(text="4", history=["d0", ["d2", "2018-01-01"]])
    without_history = dict(text="", history=[])
    completion = write_query("0 1 2 3 4 5 6 7")
    answers = ["0 1 2 3 4 5", "0 1"]
    all_ranked = [["d0", "d1", "d2"], ["d0", "d1"]]
    unseen_ranked = [["d1", "d3", "d4"], ["d0", "d1"]]

    for remove, place, want in ((False, 4, all_ranked), (True, 2, unseen_ranked)):
        task = Sequential(RewardConfig(remove_seen=remove))
        scorer = make_scorer(task, {"q": {"d3": 1.0}}, k=4)
        [reward] = scorer.score([make_rollout(completion, row=row)])
        ranked = task.rank(answers, [row, without_history], 3, scorer.search)
        assert reward.terms["ndcg"] == pytest.approx(1 / np.log2(place + 1))
        assert ranked == want
    assert task.baseline_answer(row) == "4"  # the last title


def test_lists_are_scored_as_they_are_ordered_and_compared_with_the_given_order():
    gains = {"c": 2.0, "a": 1.0}
    orders = [
        ["Item_3", "Item_1", "Item_2"],
        ["Item_2", "Item_1", "Item_3"],
        ["Item_1", "Item_1", "Item_2"],
    ]

    for task, key in ((Rerank(RULE), "reranked_items"), (RecommendList(RULE), "items")):
        scorer = make_scorer(task, {"q": gains}, k=3)
        rollouts = [make_rollout(write_list(order, key), row=ROW) for order in orders]
        best, worst, bad = scorer.score(rollouts)
        baseline = task.baseline_answer(ROW)
        [raw] = scorer.score_answers([make_prompt(row=ROW)], [baseline])
        assert best.total == 1.1
        assert best.answer == ["c", "a", "b"]
        assert 0.1 < worst.total < 0.9
        assert bad.total == -2.0
        assert bad.error == "repeated_item"
        assert raw["ndcg"] == compute_ndcg(["a", "b", "c"], gains, 3)


def test_where_the_prompt_has_closed_the_thought_the_answer_stands_alone():
    bare = '<answer>{"query": "1"}</answer>'
    thought = write_query("1")

    for closed, want in ((False, ["no_think_end", None]), (True, [None, "tags"])):
        scorer = make_scorer(ProductSearch(RULE), {"q": {"d1": 1.0}}, closed=closed)
        first = make_rollout(bare)
        second = make_rollout(thought)
        rewards = scorer.score([first, second])
        assert [reward.error for reward in rewards] == want
        assert [reward.text for reward in rewards] == [bare, thought]


# --- the config's task ----------------------------------------------------------------------------

BAD_TASKS = [  # task, message
    ("search", "not one of product_search, sequential, rerank, recommend_list"),
    ("nowhere:Task", "cannot be loaded"),
    ("builtins:str", "has no placeholders, required_fields"),
    ("collections:Counter", "raised TypeError"),
    ("recr1.data_types:Nothing", "cannot be loaded"),
]


def test_a_task_that_is_none_is_refused():
    for name, message in BAD_TASKS:
        bad_config = Config(task=name)
        with pytest.raises(ConfigError, match=message):
            build_task(bad_config)
    shuffled = Config(task="rerank", data=DataConfig(shuffle_words=0.5))
    with pytest.raises(ConfigError, match="data.shuffle_words"):
        build_task(shuffled)

    user_config = Config(task="recr1.tasks.rerank:Rerank")
    loaded = build_task(user_config)
    assert isinstance(loaded.task, Rerank)
    assert loaded.placeholders == Rerank.placeholders
    assert loaded.required_fields == Rerank.required_fields
    assert loaded.uses_retriever is False


PROMPT_FILES = sorted((ROOT / "experiments/configs/prompts").glob("*.yaml"))
TASK_OF_PROMPT_FILE = {
    "beauty_sequential": "sequential",
    "esci_rerank": "rerank",
    "recllm_list": "recommend_list",
}


def load_prompt_config(folder: Path, *overrides: str, **settings) -> PromptConfig:
    path = folder / "c.yaml"
    tree = dict(prompt=settings)
    path.write_text(yaml.safe_dump(tree))
    cfg = configs.load_config(str(path), list(overrides))
    return cfg.prompt


@pytest.mark.parametrize("path", PROMPT_FILES, ids=lambda path: path.name)
def test_the_papers_prompts_fit_their_tasks(path, tmp_path):
    task_name = TASK_OF_PROMPT_FILE.get(path.stem, "product_search")
    task = TASKS[task_name](RULE)
    written = yaml.safe_load(path.read_text())

    prompt = load_prompt_config(tmp_path, "prompt.assistant=so", file=str(path), max_tokens=99)

    assert prompt.user == written["user"]
    assert prompt.system == written["system"]
    assert prompt.assistant == "so"
    assert prompt.max_tokens == 99
    template = ChatTemplate(
        tiny_tokenizer(),
        written["system"],
        written["user"],
        written["assistant"],
        task.placeholders,
    )
    values = ["x"] * len(task.placeholders)
    template.prompt(*values)
    match = re.search(r"<answer>\s*(\{.*?\})\s*</answer>", written["user"], re.DOTALL)
    example = json.loads(match[1])
    assert list(example) == [getattr(task, "key", "query")]


BAD_PROMPT_FILES = [  # prompt.file, what p.yaml says, message
    ("none.yaml", "", "no such file"),
    ("p.yaml", "- a", "expected `key: value`"),
    ("p.yaml", "a: [", "p.yaml"),
    ("p.yaml", "usr: x", "unknown key prompt.usr"),
    (3, "", "prompt.file: expected str"),
]


@pytest.mark.parametrize("file, text, message", BAD_PROMPT_FILES)
def test_a_prompt_file_that_is_none_is_named(tmp_path, file, text, message):
    (tmp_path / "p.yaml").write_text(text)

    with pytest.raises(ConfigError, match=message) as error:
        load_prompt_config(tmp_path, file=file)
    assert "\n" not in str(error.value)
