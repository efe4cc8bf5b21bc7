"""A task of a user's own that goes wrong, in its methods or while it is imported: one line with the
method and the query.
"""

import pytest
from test_tasks import TITLES, rollout, scorer

from recr1.config.schema import Config, ConfigError
from recr1.data_types import Prompt
from recr1.retrieval.interface import RetrieverError
from recr1.tasks.registry import build_task
from recr1.utils.interrupts import Stopped


class Mine:
    """A task of a user's own; `change` makes a method do something else."""

    placeholders = ("query",)
    required_fields = ()
    uses_retriever = True
    change = {}

    def __init__(self, rule):
        pass

    def __getattribute__(self, name):
        change = object.__getattribute__(self, "change")
        return change[name] if name in change else object.__getattribute__(self, name)

    def render(self, row, title):
        return (row["text"],)

    def parse(self, completion, row):
        return ([completion], None) if completion else (None, "empty")

    def baseline_answer(self, row):
        return [row["text"]]

    def rank(self, answers, rows, k, search):
        return search([" ".join(words) for words in answers], k)


def fails(error):
    def method(*_):
        raise error

    return method


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(render=fails(KeyError("day"))),
            "render raised KeyError: 'day' for the query 'lamps'",
        ),
        (
            dict(render=lambda *_: "lamps"),
            "render returned 'lamps', must be 1 strings, one for each of query,",
        ),
        (dict(render=lambda *_: ("a", "b")), "must be 1 strings"),
        (dict(render=lambda *_: ("\ud800",)), "which cannot be written as JSON in UTF-8"),
        (dict(render=lambda row, title: (title("nowhere"),)), "render raised KeyError: 'nowhere'"),
        (
            dict(parse=fails(ValueError("no\n\x1b[2Jlist"))),
            r"parse raised ValueError: no \[2Jlist for the query 'lamps'",
        ),
        (dict(parse=fails(SystemExit(3))), "parse raised SystemExit: 3"),
        (dict(parse=lambda *_: None), "parse returned None, must be"),
        (dict(parse=lambda *_: ("a", "b")), "must be"),
        (dict(parse=lambda *_: (None, 3)), "must be"),
        (dict(parse=lambda *_: (None, "")), "must be"),
        (
            dict(parse=lambda *_: ({1, 2}, None)),
            r"parse returned \({1, 2}, None\), which cannot be written",
        ),
        (dict(parse=lambda *_: (float("nan"), None)), "which cannot be written as JSON"),
        (dict(baseline_answer=fails(IndexError("x"))), "baseline_answer raised IndexError"),
        (dict(baseline_answer=lambda *_: b"x"), "baseline_answer returned b'x', which cannot"),
        (
            dict(rank=fails(RecursionError("deep"))),
            "rank raised RecursionError: deep for 1 queries, the first 'lamps'",
        ),
        (dict(rank=lambda *_: []), "a list of document ids for each of the 1 answers"),
        (dict(rank=lambda *_: [[3]]), "a list of document ids for each"),
        (dict(rank=lambda *_: None), "rank returned None"),
        (dict(rank=lambda answers, rows, k, search: search([3], k)), "rank raised AttributeError"),
        (dict(placeholders="query"), "placeholders must be a tuple of strings, is 'query'"),
        (dict(required_fields=None), "required_fields must be a tuple"),
    ],
)
def test_a_task_of_ones_own_that_fails_is_named_with_its_method_and_query(
    change, message, monkeypatch
):
    def ask():
        task = build_task(Config(task="test_user_task:Mine"))
        row = dict(text="lamps")
        task.render(row, TITLES.__getitem__)
        s = scorer(task, {"q": {"d1": 1.0}})
        return s.score_answers([Prompt("q", 0, "", (), row)], [task.baseline_answer(row)]), s.score(
            [rollout("1", row=row), rollout("", row=row)]
        )

    [raw], rewards = ask()
    assert raw["ndcg"] == 0
    assert [(r.answer, r.error) for r in rewards] == [(["1"], None), (None, "empty")]
    assert rewards[0].terms["ndcg"] > 0
    monkeypatch.setattr(Mine, "change", change)
    with pytest.raises(ConfigError, match=message) as e:
        ask()
    assert "test_user_task:Mine" in str(e.value)
    assert str(e.value).isprintable()


@pytest.mark.parametrize(
    "through", [Stopped("now"), KeyboardInterrupt(), RetrieverError("call 3 raised")]
)
def test_a_stop_and_the_retrievers_own_error_pass_through_a_users_task(through, monkeypatch):
    monkeypatch.setattr(Mine, "change", dict(rank=fails(through)))
    with pytest.raises(type(through)) as e:
        build_task(Config(task="test_user_task:Mine")).rank(["x"], [dict(text="lamps")], 3, None)
    assert e.value is through


def test_a_module_that_fails_while_it_is_imported_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text, said in (
        ("typo", "def f(:\n", "SyntaxError: .*typo.py, line 1"),
        ("zero", "1 / 0", "ZeroDivisionError"),
        ("leaves", "import sys\nsys.exit(0)", "SystemExit"),
    ):
        (tmp_path / f"own_{name}.py").write_text(text)
        with pytest.raises(
            ConfigError, match=f"task: 'own_{name}:T' cannot be loaded: {said}"
        ) as e:
            build_task(Config(task=f"own_{name}:T"))
        assert "\n" not in str(e.value)
